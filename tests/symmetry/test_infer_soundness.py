"""Odd models: whatever is inferred must leave the loss unchanged, and what should be found is found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.symmetry.models import Net, randn, scramble, tokens
from tests.symmetry.test_infer import P, R, S, check, heads, infer, words
from weingarten.groups import Wreath
from weingarten.symmetry import explain_symmetry, infer_symmetry

L, W = nn.Linear, lambda *shape: nn.Parameter(torch.ones(*shape))


def split_heads(x, h=2):
    return x.view(*x.shape[:2], h, -1).transpose(1, 2)


def attend(s, x):
    q, k, v = (split_heads(f(x)) for f in (s.q, s.k, s.v))
    return (q @ k.mT).softmax(-1) @ v


def qkv(**more):
    return {"q": L(3, 8), "k": L(3, 8), "v": L(3, 8), "o": L(8, 2), **more}


def back(y):
    return y.transpose(1, 2).flatten(2)


def alibi(s, x):
    q, k, v = (split_heads(f(x)) for f in (s.q, s.k, s.v))
    t = torch.arange(x.shape[1])
    return s.o(back((q @ k.mT + s.slopes[:, None, None] * (t[:, None] - t)).softmax(-1) @ v))


def experts(s, x):
    gates = s.gate(x).softmax(-1)
    hidden = torch.einsum("bi,eih->beh", x, s.up).relu()
    return torch.einsum("be,beh,eho->bo", gates, hidden, s.down)


def mixer(s, x):
    x = s.i(x)
    x = x + s.t2(F.gelu(s.t1(x.mT))).mT
    return s.o(x + s.c2(F.gelu(s.c1(s.n(x)))))


def vit(s, x):
    x = s.patch(x).flatten(2).mT
    x = torch.cat([s.token.expand(len(x), 1, -1), x], 1) + s.place
    return s.o(s.n(x)[:, 0])


def squeeze_excite(s, x):
    x = s.c(x).relu()
    return s.o((x * s.b(s.a(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]).amax((2, 3)))


def qk_norm(s, x):
    q, k, v = (split_heads(f(x)) for f in (s.q, s.k, s.v))
    return s.o(back(F.scaled_dot_product_attention(F.rms_norm(q, (4,), s.g), F.rms_norm(k, (4,), s.g), v)))


# name: (model, input, expected groups by name or None)
MODELS = {
    "concatenated features": (
        Net(lambda s, x: s.o(torch.cat([s.a(x).relu(), s.b(x).tanh()], -1)), a=L(3, 4), b=L(3, 5), o=L(9, 2)),
        randn(4, 3),
        {"a": P, "b": S},
    ),
    "gate by chunk": (
        Net(lambda s, x: s.o(torch.mul(*s.a(x).chunk(2, -1))), a=L(3, 8), o=L(4, 2)),
        randn(4, 3),
        {"a": P},
    ),
    "gated linear unit": (Net(lambda s, x: s.o(F.glu(s.a(x))), a=L(3, 8), o=L(4, 2)), randn(4, 3), {"a": P}),
    "gate by stack": (
        Net(lambda s, x: s.o(torch.mul(*s.a(x).view(-1, 2, 4).unbind(1))), a=L(3, 8), o=L(4, 2)),
        randn(4, 3),
        {"a": P},
    ),
    "uneven slices": (
        Net(lambda s, x: s.o(F.relu(s.a(x)[:, 2:])) + s.p(s.a(x)[:, :3].tanh()), a=L(3, 8), o=L(6, 2), p=L(3, 2)),
        randn(4, 3),
        {"a": S, "a.2": P},
    ),
    "strided slice": (Net(lambda s, x: s.o(s.a(x)[:, ::2]), a=L(3, 8), o=L(4, 2)), randn(4, 3), {}),
    "mixer": (
        Net(mixer, i=L(3, 6), t1=L(5, 7), t2=L(7, 5), n=nn.LayerNorm(6), c1=L(6, 4), c2=L(4, 6), o=L(6, 2)),
        randn(2, 5, 3),
        {"i": P, "t1": P, "c1": P},
    ),
    "vision transformer": (
        Net(vit, patch=nn.Conv2d(1, 6, 2, 2), token=W(1, 1, 6), place=W(5, 6), n=nn.LayerNorm(6), o=L(6, 2)),
        randn(2, 1, 4, 4),
        {"token": P},
    ),
    "squeeze and excite": (
        Net(squeeze_excite, c=nn.Conv2d(1, 6, 3), a=L(6, 4), b=L(4, 6), o=L(6, 2)),
        randn(2, 1, 5, 5),
        {"c": P, "a": P},
    ),
    "experts": (Net(experts, gate=L(3, 4), up=W(4, 3, 5), down=W(4, 5, 2)), randn(6, 3), None),
    "attention without heads": (
        Net(lambda s, x: s.o(F.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x))), **qkv()),
        randn(2, 4, 3),
        {"q.qk": R, "v.vo": R},
    ),
    "slopes per head": (Net(alibi, slopes=torch.tensor([0.5, 0.25]).double(), **qkv()), randn(2, 4, 3),
        {"q.qk": Wreath(2, R, None), "v.vo": Wreath(2, R, None)}),
    "scale per head": (
        Net(lambda s, x: s.o(back(attend(s, x) * s.scale[:, None, None])), scale=W(2), **qkv()),
        randn(2, 4, 3),
        None,
    ),
    "linear over each head": (
        Net(lambda s, x: s.o(back(s.m(attend(s, x)))), m=L(4, 4), **qkv()),
        randn(2, 4, 3),
        None,
    ),
    "sum over heads": (Net(lambda s, x: s.p(attend(s, x).sum(1)), p=L(4, 2), **qkv()), randn(2, 4, 3), None),
    "mixed heads": (
        Net(lambda s, x: s.o(back(attend(s, x) + torch.einsum("gh,bhtd->bgtd", s.m, attend(s, x)))), m=W(2, 2), **qkv()),
        randn(2, 4, 3),
        None,
    ),
    "one head used": (Net(lambda s, x: s.p(attend(s, x)[:, 0]), p=L(4, 2), **qkv()), randn(2, 4, 3), None),
    "heads last": (
        Net(lambda s, x: s.o((s.v(x).view(2, 4, 4, 2) * s.g).flatten(2)), g=W(2), **qkv()),
        randn(2, 4, 3),
        None,
    ),
    "shared gain on queries and keys": (Net(qk_norm, g=W(4), **qkv()), randn(2, 5, 3), None),
    "softmax over heads": (Net(lambda s, x: s.o(back(attend(s, x).softmax(1))), **qkv()), randn(2, 4, 3), None),
    "tanh in heads": (Net(lambda s, x: s.o(back(attend(s, x).tanh())), **qkv()), randn(2, 4, 3), None),
    "outer product of features": (
        Net(lambda s, x: s.o((s.a(x)[:, :, None] * s.a(x)[:, None, :]).flatten(1)), a=L(3, 5), o=L(25, 2)),
        randn(4, 3),
        {"a": R},
    ),
    "Gram matrix": (Net(lambda s, x: s.a(x).mT @ s.a(x), a=L(3, 5)), randn(2, 4, 3), {}),
    "distances": (Net(lambda s, x: s.a(x) @ s.a(x).mT, a=L(3, 5)), randn(2, 4, 3), {"a.qk": R}),
    "cosines": (
        Net(lambda s, x: F.normalize(s.a(x), dim=-1) @ F.normalize(s.b(x), dim=-1).mT, a=L(3, 5), b=L(3, 5)),
        randn(4, 3),
        {"a": R},
    ),
    "sum of products": (Net(lambda s, x: (s.a(x) * s.b(x)).sum(-1), a=L(3, 5), b=L(3, 5)), randn(4, 3), {"a": R}),
    "sum of features": (Net(lambda s, x: s.a(x).sum(-1), a=L(3, 5)), randn(4, 3), {"a": P}),
    "same linear map twice": (
        Net(lambda s, x: s.o(s.h(s.h(s.i(x)).tanh()).tanh()), i=L(3, 5), h=L(5, 5), o=L(5, 2)),
        randn(4, 3),
        {"i": S},
    ),
    "constant added": (Net(lambda s, x: s.o(s.a(x) + 1.0), a=L(3, 5), o=L(5, 2)), randn(4, 3), {"a": P}),
    "scalar parameter": (Net(lambda s, x: s.o(s.a(x) * s.t), a=L(3, 5), t=W(()), o=L(5, 2)), randn(4, 3), {"a": R}),
    "scalar parameter added": (Net(lambda s, x: s.o(s.a(x) + s.t), a=L(3, 5), t=W(1), o=L(5, 2)), randn(4, 3), {"a": P}),
    "constant vector": (
        Net(lambda s, x: s.o(s.a(x) * s.c), a=L(3, 5), c=randn(5), o=L(5, 2)),
        randn(4, 3),
        {},
    ),
    "flipped features": (Net(lambda s, x: s.o(s.a(x).flip(-1)), a=L(3, 5), o=L(5, 2)), randn(4, 3), {}),
    "sorted features": (Net(lambda s, x: s.o(s.a(x).sort(-1)[0]), a=L(3, 5), o=L(5, 2)), randn(4, 3), {}),
    "convolution over features": (
        Net(lambda s, x: s.o(s.c(s.a(x)[:, None])[:, 0]), a=L(3, 5), c=nn.Conv1d(1, 1, 3, padding=1), o=L(5, 2)),
        randn(4, 3),
        {},
    ),
    "maximum and its place": (
        Net(lambda s, x: s.a(x).max(-1)[0] + s.a(x).max(-1)[1], a=L(3, 5)),
        randn(4, 3),
        {},
    ),
    "slope per channel": (
        Net(lambda s, x: s.o(s.p(s.c(x)).mean((2, 3))), c=nn.Conv2d(1, 4, 3), p=nn.PReLU(4), o=L(4, 2)),
        randn(2, 1, 5, 5),
        {"c": P},
    ),
    "clamp by parameters": (
        Net(lambda s, x: s.o(torch.minimum(s.a(x), s.m)), a=L(3, 5), m=W(5), o=L(5, 2)),
        randn(4, 3),
        {"m": P},
    ),
    "positive weights": (
        Net(lambda s, x: s.o((x @ F.softplus(s.w)).tanh()), w=W(3, 5), o=L(5, 2)),
        randn(4, 3),
        {"w": P},
    ),
    "weight by a product": (
        Net(lambda s, x: s.o(F.linear(x, s.u @ s.v).tanh()), u=W(5, 4), v=W(4, 3), o=L(5, 2)),
        randn(4, 3),
        {"u": S, "u.2": R},
    ),
    "decoder": (
        Net(lambda s, x: s.o(s.d(s.i(x), s.i(x[:, :2] * 2))),
            i=L(3, 8), d=nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), o=L(8, 2)),
        randn(2, 4, 3),
        {"i": P, "d.linear1": P}
        | {f"d.{a}.{r}": heads(tie=f"d.{a}.heads") for a in ("self_attn", "multihead_attn") for r in ("qk", "vo")},
    ),
    "attention weights": (
        Net(lambda s, x: s.o(s.a(x, x, x)[0]) + s.a(x, x, x)[1].sum(), a=nn.MultiheadAttention(8, 2), o=L(8, 2)),
        randn(4, 3, 8),
        {"a.qk": heads(tie="a.heads"), "a.vo": heads(tie="a.heads"), "a.out_proj": R},
    ),
    "cells": (
        Net(lambda s, x: s.o(s.g(x, s.l(x, (s.i(x), s.i(x)))[0])), i=L(3, 5), l=nn.LSTMCell(3, 5), g=nn.GRUCell(3, 5), o=L(5, 2)),
        randn(4, 3),
        {"i": P},
    ),
    "batch statistics": (
        Net(lambda s, x: s.o(s.n(s.c(x)).relu().mean(2)), c=nn.Conv1d(1, 4, 3),
            n=nn.BatchNorm1d(4, track_running_stats=False), o=L(4, 2)),
        randn(4, 1, 6),
        {"c": P},
    ),
    "stack through a linear map": (
        Net(lambda s, x: s.o(s.a(x).view(-1, 2, 4).relu().flatten(1)) + s.a(x).view(-1, 2, 4)[:, 0].sum(-1, True),
            a=L(3, 8), o=L(8, 2)),
        randn(4, 3),
        None,
    ),
    "maximum of two": (Net(lambda s, x: s.o(torch.max(s.a(x), s.b(x))), a=L(3, 5), b=L(3, 5), o=L(5, 2)), randn(4, 3), None),
    "bag of embeddings": (
        Net(lambda s, i: s.o(s.e(i).mean(1).relu()), e=nn.Embedding(11, 6), o=L(6, 2)),
        tokens(3, 5),
        {"e": P},
    ),
    "table of biases": (
        Net(
            lambda s, x: s.o(back(F.scaled_dot_product_attention(
                *(split_heads(f(x)) for f in (s.q, s.k, s.v)),
                attn_mask=s.table[(torch.arange(4)[:, None] - torch.arange(4)).abs()].permute(2, 0, 1)))),
            table=W(4, 2), **qkv(),
        ),
        randn(2, 4, 3),
        {"heads": P, "q.qk": heads(tie="heads"), "v.vo": heads(tie="heads")},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_odd_models(name):
    model, x, groups = MODELS[name]
    scramble(model)
    symmetry = infer_symmetry(model, x)
    assert check(symmetry, model, x) < 1e-10
    if groups is not None:
        assert symmetry.groups == groups


def test_unknown_operator_frees_what_it_touches_and_is_listed():
    @torch.library.custom_op("weingarten_test::half", mutates_args=())
    def half(x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(-1) / 2

    @half.register_fake
    def _(x):
        return torch.empty_like(x)

    model = scramble(Net(lambda s, x: s.c(half(s.b(s.a(x).relu()))), a=L(3, 5), b=L(5, 6), c=L(6, 2)))
    found = explain_symmetry(model, randn(4, 3))
    assert found.symmetry.groups == {"a": P}
    assert found.unknown == ("weingarten_test::half",)
    reasons = {(f.key, f.axis): f.reason for f in found.freed}
    assert reasons["b.weight", 0] == "no rule for weingarten_test::half"
    assert reasons["a.weight", 1] == "the model's input"
    assert reasons["c.bias", 0] == "the model's output"
    assert "no rule for weingarten_test::half" in str(found)
    assert "a: Permutation(), because of relu" in str(found)
    assert check(found.symmetry, model, randn(4, 3)) < 1e-10


def test_a_rule_of_ones_own_teaches_an_operator():
    @torch.library.custom_op("weingarten_test::soft", mutates_args=())
    def soft(x: torch.Tensor) -> torch.Tensor:
        return x / (1 + x.abs())

    @soft.register_fake
    def _(x):
        return torch.empty_like(x)

    from weingarten.symmetry.rules import RULES

    model = scramble(Net(lambda s, x: s.b(soft(s.a(x))), a=L(3, 5), b=L(5, 2)))
    found = explain_symmetry(model, randn(4, 3), {**RULES, "weingarten_test::soft": RULES["tanh"]})
    assert found.symmetry.groups == {"a": S}
    assert check(found.symmetry, model, randn(4, 3)) < 1e-10


def test_frozen_parameters_free_their_axes():
    model = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 5), nn.ReLU(), L(5, 2))
    model[0].weight.requires_grad_(False)
    symmetry = infer(model, randn(4, 3))
    assert words(symmetry)["0.bias"] == "."
    assert symmetry.groups == {"2": P}


def test_unused_parameters_are_free_or_moved_without_effect():
    model = Net(lambda s, x: s.a(x), a=L(3, 2), b=L(4, 5))
    symmetry = infer(model, randn(4, 3))
    assert words(symmetry)["a.weight"] == ". ."


def test_everything_free_when_nothing_is_known():
    model = nn.Sequential(L(3, 2))
    assert infer(model, randn(4, 3)).groups == {}
