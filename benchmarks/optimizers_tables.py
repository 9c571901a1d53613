"""Tables of the optimiser benchmark in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.optimizers_rivals import METHODS
from benchmarks.optimizers_workloads import WORKLOADS


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _significant(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "diverged"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_workload(name: str, rows: dict[str, dict[str, Any]]) -> str:
    head = (
        WORKLOADS[name].title,
        "rate",
        "weight decay",
        "validation loss",
        "steps to AdamW's",
        "CPU s to AdamW's",
        "optimiser, ms a step",
        "of a gradient",
        "set-up, s",
        "state, MB",
    )
    digits = 2 if name == "autoencoder" else 4
    return table(
        head,
        [
            (
                METHODS[key].title,
                f"{row['lr']:.2g}",
                f"{row['weight_decay']:g}",
                _significant(row["loss"], row["loss_se"], digits),
                _number(row["steps_to_adamw"], 0) or "never",
                _number(row["seconds_to_adamw"], 1) or "never",
                _number(row["optimizer_ms"], 1),
                _number(row["optimizer_over_gradient"], 3),
                _number(row["setup_seconds"], 1),
                _number(row["state_bytes"] / 1e6, 1),
            )
            for key, row in rows.items()
        ],
    )


def of_ablation(rows: list[dict[str, Any]]) -> str:
    return table(
        ("group", "rate", "validation loss", "of a gradient", "state, MB"),
        [
            (
                row["title"],
                f"{row['lr']:.2g}",
                _significant(row["loss"], None, 4),
                _number(row["optimizer_over_gradient"], 3),
                _number(row["state_bytes"] / 1e6, 1),
            )
            for row in rows
        ],
    )


def printed(tables: dict[str, dict[str, dict[str, Any]]], ablation: list[dict[str, Any]]) -> str:
    parts = [of_workload(name, rows) for name, rows in tables.items()]
    return "\n\n".join([*parts, *([of_ablation(ablation)] if ablation else [])]) + "\n"
