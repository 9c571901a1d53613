"""GGN and Hessian products against dense matrices from the definitions, on every model and under every trap known."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import weingarten as wg
from tests.cases import PROBLEMS, WEIGHTS, Attention, N, generator, initialised, integers, mlp, normal
from weingarten import reference, tree

KINDS = {wg.GGN: reference.dense_ggn, wg.Hessian: reference.dense_hessian}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("name", PROBLEMS)
@kinds
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
class TestEveryModel:
    def test_is_the_dense_matrix(self, kind, name, weights):
        problem = PROBLEMS[name]
        objective = problem.objective()
        params = problem.at(objective)
        with torch.no_grad():  # the caller's gradient mode does not matter
            found = kind(objective, problem.batches(weights), params).dense()
        expected = KINDS[kind](objective, [problem.whole(weights)], params)
        torch.testing.assert_close(found, expected)
        assert found.abs().max() > 1e-3

    def test_at_other_parameters(self, kind, name, weights):
        problem = PROBLEMS[name]
        objective = problem.objective()
        there = tree.scale(1.3, problem.at(objective))
        found = kind(objective, problem.batches(weights), there)
        v = found.space.randn(generator())
        expected = KINDS[kind](objective, problem.batches(weights), there) @ found.space.flatten(v)
        torch.testing.assert_close(found.space.flatten(found.apply(v)), expected)


def test_ggn_is_positive_semi_definite_where_the_hessian_is_not():
    problem = PROBLEMS["mlp"]
    objective = problem.objective()
    smallest = {k: torch.linalg.eigvalsh(k(objective, problem.batches()).dense())[0] for k in KINDS}
    assert smallest[wg.Hessian] < -1e-3
    assert smallest[wg.GGN] > -1e-12


@kinds
def test_loader(kind):
    problem = PROBLEMS["mlp"]
    objective = problem.objective()
    loader = DataLoader(TensorDataset(problem.inputs, problem.targets, WEIGHTS), batch_size=2)
    found = kind(objective, loader)
    expected = KINDS[kind](objective, [problem.whole(WEIGHTS)], objective.params())
    torch.testing.assert_close(found.dense(), expected)


@kinds
def test_loader_of_pairs_of_inputs(kind):
    """Default collation turns a tuple of inputs into a list."""
    problem = PROBLEMS["tuple inputs"]
    objective = problem.objective()
    left, right = problem.inputs
    data = [((left[n], right[n]), problem.targets[n]) for n in range(N)]
    found = kind(objective, DataLoader(data, batch_size=2))
    torch.testing.assert_close(found.dense(), KINDS[kind](objective, [problem.whole()], objective.params()))


@kinds
def test_iterators_are_refused_since_they_would_give_zero(kind):
    problem = PROBLEMS["mlp"]
    with pytest.raises(TypeError, match="pass a list of batches or a DataLoader"):
        kind(problem.objective(), iter(problem.batches()))
    with pytest.raises(ValueError, match="no valid element"):
        kind(problem.objective(), [])


@kinds
def test_negative_weights_are_refused(kind):
    problem = PROBLEMS["mlp"]
    operator = kind(problem.objective(), [problem.whole(WEIGHTS - 1)])
    with pytest.raises(ValueError, match="weight of datum 2 is -1"):
        operator.apply(operator.space.zeros())


@kinds
def test_model_and_modes_are_untouched(kind):
    problem = PROBLEMS["norm and dropout"]
    objective = problem.objective()
    model = objective.model
    model.train()
    model[1].eval()
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    operator = kind(objective, problem.batches())
    first, second = (operator.apply(objective.params()) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # dropout is off
    with pytest.raises(
        RuntimeError, match="shapes cannot be multiplied"
    ):  # and after an exception in the model
        kind(objective, [(normal(N, 7), problem.targets)]).apply(objective.params())
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@kinds
def test_running_statistics_are_constants(kind):
    problem = PROBLEMS["conv net"]
    objective = problem.objective()
    objective.model.train()
    before = {name: b.clone() for name, b in objective.model.named_buffers()}
    operator = kind(objective, problem.batches())
    operator.apply(operator.space.randn(generator()))
    for name, b in objective.model.named_buffers():
        assert torch.equal(b, before[name])
    assert objective.model.training


@kinds
def test_dense_models_with_frozen_parameters(kind):
    problem = PROBLEMS["mlp"]
    objective = problem.objective()
    whole = kind(objective, problem.batches()).dense()
    objective.model[0].weight.requires_grad_(False)
    part = kind(objective, problem.batches())
    assert "0.weight" not in part.space.shapes
    torch.testing.assert_close(part.dense(), whole[12:, 12:])


@kinds
def test_fused_attention_in_float32(kind):
    """The kernels that PyTorch prefers have no double backward; inside, the math kernel is used."""
    objective = wg.Objective(initialised(Attention()).float(), wg.CrossEntropy())
    data = [(normal(N, 3, 3).float(), integers(2, N))]
    found = kind(objective, data)
    expected = KINDS[kind](objective, data, objective.params())
    torch.testing.assert_close(found.dense(), expected, rtol=1e-3, atol=1e-5)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.3, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(x).mean(1))


class OneSided(torch.autograd.Function):
    """x^2 without a forward-mode derivative, in the style that functorch does not take."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(OneSided.apply(self.a(x)))


