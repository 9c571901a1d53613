"""Other types, wrappers around models, layers that are refused, and what a newcomer does wrong first."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import weingarten as wg
from tests.cases import N, initialised, integers, mlp, normal
from tests.estimators.architectures import NEXT, TOKENS, TORCH, Case
from weingarten import reference
from weingarten.objective import each_tensor

try:
    from tests.estimators.huggingface import HUGGINGFACE, PADDED, bert, gpt2, logits
except ImportError:
    HUGGINGFACE = {}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MODELS = {**TORCH, **HUGGINGFACE}
PICKED = [
    "ResNet, batch norm",
    "nn.TransformerEncoder, batch_first=True, norm_first=False",
    "GPT, positions from a table",
    "ViT",
    *(name for name in ("BERT", "GPT-2", "Llama, tied") if name in HUGGINGFACE),
]


def typed(name: str, dtype: torch.dtype) -> tuple[wg.Objective, wg.Batch]:
    case = MODELS[name]
    objective = case.objective()
    objective.model.to(dtype)
    inputs = each_tensor(lambda x: x.to(dtype) if x.is_floating_point() else x, case.inputs)
    return objective, wg.Batch(inputs, case.targets)


def tensors(block: wg.Curvature) -> list[Tensor]:
    return [value for value in vars(block).values() if isinstance(value, Tensor)]


def assert_near(found: wg.Curvature, expected: wg.Curvature, tolerance: float) -> None:
    """Within a share of each block's trace."""
    for block, other in zip(found.blocks, expected.blocks, strict=True):
        assert list(block.space.shapes) == list(other.space.shapes)
        one, two = (torch.cat([d.flatten().float() for d in b.diag().values()]) for b in (block, other))
        assert (one - two).abs().max() < tolerance * (two.abs().max() + 1e-3), list(block.space.shapes)


