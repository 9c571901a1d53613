"""Curvatures in files: tensors in the safetensors format, and what they mean as JSON in its header. Nothing is pickled."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from weingarten.atomic import replacing
from weingarten.groups import Conjugated, Permutation, Rotation, SignedPermutation, Signs, Wreath
from weingarten.operators import (
    BlockDiagonal,
    Commutant,
    Curvature,
    DiagonalCurvature,
    Eigenbasis,
    Kronecker,
    Layout,
    LowRank,
)
from weingarten.symmetry import Isotypic, Symmetry
from weingarten.symmetry.part import Part
from weingarten.symmetry.words import Word
from weingarten.tree import Space

__all__ = ["KINDS", "StorageError", "load", "save"]

FORMAT = "weingarten.curvature"
VERSION = 1


class StorageError(ValueError):
    """A file that holds no curvature, is damaged, or comes from a later version."""


@dataclass(frozen=True)
class Kind:
    """How one class is stored.

    Attributes:
        type: the class.
        fields: the attributes to store: tensors, numbers, text, containers of them, and objects of other kinds.
        build: makes the object from the fields by keyword; default: the class.
    """

    type: type
    fields: tuple[str, ...]
    build: Callable[..., Any] | None = None


def _isotypic(symmetry: Symmetry, space: Space) -> Isotypic:
    zeros = {
        name: torch.zeros((), dtype=space.dtypes[name], device=space.device).expand(shape)
        for name, shape in space.shapes.items()
    }
    return Isotypic(symmetry, zeros)


KINDS: dict[str, Kind] = {
    kind.type.__name__: kind
    for kind in (
        # curvatures
        Kind(BlockDiagonal, ("blocks", "order")),
        Kind(Commutant, ("isotypic", "blocks")),
        Kind(DiagonalCurvature, ("values", "space")),
        Kind(Eigenbasis, ("layout", "left", "right", "spectrum")),
        Kind(Kronecker, ("layout", "inputs", "outputs")),
        Kind(LowRank, ("space", "basis", "spectrum", "rest")),
        # what they are made of
        Kind(Isotypic, ("symmetry", "space"), _isotypic),
        Kind(Layout, ("space", "groups", "axis", "transposed")),
        Kind(Part, ("key", "leaf", "index", "words", "cluster")),
        Kind(Space, ("shapes", "dtypes", "device")),
        Kind(Symmetry, ("parts", "groups", "sizes", "shapes", "buffers")),
        Kind(Word, ("atoms", "span")),
        # groups
        Kind(Conjugated, ("action", "basis")),
        Kind(Permutation, ()),
        Kind(Rotation, ()),
        Kind(SignedPermutation, ()),
        Kind(Signs, ()),
        Kind(Wreath, ("heads", "inner", "outer", "tie")),
    )
}
"""The classes that files may contain; a new curvature is one line here."""


def save(curvature: Curvature, path: str | os.PathLike[str]) -> None:
    """Write a curvature to one ``.safetensors`` file (https://huggingface.co/docs/safetensors), to be read by :func:`load`.

    The file is written aside and moved into place: an interruption or a full disk leaves what was there before. Tensors keep
    their types, every bit of them; the device is not stored. Check sums guard against damage.

    Args:
        curvature: any curvature of the library, from ``wg.estimate`` or made by hand.
        path: the file; its folder is made if it does not exist.

    Raises:
        TypeError: if it is no curvature, or contains a class that is not in ``weingarten.storage.KINDS``, such as a group of
            one's own.
        OSError: if the file cannot be written.
        ImportError: if safetensors is not installed.

    >>> from tempfile import mkdtemp
    >>> path = Path(mkdtemp()) / "curvature.safetensors"
    >>> save(DiagonalCurvature({"w": torch.tensor([1.0, 3.0])}), path)
    >>> load(path).solve({"w": torch.tensor([2.0, 4.0])}, damping=1.0)
    {'w': tensor([1., 1.])}
    """
    if not isinstance(curvature, Curvature):
        raise TypeError(
            f"save: found a {type(curvature).__name__}, expected a curvature; operators such as GGN depend on a model and "
            "on data, estimate a curvature or store these"
        )
    safetensors = _safetensors("save")
    writer = _Writer()
    tree = writer.encode(curvature, "")
    metadata = {"format": FORMAT, "version": str(VERSION), "curvature": json.dumps(tree, ensure_ascii=False)}
    with replacing(Path(path)) as partial:
        try:
            safetensors.torch.save_file(writer.tensors, partial, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"save: cannot write {path}: {error}") from error


def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Curvature:
    """The curvature that :func:`save` wrote: equal bit for bit, on any device.

    Args:
        path: the file.
        device: where its tensors go; default: the CPU, whatever the device it was saved from, since that may not be there.

    Raises:
        StorageError: if the file is no curvature, is not whole, or was written by a later version of weingarten.
        OSError: if the file cannot be read.
        ImportError: if safetensors is not installed.
    """
    safetensors = _safetensors("load")
    place = torch.empty(0, device="cpu" if device is None else device).device
    if not Path(path).is_file():
        raise FileNotFoundError(f"load: there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise StorageError(
                    f"load: {path} holds {metadata.get('format', 'other tensors')!r}, expected {FORMAT!r}, as wg.save writes it"
                )
            version = int(metadata["version"])
            if version > VERSION:
                raise StorageError(
                    f"load: {path} has version {version} of the format, expected at most {VERSION}; update weingarten"
                )
            found = _Reader(file, place).decode(json.loads(metadata["curvature"]))
    except StorageError:
        raise
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StorageError(
            f"load: {path} is damaged or no curvature file ({type(error).__name__}: {error}), expected one that wg.save wrote; "
            "estimate the curvature again or take another copy"
        ) from error
    if not isinstance(found, Curvature):
        raise StorageError(f"load: {path} holds a {type(found).__name__}, expected a curvature")
    return found


_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "size": torch.Size,
    "slice": lambda bounds: slice(*bounds),
}


@dataclass
class _Writer:
    """Turns objects into JSON and collects their tensors."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    _addresses: set[int] = field(default_factory=set)

    def encode(self, value: Any, name: str) -> Any:
        """JSON for one value; ``name`` says where it stands."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, name)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": None}
        if isinstance(value, slice):
            return {"slice": [value.start, value.stop, value.step]}
        if isinstance(value, tuple | list):
            items = [self.encode(item, f"{name}.{i}") for i, item in enumerate(value)]
            return {"size" if isinstance(value, torch.Size) else type(value).__name__: items}
        if isinstance(value, Mapping):
            items = [
                [self.encode(key, name), self.encode(item, f"{name}.{key if isinstance(key, str) else i}")]
                for i, (key, item) in enumerate(value.items())
            ]
            return {"dict": items}
        kind = KINDS.get(type(value).__name__)
        if kind is None or kind.type is not type(value):
            raise TypeError(
                f"save: found a {type(value).__name__} at {name.lstrip('.') or 'the top'}, expected one of {', '.join(KINDS)}; "
                "add it to weingarten.storage.KINDS"
            )
        fields = {part: self.encode(getattr(value, part), f"{name}.{part}") for part in kind.fields}
        return {"kind": type(value).__name__, "fields": fields}

    def _tensor(self, value: Tensor, name: str) -> dict[str, Any]:
        """A tensor that lies column by column (from eigh, Cholesky) does so again: products then round alike."""
        name = name.lstrip(".")
        while name in self.tensors:
            name += "'"
        columns = value.ndim > 1 and not value.is_contiguous() and value.mT.is_contiguous()
        kept = (value.mT if columns else value).detach().cpu().contiguous()
        whole = kept.numel() * kept.element_size() == kept.untyped_storage().nbytes()
        if not whole or kept.data_ptr() in self._addresses:  # the format knows no views
            kept = kept.clone()
        self._addresses.add(kept.data_ptr())
        self.tensors[name] = kept
        return {"tensor": name, "crc32": _check_sum(kept)} | ({"columns": True} if columns else {})


@dataclass(frozen=True)
class _Reader:
    """The inverse of :class:`_Writer`."""

    file: Any
    device: torch.device

    def decode(self, value: Any) -> Any:
        """The value that was encoded."""
        if not isinstance(value, dict):
            return value
        if "kind" in value:
            kind = KINDS.get(value["kind"])
            if kind is None:
                raise StorageError(
                    f"load: found the kind {value['kind']!r}, expected one of {', '.join(KINDS)}"
                )
            return (kind.build or kind.type)(**{k: self.decode(v) for k, v in value["fields"].items()})
        if "tensor" in value:
            found = self._tensor(value["tensor"], value["crc32"])
            return found.mT if value.get("columns") else found
        ((name, content),) = value.items()
        if name == "dtype":
            dtype = getattr(torch, content)
            if not isinstance(dtype, torch.dtype):
                raise StorageError(f"load: found the type {content!r}, expected one such as 'float32'")
            return dtype
        if name == "device":
            return self.device
        if name == "dict":
            return {self.decode(key): self.decode(item) for key, item in content}
        return _CONTAINERS[name]([self.decode(item) for item in content])

    def _tensor(self, name: str, check_sum: int) -> Tensor:
        value: Tensor = self.file.get_tensor(name)
        if _check_sum(value) != check_sum:
            raise StorageError(
                f"load: tensor {name!r} is damaged, its check sum differs from the one stored; take another copy of the file"
            )
        return value.to(self.device, copy=True)  # not a window on the file, which may change


def _check_sum(value: Tensor) -> int:
    return zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data)


def _safetensors(call: str) -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{call}: safetensors is not installed; pip install 'weingarten[storage]'"
        ) from error
    return safetensors
