"""How well estimates of the Hessian predict the change of the gradient: cosine of ``H (w' - w)`` with ``g' - g``.

Four small networks on digits, stopped at given training losses and as near to a minimum of the loss with weight decay
as 300 steps of L-BFGS come (the gradient's norm is in the JSON: the transformer's is not small). Displacements are
random (Gaussian) or those of the next training steps. Every estimate sees the same parameters, and
all data except where it says "over steps". Cosines are means over displacements; tables give the median over seeds.

    python -m benchmarks.secant [--quick] [--json PATH] [--figures FOLDER]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

import weingarten as wg
from benchmarks.environment import report
from benchmarks.secant_estimates import Product, estimates, one_gradient, over_steps, without_group
from benchmarks.secant_models import NETWORKS
from benchmarks.secant_training import Secant, Stop, Training
from weingarten import reference_orbit, tree
from weingarten.estimators.orbit_fisher import OrbitFisher
from weingarten.groups import Action, Permutation, SignedPermutation, Signs
from weingarten.operators import orbit_moment
from weingarten.symmetry import Symmetry, plan
from weingarten.symmetry.describe import cost_of

FIRST, MIDDLE = "tanh MLP", "0.41"  # where the summary and the knob look
BOUNDS = (8, 16, 32, 64, 128, 512)  # on the blocks of a plan
Curves = dict[
    str, dict[str, dict[str, dict[str, list[float]]]]
]  # network, direction, stop, estimate: a number per seed


def compare(product: Product, secants: list[Secant]) -> tuple[float, float]:
    """Cosine and ratio of lengths, means over displacements; cosine zero where the estimate is zero."""
    cosines, lengths = [], []
    for secant in secants:
        guess = product(secant.displacement)
        length, true = float(tree.norm(guess)), float(tree.norm(secant.change))
        cosines.append(float(tree.dot(guess, secant.change)) / (length * true) if length > 0 else 0.0)
        lengths.append(length / true)
    return statistics.mean(cosines), statistics.mean(lengths)


def measure(
    seeds: int, names: list[str], widest: int
) -> tuple[Curves, Curves, dict[str, Any], list[dict[str, Any]]]:
    """Cosines, lengths, what the stops were like, and the knob on the first network."""
    curves: Curves = {}
    lengths: Curves = {}
    stops: dict[str, Any] = {}
    knobs: list[dict[str, Any]] = []
    for name, seed in itertools.product(names, range(seeds)):
        for stop in Training(name, seed).stops():
            note = {"seed": seed, "loss": stop.loss, "gradient": stop.gradient_norm}
            stops.setdefault(name, {}).setdefault(stop.label, []).append(note)
            products = estimates(stop)
            for direction, secants in stop.secants.items():
                for key, product in products.items():
                    for table, number in zip((curves, lengths), compare(product, secants), strict=True):
                        row = table.setdefault(name, {}).setdefault(direction, {}).setdefault(stop.label, {})
                        row.setdefault(key, []).append(number)
            if (name, stop.label) == (FIRST, MIDDLE):
                knobs += knob(stop, seed, widest)
    return curves, lengths, stops, knobs


def knob(stop: Stop, seed: int, widest: int) -> list[dict[str, Any]]:
    """Cosines on random directions against the size of the largest block, from one column to all parameters.

    Groups that leave a block of more than ``widest`` columns are left out; that of all parameters needs no block.
    """
    size = sum(p.numel() for p in stop.params.values())
    signs = {name: " ".join(f"{name}:{axis}" for axis in range(p.ndim)) for name, p in stop.params.items()}
    entries: dict[str, Action] = {word: Signs() for words in signs.values() for word in words.split()}
    whole = stop.symmetry
    cases = {"entry by entry": Symmetry.parse(signs, params=stop.params, **entries), "every layer": whole}
    cases |= {f"without {name}": whole.drop(name) for name in whole.names()}
    cases |= {f"plan {bound}": plan(whole, bound).symmetry for bound in BOUNDS}
    rows = []
    for label, symmetry in cases.items():
        block = cost_of(symmetry.kinds(stop.params).blocks).largest
        if block > widest:
            continue
        operators = {
            "H_g": one_gradient(stop, symmetry),
            "H_g over steps": over_steps(stop, symmetry),
            "OrbitFisher": wg.estimate(
                OrbitFisher(symmetry, wg.MonteCarlo()), stop.objective, [stop.batch], stop.params
            ),
        }
        found = {
            name: compare(operator.apply, stop.secants["random"])[0] for name, operator in operators.items()
        }
        rows.append({"case": label, "block": block, "seed": seed} | found)
    nothing = {
        name: compare(product, stop.secants["random"])[0] for name, product in without_group(stop).items()
    }
    return [*rows, {"case": "no group", "block": size, "seed": seed} | nothing]


def exactness() -> float:
    """The largest error of an orbit average against enumeration of the group, relative to its largest entry."""
    layers = {"a": (4, 3), "b": (4,), "c": (2, 4)}
    cases: list[tuple[dict[str, str], dict[str, Action], dict[str, tuple[int, ...]]]] = [
        ({"a": "h .", "b": "h", "c": ". h"}, {"h": group}, layers)
        for group in (Permutation(), SignedPermutation(), Signs())
    ]
    cases.append(({"a": "h k", "b": "h", "c": ". h"}, {"h": SignedPermutation(), "k": Permutation()}, layers))
    cases.append(({"w": "h h", "b": "h"}, {"h": Permutation()}, {"w": (5, 5), "b": (5,)}))
    errors, generator = [], torch.Generator().manual_seed(0)
    for words, groups, shapes in cases:
        v = {
            name: torch.randn(shape, dtype=torch.float64, generator=generator)
            for name, shape in shapes.items()
        }
        symmetry = Symmetry.parse(words, **groups)
        moment = orbit_moment(symmetry, v)
        flat = moment.space.flatten(v)
        truth = reference_orbit.orbit_average(torch.outer(flat, flat), symmetry, v)
        errors.append(float((moment.dense() - truth).abs().max() / truth.abs().max()))
    return max(errors)


def print_tables(curves: Curves, what: str) -> None:
    for name, directions in curves.items():
        for direction, stops in directions.items():
            print(f"\n{name}, {direction} directions: median {what} over seeds at each training loss")
            print(f"{'':22}" + "".join(f"{label:>10}" for label in stops))
            for key in next(iter(stops.values())):
                cells = [f"{statistics.median(row[key]):10.3g}" for row in stops.values()]
                print(f"{key:22}" + "".join(cells))


def print_knob(rows: list[dict[str, Any]]) -> None:
    print(f"\nthe knob: {FIRST} at loss {MIDDLE}, random directions, median over seeds")
    print(f"{'group':18} {'block':>6} {'H_g':>8} {'H_g over steps':>15} {'OrbitFisher':>12}")
    cases = dict.fromkeys(row["case"] for row in rows)
    for case in sorted(cases, key=lambda c: next(row["block"] for row in rows if row["case"] == c)):
        mine = [row for row in rows if row["case"] == case]
        h, averaged, fisher = (
            statistics.median(row[k] for row in mine) for k in ("H_g", "H_g over steps", "OrbitFisher")
        )
        print(f"{case:18} {mine[0]['block']:6} {h:8.3f} {averaged:15.3f} {fisher:12.3f}")


def spreads(curves: Curves) -> dict[str, Any]:
    """Median, mean, quartiles and the numbers themselves."""

    def spread(values: list[float]) -> dict[str, Any]:
        low, middle, high = (float(f"{q:.4g}") for q in np.quantile(values, [0.25, 0.5, 0.75]))
        mean = float(f"{statistics.mean(values):.4g}")
        return {
            "median": middle,
            "mean": mean,
            "quartiles": [low, high],
            "seeds": [float(f"{v:.4g}") for v in values],
        }

    return {
        name: {
            direction: {
                label: {key: spread(values) for key, values in row.items()} for label, row in stops.items()
            }
            for direction, stops in directions.items()
        }
        for name, directions in curves.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed of the two MLPs, under 90 s")
    parser.add_argument("--json", type=Path, help="where to write all results")
    parser.add_argument("--figures", type=Path, help="folder for the figures, which need matplotlib")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, names, widest = (1, [FIRST, "ReLU MLP"], 400) if arguments.quick else (5, list(NETWORKS), 4000)
    curves, lengths, stops, knobs = measure(seeds, names, widest)
    print_tables(curves, "cosine")
    print_tables({FIRST: {"random": lengths[FIRST]["random"]}}, "length relative to the true change")
    print_knob(knobs)
    middle = {
        key: round(statistics.median(values), 4) for key, values in curves[FIRST]["random"][MIDDLE].items()
    }
    summary = {
        "exactness": exactness(),
        "cos_orbit": middle["H_g"],
        "cos_uncoupled": middle["H_g uncoupled"],
        "cos_diagonal": middle["diagonal |g|"],
        "cos_identity": middle["identity"],
        "cos_kfac": middle["KFAC"],
        "cos_orbit_fisher": middle["OrbitFisher"],
        "cos_diagonal_ggn": middle["diagonal of the GGN"],
        "cos_hessian": middle["exact Hessian"],
    }
    details = {
        "curves": spreads(curves),
        "lengths": spreads(lengths),
        "stops": stops,
        "knob": knobs,
        "quick": arguments.quick,
    }
    if arguments.figures is not None:
        from benchmarks.secant_figures import draw

        draw(details, arguments.figures)
    report(summary, details, arguments.json)


if __name__ == "__main__":
    main()
