"""Whole models: every parameter is covered, and what theory says of the blocks holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weingarten as wg
from tests.cases import generator, initialised, integers, normal
from tests.estimators.architectures import (
    DATA,
    GPT,
    LABELS,
    NEXT,
    POSITION_LABELS,
    SEQUENCES,
    TOKENS,
    TORCH,
    VOCABULARY,
    Case,
    Encoder,
)
from weingarten import reference, tree

try:
    from tests.estimators.huggingface import HUGGINGFACE, bert, gpt2, llama, logits, token_logits
except ImportError:
    HUGGINGFACE = {}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MODELS = {**TORCH, **HUGGINGFACE}
EXACT = wg.KFAC(wg.Exact())


@pytest.fixture(params=MODELS)
def case(request) -> Case:
    return MODELS[request.param]


def test_all_parameters_are_covered(case):
    objective, batch = case.objective(), case.batch()
    trainable = [name for name, p in objective.model.named_parameters() if p.requires_grad]
    for estimator in (wg.KFAC(), wg.EKFAC()):
        found = wg.estimate(estimator, objective, [batch])
        assert list(found.space.shapes) == trainable
        g = random(found)
        step = found.solve(g, damping=0.1)
        rounding = 10.0**-case.digits
        torch.testing.assert_close(found.shift(0.1).apply(step), g, rtol=rounding, atol=rounding)


def random(curvature: wg.Curvature) -> dict[str, torch.Tensor]:
    return {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(curvature.space.shapes.items())}


def test_the_corrected_spectrum_is_that_of_the_exact_matrix(case):
    """In its own basis EKFAC is exact: each block's trace, and the quadratic form in an eigenvector."""
    objective, batch = case.objective(), case.batch()
    params = objective.params()
    found = wg.estimate(wg.EKFAC(wg.Exact()), objective, [batch])
    assert len(found.blocks) > 2
    general = wg.Objective(lambda p, x: objective.forward(p, x), objective.loss)
    objective.model.eval()
    diagonal = wg.estimate(wg.Diagonal(), general, [batch], params).diag()
    ggn = wg.GGN(objective, [batch])
    draw = generator(3)
    for block in found.blocks:
        expected = torch.stack([diagonal[name].sum() for name in block.space.shapes]).sum()
        torch.testing.assert_close(block.trace().double(), expected, rtol=10.0**-case.digits, atol=1e-12)
        place = tuple(int(torch.randint(size, (), generator=draw)) for size in block.spectrum.shape)
        unit = torch.zeros_like(block.spectrum)
        unit[place] = 1
        v = {**tree.zeros_like(params), **block.layout.split(block.rotate_back(unit))}
        torch.testing.assert_close(
            block.spectrum[place].double(), tree.dot(v, ggn.apply(v)), rtol=10.0**-case.digits, atol=1e-10
        )


def test_the_diagonal_by_use_is_the_diagonal_in_general(case):
    objective, batch = case.objective(), case.batch()
    general = wg.Objective(lambda p, x: objective.forward(p, x), objective.loss)
    objective.model.eval()
    expected = wg.estimate(wg.Diagonal(), general, [batch], objective.params()).diag()
    torch.testing.assert_close(wg.estimate(wg.Diagonal(), objective, [batch]).diag(), expected)


# ------------------------------------------------------------------------------------------- padding, and one position


def widened(x: torch.Tensor, filling: int | torch.Tensor) -> torch.Tensor:
    """Two more positions, filled."""
    more = torch.full((DATA, 2), filling) if isinstance(filling, int) else filling
    return torch.cat([x, more.to(x.dtype)], dim=1)


def padded(case: Case) -> tuple[wg.Batch, wg.Batch]:
    """The case's batch, and the same sequences with two more columns of rubbish that masks and labels tell to ignore."""
    inputs, tokens = case.inputs, integers(VOCABULARY, DATA, 2, seed=8)
    if not isinstance(inputs, dict):
        wide = widened(inputs, tokens)
    elif "src" in inputs:
        wide = {
            "src": widened(inputs["src"], normal(DATA, 2, inputs["src"].shape[-1], seed=8)),
            "src_key_padding_mask": widened(inputs["src_key_padding_mask"], 1),
        }
    else:
        wide = {
            **inputs,
            "input_ids": widened(inputs["input_ids"], tokens),
            "attention_mask": widened(inputs["attention_mask"], 0),
        }
    targets = widened(case.targets, -100) if case.targets.shape == (DATA, 3) else case.targets
    return case.batch(), wg.Batch(wide, targets, case.weights)


PADDED = [
    "nn.TransformerEncoder, batch_first=True, norm_first=True",
    "nn.TransformerEncoder, batch_first=False, norm_first=False",
    "GPT, positions from a table",
    "GPT, positions a parameter, no bias",
    *HUGGINGFACE,
]


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("sharing", [wg.Expand(), wg.Reduce()], ids=["expand", "reduce"])
def test_padding_changes_no_factor(name, sharing):
    case = MODELS[name]
    objective, tolerance = case.objective(), 10.0**-case.digits
    narrow, wide = padded(case)
    for kind in (wg.KFAC, wg.EKFAC):
        found, expected = (wg.estimate(kind(wg.Exact(), sharing), objective, [b]) for b in (wide, narrow))
        for block, other in zip(found.blocks, expected.blocks, strict=True):
            for factor in ("inputs", "outputs") if isinstance(other, wg.Kronecker) else ():
                torch.testing.assert_close(
                    getattr(block, factor), getattr(other, factor), rtol=tolerance, atol=tolerance
                )
        v = random(found)
        torch.testing.assert_close(found.apply(v), expected.apply(v), rtol=tolerance, atol=tolerance)


