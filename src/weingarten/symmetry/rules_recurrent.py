"""Rules of embeddings and of the recurrent layers that are one operator each."""

from __future__ import annotations

from typing import Any

from torch import fx

from weingarten.symmetry.trace import Axes, Rule, Trace, Value, operator_name
from weingarten.symmetry.trace_axes import Axis, Bound, choice, concat, divide, frozen, tie

__all__ = ["cell", "embedding", "recurrent"]


def embedding(trace: Trace, node: fx.Node) -> Value:
    """A row per index: the vocabulary is free, features are linear."""
    weight, indices = trace.of(node.args[0]), trace.of(node.args[1])
    trace.free([weight[0], *indices], f"the vocabulary of {trace.why(node)}")
    return [*indices, weight[1]]


def recurrent(gates: int, bound: Bound) -> Rule:
    """The rule of ``lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu``.

    The hidden axis is tied over the rows of every gate, the columns of the recurrent weight, and the biases.

    Args:
        gates: number of gates stacked in the rows of the weights.
        bound: the largest group that the nonlinearities allow.
    """

    def rule(trace: Trace, node: fx.Node) -> Value:
        args: Any = node.args
        if not isinstance(args[3], bool):  # packed sequences
            return trace.unknown_operator(node)
        x, states, params = trace.of(args[0]), args[1], [trace.of(p) for p in args[2]]
        biases, layers, both = args[3], args[4], bool(args[7])
        each = len(params) // (layers * (2 if both else 1))
        projected = each - (4 if biases else 2) == 1
        time = 1 if args[8] and len(x) == 3 else 0
        trace.free([x[time]], f"time in {trace.why(node)}")
        feature, hidden, cells = x[-1], [], []
        for layer in range(layers):
            outputs = []
            for direction in range(2 if both else 1):
                start = (layer * (2 if both else 1) + direction) * each
                h, c = _cell(params[start : start + each], feature, gates, bound, projected, trace, node)
                outputs.append(h)
                hidden.append(h)
                cells.append(c)
            feature = concat(outputs)
        return _results(trace, node, states, x, feature, hidden, cells)

    return rule


def _cell(
    params: list[Axes], feature: Axis, gates: int, bound: Bound, projected: bool, trace: Trace, node: fx.Node
) -> tuple[Axis, Axis]:
    """One layer in one direction: axes of output and of cell state."""
    tie(params[0][1], feature)
    hidden = Axis(params[0][0].size // gates, bound, trace.why(node))
    vectors = params[2:4] if len(params) > 3 else []
    for axis in (params[0][0], params[1][0], *(bias[0] for bias in vectors)):
        _tie_gates(trace, node, axis, hidden, gates)
    output = params[-1][0] if projected else hidden
    if projected:
        tie(params[-1][1], hidden)
    tie(params[1][1], output)
    return output, hidden


def cell(gates: int, bound: Bound) -> Rule:
    """The rule of one step, as in ``lstm_cell`` and ``gru_cell``; arguments as for :func:`recurrent`."""

    def rule(trace: Trace, node: fx.Node) -> Value:
        x, states = trace.of(node.args[0]), node.args[1]
        params = [trace.of(p) for p in node.args[2:] if isinstance(p, fx.Node)]
        hidden, _ = _cell(params, x[-1], gates, bound, False, trace, node)
        for state in states if isinstance(states, list | tuple) else [states]:
            tie(trace.of(state)[-1], hidden)
        result = [*x[:-1], hidden]
        return [result, list(result)] if gates == 4 else result

    return rule


def _tie_gates(trace: Trace, node: fx.Node, axis: Axis, hidden: Axis, gates: int) -> None:
    halves = divide(axis, gates) if gates > 1 else (Axis(1), axis)
    if halves is None:
        trace.free([axis, hidden], f"the gates of {trace.why(node)}")
        return
    trace.free([halves[0]], f"the gates of {trace.why(node)}")
    tie(halves[1], hidden)


def _results(
    trace: Trace, node: fx.Node, states: Any, x: Axes, feature: Axis, hidden: list[Axis], cells: list[Axis]
) -> Value:
    """Output, last hidden state and, for an LSTM, last cell state; initial states are tied unless they are zero."""
    lstm = operator_name(node) == "lstm"
    batch = [x[0] if node.args[8] else x[1]] if len(x) == 3 else []
    results: list[Axes] = [[*x[:-1], feature]]
    for state, axes in zip(states if lstm else [states], (hidden, cells), strict=False):
        if operator_name(state) not in ("zeros", "zeros_like", "new_zeros"):
            for axis in axes:
                tie(trace.of(state)[-1], axis)
        index = frozen(len(axes), f"the layers of {trace.why(node)}")
        last = axes[0] if len(axes) == 1 else choice(index, axes)
        results.append([index, *batch, last])
    return results
