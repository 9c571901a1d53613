"""Exact products with the Hessian and the generalised Gauss-Newton matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from weingarten import tree
from weingarten.losses.loss import check_weights
from weingarten.objective import (
    Batch,
    Data,
    Objective,
    curvature_pass,
    gradient_twice,
    graph_nodes,
    refuse_once_differentiable,
)
from weingarten.operators.operator import Operator
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["GGN", "BatchSum", "Hessian", "jacobian_product", "one_sided"]


class BatchSum(Operator):
    """A sum of per-batch products, divided by the number of valid elements of all batches."""

    def __init__(self, objective: Objective, data: Data, params: TreeLike | None = None) -> None:
        """Args as documented in the subclasses."""
        if isinstance(data, Iterator):
            raise TypeError(
                f"{type(self).__name__}: the data is the iterator {type(data).__name__}, which is empty after one product; pass "
                "a list of batches or a DataLoader"
            )
        self.objective = objective
        self.data = data
        self.params = tree.detach(objective.params() if params is None else params)
        self._space = Space.of(self.params)
        self._divisor = objective.loss.divisor(objective.count(data))

    @property
    def space(self) -> Space:
        return self._space

    @final
    def apply(self, v: TreeLike) -> Tree:
        self._space.check(v, f"{type(self).__name__}.apply")
        result = self._space.zeros()
        with curvature_pass(self.objective.model):
            for batch in map(Batch.of, self.data):
                result = tree.add(result, self._product(batch, tree.detach(v)))
        return result

    @final
    def terms(self) -> list[tuple[float, Operator]]:
        """``(p_k, A_k)`` for every batch k, with ``p_k`` its share of the rows: ``sum_k p_k A_k`` is the operator, exactly.

        ``A_k`` is the batch's part of the sum, divided by ``p_k``: the same operator on that batch alone where the loss is a mean
        and every datum has as many valid elements.

        Raises:
            TypeError: if the data is no list or tuple, whose batches alone can be taken one at a time.
        """
        return [(share, self._on(k, share)) for k, share in enumerate(self._shares("terms")) if share]

    @final
    def draw(self, generator: torch.Generator) -> Operator:
        """One of the :meth:`terms`, with its share as probability; raises as they do."""
        shares = self._shares("draw")
        weights = torch.tensor(shares, dtype=torch.float64, device=generator.device)
        k = int(torch.multinomial(weights, 1, generator=generator))
        return self._on(k, shares[k])

    def _shares(self, call: str) -> list[float]:
        """Each batch's share of the rows."""
        if not isinstance(self.data, Sequence):
            raise TypeError(
                f"{type(self).__name__}.{call}: the data is a {type(self.data).__name__}, expected a list or tuple of batches; "
                "pass list(loader)"
            )
        rows = [len(Batch.of(batch).targets) for batch in self.data]
        return [n / sum(rows) for n in rows]

    def _on(self, k: int, share: float) -> Operator:
        """Batch k's part of the sum, divided by ``share``."""
        assert isinstance(self.data, Sequence)
        result = copy(self)
        result.data = [self.data[k]]
        result._divisor = self._divisor * share
        return result

    @abstractmethod
    def _product(self, batch: Batch, v: Tree) -> Tree:
        """One batch's share of the product."""


@final
class Hessian(BatchSum):
    r"""``v -> (d^2 g / d params^2) v``, by double backward (Pearlmutter 1994).

    Indefinite away from a minimum, and on mini-batches: :class:`GGN` is the default elsewhere for that reason.

    Args:
        objective: model and loss.
        data: batches, iterated once for every product; a list or a DataLoader, not an iterator.
        params: where the curvature is taken; default: the module's trainable parameters.

    Raises (from ``apply``):
        NotImplementedError: if an operation of the model has no second derivative; :class:`FiniteDifferenceHessian` needs none.
    """

    def _product(self, batch: Batch, v: Tree) -> Tree:
        params = {name: p.requires_grad_() for name, p in tree.detach(self.params).items()}
        with torch.enable_grad():
            value = self.objective.total(params, batch) / self._divisor
            if not value.requires_grad:
                return tree.zeros_like(self.params)
            gradient = gradient_twice("Hessian.apply", value, params, "use wg.FiniteDifferenceHessian")
            inner = tree.dot(gradient, v)
            if not inner.requires_grad:  # the loss does not depend on the parameters
                return tree.zeros_like(self.params)
            product = torch.autograd.grad(inner, list(params.values()), materialize_grads=True)
        return dict(zip(params, product, strict=True))


