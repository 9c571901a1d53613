"""Weights that belong to a loss: how they are kept, and which weights of data they equal."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import weingarten as wg
from tests.cases import normal


def test_weights_are_kept_as_numbers():
    """Whatever they came as, so that equal losses compare and hash equal, and a copy to another device needs nothing."""
    given = torch.tensor([0.1, 2.0])
    loss = wg.CrossEntropy(weight=given)
    assert loss.weight == tuple(given.tolist())
    assert loss == wg.CrossEntropy(weight=tuple(given.tolist())) != wg.CrossEntropy(weight=[0.2, 2.0])
    given.zero_()
    assert loss.weight[1] == 2
    assert wg.BinaryCrossEntropy(weight=[[1.0], [2.0]]).weight == ((1.0,), (2.0,))
    assert wg.BinaryCrossEntropy(pos_weight=torch.tensor(3)).pos_weight == 3


def test_class_weights_are_weights_of_data_except_in_the_mean():
    weight = torch.tensor([0.5, 2.0, 0.7], dtype=torch.float64)
    output, target = normal(5, 3), torch.tensor([0, 1, -100, 2, 1])
    loss, plain = wg.CrossEntropy(weight=weight), wg.CrossEntropy()
    data = loss.datum_weights(target)
    torch.testing.assert_close(data, weight[[0, 1, 0, 2, 1]] * (target >= 0), rtol=0, atol=0)
    torch.testing.assert_close(loss.total(output, target), plain.total(output, target, data))
    v = normal(5, 3, seed=2)
    torch.testing.assert_close(
        loss.curvature(output, target, v), data[:, None] * plain.curvature(output, target, v)
    )
    assert loss.count(target) == pytest.approx(float(data.sum()))
    assert plain.datum_weights(target).tolist() == [1, 1, 0, 1, 1]
    assert plain.datum_weights(target.clamp(min=0)) is None
    assert wg.MSE().datum_weights(output) is None
    assert wg.BinaryCrossEntropy().datum_weights(output.sigmoid()) is None


@pytest.mark.parametrize("loss", [wg.CrossEntropy(weight=[1.0, 1.0]), wg.CrossEntropy(weight=[0.0, 1.0])])
def test_nothing_to_average_is_a_loss_of_zero(loss):
    output = torch.ones(2, 2)
    target = torch.full((2,), -100 if loss.weight[0] else 0)
    assert loss.count(target) == 0
    assert float(loss(output, target)) == 0
    assert loss.datum_weights(target).tolist() == [0, 0]


def test_class_weights_that_sum_to_less_than_one_still_divide():
    output, target, weight = normal(2, 3), torch.tensor([0, 1]), torch.tensor([0.1, 0.2, 0.3]).double()
    expected = functional.cross_entropy(output, target, weight)
    torch.testing.assert_close(wg.CrossEntropy(weight)(output, target), expected)


def test_soft_labels_have_no_ignored_class():
    output, target = normal(2, 3), normal(2, 3, seed=1).softmax(1)
    expected = functional.cross_entropy(output, target)
    torch.testing.assert_close(wg.CrossEntropy(ignore_index=1)(output, target), expected)


def test_soft_labels_can_be_learned():
    """The value has a gradient in soft labels; columns and weights have none."""
    output, target = normal(3, 2), normal(3, 2, seed=1).softmax(1).requires_grad_()
    loss = wg.CrossEntropy(weight=[0.5, 2.0], label_smoothing=0.1)
    (found,) = torch.autograd.grad(loss.total(output, target), target)
    expected = -0.9 * torch.tensor([0.5, 2.0], dtype=torch.float64) * output.log_softmax(1)
    torch.testing.assert_close(found, expected)
    assert not loss.curvature(output, target, output).requires_grad
    assert not loss.datum_weights(target).requires_grad
