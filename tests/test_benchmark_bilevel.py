"""The bilevel benchmark's book-keeping: equal budgets, the best setting, and the verdict. Its numbers are not tested here."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from benchmarks import bilevel, clean_layers, clean_texts
from benchmarks import bilevel_mnist as mnist
from benchmarks import bilevel_trec as trec
from benchmarks.bilevel_cleaning import CHECKED, MOST, TENTHS, but_a_tenth
from benchmarks.bilevel_encoder import summary as encoder_summary
from benchmarks.bilevel_meta import MAMLSine
from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_protocol import MORE_SEEDS, MOST_SEEDS, SEEDS, TUNING_SEEDS, Clock, Setting
from benchmarks.bilevel_summary import ahead, averages, line_of, on_average, unseen, within_one_error
from benchmarks.bilevel_trials import GROUPS, ROWS, Trial, best, final, methods_of, settings, tuning, wanted
from benchmarks.peak_memory import tensor_peak
from tests.applications.encoders import make_encoder
from weingarten.applications.clean.data import Parts
from weingarten.applications.clean.encoder import Encoder
from weingarten.applications.clean.encoding import Encoding

ROW = "images MLP"


def records(metric):
    """A finder in which every trial is done and has the metric of the given function; None for a missing one."""

    def find(trial):
        found = metric(trial)
        return None if found is None else {"metric": None if math.isnan(found) else found}

    return find


@pytest.mark.parametrize("better", [1, -1])
def test_every_method_of_every_row_has_as_many_tuning_trials(better):
    find = records(lambda trial: better * trial.rate)
    for row in ROWS.values():
        low, high = len(row.rates) // 2 - 1, len(row.rates) // 2
        assert list(row.rates) == sorted(row.rates)
        assert len(row.rates) == 6  # as far as four settings can climb on either side
        for name in methods_of(row.name):
            tried = settings(row.name, name, find)
            assert len(tried) == 4
            assert len(tuning(row.name, name, find)) == 4 * len(row.tuning_seeds)
            further = 1 if METHODS[name].damped else 2
            reached = row.rates[high + further] if better > 0 else row.rates[low - further]
            assert max(tried, key=lambda setting: better * setting.rate).rate == reached
            assert len({setting.damping for setting in tried}) == (2 if METHODS[name].damped else 1)


def test_rates_and_dampings_are_searched_one_after_the_other():
    known = {}

    def find(trial):
        return known.get((trial.rate, trial.damping))

    (_, _, low, high, higher, _), (first, second) = ROWS[ROW].rates, ROWS[ROW].dampings
    steps = [(low, first, 0.5), (high, first, 0.6), (higher, first, 0.55), (high, second, 0.7)]
    for rate, damping, metric in steps:
        assert best(ROW, "KFAC", find) is None
        assert final(ROW, "KFAC", find) == []
        assert (rate, damping) in {(t.rate, t.damping) for t in tuning(ROW, "KFAC", find)}
        known[rate, damping] = {"metric": metric}
    assert list(settings(ROW, "KFAC", find)) == [Setting(*step[:2]) for step in steps]
    assert best(ROW, "KFAC", find) == Setting(high, second)


def test_a_range_of_rates_grows_on_the_side_of_its_better_end():
    low, middle, high = ROWS[ROW].rates[2], ROWS[ROW].rates[3], ROWS[ROW].rates[4]
    values = {low: 0.5, middle: 0.6, high: 0.4}  # the best one lies inside, and the low end is the better one
    tried = settings(ROW, "identity", records(lambda trial: values.get(trial.rate, 0.0)))
    assert [setting.rate for setting in tried] == [low, middle, high, ROWS[ROW].rates[1]]


def test_every_seed_is_judged_by_images_of_its_own_and_no_tuning_seed_by_one_of_them(monkeypatch):
    number = torch.arange(5000)
    monkeypatch.setattr(mnist, "images", lambda: (number, number))

    def numbered(seed):
        parts = mnist.split(seed, torch.Generator().manual_seed(seed))
        assert all(torch.equal(x, y) for x, y in parts)
        return [set(x.tolist()) for x, _ in parts]

    (rows, judges), (others, judges_of_others) = numbered(0), numbered(1)
    tuned, validation = numbered(TUNING_SEEDS[0])
    assert (len(rows), len(judges), len(tuned), len(validation)) == (3400, 1000, 3400, 600)
    assert not rows & judges
    assert not validation & (rows | judges | others | judges_of_others | tuned)
    assert 100 < len(judges & judges_of_others) < 400  # 1000 of 4400, twice: 227 are expected
    assert numbered(TUNING_SEEDS[1])[1] == validation


def test_questions_that_judge_tuning_judge_nothing_else(monkeypatch):
    number, classes = torch.arange(5000), torch.arange(5000) % 6
    x = number[:, None] + torch.tensor([0.5] * 384 + [0.0] * 384)  # the row reads the second half
    data = trec.Data(x, classes, classes, 10_000 + x[:500], classes[:500])
    monkeypatch.setattr(trec, "questions", lambda: data)
    final, tuned, other = (trec.Given.draw(seed) for seed in (0, *TUNING_SEEDS[:2]))
    assert torch.equal(final.x, number[:, None].float().expand(-1, 384))
    assert sorted(torch.cat([final.trusted[0], final.judges[0]])[:, 0]) == sorted(data.checked_x[:, -1])
    assert len(final.judges[0]) == 400
    assert sorted(torch.cat([tuned.x, tuned.judges[0]])[:, 0]) == sorted(number)
    assert len(tuned.judges[0]) == 1000
    assert torch.equal(tuned.judges[0], other.judges[0])
    assert not torch.equal(tuned.trusted[0], other.trusted[0])


def test_every_seed_is_judged_by_episodes_of_its_own_and_tuning_seeds_by_other_ones():
    row = MAMLSine()
    task = row.seeded(0)
    scores = {
        seed: row.judge(task, task.start(), row.sources()[1], seed) for seed in (0, 1, *TUNING_SEEDS[:2])
    }
    assert len(set(scores.values())) == 3
    assert scores[TUNING_SEEDS[0]] == scores[TUNING_SEEDS[1]]


def test_a_setting_is_judged_by_the_mean_over_the_tuning_seeds():
    low, high = ROWS[ROW].rates[2:4]

    def metric(trial):
        lucky = trial.rate == low and trial.seed == TUNING_SEEDS[0]
        return 1.0 if lucky else {low: 0.4, high: 0.7}.get(trial.rate, 0.0)

    found = best(ROW, "identity", records(metric))
    assert found is not None
    assert found.rate == high  # 0.7 against a mean of 0.6
    missing = records(lambda trial: None if trial.seed == TUNING_SEEDS[-1] else 0.5)
    assert best(ROW, "identity", missing) is None


def test_seeds_run_at_the_best_setting():
    by_rate = records(lambda trial: -abs(trial.rate - 0.3) if trial.seed in TUNING_SEEDS else None)
    found = best(ROW, "KFAC", by_rate)
    assert found is not None
    assert found.rate == 0.3
    assert [trial.seed for trial in final(ROW, "KFAC", by_rate)] == list(MOST_SEEDS)


def test_a_setting_that_diverges_on_one_seed_is_never_the_best():
    low, high = ROWS[ROW].rates[2:4]

    def metric(trial):
        return math.nan if trial.rate == high and trial.seed == TUNING_SEEDS[1] else trial.rate

    found = best(ROW, "identity", records(metric))
    assert found is not None
    assert found.rate == low


def test_what_is_wanted_is_what_lacks():
    nothing, names = wanted([ROW], records(lambda trial: None)), methods_of(ROW)
    assert len(nothing) == 2 * len(TUNING_SEEDS) * len(names)
    assert [trial.seed for trial in nothing] == [s for s in TUNING_SEEDS for _ in range(2 * len(names))]
    tuned = wanted([ROW], records(lambda t: 0.5 if t.seed in TUNING_SEEDS else None))
    assert len(tuned) == len(MOST_SEEDS) * len(names)
    assert [trial.method for trial in tuned[:2]] == list(names)[:2]  # in turns
    assert wanted([ROW], records(lambda trial: 0.5)) == []


def lines(**metrics):
    """Lines of seeds' metrics by method."""
    return {
        name: line_of(
            name,
            [
                {"metric": value, "rate": 0.1, "damping": 0.1, "steps": 1, "products": 0, "extra": {}}
                for value in values
            ],
        )
        for name, values in metrics.items()
    }


