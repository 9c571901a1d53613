"""Warped images against turns and shifts known otherwise; the ranges' hypergradient against differences."""

import pytest
import torch
from torch import nn

import weingarten as wg
from weingarten.applications.problems import AugmentationRange, Jittered
from weingarten.applications.problems.augmentation_range import TRANSFORMS, warp
from weingarten.bilevel.resolve import Level64, minimise


def images(n=6, size=5, seed=0):
    return torch.rand(n, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by(**amounts):
    """Arguments of ``warp`` for six images."""
    return [torch.full((6,), float(amounts.get(name, 0.0)), dtype=torch.float64) for name in TRANSFORMS]


def test_whole_shifts_and_quarter_turns_move_pixels():
    x = images()
    assert torch.allclose(warp(x, *by()), x)
    shifted = warp(x, *by(down=2, right=-1))
    assert torch.allclose(shifted[:, 2:, :-1], x[:, :-2, 1:])
    assert (shifted[:, :2] == 0).all()
    assert (shifted[:, :, -1] == 0).all()
    turned = warp(x, *by(rotation=torch.pi / 2))
    assert torch.allclose(turned, torch.rot90(x, 1, (1, 2)), atol=1e-12)  # from down towards right
    assert torch.allclose(warp(x, *by(scale=torch.tensor(2.0).log()))[:, ::2, ::2], x[:, 1:4, 1:4])


def test_half_shift_is_the_mean_of_neighbours():
    x = images()
    assert torch.allclose(warp(x, *by(right=0.5))[:, :, 1:], (x[:, :, 1:] + x[:, :, :-1]) / 2)


def test_agrees_with_torchs_grid_sample():
    x = images()
    rotation, scale, down, right = by(rotation=0.3, scale=0.2, down=0.7, right=-0.4)
    c, s = rotation.cos() * (-scale).exp(), rotation.sin() * (-scale).exp()
    half = 2.0  # from the centre to the outermost pixel's centre
    rows = torch.stack([c, -s, (-c * right + s * down) / half, s, c, (-s * right - c * down) / half], 1)
    grid = nn.functional.affine_grid(rows.reshape(6, 2, 3), (6, 1, 5, 5), align_corners=True)
    expected = nn.functional.grid_sample(x[:, None], grid, align_corners=True)[:, 0]
    assert torch.allclose(warp(x, rotation, scale, down, right), expected, atol=1e-12)


def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    task = AugmentationRange(model, ranges=(0.2, 0.1, 0.7, 0.9), decay=0.05)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    train = Jittered(wg.Rows(images(size=4), labels)).draw(torch.Generator().manual_seed(1))
    return task, train, wg.Batch(images(size=4, seed=2), labels)


def test_hypergradient_is_the_derivative_of_the_held_out_loss_at_the_minimum():
    task, train, held = problem()
    levels, hparams = task.problem(), task.start()
    start = {name: p.clone() for name, p in levels.inner.objective.params().items()}
    params = minimise(Level64(levels.inner, train), start, hparams, 1e-11, 300)
    exact = wg.Implicit(wg.Hessian, wg.Direct(), None, damping=0.0)
    found = exact(levels, params, hparams, wg.Batches(held, train)).value
    along, ends = dict(zip(TRANSFORMS, (1.0, -0.7, 0.5, -0.3), strict=True)), []
    for sign in (1, -1):
        moved = {name: h + sign * 1e-5 * along[name] for name, h in hparams.items()}
        reached = minimise(Level64(levels.inner, train), dict(params), moved, 1e-12, 300)
        ends.append(float(levels.outer.value(reached, moved, held)))
    slope = sum(along[name] * float(found[name]) for name in TRANSFORMS)
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3)


def test_noise_is_drawn_with_the_batch_and_repeats():
    task, train, _ = problem()
    assert train.inputs[1].abs().max() <= 1
    again = Jittered(wg.Rows(images(size=4), train.targets)).draw(torch.Generator().manual_seed(1))
    assert torch.equal(again.inputs[1], train.inputs[1])
    assert not torch.equal(task.problem().inner.transform(task.start(), train).inputs, images(size=4))


def test_mistakes_are_refused():
    task, _, held = problem()
    with pytest.raises(TypeError, match=r"found inputs of type Tensor, expected a pair"):
        task.augmented(task.start(), held)
    with pytest.raises(ValueError, match="expected four positive numbers"):
        AugmentationRange(task.model, ranges=(0.1, 0.0, 1.0, 1.0))