class StopGradient(nn.Module):
    """``torch.no_grad`` stops the backward pass but not forward-mode tangents."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        with torch.no_grad():
            target = torch.tanh(self.a(x))
        return self.b(torch.tanh(self.a(x)) + target)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class FunctionalPadding(nn.Module):
    """An embedding with padding that is no ``nn.Embedding``, tied to the head, where the padding row does have a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 2))

    def forward(self, x):
        return functional.embedding(x, self.table, padding_idx=0).mean(1) @ self.table.mT


TRAPS = {
    "transformer layer": (Encoder, normal(N, 2, 4)),
    "no forward derivative": (Custom, normal(N, 3)),
    "no_grad inside": (StopGradient, normal(N, 3)),
    "recurrent": (Recurrent, normal(N, 3, 2)),
    "padding, tied": (FunctionalPadding, integers(3, N, 2)),
    "unused parameter": (lambda: nn.ModuleDict({"used": mlp(3, 2), "idle": nn.Linear(1, 1)}), normal(N, 3)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name):
    make, x = TRAPS[name]
    model = initialised(make())
    if isinstance(model, nn.ModuleDict):
        model.forward = lambda x: model["used"](x)
    objective = wg.Objective(model, wg.CrossEntropy())
    data = [wg.Batch(x, integers(2, N), WEIGHTS)]
    params = objective.params()
    ggn = reference.dense_ggn(objective, data, params)
    torch.testing.assert_close(wg.GGN(objective, data).dense(), ggn)
    hessian = wg.Hessian(objective, data)
    torch.testing.assert_close(hessian.dense(), reference.dense_hessian(objective, data, params))
    diagonal = wg.estimate(wg.Diagonal(), objective, data)
    torch.testing.assert_close(diagonal.space.flatten(diagonal.diag()), ggn.diagonal())


def test_output_without_any_parameter_has_no_curvature():
    model = nn.Linear(3, 2)
    objective = wg.Objective(lambda params, x: x @ torch.ones(3, 2), wg.MSE())
    for kind in KINDS:
        operator = kind(objective, [(torch.ones(4, 3), torch.ones(4, 2))], {"w": model.weight})
        assert not operator.apply({"w": torch.ones(2, 3)})["w"].any()


def test_models_that_return_no_tensor_are_refused():
    objective = wg.Objective(lambda params, x: {"logits": x}, wg.MSE())
    with pytest.raises(TypeError, match="the model returned dict, expected one tensor"):
        objective.value({}, wg.Batch(torch.ones(1), torch.ones(1)))


def test_inference_mode():
    problem = PROBLEMS["mlp"]
    objective = problem.objective()
    params, data = objective.params(), problem.batches()
    expected = wg.GGN(objective, data).apply(params)
    with torch.inference_mode():
        torch.testing.assert_close(wg.GGN(objective, data).apply(params), expected)


def test_half_precision_products():
    objective = wg.Objective(initialised(mlp(3, 4, 3)).bfloat16(), wg.CrossEntropy())
    data = [(normal(N, 3).bfloat16(), integers(3, N))]
    wide = wg.Objective(initialised(mlp(3, 4, 3)), wg.CrossEntropy())
    v = wide.params()
    for kind in KINDS:
        found = kind(objective, data).apply(tree.scale(1, {n: x.bfloat16() for n, x in v.items()}))
        expected = kind(wide, [(normal(N, 3), integers(3, N))]).apply(v)
        assert {x.dtype for x in found.values()} == {torch.bfloat16}
        error = tree.norm(tree.sub({n: x.double() for n, x in found.items()}, expected)) / tree.norm(expected)
        assert error < 0.1


def test_objective_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match="expected a weingarten loss"):
        wg.Objective(mlp(2, 2), nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="holds no parameters"):
        wg.Objective(lambda p, x: x, wg.MSE()).params()
    frozen = mlp(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter has requires_grad=True"):
        wg.Objective(frozen, wg.MSE()).params()
    with pytest.raises(TypeError, match=r"Batch.of: found int"):
        wg.Batch.of(3)
