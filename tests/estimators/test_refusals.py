"""What layer-wise estimators refuse, by the parameter's name and with the remedy, and what they leave to another estimator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weingarten as wg
from tests.cases import WEIGHTS, N, initialised, integers, mlp, normal
from weingarten import reference

EXACT = wg.KFAC(wg.Exact())


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class CutOff(Idle):
    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.idle(x).detach()


class Overwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).clone()
        y = self.second(h)
        h += y
        return h


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


class BatchStatisticsAlone(BatchStatistics):
    """Without parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False, track_running_stats=False)


class Unknown(nn.Module):
    """A parameter that is used in a way that no layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / self.scale


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(x)


UNUSED = "output does not depend on parameter 'idle.weight'"
REFUSED = {
    "never called": (Idle, UNUSED),
    "cut off": (CutOff, UNUSED),
    "overwritten": (Overwritten, "input of layer 'second' is overwritten in place"),
    "no_grad": (NoGrad, "output does not depend on any layer"),
    "batch statistics": (BatchStatistics, "output for a datum depends on the other data"),
    "batch statistics without parameters": (
        BatchStatisticsAlone,
        "output for a datum depends on the other data",
    ),
    "unknown operation": (
        Unknown,
        r"cannot treat 'scale' \(used by torch.Tensor.div\).*otherwise=wg.Diagonal\(\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("estimator", [EXACT, wg.KFAC(), wg.EKFAC()], ids=["exact", "sampled", "EKFAC"])
def test_refused_by_name(name, estimator):
    make, message = REFUSED[name]
    model = initialised(make())
    objective = wg.Objective(model, wg.CrossEntropy())
    with pytest.raises(ValueError, match=message):
        wg.estimate(estimator, objective, [(normal(N, 3), integers(3, N))])
    assert model.training


@pytest.mark.parametrize("name", ["never called", "cut off", "unknown operation"])
def test_what_kfac_refuses_the_diagonal_treats_exactly(name):
    objective = wg.Objective(initialised(REFUSED[name][0]()), wg.CrossEntropy())
    data = [(normal(N, 3), integers(3, N))]
    found = wg.estimate(wg.Diagonal(), objective, data)
    expected = reference.dense_ggn(objective, data, objective.params()).diagonal()
    torch.testing.assert_close(found.space.flatten(found.diag()), expected)


class WithGain(nn.Module):
    """A parameter between two layers, by which it divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) / self.gain)


@pytest.mark.parametrize("kind", [wg.KFAC, wg.EKFAC])
def test_parameters_without_a_rule(kind):
    objective = wg.Objective(initialised(WithGain()), wg.CrossEntropy())
    data = [wg.Batch(normal(N, 3), integers(3, N), WEIGHTS)]
    with pytest.raises(ValueError, match=r"cannot treat 'gain' \(used by torch.Tensor.div\)"):
        wg.estimate(kind(), objective, data)
    found = wg.estimate(kind(wg.Exact(), otherwise=wg.Diagonal()), objective, data)
    assert list(found.space.shapes) == list(objective.params())
    torch.testing.assert_close(
        found.diag()["gain"], wg.estimate(wg.Diagonal(), objective, data).diag()["gain"]
    )
    with pytest.raises(TypeError, match="the model is a function"):
        wg.estimate(kind(otherwise=wg.KFAC()), objective, data)


def test_only_parameters_without_a_rule():
    objective = wg.Objective(initialised(WithGain()), wg.CrossEntropy())
    data = [wg.Batch(normal(N, 3), integers(3, N))]
    params = {"gain": objective.params()["gain"]}
    found = wg.estimate(wg.KFAC(otherwise=wg.Diagonal()), objective, data, params)
    torch.testing.assert_close(found.dense(), wg.estimate(wg.Diagonal(), objective, data, params).dense())


def test_unknown_parameter():
    objective = wg.Objective(mlp(3, 2), wg.MSE())
    with pytest.raises(ValueError, match="'ghost' does not exist in the model"):
        wg.estimate(wg.KFAC(), objective, [(torch.ones(1, 3), torch.ones(1, 2))], {"ghost": torch.ones(2)})


@pytest.mark.parametrize("estimator", [EXACT, wg.KFAC(), wg.EKFAC(), wg.KFAC(wg.Empirical())])
def test_nan_is_traced_to_a_layer(estimator):
    model = initialised(mlp(3, 4, 3))
    bad = normal(N, 3)
    bad[1, 1] = torch.nan
    with pytest.raises(ValueError, match="input of layer '0' is not finite"):
        wg.estimate(estimator, wg.Objective(model, wg.CrossEntropy()), [(bad, integers(3, N))])
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="output of layer '2' or what follows is not finite"):
        wg.estimate(estimator, wg.Objective(model, wg.CrossEntropy()), [(normal(N, 3), integers(3, N))])


def test_nan_in_the_diagonal_is_refused():
    bad = normal(N, 3) * torch.nan
    with pytest.raises(ValueError, match="input of layer '0' is not finite"):
        wg.estimate(
            wg.Diagonal(), wg.Objective(mlp(3, 3).double(), wg.CrossEntropy()), [(bad, integers(3, N))]
        )
