"""Checkpoints that are whole or absent: written aside, moved into place, read without unpickling classes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weingarten.atomic import replacing
from weingarten.bilevel.implicit import Anchor, ImplicitState
from weingarten.objective import Batch
from weingarten.operators import Operator

__all__ = ["CheckpointError", "decode", "describe", "encode", "read", "write"]

FORMAT = 2
"""2: a history has the columns ``inner_gradient`` and ``outer_change``."""
TYPES: dict[str, type] = {"ImplicitState": ImplicitState, "Anchor": Anchor, "Batch": Batch}
"""The dataclasses that a method's state may contain, besides tensors, numbers, text, dicts, lists and tuples."""

_TAG = "__dataclass__"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or belongs to a run with other settings."""


def write(path: Path, content: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    """Write a checkpoint so that ``path`` holds the old one or the new one, whole, at every moment.

    See :func:`weingarten.atomic.replacing`.

    Args:
        path: the file; its folder is made if it does not exist.
        content: tensors and plain containers.
        settings: what a run that continues from it must have in common.

    Raises:
        OSError: if the folder cannot be written to.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save({"format": FORMAT, "settings": dict(settings), "content": dict(content)}, file)


def read(path: Path, settings: Mapping[str, str], device: torch.device) -> dict[str, Any]:
    """The content of a checkpoint.

    Args:
        path: the file.
        settings: of the run that wants to continue.
        device: where tensors go.

    Raises:
        CheckpointError: if the file is no whole checkpoint of this format, or was written under other settings;
            names the file, and each setting that differs as found against expected.
    """
    stored = io.BytesIO(path.read_bytes())
    try:
        found = torch.load(stored, map_location=device, weights_only=True)
        version, written, content = found["format"], found["settings"], found["content"]
    except Exception as error:  # torch.load raises some ten kinds for what is no checkpoint
        raise CheckpointError(
            f"checkpoint {path}: found no whole checkpoint ({type(error).__name__}), expected a file that solve wrote; "
            "remove it, or pass resume=False to start anew"
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint {path}: found format {version}, expected {FORMAT}; it is from another version of weingarten, "
            "pass resume=False to start anew"
        )
    names = [name for name in {**settings, **written} if settings.get(name) != written.get(name)]
    if names:
        differing = "; ".join(
            f"{name}: found {written.get(name)}, expected {settings.get(name)}" for name in names
        )
        raise CheckpointError(
            f"checkpoint {path} belongs to a run with other settings ({differing}); use these settings, another file, or "
            "resume=False to start anew"
        )
    return dict(content)


def encode(value: Any) -> Any:
    """A method's state as tensors and plain containers; operators, which can be made again, become None.

    Raises:
        TypeError: for anything that is not plain and not one of ``TYPES``.

    >>> encode(ImplicitState(age=2))["fields"]["age"]
    2
    """
    if isinstance(value, Tensor):
        value = value.detach()
        whole = value.numel() * value.element_size() == value.untyped_storage().nbytes()
        return value if whole else value.clone()  # a view would take its whole storage with it
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Operator):
        return None
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(encode(item) for item in value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if is_dataclass(value) and TYPES.get(type(value).__name__) is type(value):
        return {
            _TAG: type(value).__name__,
            "fields": {f.name: encode(getattr(value, f.name)) for f in fields(value)},
        }
    raise TypeError(
        f"checkpoint: the method's state holds a {type(value).__name__}, expected tensors, numbers, text and containers of them; "
        "let the method keep its state in these, or run without a checkpoint"
    )


def decode(value: Any) -> Any:
    """The inverse of :func:`encode`."""
    if isinstance(value, dict):
        if _TAG in value:
            return TYPES[value[_TAG]](**{name: decode(item) for name, item in value["fields"].items()})
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(decode(item) for item in value)
    return [decode(item) for item in value] if isinstance(value, list) else value


def describe(value: Any) -> str:
    """A text that is equal in every process for equal settings.

    >>> describe(lambda x: x)
    '<function <lambda>>'
    """
    if isinstance(value, nn.Module):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"<function {value.__qualname__}>"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
