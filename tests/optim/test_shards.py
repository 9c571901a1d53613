"""Routes over ranks: every one once, near the best assignment, and the same parameters as without ranks."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

import weingarten as wg
from tests.symmetry.models import GPT, Attention, scramble, tokens
from weingarten.optim.cost import adamw_cost, muon_cost, route_costs, total
from weingarten.optim.shards import imbalance, merged, replicated_bytes, sharded_bytes, shards

RANKS = 3


@pytest.mark.parametrize("ranks", [1, 2, 3, 20])
def test_every_route_is_on_one_rank(ranks):
    costs = [muon_cost((n, 2 * n)) for n in (9, 8, 8, 3, 3, 2, 1)] + [adamw_cost((5, 5))] * 4
    found = shards(costs, ranks)
    assert len(found) == ranks
    assert sorted(i for shard in found for i in shard.routes) == list(range(len(costs)))
    assert total([shard.cost for shard in found]).state == total(costs).state
    for shard in found:
        assert shard.cost.flops == total([costs[i] for i in shard.routes]).flops


@pytest.mark.parametrize("seed", range(5))
def test_the_busiest_rank_is_within_a_third_of_the_best(seed):
    sizes = torch.randint(2, 30, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
    costs = [muon_cost((n, 30)) for n in sizes]
    flops = [cost.flops for cost in costs]
    best = min(
        max(sum(f for f, r in zip(flops, ranks, strict=True) if r == rank) for rank in range(RANKS))
        for ranks in product(range(RANKS), repeat=len(costs))
    )
    busiest = max(shard.cost.flops for shard in shards(costs, RANKS))
    assert best <= busiest <= (4 / 3 - 1 / (3 * RANKS)) * best * (1 + 1e-12)


def test_equal_flops_go_where_less_is_kept():
    found = shards([adamw_cost((8,))] * 6, 3)
    assert [len(shard.routes) for shard in found] == [2, 2, 2]
    assert imbalance(shard.cost.state for shard in found) == 1


def test_ranks_give_the_parameters_of_one_process():
    """On one process: each rank's Symo steps its own routes on the same gradients, then all take what each has stepped."""
    whole, inputs = scramble(GPT(lambda d: Attention(d, 2))), tokens(2, 5)
    models = [copy.deepcopy(whole) for _ in range(RANKS)]
    make = lambda model: wg.Symo(model, lr=0.05, example_inputs=inputs, refresh=2)  # noqa: E731
    reference, optimizers = make(whole), [make(model) for model in models]
    routes = reference.routes
    parts = shards(route_costs(reference), RANKS)
    assert all(part.routes for part in parts)
    for part, optimizer in zip(parts, optimizers, strict=True):
        optimizer.routes = part.of(optimizer.routes)
    start = {name: p.detach().clone() for name, p in whole.named_parameters()}
    for _ in range(5):
        for model, optimizer in zip([whole, *models], [reference, *optimizers], strict=True):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        gathered = merged(parts, routes, [dict(model.named_parameters()) for model in models])
        assert gathered.keys() == start.keys()
        gathered = {name: p.detach().clone() for name, p in gathered.items()}
        for model in models:
            model.load_state_dict(gathered, strict=False)
    for name, p in whole.named_parameters():
        torch.testing.assert_close(gathered[name], p, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(p, start[name])
    kept = [sum("momentum" in state for state in optimizer.state.values()) for optimizer in optimizers]
    assert sum(kept) == len(start)  # no state twice


def test_bytes_sent():
    assert replicated_bytes(100, 1) == sharded_bytes(100, 1) == 0
    # four ranks with a quarter of a block of 8 bytes each: the owner gets 6 bytes of gradients, the others 2 each of the step
    assert 4 * sharded_bytes(8, 4) == 6 + 3 * 2


def test_imbalance():
    assert imbalance([2, 2]) == imbalance([0, 0]) == 1
    assert imbalance([4, 0]) == 2


def test_refused():
    with pytest.raises(ValueError, match="ranks is 0, expected >= 1"):
        shards([], 0)