IDENTITY, STEP = [0.70, 0.71, 0.72], [0.72, 0.71, 0.70]
BEST = [0.80, 0.81, 0.83]


def test_verdict():
    won = ahead(lines(identity=IDENTITY, **{"one step": STEP}, KFAC=BEST))
    assert won["tied_with_best"]
    assert won["beyond_plain"]
    assert won["gaps"]["identity"] == pytest.approx(31.0, abs=0.1)  # differences 0.10, 0.10, 0.11
    assert won["pooled"]["identity"] == pytest.approx(9.8, abs=0.1)
    beaten = ahead(lines(identity=IDENTITY, **{"one step": STEP, "CG 10": [0.9, 0.91, 0.92]}, KFAC=BEST))
    assert not beaten["tied_with_best"]
    assert beaten["best"] == "CG 10"
    assert beaten["beyond_plain"]
    tied = ahead(
        lines(identity=IDENTITY, **{"one step": STEP, "CG 10": [0.71, 0.72, 0.75]}, KFAC=[0.71, 0.72, 0.73])
    )
    assert tied["tied_with_best"]
    assert not tied["beyond_plain"]


def test_over_a_task_one_method_stands_for_all_rows():
    first = lines(identity=IDENTITY, **{"one step": STEP}, KFAC=BEST, orbit=[0.9, 0.9, 0.9])
    second = lines(identity=BEST, **{"one step": BEST}, KFAC=[0.81, 0.83, 0.84], orbit=[0.9, 0.9, math.nan])
    found = on_average([first, second, first])
    assert set(found) == {"identity", "one step", "KFAC"}  # one that diverged somewhere stands for nothing
    assert found["KFAC"]["values"] == pytest.approx(
        [(0.80 + 0.81 + 0.80) / 3, (0.81 + 0.83 + 0.81) / 3, 2.5 / 3]
    )
    images, tails = (GROUPS[task] for task in ("1 image cleaning", "3 long tail"))
    tables = dict(zip(images, (first, second, first), strict=True)) | {tails[0]: first}
    assert averages(tables) == {"1 image cleaning": found}  # of task 3 two rows are lacking
    assert ahead(found)["ours"] == "KFAC"
    assert ahead(found)["beyond_plain"]


