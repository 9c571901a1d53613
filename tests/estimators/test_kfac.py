"""Where theory says that KFAC is exact, and weights that are used in several ways or places."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weingarten as wg
from tests.cases import PROBLEMS, WEIGHTS, N, Tied, generator, initialised, integers, normal
from weingarten import reference

EXACT = wg.KFAC(wg.Exact())


def blocks_of(curvature: wg.Curvature, dense: Tensor) -> Tensor:
    """The dense matrix with the entries between different blocks set to zero."""
    block = {name: i for i, b in enumerate(curvature.blocks) for name in b.space.shapes}
    label = torch.cat([torch.full((shape.numel(),), block[n]) for n, shape in curvature.space.shapes.items()])
    return dense * (label[:, None] == label[None, :])


def assert_exact(estimator: wg.Estimator, model: nn.Module, loss: wg.Loss, data: list[wg.Batch]) -> None:
    objective = wg.Objective(model, loss)
    curvature = wg.estimate(estimator, objective, data)
    expected = blocks_of(curvature, reference.dense_ggn(objective, data, objective.params()))
    torch.testing.assert_close(curvature.dense(), expected)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("kind", [wg.KFAC, wg.EKFAC])
@pytest.mark.parametrize(
    "name", ["mlp", "mlp, squared error", "mlp, binary", "mlp, soft labels", "dict inputs"]
)
def test_one_datum(kind, name):
    problem = PROBLEMS[name]
    for n in (1, 3):
        one = [reference.datum(problem.whole(WEIGHTS), n)]
        assert_exact(kind(wg.Exact()), problem.objective().model, problem.loss, one)


def linear(*widths: int) -> nn.Module:
    return initialised(nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)]))


class Averaged(nn.Module):
    """Positions are averaged after deep linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linear(3, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


def test_deep_linear_networks_for_many_data():
    batches = [wg.Batch(normal(2, 3), normal(2, 2)), wg.Batch(normal(3, 3, seed=1), normal(3, 2, seed=1))]
    assert_exact(EXACT, linear(3, 4, 3, 2), wg.MSE(), batches)


def test_expand_is_exact_with_a_loss_at_every_position():
    data = [wg.Batch(normal(N, 3, 3), normal(N, 3, 2, seed=1))]
    assert_exact(EXACT, linear(3, 4, 2), wg.MSE(), data)


def test_reduce_is_exact_with_averaged_positions():
    data = [wg.Batch(normal(N, 3, 3), normal(N, 2, seed=1))]
    assert_exact(wg.KFAC(wg.Exact(), wg.Reduce()), Averaged().double(), wg.MSE(), data)
    with pytest.raises(AssertionError):
        assert_exact(EXACT, Averaged().double(), wg.MSE(), data)


def test_deep_linear_convolutions_by_expand():
    model = initialised(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)))
    assert_exact(EXACT, model, wg.MSE(), [wg.Batch(normal(N, 2, 2, 2), normal(N, 2, 2, 2, seed=1))])


@pytest.mark.parametrize("padding", [None, 0])
def test_linear_token_model_by_expand(padding):
    model = initialised(nn.Sequential(nn.Embedding(4, 3, padding_idx=padding), nn.Linear(3, 2)))
    assert_exact(EXACT, model, wg.MSE(), [wg.Batch(integers(4, N, 3), normal(N, 3, 2))])


def test_padding_that_the_loss_ignores_does_not_dilute_the_embedding():
    """A deep linear model whose loss leaves the padding out: still exact for the embedding."""
    tokens = integers(4, N, 3)
    assert (tokens == 0).any()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3, padding_idx=0)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x) * (x != 0).unsqueeze(-1)

    assert_exact(EXACT, initialised(Masked()), wg.MSE(), [wg.Batch(tokens, normal(N, 3, 3))])


def test_softmax_regression_at_zero_for_many_data():
    """At zero weights every datum has the same class probabilities."""
    model = nn.Linear(3, 4).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    assert_exact(EXACT, model, wg.CrossEntropy(), [wg.Batch(normal(N, 3), integers(4, N))])


