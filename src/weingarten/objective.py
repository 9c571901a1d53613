"""Batches of data and the objective whose curvature is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from weingarten.losses import Loss
from weingarten.tree import Tree, TreeLike

__all__ = ["Batch", "Data", "Objective", "curvature_pass", "graph_nodes", "input_rows"]

Model = nn.Module | Callable[[Tree, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """Some data: inputs, targets, per-datum weights and row numbers.

    Attributes:
        inputs: what the model takes: a tensor, a tuple or list (positional arguments; a DataLoader turns tuples into lists) or
            a dict (keyword arguments).
        targets: what the loss takes; first dimension N.
        weights: ``(N,)``, >= 0, or None for ones.
        rows: ``(N,)`` row numbers in the full data set, or None; outer variables that belong to data are found by them.
    """

    inputs: Any
    targets: Tensor
    weights: Tensor | None = None
    rows: Tensor | None = None

    @staticmethod
    def of(value: Batch | Sequence[Any]) -> Batch:
        """A batch from a batch or from a tuple ``(inputs, targets[, weights])``.

        Raises:
            TypeError: for anything else.
        """
        if isinstance(value, Batch):
            return value
        if isinstance(value, tuple | list) and len(value) in (2, 3):
            return Batch(*value)
        raise TypeError(
            f"Batch.of: found {type(value).__name__}, expected a Batch or a tuple (inputs, targets) or (inputs, targets, weights)"
        )


Data = Iterable[Batch | Sequence[Any]]


class Objective:
    """``g(params) = loss(model(params, inputs), targets, weights)``, a mean over valid elements.

    Args:
        model: an ``nn.Module``, called as ``model(inputs)``, or a function ``model(params, inputs)`` of a dict of tensors.
        loss: a :class:`weingarten.losses.Loss`.

    >>> from weingarten.losses import MSE
    >>> objective = Objective(lambda params, x: x @ params["w"], MSE())
    >>> batch = Batch(torch.ones(3, 2), torch.zeros(3, 1))
    >>> float(objective.value({"w": torch.ones(2, 1)}, batch))
    4.0
    """

    def __init__(self, model: Model, loss: Loss) -> None:
        if not isinstance(loss, Loss):
            raise TypeError(
                f"Objective: loss is {loss!r}, expected a weingarten loss such as wg.CrossEntropy(), wg.MSE() or "
                "wg.BinaryCrossEntropy(), which know their curvature"
            )
        self.model = model
        self.loss = loss

    def params(self) -> Tree:
        """The trainable parameters of the module, detached (shared memory, no history).

        Raises:
            TypeError: if the model is a function, which holds no parameters.
            ValueError: if every parameter is frozen.
        """
        if not isinstance(self.model, nn.Module):
            raise TypeError(
                "Objective.params: the model is a function and holds no parameters; pass params yourself"
            )
        found = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        if not found:
            raise ValueError(
                "Objective.params: no parameter has requires_grad=True; unfreeze what should have curvature"
            )
        return found

    def forward(self, params: TreeLike, inputs: Any) -> Tensor:
        """The model's output at ``params``.

        Raises:
            TypeError: if the model returns anything but one tensor.
        """
        if not isinstance(self.model, nn.Module):
            output: Any = self.model(dict(params), inputs)
        elif isinstance(inputs, Mapping):
            output = torch.func.functional_call(self.model, dict(params), (), dict(inputs))
        else:
            args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
            output = torch.func.functional_call(self.model, dict(params), args)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"Objective.forward: the model returned {type(output).__name__}, expected one tensor; wrap the model so that it "
                "returns what the loss takes"
            )
        return output

    def value(self, params: TreeLike, batch: Batch, count: int | None = None) -> Tensor:
        """The loss of one batch, divided by ``count`` (default: the batch's own number of valid elements)."""
        total = self.loss.total(self.forward(params, batch.inputs), batch.targets, batch.weights)
        return total / max(self.loss.count(batch.targets) if count is None else count, 1)

    def count(self, data: Data) -> int:
        """M, the number of valid elements in all batches.

        Raises:
            ValueError: if there are none, which includes an iterator that is already used up.
        """
        result = sum(self.loss.count(Batch.of(batch).targets) for batch in data)
        if result == 0:
            raise ValueError(
                "Objective.count: the data has no valid element; pass a list of batches or a DataLoader that can be iterated "
                "again"
            )
        return result


def graph_nodes(output: Tensor) -> Iterator[Any]:
    """Every node of the autograd graph below ``output``, once."""
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions)


def input_rows(inputs: Any, index: Tensor) -> Any:
    """Rows of all tensors in the inputs; what is no tensor (None, a flag) belongs to all data."""
    if isinstance(inputs, Tensor):
        return inputs.index_select(0, index)
    if isinstance(inputs, Mapping):
        return {name: input_rows(value, index) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(input_rows(value, index) for value in inputs)
    return inputs


@contextmanager
def curvature_pass(model: Model) -> Iterator[None]:
    """Evaluate without dropout and with attention that can be differentiated twice; leave the model as it was.

    Inside, every submodule is in evaluation mode and scaled dot-product attention uses the math kernel, since the fused kernels
    have no double backward. On every exit each submodule's own mode comes back.
    """
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if isinstance(model, nn.Module):
            model.eval()
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            yield
    finally:
        for module, training in modes.items():
            module.training = training