def test_unseen_seeds_judge_the_method_that_was_best_on_the_first():
    first, others = [0.5] * (len(MORE_SEEDS) - 1) + [0.51], [0.5, 0.52]
    found = lines(
        **{"identity": first + others, "one step": [x - 0.1 for x in first] + [0.4, 0.41]},
        **{"KFAC": [0.7, *first[1:], 0.6, 0.64], "orbit": [*first, 0.9, 0.9], "CG 10": [0.9] * 10},
    )
    verdict = unseen(found)
    assert verdict is not None
    assert verdict["ours"] == "KFAC"  # by its first seeds; orbit is better on the others
    assert verdict["metric"] == {"identity": 0.51, "one step": 0.405, "KFAC": 0.62}
    assert verdict["gaps"]["identity"] == pytest.approx(11.0)  # differences 0.10, 0.12
    assert unseen(lines(identity=first, KFAC=first)) is None


def test_methods_are_counted_where_they_are_within_one_error_of_the_best():
    first = lines(
        identity=IDENTITY, KFAC=BEST, **{"CG 10": [0.80, 0.81, 0.81]}
    )  # 0.0067 behind, an error is 0.0088
    second = lines(identity=BEST, KFAC=[0.5, math.nan, 0.5], **{"CG 10": IDENTITY})
    found = within_one_error({"first": first, "second": second})
    assert (found["identity"], found["KFAC"], found["CG 10"]) == ([1, 2], [1, 1], [1, 2])
    assert found["orbit"] == [0, 0]


def test_every_checked_question_judges_once():
    parts = [but_a_tenth(number) for number in TENTHS]
    assert sorted(torch.cat([judged for _, judged in parts]).tolist()) == list(range(CHECKED))
    assert all(len(rows) == MOST and not set(rows.tolist()) & set(judged.tolist()) for rows, judged in parts)


def test_a_run_that_diverged_leaves_no_mean():
    found = lines(KFAC=[0.8, math.nan, 0.8])["KFAC"]
    assert found["metric"] is None
    assert found["diverged"] == 1


def test_key_of_a_trial_tells_every_setting_apart():
    trials = [Trial(row, "KFAC", rate, 0.1, seed) for row in ROWS for rate in (0.1, 0.3) for seed in SEEDS]
    assert len({trial.key for trial in trials}) == len(trials)


def test_clock_ends_a_run_and_thins_its_curve():
    clock = Clock(seconds=0.0)
    assert clock.record(1.0, products=3)
    assert not Clock(seconds=1e6).record(1.0, products=0)
    for _ in range(100):
        clock.record(0.5, products=1)
    result = clock.result(0.7, auroc=0.9)
    assert result.steps == 101
    assert result.products == 103
    assert len(result.curve) <= 40
    assert result.extra == {"auroc": 0.9}


