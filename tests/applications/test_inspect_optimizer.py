import sys

import pytest
import torch
from typer.testing import CliRunner

from weingarten import cli
from weingarten.applications.inspect import load
from weingarten.applications.inspect_optimizer import plan_optimizer
from weingarten.optim import Symo
from weingarten.optim.cost import adamw_cost, muon_cost, soap_cost, total

MODELS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(40, 6)
        self.layers = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(6, 40)

    def forward(self, ids):
        return self.head(self.layers(self.token(ids)))

class Looks(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x

def deep():
    return Deep(), torch.zeros(2, 3, dtype=torch.long)

def on_meta():
    with torch.device("meta"):
        return deep()

def huge():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(30_000, 60_000), nn.Tanh(), nn.Linear(60_000, 30_000)), torch.ones(2, 30_000)

def wrong_inputs():
    return nn.Linear(3, 4), torch.ones(2, 7)

def wrong_on_meta():
    with torch.device("meta"):
        return nn.Linear(3, 4), torch.ones(2, 7)

def looks():
    return Looks(3, 4), torch.ones(2, 3)

def frozen():
    return nn.Linear(3, 4).requires_grad_(False), torch.ones(2, 3)
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planned_models.py").write_text(MODELS)
    yield tmp_path
    sys.modules.pop("planned_models", None)


def inspect(name, *arguments):
    target = f"planned_models:{name}"
    return CliRunner().invoke(cli.app, ["inspect", target, "--plan", *arguments], env={"COLUMNS": "200"})


def test_prints_routes_costs_and_shards():
    result = inspect("on_meta", "--ranks", "3", "--tokens", "1000")
    assert result.exit_code == 0, result.output
    size = sum(p.numel() for p in load("planned_models:deep")[0].parameters())
    for text in (
        f"Deep: {size:,} parameters",
        "3 x",
        "layers.*",
        "Muon",
        "SOAP",
        "AdamW",
        "1,000 tokens",
        "over 3 ranks",
        "FSDP2",
    ):
        assert text in result.stdout, text


def test_the_meta_device_gives_the_same_plan():
    real, meta = (plan_optimizer(*load(f"planned_models:{name}")) for name in ("deep", "on_meta"))
    assert real.costs == meta.costs
    assert real.kinds() == meta.kinds()


def test_models_larger_than_memory():
    found = plan_optimizer(*load("planned_models:huge"), max_block=60_002)
    assert found.size == 2 * 30_000 * 60_000 + 90_000
    assert found.largest == 60_000
    assert found.compared()["AdamW"].state == 8 * found.size


def test_routes_are_those_of_symo_grouped_and_counted():
    model, inputs = load("planned_models:deep")
    found, optimizer = plan_optimizer(model, inputs), Symo(model, example_inputs=inputs)
    assert [(r.leaves, str(r.moment)) for r in found.routes] == [
        (r.leaves, str(r.moment)) for r in optimizer.routes
    ]
    kinds = found.kinds()
    assert sum(kind.count for kind in kinds) == len(found.routes)
    assert total([kind.cost for kind in kinds]).flops == pytest.approx(total(found.costs).flops)
    (up,) = [kind for kind in kinds if kind.leaves == "layers.*.up.weight"]
    assert (up.count, up.label, up.shapes) == (3, "block", "12 x 6")


def test_rivals_are_sums_over_parameters():
    found = plan_optimizer(*load("planned_models:deep"))
    shapes = list(found.shapes.values())
    inside = [(12, 6), (6, 12)] * 3
    outside = [s for s in shapes if tuple(s) not in inside]  # embedding and head among them
    assert sum(tuple(s) == (40, 6) for s in outside) == 2
    muon = total([*map(muon_cost, inside), *map(adamw_cost, outside)])
    compared = found.compared()
    assert compared["Muon"].flops == pytest.approx(muon.flops)
    assert compared["Muon"].state == muon.state
    assert compared["SOAP"].flops == pytest.approx(total([soap_cost(s) for s in shapes]).flops)
    assert compared["AdamW"].state == 8 * found.size
    assert found.backward(10) == 60 * found.size


def test_shards_follow_flops():
    found = plan_optimizer(*load("planned_models:deep"))
    split = found.shards(3)
    assert sorted(i for part in split.parts for i in part.routes) == list(range(len(found.routes)))
    assert 1 <= split.flops < 1.5
    assert split.replicated == 4 * found.size * 2 / 3
    blocks = sum(found.shapes[n].numel() for r in found.routes if not r.adamw for n in r.leaves)
    assert split.cut == pytest.approx(2 * 4 * blocks * 2 / 9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deep", ["--ranks", "0"], "--ranks is 0, expected >= 1"),
        ("deep", ["--tokens", "0"], "--tokens is 0, expected >= 1"),
        ("deep", ["--max-block", "0"], "max_block is 0, expected >= 1"),
        ("deep", ["--figure", "blocks.svg"], "leave out --plan or --figure"),
        ("wrong_inputs", [], "the Linear fails on its example inputs: RuntimeError"),
        ("wrong_on_meta", [], "torch.export cannot trace Linear"),
        ("looks", [], "torch.export cannot trace Looks"),
        ("frozen", [], "the Linear has no trainable parameter"),
    ],
)
def test_bad_options_and_models_give_one_line_and_exit_code_2(place, name, options, message):
    result = inspect(name, *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    *others, line = result.stderr.strip().splitlines()
    assert name == "looks" or not others  # there torch has a warning of its own
    assert line.startswith("error: ")
    assert message in line
    assert not (place / "blocks.svg").exists()


def test_hugging_face_models_on_the_meta_device():
    transformers = pytest.importorskip("transformers")
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 60,
        "use_cache": False,
    }
    llama = transformers.LlamaConfig(intermediate_size=24, **small)
    gpt2 = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=60, use_cache=False)
    for make in (lambda: transformers.LlamaForCausalLM(llama), lambda: transformers.GPT2LMHeadModel(gpt2)):
        with torch.device("meta"):
            model, inputs = make(), {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
        found = plan_optimizer(model, inputs)
        assert {kind.count for kind in found.kinds() if kind.label == "block"} == {2}
        assert found.compared()["Symo"].products > 0


def test_without_ranks_there_is_no_plan():
    found = plan_optimizer(*load("planned_models:deep"))
    with pytest.raises(ValueError, match="ranks is -1"):
        found.shards(-1)
