"""Moving what tests compute with to a GPU, and comparing what comes back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import weingarten as wg

GPU = torch.device("cuda", 0)


def on(value: Any, device: torch.device | str = GPU) -> Any:
    """A copy on a device of tensors, modules, batches and whatever holds them."""
    if isinstance(value, Tensor | nn.Module):
        return copy.deepcopy(value).to(device)
    if isinstance(value, wg.Batch):
        return replace(value, **{name: on(part, device) for name, part in vars(value).items()})
    if isinstance(value, wg.Batches):
        return replace(value, **{name: on(part, device) for name, part in vars(value).items()})
    if isinstance(value, wg.Objective):
        model = on(value.model, device) if isinstance(value.model, nn.Module) else value.model
        return wg.Objective(model, value.loss, value.output)
    if isinstance(value, Mapping):
        return {name: on(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on(part, device) for part in value)
    return value


def agree(found: Any, expected: Any, **tolerance: float) -> None:
    """The one is on the GPU, the other on the CPU, and they are equal."""
    if isinstance(found, Mapping):
        assert found.keys() == expected.keys()
        for name, leaf in found.items():
            agree(leaf, expected[name], **tolerance)
        return
    assert found.device == GPU
    torch.testing.assert_close(found.cpu(), expected, **tolerance)
