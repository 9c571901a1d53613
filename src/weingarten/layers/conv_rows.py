"""Input patches of convolutions: as rows, and their second moment without forming them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.layers.arrangement import Arrangement
from weingarten.layers.rows import DenseRows, Rows, gram
from weingarten.layers.sharing import Expand, Sharing

__all__ = ["ConvRows", "Geometry", "patches"]

_ENTRIES = 2**20  # of pixel rows held at once: as many as a cache holds
_FEW = 0.1  # share of positions up to which they are left out by subtraction


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, padding (both sides of each dimension), dilation; ``extra`` output padding if ``transposed``."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    extra: tuple[int, ...] = ()

    @property
    def shifts(self) -> bool:
        """Whether neighbouring outputs see neighbouring inputs of an image of one group, so that moments follow from shifts."""
        plain = not self.transposed and self.groups == 1 and len(self.kernel) == 2
        return plain and self.stride[0] == 1 and prod(self.kernel) > 1


@dataclass(frozen=True)
class ConvRows(Rows):
    """Patches of ``x``, ``(R, C, *size)``, at all output locations.

    Attributes:
        x: the input, and ``geometry`` the convolution.
        arrangement: where the data lie in its first axis, and ``data`` how many.
        one: whether each row ends with a one.
    """

    x: Tensor
    geometry: Geometry
    arrangement: Arrangement
    data: int
    one: bool

    @property
    def width(self) -> int:
        return self.x.shape[1] // self.geometry.groups * prod(self.geometry.kernel) + self.one

    @property
    def number(self) -> int:
        if not self.geometry.transposed:
            return len(self.x) * self._locations
        return self._formed.number

    def thinned(self, weight: Tensor | None, start: int, stride: int) -> tuple[Rows, Tensor | None]:
        """Every ``stride``-th datum: neighbouring locations share what they cost."""
        if self.arrangement.merged:
            return self, weight
        some = slice(start % min(stride, self.data), None, min(stride, self.data))
        rows = replace(self, x=self.x[some], data=len(range(self.data)[some]))
        return rows, None if weight is None else weight[:, some]

    def formed(self) -> DenseRows:
        return self._formed

    @cached_property
    def _formed(self) -> DenseRows:
        groups = self.geometry.groups
        values = patches(self.x, self.geometry).unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
        rows = self.arrangement.split(values, self.data, skip=1)  # (groups, N, [T], L, in)
        return DenseRows(rows.flatten(2, -2), self.one)

    def rotated(self, right: Tensor | None) -> Rows:
        return self._formed.rotated(right)

    def gradients(self, g: Tensor, data: slice) -> Tensor:
        if self.arrangement.merged:
            return self._formed.gradients(g, data)
        x, g = self.x[data], g[:, :, data]  # patches of no more data than are wanted
        return replace(self, x=x, data=len(x)).formed().gradients(g, slice(None))

    def moment(self, sharing: Sharing, weight: Tensor | None, dense: bool) -> tuple[Tensor, Tensor]:
        simple = (
            dense and isinstance(sharing, Expand) and self.geometry.shifts and not self.arrangement.merged
        )
        if not simple:
            return self._formed.moment(sharing, weight, dense)
        if weight is None:
            inner, total = shifted_moment(self.x, self.geometry)
            return self._bordered(inner, total, inner.new_full((1,), len(self.x) * self._locations))
        weight = weight[0]  # (N, L)
        by_datum = weight.amax(1)
        dead = (weight == 0) & (by_datum > 0)[:, None]
        if int(dead.sum()) > _FEW * dead.numel():
            return self._formed.moment(sharing, weight[None], dense)
        scale = by_datum.sqrt()
        inner, total = shifted_moment(self.x * scale[:, None, None, None], self.geometry, scale)
        number = by_datum.sum() * self._locations
        if dead.any():
            row, place = dead.nonzero(as_tuple=True)
            out = patches_at(self.x, self.geometry, row, place)
            scaled = out * by_datum[row, None]
            inner, total = inner - scaled.mT @ out, total - scaled.sum(0)
            number = number - by_datum[row].sum()
        return self._bordered(inner, total, number.reshape(1))

    @property
    def _locations(self) -> int:
        return prod(output_size(self.x, self.geometry))

    def _bordered(self, inner: Tensor, total: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        if self.one:
            inner = torch.cat([inner, total[None]])
            inner = torch.cat([inner, torch.cat([total, number])[:, None]], dim=1)
        return inner[None], number


def shifted_moment(x: Tensor, geometry: Geometry, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""``sum_p a_p a_p^T`` and ``sum_p s_p a_p`` over the patches ``a_p`` of images, without forming them; stride 1 in rows.

    With ``u_q`` the patch's row of pixels that begins at image row q, the block of kernel rows i and i' is
    ``sum_{p} u_{p + i d} u_{p + i' d}^T``, which depends on ``i' - i`` but for the image's first and last rows. So one product
    for each difference of kernel rows is enough, with what the borders add taken off: exact, and about ``kernel height / 2``
    times cheaper than the product of whole patches.

    Args:
        x: images ``(N, C, H, W)``.
        geometry: of the convolution.
        scale: ``s_n`` of each image, default ones.

    Returns:
        ``(C k, C k)`` and ``(C k,)``.
    """
    (high, wide), channels = geometry.kernel, x.shape[1]
    size = wide * channels
    inner = x.new_zeros(high, size, high, size)
    total = x.new_zeros(high, size)
    step = max(1, _ENTRIES // (x.shape[2] * x.shape[3] * size))
    for first in range(0, len(x), step):
        some = slice(first, first + step)
        _add_shifted(inner, total, x[some], geometry, None if scale is None else scale[some])
    inner = inner.reshape(high, wide, channels, high, wide, channels).permute(2, 0, 1, 5, 3, 4)
    width = high * size
    return inner.reshape(width, width), total.reshape(high, wide, channels).permute(2, 0, 1).reshape(width)


def _add_shifted(inner: Tensor, total: Tensor, x: Tensor, geometry: Geometry, scale: Tensor | None) -> None:
    """Add what some images contribute, in the order (kernel row, kernel column, channel)."""
    high = len(total)
    step = geometry.dilation[0]
    out, across = output_size(x, geometry)
    u = _pixel_rows(x, geometry, across)
    rows = len(u)
    for difference in range(high):
        shift = difference * step
        one, other = u[: rows - shift].flatten(0, 1), u[shift:].flatten(0, 1)
        whole = gram(one[None])[0] if difference == 0 else one.mT @ other
        for i in range(high - difference):
            block = whole
            for strip in (slice(0, i * step), slice(i * step + out, rows - shift)):
                if strip.start < strip.stop:
                    moved = u[strip.start + shift : strip.stop + shift]
                    block = block - u[strip].flatten(0, 1).mT @ moved.flatten(0, 1)
            inner[i, :, i + difference] += block
            if difference:
                inner[i + difference, :, i] += block.mT
    if scale is not None:
        u = u.unflatten(1, (len(x), across)) * scale[:, None, None]
        u = u.flatten(1, 2)
    sums = u.sum(1)  # (rows, size)
    for i in range(high):
        total[i] += sums[i * step : i * step + out].sum(0)


def _pixel_rows(x: Tensor, geometry: Geometry, across: int) -> Tensor:
    """What a kernel row sees at each image row and column of outputs, ``(H', N * W_out, kernel width * C)``."""
    pixels = functional.pad(x.permute(2, 0, 3, 1), (0, 0, *geometry.padding[1], 0, 0, *geometry.padding[0]))
    rows, images, _, channels = pixels.shape  # channels last
    strides = pixels.stride()
    windows = pixels.as_strided(
        (rows, images, across, geometry.kernel[1], channels),
        (
            strides[0],
            strides[1],
            strides[2] * geometry.stride[1],
            strides[2] * geometry.dilation[1],
            strides[3],
        ),
    )
    return windows.reshape(rows, images * across, geometry.kernel[1] * channels)


def output_size(x: Tensor, geometry: Geometry) -> list[int]:
    """Output locations along each dimension of a convolution that is not transposed."""
    return [
        (n + low + high - d * (k - 1) - 1) // s + 1
        for n, (low, high), k, s, d in zip(
            x.shape[2:], geometry.padding, geometry.kernel, geometry.stride, geometry.dilation, strict=True
        )
    ]


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Input patches ``(R, C * kernel, L)`` of ``x``, ``(R, C, *size)``, at all output locations."""
    if geometry.transposed:
        return _transposed_patches(x, geometry)
    x = functional.pad(x, [side for pair in reversed(geometry.padding) for side in pair])
    size = output_size(
        x, Geometry(geometry.kernel, geometry.stride, ((0, 0),) * (x.ndim - 2), geometry.dilation, 1)
    )
    if len(geometry.kernel) == 2:
        return functional.unfold(x, geometry.kernel, dilation=geometry.dilation, stride=geometry.stride)
    steps = x.stride()[2:]
    windows = x.as_strided(
        (*x.shape[:2], *geometry.kernel, *size),
        (
            *x.stride()[:2],
            *(s * d for s, d in zip(steps, geometry.dilation, strict=True)),
            *(s * t for s, t in zip(steps, geometry.stride, strict=True)),
        ),
    )
    return windows.reshape(len(x), x.shape[1] * prod(geometry.kernel), prod(size))


def patches_at(x: Tensor, geometry: Geometry, row: Tensor, place: Tensor) -> Tensor:
    """Patches ``(P, C * kernel)`` of some images ``row`` at some output locations ``place``; two dimensions, not transposed."""
    chosen, which = torch.unique(row, return_inverse=True)
    return patches(x[chosen], geometry)[which, :, place]


def _transposed_patches(x: Tensor, geometry: Geometry) -> Tensor:
    """The entry of ``x`` that each kernel element brings to each output location: a transposed convolution with unit kernels."""
    kernel = prod(geometry.kernel)
    units = torch.eye(kernel, dtype=x.dtype, device=x.device).reshape(1, kernel, *geometry.kernel)
    function = {
        1: functional.conv_transpose1d,
        2: functional.conv_transpose2d,
        3: functional.conv_transpose3d,
    }[len(geometry.kernel)]
    spread = function(
        x.flatten(0, 1).unsqueeze(1),
        units,
        None,
        geometry.stride,
        [low for low, _ in geometry.padding],
        geometry.extra,
        1,
        geometry.dilation,
    )
    return spread.reshape(len(x), x.shape[1] * kernel, -1)
