"""An optimiser's plan in tables, for the command line and the benchmark."""

from __future__ import annotations

from weingarten.applications.inspect_optimizer import OptimizerPlan

__all__ = ["TOKENS", "Table", "cost_table", "routes_table", "shards_table"]

TOKENS = 500_000
"""Of one step, by default: half a million, as GPT-2 and GPT-3 of this size were trained with."""

Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows."""


def routes_table(found: OptimizerPlan) -> Table:
    """One line for each kind of route."""
    columns = [
        "",
        "route",
        "parameters",
        "shapes",
        "moment",
        "Gflop / step",
        "state MB",
    ]
    rows = [
        [
            f"{kind.count} x",
            kind.label,
            kind.leaves,
            kind.shapes,
            kind.moment,
            _number(kind.cost.flops / 1e9),
            _number(kind.cost.state / 1e6),
        ]
        for kind in found.kinds()
    ]
    return f"{found.name}: {found.size:,} parameters, {len(found.routes)} routes", columns, rows


def cost_table(found: OptimizerPlan, tokens: int) -> Table:
    """Symo next to the others, and next to the forward and backward pass."""
    backward = found.backward(tokens)
    columns = [
        "optimizer",
        "products",
        "factorised",
        "entrywise",
        "Gflop / step",
        "of the pass",
        "state MB",
        "moved MB",
    ]
    rows = [
        [
            name,
            *(_number(x / 1e9) for x in (cost.products, cost.factorise, cost.entrywise, cost.flops)),
            f"{_number(100 * cost.flops / backward)} %",
            _number(cost.state / 1e6),
            _number(cost.traffic / 1e6),
        ]
        for name, cost in found.compared().items()
    ]
    pass_ = f"forward and backward pass of {tokens:,} tokens, 6 flops a parameter and token: {backward / 1e12:,.0f} Tflop"
    return f"one step; {pass_}; factorised every {found.refresh} steps", columns, rows


def shards_table(found: OptimizerPlan, ranks: int) -> Table:
    """What ranks do and keep, and what they receive."""
    split = found.shards(ranks)
    columns = ["of a rank", "largest", "mean", "largest / mean"]
    flops, state = ([f(s.cost) for s in split.parts] for f in (lambda c: c.flops, lambda c: c.state))
    rows = [
        ["Gflop / step", _number(max(flops) / 1e9), _number(sum(flops) / ranks / 1e9), f"{split.flops:.2f}"],
        ["state MB", _number(max(state) / 1e6), _number(sum(state) / ranks / 1e6), f"{split.state:.2f}"],
        ["received MB / step, DDP", "", _number(split.replicated / 1e6), ""],
        ["received MB / step, FSDP2", "", _number(split.cut / 1e6), ""],
    ]
    return f"whole routes over {ranks} ranks", columns, rows


def _number(x: float) -> str:
    """Three digits where that is short."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
