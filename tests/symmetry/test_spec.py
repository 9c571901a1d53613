"""The notation: what it accepts, what it refuses and how it says so, and the changes of a symmetry."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import weingarten as wg
from tests.cases import generator, normal
from weingarten.groups.action import matrix
from weingarten.reference_orbit import group_matrices, orbit_average
from weingarten.symmetry import Isotypic, Symmetry


def zeros(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


MLP = {"fc1.weight": "h .", "fc1.bias": "h", "fc2.weight": "k h", "fc2.bias": "k", "fc3.weight": ". k"}
SHAPES = {
    "fc1.weight": (4, 3),
    "fc1.bias": (4,),
    "fc2.weight": (5, 4),
    "fc2.bias": (5,),
    "fc3.weight": (2, 5),
}


def mlp() -> Symmetry:
    return Symmetry.parse(MLP, params=zeros(**SHAPES), h=wg.Permutation(), k=wg.SignedPermutation())


class TestWords:
    def test_names_and_leaves_in_order(self):
        symmetry = mlp()
        assert symmetry.names() == ["h", "k"]
        assert symmetry.leaves() == list(MLP)
        assert symmetry.kinds(zeros(**SHAPES)).sizes == {"h": 4, "k": 5}

    @pytest.mark.parametrize(
        ("words", "shape", "more", "lengths"),
        [
            ("(a b) .", (6, 5), {"b": "b"}, (2, 3, 5)),
            (". (. b)", (5, 6), {"b": "b"}, (5, 2, 3)),
            (". (b .)", (5, 12), {"b": "b"}, (5, 3, 4)),
            ("b[2] .", (3, 1, 5), {}, (3, 5)),
            (".[2] b", (2, 5, 3), {}, (10, 3)),
        ],
    )
    def test_split_and_merged_axes(self, words, shape, more, lengths):
        groups = {name: wg.Permutation() for name in ("a", "b") if name in words}
        params = zeros(w=shape) | {name: torch.zeros(3).double() for name in more}
        symmetry = Symmetry.parse({"w": words} | more, params=params, **groups)
        assert symmetry.kinds(params).arranged["w"].lengths == lengths

    def test_sizes_where_no_leaf_tells(self):
        params = zeros(w=(6, 5))
        spec = {"w": "(a b) ."}
        groups = {"a": wg.Permutation(), "b": wg.Rotation()}
        found = Symmetry.parse(spec, sizes={"a": 2}, **groups).kinds(params)
        assert found.sizes == {"a": 2, "b": 3}
        with pytest.raises(ValueError, match=r"axis 0 of 'w' has size 6, but '\(a b\)'.*pass sizes="):
            Symmetry.parse(spec, params=params, **groups)

    def test_a_slice_is_a_view_of_its_part(self):
        spec = {"w[0:2]": "h .", "w[2:6, 0:1]": ". .", "w[2:6,1:]": "g ."}
        params = {"w": normal(6, 3)}
        symmetry = Symmetry.parse(spec, params=params, h=wg.Signs(), g=wg.Permutation())
        assert [part.leaf for part in symmetry.parts] == ["w"] * 3
        torch.testing.assert_close(symmetry.parts[2].of(params), params["w"][2:6, 1:])
        isotypic = Isotypic(symmetry, params)
        torch.testing.assert_close(isotypic.scatter(isotypic.gather(params)), params)

    def test_split_axes_are_moved_as_products(self):
        params = {"w": normal(6, 2), "a": normal(2), "b": normal(3)}
        symmetry = Symmetry.parse(
            {"w": "(a b) .", "a": "a", "b": "b"}, params=params, a=wg.Permutation(), b=wg.Rotation()
        )
        elements = symmetry.sample(params, generator())
        left, right = (matrix(symmetry.groups[n], elements[n], len(params[n])) for n in "ab")
        moved = symmetry.act(elements, params)
        torch.testing.assert_close(moved["w"], torch.kron(left, right) @ params["w"])
        torch.testing.assert_close(moved["a"], left @ params["a"])

    def test_merged_axes_are_moved_as_one(self):
        params = {"w": normal(2, 3, 4), "b": normal(6)}
        symmetry = Symmetry.parse({"w": "h[2] .", "b": "h"}, params=params, h=wg.Rotation())
        elements = symmetry.sample(params, generator())
        a = matrix(wg.Rotation(), elements["h"], 6)
        expected = (a @ params["w"].reshape(6, 4)).reshape(2, 3, 4)
        torch.testing.assert_close(symmetry.act(elements, params)["w"], expected)


def refused(spec, shapes=None, sizes=None, **groups):
    Symmetry.parse(spec, sizes, None if shapes is None else zeros(**shapes), **groups)


P = wg.Permutation()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"axis 1 of 'b' has size 5, but 'h' has {'h': 4}",
            lambda: refused({"a": "h", "b": ". h"}, {"a": (4,), "b": (2, 5)}, h=P),
        ),
        (
            r"axis 0 of 'w' has size 7, but '\(h k\)' has {'h': 2, 'k': 3}",
            lambda: refused({"w": "(h k)"}, {"w": (7,)}, {"h": 2, "k": 3}, h=P, k=P),
        ),
        (
            r"axis 2 of 'w' has size 7, but '\(h \.\)' has {'h': 2}",
            lambda: refused({"w": ". . (h .)"}, {"w": (1, 1, 7)}, {"h": 2}, h=P),
        ),
        (r"'w' has 3 axes, shape \(2, 3, 4\), but 'h \.' covers 2", lambda: refused({"w": "h ."}, {"w": (2, 3, 4)}, h=P)),
        (r"leaf 'x' is not among the parameters \['w'\]", lambda: refused({"x": "h"}, {"w": (2,)}, h=P)),
        (r"'w' carries 'h' 3 times, in the words \['0: h', '1: h', '3: h'\]", lambda: refused({"w": "h h . h"}, h=P)),
        (r"'w' carries 'h' 3 times", lambda: refused({"w": "(h h) h"}, h=P)),
        (r"names without a group \['k'\], groups without a use \[\]", lambda: refused({"w": "h k"}, h=P)),
        (r"names without a group \[\], groups without a use \['k'\]", lambda: refused({"w": "h ."}, h=P, k=P)),
        (r"cannot read 'h \)' for 'w' at character 1", lambda: refused({"w": "h )"}, h=P)),
        (r"cannot read '\(h \(k\)\)' for 'w'", lambda: refused({"w": "(h (k))"}, h=P, k=P)),
        (r"empty parentheses in '\( \) \.' for 'w'", lambda: refused({"w": "( ) ."})),
        (r"'h\[0\]' in 'h\[0\]' for 'w' spans no axis", lambda: refused({"w": "h[0]"}, h=P)),
        (r"cannot read the slice '3' in 'w\[3\]'", lambda: refused({"w[3]": "h"}, h=P)),
        (r"cannot read the slice '0:4:2' in", lambda: refused({"w[0:4:2]": "h"}, h=P)),
        (r"cannot read the slice '-1:' in", lambda: refused({"w[-1:]": "h"}, h=P)),
        (
            r"parts \['w\[0:3\]', 'w\[2:5\]'\] cover entries of 'w' \[1, 2\] times",
            lambda: refused({"w[0:3]": "h", "w[2:5]": "h"}, {"w": (5,)}, h=P),
        ),
        (
            r"cover entries of 'w' \[0, 1\] times, expected once each",
            lambda: refused({"w[0:3]": "h"}, {"w": (5,)}, h=P),
        ),
        (r"cover entries of 'w' \[1, 2\] times", lambda: refused({"w": "h", "w[0:5]": "."}, {"w": (6,)}, h=P)),
        (r"'w\[0:1,0:1\]' has 2 slices, but 'w' has 1 axes", lambda: refused({"w[0:1,0:1]": "h"}, {"w": (5,)}, h=P)),
        (
            r"'h' on axis \[1, 2\] of 'w': .*length 3, expected at least 4",
            lambda: refused({"w": ". h h"}, {"w": (2, 3, 3)}, h=P),
        ),
        (
            r"'h' on axis \[0\] of 'w': Wreath: the axis has length 5, expected a multiple of heads=2",
            lambda: refused({"w": "h ."}, {"w": (5, 2)}, h=wg.Wreath(2)),
        ),
        (
            r"'h' on axis \[0, 1\] of 'w': .*no coordinates for two axes",
            lambda: refused({"w": "h h"}, {"w": (4, 4)}, h=wg.Wreath(2)),
        ),
        (
            r"'h' on axis \[0\] of 'w': Conjugated: the axis has length 4, expected the basis' 3",
            lambda: refused({"w": "h"}, {"w": (4,)}, h=wg.Conjugated(P, torch.eye(3))),
        ),
        (
            r"'w' carries 'h' and 'k', whose heads move together",
            lambda: refused({"w": "h k"}, {"w": (4, 4)}, h=wg.Wreath(2, tie="t"), k=wg.Wreath(2, tie="t")),
        ),
        (r"Symmetry.drop: no name \['x'\], expected some of \['h', 'k'\]", lambda: mlp().drop("x")),
        (r"Symmetry.restrict: no leaf \['x'\], expected some of", lambda: mlp().restrict(["fc1.bias", "x"])),
    ],
)  # fmt: skip
def test_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


class TestChanges:
    def test_drop_frees_axes_and_makes_the_group_smaller(self):
        params = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
        symmetry = mlp().drop("k")
        assert str(symmetry.parts[2].words[0]) == "."
        assert symmetry.names() == ["h"]
        assert symmetry.groups.keys() == {"h"}
        moved = symmetry.act(symmetry.sample(params, generator()), params)
        torch.testing.assert_close(moved["fc3.weight"], params["fc3.weight"])
        torch.testing.assert_close(moved["fc2.weight"].sum(1), params["fc2.weight"].sum(1))
        assert mlp().drop("h", "k").names() == []
        assert Isotypic(mlp().drop("h", "k"), params).blocks.keys() == {("", ())}

    @pytest.mark.parametrize("dropped", [["h"], ["k"], ["h", "k"]])
    def test_drop_inside_a_split_axis(self, dropped):
        """Sizes that were learned elsewhere stay known, and free neighbours become one."""
        params = zeros(w=(2, 12), v=(6,), b=(3,))
        spec = {"w": ". (k h .)", "v": "(k h)", "b": "h"}
        symmetry = Symmetry.parse(spec, params=params, h=P, k=P)
        found = symmetry.drop(*dropped)
        if dropped == ["k"]:  # free axes on both sides of h: nothing tells their sizes
            with pytest.raises(
                ValueError, match=r"'\(\. h \.\)' has {'h': 3}: 2 of its names have no known size"
            ):
                found.kinds(params)
        else:
            lengths = [arranged.lengths for arranged in found.kinds(params).arranged.values()]
            assert lengths == {"h": [(2, 2, 6), (2, 3), (3,)], "hk": [(2, 12), (6,), (3,)]}["".join(dropped)]

    def test_dropping_one_of_tied_heads_keeps_the_others_in_place(self):
        params = {"q": normal(4, 2), "v": normal(4, 2)}
        tied = Symmetry.parse(
            {"q": "a .", "v": "b ."}, params=params, a=wg.Wreath(2, tie="t"), b=wg.Wreath(2, tie="t")
        )
        assert tied.drop("a").groups["b"] == wg.Wreath(2, outer=None)

    def test_uncoupled_drops_cross_leaf_entries(self):
        params = {"a": normal(4, 2), "b": normal(4), "c": normal(3)}
        symmetry = Symmetry.parse({"a": "h .", "b": "h", "c": "."}, params=params, h=P)
        coupled = wg.orbit_moment(symmetry, params).dense()
        keep = torch.block_diag(
            *(torch.ones(p.numel(), p.numel(), dtype=torch.float64) for p in params.values())
        )
        torch.testing.assert_close(wg.orbit_moment(symmetry.uncoupled(), params).dense(), coupled * keep)

    def test_by_component_couples_what_shares_a_name(self):
        params = {"a": normal(4, 2), "b": normal(4), "c": normal(3), "d": normal(3)}
        symmetry = Symmetry.parse({"a": "h .", "b": "h", "c": "k", "d": "k"}, params=params, h=P, k=P)
        coupled = wg.orbit_moment(symmetry, params).dense()
        ones = [torch.ones(12, 12, dtype=torch.float64), torch.ones(6, 6, dtype=torch.float64)]
        found = wg.orbit_moment(symmetry.by_component(), params).dense()
        torch.testing.assert_close(found, coupled * torch.block_diag(*ones))
        assert len({part.cluster for part in symmetry.by_component().parts}) == 2

    def test_restrict_keeps_leaves_and_their_groups(self):
        symmetry = mlp().restrict(["fc1.weight", "fc1.bias"])
        assert symmetry.leaves() == ["fc1.weight", "fc1.bias"]
        assert list(symmetry.groups) == ["h"]
        assert symmetry.shapes.keys() == set(symmetry.leaves())
        other = zeros(**SHAPES) | zeros(more=(2,))
        assert list(Isotypic(symmetry, other).space.shapes) == ["fc1.weight", "fc1.bias"]

    def test_is_a_value(self):
        spec, sizes = dict(MLP), {"h": 4}
        symmetry = Symmetry.parse(spec, sizes, h=P, k=P)
        before = (symmetry.parts, dict(symmetry.groups), dict(symmetry.sizes), symmetry.shapes)
        spec.clear()
        sizes["h"] = 9
        (
            symmetry.drop("h"),
            symmetry.uncoupled(),
            symmetry.restrict(["fc1.bias"]),
            symmetry.bind(zeros(**SHAPES)),
        )
        assert (symmetry.parts, symmetry.groups, symmetry.sizes, symmetry.shapes) == before
        with pytest.raises(dataclasses.FrozenInstanceError):
            symmetry.parts = ()

    def test_acting_leaves_the_argument_and_other_leaves_alone(self):
        params = {"w": normal(4, 2), "other": normal(3)}
        copy = {name: p.clone() for name, p in params.items()}
        symmetry = Symmetry.parse({"w[0:3]": "h .", "w[3:4]": ". ."}, h=P)
        moved = symmetry.act(symmetry.sample(params, generator(1)), params)
        torch.testing.assert_close(params, copy, rtol=0, atol=0)
        torch.testing.assert_close(moved["other"], params["other"])
        assert not torch.equal(moved["w"], params["w"])


class TestPrinting:
    def test_without_shapes_words_and_groups(self):
        text = str(Symmetry.parse({"w": "(h k) .", "b[0:2]": "h"}, h=P, k=wg.Wreath(2)))
        assert text.splitlines()[0].split() == ["leaf", "words"]
        assert "w       (h k) ." in text
        assert "b[0:2]" in text
        assert "h = Permutation()" in text
        assert "k = Wreath(heads=2" in text
        assert "kinds" not in text

    def test_once_bound_shapes_kinds_block_sizes_and_cost(self):
        """By hand: h leaves a mean and a standard kind, k one of dimension 5; m counts free axes."""
        text = str(mlp())
        first, last = text.splitlines()[1], text.splitlines()[-1]
        assert "4 x 3" in first
        assert "trivial 4 x 1, h:standard 4 x 3" in first
        assert "k:vector 4 x 5, h:standard.k:vector 1 x 15" in text.replace(
            "h:standard.k:vector 1 x 15, ", ""
        )
        # trivial 4, standard 4, k 1 + 1 + 2, product 1
        flops = 2 * (1 * 16 + 4 * 16 + 5 * 16 + 20 * 1)
        assert f"4 kinds, largest block 4, blocks {4 * (16 + 16 + 16 + 1) / 1e6:.2f} MB" in last
        assert f"moment {flops / 1e6:.1f} Mflop" in last


def test_tied_wreaths_share_their_outer_element():
    groups = {"a": wg.Wreath(3, tie="t"), "b": wg.Wreath(3, wg.Signs(), tie="t"), "c": wg.Wreath(3)}
    params = zeros(a=(6,), b=(3,), c=(6,))
    symmetry = Symmetry.parse({"a": "a", "b": "b", "c": "c"}, params=params, **groups)
    g, differ = generator(), 0
    for _ in range(20):
        elements = symmetry.sample(params, g)
        assert torch.equal(elements["a"][0], elements["b"][0])
        differ += not torch.equal(elements["a"][0], elements["c"][0])
    assert differ > 5


def test_ties_do_not_change_the_average():
    params = {"a": normal(2, 2), "b": normal(2)}
    m = normal(6, 6)
    tied = {name: wg.Wreath(2, wg.Signs(), tie="t") for name in ("a", "b")}
    free = {name: wg.Wreath(2, wg.Signs()) for name in ("a", "b")}
    found = [Symmetry.parse({"a": "a .", "b": "b"}, params=params, **groups) for groups in (tied, free)]
    assert [sum(1 for _ in group_matrices(s, params)) for s in found] == [32, 64]
    first, second = (orbit_average(m, s, params) for s in found)
    torch.testing.assert_close(first, second)
    flat = torch.cat([params["a"].flatten(), params["b"]])
    expected = orbit_average(torch.outer(flat, flat), found[0], params)
    torch.testing.assert_close(wg.orbit_moment(found[0], params).dense(), expected)
