"""What each estimate says ``H v`` is, by name; all are compared up to scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import weingarten as wg
from benchmarks.secant_training import Stop, Tree
from weingarten.estimators.orbit import Orbit, OrbitSecant
from weingarten.estimators.orbit_fisher import OrbitFisher
from weingarten.groups import Rotation
from weingarten.operators import Curvature, geometric_mean, gram, orbit_mean, orbit_moment
from weingarten.symmetry import Isotypic, Symmetry

Product = Callable[[Tree], Tree]
DECAY = 0.9  # of averages over steps
SPECS = ("r .", ". c")


def estimates(stop: Stop) -> dict[str, Product]:
    """Every estimate at one stop, in the order of the table."""
    data, symmetry, params = [stop.batch], stop.symmetry, stop.params
    centre = orbit_mean(symmetry, params)
    magnitude = {name: g.abs() for name, g in stop.gradient.items()}
    fisher, rest = wg.MonteCarlo(), wg.Diagonal(wg.Exact())
    found: dict[str, wg.Operator] = {
        "exact Hessian": wg.Hessian(stop.objective, data, params),
        "Hessian at the centre": wg.Hessian(stop.objective, data, centre),
        "H_pd": secant_estimate(stop, symmetry),
        "H_g": one_gradient(stop, symmetry),
        "H_g uncoupled": one_gradient(stop, symmetry.uncoupled()),
        "H_g over steps": over_steps(stop, symmetry),
        "OrbitFisher": wg.estimate(OrbitFisher(symmetry, fisher), stop.objective, data, params),
        "KFAC": wg.estimate(wg.KFAC(fisher, otherwise=rest), stop.objective, data, params),
        "diagonal of the GGN": wg.estimate(rest, stop.objective, data, params),
    }
    products: dict[str, Product] = {name: operator.apply for name, operator in found.items()}
    products["diagonal |g|"] = lambda v: {name: magnitude[name] * x for name, x in v.items()}
    products["Shampoo"] = shampoo(stop.gradient)
    products["identity"] = dict
    return products


def one_gradient(stop: Stop, symmetry: Symmetry) -> Curvature:
    estimator = Orbit(symmetry)
    state = estimator.init(stop.objective, stop.params)
    state.gradient, state.count = stop.gradient, 1
    return estimator.read(state)


def secant_estimate(stop: Stop, symmetry: Symmetry) -> Curvature:
    estimator = OrbitSecant(symmetry)
    state = estimator.init(stop.objective, stop.params)
    state.gradient, state.count = stop.gradient, 1
    return estimator.read(state)


def over_steps(stop: Stop, symmetry: Symmetry) -> Curvature:
    """The exponential average of the last mini-batch gradients' moments, each taken where training then was."""
    estimator = Orbit(symmetry, decay=DECAY)
    state = estimator.init(stop.objective, stop.params)
    for g in stop.past:
        new = gram(state.isotypic, state.isotypic.gather(g))
        old = state.grams
        state.grams = new if old is None else {key: DECAY * old[key] + block for key, block in new.items()}
        state.weight = DECAY * state.weight + 1.0
    return estimator.read(state)


def shampoo(gradient: Tree) -> Product:
    """``(L # R)^{1/2}`` for every matrix, whose inverse takes G to ``L^{-1/4} G R^{-1/4}``; |g| for vectors."""
    factors: dict[str, Curvature] = {}
    for name, g in gradient.items():
        if g.ndim > 1:
            sides = [
                orbit_moment(
                    Symmetry.parse({"w": words}, **{words.strip(" ."): Rotation()}), {"w": g.flatten(1)}
                )
                for words in SPECS
            ]
            factors[name] = geometric_mean(*sides).power(0.5)

    def product(v: Tree) -> Tree:
        return {name: by_leaf(name, x) for name, x in v.items()}

    def by_leaf(name: str, x: Tensor) -> Tensor:
        if name not in factors:
            return gradient[name].abs() * x
        return factors[name].apply({"w": x.flatten(1)})["w"].reshape(x.shape)

    return product


def without_group(stop: Stop) -> dict[str, Product]:
    """The limit of the smallest group: nothing is averaged, one block of all parameters."""
    space = Isotypic(stop.symmetry, stop.params).space
    weights = [DECAY ** (len(stop.past) - 1 - i) for i in range(len(stop.past))]
    rows = torch.stack([w**0.5 * space.flatten(g) for w, g in zip(weights, stop.past, strict=True)])
    _, scales, directions = torch.linalg.svd(rows, full_matrices=False)

    def root(v: Tree) -> Tree:
        return space.unflatten(directions.T @ (scales * (directions @ space.flatten(v))))

    def single(v: Tree) -> Tree:
        inner = sum((stop.gradient[name] * x).sum() for name, x in v.items())
        return {name: inner * g for name, g in stop.gradient.items()}

    return {
        "H_g": single,
        "H_g over steps": root,
        "OrbitFisher": wg.GGN(stop.objective, [stop.batch], stop.params).apply,
    }
