"""Find the layers of a model, and see their inputs and output gradients without touching the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weingarten.layers.rule import LayerRule
from weingarten.objective import Batch, Objective, curvature_pass, graph_nodes
from weingarten.operators import Layout
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Block", "Capture", "LayerError", "capture", "find_blocks"]


class LayerError(ValueError):
    """A model whose layers cannot be treated one by one, each called once with the data dimension first."""


@dataclass(frozen=True)
class Block:
    """One layer with its rule and the layout of its trainable parameters."""

    name: str
    module: nn.Module
    rule: LayerRule
    layout: Layout

    def leaves(self, params: TreeLike) -> Tree:
        """The block's parameters by their local names."""
        return {name.rpartition(".")[2]: params[name] for name in self.layout.space.shapes}


def find_blocks(
    model: nn.Module, params: TreeLike, rules: Sequence[LayerRule]
) -> tuple[list[Block], dict[str, str]]:
    """Blocks for the layers that a rule speaks for, and the parameters left over, each with the reason.

    Raises:
        ValueError: if a parameter of ``params`` does not exist in the model.
        LayerError: if one is shared by two layers (tied weights).
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    names = {alias: group for group in owners.values() for alias in group}
    for name in params:
        if name not in names:
            raise ValueError(
                f"KFAC: parameter {name!r} does not exist in the model, expected one of its named_parameters()"
            )
        if len(names[name]) > 1:
            raise LayerError(
                f"KFAC: parameter {name!r} is tied, it appears as {names[name]}; a Kronecker factorisation of one use "
                "would be wrong. Untie or freeze it, or use wg.GGN or wg.Diagonal, which treat tied weights exactly"
            )
    table = {kind: rule for rule in reversed(rules) for kind in rule.types}
    blocks: list[Block] = []
    leftover: dict[str, str] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        local = {
            prefix + name: params[prefix + name]
            for name, _ in module.named_parameters(recurse=False)
            if prefix + name in params
        }
        if not local:
            continue
        rule = table.get(type(module))
        strange = [name for name in local if name.removeprefix(prefix) not in ("weight", "bias")]
        if rule is None:
            reason: str | None = f"no rule for a layer of type {type(module).__name__}"
        elif strange:  # torch.nn.utils.weight_norm, say
            reason = f"a {type(module).__name__} has no parameters {strange}"
        else:
            reason = rule.refuse(module)
        if rule is None or reason is not None:
            leftover |= dict.fromkeys(local, str(reason))
        else:
            blocks.append(Block(module_name, module, rule, rule.layout(module, Space.of(local))))
    return blocks, leftover


@dataclass
class Capture:
    """One forward pass: the model's output, and each block's input and output."""

    output: Tensor
    seen: dict[str, tuple[Tensor, Tensor]]

    def gradients(self, columns: Tensor, last: bool) -> dict[str, Tensor]:
        """Gradients of each block's output for output gradients ``(K, *output.shape)``, as ``(K, *block_output.shape)``.

        Args:
            columns: the output gradients; several go through one batched backward pass.
            last: whether the graph may be freed.

        Raises:
            LayerError: if a block's output does not reach the model's output.
        """
        targets = [z for _, z in self.seen.values()]
        batched = len(columns) > 1
        if not self.output.requires_grad:
            raise LayerError(
                "KFAC: the model's output does not depend on any layer; does it run under torch.no_grad or detach?"
            )
        found = torch.autograd.grad(
            self.output,
            targets,
            columns if batched else columns[0],
            retain_graph=not last,
            allow_unused=True,
            is_grads_batched=batched,
        )
        for name, g in zip(self.seen, found, strict=True):
            if g is None:
                raise LayerError(
                    f"KFAC: the output of layer {name!r} does not reach the model's output; freeze its parameters"
                )
        return {name: g if batched else g.unsqueeze(0) for name, g in zip(self.seen, found, strict=True)}


@contextmanager
def capture(
    objective: Objective, params: TreeLike, batch: Batch, blocks: Sequence[Block]
) -> Iterator[Capture]:
    """Run the model once with hooks on the blocks; hooks, modes and the model's parameters are as before on every exit.

    Raises:
        LayerError: if a layer is called twice or never, does not have the data dimension first, has its input overwritten
            afterwards, or if its parameters are also used outside of it.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    versions: dict[str, int] = {}
    data = len(batch.targets)
    with ExitStack() as stack:
        stack.enter_context(curvature_pass(objective.model))
        stack.enter_context(torch.enable_grad())
        with ExitStack() as hooks:  # gone when the caller runs the model again
            for block in blocks:
                handle = block.module.register_forward_hook(
                    _recorder(block.name, seen, versions, data), with_kwargs=True
                )
                hooks.callback(handle.remove)
            output = objective.forward(leaves, batch.inputs)
        missing = [block.name for block in blocks if block.name not in seen]
        if missing:
            raise LayerError(
                f"KFAC: layer {missing[0]!r} was not called in the forward pass; freeze its parameters, or treat them with "
                "otherwise=Diagonal()"
            )
        for name, (x, _) in seen.items():
            if not x.is_inference() and x._version != versions[name]:
                raise LayerError(
                    f"KFAC: the input of layer {name!r} is overwritten in place after the layer; use an out-of-place operation"
                )
        _check_single_use(
            output, {name: leaves[name] for block in blocks for name in block.layout.space.shapes}
        )
        yield Capture(output, seen)


def _check_single_use(output: Tensor, leaves: Tree) -> None:
    """Refuse parameters that enter the graph more than once: a layer's weight that is also used outside of the layer."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    uses: dict[str, int] = {}
    for node in graph_nodes(output):
        for following, _ in node.next_functions:
            name = names.get(id(getattr(following, "variable", None)))
            if name is not None:
                uses[name] = uses.get(name, 0) + 1
    for name, number in uses.items():
        if number > 1:
            raise LayerError(
                f"KFAC: parameter {name!r} is tied, it is used {number} times in a forward pass; a Kronecker factorisation "
                "of one use would be wrong. Freeze it, or use wg.GGN or wg.Diagonal, which treat tied weights exactly"
            )


def _recorder(name: str, seen: dict[str, tuple[Tensor, Tensor]], versions: dict[str, int], data: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if name in seen:
            raise LayerError(
                f"KFAC: layer {name!r} is called more than once in a forward pass, so its block is no single Kronecker product; "
                "use wg.GGN or wg.Diagonal, or copy the layer"
            )
        if (x.ndim < 2 and not isinstance(module, nn.Embedding)) or len(x) != data:
            raise LayerError(
                f"KFAC: the input of layer {name!r} has shape {tuple(x.shape)}, expected the data dimension of size {data} first"
            )
        versions[name] = 0 if x.is_inference() else x._version
        recorded = output if output.requires_grad else output.detach().requires_grad_()
        seen[name] = (x.detach(), recorded)
        return recorded.clone()  # an in-place activation may then overwrite the copy, not the record

    return hook
