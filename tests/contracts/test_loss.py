"""Every loss: its value against torch, its curvature, root and sampler against automatic differentiation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import weingarten as wg
from tests.cases import LOSSES, generator, normal

CASES = [pytest.param(*case, id=name) for name, case in LOSSES.items()]


def value_by_torch(loss: wg.Loss, output: Tensor, target: Tensor) -> Tensor:
    if isinstance(loss, wg.CrossEntropy):
        ignored = {} if target.is_floating_point() else {"ignore_index": loss.ignore_index}
        return functional.cross_entropy(
            output,
            target,
            weight(loss.weight),
            label_smoothing=loss.label_smoothing,
            reduction=loss.reduction,
            **ignored,
        )
    if isinstance(loss, wg.MSE):
        return functional.mse_loss(output, target, reduction=loss.reduction)
    assert isinstance(loss, wg.BinaryCrossEntropy)
    return functional.binary_cross_entropy_with_logits(
        output,
        target,
        weight=weight(loss.weight),
        pos_weight=weight(loss.pos_weight),
        reduction=loss.reduction,
    )


def weight(value) -> Tensor | None:
    return None if value is None else torch.tensor(value, dtype=torch.float64)


def hessians(loss: wg.Loss, output: Tensor, target: Tensor) -> list[Tensor]:
    """Each datum's Hessian of the unweighted sum of its elements, by automatic differentiation of the value."""
    found = []
    for n in range(len(output)):
        h = torch.autograd.functional.hessian(
            lambda z, n=n: loss.elements(z, target[n : n + 1]).sum(), output[n : n + 1]
        )
        found.append(h.reshape(output[0].numel(), output[0].numel()))
    return found


def outcomes(loss: wg.Loss, output: Tensor, monkeypatch) -> Iterator[float]:
    """Makes torch draw each outcome of one datum in turn, and yields its probability; sigma points stand for the normal ones."""
    size = output[0].numel()
    if isinstance(loss, wg.MSE):
        for k, sign in product(range(size), (-1, 1)):
            point = torch.zeros(size, dtype=output.dtype)
            point[k] = sign * size**0.5  # with these probabilities, of mean zero and covariance I
            monkeypatch.setattr(torch, "randn", lambda shape, point=point, **_: point.reshape(shape))
            yield 1 / (2 * size)
        return
    if isinstance(loss, wg.CrossEntropy):
        name, p = "multinomial", output[0].reshape(output.shape[1], -1).mT.softmax(1)
    else:
        name, p = "bernoulli", torch.stack([1 - output.sigmoid(), output.sigmoid()], -1).reshape(size, 2)
    for labels in product(range(p.shape[1]), repeat=len(p)):

        def drawn(asked, *_, generator, labels=labels):
            expected = p if name == "multinomial" else p[:, 1].reshape(output.shape)
            torch.testing.assert_close(asked.double(), expected, rtol=1e-6, atol=1e-6)
            shape = (-1, 1) if name == "multinomial" else output.shape
            return torch.tensor(labels).to(int if name == "multinomial" else asked.dtype).reshape(shape)

        monkeypatch.setattr(torch, name, drawn)
        yield prod(float(row[label]) for row, label in zip(p, labels, strict=True))


