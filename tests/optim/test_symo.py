"""Symo's blocks against the enumerated group, its routes, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weingarten as wg
from tests.cases import normal
from tests.symmetry.models import GPT, Attention, Net, conv_net, recurrent, scramble, tokens
from weingarten.optim import Axes, Eigenbases, Natural, OneSide, architecture
from weingarten.reference_orbit import orbit_average
from weingarten.tree import Space

STEPS = 12


def mlp() -> nn.Module:
    return scramble(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))


def inverse_root(matrix: Tensor, damping: float) -> Tensor:
    spectrum, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag((spectrum + damping * spectrum.mean()) ** -0.5) @ vectors.mT


def fill_gradients(model: nn.Module, step: int) -> None:
    model.zero_grad()
    model(normal(4, 2, seed=step)).square().mean().backward()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("of_momentum", [True, False])
def test_step_is_the_inverse_root_of_the_enumerated_orbit_average(nesterov, of_momentum):
    """48 signed permutations of three hidden units, dense matrices; the bias of the output takes AdamW's step."""
    model, settings = mlp(), {"betas": (0.8, 0.9), "damping": 0.01, "weight_decay": 0.1}
    optimizer = wg.Symo(
        model, 0.02, architecture(model, torch.ones(2, 2, dtype=torch.float64)), refresh=1, scaling=Natural(),
        nesterov=nesterov, of_momentum=of_momentum, **settings,
    )  # fmt: skip
    symmetry = wg.Symmetry.parse(
        {"0.weight": "h .", "0.bias": "h", "2.weight": ". h"}, h=wg.SignedPermutation()
    )
    names = symmetry.leaves()
    space = Space.of({name: p.detach() for name, p in model.named_parameters() if name in names})
    average, m = (
        torch.zeros(space.size, space.size, dtype=torch.float64),
        torch.zeros(space.size, dtype=torch.float64),
    )
    for step in range(STEPS):
        fill_gradients(model, step)
        before = space.flatten({name: p.detach() for name, p in model.named_parameters()})
        g = space.flatten({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        m = 0.8 * m + 0.2 * g
        u = 0.8 * m + 0.2 * g if nesterov else m
        u = u / (1 - 0.8 ** (step + (2 if nesterov else 1)))
        moved = torch.outer(u, u) if of_momentum else torch.outer(g, g)
        average = 0.9 * average + 0.1 * orbit_average(moved, symmetry, dict(model.named_parameters()))
        expected = before - 0.02 * (0.1 * before + inverse_root(average / (1 - 0.9 ** (step + 1)), 0.01) @ u)
        optimizer.step()
        found = space.flatten({name: p.detach() for name, p in model.named_parameters()})
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def blocks(optimizer: wg.Symo) -> list[set[str]]:
    return [set(route.leaves) for route in optimizer.routes if not route.adamw]


def adamw(optimizer: wg.Symo) -> set[str]:
    return {name for route in optimizer.routes if route.adamw for name in route.leaves}


def coupled(model: nn.Module, example) -> wg.Symo:
    """The whole inverse root over the group that the default starts from."""
    return wg.Symo(model, symmetry=architecture(model, example))


def gpt(**kwargs) -> nn.Module:
    return GPT(lambda d: Attention(d, 2, fused=None, bias=False), layers=2, **kwargs)


def test_blocks_of_a_transformer_are_query_key_value_output_up_down():
    optimizer = coupled(gpt(), tokens(2, 5))
    expected = []
    for i in range(2):
        expected += [
            {f"attn.{i}.q.weight", f"attn.{i}.k.weight"},
            {f"attn.{i}.v.weight", f"attn.{i}.proj.weight"},
            {f"mlp.{i}.0.weight", f"mlp.{i}.0.bias", f"mlp.{i}.2.weight"},
        ]
    assert sorted(blocks(optimizer), key=sorted) == sorted(expected, key=sorted)
    norms = {f"norm.{i}.{kind}" for i in range(5) for kind in ("weight", "bias")}
    ends = {"mlp.0.2.bias", "mlp.1.2.bias", "wte.weight", "wpe.weight", "head.weight"}
    assert adamw(optimizer) == norms | ends


@pytest.mark.parametrize("tied", [False, True])
def test_a_wide_vocabulary_has_no_block_per_entry(tied):
    """The plan flips signs on an axis that is too wide and may free the other one: that would be a matrix for every token."""
    model = gpt(d=4, tied=tied)
    for optimizer, count in (
        (coupled(model, tokens(2, 5)), 6),
        (wg.Symo(model, example_inputs=tokens(2, 5)), 12),
    ):
        assert {"wte.weight", "wpe.weight"} <= adamw(optimizer)
        assert len(blocks(optimizer)) == count


def test_blocks_of_a_convolutional_network_are_channels():
    model = conv_net()
    optimizer = coupled(model, torch.randn(2, 1, 8, 8))
    every = [name for route in optimizer.routes for name in route.leaves]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())
    assert len(set(every)) == len(every)
    assert {"3.weight"} in blocks(optimizer)
    assert "9 x 24" in str(optimizer)  # one block over the window, for all pairs of channels
    assert adamw(optimizer) == {"8.bias"}


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (conv_net(), torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))),
        (gpt(), tokens(3, 5)),
        (gpt(tied=True), tokens(3, 5)),
        (recurrent(nn.GRU), torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))),
        (Net(lambda s, x: s.w * x, w=nn.Parameter(torch.ones(()))), torch.ones(2, 2)),
    ],
)
def test_loss_falls_on_every_architecture(model, example):
    model = model.float().train()
    optimizer = wg.Symo(model, lr=0.01, example_inputs=example, refresh=3)
    losses = []
    for _ in range(15):
        out = model(example)
        losses.append(
            out.logsumexp(-1).mean() - out[..., 0].mean() if out.shape[-1] > 2 else out.square().mean()
        )
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < 0.98 * float(losses[0].detach())
    assert optimizer.raised == optimizer.skipped == 0


