"""Train a small convolutional network on handwritten digits with Symo in a plain loop: python examples/symo_loop.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import weingarten as wg


def main(epochs: int = 5) -> float:
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.reshape(-1, 1, 8, 8).float() / 16
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    optimizer = wg.Symo(model, lr=1e-2, example_inputs=images[:2])
    print(optimizer)
    rows = torch.randperm(1500).split(50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=epochs * len(rows), cycle_momentum=False
    )
    for _ in range(epochs):
        for batch in rows:
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return float((model(images[1500:]).argmax(1) == labels[1500:]).float().mean())


if __name__ == "__main__":
    print(f"accuracy on the digits left out: {main():.3f}")