@pytest.mark.parametrize(("loss", "output", "target"), CASES)
class TestLoss:
    def test_value_is_torchs(self, loss, output, target):
        torch.testing.assert_close(loss(output, target), value_by_torch(loss, output, target))

    def test_elements_sum_to_divisor_times_value(self, loss, output, target):
        elements = loss.elements(output, target)
        assert elements.shape[0] == len(output)
        divisor = loss.divisor(loss.count(target))
        torch.testing.assert_close(elements.sum() / divisor, value_by_torch(loss, output, target))

    def test_count_is_what_torchs_mean_divides_by(self, loss, output, target):
        mean, total = (value_by_torch(replace(loss, reduction=r), output, target) for r in ("mean", "sum"))
        assert loss.count(target) == pytest.approx(float(total / mean), rel=1e-12)
        assert isinstance(
            loss.count(target), float if getattr(loss, "weight", None) and target.dtype == torch.long else int
        )
        assert replace(loss, reduction="mean").divisor(3.5) == 3.5
        assert replace(loss, reduction="sum").divisor(3.5) == 1
        assert loss.divisor(0) == 1

    def test_weights_multiply_data_and_leave_the_count(self, loss, output, target):
        weights = torch.arange(len(output), dtype=output.dtype)
        per_datum = [loss.elements(output[n : n + 1], target[n : n + 1]).sum() for n in range(len(output))]
        expected = sum(w * e for w, e in zip(weights, per_datum, strict=True))
        expected = expected / loss.divisor(loss.count(target))
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

    def test_samples_have_the_hessian_as_second_moment_and_mean_zero(self, loss, output, target, monkeypatch):
        """In exact expectation: over every outcome of the draw, times its probability."""
        for n, h in enumerate(hessians(loss, output, target)):
            one, label, whole = output[n : n + 1], target[n : n + 1], 0.0
            mean, moment = torch.zeros(len(h), dtype=h.dtype), torch.zeros_like(h)
            for probability in outcomes(loss, one, monkeypatch):
                drawn = loss.sample(one, label, generator()).reshape(-1)
                whole += probability
                mean += probability * drawn
                moment += probability * torch.outer(drawn, drawn)
            monkeypatch.undo()
            assert whole == pytest.approx(1)
            torch.testing.assert_close(moment, h)
            torch.testing.assert_close(mean, torch.zeros_like(mean))

    def test_datum_weights_are_what_labels_put_before_the_hessian(self, loss, output, target):
        """The ratio to the Hessian at a label that weighs one, averaged over the valid elements of a datum."""
        by_class = isinstance(loss, wg.CrossEntropy)
        expected = []
        for n in range(len(output)):
            z, y = output[n : n + 1], target[n : n + 1]
            one = torch.zeros_like(z[:, 0], dtype=torch.long) if by_class else torch.zeros_like(y)
            weighed, unit = (
                hessians(kind, z, t)[0].diagonal().reshape(z[0].shape)
                for kind, t in ((loss, y), (type(loss)(), one))
            )
            ratio = (weighed / unit)[0] if by_class else weighed / unit
            valid = torch.ones_like(ratio, dtype=torch.bool)
            if not y.is_floating_point():
                valid = y[0] != loss.ignore_index
            expected.append(ratio[valid].sum() / valid.sum().clamp(min=1))
        found = loss.datum_weights(target)
        found = torch.ones(len(output), dtype=torch.float64) if found is None else found
        torch.testing.assert_close(found, torch.stack(expected))

    def test_samples_repeat_with_the_generator(self, loss, output, target):
        before = torch.get_rng_state()
        first, second = (loss.sample(output, target, generator(1)) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(before, torch.get_rng_state())

    def test_gradient_is_autograds(self, loss, output, target):
        z = output.clone().requires_grad_()
        value_by_torch(loss, z, target).backward()
        with torch.no_grad():  # also where gradients are off
            divisor = loss.divisor(loss.count(target))
            torch.testing.assert_close(loss.gradient(output, target) / divisor, z.grad)

    def test_equal_settings_are_equal_losses(self, loss, output, target):
        again = replace(loss)
        assert again == loss
        assert len({again, loss, replace(loss, reduction="sum"), replace(loss, reduction="mean")}) == 2

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_float32_at_the_same_logits(self, loss, output, target, dtype):
        """Every method, with results rounded once; labels of floating type are rounded like the output."""
        half = output.to(dtype)
        label, wide = (
            (target.to(dtype), target.to(dtype).float()) if target.is_floating_point() else (target,) * 2
        )
        elements = loss.elements(half, label)
        assert elements.dtype == torch.float32
        torch.testing.assert_close(elements, loss.elements(half.float(), wide))
        v = normal(*output.shape, seed=5).to(dtype)
        calls = {
            "curvature": lambda z, y: loss.curvature(z, y, v.to(z.dtype)),
            "root": lambda z, y: torch.cat(list(loss.root(z, y))),
            "sample": lambda z, y: loss.sample(z, y, generator()),
            "gradient": loss.gradient,
        }
        for call in calls.values():
            found = call(half, label)
            assert found.dtype == dtype
            torch.testing.assert_close(found, call(half.float(), wide).to(dtype), rtol=0, atol=0)

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
        (
            wg.CrossEntropy(weight=[1.0, 2.0]),
            torch.zeros(4, dtype=torch.long),
            "weight has 2 entries, expected 3, one per class",
        ),
        (
            wg.BinaryCrossEntropy(weight=[1.0, 2.0]),
            torch.zeros(4, 3),
            r"weight has shape \(2,\), expected one that broadcasts to \(1, 3\)",
        ),
        (
            wg.BinaryCrossEntropy(pos_weight=[[1.0], [2.0], [3.0], [4.0]]),
            torch.zeros(4, 3),
            r"pos_weight has shape \(4, 1\).*pass weights that differ between data with the batch",
        ),
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wg.CrossEntropy(label_smoothing=1.0), "label_smoothing is 1"),
        (
            lambda: wg.CrossEntropy(reduction="none"),
            "CrossEntropy: reduction is 'none', expected 'mean' or 'sum'",
        ),
        (lambda: wg.MSE(reduction="average"), "MSE: reduction is 'average'"),
        (lambda: wg.BinaryCrossEntropy(reduction=None), "BinaryCrossEntropy: reduction is None"),
        (
            lambda: wg.CrossEntropy(weight=[1.0, -0.5]),
            r"CrossEntropy: weight is \[1.0, -0.5\], expected finite numbers >= 0",
        ),
        (lambda: wg.CrossEntropy(weight=torch.tensor([1.0, torch.nan])), "expected finite numbers >= 0"),
        (lambda: wg.CrossEntropy(weight=[1.0, torch.inf]), "expected finite numbers >= 0"),
        (lambda: wg.CrossEntropy(weight=[[1.0, 2.0]]), r"expected one number per class, of shape \(C,\)"),
        (lambda: wg.CrossEntropy(weight=2.0), r"expected one number per class, of shape \(C,\)"),
        (lambda: wg.CrossEntropy(weight=[]), r"expected one number per class, of shape \(C,\)"),
        (lambda: wg.CrossEntropy(weight=torch.ones(2, requires_grad=True)), "weight requires a gradient"),
        (lambda: wg.BinaryCrossEntropy(weight=-1.0), "BinaryCrossEntropy: weight is -1.0"),
        (lambda: wg.BinaryCrossEntropy(pos_weight=[torch.nan]), "BinaryCrossEntropy: pos_weight is"),
        (
            lambda: wg.CrossEntropy()(torch.zeros(3), torch.zeros(3, dtype=torch.long)),
            r"expected \(N, C, ...\)",
        ),
        (
            lambda: wg.CrossEntropy(weight=[1.0, 2.0]).count(torch.tensor([0, 2])),
            "found labels from 0 to 2, expected 0 to 1",
        ),
    ],
)
def test_hyperparameters_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_half_precision_samples_rare_classes():
    output = torch.zeros(2000, 300, dtype=torch.bfloat16)
    drawn = wg.CrossEntropy().sample(output, torch.zeros(2000, dtype=torch.long), generator())
    assert len((drawn < -0.5).nonzero()[:, 1].unique()) > 290