def test_empirical_factors_are_gradients_at_the_labels():
    x, y = normal(N, 3), integers(4, N)
    model = initialised(nn.Linear(3, 4, bias=False))
    g = torch.softmax(model(x).detach(), 1) - functional.one_hot(y, 4)
    (block,) = wg.estimate(
        wg.KFAC(wg.Empirical()), wg.Objective(model, wg.CrossEntropy()), [(x, y, WEIGHTS)]
    ).blocks
    torch.testing.assert_close(block.outputs[0], (g * WEIGHTS[:, None]).mT @ g / N)
    torch.testing.assert_close(block.inputs[0], (x * WEIGHTS[:, None]).mT @ x / WEIGHTS.sum())


# ------------------------------------------------------------------------------------------- weights used in many ways


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class FunctionallyTied(nn.Module):
    """The weight is used by its layer and once more outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) @ self.layer.weight


class Flattened(nn.Module):
    """Positions merged into the data dimension."""

    def __init__(self, merged: bool = True) -> None:
        super().__init__()
        self.layer, self.merged = nn.Linear(3, 3), merged

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x.reshape(-1, 3)).reshape(x.shape) if self.merged else self.layer(x)
        return torch.tanh(z).mean(1)


class Bypassed(nn.Module):
    """The layer's parameters are used, but not through the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + torch.tanh(functional.linear(x, self.idle.weight, self.idle.bias))


SHARED = {
    "tied": (Tied, integers(4, N, 2), integers(4, N, 2)),
    "shared": (Shared, normal(N, 3), integers(3, N)),
    "functionally tied": (FunctionallyTied, normal(N, 3), integers(3, N)),
    "called twice": (Twice, normal(N, 3), integers(3, N)),
    "bypassed": (Bypassed, normal(N, 3), integers(3, N)),
    "flattened": (Flattened, normal(N, 2, 3), integers(3, N)),
}


@pytest.mark.parametrize("name", SHARED)
def test_weights_used_in_several_ways_or_places(name):
    """The factors are those of the oracle, in test_oracle.py; here, what is exact, whatever the model around."""
    make, x, y = SHARED[name]
    objective = wg.Objective(initialised(make()), wg.CrossEntropy())
    data, params = [wg.Batch(x, y, WEIGHTS)], objective.params()
    dense = reference.dense_ggn(objective, data, params)
    found = wg.estimate(wg.Diagonal(), objective, data, params)
    torch.testing.assert_close(found.space.flatten(found.diag()), dense.diagonal())
    corrected = wg.estimate(wg.EKFAC(wg.Exact()), objective, data, params)
    assert list(corrected.space.shapes) == list(params)
    for block in corrected.blocks:
        where = [n in block.space.shapes for n, s in found.space.shapes.items() for _ in range(s.numel())]
        torch.testing.assert_close(block.trace(), dense.diagonal()[torch.tensor(where)].sum())
    assert wg.estimate(EXACT, objective, data, params).trace() > 0


def test_a_module_under_two_names_is_put_back():
    model = initialised(Shared())
    wg.estimate(EXACT, wg.Objective(model, wg.CrossEntropy()), [(normal(N, 3), integers(3, N))])
    assert isinstance(model.first.weight, nn.Parameter)


def test_merged_positions_are_positions():
    models = [initialised(Flattened(merged)) for merged in (True, False)]
    data = [wg.Batch(normal(N, 2, 3), integers(3, N), WEIGHTS)]
    for estimator in (EXACT, wg.KFAC(wg.Exact(), wg.Reduce()), wg.EKFAC(wg.Exact())):
        merged, apart = (
            wg.estimate(estimator, wg.Objective(m, wg.CrossEntropy()), data).dense() for m in models
        )
        torch.testing.assert_close(merged, apart)


def test_one_module_under_two_names_is_one_layer_called_twice():
    data = [(normal(N, 3), integers(3, N))]
    first, second = (
        wg.estimate(EXACT, wg.Objective(initialised(m), wg.CrossEntropy()), data).dense()
        for m in (Shared(), Twice())
    )
    torch.testing.assert_close(first, second)


# ------------------------------------------------------------------------------------------------------------- traps


