"""Parameters by name, and saved states by parameter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weingarten.optim.moment import State
from weingarten.optim.routes import Route, state_like, unwrapped
from weingarten.optim.scaling import Scaling
from weingarten.tree import Tree, TreeLike

__all__ = [
    "check_state",
    "dense_gradients",
    "named_groups",
    "not_finite",
    "restored",
    "saved_by_name",
    "tied_names",
]

_COMPILED = "_orig_mod."  # what torch.compile puts into names


def named_groups(params: Any) -> list[dict[str, Any]]:
    """Parameter groups with ``params`` a list of (name, tensor), from a model, named parameters, or groups of them.

    Raises:
        ValueError: if there is none, one has no name, or two names or two groups share a tensor.
    """
    if isinstance(params, nn.Module):
        params = [(name, p) for name, p in unwrapped(params).named_parameters() if p.requires_grad]
    items = list(params)
    groups = [dict(item) for item in items] if items and isinstance(items[0], dict) else [{"params": items}]
    owners: dict[int, str] = {}
    names: set[str] = set()
    for group in groups:
        group["params"] = list(group["params"])
        for item in group["params"]:
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
                raise ValueError(
                    f"Symo: found a parameter {type(item).__name__} without a name; pass the model or model.named_parameters(), "
                    'in groups as {"params": [(name, tensor), ...]}'
                )
            name, p = item[0].removeprefix(_COMPILED), item[1]
            if id(p) in owners or name in names:
                raise ValueError(
                    f"Symo: {name!r} is given twice, or is tied to {owners.get(id(p), name)!r}; pass every tensor once"
                )
            owners[id(p)] = name
            names.add(name)
        group["params"] = [(name.removeprefix(_COMPILED), p) for name, p in group["params"]]
    if not owners:
        raise ValueError(
            "Symo: no parameter that requires a gradient; pass a model with trainable parameters"
        )
    return groups


def tied_names(params: Any) -> dict[str, list[str]]:
    """The other names of parameters that a model uses under several."""
    if not isinstance(params, nn.Module):
        return {}
    names: dict[int, list[str]] = {}
    for name, p in unwrapped(params).named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {first: others for first, *others in names.values() if others}


def saved_by_name(state_dict: Mapping[str, Any], names: Sequence[str]) -> dict[str, State]:
    """The states in a ``state_dict``, of the parameters that have one.

    Raises:
        ValueError: if it was saved with other parameters.
    """
    groups = state_dict["param_groups"]
    ids = [i for group in groups for i in group["params"]]
    saved = [name for group in groups for name in group.get("param_names", ())]
    if [name.replace(_COMPILED, "") for name in saved] != [name.replace(_COMPILED, "") for name in names]:
        raise ValueError(
            f"Symo.load_state_dict: the state is of the parameters {saved}, expected {list(names)} in this order"
        )
    state = state_dict["state"]
    return {name: state[i] for i, name in zip(ids, names, strict=True) if i in state}


def check_state(
    saved: Mapping[str, State], routes: Iterable[Route], shapes: Mapping[str, torch.Size], scaling: Scaling
) -> None:
    """Whether saved states are of these routes; ``scaling``: by which blocks may keep Adam's second moments.

    Raises:
        ValueError: with the parameter and the entries that differ.
    """
    for route in routes:
        for name in route.leaves:
            if name not in saved:
                continue
            expected: dict[str, Any] = {"momentum": shapes[name]}
            if route.needs_squares(scaling):
                expected["square"] = shapes[name]
            if name == route.leaves[0]:
                numbers = dict.fromkeys(("step", "momentum_weight", "square_weight"), 0)
                expected |= {key: _shape(value) for key, value in (numbers | route.moment.init()).items()}
            found = {key: _shape(value) for key, value in saved[name].items()}
            if found != expected:
                differ = sorted(
                    key for key in {*found, *expected} if found.get(key, 0) != expected.get(key, 0)
                )
                raise ValueError(
                    f"Symo.load_state_dict: the state of {name!r} has other {differ}; construct Symo with the symmetry, "
                    "max_block and scaling that it was saved with"
                )


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def restored(state: State, device: torch.device) -> State:
    """A copy on a device, in the types it was saved in."""
    return {
        key: value.to(device, copy=True) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def dense_gradients(params: Mapping[str, Tensor], seen: Collection[Tensor]) -> Tree:
    """Gradients in the type of the state, of the parameters that have one.

    Args:
        params: by name.
        seen: those that have had a gradient before.

    Raises:
        ValueError: for a gradient that is sparse or complex, and for a parameter that has never had one.
    """
    found: Tree = {}
    for name, p in params.items():
        if p.grad is None:
            continue
        if p.grad.is_sparse or p.grad.is_complex():
            raise ValueError(
                f"Symo.step: the gradient of {name!r} is sparse or complex, expected a dense real one"
            )
        found[name] = p.grad.to(state_like(p).dtype)
    unused = [name for name, p in params.items() if name not in found and p not in seen]
    if unused:
        raise ValueError(
            f"Symo.step: {unused} have never had a gradient; call backward first, and freeze or leave out parameters that "
            "the loss does not use"
        )
    return found


def not_finite(gradients: TreeLike) -> list[str]:
    """Names of the gradients that are NaN or infinite, or whose squares overflow."""
    if not gradients:
        return []
    norms = torch._foreach_norm(list(gradients.values()))
    sound = torch.stack([norm.square().isfinite().to(norms[0].device) for norm in norms])
    if bool(sound.all()):
        return []
    return [name for name, fine in zip(gradients, sound.tolist(), strict=True) if not fine]
