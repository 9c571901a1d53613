"""What the objective takes from a model, which remedy it names, and what its value is divided by."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import weingarten as wg
from tests.cases import PROBLEMS, WEIGHTS, N, initialised, integers, mlp, normal
from weingarten import reference
from weingarten.bilevel.resolve import Level64

KINDS = {wg.GGN: reference.dense_ggn, wg.Hessian: reference.dense_hessian}
WEIGHTED = wg.CrossEntropy(weight=[0.5, 2.0, 0.7], label_smoothing=0.1)


@dataclass
class Returned:
    """The style of Hugging Face."""

    logits: Tensor
    hidden: Tensor


class Wrapped(nn.Module):
    """``mlp(3, 4, 3)``, whose output comes in a container."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.net, self.wrap = mlp(3, 4, 3), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


CONTAINERS = {
    "object": (
        lambda z: Returned(z, z),
        lambda out: out.logits,
        "pass Objective(..., output=lambda out: out.logits)",
    ),
    "dict": (lambda z: {"z": z, "other": z}, lambda out: out["z"], "output=lambda out: out['z'])"),
    "tuple": (lambda z: (z, z), lambda out: out[0], "output=lambda out: out[0])"),
    "strange": (lambda z: Returned(None, z), lambda out: out.hidden, "pass output=, which picks the tensor"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_output_picks_the_tensor_that_the_loss_takes(name):
    wrap, pick, _ = CONTAINERS[name]
    plain, wrapped = (
        wg.Objective(initialised(Wrapped(w)), wg.CrossEntropy(), o)
        for w, o in ((lambda z: z, None), (wrap, pick))
    )
    data = [wg.Batch(normal(N, 3), integers(3, N), WEIGHTS)]
    params = plain.params()
    assert torch.equal(wrapped.forward(params, normal(N, 3)), plain.forward(params, normal(N, 3)))
    for kind in KINDS:
        torch.testing.assert_close(kind(wrapped, data).dense(), kind(plain, data).dense())


@pytest.mark.parametrize("name", CONTAINERS)
def test_without_it_the_error_names_the_remedy(name):
    wrap, _, remedy = CONTAINERS[name]
    objective = wg.Objective(initialised(Wrapped(wrap)), wg.CrossEntropy())
    with pytest.raises(TypeError) as error:
        objective.forward(objective.params(), normal(N, 3))
    assert "the model returned" in str(error.value)
    assert remedy in str(error.value)


def test_a_level_in_float64_keeps_it():
    objective = wg.Objective(
        initialised(Wrapped(lambda z: (z, z))).float(), wg.CrossEntropy(), lambda out: out[0]
    )
    batch, level = wg.Batch(normal(N, 3).float(), integers(3, N)), wg.Level(objective)
    params = {name: p.double() for name, p in objective.params().items()}
    found = Level64(level, batch).value(params, {})
    assert found == pytest.approx(float(objective.value(objective.params(), batch)), rel=1e-5)


def test_output_itself_is_checked():
    with pytest.raises(TypeError, match="output is 'logits', expected a function of what the model returns"):
        wg.Objective(mlp(2, 2), wg.MSE(), "logits")
    objective = wg.Objective(mlp(2, 2), wg.MSE(), lambda out: [out])
    with pytest.raises(TypeError, match="output= returned list, expected one tensor"):
        objective.forward(objective.params(), torch.ones(1, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("target", [integers(3, N), normal(N, 3, seed=1).softmax(1)], ids=["index", "soft"])
def test_curvature_with_class_weights_and_reductions(kind, reduction, weights, target):
    """Against the dense matrix, and that against automatic differentiation of torch's own loss where the weights allow."""
    loss = replace(WEIGHTED, reduction=reduction)
    objective = wg.Objective(initialised(mlp(3, 4, 3)), loss)
    whole = wg.Batch(normal(N, 3), target, weights)
    parts = [reference.datum(whole, n) for n in range(N)]
    params = objective.params()
    expected = KINDS[kind](objective, [whole], params)
    torch.testing.assert_close(kind(objective, parts).dense(), expected)
    torch.testing.assert_close(kind(objective, [whole]).dense(), expected)
    if weights is None and kind is wg.Hessian:
        theirs = nn.CrossEntropyLoss(
            torch.tensor(loss.weight).double(), label_smoothing=0.1, reduction=reduction
        )
        space = kind(objective, parts).space
        value = lambda p: theirs(objective.forward(space.unflatten(p), whole.inputs), target)  # noqa: E731
        torch.testing.assert_close(expected, torch.autograd.functional.hessian(value, space.flatten(params)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "loss", [wg.MSE(reduction="sum"), wg.BinaryCrossEntropy([0.5, 2.0], [3.0, 0.2], reduction="sum")]
)
def test_a_sum_is_the_mean_times_the_count(kind, loss):
    mean = replace(loss, reduction="mean")
    data = [(normal(N, 3), normal(N, 2, seed=1).sigmoid()), (normal(1, 3), normal(1, 2).sigmoid())]
    ours, theirs = (wg.Objective(initialised(mlp(3, 4, 2)), kind_of) for kind_of in (loss, mean))
    assert ours.count(data) == theirs.count(data) == 2 * (N + 1)
    torch.testing.assert_close(kind(ours, data).dense(), 2 * (N + 1) * kind(theirs, data).dense())
    params, batch = ours.params(), wg.Batch.of(data[0])
    torch.testing.assert_close(ours.value(params, batch), 2 * N * theirs.value(params, batch))
    torch.testing.assert_close(ours.value(params, batch, 7), ours.total(params, batch))
    torch.testing.assert_close(theirs.value(params, batch, 7), ours.total(params, batch) / 7)


def test_count_adds_class_weights():
    objective = wg.Objective(mlp(3, 3), WEIGHTED)
    data = [(normal(2, 3), torch.tensor([0, 1])), (normal(3, 3), torch.tensor([2, -100, 1]))]
    assert objective.count(data) == pytest.approx(0.5 + 2.0 + 0.7 + 2.0)
    with pytest.raises(ValueError, match="no valid element"):
        objective.count([(normal(1, 3), torch.tensor([-100]))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_terms_add_up(kind, reduction):
    """Terms times their shares are the operator for class weights and sums too."""
    objective = wg.Objective(initialised(mlp(3, 4, 3)), replace(WEIGHTED, reduction=reduction))
    data = [(normal(2, 3), torch.tensor([0, 1])), (normal(3, 3, seed=1), torch.tensor([2, -100, 1]))]
    operator = kind(objective, data)
    terms = operator.terms()
    assert len(terms) == 2
    torch.testing.assert_close(sum(share * term.dense() for share, term in terms), operator.dense())


def test_datum_ggns_sum_to_the_ggn():
    problem = PROBLEMS["positions, ignored"]
    objective, data = problem.objective(), problem.batches(WEIGHTS)
    params = objective.params()
    each = reference.datum_ggns(objective, data, params)
    assert len(each) == N
    torch.testing.assert_close(
        torch.stack(each).sum(0) / objective.count(data), reference.dense_ggn(objective, data, params)
    )
    jacobians = reference.datum_jacobians(objective, data, params)
    h = reference.output_hessian(objective, reference.datum(problem.whole(), 1), params)
    torch.testing.assert_close(each[1], WEIGHTS[1] * jacobians[1].mT @ h @ jacobians[1])
    assert each[1].abs().max() > 1e-3


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=7,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=3,
        max_position_embeddings=4,
        num_labels=3,
    )
    return initialised(transformers.BertForSequenceClassification(config))


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=5, n_embd=4, n_layer=1, n_head=2, n_positions=4, n_inner=3)
    return initialised(transformers.GPT2LMHeadModel(config))


HUGGINGFACE = {
    "classes": (bert, lambda out: out.logits, integers(3, 3)),
    "tokens": (
        gpt2,
        lambda out: out.logits.mT,
        torch.tensor([[1, 2, 0, -100], [3, 4, -100, -100], [0, 1, 2, 3]]),
    ),
}
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HUGGINGFACE)
@pytest.mark.parametrize("wrap", [dict, UserDict], ids=["dict", "BatchEncoding"])
class TestHuggingFace:
    def test_products_are_dense_matrices(self, name, wrap):
        make, pick, targets = HUGGINGFACE[name]
        model = make()
        model.requires_grad_(False)
        kept = ("attn", "attention", "wpe", "classifier")
        for leaf, p in model.named_parameters():
            p.requires_grad_(any(part in leaf for part in kept))
        objective = wg.Objective(
            model, wg.CrossEntropy(weight=[0.5, 2.0, 0.7, 1.0, 1.0][: 3 if name == "classes" else 5]), pick
        )
        inputs = wrap({"input_ids": integers(5, 3, 4), "attention_mask": MASK})
        data = [wg.Batch(inputs, targets, WEIGHTS[:3])]
        params = objective.params()
        for kind, dense in KINDS.items():
            found = kind(objective, data)
            v = found.space.randn(torch.Generator().manual_seed(0))
            expected = dense(objective, data, params) @ found.space.flatten(v)
            torch.testing.assert_close(found.space.flatten(found.apply(v)), expected)
            assert expected.abs().max() > 1e-3

    def test_the_remedy_is_named(self, name, wrap):
        make, _, targets = HUGGINGFACE[name]
        objective = wg.Objective(make(), wg.CrossEntropy())
        batch = wg.Batch(wrap({"input_ids": integers(5, 3, 4), "attention_mask": MASK}), targets)
        with pytest.raises(
            TypeError, match=r"output=lambda out: out.logits\), or out.logits.mT for a loss of tokens"
        ):
            objective.value(objective.params(), batch)

    def test_the_mask_reaches_the_model(self, name, wrap):
        make, pick, targets = HUGGINGFACE[name]
        objective = wg.Objective(make().eval(), wg.CrossEntropy(), pick)
        other = integers(5, 3, 4)
        other[0, 3] = (other[0, 3] + 1) % 5  # hidden by the mask, and an ignored target for tokens
        values = [
            objective.value(
                objective.params(), wg.Batch(wrap({"input_ids": ids, "attention_mask": mask}), targets)
            )
            for ids, mask in ((integers(5, 3, 4), MASK), (other, MASK), (other, torch.ones_like(MASK)))
        ]
        torch.testing.assert_close(values[0], values[1])
        assert name == "tokens" or abs(values[2] - values[1]) > 1e-6


@pytest.mark.parametrize(("shape", "pick"), [((4, 5, 3), "mT"), ((4, 5, 2, 3), r"movedim\(-1, 1\)")])
def test_classes_in_the_last_dimension(shape, pick):
    objective = wg.Objective(lambda p, x: x * p["w"], wg.CrossEntropy())
    batch = wg.Batch(torch.ones(shape), torch.zeros(shape[:-1], dtype=torch.long))
    with pytest.raises(
        ValueError, match=rf"classes in dimension 1\); pass output=lambda out: out.{pick} to wg.Objective"
    ):
        objective.value({"w": torch.ones(3)}, batch)
    with pytest.raises(ValueError, match=r"\(classes in dimension 1\)$"):
        objective.value({"w": torch.ones(3)}, wg.Batch(batch.inputs[:, :4], batch.targets))


class Shared(nn.Module):
    """A module under two names, and a weight of another module that is tied to it; a buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.BatchNorm1d(3)
        self.third = nn.BatchNorm1d(3)
        self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TestSeveralNames:
    def test_the_model_is_put_back(self):
        model = initialised(Shared()).eval()
        before, keys = dict(model.named_parameters(remove_duplicate=False)), list(model.state_dict())
        objective = wg.Objective(model, wg.MSE())
        for _ in range(2):
            objective.forward({name: 2 * p for name, p in objective.params().items()}, normal(N, 3))
        after = dict(model.named_parameters(remove_duplicate=False))
        assert all(after[name] is p for name, p in before.items())
        assert after.keys() == before.keys()
        assert list(model.state_dict()) == keys
        assert model.first.weight is model.second.weight is model.third.weight

    @pytest.mark.parametrize("name", ["first", "second", "third"])
    def test_any_name_reaches_every_place(self, name):
        model = initialised(Shared()).eval()
        objective, x, value = wg.Objective(model, wg.MSE()), normal(N, 3), normal(3, seed=1)
        found = objective.forward({f"{name}.weight": value}, x)
        with torch.no_grad():
            model.first.weight.copy_(value)
        assert torch.equal(found, model(x))

    def test_one_value_by_several_names(self):
        model, value = initialised(Shared()).eval(), normal(3, seed=1)
        names = ("first", "second", "third")
        found = wg.Objective(model, wg.MSE()).forward(
            {f"{name}.weight": value for name in names}, normal(N, 3)
        )
        assert all(isinstance(getattr(model, name).weight, nn.Parameter) for name in names)
        with torch.no_grad():
            model.first.weight.copy_(value)
        assert torch.equal(found, model(normal(N, 3)))

    @pytest.mark.parametrize("name", ["first", "second"])
    def test_buffers_too(self, name):
        model = initialised(Shared()).eval()
        objective, x, value = wg.Objective(model, wg.MSE()), normal(N, 3), normal(3, seed=1)
        held = model.first.running_mean
        found = objective.forward({f"{name}.running_mean": value}, x)
        assert model.first.running_mean is held
        held.copy_(value)
        assert torch.equal(found, model(x))

    def test_two_values_are_refused(self):
        objective = wg.Objective(initialised(Shared()), wg.MSE())
        values = {"first.weight": normal(3), "third.weight": normal(3)}
        with pytest.raises(ValueError, match=r"'first.weight' and 'third.weight' are one tied parameter"):
            objective.forward(values, normal(N, 3))
