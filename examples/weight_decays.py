"""Decay per weight, augmentation ranges and inner rates on handwritten digits: python examples/weight_decays.py [figure.png]"""

import sys
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import nn

import weingarten as wg
from weingarten.applications.problems import AugmentationRange, InnerRates, Jittered, WeightDecays
from weingarten.applications.problems.augmentation_range import TRANSFORMS, warp
from weingarten.tree import Tree

mpl.use("Agg")
from matplotlib import pyplot as plt

ADAM = torch.optim.Adam
TRUE = (0.5, 0.02, 0.1, 1.5)  # by which held-out digits are turned, scaled and shifted


def network(inputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 24), nn.Tanh(), nn.Linear(24, 10))


def parts(x: torch.Tensor, y: torch.Tensor, batch: int | None = None) -> tuple[wg.Rows, wg.Rows]:
    return wg.Rows(x[:200], y[:200], batch), wg.Rows(x[200:600], y[200:600])


def decays(images: torch.Tensor, labels: torch.Tensor, steps: int) -> Tree:
    """64 pixels and 64 columns of noise: which weights should decay?"""
    x = torch.cat([images.flatten(1), 0.5 * torch.randn(len(images), 64)], 1)
    task = WeightDecays(network(128), decay=1e-3, each_weight=True)
    train, held = parts(x, labels)
    method, slow = wg.Implicit(solver=wg.CG(10), preconditioner=None), partial(ADAM, lr=0.1)
    found = wg.solve(
        task.problem(), method, partial(ADAM, lr=0.01), slow, steps, hparams=task.start(), inner_steps=5,
        inner_data=train, outer_data=held,
    )  # fmt: skip
    return found.hparams


def ranges(images: torch.Tensor, labels: torch.Tensor, steps: int) -> tuple[Tree, list[list[float]]]:
    """Upright digits to train on, turned and shifted ones to judge by: how were these made?"""
    noise = (2 * torch.rand(len(images), 4) - 1) * torch.tensor(TRUE)
    task, path = AugmentationRange(network(64)), []
    train, held = parts(images, labels, 100)[0], parts(warp(images, *noise.unbind(1)), labels)[1]
    found = wg.solve(
        task.problem(), wg.Implicit(refresh=5), partial(ADAM, lr=0.01), partial(ADAM, lr=0.1), steps,
        hparams=task.start(), inner_steps=5, inner_data=Jittered(train), outer_data=held,
        callbacks=[lambda event: path.append([float(h.exp()) for h in event.hparams.values()])],
    )  # fmt: skip
    return found.hparams, path


def rates(images: torch.Tensor, labels: torch.Tensor, steps: int) -> tuple[list[float], list[list[float]]]:
    """SGD from rates that are far too small: by unrolling, since a rate moves no minimum."""
    task, path = InnerRates(network(64), rate=3e-3, momentum=0.9), []
    followed, (train, held) = task.followed(), parts(images, labels, 64)
    found = wg.solve(
        task.problem(), wg.Unrolled(5, task.optimizer), followed.make, partial(ADAM, lr=0.1), steps,
        hparams=task.start(), inner_steps=5, inner_data=train, outer_data=held,
        callbacks=[
            followed.follow,
            lambda event: path.append([float(h.exp()) for h in event.hparams.values()]),
        ],
    )  # fmt: skip
    return found.history.columns()["outer_loss"], path


def main(figure: str = "runs/weight_decays.png", steps: int = 100) -> tuple[float, float, float]:
    """How much more noise decays than pixels (log), the range of shifts to the right, and the last loss with learned rates."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images).float().reshape(-1, 8, 8) / 16, torch.as_tensor(labels)
    torch.manual_seed(0)
    first = decays(x, y, steps)["1.weight"]
    contrast = float(first[:, 64:].mean() - first[:, :64].mean())
    print(f"log decay of noise above that of pixels: {contrast:.2f}")
    found, path = ranges(x, y, steps)
    for name, h, true in zip(TRANSFORMS, found.values(), TRUE, strict=True):
        print(f"range of {name:8s} found {float(h.exp()):5.2f}, held-out digits made with {true}")
    losses, followed = rates(x, y, steps)
    print(f"held-out loss with learned rates: {losses[-1]:.3f}")
    draw(figure, first, path, followed)
    return contrast, float(found["right"].exp()), losses[-1]


def draw(figure: str, decay: torch.Tensor, path: list, followed: list) -> None:
    _, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    shown = axes[0].imshow(decay.mean(0).reshape(2, 8, 8).permute(1, 0, 2).reshape(8, 16).numpy())
    axes[0].figure.colorbar(shown, ax=axes[0], orientation="horizontal")
    axes[0].set_title("mean log decay: pixels left, noise right")
    for place, name in enumerate(TRANSFORMS):
        axes[1].plot([row[place] for row in path], label=name, color=f"C{place}")
        axes[1].axhline(TRUE[place], linestyle=":", color=f"C{place}")
    axes[1].set(title="augmentation ranges, found and (dotted) true", xlabel="outer step")
    axes[1].legend()
    for place, name in enumerate(("first weight", "first bias", "last weight", "last bias")):
        axes[2].semilogy([row[place] for row in followed], label=name)
    axes[2].set(title="rates of SGD, by unrolling", xlabel="outer step")
    axes[2].legend()
    Path(figure).parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(figure, dpi=120)
    plt.close("all")


if __name__ == "__main__":
    main(*sys.argv[1:2])
