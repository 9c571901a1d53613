"""How much should predicting masked words weigh beside classifying questions? python examples/auxiliary_task.py [figure.png]

Questions of a small grammar. Nouns are of two kinds; a question's class is the kind of its last noun, and most nouns never occur
in the 40 labelled questions. Each kind keeps company with its own verbs and adjectives, which the masked words teach. A third
sort of auxiliary row has random answers. Without auxiliary rows the accuracy is 0.63.
"""

import sys
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from torch import nn

import weingarten as wg
from weingarten.applications.problems import AuxiliaryWeights, Joined, masked_rows

mpl.use("Agg")
from matplotlib import pyplot as plt

MASK, OPEN, COMPANY, NOUNS = 0, 6, 20, 100
VOCABULARY = 1 + OPEN + 2 * COMPANY + 2 * NOUNS
SORTS = ("opening words", "company and nouns", "random answers")


def sentences(count: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (count, 5), opening, verb, adjective, adjective, noun, and the noun's kind; a third of the company strays."""

    def pick(size, number):
        return torch.randint(number, (count, size), generator=draw)

    kind = pick(1, 2)
    strays = (torch.rand(count, 3, generator=draw) < 0.33).long()
    company = 1 + OPEN + (kind ^ strays) * COMPANY + pick(3, COMPANY)
    noun = 1 + OPEN + 2 * COMPANY + kind * NOUNS + pick(1, NOUNS)
    return torch.cat([1 + pick(1, OPEN), company, noun], 1), kind[:, 0]


def main_rows(tokens: torch.Tensor, labels: torch.Tensor) -> wg.Rows:
    """The noun alone: what it means has to come from elsewhere."""
    return wg.Rows((tokens[:, -1:].expand(-1, 5), torch.zeros_like(labels)), labels)


def masked(tokens: torch.Tensor, draw: torch.Generator) -> wg.Rows:
    inputs, answers = masked_rows(tokens, MASK, torch.arange(VOCABULARY) > MASK)
    sort = 1 + (answers > OPEN).long()
    random = torch.rand(len(answers), generator=draw) < 0.3
    answers = torch.where(random, torch.randint(1, VOCABULARY, answers.shape, generator=draw), answers)
    return wg.Rows((inputs, torch.where(random, 3, sort)), 2 + answers, batch_size=128)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.logits = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 2 + VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits(torch.tanh(self.embedding(tokens).mean(1)))


def main(figure: str = "runs/auxiliary_task.png", steps: int = 150) -> tuple[float, list[float]]:
    """Test accuracy, and the weights of the three sorts."""
    torch.manual_seed(0)
    draw, path = torch.Generator().manual_seed(0), []
    train, held, test = (main_rows(*sentences(n, draw)) for n in (40, 200, 1000))
    auxiliary = masked(sentences(2000, draw)[0], draw)
    task = AuxiliaryWeights(Bag(), classes=2, sorts=3, weight=0.1, decay=1e-3)
    problem = task.problem()
    found = wg.solve(
        problem,
        wg.Implicit(refresh=5),
        partial(torch.optim.Adam, lr=0.02),
        partial(torch.optim.Adam, lr=0.05),
        steps,
        hparams=task.start(),
        inner_data=Joined(train, auxiliary),
        outer_data=held,
        inner_steps=5,
        callbacks=[lambda event: path.append(event.hparams["log_weight"].exp().tolist())],
    )
    output = problem.outer.objective.forward(found.params, test.inputs)
    right = float((output.argmax(1) == test.targets).float().mean())
    for name, weight in zip(SORTS, path[-1], strict=True):
        print(f"weight of {name:18s} {weight:.3f}")
    print(f"accuracy on nouns, most of them unlabelled: {right:.3f}")
    plt.figure(figsize=(5.5, 3.6), layout="constrained")
    plt.semilogy(path, label=SORTS)
    plt.title("weights of the auxiliary rows")
    plt.xlabel("outer step")
    plt.legend()
    Path(figure).parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(figure, dpi=120)
    plt.close("all")
    return right, path[-1]


if __name__ == "__main__":
    main(*sys.argv[1:2])
