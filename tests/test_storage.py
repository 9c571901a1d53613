"""Curvatures written to a file and read again: bit for bit, or one clear error."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weingarten as wg
from tests.cases import generator, normal
from tests.contracts.test_operator import CURVATURES
from weingarten import operators, storage
from weingarten.operators import Layout
from weingarten.storage import FORMAT, KINDS, StorageError
from weingarten.symmetry import Isotypic
from weingarten.tree import Space


def tensors(value: Any) -> list[Tensor]:
    """All tensors below a value, in the order of the attributes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif hasattr(value, "__dict__"):
        value = [v for name, v in sorted(vars(value).items()) if name not in ("_leaves", "_sizes", "shape")]
    elif not isinstance(value, tuple | list):
        return []
    return [found for item in value for found in tensors(item)]


def assert_same(found: wg.Curvature, expected: wg.Curvature) -> None:
    assert type(found) is type(expected)
    assert found.space == expected.space
    assert list(found.space.shapes) == list(expected.space.shapes)
    ours, theirs = tensors(found), tensors(expected)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert torch.equal(a, b)
    v = expected.space.randn(generator(3))
    for apply in (lambda c: c.apply(v), lambda c: c.solve(v, 0.3), lambda c: {"": c.logdet(0.3)}):
        torch.testing.assert_close(apply(found), apply(expected), rtol=0, atol=0)


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "curvature.safetensors"


@pytest.mark.parametrize("name", CURVATURES)
def test_every_curvature_comes_back_bit_for_bit(name, file):
    curvature = CURVATURES[name]()
    wg.save(curvature, file)
    assert_same(wg.load(file), curvature)
    assert os.listdir(file.parent) == [file.name]


def test_every_kind_of_curvature_is_stored_and_in_the_contract_table():
    kinds = {
        value
        for value in vars(operators).values()
        if isinstance(value, type) and issubclass(value, wg.Curvature) and value is not wg.Curvature
    }
    assert len(kinds) >= 5
    assert kinds == {kind.type for kind in KINDS.values() if issubclass(kind.type, wg.Curvature)}
    assert kinds == {type(make()) for make in CURVATURES.values()}


GROUPS = {
    "h": wg.Wreath(2, inner=wg.SignedPermutation(), tie="k"),
    "k": wg.Permutation(),
    "q": wg.Conjugated(wg.Signs(), torch.linalg.qr(normal(3, 3))[0]),
}


def test_a_symmetry_comes_back_whole(file):
    params = {"w": normal(6, 3), "b": normal(4), "c": normal(2, 2)}
    spec = {"w": "h q", "b[0:2]": "k", "b[2:4]": ".", "c": "k ."}
    symmetry = wg.Symmetry.parse(spec, params=params, buffers={"mean": "k"}, **GROUPS).by_component()
    isotypic = Isotypic(symmetry, params)
    moment = wg.orbit_moment(symmetry, params)
    wg.save(moment, file)
    found = wg.load(file)
    assert_same(found, moment)
    stored = found.isotypic.symmetry
    assert (stored.parts, stored.buffers, stored.sizes) == (symmetry.parts, symmetry.buffers, symmetry.sizes)
    assert (stored.shapes, stored.groups["h"]) == (symmetry.shapes, GROUPS["h"])
    assert torch.equal(stored.groups["q"].basis, GROUPS["q"].basis)
    assert found.blocks.keys() == isotypic.blocks.keys()


def test_estimated_curvature_with_views_and_half_types(file):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)).bfloat16()
    space = Space.of({name: p.detach() for name, p in model.named_parameters()})
    factor = torch.eye(4)[None]
    blocks = [
        wg.Kronecker(Layout(space.only(["0.weight", "0.bias"])), factor.half(), factor),
        wg.Kronecker(Layout(space.only(["2.weight", "2.bias"])), torch.eye(5)[None].bfloat16(), factor),
    ]
    order = ["2.bias", "0.weight", "0.bias", "2.weight"]
    curvature = wg.BlockDiagonal(blocks, order)
    wg.save(curvature, file)  # one factor appears twice
    assert_same(wg.load(file), curvature)
    inverse = curvature.map(wg.FactoredPower(-1, 0.1))  # factors of equal size are views of one tensor
    wg.save(inverse, file)
    assert_same(wg.load(file), inverse)
    assert list(wg.load(file).space.shapes) == order


def test_loaded_tensors_do_not_depend_on_the_file(file):
    curvature = CURVATURES["Kronecker"]()
    wg.save(curvature, file)
    found = wg.load(file)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert_same(found, curvature)


def test_on_another_device(file):
    wg.save(CURVATURES["BlockDiagonal"](), file)
    found = wg.load(file, device="meta")
    assert found.space.device == torch.device("meta")
    assert {t.device.type for t in tensors(found)} == {"meta"}
    assert wg.load(file, torch.device("cpu")).space.device == torch.device("cpu")


