"""Bases adapted to the symmetry: against a reference with dense matrices, under the group itself, and part by part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weingarten as wg
from tests.cases import generator, normal
from tests.symmetry.models import GPT, Attention, conv_net, tokens
from weingarten.optim import AdamWScale, Adapted, Natural, adapted
from weingarten.optim.eigenbases import EigenbasisMoment, Frame
from weingarten.optim.roots import due, factorise

LR, DECAY, B1, B2, EPS, STEPS = 0.02, 0.1, 0.9, 0.95, 1e-8, 30
HEADS = wg.Wreath(2, wg.Rotation())
WORDS = {"query": "h .", "out": ". h", "up": "u .", "down": ". u", "turn": "r t", "vector": "u"}
SHAPES = {"query": (6, 5), "out": (5, 6), "up": (7, 5), "down": (5, 7), "turn": (4, 7), "vector": (7,)}
BLOCKS = {  # turned pieces of rows and of columns
    "query": (2, 1),
    "out": (1, 2),
    "up": (0, 1),
    "down": (1, 0),
    "turn": (1, 0),
}
BOUND = 6  # seven hidden units keep their basis


def symmetry() -> wg.Symmetry:
    return wg.Symmetry.parse(
        WORDS, h=HEADS, u=wg.SignedPermutation(), t=wg.SignedPermutation(), r=wg.Rotation()
    )


def starts() -> dict[str, Tensor]:
    return {name: normal(*shape, seed=len(name)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    """Of very different sizes, row by row and over time."""
    found = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        rows = torch.linspace(0.1, 2, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
        found[name] = normal(*shape, seed=10 * step + i) * rows * 1.2 ** (step % 7)
    return found


def trained(start: dict[str, Tensor], steps, choice, **settings) -> dict[str, Tensor]:
    params = {name: torch.nn.Parameter(p.clone()) for name, p in start.items()}
    optimizer = wg.Symo(list(params.items()), LR, choice, weight_decay=DECAY, **settings)
    for given in steps:
        for name, p in params.items():
            p.grad = given[name].clone()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def eigenbasis(moment: Tensor, blocks: int, old: Tensor | None) -> Tensor:
    """Dense, of the blocks on the diagonal: eigh, largest first, then one orthogonal iteration."""
    pieces = []
    for i in range(blocks):
        size = len(moment) // blocks
        at = slice(i * size, (i + 1) * size)
        piece = moment[at, at]
        pieces.append(
            torch.linalg.eigh(piece)[1].flip(-1) if old is None else torch.linalg.qr(piece @ old[at, at])[0]
        )
    return torch.block_diag(*pieces)


def reference(name: str, refresh: int) -> Tensor:
    w, (rows, columns) = starts()[name], BLOCKS[name]
    m = v = torch.zeros_like(w)
    moments = [torch.zeros(n, n, dtype=w.dtype) for n in w.shape]
    bases: list[Tensor | None] = [
        None if blocks else torch.eye(n, dtype=w.dtype)
        for blocks, n in zip((rows, columns), w.shape, strict=True)
    ]
    for t in range(STEPS):
        g = gradients(t)[name]
        moments = [B2 * s + (1 - B2) * x for s, x in zip(moments, (g @ g.mT, g.mT @ g), strict=True)]
        m = B1 * m + (1 - B1) * g
        u = (B1 * m + (1 - B1) * g) / (1 - B1 ** (t + 2))
        if due(t + 1, refresh):
            for side, blocks in enumerate((rows, columns)):
                if not blocks:
                    continue
                old = bases[side]
                bases[side] = new = eigenbasis(moments[side], blocks, old)
                if old is not None:
                    overlap = (new.mT @ old) ** 2  # how much of each new direction each old one was
                    v = overlap @ v if side == 0 else v @ overlap.mT
        left, right = bases
        v = B2 * v + (1 - B2) * (left.mT @ g @ right) ** 2
        step = left @ ((left.mT @ u @ right) / ((v / (1 - B2 ** (t + 1))).sqrt() + EPS)) @ right.mT
        w = w - LR * (DECAY * w + step)
    return w


@pytest.mark.parametrize("refresh", [1, 5])
@pytest.mark.parametrize("scaling", [Natural(), AdamWScale()])  # it has AdamW's length by itself
def test_a_step_is_adams_in_the_eigenbases_of_free_axes_and_heads(refresh, scaling):
    found = trained(
        starts(), map(gradients, range(STEPS)), Adapted(symmetry(), BOUND), refresh=refresh, scaling=scaling
    )
    for name in BLOCKS:
        torch.testing.assert_close(found[name], reference(name, refresh), rtol=1e-8, atol=1e-8)


def test_steps_commute_with_the_group():
    """Parameters and gradients moved by heads' rotations, signed permutations and rotations give the moved trajectory."""
    start, element = starts(), symmetry().sample(starts(), generator(3))

    def moved(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return symmetry().act(element, values)

    steps = [gradients(t) for t in range(STEPS)]
    for bound in (3, BOUND):  # heads alone are turned; five free columns too
        settings = {"refresh": 5, "betas": (B1, B2), "scaling": Natural()}
        found = trained(moved(start), map(moved, steps), Adapted(symmetry(), bound), **settings)
        expected = moved(trained(start, steps, Adapted(symmetry(), bound), **settings))
        for name in SHAPES:
            if name != "turn" or bound == BOUND:  # a rotated axis that is too long
                torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-7)
    adam = moved(trained(start, steps, lambda name, p: None))
    other = trained(moved(start), map(moved, steps), lambda name, p: None)
    assert float((adam["turn"] - other["turn"]).abs().max()) > 0.05  # Adam's steps do not


