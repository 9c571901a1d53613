"""The block structure of a planned estimate, drawn as a matrix."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from weingarten.applications.inspect import Inspection, InspectionError
from weingarten.symmetry.kinds import KindBlock, KindKey

__all__ = ["draw"]

_SHOWN = 18  # names in the legend
_LABELS = 48  # leaves with a label
_PLAIN, _DIAGONAL = "#c9c9c9", "#555555"


def draw(inspection: Inspection, path: Path) -> None:
    """Save the picture; the ending of ``path`` chooses the format.

    Parameters lie along both axes, a leaf as long as the square root of its size so that biases stay visible. A filled rectangle
    means that two leaves are coupled: inside it the estimate is ``I (x) S``. Colours are names of the symmetry; grey are blocks
    of free axes, and a line along the diagonal is an estimate entry by entry.

    Raises:
        InspectionError: if matplotlib is missing or does not know the ending.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InspectionError("a figure needs matplotlib; run: pip install 'weingarten[plots]'") from error
    if path.suffix.lower() not in (".png", ".svg"):
        raise InspectionError(f"the figure is {path.name!r}, expected a name that ends in .png or .svg")
    figure = Figure(figsize=(7.2, 7.2))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = _places(inspection)
    blocks = inspection.isotypic().blocks
    colours = _colours(blocks)
    for key, block in sorted(blocks.items(), key=lambda item: bool(item[0][1])):
        _draw_kind(axes, key, block, places, colours)
    _label(axes, places)
    _legend(axes, blocks, colours)
    cost = inspection.plan.cost
    axes.set_title(
        f"{inspection.name}: {inspection.size:,} parameters in {len(blocks)} kinds, largest block {cost.largest}",
        loc="left",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, bbox_inches="tight")


def _places(inspection: Inspection) -> dict[str, tuple[float, float]]:
    """First coordinate and length of each part."""
    found, start = {}, 0.0
    for part in inspection.plan.symmetry.parts:
        length = part.of(inspection.params).numel() ** 0.5
        found[part.key] = (start, length)
        start += length
    return found


def _names(key: KindKey) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name, _ in key[1]))


def _is_diagonal(key: KindKey) -> bool:
    return any(name.startswith("signs:") for name in _names(key))


def _colours(blocks: dict[KindKey, KindBlock]) -> dict[tuple[str, ...], Any]:
    from matplotlib import colormaps

    palette = [colormaps["tab20"](i) for i in range(20) if i not in (14, 15)]  # grey is for what is free
    found = dict.fromkeys(_names(key) for key in blocks if key[1] and not _is_diagonal(key))
    return {names: palette[i % len(palette)] for i, names in enumerate(found)}


def _draw_kind(
    axes: Any,
    key: KindKey,
    block: KindBlock,
    places: dict[str, tuple[float, float]],
    colours: dict[tuple[str, ...], Any],
) -> None:
    from matplotlib.patches import Rectangle

    for row, column in product(block.columns, block.columns):
        (y, height), (x, width) = places[row], places[column]
        if _is_diagonal(key):
            axes.plot([x, x + width], [y, y + height], color=_DIAGONAL, linewidth=1.2)
        else:
            colour = colours.get(_names(key), _PLAIN)
            axes.add_patch(
                Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=0.3)
            )


def _label(axes: Any, places: dict[str, tuple[float, float]]) -> None:
    end = sum(list(places.values())[-1])
    axes.set(xlim=(0, end), ylim=(end, 0), aspect="equal", xticks=[])
    axes.set_xlabel("parameters, in the same order (length: square root of the size)", fontsize=9)
    gap, ticks = end / _LABELS, list[tuple[float, str]]()
    for key, (start, length) in sorted(places.items(), key=lambda item: -item[1][1]):
        middle = start + length / 2
        if all(abs(middle - other) >= gap for other, _ in ticks):
            ticks.append((middle, key))
    ticks.sort()
    axes.set_yticks([middle for middle, _ in ticks], [key for _, key in ticks], fontsize=7)
    axes.tick_params(axis="y", length=2)


def _legend(axes: Any, blocks: dict[KindKey, KindBlock], colours: dict[tuple[str, ...], Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for names, colour in list(colours.items())[:_SHOWN]:
        mine = [block for key, block in blocks.items() if _names(key) == names and not _is_diagonal(key)]
        sizes = ", ".join(dict.fromkeys(f"{b.multiplicity} columns x {b.dim * b.count}" for b in mine))
        handles.append(Patch(color=colour, label=f"{' and '.join(names)}: {sizes}"))
    if len(colours) > _SHOWN:
        handles.append(Patch(color="none", label=f"and {len(colours) - _SHOWN} more"))
    if any(not key[1] for key in blocks):
        largest = max(block.multiplicity for key, block in blocks.items() if not key[1])
        handles.append(Patch(color=_PLAIN, label=f"free: up to {largest} columns"))
    if any(map(_is_diagonal, blocks)):
        handles.append(Line2D([], [], color=_DIAGONAL, label="entry by entry"))
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        fontsize=8,
        frameon=False,
        title="kept names",
    )