@pytest.mark.parametrize("name", PICKED)
@pytest.mark.parametrize("kind", [wg.KFAC, wg.EKFAC])
def test_half_precision(name, kind):
    """Under autocast, and of a model in bfloat16, factors are sums in float32."""
    estimator = kind(wg.Exact())
    objective, batch = typed(name, torch.float32)
    expected = wg.estimate(estimator, objective, [batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = wg.estimate(estimator, objective, [batch])
        assert torch.is_autocast_enabled("cpu")
    half = wg.estimate(estimator, *typed_half(name))
    for found in (autocast, half):
        assert {x.dtype for block in found.blocks for x in tensors(block)} == {torch.float32}
        assert_near(found, expected, 0.1)
    assert not all(
        torch.equal(a, b) for a, b in zip(autocast.diag().values(), expected.diag().values(), strict=True)
    )


def typed_half(name: str) -> tuple[wg.Objective, list[wg.Batch]]:
    objective, batch = typed(name, torch.bfloat16)
    return objective, [batch]


@pytest.mark.parametrize("name", PICKED)
def test_factors_kept_in_half_precision(name):
    """A solve goes through float32, with an answer near the one of float32 factors."""
    objective, batch = typed(name, torch.float32)
    g = {n: torch.ones_like(p) for n, p in objective.params().items()}
    kept = wg.estimate(wg.KFAC(wg.Exact(), dtype=torch.bfloat16), objective, [batch])
    full = wg.estimate(wg.KFAC(wg.Exact()), objective, [batch])
    kronecker = [block for block in kept.blocks if isinstance(block, wg.Kronecker)]
    assert {x.dtype for block in kronecker for x in tensors(block)} == {torch.bfloat16}
    found, expected = kept.solve(g, 0.1), full.solve(g, 0.1)
    for leaf, value in expected.items():
        assert found[leaf].dtype == torch.float32
        assert (found[leaf] - value).norm() < 0.05 * value.norm(), leaf


# --------------------------------------------------------------------------------------------------------- wrapped models


class Checkpointed(nn.Module):
    """The middle is computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 3), reentrant
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.reentrant is None:
            return self.last(self.middle(h))
        return self.last(checkpoint(self.middle, h, use_reentrant=self.reentrant))


def vectors() -> list[wg.Batch]:
    return [wg.Batch(normal(N, 3), integers(3, N))]


@pytest.mark.parametrize("fisher", [wg.Exact(), wg.MonteCarlo()])
@pytest.mark.parametrize("kind", [wg.KFAC, wg.EKFAC, wg.Diagonal])
def test_checkpointed_models(kind, fisher):
    plain, stored = (
        wg.estimate(kind(fisher), wg.Objective(initialised(Checkpointed(r)), wg.CrossEntropy()), vectors())
        for r in (None, False)
    )
    torch.testing.assert_close(stored.diag(), plain.diag())


@pytest.mark.parametrize("kind", [wg.KFAC, wg.EKFAC])
def test_reentrant_checkpoints_are_refused(kind):
    objective = wg.Objective(initialised(Checkpointed(True)), wg.CrossEntropy())
    with pytest.raises(ValueError, match=r"use_reentrant=True.*pass use_reentrant=False"):
        wg.estimate(kind(), objective, vectors())


@pytest.mark.parametrize("kind", [wg.KFAC, wg.EKFAC, wg.Diagonal])
@pytest.mark.parametrize("wrapper", ["torch.compile", "Module.compile"])
def test_compiled_models_run_as_written(kind, wrapper):
    compiled_calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled_calls.append(graph)
        return graph.forward

    plain = initialised(Checkpointed(None))
    model: Any = copy.deepcopy(plain)
    if wrapper == "torch.compile":
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    estimator = kind(wg.Exact())
    found = wg.estimate(estimator, wg.Objective(model, wg.CrossEntropy()), vectors()).diag()
    assert not compiled_calls
    assert list(found) == [name for name, _ in model.named_parameters()]
    expected = wg.estimate(estimator, wg.Objective(plain, wg.CrossEntropy()), vectors()).diag()
    torch.testing.assert_close({n.removeprefix("_orig_mod."): x for n, x in found.items()}, expected)
    model(vectors()[0].inputs)
    assert compiled_calls  # and it is still compiled afterwards
    torch.compiler.reset()


# --------------------------------------------------------------------------------------------------------------- refused


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cells, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x[:, None])[0][:, -1])


class Routed(nn.Module):
    """Each token goes to one of two experts, by the sign of its first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 3)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            chosen = ((tokens[:, 0] > 0).long() == number).nonzero()[:, 0]
            out = out.index_add(0, chosen, torch.tanh(expert(tokens[chosen])))
        return self.head(out.view(len(x), -1, 3).mean(1))


def net(change: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    change(model[0])
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "parametrize": (
        lambda: net(lambda m: parametrize.register_parametrization(m, "weight", Symmetric())),
        r"'0.parametrizations.weight.original' \(used by torch.Tensor.triu before it meets the data\)",
    ),
    "weight norm": (
        lambda: net(parametrizations.weight_norm),
        r"'0.parametrizations.weight.original0' \(used by _weight_norm before",
    ),
    "spectral norm": (
        lambda: net(parametrizations.spectral_norm),
        r"'0.parametrizations.weight.original' \(used by torch.mv before",
    ),
    "LSTM": (lambda: Recurrent(nn.LSTM), r"'cells.weight_hh_l0' \(used by torch.lstm\)"),
    "GRU": (lambda: Recurrent(nn.GRU), r"'cells.weight_hh_l0' \(used by torch.gru\)"),
    "PReLU": (lambda: nn.Sequential(nn.Linear(3, 3), nn.PReLU()), r"'1.weight' \(used by .*prelu\)"),
    "experts": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), Routed()),
        r"'1.experts.0.weight' \(used by .*linear.*'1.experts.1.weight' \(used by .*linear",
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # in the batched gradients of weight norm
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", [wg.KFAC, wg.EKFAC])
def test_refused_by_name_or_left_to_another(name, kind):
    make, message = REFUSED[name]
    objective = wg.Objective(initialised(make()), wg.CrossEntropy())
    with pytest.raises(ValueError, match=message + r".*pass otherwise=wg.Diagonal\(\)"):
        wg.estimate(kind(), objective, vectors())
    found = wg.estimate(kind(wg.Exact(), otherwise=wg.Diagonal()), objective, vectors())
    assert list(found.space.shapes) == list(objective.params())
    diagonal = wg.estimate(wg.Diagonal(), objective, vectors())
    leaf = re.search("'(.*?)'", message)
    assert leaf is not None
    torch.testing.assert_close(found.diag()[leaf[1]], diagonal.diag()[leaf[1]])
    if kind is wg.EKFAC:
        torch.testing.assert_close(found.trace(), diagonal.trace())