def test_inplace_activations_do_not_disturb_what_is_recorded():
    def build(inplace: bool) -> nn.Module:
        layers = [nn.Linear(3, 4), nn.ReLU(inplace), nn.Linear(4, 4), nn.ReLU(inplace), nn.Linear(4, 3)]
        return initialised(nn.Sequential(*layers))

    data = [wg.Batch(normal(N, 3), integers(3, N), WEIGHTS)]
    for estimator in (EXACT, wg.EKFAC(wg.Exact())):
        found, expected = (
            wg.estimate(estimator, wg.Objective(build(i), wg.CrossEntropy()), data).dense()
            for i in (True, False)
        )
        torch.testing.assert_close(found, expected)


def test_layers_inside_torchs_transformer_are_seen():
    """In evaluation mode, without gradients, it would take a fused path past its layers."""
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
    model = initialised(nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 2)))
    objective = wg.Objective(model, wg.CrossEntropy())
    data = [(normal(N, 2, 4), integers(2, N))]
    found = wg.estimate(wg.KFAC(wg.Exact(), otherwise=wg.Diagonal()), objective, data)
    assert list(found.space.shapes) == list(objective.params())
    one = [reference.datum(wg.Batch.of(data[0]), 0)]
    norm = wg.estimate(wg.KFAC(wg.Exact(), otherwise=wg.Diagonal()), objective, one)
    exact = reference.dense_ggn(objective, one, objective.params())
    block = blocks_of(norm, exact).diagonal()
    names = [n for n, shape in norm.space.shapes.items() for _ in range(shape.numel())]
    for name in ("0.norm1.weight", "0.norm2.bias", "2.weight"):
        where = torch.tensor([n == name for n in names])
        torch.testing.assert_close(norm.diag()[name].reshape(-1), block[where])


def test_parameters_elsewhere_than_in_the_module():
    problem = PROBLEMS["mlp"]
    objective = problem.objective()
    there = {name: 1.5 * p for name, p in objective.params().items()}
    found = wg.estimate(EXACT, objective, problem.batches(), there).dense()
    with torch.no_grad():
        for p in objective.model.parameters():
            p.mul_(1.5)
    torch.testing.assert_close(found, wg.estimate(EXACT, objective, problem.batches()).dense())


def test_old_style_autograd_functions_and_the_fast_path(monkeypatch):
    """The loop over data is for what vmap does not know, and for nothing else."""
    problem = PROBLEMS["mlp"]
    objective = problem.objective()
    module = "weingarten.estimators.diagonal._squares_one_by_one"
    from weingarten.estimators.diagonal import _squares_one_by_one

    def refuse(*args):
        raise AssertionError("vmap should have done this")

    monkeypatch.setattr(module, refuse)
    layers = wg.estimate(wg.Diagonal(), objective, [problem.whole(WEIGHTS)])
    function = wg.Objective(objective.forward, problem.loss)  # in which no layer is seen: all by vmap
    fast = wg.estimate(wg.Diagonal(), function, [problem.whole(WEIGHTS)], objective.params())
    torch.testing.assert_close(layers.diag(), fast.diag())
    columns = torch.cat(
        list(
            wg.Exact().weighted(
                problem.loss, objective.model(problem.inputs).detach(), problem.targets, WEIGHTS, generator()
            )
        )
    )
    slow = _squares_one_by_one(objective, objective.params(), {}, problem.inputs, columns)
    torch.testing.assert_close({n: s / N for n, s in slow.items()}, fast.diag())


def test_optional_inputs_pass_through():
    problem = PROBLEMS["dict inputs"]
    objective = problem.objective()
    plain = wg.estimate(wg.Diagonal(), objective, problem.batches()).dense()
    with_none = [wg.Batch({**b.inputs, "flag": None}, b.targets) for b in problem.batches()]
    torch.testing.assert_close(wg.estimate(wg.Diagonal(), objective, with_none).dense(), plain)


def test_no_graph_is_kept():
    problem = PROBLEMS["mlp"]
    for estimator in (wg.KFAC(), wg.EKFAC(), wg.Diagonal()):
        weights = WEIGHTS.clone().requires_grad_()
        curvature = wg.estimate(estimator, problem.objective(), problem.batches(weights))
        assert not any(leaf.requires_grad for leaf in curvature.diag().values())
