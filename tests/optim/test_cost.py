"""Costs on paper against flops counted in real steps, real states, and the formulas of the known optimisers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import weingarten as wg
from tests.cases import normal
from tests.symmetry.models import GPT, Attention, Net, conv_net, scramble, tokens
from weingarten.optim import BothSides, Eigenbases, Natural, OneSide
from weingarten.optim.cost import (
    EIGH,
    PRODUCTS,
    QR,
    StepCost,
    adamw_cost,
    moment_cost,
    muon_cost,
    route_costs,
    soap_cost,
    total,
)
from weingarten.optim.eigenbases import EigenbasisMoment, Frame
from weingarten.optim.moment import EntryMoment, OrbitMoment, TwoSidedMoment, one_sided
from weingarten.optim.roots import factorise
from weingarten.symmetry.describe import cost_of

A, B = 12, 7


def heads_moment(device):
    leaves = {"q": torch.zeros(8, 5), "k": torch.zeros(8, 5), "b": torch.zeros(8), "u": torch.zeros(3, 8)}
    leaves = {name: p.to(device) for name, p in leaves.items()}
    symmetry = wg.Symmetry.parse(
        {"q": "h .", "k": "h .", "b": "h", "u": "f h"},
        h=wg.Wreath(2, wg.Rotation()),
        f=wg.SignedPermutation(),
    )
    return OrbitMoment(symmetry, leaves), leaves


def moments(device="cpu"):
    leaf = {"w": torch.zeros(A, B, device=device)}
    return {
        "entry": (EntryMoment(leaf), leaf),
        "one side": (one_sided("w", leaf["w"], 0), leaf),
        "both sides": (TwoSidedMoment("w", leaf["w"]), leaf),
        "eigenbases": (Eigenbases().moment("w", leaf["w"]), leaf),
        "one eigenbasis": (Eigenbases(10).moment("w", leaf["w"]), leaf),
        "carried": (EigenbasisMoment("w", leaf["w"], [Frame((A, B), (3, 1))]), leaf),
        "heads": heads_moment(device),
    }


@pytest.mark.parametrize("case", moments())
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_predicted_flops_and_bytes_are_those_of_a_real_step(case, device):
    moment, leaves = moments()[case]
    cost = moment_cost(*moments(device)[case])
    gradients = {name: normal(*p.shape).float() for name, p in leaves.items()}
    state = moment.init()
    with FlopCounterMode(display=False) as before:
        moment.accumulate(state, gradients, 0.9)
    factorise(moment.tasks(state), 1e-3)
    with FlopCounterMode(display=False) as refreshed:
        moment.measure(state, gradients, 0.9)
    with FlopCounterMode(display=False) as measured:
        moment.measure(state, gradients, 0.9)
    carried = refreshed.get_total_flops() - measured.get_total_flops()
    assert (carried > 0) == (case == "carried")
    assert cost.factorise >= carried
    with FlopCounterMode(display=False) as after:
        moment.precondition(state, gradients, 1e-8)
    assert cost.accumulate == before.get_total_flops() + measured.get_total_flops()
    assert cost.precondition == after.get_total_flops()
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert cost.state == sum(value.numel() * value.element_size() for value in tensors)


def test_closed_forms():
    found = {case: moment_cost(*pair) for case, pair in moments().items()}
    gram, products = 2 * A * B * B, 2 * A * B * (A + B)
    assert (found["entry"].accumulate, found["entry"].precondition, found["entry"].factorise) == (0, 0, 0)
    assert (found["one side"].accumulate, found["one side"].precondition) == (gram, gram)
    assert found["one side"].factorise == EIGH * B**3
    assert (found["both sides"].accumulate, found["both sides"].precondition) == (products, products)
    assert found["both sides"].factorise == EIGH * (A**3 + B**3)
    assert (found["eigenbases"].accumulate, found["eigenbases"].precondition) == (2 * products, 2 * products)
    assert found["eigenbases"].factorise == pytest.approx(QR * (A**3 + B**3))
    moment, _ = moments()["heads"]
    blocks = moment.isotypic.blocks
    wide = {key: block for key, block in blocks.items() if block.multiplicity > 1}
    assert len(wide) < len(blocks)
    assert found["heads"].accumulate == cost_of(blocks).gram_flops
    assert found["heads"].precondition == cost_of(wide).apply_flops
    assert found["heads"].largest == max(block.multiplicity for block in blocks.values()) == 11


def test_large_roots_go_through_products_on_a_gpu():
    leaf = {"w": torch.zeros(600, 512, device="meta")}
    for moment, factor in (
        (one_sided("w", leaf["w"], 0), PRODUCTS),
        (one_sided("w", leaf["w"], 0, -0.25), EIGH),
    ):
        assert moment_cost(moment, leaf, gpu=True).factorise == factor * 512**3
        assert moment_cost(moment, leaf).factorise == EIGH * 512**3


def made(case):
    model, inputs = {
        "gpt": lambda: (GPT(lambda d: Attention(d, 2)), tokens(2, 5)),
        "conv net": lambda: (conv_net(), normal(2, 1, 8, 8)),
    }[case]()
    return scramble(model), inputs


@pytest.mark.parametrize("case", ["gpt", "conv net"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scaling": Natural()},
        {"symmetry": OneSide()},
        {"symmetry": BothSides()},
        {"symmetry": Eigenbases()},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_is_what_an_optimizer_really_keeps(case, settings, dtype):
    model, inputs = made(case)
    model = model.to(dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    example = {} if "symmetry" in settings else {"example_inputs": inputs}
    optimizer = wg.Symo(model, **settings, **example)
    predicted = total(route_costs(optimizer))
    assert not optimizer.state
    model(inputs).square().mean().backward()
    optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert predicted.state == sum(v.numel() * v.element_size() for v in kept)
    assert predicted.entries == sum(p.numel() for p in model.parameters())
    assert predicted == total(route_costs(optimizer))


def test_products_of_a_whole_step_are_counted_right():
    model, inputs = made("gpt")
    optimizer = wg.Symo(model.float(), example_inputs=inputs, refresh=4)
    predicted = total(route_costs(optimizer))
    for _ in range(3):  # the third does not factorise
        model(inputs).square().mean().backward()
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    assert predicted.products == counter.get_total_flops() > 0


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_muon_is_that_of_pytorch(shape):
    weight = nn.Parameter(torch.ones(shape))
    weight.grad = normal(*shape).float()
    optimizer = torch.optim.Muon([weight])
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    cost = muon_cost(shape)
    assert cost.products == counter.get_total_flops()
    (state,) = optimizer.state.values()
    assert cost.state == sum(v.numel() * v.element_size() for v in state.values())


def test_adamw_keeps_what_pytorch_keeps():
    weight = nn.Parameter(torch.ones(6, 10))
    weight.grad = torch.ones(6, 10)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    (state,) = optimizer.state.values()
    assert adamw_cost((6, 10)).state == sum(v.numel() * 4 for k, v in state.items() if k != "step")


@pytest.mark.parametrize(("shape", "limit"), [((A, B), 100), ((A, B), 10), ((A, 7, 1), 100), ((9,), 100)])
def test_soap_is_the_moment_in_eigenbases(shape, limit):
    leaf = {"w": torch.zeros(shape)}
    moment = Eigenbases(limit).moment("w", leaf["w"]) if len(shape) > 1 else EntryMoment(leaf)
    mine, cost = moment_cost(moment, leaf), soap_cost(shape, limit, refresh=5)
    assert cost.products == mine.accumulate + mine.precondition
    assert cost.factorise == pytest.approx(mine.factorise / 5)
    assert cost.state == mine.state + 4 * leaf["w"].numel()


def test_sums():
    a, b = muon_cost((3, 4)), StepCost(1.0, 2.0, 3.0, 4, 5, 6)
    assert (a + b).flops == a.flops + 6
    assert (a + b).largest == 6
    assert total([]).flops == 0
    assert b.traffic == 2 * 4 + 12 * 5


def test_routes_that_look_the_same_have_the_same_cost():
    layers = [nn.Linear(6, 6, bias=False, device="meta") for _ in range(3)]
    optimizer = wg.Symo(Net(lambda s, x: x, layers=nn.ModuleList(layers)), symmetry=OneSide())
    costs = route_costs(optimizer)
    assert len(costs) == 3
    assert costs[0] is costs[1] is costs[2]