def test_default_step_has_adamws_rms_in_blocks():
    """On the first step every entry of Adam's step is one."""
    model = mlp()
    optimizer = wg.Symo(model, 0.5, example_inputs=X, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fill_gradients(model, 0)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            float((p.detach() - before[name]).square().mean().sqrt()), 0.5, rtol=1e-5, atol=0
        )


def test_printing_shows_every_parameter_once():
    optimizer = coupled(mlp(), torch.ones(2, 2, dtype=torch.float64))
    lines = str(optimizer).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["block", "0"], ["block", "0"], ["block", "0"], ["AdamW", "2.bias"]
    ]  # fmt: skip
    assert re.search(r"0\.weight +3 x 2 +5 x 3$", lines[1])
    assert "entry by entry" in lines[-1]


def test_a_given_symmetry_is_coupled_by_component_or_as_it_says():
    words = {"0.weight": "h .", "0.bias": "h", "2.weight": ". h", "2.bias": "."}
    symmetry = wg.Symmetry.parse(words, h=wg.Permutation())
    assert blocks(wg.Symo(mlp(), symmetry=symmetry)) == [{"0.weight", "0.bias", "2.weight"}]
    assert len(blocks(wg.Symo(mlp(), symmetry=symmetry.uncoupled()))) == 3
    apart = wg.Symmetry.parse(
        {"0.weight": "h .", "0.bias": "h", "2.weight": "k .", "2.bias": "k"},
        h=wg.Permutation(),
        k=wg.Permutation(),
    )
    assert blocks(wg.Symo(mlp(), symmetry=apart)) == [{"0.weight", "0.bias"}, {"2.weight", "2.bias"}]


def test_parts_of_one_leaf_stay_together():
    """A fused projection lies in two components, and has one route."""
    model = GPT(lambda d: Attention(d, 2, fused="split", bias=False))
    optimizer = coupled(model, tokens(2, 5))
    assert {"attn.0.qkv.weight", "attn.0.proj.weight"} in blocks(optimizer)
    every = [name for route in optimizer.routes for name in route.leaves]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())


def test_a_function_chooses_by_name():
    def choose(name: str, p: Tensor):
        return OneSide() if name == "0.weight" else None

    optimizer = wg.Symo(mlp().named_parameters(), symmetry=choose)
    assert blocks(optimizer) == [{"0.weight"}]


def test_wide_weights_go_to_adamw():
    w = [("w", nn.Parameter(torch.zeros(5, 7)))]
    assert blocks(wg.Symo(w, symmetry=OneSide(max_block=4))) == []
    assert blocks(wg.Symo(w, symmetry=Eigenbases(max_block=4))) == []
    assert blocks(wg.Symo(w, symmetry=OneSide(max_block=5))) == [{"w"}]


def test_compiled_and_wrapped_models_have_the_same_routes():
    x = torch.ones(2, 2, dtype=torch.float64)
    model = mlp()
    assert str(wg.Symo(torch.compile(model, backend="eager"), example_inputs=x)) == str(
        wg.Symo(model, example_inputs=x)
    )