def test_peak_of_tensors_counts_those_that_live_at_once():
    def call():
        first = torch.zeros(1000, 1000)  # 4 MB
        second = first + 1
        del first
        return second + 1

    assert tensor_peak(call) == pytest.approx(8e6, rel=1e-3)


def test_gain_of_a_trained_encoder_is_over_the_best_rival_that_knows_not_the_truth():
    accuracy = {
        "cleaned": 0.8,
        "frozen": 0.7,
        "trusted": 0.75,
        "all": 0.5,
        "both": 0.5,
        "kept": 0.5,
        "true": 0.9,
    }
    entries = [
        {
            "layers": "all", "trusted": 100, "split": s, "device": device, "reads": reads,
            "accuracy": accuracy, "auroc": 0.9, "seconds": 60.0,
        }
        for s in (0, 1)
        for device, reads in (("cpu", "last"), ("cpu", "two"), ("a GPU", "two"))
    ]  # fmt: skip
    found = encoder_summary(entries)
    assert set(found) == {
        f"all, 100 trusted, {kind}"
        for kind in ("cpu, first reads last", "cpu, first reads two", "a GPU, first reads two")
    }
    line = found["all, 100 trusted, cpu, first reads two"]
    assert (line["best rival"], line["splits"]) == ("trusted", 2)
    assert line["gain_points"] == pytest.approx(5.0)


def test_cleaning_again_needs_results_and_leaves_the_others_as_they_are(tmp_path, monkeypatch):
    path = tmp_path / "bilevel.json"
    arguments = argparse.Namespace(json=path, cache=tmp_path)
    monkeypatch.setattr(bilevel, "DATA", tmp_path)
    with pytest.raises(
        ValueError, match=r"--cleaning: found --json .*bilevel.json, expected a file of results"
    ):
        bilevel.cleaned_again(arguments)
    part = {"cleaned": 0.8, "trusted": 0.7}
    split = {"accuracy": part, "on training questions": part, "auroc": part, "seconds": 40.0}
    monkeypatch.setattr(bilevel, "trec", lambda folder: {"100": [split, split]})
    before = {"tasks_ahead": 0, "trec_gain_points": 1.0, "trec_seconds": 1.0}
    path.write_text(json.dumps({"summary": before, "environment": {}, "trials": [1], "cleaning": None}))
    with monkeypatch.context() as patch:
        patch.setattr(bilevel, "DATA", tmp_path / "nowhere")
        with pytest.raises(ValueError, match="found no questions of TREC, expected shared/data/trec"):
            bilevel.cleaned_again(arguments)
    summary, details = bilevel.cleaned_again(arguments)
    assert summary == {"tasks_ahead": 0, "trec_gain_points": 10.0, "trec_seconds": 40.0}
    assert details["trials"] == [1]
    assert details["cleaning"]["100"]["best rival"] == "trusted"
    assert details["cleaning_splits"] == {"100": [split, split]}


def test_gains_are_paired_by_split():
    def entry(split, layers, cleaned):
        accuracy = {"cleaned": cleaned, "trusted": 0.5 + split / 10}
        return {"texts": "t", "split": split, "layers": layers, "accuracy": accuracy, "auroc": {}}

    entries = [entry(0, "last", 0.6), entry(1, "last", 0.8)]
    entries += [entry(1, "middle and last", 0.84), entry(0, "middle and last", 0.62)]
    assert clean_texts.middle(entries) == {"t": [3.0, 1.0]}  # gains of 2 and 4
    line = clean_texts.summary(entries)["t, middle and last"]
    assert (line["best rival"], line["gain_points"], line["gain_error"]) == ("trusted", 18.0, 6.0)


def test_the_last_layer_is_the_second_half_of_a_vector():
    x = torch.arange(12.0).reshape(2, 6)
    parts = clean_texts.last_layer(Parts(Encoding(()), *[x] * 8))
    assert parts.x.tolist() == parts.trusted_x.tolist() == parts.held_x.tolist() == [[3.0, 4, 5], [9, 10, 11]]
    assert parts.given is x


def test_states_of_all_layers_hold_those_that_the_command_reads(tmp_path):
    pytest.importorskip("transformers")
    encoder = Encoder.load(make_encoder(tmp_path / "tiny"))
    words = ["who is the king of the city", "a", "where is the river"] * 30
    states = clean_layers.states(encoder, words)
    assert states.shape == (90, 3, 8)
    found = torch.from_numpy(states[:, 1:].reshape(90, 16))
    torch.testing.assert_close(found, torch.from_numpy(encoder.encode(words)), atol=1e-6, rtol=1e-5)
