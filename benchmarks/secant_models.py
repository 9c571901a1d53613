"""The networks of the secant benchmark, with their symmetries declared by hand, and digits to train them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import weingarten as wg
from weingarten.groups import Action, Permutation, Rotation, SignedPermutation, Wreath
from weingarten.symmetry import Symmetry

ROWS, CLASSES, BATCH = 1000, 10, 64
WIDTH, HEADS, HIDDEN, LAYERS = 24, 4, 48, 2  # of the transformer


@dataclass(frozen=True)
class Network:
    """How to make and train one network, and what acts on its parameters."""

    make: Callable[[], nn.Module]
    words: dict[str, str]
    groups: dict[str, Action]
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    rate: float = 0.1
    steps: int = 4000
    sizes: dict[str, int] = field(default_factory=dict)

    def symmetry(self, params: dict[str, Tensor]) -> Symmetry:
        return Symmetry.parse(self.words, sizes=self.sizes, params=params, **self.groups)


class Block(nn.Module):
    """Attention and feed-forward with normalisation before each; queries, keys and values apart."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Rows of the image as eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.place = nn.Parameter(torch.randn(8, WIDTH) / 5)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(-1, (8, 8))) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x).mean(1))


def mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, CLASSES)
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def transformer_words() -> tuple[dict[str, str], dict[str, Action]]:
    """Residual stream, heads (queries with keys, values with outputs) and feed-forward units."""
    words = {"embed.weight": "r .", "embed.bias": "r", "head.weight": ". r", "head.bias": ".", "place": ". r"}
    words |= {"last.weight": "r", "last.bias": "r"}
    groups: dict[str, Action] = {"r": Permutation()}
    for i in range(LAYERS):
        p, qk, vo, ff = f"blocks.{i}", f"qk{i}", f"vo{i}", f"ff{i}"
        words |= {f"{p}.{norm}.{leaf}": "r" for norm in ("before", "between") for leaf in ("weight", "bias")}
        for name, group in (("q", qk), ("k", qk), ("v", vo)):
            words |= {f"{p}.{name}.weight": f"{group} r", f"{p}.{name}.bias": group}
        words |= {f"{p}.o.weight": f"r {vo}", f"{p}.o.bias": "r", f"{p}.up.weight": f"{ff} r"}
        words |= {f"{p}.up.bias": ff, f"{p}.down.weight": f"r {ff}", f"{p}.down.bias": "r"}
        groups |= {name: Wreath(HEADS, Rotation(), Permutation(), tie=f"heads{i}") for name in (qk, vo)}
        groups[ff] = Permutation()
    return words, groups


MLP_WORDS = {
    "0.weight": "h1 .",
    "0.bias": "h1",
    "2.weight": "h2 h1",
    "2.bias": "h2",
    "4.weight": ". h2",
    "4.bias": ".",
}
CONV_WORDS = {"1.weight": "c1 . . .", "1.bias": "c1", "4.weight": "c2 c1 . .", "4.bias": "c2"}
CONV_WORDS |= {"8.weight": ". (c2 .)", "8.bias": "."}

NETWORKS: dict[str, Network] = {
    "tanh MLP": Network(
        lambda: mlp(nn.Tanh), MLP_WORDS, {"h1": SignedPermutation(), "h2": SignedPermutation()}
    ),
    "ReLU MLP": Network(lambda: mlp(nn.ReLU), MLP_WORDS, {"h1": Permutation(), "h2": Permutation()}),
    "convolutional": Network(
        convolutional, CONV_WORDS, {"c1": Permutation(), "c2": Permutation()}, sizes={"c2": 16}
    ),
    "transformer": Network(Transformer, *transformer_words(), optimizer=torch.optim.Adam, rate=2e-3),
}


def digits(seed: int) -> wg.Batch:
    """A thousand digits, float64, drawn by the seed."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))[:ROWS]
    return wg.Batch(torch.tensor(data.data / 16)[order], torch.tensor(data.target)[order])


def build(name: str, seed: int) -> tuple[nn.Module, Any]:
    """A network in float64 with the seed's initial values, and its optimizer."""
    network = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network.make().double()
    return model, network.optimizer(model.parameters(), lr=network.rate)
