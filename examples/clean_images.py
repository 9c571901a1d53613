"""Find wrong labels of images by weights of rows that a few trusted images judge: python examples/clean_images.py [figure.png]"""

import sys
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

import weingarten as wg
from weingarten.applications.problems import RowWeights

mpl.use("Agg")
from matplotlib import pyplot as plt

TRUSTED, TEST, WRONG = 100, 600, 0.5


def load(seed: int):
    """Inputs and labels of trusted, test and training rows, and the training rows' given labels, half of them wrong."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=generator)
    x, y = images.float()[order] / 16, labels[order]
    parts = [
        (x[rows], y[rows])
        for rows in (slice(TRUSTED), slice(TRUSTED, TRUSTED + TEST), slice(TRUSTED + TEST, None))
    ]
    true = parts[2][1]
    wrong = torch.rand(len(true), generator=generator) < WRONG
    other = (true + torch.randint(1, 10, true.shape, generator=generator)) % 10
    return (*parts, torch.where(wrong, other, true))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def train(task: RowWeights, hparams, rows: wg.Rows, steps: int = 300) -> dict[str, torch.Tensor]:
    """A new network on rows that weigh what the outer variables say."""
    inner, generator = task.problem().inner, torch.Generator().manual_seed(0)
    params = {name: p.detach().requires_grad_() for name, p in network().named_parameters()}
    optimizer = torch.optim.Adam(params.values(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        inner.value(params, hparams, rows.draw(generator)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def draw(figure: Path, x, given, weights, wrong) -> None:
    """Weights of right and wrong rows, and the rows of the lowest weight with their labels."""
    picture = plt.figure(figsize=(9, 3.6), layout="constrained")
    left, right = picture.subfigures(1, 2)
    axes = left.subplots()
    for part, text in ((~wrong, "right label"), (wrong, "wrong label")):
        axes.hist(weights[part].numpy(), bins=30, alpha=0.6, label=text)
    axes.set(xlabel="weight (1 at the start)", ylabel="rows")
    axes.legend()
    right.suptitle("Lowest weights (red: the label is wrong)")
    for place, row in zip(right.subplots(3, 5).flat, weights.argsort()[:15].tolist(), strict=True):
        place.imshow(x[row].reshape(8, 8).numpy(), cmap="gray_r")
        place.set_title(f"{int(given[row])}?", color="tab:red" if wrong[row] else "black", fontsize=9)
        place.axis("off")
    figure.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(figure, dpi=120)
    plt.close(picture)


def main(
    figure: str | Path = "runs/clean_images.png", steps: int = 25, seed: int = 0
) -> tuple[float, float, float]:
    """Test accuracy with equal and with learned weights, and how well the weights rank (AUROC)."""
    trusted, test, (x, true), given = load(seed)
    task, rows = RowWeights(network(), len(x)), wg.Rows(x, given, batch_size=400)
    problem, start = task.problem(), task.start()
    plain = train(task, start, rows)
    found = wg.solve(
        problem,
        wg.Implicit(damping=1e-2, refresh=5),  # KFAC's direction, its length from one product
        partial(torch.optim.Adam, lr=1e-3),
        partial(torch.optim.Adam, lr=0.3),
        steps=steps,
        params=plain,
        hparams=start,
        inner_data=rows,
        outer_data=trusted,
        inner_steps=20,
        seed=seed,
    )
    weights, wrong = task.weights(found.hparams), given != true
    objective = problem.outer.objective
    accuracy = [
        float((objective.forward(params, test[0]).argmax(1) == test[1]).float().mean())
        for params in (plain, train(task, found.hparams, rows))
    ]
    draw(Path(figure), x, given, weights, wrong)
    return accuracy[0], accuracy[1], float(roc_auc_score(wrong.numpy(), -weights.numpy()))


if __name__ == "__main__":
    before, after, ranking = main(*sys.argv[1:2])
    print(
        f"test accuracy with half of the labels wrong: {before:.3f} with equal weights, {after:.3f} with learned ones"
    )
    print(f"a wrong label has less weight than a right one with probability {ranking:.3f}")