def test_architecture_leaves_the_model_and_keeps_blocks_below_the_bound():
    symmetry = architecture(gpt(), tokens(2, 5), max_block=17)
    assert (
        max(
            block.multiplicity
            for block in symmetry.restrict(["mlp.0.0.weight"])
            .kinds(dict(gpt().named_parameters()))
            .blocks.values()
        )
        <= 17
    )
    assert "Permutation()" not in {str(group) for group in symmetry.groups.values()}


TIED = gpt(tied=True)
X = torch.ones(2, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wg.Symo(mlp()), "pass a model and example_inputs"),
        (lambda: wg.Symo(mlp().named_parameters(), example_inputs=X), "pass a model and example_inputs"),
        (lambda: wg.Symo(mlp(), symmetry=OneSide(), max_block=3), "belong to an inferred symmetry"),
        (lambda: wg.Symo(mlp().parameters(), symmetry=OneSide()), "without a name"),
        (lambda: wg.Symo(mlp().requires_grad_(False), symmetry=OneSide()), "no parameter"),
        (lambda: wg.Symo(mlp(), lr=-1.0, symmetry=OneSide()), "lr is -1.0"),
        (lambda: wg.Symo(mlp(), betas=(0.9, 1.0), symmetry=OneSide()), "betas are"),
        (lambda: wg.Symo(mlp(), damping=-1.0, symmetry=OneSide()), "damping is -1.0"),
        (lambda: wg.Symo(mlp(), refresh=0, symmetry=OneSide()), "refresh is 0"),
        (lambda: wg.Symo(mlp(), example_inputs=X, max_block=0), "max_block is 0, expected >= 1"),
        (lambda: wg.Symo(mlp(), symmetry=lambda name, p: 3), "returned int"),
        (
            lambda: wg.Symo(mlp(), symmetry=wg.Symmetry.parse({"0.weight": "h .", "x": "h"}, h=wg.Permutation())),
            r"\['x'\].*leaves \['0.bias', '2.weight', '2.bias'\] without a route",
        ),
        (
            lambda: wg.Symo(
                mlp(),
                symmetry=wg.Symmetry.parse(
                    {"0.weight": "h .", "0.bias": "h", "2.weight": "h .", "2.bias": "."}, h=wg.Permutation()
                ),
            ),
            "2.weight",
        ),
        (lambda: wg.Symo(TIED, symmetry=OneSide()), r"'wte.weight' is tied to \['head.weight'\]"),
        (
            lambda: wg.Symo(TIED.named_parameters(remove_duplicate=False), symmetry=OneSide()),
            "'head.weight' is given twice, or is tied to 'wte.weight'",
        ),
        (
            lambda: wg.Symo(
                [{"params": [(n, p)], "betas": (0.5, i / 10)} for i, (n, p) in enumerate(mlp().named_parameters())],
                symmetry=wg.Symmetry.parse(
                    {"0.weight": "h .", "0.bias": "h", "2.weight": ". h", "2.bias": "."}, h=wg.Permutation()
                ),
            ),
            "share a block, but their groups have betas",
        ),
        (lambda: wg.Symo(mlp(), symmetry=OneSide()).add_param_group({"params": []}), "routes of the parameters are fixed"),
        (lambda: wg.Symo(mlp(), symmetry=Axes(wg.Wreath(2), None)), "Wreath"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unused_parameter_is_named():
    model = mlp()
    model.register_parameter("extra", nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)))
    optimizer = wg.Symo(model, symmetry=OneSide())
    fill_gradients(model, 0)
    with pytest.raises(ValueError, match=r"\['extra'\] have never had a gradient"):
        optimizer.step()


def test_a_gradient_that_is_missing_later_leaves_its_parameter():
    model = mlp()
    optimizer = wg.Symo(model, example_inputs=X)
    for step in range(2):
        fill_gradients(model, step)
        if step:
            model[0].bias.grad = None
            before = model[0].bias.detach().clone(), model[0].weight.detach().clone()
        optimizer.step()
    assert torch.equal(model[0].bias, before[0])
    assert not torch.equal(model[0].weight, before[1])


def test_sparse_gradients_are_refused():
    model = nn.Embedding(4, 3, sparse=True)
    optimizer = wg.Symo(model, symmetry=OneSide())
    functional.mse_loss(model(torch.tensor([1])), torch.zeros(1, 3)).backward()
    with pytest.raises(ValueError, match="'weight' is sparse"):
        optimizer.step()