@final
class GGN(BatchSum):
    r"""``v -> (1/M) sum_n w_n J_n^T H_n J_n v``, the generalised Gauss-Newton matrix (Schraudolph 2002): always PSD.

    ``J_n`` is the output's Jacobian and ``H_n`` the loss Hessian in the output of datum n. One product costs a forward pass with
    tangents and a backward pass.

    Args:
        objective: model and loss.
        data: batches, iterated once for every product; a list or a DataLoader, not an iterator.
        params: where the curvature is taken; default: the module's trainable parameters.

    Raises (from ``apply``):
        NotImplementedError: if a ``torch.autograd.Function`` of the model is ``once_differentiable``.

    >>> from weingarten.losses import MSE
    >>> objective = Objective(lambda params, x: x @ params["w"], MSE())
    >>> data = [(torch.eye(2), torch.zeros(2, 1))]
    >>> GGN(objective, data, {"w": torch.zeros(2, 1)}).dense()
    tensor([[1., 0.],
            [0., 1.]])
    """

    def _product(self, batch: Batch, v: Tree) -> Tree:
        params = {name: p.requires_grad_() for name, p in tree.detach(self.params).items()}
        loss = self.objective.loss
        with torch.enable_grad():
            output, tangent = jacobian_product(self.objective, params, batch, v)
            if not output.requires_grad:
                return tree.zeros_like(self.params)
            curved = loss.curvature(output.detach(), batch.targets, tangent.detach()) / self._divisor
            if batch.weights is not None:
                check_weights(batch.weights, len(output))
                curved = curved * batch.weights.detach().reshape(-1, *[1] * (curved.ndim - 1))
            product = torch.autograd.grad(output, list(params.values()), curved, materialize_grads=True)
        return dict(zip(params, product, strict=True))


def jacobian_product(objective: Objective, params: Tree, batch: Batch, v: Tree) -> tuple[Tensor, Tensor]:
    """Output and ``J v`` with the Jacobian of *reverse* mode: in one forward pass where both modes agree.

    Where they do not, by two backward passes: where an operation has no forward derivative, where the model switches gradients
    off (``torch.no_grad`` does not stop tangents), and in embeddings with a padding index or gradients scaled by frequency.
    """
    try:
        with forward_ad.dual_level(), _Watch() as watch:
            dual = {name: forward_ad.make_dual(p, v[name].to(p.dtype)) for name, p in params.items()}
            output, tangent = forward_ad.unpack_dual(objective.forward(dual, batch.inputs))
        if not watch.gradients_off and not any(one_sided(node) for node in graph_nodes(output)):
            return output, torch.zeros_like(output) if tangent is None else tangent
    except NotImplementedError:
        pass
    output = objective.forward(params, batch.inputs)
    if not output.requires_grad:
        return output, torch.zeros_like(output)
    dummy = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(
        output, list(params.values()), dummy, create_graph=True, materialize_grads=True
    )
    inner = tree.dot(dict(zip(params, pulled, strict=True)), v)
    refuse_once_differentiable(
        "GGN.apply", [inner], "write it so, or estimate the curvature with wg.KFAC or wg.Diagonal"
    )
    return output, torch.autograd.grad(inner, dummy, retain_graph=True)[0]


class _Watch(TorchFunctionMode):
    """Notes whether an operation runs with gradients switched off."""

    gradients_off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gradients_off |= not torch.is_grad_enabled()
        return func(*args, **(kwargs or {}))


def one_sided(node: Any) -> bool:
    """Whether the backward pass of a graph node leaves out what its forward derivative has."""
    if not node.name().startswith("EmbeddingBackward"):
        return False
    unsigned_minus_one = 2**64 - 1
    return node._saved_padding_idx not in (-1, unsigned_minus_one) or bool(node._saved_scale_grad_by_freq)
