"""Learn to learn from a few examples, by implicit MAML on sines and digits: python examples/few_shot.py [FIGURE]"""

import sys
from functools import partial
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

import weingarten as wg
from weingarten.applications.problems import (
    FewShot,
    GroupedMLP,
    ImplicitMAML,
    Sines,
    adapt,
    meta_solve,
    rotated_digits,
)

mpl.use("agg")

BATCH = 8  # episodes of one outer step
METHOD = wg.Implicit(solver=wg.CG(3), damping=1e-2)  # three products, preconditioned by KFAC


def learn_sines(steps: int):
    """From 10 points of a sine to the sine: the task, its inner training, and what was learned."""
    task = ImplicitMAML(GroupedMLP((1, 32, 32, 1), BATCH), wg.MSE(), prox=2.0)
    sgd = partial(torch.optim.SGD, lr=0.02 * BATCH, momentum=0.9)  # the inner loss is a mean over BATCH
    inner = (sgd, 16)
    outer = partial(torch.optim.Adam, lr=1e-2)
    found = meta_solve(
        task, METHOD, inner[0], outer, steps, episodes=Sines(), batch=BATCH, inner_steps=inner[1]
    )
    return task, inner, found.hparams


def learn_digits(steps: int, every: int = 10):
    """Ten classes of turned digits from one example of each: accuracy on classes that meta-training never saw."""
    task = ImplicitMAML(GroupedMLP((64, 32, 10), BATCH), wg.CrossEntropy(), prox=0.1)
    inner = (partial(torch.optim.SGD, lr=0.1 * BATCH, momentum=0.9), 10)
    train, test = (FewShot(examples, ways=10, shots=1) for examples in rotated_digits())
    curve = [(0, accuracy(task, task.start(), test, inner))]

    def watch(event: wg.Event) -> None:
        if event.step % every == 0:
            curve.append((event.step, accuracy(task, event.hparams, test, inner)))
            print(f"step {event.step:3d}  accuracy on new classes {curve[-1][1]:.3f}")

    meta_solve(
        task, METHOD, inner[0], partial(torch.optim.Adam, lr=1e-3), steps,
        episodes=train, batch=BATCH, inner_steps=inner[1], callbacks=[watch],
    )  # fmt: skip
    return curve


def accuracy(task, hparams, test, inner, batches: int = 5) -> float:
    """Of the queries of held-out episodes, after adaptation to their supports."""
    generator, hits = torch.Generator().manual_seed(1), []
    for _ in range(batches):
        drawn = test.draw(BATCH, generator)
        params, _ = adapt(task, hparams, drawn.support, *inner)
        output = task.problem().outer.objective.forward(params, drawn.query.inputs)
        hits.append((output.argmax(1) == drawn.query.targets).float().mean())
    return float(torch.stack(hits).mean())


def curves(task, inner, hparams):
    """Ten points of a new sine, and what each start makes of them on a grid."""
    generator = torch.Generator().manual_seed(1)
    new = [Sines(queries=40).draw(BATCH, generator) for _ in range(10)]
    grid, errors, lines = torch.linspace(-5, 5, 200), {}, {}
    objective = task.problem().outer.objective
    for name, start in {"from a random start": task.start(), "from the learned start": hparams}.items():
        adapted = [adapt(task, start, drawn.support, *inner)[0] for drawn in new]
        with torch.no_grad():
            losses = [objective.value(params, d.query) for params, d in zip(adapted, new, strict=True)]
            errors[name] = float(torch.stack(losses).mean())
            lines[name] = objective.forward(adapted[0], grid[:, None, None].expand(-1, BATCH, 1))[:, 0, 0]
        print(f"mean squared error on new sines, {name}: {errors[name]:.2f}")
    return new[0].support, grid, lines, errors


def draw(path: Path, sines, curve) -> None:
    support, grid, lines, errors = sines
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (name, line), colour in zip(lines.items(), ("0.6", "tab:blue"), strict=True):
        left.plot(grid, line, color=colour, label=f"{name} (mean error {errors[name]:.2f})")
    left.plot(support.inputs[:, 0, 0], support.targets[:, 0, 0], "k.", label="the ten points")
    left.set(title="a new sine after 16 inner steps", xlabel="x", ylabel="y", ylim=(-6, 9))
    left.legend(frameon=False, loc="upper left", fontsize=8)
    right.plot(*zip(*curve, strict=True), "o-", color="tab:blue")
    right.axhline(0.1, color="0.6", linestyle=":")
    right.annotate("chance", (curve[-1][0], 0.1), ha="right", va="bottom", color="0.4")
    right.set(
        title="new digits: ten classes, one example each",
        xlabel="outer steps",
        ylabel="accuracy",
        ylim=(0, 1),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(path: str = "runs/few_shot.png", steps: int = 60) -> tuple[float, float]:
    torch.manual_seed(0)
    sines = curves(*learn_sines(steps))
    curve = learn_digits(steps)
    draw(Path(path), sines, curve)
    return sines[3]["from the learned start"] / sines[3]["from a random start"], curve[-1][1] - curve[0][1]


if __name__ == "__main__":
    error, gain = main(*sys.argv[1:])
    print(f"sines: {error:.2f} of the error of a random start; digits: {gain:+.3f} accuracy")
