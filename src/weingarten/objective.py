"""Batches of data and the objective whose curvature is taken."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from weingarten.losses import Loss
from weingarten.tree import Tree, TreeLike

__all__ = [
    "Batch",
    "Data",
    "Objective",
    "curvature_pass",
    "each_tensor",
    "gradient_twice",
    "graph_nodes",
    "input_rows",
    "refuse_once_differentiable",
]

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
    """``g(params) = loss(output(model(params, inputs)), targets, weights)``, a mean over valid elements, or their sum.

    Args:
        model: an ``nn.Module``, called as ``model(inputs)``, or a function ``model(params, inputs)`` of a dict of tensors.
        loss: a :class:`weingarten.losses.Loss`.
        output: picks the tensor that the loss takes from what the model returns; default None, for models that return it. Models
            of Hugging Face return an object: ``output=lambda out: out.logits``, or ``out.logits.mT`` for the cross-entropy of
            tokens, whose classes belong in dimension 1.

    Raises:
        TypeError: if ``loss`` is no loss of this package, or ``output`` cannot be called.

    >>> from weingarten.losses import MSE
    >>> objective = Objective(lambda params, x: x @ params["w"], MSE())
    >>> batch = Batch(torch.ones(3, 2), torch.zeros(3, 1))
    >>> float(objective.value({"w": torch.ones(2, 1)}, batch))
    4.0
    """

    def __init__(self, model: Model, loss: Loss, output: Callable[[Any], Tensor] | None = None) -> None:
        if not isinstance(loss, Loss):
            raise TypeError(
                f"Objective: loss is {loss!r}, expected a weingarten loss such as wg.CrossEntropy(), wg.MSE() or "
                "wg.BinaryCrossEntropy(), which know their curvature"
            )
        if output is not None and not callable(output):
            raise TypeError(
                f"Objective: output is {output!r}, expected a function of what the model returns, such as lambda out: out.logits"
            )
        self.model = model
        self.loss = loss
        self.output = output

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
        """The model's output at ``params``, as the loss takes it.

        A tied parameter may go by any of its names; modules may have several names too.

        Raises:
            TypeError: if the model, or ``output`` after it, returns anything but one tensor.
            ValueError: if two names of one parameter have different values.
        """
        if not isinstance(self.model, nn.Module):
            returned: Any = self.model(dict(params), inputs)
        else:
            mapping = isinstance(inputs, Mapping)
            args = () if mapping else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
            keywords = dict(inputs) if mapping else {}
            everywhere = _everywhere(self.model, params)
            returned = torch.func.functional_call(self.model, everywhere, args, keywords, tie_weights=False)
        found = returned if self.output is None else self.output(returned)
        if isinstance(found, Tensor):
            return found
        source = "the model returned" if self.output is None else "output= returned"
        raise TypeError(
            f"Objective.forward: {source} {type(found).__name__}, expected one tensor; {_remedy(found)}"
        )

    def total(self, params: TreeLike, batch: Batch) -> Tensor:
        """``sum_n w_n l_n`` of one batch, not divided."""
        return self.loss.total(self.forward(params, batch.inputs), batch.targets, batch.weights)

    def value(self, params: TreeLike, batch: Batch, count: float | None = None) -> Tensor:
        """The loss of one batch.

        Args:
            params: the parameters.
            batch: inputs, targets and weights.
            count: M, what a mean divides by; default: the batch's own. A loss with ``reduction="sum"`` does not divide.
        """
        count = self.loss.count(batch.targets) if count is None else count
        return self.total(params, batch) / self.loss.divisor(count)

    def count(self, data: Data) -> float:
        """M of all batches: the number of valid elements, or the sum of their class weights.

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


def _everywhere(model: nn.Module, values: TreeLike) -> Tree:
    """Values for every place of the model that holds one of the given parameters or buffers, each place by one name.

    ``functional_call`` ties weights by all their names instead, and so leaves a tensor in place of a parameter whose module has
    two.
    """
    given: dict[int, str] = {}  # the name that a tensor of the model is given by
    places: dict[str, int] = {}
    unknown, visited = dict(values), set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, held in (
            *module.named_parameters(prefix, recurse=False, remove_duplicate=False),
            *module.named_buffers(prefix, recurse=False, remove_duplicate=False),
        ):
            if name in values:
                unknown.pop(name, None)
                first = given.setdefault(id(held), name)
                if values[first] is not values[name]:
                    raise ValueError(
                        f"Objective.forward: {first!r} and {name!r} are one tied parameter, found two values; pass one of them"
                    )
            if module not in visited:
                places[name] = id(held)
        visited.add(module)
    return unknown | {name: values[given[place]] for name, place in places.items() if place in given}


