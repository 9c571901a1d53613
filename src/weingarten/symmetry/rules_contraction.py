"""Rules of products that sum: linear maps, matrix products, convolutions, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from weingarten.symmetry.rules_pointwise import ADD, MULTIPLY, combine
from weingarten.symmetry.trace import Axes, Trace, Value, tie_all
from weingarten.symmetry.trace_axes import Axis, Bound, divide, factors, frozen, leaves, product

__all__ = ["addmm", "contract", "convolution", "einsum", "linear", "matmul", "sdpa", "transposed_convolution"]


def contract(
    trace: Trace, node: fx.Node, operands: Sequence[tuple[Axes, Sequence[Any]]], out: Sequence[Any]
) -> Axes:
    """``einsum``: axes with one letter are tied; letters that are not in ``out`` are summed.

    A letter that two operands share and the result keeps is a product entry by entry: permutations. One that is summed over two
    operands is an inner product: rotations. One that is summed in one operand alone: permutations.
    """
    found: dict[Any, list[Axis]] = {}
    lost: dict[Any, Axis] = {}
    for axes, letters in operands:
        for axis, letter in zip(axes, letters, strict=True):
            (found.setdefault(letter, []).append(axis) if axis.size > 1 else lost.setdefault(letter, axis))
    tied = {letter: tie_all(axes) for letter, axes in found.items()}
    for letter, axes in found.items():
        if (letter in out) == (len(axes) > 1) or len(axes) > 2:
            trace.limit(axes, Bound.PERMUTATION, node)
    summed = [axis for letter, axis in tied.items() if letter not in out]
    kept = [axis for letter, axis in tied.items() if letter in out]
    if summed:
        trace.mix(summed, kept)
    if len(operands) > 1:
        shared = [axis for letter, axis in tied.items() if len(found[letter]) > 1]
        trace.misalign([axis for letter, axis in tied.items() if len(found[letter]) == 1], shared)
    return [tied[letter] if letter in tied else lost.get(letter, Axis(1)) for letter in out]


def _matrix_product(trace: Trace, node: fx.Node, a: Axes, b: Axes) -> Axes:
    rows: list[Any] = ["i"] if len(a) > 1 else []
    columns: list[Any] = ["j"] if len(b) > 1 else []
    batch = max(len(a), len(b), 2) - 2
    left = [*range(batch - max(len(a) - 2, 0), batch), *rows, "k"]
    right = [*range(batch - max(len(b) - 2, 0), batch), "k", *columns]
    return contract(trace, node, [(a, left), (b, right)], [*range(batch), *rows, *columns])


def _name_roles(a: Axes, b: Axes, query: bool) -> None:
    """Readable names: products of two activations are queries with keys, or attention with values."""
    for axis in leaves([a[-1] if query else b[-1]]):
        axis.role = axis.role or ("qk" if query else "vo")
    for axis in leaves([*a[1:-2], *b[1:-2]]):
        axis.role = axis.role or "heads"


def matmul(trace: Trace, node: fx.Node) -> Value:
    """``a @ b`` with broadcast batch axes; also ``mm``, ``bmm``, ``mv``, ``dot``."""
    a, b = trace.of(node.args[0]), trace.of(node.args[1])
    result = _matrix_product(trace, node, a, b)
    if min(len(a), len(b)) > 2 and any(f.bound for f in leaves([b[-1], b[-2]])):
        _name_roles(a, b, query=any(f.bound for f in leaves([a[-1]])))
    return result


def linear(trace: Trace, node: fx.Node) -> Value:
    """``y = x W^T + b``: columns with the input, rows with the output and the bias."""
    x, weight = trace.of(node.args[0]), trace.of(node.args[1])
    batch = list(range(len(x) - 1))
    result = contract(
        trace,
        node,
        [(x, [*batch, "i"]), (weight, ["o", "i"][-len(weight) :])],
        [*batch, "o"][: len(x) + len(weight) - 2],
    )
    bias = node.args[2] if len(node.args) > 2 else None
    return result if bias is None else combine(trace, node, [result, trace.of(bias)], ADD)


def addmm(trace: Trace, node: fx.Node) -> Value:
    """``c + a @ b``; also ``baddbmm``."""
    result = _matrix_product(trace, node, trace.of(node.args[1]), trace.of(node.args[2]))
    return combine(trace, node, [trace.of(node.args[0]), result], ADD)


def einsum(trace: Trace, node: fx.Node) -> Value:
    """Any product written with letters; an ellipsis is not understood."""
    equation, tensors = str(node.args[0]).replace(" ", ""), node.args[1]
    if "->" not in equation or "." in equation or not isinstance(tensors, list | tuple):
        return trace.unknown_operator(node)
    left, out = equation.split("->")
    operands = [(trace.of(t), list(letters)) for t, letters in zip(tensors, left.split(","), strict=True)]
    result = contract(trace, node, operands, list(out))
    for axis in leaves(
        a for axes, letters in operands for a, c in zip(axes, letters, strict=True) if c not in out
    ):
        axis.role = axis.role or (
            "qk" if len(operands) > 1 and all(len(axes) > 2 for axes, _ in operands) else ""
        )
    return result


def convolution(trace: Trace, node: fx.Node) -> Value:
    """Channels in, channels out; spatial axes are free. Groups split the channels in ``(groups, channels of a group)``."""
    return _convolve(trace, node, transposed=False)


def transposed_convolution(trace: Trace, node: fx.Node) -> Value:
    """The adjoint of :func:`convolution`: its weight has the input channels first."""
    return _convolve(trace, node, transposed=True)


def _convolve(trace: Trace, node: fx.Node, transposed: bool) -> Value:
    x, weight = trace.of(node.args[0]), trace.of(node.args[1])
    bias = node.args[2] if len(node.args) > 2 else None
    groups = int(str(node.args[6])) if len(node.args) > 6 else 1
    x_spatial = x[len(x) - len(weight) + 2 :]
    trace.free([*x_spatial, *weight[2:]], f"a spatial axis of {trace.why(node)}")
    batched = len(x) == len(weight)
    channels = x[1 if batched else 0]
    first, second = divide(channels, groups), divide(weight[0], groups)
    if first is None or second is None:
        return trace.unknown_operator(node)
    trace.mix([*x_spatial, *weight[2:]], [channels, weight[0], weight[1]])
    kernel = ([*second, weight[1]], ["g", "i", "o"] if transposed else ["g", "o", "i"])
    group, out = contract(trace, node, [([*first], ["g", "i"]), kernel], ["g", "o"])
    spatial = [
        frozen(n, f"a spatial axis of {trace.why(node)}")
        for n in trace.shape(node)[len(x) - len(x_spatial) :]
    ]
    result = [*x[: 1 if batched else 0], product([group, out]), *spatial]
    if bias is None:
        return result
    return combine(trace, node, [result, [*trace.of(bias), *(Axis(1) for _ in spatial)]], ADD)


def sdpa(trace: Trace, node: fx.Node) -> Value:
    """``softmax(q k^T + mask) v`` with any number of batch axes, of which the last are heads."""
    q, k, v = (trace.of(arg) for arg in node.args[:3])
    mask = node.args[3] if len(node.args) > 3 else None
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    if node.kwargs.get("enable_gqa") and q[-3].size != k[-3].size:
        grouped = _group_queries(trace, node, q, k, v)
        if grouped is None:
            return trace.unknown_operator(node)
        q, k, v = grouped
    batch = list(range(len(q) - 2))
    scores = contract(trace, node, [(q, [*batch, "t", "e"]), (k, [*batch, "s", "e"])], [*batch, "t", "s"])
    if causal:
        trace.free(scores[-2:], f"the causal mask of {trace.why(node)}")
    if isinstance(mask, fx.Node):
        scores = combine(trace, node, [scores, trace.of(mask)], MULTIPLY)
    trace.limit(scores, Bound.PERMUTATION, node)
    trace.mix(scores[-1:], scores[:-1])
    result = contract(
        trace, node, [(scores, [*batch, "t", "s"]), (v, [*batch, "s", "f"])], [*batch, "t", "f"]
    )
    _name_roles(q, k, query=True)
    _name_roles(scores, v, query=False)
    if len(trace.shape(node)) < len(result):  # grouped queries: merge (groups, queries of a group) again
        result = [*result[:-4], product(result[-4:-2]), *result[-2:]]
    return result


def _group_queries(trace: Trace, node: fx.Node, q: Axes, k: Axes, v: Axes) -> tuple[Axes, Axes, Axes] | None:
    """Give queries the axes (groups, queries of a group) and keys and values (groups, 1)."""
    heads = divide(q[-3], k[-3].size)
    if heads is None or not factors(q[-3]):
        return None
    return [*q[:-3], *heads, *q[-2:]], [*k[:-2], Axis(1), *k[-2:]], [*v[:-2], Axis(1), *v[-2:]]
