"""Every layer rule: its factors, bases and spectra against brute force over data and positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import weingarten as wg
from tests.cases import LAYERS, WEIGHTS, Head, N, generator, initialised, normal
from weingarten import reference
from weingarten.layers import RULES
from weingarten.tree import Space

ONE = [name for name in LAYERS if "one position" in name]
DENSE_SHARED = [
    name for name in LAYERS if name not in ONE and not name.startswith(("Embedding", "LayerNorm", "Batch"))
]
NORMS = [name for name in LAYERS if name.startswith(("LayerNorm", "Batch"))]
EMBEDDINGS = [name for name in LAYERS if name.startswith("Embedding")]


def problem(name: str, weights: Tensor | None = None, mix: float = 0.7) -> tuple[wg.Objective, wg.Batch]:
    """The layer alone under a smooth non-linearity, with squared error on all of its outputs."""
    make, x = LAYERS[name]
    model = initialised(Head(make(), mix))
    with torch.no_grad():
        outputs = model.eval()(x).shape
    return wg.Objective(model, wg.MSE()), wg.Batch(x, normal(*outputs, seed=2), weights)


def between_groups(name: str) -> float:
    """KFAC leaves out the curvature between the groups of a convolution, so exactness needs a head that does not mix them."""
    return 0.0 if "groups" in name else 0.7


def per_datum_gradients(objective: wg.Objective, batch: wg.Batch) -> Tensor:
    """``J_n^T s_nk`` for every datum and column, ``(N, K, P)``, in the order of the parameters, by reverse mode."""
    params = objective.params()
    rows = []
    for n in range(len(batch.targets)):
        one = reference.datum(batch, n)
        j = reference.jacobian(objective, one, params)
        weight = 1.0 if batch.weights is None else batch.weights[n]
        rows.append((2 * weight) ** 0.5 * j)  # the squared error's Hessian is 2 I
    return torch.stack(rows)


def test_every_rule_has_cases():
    covered = {type(make()) for make, _ in LAYERS.values()}
    for rule in RULES:
        for kind in rule.types:
            assert kind in covered, f"{kind.__name__} of {type(rule).__name__} has no case in tests/cases.py"


@pytest.mark.parametrize("name", [*ONE, *NORMS])
@pytest.mark.parametrize("sharing", [wg.Expand(), wg.Reduce()])
@pytest.mark.parametrize("kind", [wg.KFAC, wg.EKFAC])
def test_one_datum_is_the_exact_ggn(name, sharing, kind):
    objective, batch = problem(name, WEIGHTS, mix=between_groups(name))
    for n in (0, 1):
        one = [reference.datum(batch, n)]
        found = wg.estimate(kind(wg.Exact(), sharing), objective, one)
        torch.testing.assert_close(found.dense(), reference.dense_ggn(objective, one, objective.params()))


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_exact_for_many_data(name):
    objective, batch = problem(name, WEIGHTS)
    found = wg.estimate(wg.KFAC(wg.Exact()), objective, [batch])
    torch.testing.assert_close(found.dense(), reference.dense_ggn(objective, [batch], objective.params()))


@pytest.mark.parametrize("only", ["weight", "bias"])
@pytest.mark.parametrize(
    "name", [name for name in [*ONE, *NORMS] if "no bias" not in name and "Emb" not in name]
)
def test_one_leaf_alone(name, only):
    objective, batch = problem(name, mix=between_groups(name))
    for leaf, p in objective.model.named_parameters():
        p.requires_grad_(leaf.endswith(only))
    one = [reference.datum(batch, 1)]
    for kind in (wg.KFAC, wg.EKFAC):
        found = wg.estimate(kind(wg.Exact()), objective, one)
        assert list(found.space.shapes) == [f"layer.{only}"]
        torch.testing.assert_close(found.dense(), reference.dense_ggn(objective, one, objective.params()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sharing", [wg.Expand(), wg.Reduce()])
def test_ekfac_spectrum_is_brute_force_in_its_basis(name, sharing):
    objective, batch = problem(name, WEIGHTS)
    (block,) = wg.estimate(wg.EKFAC(wg.Exact(), sharing), objective, [batch]).blocks
    expected = torch.zeros_like(block.spectrum)
    for row in per_datum_gradients(objective, batch).flatten(0, 1):
        expected += block.rotate(block.layout.merge(block.space.unflatten(row))) ** 2
    torch.testing.assert_close(block.spectrum, expected / objective.loss.count(batch.targets))
    eye = torch.eye(block.left.shape[-1], dtype=torch.float64)
    torch.testing.assert_close(block.left @ block.left.mT, eye.expand_as(block.left))


@pytest.mark.parametrize("name", LAYERS)
def test_diagonal_is_exact(name):
    objective, batch = problem(name, WEIGHTS)
    found = wg.estimate(wg.Diagonal(), objective, [batch])
    expected = reference.dense_ggn(objective, [batch], objective.params()).diagonal()
    torch.testing.assert_close(found.space.flatten(found.diag()), expected)


def layer_rows(objective: wg.Objective, batch: wg.Batch) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Input rows of each datum and position, and output gradients of each datum, column and position, without any rule.

    The input row at a position is the derivative of one output channel there in that channel's weights: ``dz_ot / dW_o = a_t``.
    """
    layer = objective.model.layer
    params = {name: p.detach() for name, p in layer.named_parameters()}
    space = Space.of(params)
    inputs, outputs = [], []
    for n in range(len(batch.targets)):
        x = batch.inputs[n : n + 1]
        z = layer(x).detach()
        positions_first = not isinstance(layer, nn.Conv1d | nn.Conv2d)
        flat = z[0].reshape(-1, z.shape[-1]) if positions_first else z[0].flatten(1).mT  # (T, out)

        def rows(p, x=x, positions_first=positions_first):
            z = functional_call(layer, space.unflatten(p), (x,))[0]
            return z.reshape(-1, z.shape[-1]) if positions_first else z.flatten(1).mT

        j = torch.autograd.functional.jacobian(rows, space.flatten(params))  # (T, out, P)
        inputs.append(
            [
                torch.cat([space.unflatten(j[t, o])[leaf][o].reshape(-1) for leaf in params])
                for t in range(len(flat))
                for o in (0,)
            ]
        )
        weight = 1.0 if batch.weights is None else batch.weights[n]
        columns = objective.model.columns(z[0], weight)
        outputs.append([g.reshape(-1, g.shape[-1]) if positions_first else g.flatten(1).mT for g in columns])
    return inputs, outputs


