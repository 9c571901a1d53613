"""Train a tiny GPT-2 with Symo in Hugging Face's Trainer: python examples/symo_trainer.py (needs transformers, accelerate)"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import weingarten as wg

TEXT = "An optimiser that knows the symmetry of a model keeps heads and hidden units together. " * 40


def main(steps: int = 60) -> tuple[float, float]:
    torch.manual_seed(0)
    codes = torch.tensor(list(TEXT.encode())).unfold(0, 32, 16)
    data = [{"input_ids": row, "labels": row} for row in codes]
    config = GPT2Config(
        vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    optimizer = wg.Symo(model, lr=3e-3, example_inputs={"input_ids": codes[:2], "use_cache": False})
    print(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(losses[0]), float(losses[-1])


if __name__ == "__main__":
    print("loss {:.2f} -> {:.2f}".format(*main()))
