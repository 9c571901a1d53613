import pytest
import torch

from weingarten.applications.clean import Noise, UserError

TRUTH = torch.arange(1000) % 10
FEATURES = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))


def noisy(text, seed=0):
    return Noise.parse(text).apply(TRUTH, FEATURES, 10, seed)


def test_pair_moves_the_exact_fraction_to_the_next_class():
    given = noisy("pair:0.45")
    moved = given != TRUTH
    assert int(moved.sum()) == 450
    assert torch.equal(given[moved], (TRUTH[moved] + 1) % 10)


def test_symmetric_reaches_every_other_class_alike():
    given = noisy("symmetric:0.5")
    moved = given != TRUTH
    assert int(moved.sum()) == 500
    steps = torch.bincount((given - TRUTH)[moved] % 10, minlength=10)
    assert steps[0] == 0
    assert steps[1:].min() > 30  # 55.6 expected in each of nine, standard deviation 7
    assert steps[1:].max() < 85


def test_feature_moves_the_largest_means_of_each_class():
    given = noisy("feature:0.3")
    moved, means = given != TRUTH, FEATURES.mean(1)
    for c in range(10):
        rows = c == TRUTH
        assert int(moved[rows].sum()) == 30
        assert means[rows & moved].min() > means[rows & ~moved].max()


@pytest.mark.parametrize("text", ["pair:0.3", "symmetric:0.3"])
def test_seed_decides(text):
    assert torch.equal(noisy(text, 1), noisy(text, 1))
    assert not torch.equal(noisy(text, 1), noisy(text, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("par:0.3", r"unknown kind 'par', expected pair:FRACTION or symmetric:FRACTION or feature:FRACTION"),
        ("pair", "no number after the colon.*pair:0.3"),
        ("pair:x", "no number after the colon"),
        ("pair:1.5", "fraction 1.5, expected one between 0 and 1"),
        ("pair:nan", "expected one between 0 and 1"),
    ],
)
def test_bad_noise_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        Noise.parse(text)


def test_noise_that_moves_nothing_is_refused():
    with pytest.raises(UserError, match="moves none of 1000 rows"):
        noisy("pair:0.0001")


def test_noise_prints_as_it_was_written():
    assert str(Noise.parse("pair:0.45")) == "pair:0.45"
    assert "45%" in Noise.parse("pair:0.45").describe()
