"""The table of operator rules: what each ATen operator does to the axes of its arguments.

What is not in the table frees every axis that it touches and is listed by ``explain_symmetry``.
"""

from __future__ import annotations

from torch import fx

from weingarten.symmetry.rules_contraction import (
    addmm,
    convolution,
    einsum,
    linear,
    matmul,
    sdpa,
    transposed_convolution,
)
from weingarten.symmetry.rules_norm import (
    batch_norm,
    group_norm,
    layer_norm,
    mixing,
    native_batch_norm,
    pool,
    reduce,
    reduce_with_position,
    rms_norm,
    slopes,
    softmax,
    triangle,
    vector_norm,
)
from weingarten.symmetry.rules_pointwise import ADD, ANY, KEEP, ODD, divide_by, multiply, pointwise, power
from weingarten.symmetry.rules_recurrent import cell, embedding, recurrent
from weingarten.symmetry.rules_shape import (
    concatenate,
    expand,
    gate,
    getitem,
    index,
    permute,
    repeat,
    repeat_interleave,
    same,
    select,
    slice_axis,
    split,
    squeeze,
    stack,
    unbind,
    unsqueeze,
    view,
)
from weingarten.symmetry.trace import Rule, Trace, Value
from weingarten.symmetry.trace_axes import Bound

__all__ = ["RULES"]


def constant(bound: Bound) -> Rule:
    """The rule of tensors whose entries are all equal: zero is fixed by rotations, others by permutations."""

    def rule(trace: Trace, node: fx.Node) -> Value:
        return trace.fresh(node, bound)

    return rule


def position(trace: Trace, node: fx.Node) -> Value:
    """Tensors that depend on positions only: nothing acts on them."""
    return trace.fresh(node)


def nothing(trace: Trace, node: fx.Node) -> Value:
    """Assertions about shapes and types."""
    return []


P, S, R = Bound.PERMUTATION, Bound.SIGNED, Bound.ROTATION
odd, anything, keep = pointwise(ODD), pointwise(ANY), pointwise(KEEP)

# fmt: off
RULES: dict[str, Rule] = {
    # constants
    "zeros": constant(R), "zeros_like": constant(R), "new_zeros": constant(R),
    "ones": constant(P), "ones_like": constant(P), "new_ones": constant(P),
    "full": constant(P), "full_like": constant(P), "new_full": constant(P), "scalar_tensor": constant(P),
    "arange": position, "eye": position, "linspace": position,
    # the same entries
    "clone": same, "contiguous": same, "detach": same, "alias": same, "_to_copy": same, "to": same, "dropout": same,
    "lift_fresh_copy": same, "type_as": same, "feature_dropout": same, "alpha_dropout": same,
    "_assert_tensor_metadata": nothing, "_assert_async": nothing, "getitem": getitem,
    # moving, merging, splitting and picking axes
    "permute": permute, "transpose": permute, "t": permute, "unsqueeze": unsqueeze, "squeeze": squeeze,
    "view": view, "reshape": view, "_unsafe_view": view, "unflatten": view, "flatten": view,
    "expand": expand, "expand_as": expand, "repeat": repeat, "repeat_interleave": repeat_interleave,
    "select": select, "unbind": unbind, "slice": slice_axis, "index": index,
    "split": split, "split_with_sizes": split, "chunk": split, "cat": concatenate, "stack": stack,
    # sums of products
    "linear": linear, "matmul": matmul, "mm": matmul, "bmm": matmul, "mv": matmul, "dot": matmul,
    "addmm": addmm, "baddbmm": addmm, "einsum": einsum, "scaled_dot_product_attention": sdpa,
    "conv1d": convolution, "conv2d": convolution, "conv3d": convolution,
    "conv_transpose1d": transposed_convolution, "conv_transpose2d": transposed_convolution,
    "conv_transpose3d": transposed_convolution,
    # entry by entry: odd functions let signs flip, others permute
    "neg": keep, "tanh": odd, "sin": odd, "asin": odd, "sinh": odd, "asinh": odd, "atan": odd, "erf": odd, "sign": odd,
    "relu": anything, "gelu": anything, "silu": anything, "sigmoid": anything, "softplus": anything, "elu": anything,
    "selu": anything, "celu": anything, "mish": anything, "leaky_relu": anything, "hardtanh": anything, "relu6": anything,
    "hardswish": anything, "hardsigmoid": anything, "log_sigmoid": anything, "exp": anything, "log": anything,
    "log1p": anything, "expm1": anything, "sqrt": anything, "rsqrt": anything, "reciprocal": anything, "abs": anything,
    "cos": anything, "clamp": anything, "clamp_min": anything, "clamp_max": anything, "threshold": anything,
    "prelu": slopes, "glu": gate,
    "maximum": anything, "minimum": anything, "where": anything, "masked_fill": anything, "isnan": anything,
    "eq": anything, "ne": anything, "lt": anything, "le": anything, "gt": anything, "ge": anything,
    "logical_not": anything, "logical_and": anything, "logical_or": anything, "bitwise_not": anything,
    "add": pointwise(ADD), "sub": pointwise(ADD), "rsub": pointwise(ADD),
    "mul": multiply, "div": divide_by, "pow": power, "square": power,
    # reductions and normalisations
    "sum": reduce(P, R), "mean": reduce(P, R), "amax": reduce(P, P), "amin": reduce(P, P), "logsumexp": reduce(P, P),
    "var": reduce(P, P), "std": reduce(P, P), "any": reduce(P, P), "all": reduce(P, P),
    "linalg_vector_norm": vector_norm,
    "max": reduce_with_position, "min": reduce_with_position,
    "softmax": softmax, "log_softmax": softmax, "_softmax": softmax, "_log_softmax": softmax,
    "layer_norm": layer_norm, "rms_norm": rms_norm, "group_norm": group_norm,
    "batch_norm": batch_norm, "_native_batch_norm_legit_no_training": native_batch_norm,
    "_native_batch_norm_legit": native_batch_norm,
    "instance_norm": batch_norm,
    # positions along an axis
    "cumsum": mixing(R), "cumprod": mixing(P), "flip": mixing(R), "tril": triangle, "triu": triangle,
    "roll": mixing(R, 2), "diff": mixing(P, 2),
    "avg_pool1d": pool(R), "avg_pool2d": pool(R), "avg_pool3d": pool(R), "adaptive_avg_pool1d": pool(R),
    "adaptive_avg_pool2d": pool(R), "_adaptive_avg_pool2d": pool(R), "adaptive_avg_pool3d": pool(R),
    "pad": pool(P), "constant_pad_nd": pool(P), "upsample_nearest2d": pool(R), "upsample_bilinear2d": pool(R),
    "max_pool1d": pool(P), "max_pool2d": pool(P), "max_pool3d": pool(P),
    # layers that are one operator
    "embedding": embedding,
    "rnn_tanh_cell": cell(1, S), "rnn_relu_cell": cell(1, P), "lstm_cell": cell(4, P), "gru_cell": cell(3, P),
    "rnn_tanh": recurrent(1, S), "rnn_relu": recurrent(1, P), "lstm": recurrent(4, P), "gru": recurrent(3, P),
}
# fmt: on
"""By name, without the prefix ``aten::``."""
