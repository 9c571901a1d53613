"""Random programs: whatever ``infer_symmetry`` finds in them must leave the loss unchanged."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.symmetry.models import randn, scramble
from tests.symmetry.test_infer import check
from weingarten.symmetry import explain_symmetry

HEADS = 2


def split(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge(x):
    return x.transpose(1, 2).flatten(2)


class Program(nn.Module):
    """A few random operators on values of shape (batch, time, 8); parameters are made in the first call."""

    def __init__(self, seed):
        super().__init__()
        self.seed, self.fresh = seed, True
        self(randn(2, 5, 3).float())
        self.fresh = False

    def p(self, name, *shape):
        if self.fresh:
            self.register_parameter(name, nn.Parameter(torch.ones(*shape)))
        return getattr(self, name)

    def linear(self, name, x, out=8, bias=True):
        return F.linear(x, self.p(f"{name}w", out, x.shape[-1]), self.p(f"{name}b", out) if bias else None)

    def forward(self, x):
        choose = random.Random(self.seed)
        values = [self.linear("a", x, bias=choose.random() < 0.7)]
        for i in range(choose.randint(4, 9)):
            v, u = choose.choice(values), choose.choice(values)
            values.append(OPERATORS[choose.choice(sorted(OPERATORS))](self, f"p{i}", v, u))
        return sum(self.linear(f"o{j}", v, 2) for j, v in enumerate(values[-3:]))


def attention(s, n, v, u):
    q, k, w = (split(s.linear(f"{n}{c}", v)) for c in "qkv")
    return merge(F.scaled_dot_product_attention(q, k, w))


def stacked(s, n, v, u):
    a, b, c = s.linear(n, v, 24).view(*v.shape[:2], 3, HEADS, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return merge(a @ b.mT @ c * 0.2)


def gated(s, n, v, u):
    a, b = s.linear(n, v, 16).chunk(2, -1)
    return a * b.sigmoid()


OPERATORS = {
    "add": lambda s, n, v, u: u + v,
    "attention": attention,
    "attention to itself": lambda s, n, v, u: merge((split(v) @ split(u).mT).softmax(-1) @ split(v)),
    "bias": lambda s, n, v, u: v + s.p(n, 8),
    "concatenation": lambda s, n, v, u: s.linear(n, torch.cat([u, v], -1)),
    "concatenated heads": lambda s, n, v, u: s.linear(n, merge(torch.cat([split(u), split(v)], 1))),
    "flip of time": lambda s, n, v, u: v.flip(1),
    "gain": lambda s, n, v, u: v * s.p(n, 8),
    "gate": gated,
    "group norm": lambda s, n, v, u: F.group_norm(v.mT, HEADS, s.p(n, 8)).mT,
    "halves": lambda s, n, v, u: torch.cat([v[..., :4].tanh(), v[..., 4:]], -1),
    "swapped halves": lambda s, n, v, u: torch.cat([v[..., 4:], v[..., :4]], -1),
    "head gain": lambda s, n, v, u: merge(split(v) * s.p(n, HEADS, 1, 1)),
    "head map": lambda s, n, v, u: merge(split(v) @ s.p(n, 4, 4)),
    "head norm": lambda s, n, v, u: merge(F.normalize(split(v), dim=-1)),
    "head norm with gain": lambda s, n, v, u: merge(F.rms_norm(split(v), (4,), s.p(n, 4))),
    "head mix": lambda s, n, v, u: v + merge(torch.einsum("gh,bhtd->bgtd", s.p(n, HEADS, HEADS), split(v))),
    "head sum": lambda s, n, v, u: s.linear(n, split(v).sum(1)),
    "layer norm": lambda s, n, v, u: F.layer_norm(v, (8,), s.p(n, 8)),
    "linear": lambda s, n, v, u: s.linear(n, v),
    "mean and back": lambda s, n, v, u: v * v.mean(-1, keepdim=True),
    "multiply": lambda s, n, v, u: u * v,
    "norm": lambda s, n, v, u: v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 0.1),
    "odd": lambda s, n, v, u: v.tanh(),
    "one head": lambda s, n, v, u: v + merge(split(v)[:, :1].expand(-1, HEADS, -1, -1)),
    "outer product": lambda s, n, v, u: s.linear(n, (v[..., :, None] * u[..., None, :]).flatten(-2)),
    "relu": lambda s, n, v, u: F.gelu(v),
    "roll": lambda s, n, v, u: v.roll(1, -1),
    "softmax": lambda s, n, v, u: v.softmax(-1),
    "stack": stacked,
    "time mix": lambda s, n, v, u: s.p(n, v.shape[1], v.shape[1]) @ v,
}


@pytest.mark.parametrize("seed", range(24))
def test_random_programs(seed):
    model, x = scramble(Program(seed), seed), randn(2, 5, 3)
    found = explain_symmetry(model, x)
    assert found.unknown == ()
    assert check(found.symmetry, model, x, 1e-9) < 1e-9
