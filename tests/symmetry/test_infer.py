"""``infer_symmetry`` finds the expected groups, and they leave the loss unchanged."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tests.symmetry.models import (
    GPT,
    RMS,
    Attention,
    Net,
    Residual,
    SwiGLU,
    autoencoder,
    conv_net,
    encoder,
    mlp,
    randn,
    recurrent,
    scramble,
    tokens,
)
from weingarten.groups import Permutation, Rotation, SignedPermutation, Wreath
from weingarten.losses import MSE
from weingarten.symmetry import Isotypic, Symmetry, check_symmetry, explain_symmetry, infer_symmetry, plan
from weingarten.symmetry.trace import export, operator_name

P, S, R = Permutation(), SignedPermutation(), Rotation()


def check(symmetry: Symmetry, model: nn.Module, x, tol=1e-10) -> float:
    with torch.no_grad():
        output = model(**x) if isinstance(x, dict) else model(x)
    targets = randn(*output.shape, seed=2) * output.abs().mean()
    generator = torch.Generator().manual_seed(3)
    return check_symmetry(symmetry, model, MSE(), [(x, targets)], trials=3, generator=generator, tol=tol)


def words(symmetry: Symmetry) -> dict[str, str]:
    return {part.key: " ".join(map(str, part.words)) for part in symmetry.parts}


def infer(model: nn.Module, x, tol=1e-10) -> Symmetry:
    """The symmetry, checked: by the loss, complete, with coordinates for every part, and nothing unknown."""
    found = explain_symmetry(scramble(model), x)
    assert found.unknown == ()
    symmetry = found.symmetry
    assert check(symmetry, model, x, tol) < tol
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert symmetry.leaves() == list(params)
    v = {name: randn(*p.shape) for name, p in params.items()}
    isotypic = Isotypic(symmetry, v)
    again = isotypic.scatter(isotypic.gather(v))
    assert all(torch.allclose(again[name], v[name]) for name in v)
    return symmetry


def heads(inner=R, number=2, tie=None):
    return Wreath(number, inner, P, tie)


@pytest.mark.parametrize(
    ("activation", "group"),
    [
        (nn.ReLU(), P),
        (nn.GELU(), P),
        (nn.Softplus(), P),
        (nn.Tanh(), S),
        (nn.Identity(), R),
        (nn.Dropout(), R),
    ],
)
def test_mlp(activation, group):
    symmetry = infer(mlp(activation), randn(4, 3))
    assert symmetry.groups == {"0": group, "2": group}
    assert words(symmetry) == {
        "0.weight": "0 .",
        "0.bias": "0",
        "2.weight": "2 0",
        "2.bias": "2",
        "4.weight": ". 2",
        "4.bias": ".",
    }


def test_autoencoder():
    symmetry = infer(autoencoder(), randn(4, 6))
    assert symmetry.groups == {"0": S, "2": R, "4": S} or symmetry.groups == {"0": S, "2": R, "3": S}
    assert words(symmetry)["3.weight"] == "3 2"


def test_tied_autoencoder_carries_one_name_on_both_uses():
    model = Net(lambda s, x: torch.tanh(x @ s.w) @ s.w.T, w=nn.Parameter(torch.ones(6, 5)))
    symmetry = infer(model, randn(4, 6))
    assert words(symmetry) == {"w": ". w"}
    assert symmetry.groups == {"w": S}


def test_conv_net_with_batch_norm_moves_running_statistics():
    model = conv_net()
    symmetry = infer(model, randn(3, 1, 8, 8))
    assert symmetry.groups == {"0": P, "3": P}
    found = words(symmetry)
    assert found["3.weight"] == "3 0 . ."
    assert found["8.weight"] == ". (3 .)"
    assert [part.key for part in symmetry.buffers] == [
        f"{i}.running_{s}" for i in (1, 4) for s in ("mean", "var")
    ]
    assert symmetry.drop("0").buffers[0].words[0].atoms == (".",)


def test_residual_network_with_batch_norm():
    symmetry = infer(Residual(nn.BatchNorm2d), randn(3, 1, 6, 6))
    assert symmetry.groups == {"stem": P, "conv1": P}
    assert words(symmetry)["conv2.weight"] == "stem conv1 . ."
    assert words(symmetry)["norm2.weight"] == "stem"


def test_residual_network_with_group_norm_permutes_within_and_among_groups():
    symmetry = infer(Residual(lambda n: nn.GroupNorm(2, n)), randn(3, 1, 6, 6))
    assert symmetry.groups == {"stem": heads(P), "conv1": heads(P)}
    assert infer(Residual(lambda n: nn.GroupNorm(1, n)), randn(3, 1, 6, 6)).groups == {"stem": P, "conv1": P}
    assert infer(Residual(lambda n: nn.GroupNorm(n, n)), randn(3, 1, 6, 6)).groups == {"stem": P, "conv1": P}


def test_depthwise_and_grouped_convolutions():
    model = nn.Sequential(
        nn.Conv1d(2, 6, 3),
        nn.Tanh(),
        nn.Conv1d(6, 6, 3, groups=6),
        nn.ReLU(),
        nn.Conv1d(6, 8, 1, groups=2),
        nn.Flatten(),
    )
    symmetry = infer(nn.Sequential(*model, nn.ReLU(), nn.Linear(32, 2)), randn(3, 2, 8))
    found = words(symmetry)
    assert found["2.weight"] == found["0.weight"].replace(". .", "").strip() + " . ."
    assert set(symmetry.groups.values()) == {P}
    assert "0" in symmetry.groups


def test_transposed_convolution():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 1, 1)
    )
    assert infer(model, randn(2, 1, 5, 5)).groups == {"0": P, "2": P}


@pytest.mark.parametrize(
    ("model", "group", "row"),
    [
        (recurrent(nn.RNN), S, "cell"),
        (recurrent(nn.RNN, nonlinearity="relu"), P, "cell"),
        (recurrent(nn.GRU), P, "(. cell)"),
        (recurrent(nn.LSTM), P, "(. cell)"),
    ],
)
def test_recurrent_layers(model, group, row):
    symmetry = infer(model, randn(3, 4, 3))
    assert symmetry.groups == {"cell": group}
    assert words(symmetry)["cell.weight_hh_l0"] == f"{row} cell"
    assert words(symmetry)["cell.bias_ih_l0"] == row


def test_deep_bidirectional_recurrent_layers():
    symmetry = infer(recurrent(nn.LSTM, num_layers=2, bidirectional=True), randn(3, 4, 3))
    assert len(symmetry.groups) == 4
    assert words(symmetry)["cell.weight_ih_l1[0:20, 5:10]"] == "(. cell.3) cell.2"


@pytest.mark.parametrize(("output", "known"), [(0, True), (1, False)])
def test_shapes_that_pytorch_misstates_matter_where_they_are_used(monkeypatch, output, known):
    """PyTorch 2.11 gives the states of ``lstm`` a dimension too many."""

    def misstated(model, example_inputs):
        program = export(model, example_inputs)
        (node,) = (n for n in program.graph.nodes if n.op == "call_function" and operator_name(n) == "lstm")
        first, *states = node.meta["val"]
        node.meta["val"] = (first, *(state[None] for state in states))
        return program

    monkeypatch.setattr("weingarten.symmetry.infer.export", misstated)
    model = Net(
        lambda s, x: s.o(s.r(x)[0] if output == 0 else s.r(x)[1][0][0]), r=nn.LSTM(3, 5), o=nn.Linear(5, 2)
    )
    found = explain_symmetry(scramble(model), randn(3, 4, 3))
    assert found.symmetry.groups == ({"r": P} if known else {})
    assert ("lstm in r" in found.unknown) == (not known)


def test_last_hidden_state_of_deep_recurrent_layers():
    model = Net(lambda s, x: s.o(s.r(x)[1][-1]), r=nn.GRU(3, 5, 2, batch_first=True), o=nn.Linear(5, 2))
    symmetry = infer(model, randn(3, 4, 3))
    assert symmetry.groups == {"r": P, "r.2": P}
    assert words(symmetry)["o.weight"] == ". r.2"


def test_projected_lstm():
    assert infer(
        Net(lambda s, x: s.o(s.r(x)[0]), r=nn.LSTM(3, 5, proj_size=4), o=nn.Linear(4, 2)), randn(3, 4, 3)
    ).groups == {
        "r": P,
        "r.2": R,
    }


def test_recurrent_cell_by_hand():
    def forward(s, x):
        h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(s.i(x[:, t]) + s.h(h))
        return s.o(h)

    model = Net(forward, i=nn.Linear(3, 5), h=nn.Linear(5, 5), o=nn.Linear(5, 2))
    symmetry = infer(model, randn(3, 4, 3))
    assert words(symmetry)["h.weight"] == "i i"
    assert symmetry.groups == {"i": S}


@pytest.mark.parametrize("fused", ["split", "stack", ""])
@pytest.mark.parametrize("sdpa", [True, False])
def test_gpt(fused, sdpa):
    symmetry = infer(GPT(lambda d: Attention(d, 2, fused=fused, sdpa=sdpa), layers=2), tokens(3, 5))
    expected = {"wte": P}
    for i in range(2):
        tie = f"attn.{i}.heads"
        expected |= {f"attn.{i}.qk": heads(tie=tie), f"attn.{i}.vo": heads(tie=tie), f"mlp.{i}.0": P}
    assert symmetry.groups == expected
    found = words(symmetry)
    query = "attn.1.qkv.weight[0:8, 0:8]" if fused else "attn.1.q.weight"
    value = "attn.1.qkv.weight[16:24, 0:8]" if fused else "attn.1.v.weight"
    assert (found[query], found[value]) == ("attn.1.qk wte", "attn.1.vo wte")
    assert found["attn.1.proj.weight"] == "wte attn.1.vo"


@pytest.mark.parametrize("sdpa", [True, False])
def test_grouped_queries_and_swiglu(sdpa):
    symmetry = infer(
        GPT(lambda d: Attention(d, 4, groups=2, fused="", sdpa=sdpa), lambda d: SwiGLU(d, 12), nn.RMSNorm),
        tokens(3, 5),
    )
    assert symmetry.groups == {
        "wte": P,
        "attn.0.heads": P,
        "attn.0.heads.2": P,
        "attn.0.qk": R,
        "attn.0.vo": R,
        "mlp.0.gate": P,
    }
    found = words(symmetry)
    assert found["attn.0.q.weight"] == "(attn.0.heads attn.0.heads.2 attn.0.qk) wte"
    assert found["attn.0.k.weight"] == "(attn.0.heads attn.0.qk) wte"
    assert found["mlp.0.up.weight"] == "mlp.0.gate wte"


def test_one_group_of_keys():
    symmetry = infer(GPT(lambda d: Attention(d, 4, groups=1, fused="", sdpa=False)), tokens(3, 5))
    assert words(symmetry)["attn.0.k.weight"] == "attn.0.qk wte"
    assert words(symmetry)["attn.0.q.weight"] == "(attn.0.heads attn.0.qk) wte"


def test_rotary_embeddings_leave_heads_for_queries_and_keys():
    symmetry = infer(GPT(lambda d: Attention(d, 2, rope=5), tied=True), tokens(3, 5))
    found = words(symmetry)
    assert found["attn.0.qkv.weight[0:8, 0:8]"] == "(attn.0.heads .) wte"
    assert found["attn.0.qkv.weight[16:24, 0:8]"] == "attn.0.vo wte"
    assert symmetry.groups["attn.0.vo"] == heads(tie="attn.0.heads")
    assert found["wte.weight"] == ". wte"
    assert "head.weight" not in found


@pytest.mark.parametrize("norm", [nn.RMSNorm, RMS])
def test_rms_norm_bounds_the_residual_stream_by_its_gain(norm):
    assert infer(GPT(lambda d: Attention(d, 2), norm=norm), tokens(3, 5)).groups["wte"] == P


@pytest.mark.parametrize(
    "norm", [lambda d: nn.RMSNorm(d, elementwise_affine=False), lambda d: RMS(d, gain=False)]
)
def test_rms_norm_without_gain_lets_the_residual_stream_rotate(norm):
    assert infer(GPT(lambda d: Attention(d, 2), norm=norm), tokens(3, 5)).groups["wte"] == R


def test_layer_norm_without_gain_permutes():
    model = GPT(lambda d: Attention(d, 2), norm=partial(nn.LayerNorm, elementwise_affine=False))
    assert infer(model, tokens(3, 5)).groups["wte"] == P


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder(norm_first):
    symmetry = infer(encoder(norm_first=norm_first), randn(3, 5, 3))
    expected = {"0": P}
    for i in range(2):
        place = f"1.layers.{i}"
        tie = f"{place}.self_attn.heads"
        expected |= {f"{place}.self_attn.qk": heads(tie=tie), f"{place}.self_attn.vo": heads(tie=tie)}
        expected |= {f"{place}.linear1": P}
    assert symmetry.groups == expected
    assert words(symmetry)["1.layers.0.self_attn.in_proj_weight[0:8, 0:8]"] == "1.layers.0.self_attn.qk 0"


def test_dropping_a_name_whose_heads_move_with_others_leaves_a_symmetry():
    model = scramble(GPT(lambda d: Attention(d, 2)))
    symmetry = infer_symmetry(model, tokens(3, 5))
    smaller = symmetry.drop("attn.0.qk")
    assert smaller.groups["attn.0.vo"] == Wreath(2, R, None)
    assert check(smaller, model, tokens(3, 5)) < 1e-10
    model = scramble(GPT(lambda d: Attention(d, 2, rope=5)))
    symmetry = infer_symmetry(model, tokens(3, 5))
    for name in ("attn.0.heads", "attn.0.vo"):
        assert check(symmetry.drop(name), model, tokens(3, 5)) < 1e-10


def test_two_attentions_in_one_module_have_heads_of_their_own():
    def forward(s, x):
        for *maps, out in ((s.q, s.k, s.v, s.o), (s.q2, s.k2, s.v2, s.o2)):
            split = (f(x).view(*x.shape[:2], 2, 4).transpose(1, 2) for f in maps)
            x = x + out(nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        return x

    model = Net(forward, **{name: nn.Linear(8, 8) for name in ("q", "k", "v", "o", "q2", "k2", "v2", "o2")})
    assert infer(model, randn(2, 4, 8)).groups == {
        "q.qk": heads(tie="q.heads"),
        "v.vo": heads(tie="q.heads"),
        "q2.qk": heads(tie="q2.heads"),
        "v2.vo": heads(tie="q2.heads"),
    }


def test_ties_of_two_attentions_on_parameters_of_one_module():
    def forward(s, x):
        for i in (0, 4):
            split = ((x @ s.w[i + j]).view(*x.shape[:2], 2, 4).transpose(1, 2) for j in range(3))
            x = x + nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2) @ s.w[i + 3]
        return x

    symmetry = infer(Net(forward, w=nn.ParameterList(torch.ones(8, 8) for _ in range(8))), randn(2, 4, 8))
    assert [g.tie for g in symmetry.groups.values()] == ["w.heads"] * 2 + ["w.heads.2"] * 2


@pytest.mark.parametrize("name", ["wte", "attn.0.heads", "attn.0.heads.2", "attn.0.qk", "attn.0.vo"])
def test_dropping_a_factor_of_a_split_axis_leaves_a_symmetry(name):
    model = scramble(GPT(lambda d: Attention(d, 4, groups=2, fused="", sdpa=False)))
    symmetry = infer_symmetry(model, tokens(3, 5))
    assert name not in symmetry.drop(name).groups
    assert check(symmetry.drop(name), model, tokens(3, 5)) < 1e-10
    assert check(symmetry.drop(name).drop("mlp.0.0"), model, tokens(3, 5)) < 1e-10


def test_keyword_inputs_and_the_model_is_left_alone():
    model = scramble(
        Net(lambda s, x, scale: s.a(x).relu() * scale, a=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    )
    model.train()
    before = dict(model.named_parameters())
    x = {"x": randn(4, 3), "scale": torch.tensor(2.0, dtype=torch.float64)}
    assert infer_symmetry(model, x).groups == {"a.0": R}
    assert model.training
    assert all(p is before[name] for name, p in model.named_parameters())


def test_model_that_cannot_be_traced():
    model = Net(lambda s, x: s.a(x) if float(x.sum()) > 0 else x, a=nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match=r"infer_symmetry: torch.export cannot trace Net.*declare the symmetry"
    ):
        infer_symmetry(model, randn(4, 3))


def test_what_is_inferred_knows_its_shapes_and_can_be_planned_at_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    symmetry = infer_symmetry(model, torch.ones(2, 3))
    assert symmetry.shapes == {name: p.shape for name, p in model.named_parameters()}
    assert plan(symmetry, max_block=6).cost.largest == 6  # 3 inputs, a bias and 2 outputs for each unit
    assert "5 x 3" in str(symmetry)
