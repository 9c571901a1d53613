"""Every function that may take a leaf, and single layers in what does not depend on the loss.

Their factors are compared with brute force in tests/estimators/test_oracle.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

import weingarten as wg
from tests.cases import LAYERS, WEIGHTS, Head, N, generator, initialised, integers, normal
from weingarten import reference
from weingarten.layers import OPERATIONS

ONE = [name for name in LAYERS if "one position" in name]
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


class Call(nn.Module):
    """One call of a function with leaves ``w`` and ``b``, for data of one position."""

    def __init__(self, function, shapes: dict[str, tuple[int, ...]], call) -> None:
        super().__init__()
        self.function, self.call = function, call
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.function, self, x)


def convolution(dims: int, transposed: bool):
    ones = (1,) * dims
    weight = (2, 3, *ones) if transposed else (3, 2, *ones)
    return {"w": weight, "b": (3,)}, lambda f, m, x: f(x, m.w, m.b), normal(2, 2, *ones)


MEAN, VARIANCE = torch.tensor([0.1, -0.2, 0.3]).double(), torch.tensor([1.0, 2.0, 0.5]).double()
AFFINE = {"w": (3,), "b": (3,)}
X, CHANNELS = normal(2, 3), normal(2, 3, 2)
# name of the function -> shapes of the leaves, the call, inputs of two data
CALLS = {
    "linear": ({"w": (2, 3), "b": (2,)}, lambda f, m, x: f(x, m.w, m.b), X),
    "addmm": ({"w": (3, 2), "b": (2,)}, lambda f, m, x: f(m.b, x, m.w), X),
    **dict.fromkeys(("matmul", "mm", "__matmul__"), ({"w": (3, 2)}, lambda f, m, x: f(x, m.w), X)),
    "embedding": ({"w": (4, 3)}, lambda f, m, x: f(x, m.w), integers(4, 2)),
    **{f"conv{d}d": convolution(d, False) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": convolution(d, True) for d in (1, 2, 3)},
    "layer_norm": (AFFINE, lambda f, m, x: f(x, (3,), m.w, m.b), X),
    "rms_norm": ({"w": (3,)}, lambda f, m, x: f(x, (3,), m.w), X),
    "group_norm": (AFFINE, lambda f, m, x: f(x, 1, m.w, m.b), CHANNELS),
    "batch_norm": (AFFINE, lambda f, m, x: f(x, MEAN, VARIANCE, m.w, m.b), CHANNELS),
    "instance_norm": (AFFINE, lambda f, m, x: f(x, weight=m.w, bias=m.b), CHANNELS),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), ({"w": (3,)}, lambda f, m, x: f(x, m.w), X)),
    **dict.fromkeys(("add", "__add__", "__radd__"), ({"w": (3,)}, lambda f, m, x: f(x, m.w), X)),
    "add_": ({"w": (3,)}, lambda f, m, x: f(x.clone(), m.w), X),
}


@pytest.mark.parametrize("function", OPERATIONS, ids=lambda f: str(resolve_name(f)))
def test_every_operation(function):
    """A function without an entry in the table above fails here."""
    shapes, call, x = CALLS[function.__name__]
    model = initialised(Head(Call(function, shapes, call)))
    with torch.no_grad():
        objective = wg.Objective(model, wg.MSE())
        batch = wg.Batch(x, torch.zeros_like(model(x)), WEIGHTS[:2])
    for one in (reference.datum(batch, 0), reference.datum(batch, 1)):
        expected = reference.dense_ggn(objective, [one], objective.params())
        found = wg.estimate(wg.KFAC(wg.Exact()), objective, [one])
        assert len(found.blocks) == 1
        torch.testing.assert_close(found.dense(), expected)


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
    for basis in (block.left, block.right):
        if basis is not None:
            eye = torch.eye(basis.shape[-1], dtype=torch.float64)
            torch.testing.assert_close(basis @ basis.mT, eye.expand_as(basis))


@pytest.mark.parametrize("name", LAYERS)
def test_diagonal_is_exact(name):
    objective, batch = problem(name, WEIGHTS)
    found = wg.estimate(wg.Diagonal(), objective, [batch])
    expected = reference.dense_ggn(objective, [batch], objective.params()).diagonal()
    torch.testing.assert_close(found.space.flatten(found.diag()), expected)


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


TOKENS = integers(4, N, 2)


@pytest.mark.parametrize(
    ("layer", "x", "leaf", "operation"),
    [
        (nn.Embedding(4, 2, max_norm=1.0), TOKENS, "weight", "embedding"),
        (nn.Embedding(4, 2, sparse=True), TOKENS, "weight", "embedding"),
        (nn.Embedding(4, 2, scale_grad_by_freq=True), TOKENS, "weight", "embedding"),
        (nn.EmbeddingBag(4, 2), TOKENS, "weight", "embedding_bag"),
        (nn.Bilinear(3, 3, 2), (normal(N, 3), normal(N, 3, seed=1)), "weight", "bilinear"),
        (nn.PReLU(), normal(N, 3), "weight", "prelu"),
        (nn.GRU(3, 2, batch_first=True), normal(N, 2, 3), "weight_ih_l0", "gru"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_is_not_understood_is_refused_with_the_reason(layer, x, leaf, operation):
    objective = wg.Objective(initialised(Outputs(layer)), wg.MSE())
    with torch.no_grad():
        batch = wg.Batch(
            x, torch.zeros_like(objective.model.eval()(*x) if isinstance(x, tuple) else objective.model(x))
        )
    with pytest.raises(ValueError, match=f"'layer.{leaf}' \\(used by torch.*{operation}") as caught:
        wg.estimate(wg.KFAC(), objective, [batch])
    assert "otherwise=wg.Diagonal()" in str(caught.value)


class Outputs(nn.Module):
    """The layer's output, or the first of its outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *x: Tensor) -> Tensor:
        found = self.layer(*x)
        return torch.tanh(found[0] if isinstance(found, tuple) else found)


def test_weights_made_of_parameters_are_refused_by_the_parameters_names():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    objective = wg.Objective(initialised(Head(layer)), wg.MSE())
    with pytest.raises(ValueError, match=r"'layer.parametrizations.weight.original0' \(used by"):
        wg.estimate(wg.KFAC(), objective, [(normal(N, 3), normal(N, 2))])


def test_parameters_that_nothing_uses_are_refused():
    layer = nn.Linear(3, 2)
    layer.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"does not depend on parameter 'layer.scale'"):
        wg.estimate(
            wg.KFAC(), wg.Objective(initialised(Head(layer)), wg.MSE()), [(normal(N, 3), normal(N, 2))]
        )


def test_leaves_above_the_size_of_a_dense_block_have_a_block_per_channel():
    """Gain and shift of each channel together, and nothing between channels."""
    width = 200
    objective = wg.Objective(initialised(Outputs(nn.LayerNorm(width))), wg.MSE())
    batch = wg.Batch(normal(2, 2, width), normal(2, 2, width), WEIGHTS[:2])
    (block,) = wg.estimate(wg.KFAC(wg.Exact()), objective, [batch]).blocks
    assert block.layout.shape == (width, 2, 1)
    exact = reference.dense_ggn(objective, [batch], objective.params())
    channel = torch.arange(2 * width) % width
    torch.testing.assert_close(block.dense(), exact * (channel[:, None] == channel))


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