def _remedy(returned: Any) -> str:
    """How to have a tensor instead."""
    if isinstance(getattr(returned, "logits", None), Tensor):
        return (
            "pass Objective(..., output=lambda out: out.logits), or out.logits.mT for a loss of tokens, whose classes are in "
            "dimension 1"
        )
    if isinstance(returned, Mapping) and returned:
        return f"pass Objective(..., output=lambda out: out[{next(iter(returned))!r}]), or another of {list(returned)}"
    if isinstance(returned, tuple | list):
        return "pass Objective(..., output=lambda out: out[0]), or another place"
    return "pass output=, which picks the tensor that the loss takes from what the model returns"


def graph_nodes(*outputs: Tensor) -> Iterator[Any]:
    """Every node of the autograd graph below ``outputs``, once."""
    seen, stack = set(), [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions)


def gradient_twice(call: str, value: Tensor, leaves: TreeLike, remedy: str) -> Tree:
    """The gradient of a 0-d ``value``, to be differentiated again; raises as :func:`refuse_once_differentiable` does."""
    one = torch.ones_like(value, requires_grad=True)  # else no operation after which all is linear is noticed
    found = torch.autograd.grad(value, list(leaves.values()), one, create_graph=True, materialize_grads=True)
    refuse_once_differentiable(call, found, remedy)
    return dict(zip(leaves, found, strict=True))


def refuse_once_differentiable(call: str, derivatives: Iterable[Tensor], remedy: str) -> None:
    """Refuse first derivatives with an operation in their graph that has no second.

    PyTorch itself passes over it in silence where ``torch.autograd.grad`` is told its inputs.

    Args:
        call: for the message.
        derivatives: made with ``create_graph``.
        remedy: what to do instead.

    Raises:
        NotImplementedError: if there is an operation whose backward pass is marked ``once_differentiable``.
    """
    if any(node.name().endswith("autograd::Error") for node in graph_nodes(*derivatives)):
        raise NotImplementedError(
            f"{call}: found an operation without a second derivative (a torch.autograd.Function whose backward is "
            f"once_differentiable), expected a backward pass that can be differentiated again; {remedy}"
        )


def input_rows(inputs: Any, index: Tensor, data: int) -> Any:
    """Rows of every tensor with ``data`` rows; all else (a mask for all data, None, a flag) as it is.

    >>> masked = (torch.arange(6).reshape(3, 2), torch.eye(2), None)
    >>> input_rows(masked, torch.tensor([1]), data=3)
    (tensor([[2, 3]]), tensor([[1., 0.],
            [0., 1.]]), None)
    """

    def rows(x: Tensor) -> Tensor:
        return x.index_select(0, index.to(x.device)) if x.ndim and len(x) == data else x

    return each_tensor(rows, inputs)


def each_tensor(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """The inputs with the function's result in place of each tensor."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: each_tensor(function, value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(each_tensor(function, value) for value in inputs)
    return inputs


@contextmanager
def curvature_pass(model: Model, twice: bool = True, training: bool = False) -> Iterator[None]:
    """Evaluate without dropout, so that it can be differentiated twice; leave the model as it was.

    What ``torch.compile`` wraps runs as it was written, so that its operations can be followed. On every
    exit each submodule's own mode comes back.

    Args:
        model: its submodules are in evaluation mode inside.
        twice: use the math kernel of scaled dot-product attention, since the fused ones have no double backward and cannot be
            batched over output gradients.
        training: leave the submodules' modes as they are.
    """
    modes: dict[nn.Module, bool] = {}
    if isinstance(model, nn.Module) and not training:
        modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with ExitStack() as stack:
            if twice:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if "torch._dynamo" in sys.modules:  # else nothing is compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