@pytest.mark.parametrize("name", [name for name in DENSE_SHARED if "groups" not in name])
def test_expand_and_reduce_are_loops_over_positions(name):
    objective, batch = problem(name, WEIGHTS)
    inputs, outputs = layer_rows(objective, batch)
    count = objective.loss.count(batch.targets)
    expand, reduce = (
        wg.estimate(wg.KFAC(wg.Exact(), s), objective, [batch]).blocks[0] for s in (wg.Expand(), wg.Reduce())
    )
    every = [a for datum in inputs for a in datum]
    assert len(every) > N  # there are shared positions
    torch.testing.assert_close(expand.inputs[0], sum(torch.outer(a, a) for a in every) / len(every))
    means = [sum(datum) / len(datum) for datum in inputs]
    torch.testing.assert_close(reduce.inputs[0], sum(torch.outer(a, a) for a in means) / N)
    columns = [g for datum in outputs for g in datum]
    torch.testing.assert_close(expand.outputs[0], sum(g.mT @ g for g in columns) / count)
    sums = [g.sum(0) for g in columns]
    torch.testing.assert_close(reduce.outputs[0], sum(torch.outer(g, g) for g in sums) / count)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embedding_factors_are_loops_over_tokens(name):
    objective, batch = problem(name, WEIGHTS)
    table = objective.model.layer
    tokens = batch.inputs.reshape(N, -1)
    onehot = torch.eye(table.num_embeddings, dtype=torch.float64)
    if table.padding_idx is not None:
        onehot[table.padding_idx] = 0
    rows = onehot[tokens]  # (N, T, V)
    count = objective.loss.count(batch.targets)
    expand, reduce = (
        wg.estimate(wg.KFAC(wg.Exact(), s), objective, [batch]).blocks[0] for s in (wg.Expand(), wg.Reduce())
    )
    torch.testing.assert_close(expand.inputs[0], rows.sum((0, 1)) / rows.sum())
    torch.testing.assert_close(reduce.inputs[0], (rows.mean(1) ** 2).mean(0))
    z = table(tokens).detach()
    moment, summed = torch.zeros(2, z.shape[-1], z.shape[-1], dtype=torch.float64)
    for n in range(N):
        for g in objective.model.columns(z[n], WEIGHTS[n]):
            g = g * rows[n].sum(-1, keepdim=True)  # nothing flows to the padding
            moment += g.mT @ g
            summed += torch.outer(g.sum(0), g.sum(0))
    torch.testing.assert_close(expand.outputs[0], moment / count)
    torch.testing.assert_close(reduce.outputs[0], summed / count)


