"""Learn how much rows of rare classes should count, from a few images of each class: python examples/long_tail.py [figure.png]"""

import sys
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from torch import nn

import weingarten as wg
from weingarten.applications.problems import WeightNetwork

mpl.use("Agg")
from matplotlib import pyplot as plt

LARGEST, IMBALANCE, BALANCED, TEST = 100, 50, 8, 50


def load(seed: int):
    """Inputs and labels of the long tail (class 0 has the most rows, class 9 the fewest), the balanced and the test rows."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=generator)
    x, y = images.float()[order] / 16, labels[order]
    ends = [0, BALANCED, BALANCED + TEST]
    parts = [[], [], []]
    for label in range(10):
        rows, size = (y == label).nonzero()[:, 0], round(LARGEST * IMBALANCE ** (-label / 9))
        for part, first, last in zip(parts, ends, [*ends[1:], ends[-1] + size], strict=True):
            part.append(rows[first:last])
    balanced, test, tail = ((x[torch.cat(rows)], y[torch.cat(rows)]) for rows in parts)
    return tail, balanced, test


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def train(task: WeightNetwork, hparams, batch: wg.Batch, steps: int = 300) -> dict[str, torch.Tensor]:
    """A new network on rows that weigh what the weight network says."""
    inner = task.problem().inner
    params = {name: p.detach().requires_grad_() for name, p in network().named_parameters()}
    optimizer = torch.optim.Adam(params.values(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        inner.value(params, hparams, batch).backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def draw(figure: Path, labels, weights, recalls) -> None:
    """The weight and the recall of each class."""
    picture, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    counts = labels.bincount(minlength=10)
    names = [f"{label}\n({int(n)})" for label, n in enumerate(counts)]
    left.bar(names, [float(weights[labels == label].mean()) for label in range(10)])
    left.set(ylabel="mean weight (1 at the start)", xlabel="class (its rows)")
    for place, (text, recall) in enumerate(recalls.items()):
        right.bar(torch.arange(10) + 0.4 * place - 0.2, recall, width=0.4, label=text)
    right.set(ylabel="recall on test images", xlabel="class (its rows)", ylim=(0, 1.19))
    right.set_xticks(range(10), names)
    right.legend(ncols=2, loc="upper center")
    figure.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(figure, dpi=120)
    plt.close(picture)


def main(figure: str | Path = "runs/long_tail.png", steps: int = 30, seed: int = 0) -> tuple[float, float]:
    """Balanced accuracy with equal and with learned weights."""
    (x, y), balanced, test = load(seed)
    task = WeightNetwork(network(), classes=10, weight_decay=3e-3)
    problem, start = task.problem(), task.start()
    plain = train(task, start, wg.Batch(task.inputs(x, y), y))
    rows = wg.Batch(task.inputs(x, y, plain), y)  # with the losses of the network that weighs all rows alike
    found = wg.solve(
        problem,
        wg.Implicit(damping=1e-2, refresh=5),  # KFAC's direction, its length from one product
        partial(torch.optim.Adam, lr=1e-3),
        partial(torch.optim.Adam, lr=0.1),
        steps=steps,
        params=plain,
        hparams=start,
        inner_data=rows,
        outer_data=balanced,
        inner_steps=20,
        seed=seed,
    )
    learned = train(task, found.hparams, rows)
    predicted = {
        text: problem.outer.objective.forward(params, test[0]).argmax(1)
        for text, params in (("equal weights", plain), ("learned weights", learned))
    }
    recalls = {
        text: [float((p == label)[test[1] == label].float().mean()) for label in range(10)]
        for text, p in predicted.items()
    }
    draw(Path(figure), y, task.weights(found.hparams, rows.inputs[1], y), recalls)
    before, after = (float(balanced_accuracy_score(test[1].numpy(), p.numpy())) for p in predicted.values())
    return before, after


if __name__ == "__main__":
    before, after = main(*sys.argv[1:2])
    print(
        f"balanced accuracy at imbalance {IMBALANCE}: {before:.3f} with equal weights, {after:.3f} with learned ones"
    )
