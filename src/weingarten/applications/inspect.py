"""What the library sees in a model: its symmetry, why it is not larger, and what an orbit average would cost."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weingarten.objective import curvature_pass
from weingarten.symmetry import Inference, Isotypic, Plan, explain_symmetry, plan
from weingarten.tree import Tree, detach

__all__ = ["Inspection", "InspectionError", "examine", "load", "try_out"]


class InspectionError(ValueError):
    """The user gave something that cannot be inspected; the message is one line."""


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        name: the model's class.
        params: its trainable parameters.
        frozen: number of parameters that are not trainable.
        inference: the symmetry of all trainable parameters, with reasons.
        plan: which names an estimate keeps, and its cost.
    """

    name: str
    params: Tree
    frozen: int
    inference: Inference
    plan: Plan

    @property
    def size(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.params.values())

    def isotypic(self) -> Isotypic:
        """The coordinates of the planned estimate."""
        return Isotypic(self.plan.symmetry, self.params)

    def leaves(self) -> list[tuple[str, str, str, str]]:
        """For every part: key, shape, words as inferred, and the planned blocks ``columns x copies``."""
        blocks = self.isotypic().blocks.values()
        planned = {
            part.key: ", ".join(
                f"{block.multiplicity} x {block.dim * block.count}"
                for block in blocks
                if part.key in block.columns
            )
            for part in self.plan.symmetry.parts
        }
        return [
            (
                part.key,
                " x ".join(map(str, part.of(self.params).shape)),
                " ".join(map(str, part.words)),
                planned[part.key],
            )
            for part in self.inference.symmetry.parts
        ]

    def freed(self) -> dict[str, list[str]]:
        """Reasons, each with the axes on which it lets nothing act."""
        found: dict[str, list[str]] = {}
        for axis in self.inference.freed:
            found.setdefault(axis.reason, []).append(f"{axis.key}[{axis.axis}]")
        for name in self.inference.unknown:
            found.setdefault(name, [])
        return found


def load(target: str) -> tuple[nn.Module, Any]:
    """The model and the example inputs that ``MODULE:FACTORY`` makes.

    FACTORY is called without arguments and returns ``(model, example_inputs)``, or a module with an attribute
    ``example_inputs``. MODULE may lie in the current folder. Inputs are a tensor, a tuple of positional arguments or a dict of
    keyword arguments.

    Raises:
        InspectionError: if the module or the factory is not found, or does not give that.
    """
    module_name, colon, factory_name = target.partition(":")
    if not (module_name and colon and factory_name):
        raise InspectionError(f"{target!r} is not of the form MODULE:FACTORY, such as my_models:small_gpt")
    module = _imported(module_name)
    if not hasattr(module, factory_name):
        raise InspectionError(f"the module {module_name!r} has no {factory_name!r}{_suggest(module)}")
    factory = getattr(module, factory_name)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InspectionError(
            f"{target} is {type(factory).__name__}, expected a function that returns (model, example_inputs)"
        )
    try:
        made = factory()
    except Exception as error:
        raise InspectionError(f"{target}() failed: {type(error).__name__}: {error}") from error
    return _pair(target, made)


def examine(model: nn.Module, inputs: Any, max_block: int = 1024) -> Inspection:
    """Infer the symmetry of a model and plan an estimate.

    Args:
        model: a module; not changed.
        inputs: as for ``infer_symmetry``.
        max_block: as for ``plan``.

    Raises:
        InspectionError: if the model has nothing to train, fails on its inputs, cannot be traced, or the bound cannot be met.

    >>> import torch
    >>> found = examine(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.ones(2, 3))
    >>> found.size, found.plan.cost.largest
    (26, 6)
    """
    trainable: Tree = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise InspectionError(f"the {type(model).__name__} has no trainable parameter")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    try_out(model, inputs)
    try:
        inference = explain_symmetry(model, inputs)
        chosen = plan(inference.symmetry, max_block)
    except ValueError as error:
        raise InspectionError(str(error)) from error
    return Inspection(type(model).__name__, detach(trainable), frozen, inference, chosen)


def try_out(model: nn.Module, inputs: Any) -> None:
    """Call the model once, which says what is wrong more clearly than a trace; on the meta device there is nothing to call.

    Raises:
        InspectionError: if it fails.
    """
    if any(p.is_meta for p in model.parameters()):
        return  # models may look at values, such as masks; torch.export traces them all the same
    args: Any = (
        () if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else (inputs,)
    )
    try:
        with curvature_pass(model), torch.no_grad():
            model(*args, **(inputs if isinstance(inputs, Mapping) else {}))
    except Exception as error:
        raise InspectionError(
            f"the {type(model).__name__} fails on its example inputs: {type(error).__name__}: {error}"
        ) from error


def _imported(name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0])
        if missing:
            raise InspectionError(
                f"no module {name!r}, neither installed nor in the current folder"
            ) from error
        raise InspectionError(
            f"the module {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)


def _suggest(module: Any) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and name[0] != "_"
    ]
    return f"; it has {', '.join(names[:8])}" if names else ""


def _pair(target: str, made: Any) -> tuple[nn.Module, Any]:
    if isinstance(made, nn.Module):
        if not hasattr(made, "example_inputs"):
            raise InspectionError(
                f"{target}() returned a {type(made).__name__} without an attribute example_inputs; return (model, example_inputs)"
            )
        return made, made.example_inputs
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return made
    found = (
        f"({', '.join(type(x).__name__ for x in made)})" if isinstance(made, tuple) else type(made).__name__
    )
    raise InspectionError(
        f"{target}() returned {found}, expected (model, example_inputs) with an nn.Module first"
    )
