"""What a step of Symo costs on language models, on paper: flops and bytes next to Muon, SOAP and AdamW, and shards over ranks.

GPT-2 small and medium and a Llama of 7B parameters, Hugging Face's classes on the meta device: no weight is made, and nothing is
timed but the inference of the symmetry. The forward and backward pass counts 6 flops for each parameter and token of a step of
half a million tokens. The figures are those of `weingarten inspect --plan`. The 7B comes twice: with the default bound on blocks,
1024, which leaves its residual stream of 4096 as it is, and with one that turns it.

    python -m benchmarks.optimizer_cost [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.environment import report
from weingarten.applications.inspect_optimizer import OptimizerPlan, plan_optimizer
from weingarten.applications.inspect_optimizer_tables import TOKENS, cost_table, routes_table, shards_table

RANKS = (8, 64)


def gpt2(layers: int, heads: int, width: int) -> nn.Module:
    config = transformers.GPT2Config(n_layer=layers, n_head=heads, n_embd=width, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def llama(layers: int = 32) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


CASES: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "GPT-2 small": (lambda: gpt2(12, 12, 768), None),
    "GPT-2 medium": (lambda: gpt2(24, 16, 1024), None),
    "Llama 7B": (llama, None),
    "Llama 7B, max_block=4096": (llama, 4096),
}
QUICK: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "GPT-2 small": CASES["GPT-2 small"],
    "Llama, 2 layers, max_block=4096": (lambda: llama(2), 4096),
}


def measured(make: Callable[[], nn.Module], max_block: int | None) -> tuple[OptimizerPlan, float]:
    """The plan, and how many seconds it took."""
    with torch.device("meta"):
        model, inputs = make(), {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    start = time.perf_counter()
    return plan_optimizer(model, inputs, max_block), time.perf_counter() - start


def figures(found: OptimizerPlan, seconds: float) -> dict[str, Any]:
    """For one model: everything in flops and bytes."""
    backward = found.backward(TOKENS)
    shards = {}
    for ranks in RANKS:
        split = found.shards(ranks)
        shards[ranks] = {
            "flops, largest over mean": split.flops,
            "state, largest over mean": split.state,
            "received, DDP": split.replicated,
            "received, FSDP2": split.cut,
        }
    return {
        "parameters": found.size,
        "routes": len(found.routes),
        "largest block": found.largest,
        "seconds": seconds,
        "forward and backward": backward,
        "optimizers": {
            name: asdict(cost) | {"flops": cost.flops, "of the pass": cost.flops / backward}
            for name, cost in found.compared().items()
        },
        "shards": shards,
    }


def show(tables: list[tuple[str, list[str], list[list[str]]]]) -> None:
    console = Console(highlight=False, width=180)
    for title, columns, rows in tables:
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="GPT-2 small, and two layers of the Llama")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    details = {}
    for name, (make, max_block) in (QUICK if options.quick else CASES).items():
        found, seconds = measured(make, max_block)
        print(f"\n{name}: planned in {seconds:.0f} s")
        show([routes_table(found), cost_table(found, TOKENS), *(shards_table(found, r) for r in RANKS)])
        details[name] = figures(found, seconds)
    summary = {
        name: {optimizer: round(cost["of the pass"], 6) for optimizer, cost in case["optimizers"].items()}
        for name, case in details.items()
    }
    report(summary, {"tokens": TOKENS, "models": details}, options.json)


if __name__ == "__main__":
    main()
