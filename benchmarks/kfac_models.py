"""The four models of the KFAC benchmark: random weights, random data, float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import weingarten as wg

LAYERS, WIDTH, HEADS, CONTEXT, CHARACTERS = 4, 256, 4, 128, 96  # of the character GPT


@dataclass(frozen=True)
class Case:
    """A model in evaluation mode with one batch; every parameter is trainable and gets a gradient."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def objective(self) -> wg.Objective:
        return wg.Objective(self.model, wg.CrossEntropy())

    @property
    def batch(self) -> wg.Batch:
        return wg.Batch(self.inputs, self.targets)

    def gradient(self) -> dict[str, Tensor]:
        """The unit of all times: one forward and backward pass with plain PyTorch."""
        params = dict(self.model.named_parameters())
        loss = functional.cross_entropy(self.model(self.inputs), self.targets)
        return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))

    def first(self, rows: int) -> Case:
        return Case(self.name, self.model, self.inputs[:rows], self.targets[:rows])


def mlp() -> Case:
    """784-512-512-10 with ReLU, 512 rows."""
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return Case("mlp", model, torch.randn(512, 784), torch.randint(10, (512,)))


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a shortcut, 1x1 with stride where the width grows."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = 1 if before == width else 2
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def cnn() -> Case:
    """A stem and residual blocks of 16, 32 and 64 channels; batch normalisation in evaluation mode; 128 images 3x32x32."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16),
        Residual(16, 32),
        Residual(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return Case("cnn", model, torch.randn(128, 3, 32, 32), torch.randint(10, (128,)))


class Block(nn.Module):
    """Causal attention with one projection for query, key and value, then an MLP, each behind a layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A character model; logits have the classes in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.last(self.blocks(self.token(tokens) + self.place(places)))).mT


def gpt() -> Case:
    """4 layers, width 256, 4 heads, untied head; 16 sequences of 128 tokens of 96 kinds, a loss at every token."""
    tokens = torch.randint(CHARACTERS, (16, CONTEXT + 1))
    return Case("gpt", GPT(), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class Classifier(nn.Module):
    """An encoder, the mean over positions and a linear head; every position is attended to."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.encoder(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            token_type_ids=torch.zeros_like(tokens),
            position_ids=torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens),
        )
        return self.head(found.last_hidden_state.mean(1))


def bert() -> Case:
    """The architecture of MiniLM-L6 (22.6 million parameters) without pooler, 6 classes; 16 sequences of 64 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    model = Classifier(BertModel(config, add_pooling_layer=False), 384, 6)
    return Case("bert", model, torch.randint(1000, 30522, (16, 64)), torch.randint(6, (16,)))


MODELS: dict[str, Callable[[], Case]] = {"mlp": mlp, "cnn": cnn, "gpt": gpt, "bert": bert}


def build(name: str) -> Case:
    """The same model and data whenever it is called; the global random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = MODELS[name]()
    case.model.eval()
    return case