@pytest.mark.parametrize(
    "signs", ["++-- ++-- ++-- +++- +---", "++-- ++-- ++-- ++-- ++--", "++++ +--- ---- ++-- +-++"]
)
def test_experts_are_not_taken_for_layers_on_all_tokens(signs):
    """Even where the numbers of tokens are those of equal parts for each datum, in the batch or in the rows looked at first."""
    x = normal(N, 4, 3)
    x[..., 0] = torch.tensor([[1.0 if s == "+" else -1.0 for s in datum] for datum in signs.split()])
    objective = wg.Objective(initialised(Routed()), wg.CrossEntropy())
    with pytest.raises(ValueError, match=r"cannot treat 'experts.0.weight' .*'experts.1.bias' "):
        wg.estimate(wg.KFAC(), objective, [(x, integers(3, N))])
    found = wg.estimate(wg.EKFAC(wg.Exact(), otherwise=wg.Diagonal()), objective, [(x, integers(3, N))])
    expected = reference.dense_ggn(objective, [(x, integers(3, N))], objective.params())
    torch.testing.assert_close(found.trace(), expected.trace())


# ------------------------------------------------------------------------------------------------------------ wrong usage


def hugging_face() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "estimator", [wg.KFAC(), wg.EKFAC(), wg.Diagonal()], ids=["KFAC", "EKFAC", "diagonal"]
)
class TestWrongUsage:
    """One error each, which names what was found, what was expected, and the remedy."""

    def test_logits_not_taken_out(self, estimator):
        hugging_face()
        objective = wg.Objective(initialised(bert()), wg.CrossEntropy())
        message = (
            r"returned SequenceClassifierOutput, expected one tensor; pass .*output=lambda out: out.logits"
        )
        with pytest.raises(TypeError, match=message):
            wg.estimate(estimator, objective, [(PADDED, integers(3, 3))])

    def test_classes_of_tokens_in_the_last_dimension(self, estimator):
        hugging_face()
        objective = wg.Objective(initialised(gpt2()), wg.CrossEntropy(), logits)
        with pytest.raises(
            ValueError, match=r"target has shape \(3, 3\), expected \(3, 7\) .*classes in dimension 1"
        ):
            wg.estimate(estimator, objective, [(PADDED, NEXT)])

    def test_labels_among_the_inputs(self, estimator):
        hugging_face()
        objective = wg.Objective(initialised(gpt2()), wg.CrossEntropy())
        with pytest.raises(TypeError, match=r"expected one tensor; pass .*out.logits"):
            wg.estimate(estimator, objective, [({**PADDED, "labels": NEXT}, NEXT)])

    def test_a_tokenizers_encoding_is_a_dict(self, estimator):
        encoding = hugging_face().BatchEncoding(dict(PADDED))
        objective = wg.Objective(initialised(bert()), wg.CrossEntropy(), logits)
        found, expected = (
            wg.estimate(estimator, objective, [(inputs, integers(3, 3))]).diag()
            for inputs in (encoding, PADDED)
        )
        torch.testing.assert_close(found, expected)

    def test_everything_frozen(self, estimator):
        model = mlp(3, 3).requires_grad_(False)
        with pytest.raises(ValueError, match="no parameter has requires_grad=True; unfreeze"):
            wg.estimate(estimator, wg.Objective(model, wg.CrossEntropy()), vectors())

    def test_data_of_another_type_than_the_model(self, estimator):
        objective = wg.Objective(mlp(3, 3), wg.CrossEntropy())
        with pytest.raises(RuntimeError, match=r"^mat1 and mat2 must have the same dtype"):
            wg.estimate(estimator, objective, vectors())

    def test_more_inputs_than_targets(self, estimator):
        objective = wg.Objective(initialised(mlp(3, 3)), wg.CrossEntropy())
        message = r"inputs have 6 rows and the targets 5|target has shape \(5,\), expected \(6,\)"
        with pytest.raises(ValueError, match=message):
            wg.estimate(estimator, objective, [(normal(N + 1, 3), integers(3, N))])

    def test_one_label_where_every_token_has_one(self, estimator):
        objective = Case(TORCH["GPT, positions from a table"].model, TOKENS, NEXT).objective()
        with pytest.raises(ValueError, match=r"target has shape \(3,\), expected \(3, 3\)"):
            wg.estimate(estimator, objective, [(TOKENS, NEXT[:, 0])])
