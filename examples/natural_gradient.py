"""Natural gradient descent on handwritten digits, with factors from the training step: python examples/natural_gradient.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import weingarten as wg
from weingarten import tree


def main(steps: int = 60, damping: float = 1e-3, trust: float = 1e-2) -> float:
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    objective = wg.Objective(model, wg.CrossEntropy())
    kfac, params, draw = wg.KFAC(decay=0.95), objective.params(), torch.Generator().manual_seed(0)
    state = kfac.init(objective, params)
    for step in range(steps):
        rows = torch.randint(len(x), (128,), generator=draw)
        loss, gradient = kfac.step(state, objective, params, wg.Batch(x[rows], labels[rows]), draw)
        if step % 5 == 0:
            inverse = kfac.read(state).power(-1, damping)
            print(f"step {step:3d}  loss {float(loss):.4f}")
        direction = inverse.apply(gradient)
        # a step whose squared length in the curvature is at most `trust`
        rate = min(0.3, float(trust / tree.dot(direction, gradient)) ** 0.5)
        for name, p in params.items():
            p.sub_(rate * direction[name])
    return float(objective.value(params, wg.Batch(x, labels)))


if __name__ == "__main__":
    print(f"loss on all digits: {main():.4f}")
