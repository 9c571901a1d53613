"""Train a network on handwritten digits with Symo in Lightning: python examples/symo_lightning.py (needs pytorch-lightning)"""

import pytorch_lightning as lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import weingarten as wg


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, number):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = wg.Symo(self.net, lr=1e-2, example_inputs=torch.zeros(2, 64, device=self.device))
        print(optimizer)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(epochs: int = 5) -> float:
    lightning.seed_everything(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=50, shuffle=True)
    module = Digits()
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    lightning.Trainer(max_epochs=epochs, gradient_clip_val=1.0, **quiet).fit(module, loader)
    return float((module.net(images[1500:]).argmax(1) == labels[1500:]).float().mean())


if __name__ == "__main__":
    print(f"accuracy on the digits left out: {main():.3f}")