ONE_POSITION: dict[str, Case] = {
    "GPT": Case(lambda: GPT(True), TOKENS[:, :1], NEXT[:, :1]),
    "GPT, positions a parameter": Case(lambda: GPT(False), TOKENS[:, :1], NEXT[:, :1]),
    "nn.TransformerEncoder": Case(
        lambda: Encoder(True, False),
        {"src": SEQUENCES[:, :1], "src_key_padding_mask": torch.zeros(DATA, 1, dtype=torch.bool)},
        POSITION_LABELS[:, :1],
    ),
}
if HUGGINGFACE:
    ids = {"input_ids": TOKENS[:, :1], "attention_mask": torch.ones(DATA, 1, dtype=torch.long)}
    ONE_POSITION |= {
        "BERT": Case(bert, ids, LABELS, logits),
        "GPT-2": Case(gpt2, ids, NEXT[:, :1], token_logits),
        "Llama": Case(lambda: llama(False), ids, NEXT[:, :1], token_logits, digits=5),
    }


@pytest.mark.parametrize("name", ONE_POSITION)
@pytest.mark.parametrize("kind", [wg.KFAC, wg.EKFAC])
def test_one_datum_with_one_position_is_exact(name, kind):
    """Block by block; a leaf that serves as table and as matrix is a sum of two products, and exact in its basis only."""
    case = ONE_POSITION[name]
    objective, params = case.objective(), case.objective().params()
    one = [reference.datum(case.batch(), 1)]
    found = wg.estimate(kind(wg.Exact()), objective, one)
    dense = reference.dense_ggn(objective, one, params)
    space = found.space
    owner = torch.cat([torch.full((s.numel(),), i) for i, s in enumerate(space.shapes.values())])
    names = list(space.shapes)
    checked = 0
    for block in found.blocks:
        if "tokens.weight" in block.space.shapes or "transformer.wte.weight" in block.space.shapes:
            continue
        where = torch.cat([(owner == names.index(n)).nonzero()[:, 0] for n in block.space.shapes])
        expected = within(block, dense[where][:, where])
        torch.testing.assert_close(block.dense(), expected, rtol=10.0**-case.digits, atol=1e-10)
        checked += 1
    assert checked > 5


def within(block: wg.Curvature, dense: torch.Tensor) -> torch.Tensor:
    """Without the entries between the groups of one block (query, key and value of a packed projection)."""
    group = torch.arange(block.layout.groups)[:, None, None].expand(block.layout.shape)
    label = block.space.flatten(block.layout.split(group.double()))
    return dense * (label[:, None] == label[None, :])


# -------------------------------------------------------------------------------------------------------- frozen leaves

FROZEN = ["biases", "weights", "first half", "all but the last", "every second"]


def is_frozen(which: str, name: str, number: int, total: int) -> bool:
    return {
        "biases": name.endswith("bias"),
        "weights": name.endswith("weight") and number > 0,
        "first half": number < total // 2,
        "all but the last": number < total - 2,
        "every second": number % 2 == 1,
    }[which]


@pytest.mark.parametrize("which", FROZEN)
def test_frozen_leaves_leave_the_other_blocks_alone(case, which):
    full = case.objective()
    whole = wg.estimate(EXACT, full, [case.batch()])
    names = list(whole.space.shapes)
    frozen = {n for i, n in enumerate(names) if is_frozen(which, n, i, len(names))}
    v = random(whole)
    expected = whole.apply({n: torch.zeros_like(x) if n in frozen else x for n, x in v.items()})
    subset = {n: p for n, p in full.params().items() if n not in frozen}
    explicit = wg.estimate(EXACT, full, [case.batch()], subset)
    for name, p in full.model.named_parameters():
        p.requires_grad_(name not in frozen)
    for found in (explicit, wg.estimate(EXACT, full, [case.batch()])):
        assert list(found.space.shapes) == [n for n in names if n not in frozen]
        product = found.apply({n: v[n] for n in found.space.shapes})
        torch.testing.assert_close(product, {n: expected[n] for n in found.space.shapes})


@pytest.mark.parametrize(
    "name", ["GPT, positions from a table", *(n for n in ("BERT", "GPT-2", "T5") if n in HUGGINGFACE)]
)
def test_batches_of_other_sizes_and_lengths(name):
    """What was found of the first batch serves the others, down to a single datum."""
    case = MODELS[name]
    objective, (narrow, wide) = case.objective(), padded(case)
    batches = [wide, reference.datum(narrow, 1), narrow]
    if isinstance(wide.inputs, dict):
        wide.inputs["attention_mask"][:, 3:] = 1  # now the added columns count
    found = wg.estimate(wg.EKFAC(wg.Exact()), objective, batches)
    general = wg.Objective(lambda p, x: objective.forward(p, x), objective.loss)
    objective.model.eval()
    expected = wg.estimate(wg.Diagonal(), general, batches, objective.params())
    torch.testing.assert_close(found.trace(), expected.trace(), rtol=10.0**-case.digits, atol=1e-12)


class Loop(nn.Module):
    """A recurrent network written by hand; one step for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.state, self.head = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(len(x), 4)
        for column in x.unbind(1):
            h = torch.tanh(self.inside(column) + h @ self.state.weight.T)
        return self.head(h)


def test_a_loop_over_more_steps_in_a_later_batch():
    objective = wg.Objective(initialised(Loop()), wg.CrossEntropy())
    data = [wg.Batch(normal(4, t, 3, seed=t), integers(3, 4, seed=t)) for t in (3, 2, 5)]
    found = wg.estimate(wg.EKFAC(wg.Exact()), objective, data)
    dense = reference.dense_ggn(objective, data, objective.params())
    torch.testing.assert_close(found.trace(), dense.trace())
