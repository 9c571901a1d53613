"""``nn.MultiheadAttention``, whose projections PyTorch computes inside of one function."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional

__all__ = ["attention"]


def attention(*args: Any, **kwargs: Any) -> Any:
    """``torch.nn.functional.multi_head_attention_forward`` with its projections visible as calls of ``functional.linear``."""
    return _VISIBLE(*args, **kwargs)


def _packed_projection(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None = None
) -> list[Tensor]:
    """Query, key and value by the whole packed weight, once for each different input; the parts not taken have no gradient."""
    different: dict[int, Tensor] = {}
    for x in (query, key, value):
        if id(x) not in different:
            different[id(x)] = functional.linear(x, weight, bias)
    taken = (different[id(x)].chunk(3, dim=-1)[i] for i, x in enumerate((query, key, value)))
    return [part.contiguous() for part in taken]


def _separate_projection(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight_query: Tensor,
    weight_key: Tensor,
    weight_value: Tensor,
    *biases: Tensor | None,
) -> list[Tensor]:
    """Query, key and value by weights of their own; the biases, thirds of one leaf, are added apart."""
    weights = (weight_query, weight_key, weight_value)
    products = [functional.linear(x, w) for x, w in zip((query, key, value), weights, strict=True)]
    return [z if b is None else z + b for z, b in zip(products, biases, strict=True)]


def _visible(function: Any) -> Any:
    """The function as PyTorch wrote it, but run under an active ``TorchFunctionMode`` instead of handed to it as a whole."""
    seen = {
        **function.__globals__,
        "has_torch_function": lambda tensors: False,
        "_in_projection_packed": _packed_projection,
        "_in_projection": _separate_projection,
    }
    copy = FunctionType(
        function.__code__, seen, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_VISIBLE = _visible(functional.multi_head_attention_forward)
