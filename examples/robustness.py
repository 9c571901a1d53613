"""How robust is a small classifier to changed training digits, and does cleaning help? python examples/robustness.py

A standard evaluation on local data: 30 % of 400 training digits are changed within a ball, at random or for the worst; the
labels stay. Then weights of rows are learned on 50 trusted digits, and the classifier is retrained with them.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

import weingarten as wg
from weingarten.applications.problems import Poisoning, RowWeights

TRAIN, HELD, TRUSTED, DECAY = 400, 400, 50, wg.L2(1e-3)
INNER = partial(torch.optim.Adam, lr=1e-2)
METHOD = wg.Implicit(solver=wg.CG(3), damping=1e-2, refresh=5)


def network(seed):
    torch.manual_seed(seed)
    return wg.Objective(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), wg.CrossEntropy())


def accuracy(batch, test, seeds=(1, 2)):
    """Test accuracy after training from scratch, mean over initialisations."""
    found = []
    for seed in seeds:
        model = network(seed).model
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-2, weight_decay=1e-3)
        weights = torch.ones(len(batch.targets)) if batch.weights is None else batch.weights
        for _ in range(100):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch.inputs), batch.targets, reduction="none")
            (weights * loss).mean().backward()
            optimizer.step()
        found.append((model(test.inputs).argmax(1) == test.targets).float().mean())
    return float(torch.stack(found).mean())


def worst_case(task, train, held, steps):
    """The changes that maximise the loss on clean held-out digits."""
    outer = partial(torch.optim.Adam, lr=0.1 * task.epsilon, maximize=True)
    given = {"hparams": task.start(), "inner_data": train, "outer_data": held, "project": task.projection()}
    return wg.solve(task.problem(), METHOD, INNER, outer, steps=steps, inner_steps=5, **given).hparams


def learned_weights(train, trusted, steps):
    """A weight for each row, its mean 1, such that a model trained with them does well on the trusted digits."""
    task = RowWeights(network(0).model, TRAIN)
    outer = partial(torch.optim.Adam, lr=0.3)
    given = {"hparams": task.start(), "inner_data": train, "outer_data": trusted}
    found = task.weights(
        wg.solve(task.problem(), METHOD, INNER, outer, steps=steps, inner_steps=5, **given).hparams
    )
    return found / found.mean()


def draw(path, rows, accuracies):
    """Clean digits above, the same digits changed below, and the accuracies."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(10, 3.2), layout="constrained")
    digits, bars = figure.subfigures(1, 2, width_ratios=(5, 4))
    for axes, images in zip(digits.subplots(len(rows), 6), rows.values(), strict=True):
        for ax, image in zip(axes, images, strict=False):
            ax.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
    for axes, name in zip(digits.axes[::6], rows, strict=True):
        axes.set_ylabel(name, fontsize=9)
    ax = bars.subplots()
    ax.plot(list(accuracies.values()), list(accuracies), "o")
    for name, value in accuracies.items():
        ax.annotate(f"{value:.3f}", (value, name), (6, -3), textcoords="offset points", fontsize=8)
    ax.set(xlim=(0.8, 1), xlabel="test accuracy, retrained")
    ax.grid(axis="y", alpha=0.3)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(path="runs/robustness.png", steps=60, epsilon=0.3, fraction=0.3):
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(pixels, dtype=torch.float32) / 16, torch.as_tensor(labels)
    parts = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split(
        [TRAIN, HELD, TRUSTED, 947]
    )
    train, held, trusted, test = (wg.Batch(x[i], y[i], rows=torch.arange(len(i))) for i in parts)
    rows = torch.arange(round(fraction * TRAIN))  # the order is random already
    task = Poisoning(network(0), train.inputs[rows], rows, epsilon, penalty=DECAY)
    random = task.change(task.random(torch.Generator().manual_seed(0)), train)
    worst = task.change(worst_case(task, train, held, steps), train)
    weights = learned_weights(worst, trusted, steps)
    both = (torch.cat([getattr(part, name) for part in (worst, trusted)]) for name in ("inputs", "targets"))
    accuracies = {
        "clean rows": accuracy(train, test),
        "random changes": accuracy(random, test),
        "worst changes": accuracy(worst, test),
        "trusted rows alone": accuracy(trusted, test),
        "worst and trusted": accuracy(wg.Batch(*both), test),
        "learned weights": accuracy(replace(worst, weights=weights), test),
    }
    print("\n".join(f"{name:20s} {value:.3f}" for name, value in accuracies.items()))
    changed = (torch.arange(TRAIN) < len(rows)).numpy()
    print(f"AUROC of the changed rows {roc_auc_score(changed, -weights.numpy()):.2f}")
    draw(path, {"clean": train.inputs, "random": random.inputs, "worst": worst.inputs}, accuracies)
    return accuracies["random changes"] - accuracies["worst changes"]


if __name__ == "__main__":
    print(f"worst changes cost {main(*sys.argv[1:2]):.3f} more accuracy than random ones")
