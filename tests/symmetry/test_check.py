"""``check_symmetry`` accepts what is true and refuses what is not, with the leaf, the axis and the size of the change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.symmetry.models import GPT, Attention, conv_net, mlp, randn, scramble, tokens
from weingarten.groups import Permutation, Rotation, SignedPermutation, Wreath
from weingarten.losses import MSE
from weingarten.symmetry import Symmetry, SymmetryError, check_symmetry, infer_symmetry

DATA = [(randn(5, 3), randn(5, 2)), (randn(4, 3, seed=5), randn(4, 2))]
TRUE = {"0.weight": "h .", "0.bias": "h", "2.weight": "k h", "2.bias": "k", "4.weight": ". k", "4.bias": "."}
P = Permutation()


def check(spec, model=None, data=DATA, **groups):
    symmetry = Symmetry.parse(spec, **groups) if isinstance(spec, dict) else spec
    model = model or scramble(mlp(nn.ReLU()))
    return check_symmetry(symmetry, model, MSE(), data, 4, torch.Generator().manual_seed(0))


def refused(spec, model=None, **groups) -> SymmetryError:
    with pytest.raises(SymmetryError) as caught:
        check(spec, model, **groups)
    assert isinstance(caught.value, ValueError)
    assert caught.value.change > 1e-6
    assert repr(caught.value.name) in str(caught.value)
    assert f"axis {caught.value.axis}" in str(caught.value)
    assert f"{caught.value.change:.3g}" in str(caught.value)
    return caught.value


def test_true_declaration_passes_and_returns_the_change():
    assert check(TRUE, h=P, k=P) < 1e-12


def test_name_on_an_axis_that_is_free():
    error = refused(TRUE | {"4.bias": "o", "4.weight": ". k"}, h=P, k=P, o=P)
    assert (error.name, error.leaf, error.axis) == ("o", "4.bias", 0)
    assert "should not carry it" in str(error)


def test_name_on_the_wrong_axis():
    model = scramble(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)))
    spec = {"0.weight": "h h", "0.bias": "h", "2.weight": ". h", "2.bias": "."}
    with pytest.raises(SymmetryError, match=r"'0.weight', axis 1, should not carry it") as caught:
        check(spec, model, [(randn(6, 5), randn(6, 2))], h=P)
    assert (caught.value.leaf, caught.value.axis) == ("0.weight", 1)


@pytest.mark.parametrize(("leaf", "axis", "words"), [("0.bias", 0, "."), ("2.weight", 1, "k .")])
def test_forgotten_axis(leaf, axis, words):
    error = refused(TRUE | {leaf: words}, h=P, k=P)
    assert (error.name, error.leaf, error.axis) == ("h", leaf, axis)
    assert "should carry it too" in str(error)


def test_group_that_is_too_large():
    error = refused(TRUE, h=P, k=Rotation())
    assert error.name == "k"
    assert error.leaf in ("2.weight", "2.bias", "4.weight")
    assert "too large: Permutation() on the same axes leaves the loss unchanged" in str(error)
    error = refused(TRUE, scramble(mlp(nn.Tanh())), h=Rotation(), k=P)
    assert "too large: SignedPermutation() on the same axes" in str(error)
    assert check(TRUE, scramble(mlp(nn.Tanh())), h=SignedPermutation(), k=SignedPermutation()) < 1e-12


def test_two_layers_under_one_name():
    model = scramble(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)))
    assert check(TRUE, model, h=P, k=P) < 1e-12
    assert check({key: words.replace("k", "h") for key, words in TRUE.items()}, model, h=P) < 1e-12
    error = refused({**TRUE, "2.bias": "h"}, model, h=P, k=P)
    assert (error.leaf, error.name) == ("2.bias", "h")
    assert "should not carry it" in str(error)


def test_heads_that_do_not_move_together():
    model = scramble(GPT(lambda d: Attention(d, 2)))
    data = [(tokens(3, 5), randn(3, 5, 11))]
    symmetry = infer_symmetry(model, tokens(3, 5))
    assert check(symmetry, model, data) < 1e-12
    untied = {**symmetry.groups, "attn.0.qk": Wreath(2, Rotation())}
    wrong = Symmetry(symmetry.parts, untied, symmetry.sizes)
    with pytest.raises(SymmetryError, match=r"attn\.0"):
        check_symmetry(wrong, model, MSE(), data, 20, torch.Generator().manual_seed(0))


def test_batch_norm_needs_its_buffers():
    model = scramble(conv_net())
    data = [(randn(3, 1, 8, 8), randn(3, 3))]
    symmetry = infer_symmetry(model, data[0][0])
    assert check(symmetry, model, data) < 1e-12
    forgotten = Symmetry(symmetry.parts, symmetry.groups, symmetry.sizes)
    with pytest.raises(SymmetryError, match="changes the loss"):
        check(forgotten, model, data)


def test_buffers_can_be_declared():
    model = scramble(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))
    spec = {
        "0.weight": "c .",
        "0.bias": "c",
        "1.weight": "c",
        "1.bias": "c",
        "3.weight": ". c",
        "3.bias": ".",
    }
    symmetry = Symmetry.parse(spec, buffers={"1.running_mean": "c", "1.running_var": "c"}, c=P)
    assert check(symmetry, model) < 1e-12


def test_float32_has_its_own_tolerance():
    """Its layers are wide: sums of a few numbers may come out alike in any order."""
    wide = nn.Sequential(nn.Linear(3, 500), nn.ReLU(), nn.Linear(500, 600), nn.ReLU(), nn.Linear(600, 2))
    data = [(x.float(), y.float()) for x, y in DATA]
    assert 0 < check(TRUE, scramble(wide).float(), data, h=P, k=P) < 1e-5


def test_model_is_left_as_it_was():
    model = scramble(mlp(nn.ReLU())).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    check(TRUE, model, h=P, k=P)
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("data", [[], [(randn(4, 3), torch.full((4, 2), torch.nan, dtype=torch.float64))]])
def test_data_without_a_loss(data):
    with pytest.raises(
        ValueError, match=r"check_symmetry: the loss of the batches is .*, expected finite numbers"
    ):
        check(TRUE, data=data, h=P, k=P)


def test_output_picks_the_tensor():
    class Wrapped(nn.Sequential):
        def forward(self, x):
            return {"z": super().forward(x)}

    model = scramble(Wrapped(*mlp(nn.ReLU())))
    symmetry = Symmetry.parse(TRUE, h=P, k=P)
    assert check_symmetry(symmetry, model, MSE(), DATA, output=lambda out: out["z"]) < 1e-12
    with pytest.raises(TypeError, match=r"output=lambda out: out\['z'\]"):
        check_symmetry(symmetry, model, MSE(), DATA)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Symmetry: axis 1 of '4.weight' has size 6"):
        check(TRUE | {"4.weight": ". h", "2.weight": ". h", "2.bias": "."}, h=P)