def test_parts_of_a_leaf_are_leaves():
    """A projection that holds query, key and value is preconditioned as three."""
    words = {"q": "h .", "k": "h .", "v": "w ."}
    groups = {"h": HEADS, "w": wg.Wreath(2, wg.Rotation(), outer=None)}
    apart = Adapted(wg.Symmetry.parse(words, **groups))
    fused = Adapted(
        wg.Symmetry.parse({f"f[{6 * i}:{6 * i + 6}]": w for i, w in enumerate(words.values())}, **groups)
    )
    start = {name: normal(6, 5, seed=i) for i, name in enumerate(words)}
    steps = [{name: normal(6, 5, seed=9 * t + i) for i, name in enumerate(words)} for t in range(12)]

    def joined(values):
        return {"f": torch.cat(list(values.values()))}

    settings = {"refresh": 4, "scaling": Natural()}
    expected = joined(trained(start, steps, apart, **settings))
    found = trained(joined(start), map(joined, steps), fused, **settings)
    torch.testing.assert_close(found["f"], expected["f"])


def test_frames_of_whole_models():
    """Heads by the head, residual streams and windows whole, hidden units and channels not at all."""
    gpt = GPT(lambda d: Attention(d, 2, fused=None, bias=False), layers=1)
    lines = str(wg.Symo(gpt, example_inputs=tokens(2, 5))).splitlines()
    rows = {line.split()[2]: line.split("  ")[-1].strip() for line in lines if line.startswith("block")}
    width = gpt.wte.weight.shape[1]
    heads = f"2 x {width // 2}"
    assert rows == {
        "attn.0.q.weight": f"entry by entry in eigenbases of {heads} and {width}",
        "attn.0.k.weight": f"entry by entry in eigenbases of {heads} and {width}",
        "attn.0.v.weight": f"entry by entry in eigenbases of {heads} and {width}",
        "attn.0.proj.weight": f"entry by entry in eigenbases of {width} and {heads}",
        "mlp.0.0.weight": f"entry by entry in eigenbases of {width}",
        "mlp.0.2.weight": f"entry by entry in eigenbases of {width}",
    }
    network = conv_net()
    kernel = network.get_parameter("3.weight")
    assert kernel.shape == (6, 4, 3, 3)
    for bound, sizes in ((5, "4"), (9, "6 and 4 and 9")):
        chosen = adapted(network, torch.randn(2, 1, 8, 8), bound).moment("3.weight", kernel)
        assert str(chosen) == f"entry by entry in eigenbases of {sizes}"


