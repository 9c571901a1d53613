import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from weingarten import cli
from weingarten.applications.inspect import InspectionError, examine, load
from weingarten.applications.inspect_figure import draw

MODELS = """
import torch
from torch import nn

number = 3

def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(2, 6)

def with_attribute():
    model = mlp()[0]
    model.example_inputs = torch.ones(2, 6)
    return model

def no_inputs():
    return mlp()[0]

def no_module():
    return 3, torch.ones(2)

def broken():
    raise RuntimeError("out\\nof order")

def needs_argument(size):
    return mlp()

def frozen():
    model, inputs = mlp()
    return model.requires_grad_(False), inputs

def wrong_inputs():
    return mlp()[0], torch.ones(2, 7)

instance = mlp()[0]
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models.py").write_text(MODELS)
    (tmp_path / "half.py").write_text("import nothing_of_that_name\n")
    yield tmp_path
    for name in ("my_models", "half"):
        sys.modules.pop(name, None)


def inspect(*arguments):
    return CliRunner().invoke(cli.app, ["inspect", *arguments], env={"COLUMNS": "200"})


def test_inspect_prints_model_symmetry_reasons_plan_and_cost():
    result = inspect("my_models:mlp")
    assert result.exit_code == 0, result.output
    for text in (
        "101 parameters",
        "SignedPermutation()",
        "Permutation()",
        "tanh",
        "relu",
        "the model's output",
    ):
        assert text in result.stdout, text
    assert "kept" in result.stdout or "freed" in result.stdout
    assert "Mflop" in result.stdout.splitlines()[-1]


def test_inspect_takes_a_model_that_holds_its_inputs():
    assert inspect("my_models:with_attribute").exit_code == 0


@pytest.mark.parametrize("name", ["blocks.png", "blocks.svg", "folder/blocks.svg"])
def test_inspect_draws_the_blocks(place, name):
    result = inspect("my_models:mlp", "--figure", name)
    assert result.exit_code == 0, result.output
    content = (place / name).read_bytes()
    assert content.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in content
    assert name in result.stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_models", "'my_models' is not of the form MODULE:FACTORY"),
        (":mlp", "not of the form MODULE:FACTORY"),
        ("no_such_module:mlp", "no module 'no_such_module', neither installed nor in the current folder"),
        (
            "half:mlp",
            "'half' cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        ("my_models:mpl", "the module 'my_models' has no 'mpl'; it has mlp, with_attribute"),
        ("my_models:number", "my_models:number is int, expected a function"),
        ("my_models:instance", "my_models:instance is Sequential, expected a function"),
        ("my_models:no_inputs", "returned a Sequential without an attribute example_inputs"),
        (
            "my_models:no_module",
            "my_models:no_module() returned (int, Tensor), expected (model, example_inputs)",
        ),
        ("my_models:broken", "my_models:broken() failed: RuntimeError: out of order"),
        ("my_models:needs_argument", "my_models:needs_argument() failed: TypeError"),
        ("my_models:frozen", "the Sequential has no trainable parameter"),
        ("my_models:wrong_inputs", "the Sequential fails on its example inputs: RuntimeError"),
    ],
)
def test_bad_targets_give_one_line_and_exit_code_2(target, message):
    result = inspect(target)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-block", "0"], "max_block is 0, expected >= 1"),
        (["--figure", "blocks.pdf"], "'blocks.pdf', expected a name that ends in .png or .svg"),
    ],
)
def test_bad_options_give_one_line_and_exit_code_2(options, message):
    result = inspect("my_models:mlp", *options)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert message in line


def test_a_smaller_bound_on_blocks_gives_smaller_blocks():
    model, inputs = load("my_models:mlp")
    sizes = [examine(model, inputs, bound).plan.cost.largest for bound in (8, 16, 128)]
    assert sizes == sorted(sizes)
    assert sizes[0] <= 8
    assert sizes[0] < sizes[-1]


def test_the_table_has_every_parameter_with_planned_blocks():
    model, inputs = load("my_models:mlp")
    found = examine(model, inputs, 64)
    rows = {key: (shape, words, blocks) for key, shape, words, blocks in found.leaves()}
    assert rows.keys() == dict(model.named_parameters()).keys()
    assert rows["0.weight"][:2] == ("5 x 6", "0 .")
    assert all(" x " in blocks for _, _, blocks in rows.values())


def test_frozen_parameters_are_counted_apart():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    found = examine(model, torch.ones(2, 3))
    assert (found.size, found.frozen) == (16, 10)


def test_a_figure_needs_a_known_ending(place):
    model, inputs = load("my_models:mlp")
    with pytest.raises(InspectionError, match=r"ends in \.png or \.svg"):
        draw(examine(model, inputs), place / "blocks.gif")
