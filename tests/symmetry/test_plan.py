"""Plans: what is kept and freed, the bounds, and predicted against counted cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import weingarten as wg
from tests.cases import generator
from weingarten.symmetry import Isotypic, Symmetry, plan
from weingarten.symmetry.describe import cost_of
from weingarten.symmetry.plan import _uncoupled


def zeros(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def mlp() -> tuple[Symmetry, dict[str, torch.Tensor]]:
    widths, spec, shapes = [6, 16, 12, 8, 3], {}, {}
    names = [".", "h1", "h2", "h3", "."]
    for i in range(4):
        spec |= {f"w{i}": f"{names[i + 1]} {names[i]}", f"b{i}": names[i + 1]}
        shapes |= {f"w{i}": (widths[i + 1], widths[i]), f"b{i}": (widths[i + 1],)}
    params = zeros(**shapes)
    groups = {name: wg.Permutation() for name in ("h1", "h2", "h3")}
    return Symmetry.parse(spec, params=params, **groups), params


def conv_net() -> tuple[Symmetry, dict[str, torch.Tensor]]:
    params = zeros(a=(6, 3, 3, 3), ab=(6,), b=(8, 6, 3, 3), bb=(8,), c=(5, 32), cb=(5,))
    spec = {"a": "h . . .", "ab": "h", "b": "k h . .", "bb": "k", "c": ". (k .)", "cb": "."}
    return Symmetry.parse(spec, params=params, h=wg.Permutation(), k=wg.SignedPermutation()), params


def gpt(
    layers: int = 2, d: int = 16, heads: int = 4, vocab: int = 40
) -> tuple[Symmetry, dict[str, torch.Tensor]]:
    spec, shapes, groups = {}, {}, {"res": wg.Rotation()}
    for i in range(layers):
        groups |= {f"qk{i}": wg.Wreath(heads, tie=f"t{i}"), f"vo{i}": wg.Wreath(heads, tie=f"t{i}")}
        groups |= {f"ff{i}": wg.Permutation()}
        words = {"q": f"qk{i} res", "k": f"qk{i} res", "v": f"vo{i} res", "o": f"res vo{i}"}
        words |= {"up": f"ff{i} res", "upb": f"ff{i}", "down": f"res ff{i}", "downb": "res", "gain": "res"}
        sizes = dict.fromkeys("qkvo", (d, d))
        sizes |= {"up": (4 * d, d), "upb": (4 * d,), "down": (d, 4 * d), "downb": (d,), "gain": (d,)}
        spec |= {f"{name}{i}": text for name, text in words.items()}
        shapes |= {f"{name}{i}": shape for name, shape in sizes.items()}
    params = zeros(**shapes, emb=(vocab, d), head=(vocab, d))
    return Symmetry.parse(spec | {"emb": ". res", "head": ". res"}, params=params, **groups), params


MODELS = {"mlp": mlp, "conv net": conv_net, "gpt": gpt}


@pytest.mark.parametrize("max_block", [64, 256])
@pytest.mark.parametrize("name", MODELS)
class TestPrediction:
    def counted(self, symmetry, params) -> tuple[int, int, int]:
        isotypic = Isotypic(symmetry, params)
        v = isotypic.space.randn(generator())
        with FlopCounterMode(display=False) as moment:
            curvature = wg.orbit_moment(symmetry, v)
        with FlopCounterMode(display=False) as product:
            curvature.apply(v)
        size = sum(block.numel() * block.element_size() for block in curvature.blocks.values())
        return moment.get_total_flops(), product.get_total_flops(), size

    def test_flops_and_bytes_are_right_within_a_fifth(self, name, max_block):
        symmetry, params = MODELS[name]()
        found = plan(symmetry, max_block)
        expected = (found.cost.gram_flops, found.cost.apply_flops, found.cost.bytes)
        assert self.counted(found.symmetry, params) == pytest.approx(expected, rel=0.2)
        whole = cost_of(Isotypic(symmetry, params).blocks)
        expected = (whole.gram_flops, whole.apply_flops, whole.bytes)
        assert self.counted(symmetry, params) == pytest.approx(expected, rel=0.2)

    def test_the_largest_block_keeps_the_bound(self, name, max_block):
        symmetry, params = MODELS[name]()
        found = plan(symmetry, max_block)
        widths = [block.shape[-1] for block in wg.orbit_moment(found.symmetry, params).blocks.values()]
        assert max(widths) == found.cost.largest <= max_block

    def test_a_bound_on_flops_is_kept(self, name, max_block):
        symmetry, params = MODELS[name]()
        least = plan(symmetry, max_block, max_cost=1e12).cost.gram_flops
        bound = (least + cost_of(Isotypic(symmetry.by_component(), params).blocks).gram_flops) / 2
        assert plan(symmetry, max_block, max_cost=max(bound, 1.5 * least)).cost.gram_flops <= max(
            bound, 1.5 * least
        )

    def test_says_all_it_did(self, name, max_block):
        symmetry, _ = MODELS[name]()
        found = plan(symmetry, max_block)
        decided = {d.subject: d for d in found.decisions if d.action in ("kept", "freed")}
        assert decided.keys() == set(symmetry.names())
        text = str(found)
        for decision in found.decisions:
            assert decision.reason
            assert f"{decision.action:9} {decision.subject}" in text
        left = {name for name in found.symmetry.names() if not name.startswith("signs:")}
        assert left == {name for name, d in decided.items() if d.action == "kept"}
        assert str(found.symmetry) in text


def actions(found) -> dict[str, str]:
    return {decision.subject: decision.action for decision in found.decisions}


@pytest.mark.parametrize(("layers", "d", "max_block"), [(2, 16, 64), (4, 128, 512), (4, 128, 1024)])
def test_gpt_keeps_heads_and_hidden_units_and_frees_the_residual_stream(layers, d, max_block):
    symmetry, params = gpt(layers, d, vocab=97)
    found = plan(symmetry, max_block)
    kept = {f"{name}{i}": "kept" for name in ("qk", "vo", "ff") for i in range(layers)}
    assert actions(found) == kept | {"res": "freed", "emb": "diagonal", "head": "diagonal"}
    widths = {names: b.multiplicity for (_, names), b in Isotypic(found.symmetry, params).blocks.items()}
    for i in range(layers):  # three blocks of 2 d per layer, one more column for the bias
        assert widths[(f"qk{i}", "vector"),] == widths[(f"vo{i}", "vector"),] == 2 * d
        assert widths[(f"ff{i}", "standard"),] == 2 * d + 1


def test_a_deep_mlp_keeps_every_second_hidden_layer():
    found = plan(mlp()[0], max_block=64)
    assert {name: a for name, a in actions(found).items() if name[0] == "h"} == {
        "h1": "kept",
        "h2": "freed",
        "h3": "kept",
    }
    widths = {names: b.multiplicity for (_, names), b in Isotypic(found.symmetry, mlp()[1]).blocks.items()}
    assert widths[("h1", "standard"),] == 6 + 1 + 12  # fan-in, bias, fan-out


def test_wide_leaves_are_made_diagonal_or_uncoupled_with_the_reason():
    params = zeros(emb=(50, 4), w=(4, 9), v=(9, 4), b=(4,))
    symmetry = Symmetry.parse(
        {"emb": ". h", "w": "h .", "v": ". h", "b": "h"}, params=params, h=wg.Permutation()
    )
    found = plan(symmetry, max_block=12)
    reasons = {d.subject: (d.action, d.reason) for d in found.decisions}
    assert reasons["emb"] == ("diagonal", "its free axes have more than 12 entries")
    uncoupled = [d for d in found.decisions if d.action == "uncoupled"]
    assert [d.subject for d in uncoupled] == ["w"]
    assert "more than 12 columns" in uncoupled[0].reason
    assert reasons["h"][0] == "kept"
    assert "signs:emb:0 = Signs()" in str(found)
    # the diagonal is a diagonal: its moment is that of sign flips
    v = {name: torch.randn(p.shape, generator=generator()) for name, p in params.items()}
    moment = wg.orbit_moment(found.symmetry, v)
    flips = Symmetry.parse({"emb": "s h"}, s=wg.Signs(), h=wg.Permutation())
    expected = wg.orbit_moment(flips, {"emb": v["emb"]}).diag()["emb"]
    torch.testing.assert_close(moment.diag()["emb"], expected)


def test_freeing_tied_heads_frees_what_moves_with_them():
    params = zeros(q=(4, 1), w=(4, 1))
    symmetry = Symmetry.parse(
        {"q": "a .", "w": "h ."}, params=params, a=wg.Wreath(4, wg.Signs(), tie="h"), h=wg.Permutation()
    )
    assert symmetry.drop("h").groups == {"a": wg.Wreath(4, wg.Signs(), None)}
    assert set(actions(plan(symmetry, 8))) >= {"a", "h"}


def test_names_between_free_axes_are_kept():
    params = zeros(w=(2, 12), v=(6,), b=(3,))
    groups = {"h": wg.Permutation(), "k": wg.Permutation()}
    found = plan(Symmetry.parse({"w": ". (k h .)", "v": "(k h)", "b": "h"}, params=params, **groups), 64)
    assert all(d.reason for d in found.decisions)
    assert found.cost.largest <= 64


def test_refused():
    symmetry, _ = mlp()
    with pytest.raises(ValueError, match="max_block is 0"):
        plan(symmetry, 0)
    with pytest.raises(ValueError, match=r"knows no shapes; call symmetry.bind"):
        plan(Symmetry.parse({"w": "h ."}, h=wg.Permutation()))
    with pytest.raises(
        ValueError, match=r"even with all names kept there is a moment of .* Mflop, more than 0[.]0"
    ):
        plan(symmetry, 64, max_cost=10)
    square = Symmetry.parse({"w": "h h"}, params=zeros(w=(5, 5)), h=wg.Permutation())
    with pytest.raises(ValueError, match=r"a block of 3 columns, more than 2"):
        plan(square, 2)


def uncoupled_one_by_one(symmetry, max_block):
    """As ``plan`` says it: all kinds anew after each part that gets a cluster of its own."""
    while True:
        blocks = Isotypic(symmetry, {k: torch.zeros(s) for k, s in symmetry.shapes.items()}).blocks.values()
        wide = [b for b in blocks if b.multiplicity > max_block and len(b.columns) > 1]
        if not wide:
            return symmetry
        columns = wide[0].columns
        widest = max(columns, key=lambda key: columns[key].stop - columns[key].start)
        parts = [replace(p, cluster=f"{p.key} alone") if p.key == widest else p for p in symmetry.parts]
        symmetry = replace(symmetry, parts=tuple(parts))


@pytest.mark.parametrize("freed", [(), ("res",), ("qk0", "ff0")])
@pytest.mark.parametrize("max_block", [16, 17, 24, 32, 33, 50, 100])
def test_parts_are_uncoupled_as_one_by_one(freed, max_block):
    symmetry = gpt()[0].drop(*freed) if freed else gpt()[0]
    current = symmetry.by_component()
    expected = uncoupled_one_by_one(current, max_block)
    assert [p.cluster for p in _uncoupled(current, max_block).parts] == [p.cluster for p in expected.parts]


def test_work_grows_with_the_layers_and_not_faster(monkeypatch):
    """Each layer adds names to try, and a trial looks at all kinds equally often, however many parts it uncouples."""
    calls, original = [], Symmetry.kinds
    monkeypatch.setattr(Symmetry, "kinds", lambda *args: calls.append(1) or original(*args))
    counts = []
    for layers in (2, 4, 8):
        symmetry = gpt(layers)[0]
        calls.clear()
        plan(symmetry, max_block=24)
        counts.append(len(calls))
    assert counts[2] - counts[1] == pytest.approx(2 * (counts[1] - counts[0]), rel=0.1)


def test_parts_that_overlap_in_a_corner_are_found():
    whole = {"w[0:3,0:4]": ". .", "w[3:5,0:4]": "h .", "w[0:5,4:6]": ". k"}
    params = zeros(w=(5, 6))
    groups = {"h": wg.Permutation(), "k": wg.Permutation()}
    assert len(Symmetry.parse(whole, params=params, **groups).parts) == 3
    overlapping = {**whole, "w[0:5,3:6]": ". k"}
    del overlapping["w[0:5,4:6]"]
    with pytest.raises(ValueError, match=r"cover entries of 'w' \[1, 2\] times"):
        Symmetry.parse(overlapping, params=params, **groups)
