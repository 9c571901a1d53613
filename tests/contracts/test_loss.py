"""Every loss: its value against torch, its curvature, root and sampler against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import weingarten as wg
from tests.cases import LOSSES, generator, normal

CASES = [pytest.param(*case, id=name) for name, case in LOSSES.items()]


def value_by_torch(loss: wg.Loss, output: Tensor, target: Tensor) -> Tensor:
    if isinstance(loss, wg.CrossEntropy):
        options = {"ignore_index": loss.ignore_index, "label_smoothing": loss.label_smoothing}
        return functional.cross_entropy(output, target, **({} if target.is_floating_point() else options))
    if isinstance(loss, wg.MSE):
        return functional.mse_loss(output, target)
    assert isinstance(loss, wg.BinaryCrossEntropy)
    return functional.binary_cross_entropy_with_logits(output, target)


def hessians(loss: wg.Loss, output: Tensor, target: Tensor) -> list[Tensor]:
    """Each datum's Hessian of the unweighted sum of its elements, by automatic differentiation of the value."""
    found = []
    for n in range(len(output)):
        h = torch.autograd.functional.hessian(
            lambda z, n=n: loss.elements(z, target[n : n + 1]).sum(), output[n : n + 1]
        )
        found.append(h.reshape(output[0].numel(), output[0].numel()))
    return found


@pytest.mark.parametrize(("loss", "output", "target"), CASES)
class TestLoss:
    def test_mean_is_torchs(self, loss, output, target):
        torch.testing.assert_close(loss(output, target), value_by_torch(loss, output, target))

    def test_elements_sum_to_count_times_mean(self, loss, output, target):
        elements = loss.elements(output, target)
        assert elements.shape[0] == len(output)
        torch.testing.assert_close(elements.sum() / loss.count(target), value_by_torch(loss, output, target))

    def test_weights_multiply_data_and_leave_the_count(self, loss, output, target):
        weights = torch.arange(len(output), dtype=output.dtype)
        per_datum = [loss.elements(output[n : n + 1], target[n : n + 1]).sum() for n in range(len(output))]
        expected = sum(w * e for w, e in zip(weights, per_datum, strict=True)) / loss.count(target)
        torch.testing.assert_close(loss(output, target, weights), expected)
        torch.testing.assert_close(loss(output, target, torch.ones_like(weights)), loss(output, target))

    def test_curvature_is_the_hessian(self, loss, output, target):
        v = normal(*output.shape, seed=5)
        found = loss.curvature(output, target, v)
        for n, h in enumerate(hessians(loss, output, target)):
            torch.testing.assert_close(found[n].reshape(-1), h @ v[n].reshape(-1))

    def test_root_rebuilds_the_hessian_without_cross_terms(self, loss, output, target):
        chunks = list(loss.root(output, target))
        assert all(len(chunk) <= 64 for chunk in chunks)
        columns = torch.cat(chunks).reshape(-1, len(output), output[0].numel())  # (K, N, outputs)
        for n, h in enumerate(hessians(loss, output, target)):
            torch.testing.assert_close(columns[:, n].mT @ columns[:, n], h)

    def test_samples_have_the_hessian_as_second_moment_and_mean_zero(self, loss, output, target):
        g, repeats = generator(3), 4000
        big_output, big_target = (x[:1].repeat(repeats, *[1] * (x.ndim - 1)) for x in (output, target))
        drawn = loss.sample(big_output, big_target, g).reshape(repeats, -1)
        h = hessians(loss, output[:1], target[:1])[0]
        size = h.diagonal().max().clamp(min=0.02)
        moment = drawn.mT @ drawn / repeats
        assert (moment - h).abs().max() < 0.15 * size.clamp(min=0.3)
        assert drawn.mean(0).abs().max() < 6 * (size / repeats) ** 0.5

    def test_samples_repeat_with_the_generator(self, loss, output, target):
        before = torch.get_rng_state()
        first, second = (loss.sample(output, target, generator(1)) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(before, torch.get_rng_state())

    def test_gradient_is_autograds(self, loss, output, target):
        z = output.clone().requires_grad_()
        value_by_torch(loss, z, target).backward()
        with torch.no_grad():  # also where gradients are off
            torch.testing.assert_close(loss.gradient(output, target) / loss.count(target), z.grad)

    def test_bad_weights_are_refused(self, loss, output, target):
        good = torch.ones(len(output), dtype=output.dtype)
        with pytest.raises(ValueError, match=r"weights have shape \(1,\), expected"):
            loss(output, target, good[:1])
        for value in (-0.1, float("nan")):
            bad = good.clone()
            bad[1] = value
            with pytest.raises(ValueError, match="weight of datum 1 is"):
                loss(output, target, bad)


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (
            wg.CrossEntropy(),
            torch.zeros(4, 1, dtype=torch.long),
            r"target has shape \(4, 1\), expected \(4,\)",
        ),
        (wg.CrossEntropy(), torch.zeros(4), r"shape \(4,\), expected \(4, 3\) for soft labels"),
        (wg.CrossEntropy(), torch.zeros(4, dtype=torch.int32), "torch.int32"),
        (wg.CrossEntropy(label_smoothing=0.1), torch.zeros(4, 3), "label_smoothing"),
        (wg.MSE(), torch.zeros(4, 1), r"target has shape \(4, 1\), expected the output's \(4, 3\)"),
        (wg.BinaryCrossEntropy(), torch.zeros(4), "BinaryCrossEntropy: target has shape"),
    ],
)
def test_wrong_targets_are_refused_by_every_method(loss, target, message):
    output = torch.zeros(4, 3)
    for call in (
        lambda: loss.elements(output, target),
        lambda: loss.curvature(output, target, output),
        lambda: list(loss.root(output, target)),
        lambda: loss.sample(output, target, generator()),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_hyperparameters_are_checked():
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        wg.CrossEntropy(label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"expected \(N, C, ...\)"):
        wg.CrossEntropy()(torch.zeros(3), torch.zeros(3, dtype=torch.long))


def test_half_precision_samples_rare_classes():
    output = torch.zeros(2000, 300, dtype=torch.bfloat16)
    drawn = wg.CrossEntropy().sample(output, torch.zeros(2000, dtype=torch.long), generator())
    assert len((drawn < -0.5).nonzero()[:, 1].unique()) > 290
