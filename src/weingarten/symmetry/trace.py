"""A model as a graph of tensor operators, and what the operator rules need to walk it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from weingarten.symmetry.trace_axes import (
    Axis,
    Bound,
    factors,
    frozen,
    is_frozen,
    limit,
    root,
    settle,
    tie,
)

__all__ = ["Axes", "Rule", "Trace", "Value", "export", "operator_name", "tie_all"]

Axes = list[Axis]
"""One per dimension of a tensor."""

Value = Any
"""What a node gives: ``Axes``, or a list of them for several outputs."""

CREATE = (
    *("getitem", "expand", "repeat", "repeat_interleave"),
    *("zeros_like", "new_zeros", "ones_like", "new_ones", "full_like", "new_full"),
)
"""Operators whose result may have axes that their arguments do not have."""

Rule = Callable[["Trace", fx.Node], Value]
"""Ties and bounds the axes of one operator's arguments and returns those of its result."""


def export(model: nn.Module, example_inputs: Any) -> torch.export.ExportedProgram:
    """The model in evaluation mode as a functional graph of ATen operators; the model itself stays as it is.

    Raises:
        ValueError: if torch.export cannot trace the model.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    else:
        args = (example_inputs,)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # otherwise nn.TransformerEncoder is one opaque operator
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(copy.deepcopy(model).eval(), args, kwargs, strict=False)
            return program.run_decompositions({})
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"infer_symmetry: torch.export cannot trace {type(model).__name__}: {type(error).__name__} {reason}; "
            "check example_inputs (a tensor, a tuple of positional or a dict of keyword arguments), or declare the symmetry "
            "with Symmetry.parse and test it with check_symmetry"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def operator_name(node: fx.Node) -> str:
    """``linear`` for ``aten::linear``; other libraries keep their prefix."""
    schema = getattr(node.target, "_schema", None)
    return (
        schema.name.removeprefix("aten::")
        if schema is not None
        else getattr(node.target, "__name__", str(node.target))
    )


class Trace:
    """The state of one walk over a graph.

    Attributes:
        values: of every node so far.
        params: axes of trainable parameters by name, in the model's order.
        buffers: axes of buffers that move along with the parameters: running statistics.
        unknown: operators without a rule that touched axes on which a group acted.
        products: nodes whose product along some dimensions is summed by all their users.
        contracted: pairs (summed or mixed axes, axes that survive).
        unaligned: pairs (axes of one operand only, axes shared by both).
    """

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.values: dict[fx.Node, Value] = {}
        self.params: dict[str, Axes] = {
            name: [Axis(int(n)) for n in p.shape] for name, p in model.named_parameters() if p.requires_grad
        }
        self.buffers: dict[str, Axes] = {}
        self.unknown: list[str] = []
        self.products: dict[fx.Node, set[int]] = {}
        self.contracted: list[tuple[Axes, Axes]] = []
        self.unaligned: list[tuple[Axes, Axes]] = []
        self._program = program
        self._canonical = {id(p): name for name, p in model.named_parameters()}
        self._model = model
        self._used: set[str] = set()

    def run(self, rules: Mapping[str, Rule]) -> None:
        """Walk the graph; what has no rule frees the axes that it touches."""
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node, rules)
            elif node.op == "output":
                for axes in self._tensors(node):
                    self.free(axes, "the model's output")
        for name in self.params.keys() - self._used:
            self.free(self.params[name], "no operator uses it")

    def of(self, arg: Any) -> Axes:
        """Axes of an argument; of a number: none."""
        return self.values.get(arg, []) if isinstance(arg, fx.Node) else []

    def shape(self, node: fx.Node) -> list[int]:
        """Of a node's tensor."""
        value = node.meta["val"]
        return [int(n) for n in value.shape] if isinstance(value, Tensor) else []

    def why(self, node: fx.Node) -> str:
        """Operator and place, for reports."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        place = stack[-1][0] if stack else ""
        return f"{operator_name(node)} in {place}" if place else operator_name(node)

    def free(self, axes: Iterable[Axis], why: str) -> None:
        """Let nothing act on these axes."""
        for axis in axes:
            limit(axis, Bound.FREE, why)

    def limit(self, axes: Iterable[Axis], bound: Bound, node: fx.Node) -> None:
        """Bound these axes."""
        for axis in axes:
            limit(axis, bound, self.why(node))

    def fresh(self, node: fx.Node, bound: Bound = Bound.FREE) -> Value:
        """New axes for a node's result, or for each of its results."""

        def axes(value: Any) -> Value:
            if isinstance(value, Tensor):
                return [Axis(int(n), bound, self.why(node)) for n in value.shape]
            return [axes(v) for v in value] if isinstance(value, tuple | list) else []

        return axes(node.meta.get("val"))

    def mix(self, mixed: Sequence[Axis], survivors: Sequence[Axis]) -> None:
        """Entries along ``mixed`` are combined, ``survivors`` stay."""
        self.contracted.append((list(mixed), list(survivors)))
        self._settle(mixed, survivors)

    def misalign(self, single: Sequence[Axis], shared: Sequence[Axis]) -> None:
        """Two operands share some axes, and ``single`` belong to one of them only."""
        if single and shared:
            self.unaligned.append((list(single), list(shared)))
            self._settle(single, shared)

    def unknown_operator(self, node: fx.Node) -> Value:
        """Free everything the node touches and list it."""
        for axes in self._tensors(node):
            self.free(axes, f"no rule for {self.why(node)}")
        self.unknown.append(self.why(node))
        return self.fresh(node)

    def _settle(self, mixed: Sequence[Axis], kept: Sequence[Axis]) -> None:
        indices = [root(f) for axis in mixed for f in factors(axis)]
        for factor in [f for axis in kept for f in factors(axis)]:
            if factor.kind == "choice" and factor.index is not None and root(factor.index) in indices:
                settle(factor)

    def _tensors(self, node: fx.Node) -> list[Axes]:
        found: list[Axes] = []
        for arg in node.all_input_nodes:
            found += self._results(self.values.get(arg, []))
        return found

    def _call(self, node: fx.Node, rules: Mapping[str, Rule]) -> Value:
        inputs = self._tensors(node)
        name = operator_name(node)
        if name not in CREATE and inputs and all(is_frozen(axis) for axes in inputs for axis in axes):
            return self.fresh(node)  # made of what no group element moves
        try:
            value = rules[name](self, node)
        except (
            KeyError,
            IndexError,
            TypeError,
            ValueError,
        ):  # no rule, or arguments that the rule does not know
            return self.unknown_operator(node)
        for axes in self._results(value):
            self._close(axes)
        return value if self._fits(node, value) else self.unknown_operator(node)

    @staticmethod
    def _results(value: Value) -> list[Axes]:
        return value if value and isinstance(value[0], list) else [value]

    def _fits(self, node: fx.Node, value: Value) -> bool:
        """Whether a rule's result has the operator's shapes; of several results, those that are used.

        (PyTorch 2.11 gives the states of ``lstm`` a dimension too many.)
        """
        expected, results = node.meta.get("val"), self._results(value)
        tensors = list(expected) if isinstance(expected, tuple | list) else [expected]
        items = [user for user in node.users if operator_name(user) == "getitem"]
        some = isinstance(expected, tuple | list) and len(items) == len(node.users)
        used: set[Any] = {item.args[1] for item in items} if some else set(range(len(tensors)))
        shapes = [[int(n) for n in t.shape] if isinstance(t, Tensor) else [] for t in tensors]
        found = [[axis.size for axis in axes] for axes in results]
        return len(shapes) == len(found) and all(shapes[i] == found[i] for i in used)

    def _close(self, axes: Axes) -> None:
        """A choice whose index is no longer among the axes becomes an ordinary axis."""
        present = [f for axis in axes for f in factors(axis)]
        for axis in present:
            if axis.kind == "choice" and axis.index is not None and root(axis.index) not in present:
                settle(axis)

    def _placeholder(self, node: fx.Node) -> Axes:
        signature = self._program.graph_signature
        shape = self.shape(node)
        target = signature.inputs_to_parameters.get(node.name)
        if target is not None:
            name = self._canonical[id(self._model.get_parameter(target))]
            if node.users:
                self._used.add(name)
            return self.params.get(name) or [frozen(n, f"the frozen parameter {name}") for n in shape]
        target = signature.inputs_to_buffers.get(node.name)
        if target is None:
            constant = signature.inputs_to_lifted_tensor_constants.get(node.name)
            return [frozen(n, f"the constant {constant}" if constant else "the model's input") for n in shape]
        if shape and node.users and all(_is_running_statistic(user, node) for user in node.users):
            return self.buffers.setdefault(target, [Axis(n) for n in shape])
        return [frozen(n, f"the buffer {target}") for n in shape]


def _is_running_statistic(user: fx.Node, buffer: fx.Node) -> bool:
    norms = ("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
    return operator_name(user) in norms and buffer in user.args[3:5]


def tie_all(axes: Sequence[Axis]) -> Axis:
    """Tie axes of one size and return them as one."""
    for other in axes[1:]:
        tie(axes[0], other)
    return axes[0]
