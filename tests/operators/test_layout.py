"""How leaves lie in matrices: entry by entry against the definition, and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.cases import normal
from weingarten.operators import Layout
from weingarten.tree import Space

OUT, IN, KERNEL = 4, 6, (2, 3)


def entry(layout: Layout, leaf: torch.Tensor, group: int, row: int, column: int) -> torch.Tensor:
    """Entry of a weight's matrix, from the meaning of its axes."""
    kernel = leaf[0, 0].numel() if leaf.ndim > 2 else 1
    channel, tap = divmod(column, kernel)
    if layout.transposed:
        ins = leaf.shape[0] // layout.groups
        return leaf[group * ins + channel, row].reshape(-1)[tap]
    outs = leaf.shape[0] // layout.groups
    return leaf[group * outs + row, channel].reshape(-1)[tap]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(), (3,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("leaves", ["w", "b", "wb"])
def test_bias_as_last_column(groups, kernel, transposed, leaves):
    shape = (IN, OUT // groups, *kernel) if transposed else (OUT, IN // groups, *kernel)
    values = {"w": normal(*shape), "b": normal(OUT, seed=1)}
    values = {name: values[name] for name in leaves}
    layout = Layout(Space.of(values), groups=groups, transposed=transposed)
    matrix = layout.merge(values)
    columns = IN // groups * max(1, torch.Size(kernel).numel())
    assert matrix.shape == layout.shape
    assert layout.shape == (groups, OUT // groups, ("w" in leaves) * columns + ("b" in leaves))
    for g in range(groups):
        for row in range(OUT // groups):
            if "w" in leaves:
                for column in range(columns):
                    assert matrix[g, row, column] == entry(layout, values["w"], g, row, column)
            if "b" in leaves:
                assert matrix[g, row, -1] == values["b"][g * (OUT // groups) + row]
    torch.testing.assert_close(layout.split(matrix), values, rtol=0, atol=0)


@pytest.mark.parametrize("leaves", ["w", "b", "wb"])
def test_bias_as_last_row_of_a_head_stored_the_other_way_round(leaves):
    values = {"w": normal(5, 3), "b": normal(5, seed=1)}
    values = {name: values[name] for name in leaves}
    layout = Layout(Space.of(values), axis=1, transposed=True)
    expected = [values[name].mT if name == "w" else values[name][None] for name in leaves]
    assert torch.equal(layout.merge(values), torch.cat(expected)[None])
    assert layout.shape == (1, 3 * ("w" in leaves) + ("b" in leaves), 5)
    torch.testing.assert_close(layout.split(layout.merge(values)), values, rtol=0, atol=0)


def test_one_leaf_is_not_copied():
    table = normal(5, 3)
    for transposed in (False, True):
        layout = Layout(Space.of({"e": table}), transposed=transposed)
        assert layout.merge({"e": table}).data_ptr() == table.data_ptr()


@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_of_a_transposed_convolution_is_output_times_input_of_the_same_tap(groups):
    """With one input position, the output is the matrix, tap by tap, times the input channels."""
    layer = nn.ConvTranspose2d(IN, OUT, KERNEL, groups=groups).double()
    values = {name: p.detach() for name, p in layer.named_parameters()}
    layout = Layout(Space.of(values), groups=groups, transposed=True)
    x = normal(IN)
    z = functional.conv_transpose2d(x.reshape(1, IN, 1, 1), values["weight"], values["bias"], groups=groups)
    weight = layout.merge(values)[..., :-1].reshape(groups, OUT // groups, IN // groups, -1)
    found = torch.einsum("goik,gi->gok", weight, x.reshape(groups, -1)) + layout.merge(values)[..., -1:]
    torch.testing.assert_close(found.reshape(z.shape), z)


def test_types_and_shapes_return():
    space = Space.of({"w": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(2)})
    found = Layout(space).split(normal(1, 2, 4))
    assert {n: (x.dtype, x.shape) for n, x in found.items()} == {
        "w": (torch.bfloat16, (2, 3)),
        "b": (torch.float32, (2,)),
    }