def edited(file: Path, change: Any) -> None:
    """Rewrite the file's JSON."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


def replace_in_tree(old: str, new: str) -> Any:
    def change(file: Path) -> None:
        def swap(metadata):
            assert old in metadata["curvature"]
            metadata["curvature"] = metadata["curvature"].replace(old, new)

        edited(file, swap)

    return change


DAMAGE = {
    "empty": (lambda f: f.write_bytes(b""), "damaged or no curvature file"),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "damaged or no curvature file"),
    "header cut": (lambda f: f.write_bytes(f.read_bytes()[:20]), "damaged or no curvature file"),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "damaged or no curvature file"),
    "one bit": (flip, "'outputs' is damaged, its check sum differs"),
    "no safetensors": (lambda f: torch.save({"w": torch.ones(2)}, f), "damaged or no curvature file"),
    "other tensors": (lambda f: save_file({"w": torch.ones(2)}, f), "holds 'other tensors', expected"),
    "other format": (lambda f: save_file({"w": torch.ones(2)}, f, {"format": "pt"}), "holds 'pt', expected"),
    "newer": (lambda f: edited(f, lambda m: m.update(version="2")), "version 2 .* at most 1; update"),
    "no version": (lambda f: edited(f, lambda m: m.pop("version")), "damaged or no curvature file"),
    "no JSON": (lambda f: edited(f, lambda m: m.update(curvature="{")), "damaged or no curvature file"),
    "unknown kind": (replace_in_tree('"kind": "Kronecker"', '"kind": "Popen"'), "found the kind 'Popen'"),
    "no dtype": (replace_in_tree('"float64"', '"load"'), "found the type 'load'"),
    "missing tensor": (
        replace_in_tree('"tensor": "inputs"', '"tensor": "gone"'),
        "damaged or no curvature file",
    ),
    "swapped tensors": (replace_in_tree('"tensor": "inputs"', '"tensor": "outputs"'), "check sum differs"),
    "other shape": (replace_in_tree('"groups": 1', '"groups": 2'), "damaged or no .* inputs has shape"),
    "no curvature": (
        lambda f: edited(f, lambda m: m.update(curvature='{"kind": "Signs", "fields": {}}')),
        "holds a Signs, expected a curvature",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error(name, file):
    wg.save(CURVATURES["Kronecker"](), file)
    damage, match = DAMAGE[name]
    damage(file)
    with pytest.raises(StorageError, match=match):
        wg.load(file)


def test_absent_file_and_folder_are_named(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            wg.load(path)


def test_what_cannot_be_stored_is_named(file):
    class Mine(wg.groups.Permutation):
        pass

    with pytest.raises(TypeError, match="found a Identity, expected a curvature"):
        wg.save(wg.Identity(Space.of({"w": normal(2)})), file)
    params = {"w": normal(3, 2)}
    moment = wg.orbit_moment(wg.Symmetry.parse({"w": "h ."}, h=Mine()), params)
    with pytest.raises(TypeError, match=r"found a Mine at isotypic\.symmetry\.groups\.h.*storage\.KINDS"):
        wg.save(moment, file)
    assert os.listdir(file.parent) == []


@pytest.mark.parametrize("call", ["save", "load"])
def test_without_safetensors_the_extra_is_named(call, file, monkeypatch):
    wg.save(CURVATURES["Kronecker"](), file)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=rf"{call}: .*pip install 'weingarten\[storage\]'"):
        wg.load(file) if call == "load" else wg.save(CURVATURES["Kronecker"](), file)


SCRIPT = """
import os, resource, signal, sys, torch
import weingarten as wg
how, path = sys.argv[1:]
curvature = wg.DiagonalCurvature({"w": torch.ones(100_000)})
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
else:
    number = getattr(signal, how)
    os.fsync = lambda descriptor: os.kill(os.getpid(), number)
try:
    wg.save(curvature, path)
except OSError as error:
    print("OSError", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
@pytest.mark.parametrize("how", ["full", "SIGKILL", "SIGINT"])
def test_what_was_there_stays_when_writing_breaks_off(how, file):
    before = CURVATURES["Kronecker"]()
    wg.save(before, file)
    command = [sys.executable, "-c", SCRIPT, how, str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if how == "full":
        assert "OSError save: cannot write" in done.stdout, done.stderr
    else:
        assert done.returncode in (-getattr(signal, how), 130), done.stderr
    partial = file.with_name(file.name + ".partial")
    assert partial.exists() == (how == "SIGKILL")
    assert_same(wg.load(file), before)
    wg.save(before.scale(2.0), file)
    assert_same(wg.load(file), before.scale(2.0))
    assert os.listdir(file.parent) == [file.name]


def test_the_file_is_plain_safetensors(file):
    curvature = CURVATURES["BlockDiagonal"]()
    wg.save(curvature, file)
    stored = load_file(file)
    assert list(stored) == ["blocks.0.inputs", "blocks.0.outputs", "blocks.1.values.z"]
    assert torch.equal(stored["blocks.0.inputs"], curvature.blocks[0].inputs)
    assert FORMAT.encode() in file.read_bytes()
    assert storage.VERSION == 1