@pytest.mark.parametrize("name", ["Conv2d groups, positions", "Conv2d one position, groups"])
def test_groups_are_separate_convolutions(name):
    objective, batch = problem(name, WEIGHTS, mix=0.0)
    block = wg.estimate(wg.KFAC(wg.Exact()), objective, [batch]).blocks[0]
    layer = objective.model.layer
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for group in range(layer.groups):
        part = nn.Conv2d(ins, outs, layer.kernel_size).double()
        mine = slice(group * outs, (group + 1) * outs)
        part.weight.data, part.bias.data = layer.weight.data[mine], layer.bias.data[mine]
        alone = wg.Objective(Head(part, 0.0), wg.MSE())
        x = batch.inputs[:, group * ins : (group + 1) * ins]
        targets = torch.zeros_like(alone.model(x)).detach()
        found = wg.estimate(wg.KFAC(wg.Exact()), alone, [wg.Batch(x, targets, WEIGHTS)]).blocks[0]
        torch.testing.assert_close(block.inputs[group], found.inputs[0])
        torch.testing.assert_close(
            block.outputs[group], found.outputs[0] / layer.groups
        )  # the mean is over more entries


def test_gram_by_halves():
    from weingarten.layers.rows import gram

    x = normal(2, 7, 801)
    torch.testing.assert_close(gram(x), x.mT @ x)


def test_spectrum_in_pieces(monkeypatch):
    name = "Conv2d stride padding dilation"
    objective, batch = problem(name, WEIGHTS)
    whole = wg.estimate(wg.EKFAC(wg.Exact()), objective, [batch]).dense()
    monkeypatch.setattr("weingarten.layers.rows._CHUNK", 1)
    torch.testing.assert_close(wg.estimate(wg.EKFAC(wg.Exact()), objective, [batch]).dense(), whole)
    diagonal = wg.estimate(wg.Diagonal(), objective, [batch]).dense()
    monkeypatch.setattr("weingarten.estimators.diagonal._CHUNK", 1)
    torch.testing.assert_close(wg.estimate(wg.Diagonal(), objective, [batch]).dense(), diagonal)


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (nn.Embedding(4, 2, max_norm=1.0), None, "max_norm"),
        (nn.Embedding(4, 2, sparse=True), None, "sparse"),
        (nn.Embedding(4, 2, scale_grad_by_freq=True), None, "scale_grad_by_freq"),
        (nn.BatchNorm1d(3, track_running_stats=False), None, "running statistics"),
        (nn.Conv3d(1, 1, 1), None, "no rule for a layer of type Conv3d"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
            None,
            "no rule for a layer of type Parametriz",
        ),
    ],
    ids=["max_norm", "sparse", "frequency", "no statistics", "Conv3d", "weight_norm"],
)
def test_what_a_rule_cannot_treat_is_refused_with_the_reason(layer, x, message):
    with pytest.raises(ValueError, match=message) as caught:
        wg.KFAC().init(*at(wg.Objective(Head(layer), wg.MSE())))
    assert "'layer." in str(caught.value)
    assert "otherwise=wg.Diagonal()" in str(caught.value)


def at(objective: wg.Objective) -> tuple[wg.Objective, dict[str, Tensor]]:
    return objective, objective.params()


def test_parameters_a_layer_does_not_have_are_refused():
    layer = nn.Linear(3, 2)
    layer.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"a Linear has no parameters \['layer.scale'\]"):
        wg.KFAC().init(*at(wg.Objective(Head(layer), wg.MSE())))


@pytest.mark.parametrize("name", [n for n in LAYERS if not n.startswith("Emb")])
def test_bfloat16_model_has_float32_factors(name):
    objective, batch = problem(name)
    expected = wg.estimate(wg.KFAC(wg.Exact()), objective, [batch])
    objective.model.bfloat16()
    half = wg.Batch(batch.inputs.bfloat16(), batch.targets.bfloat16())
    check_half(objective, half, expected)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_bfloat16_embedding_counts_in_float32(name):
    objective, batch = problem(name)
    expected = wg.estimate(wg.KFAC(wg.Exact()), objective, [batch])
    objective.model.bfloat16()
    check_half(objective, wg.Batch(batch.inputs, batch.targets.bfloat16()), expected)


def check_half(objective: wg.Objective, batch: wg.Batch, expected: wg.Curvature) -> None:
    found = wg.estimate(wg.KFAC(wg.Exact()), objective, [batch])
    (block,) = found.blocks
    assert block.inputs.dtype == block.outputs.dtype == torch.float32
    assert found.trace().dtype == torch.float32
    torch.testing.assert_close(found.trace(), expected.trace().float(), rtol=0.05, atol=0)
    for estimator in (wg.KFAC(), wg.EKFAC(), wg.Diagonal()):
        curvature = wg.estimate(estimator, objective, [batch])
        assert curvature.space.dtype == torch.bfloat16
        v = curvature.space.randn(generator())
        for leaf in curvature.solve(v, 0.1).values():
            assert leaf.dtype == torch.bfloat16
            assert torch.isfinite(leaf).all()