def test_longer_axes_keep_their_basis():
    leaf = torch.zeros(6, 5)
    assert (
        str(Adapted(symmetry(), max_block=4).moment("query", leaf)) == "entry by entry in eigenbases of 2 x 3"
    )
    assert str(Adapted(symmetry(), max_block=2).moment("query", leaf)) == "entry by entry"


def test_a_carried_spectrum_keeps_its_sum_and_turns_where_the_basis_turns():
    leaf = torch.zeros(3, 2, dtype=torch.float64)
    moment = EigenbasisMoment("w", leaf, [Frame((3, 2), (0, 1))])
    state, quarter = moment.init(), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    state["basis.0.1"].copy_(torch.eye(2))
    state["gram.0.1"].copy_(torch.diag(torch.tensor([1.0, 4.0])))
    state["spectrum"] += torch.tensor([1.0, 4.0])
    moment.tasks(state)
    state["basis.0.1"].copy_(quarter)  # the axes change places
    moment.measure(state, {"w": torch.zeros_like(leaf)}, 1.0)
    torch.testing.assert_close(state["spectrum"], torch.tensor([4.0, 1.0], dtype=torch.float64).expand(3, 2))
    moment.tasks(state)
    state["basis.0.1"].copy_(torch.tensor([[0.5, 0.5], [0.5, -0.5]]) * 2**0.5)
    moment.measure(state, {"w": torch.zeros_like(leaf)}, 1.0)
    torch.testing.assert_close(state["spectrum"], torch.full_like(leaf, 2.5))
    assert "before" not in state
    assert factorise(moment.tasks(state), 0.0) == 0


def test_blocks_step_as_far_as_adamw():
    """On a small transformer in training the root mean square of a step is AdamW's, to a quarter."""
    lengths = []
    for adam in (False, True):
        torch.manual_seed(0)
        model = GPT(lambda d: Attention(d, 2, fused=None, bias=False), layers=1)
        x = tokens(8, 5)
        optimizer = (
            torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95))
            if adam
            else wg.Symo(model, 1e-3, example_inputs=x[:2])
        )
        weights = [
            p for name, p in model.named_parameters() if p.ndim == 2 and ("attn" in name or "mlp" in name)
        ]
        total = torch.zeros(len(weights), dtype=torch.float64)
        for step in range(40):
            rows = x[torch.randperm(8, generator=generator(step))[:4]]
            before = [p.detach().clone() for p in weights]
            optimizer.zero_grad()
            out = model(rows)
            torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
            optimizer.step()
            if step >= 10:
                total += torch.stack(
                    [(p.detach() - b).square().mean().sqrt() for p, b in zip(weights, before, strict=True)]
                ).double()
        lengths.append(total)
    ratio = lengths[0] / lengths[1]
    assert bool(((ratio > 0.75) & (ratio < 1.33)).all()), ratio


def test_ends_of_a_stream_go_to_adamw_and_weights_without_words_are_named():
    with pytest.raises(ValueError, match=r"no words for 'other', expected .* it speaks of \['w'\]"):
        wg.Symo(
            [("w", torch.zeros(3, 2)), ("other", torch.zeros(3, 2))],
            symmetry=Adapted(wg.Symmetry.parse({"w": "h ."}, h=wg.Signs())),
        )
    stream = wg.Symmetry.parse(
        {"table": ". s", "up": "h s", "down": "s h", "head": ". s"}, s=wg.Signs(), h=wg.Signs()
    )
    leaves = [(name, torch.zeros(3, 3)) for name in stream.leaves()]
    assert [r.leaves for r in wg.Symo(leaves, symmetry=Adapted(stream)).routes if r.adamw] == [
        ("table",),
        ("head",),
    ]
    free = wg.Symo([("w", torch.zeros(3, 2))], symmetry=Adapted(wg.Symmetry.parse({"w": ". ."})))
    assert [route.adamw for route in free.routes] == [True]
