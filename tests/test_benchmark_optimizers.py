"""The protocol of the optimiser benchmark, on made-up trials: nothing is trained."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.optimizers_protocol import SEEDS, TUNING_SEED, ablated, told, tune, wanted
from benchmarks.optimizers_summary import crossing, finished, rows_of, summary_of
from benchmarks.optimizers_trials import Trial, rate
from benchmarks.trial_pool import Cache, Record, work_off


def made_up(best: float):
    """Trials whose loss is least at one rate, and lower by 0.1 for a seed of the comparison."""

    def execute(trial: Trial) -> Record:
        loss = 1 + abs(math.log10(trial.lr) - best) + 0.01 * trial.weight_decay - 0.1 * (trial.seed in SEEDS)
        loss += 0.001 * trial.seed
        return {
            **trial.__dict__,
            "diverged": trial.lr > 0.2,
            "final": None if trial.lr > 0.2 else loss,
            "setup_seconds": 0.0,
            "gradient_seconds": 3.0,
            "optimizer_seconds": 1.0,
            "state_bytes": 8,
            "curve": {
                "step": [0, trial.steps],
                "loss": [5.0, loss],
                "gradient_seconds": [0.0, 3.0],
                "optimizer_seconds": [0.0, 1.0],
            },
            "losses": [loss] * trial.steps,
        }

    return execute


def all_done(cache: Cache, best: float, keys: list[str], ablations: list[str]) -> list[Trial]:
    ran: list[Trial] = []

    def execute(trial: Trial) -> Record:
        ran.append(trial)
        return made_up(best)(trial)

    pairs = [("gpt", key) for key in keys]
    work_off(lambda: wanted(pairs, ablations, cache.get), cache, 2, execute, told, ThreadPoolExecutor)
    return ran


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ([3.0, 2.0, 1.0], 1.5, 15.0),
        ([3.0, 1.0, 2.0, 1.0], 1.5, 7.5),  # the first time
        ([3.0, 2.0], 1.0, None),
        ([1.0, 2.0], 1.0, 0.0),
    ],
)
def test_crossings_are_interpolated(losses, target, expected):
    assert crossing([10.0 * i for i in range(len(losses))], losses, target) == expected


def test_rates_warm_up_and_fall_to_a_tenth():
    rates = [rate(i, 100) for i in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize(("best", "rates"), [(-2.5, 5), (-3.5, 6), (-4.0, 7), (-9.0, 7), (-1.0, 7)])
def test_the_grid_grows_twice_at_most_while_the_best_is_at_its_edge(tmp_path, capsys, best, rates):
    ran = all_done(Cache(tmp_path), best, ["adamw"], [])
    tuning = [trial for trial in ran if trial.seed == TUNING_SEED]
    assert len({trial.lr for trial in tuning}) == rates
    assert [trial.weight_decay for trial in tuning] == [0.01] * rates + [0.1]
    assert len(ran) == rates + 1 + len(SEEDS)
    assert {trial.seed for trial in ran[-3:]} == set(SEEDS)
    assert {(trial.lr, trial.weight_decay) for trial in ran[-3:]} == {(tuning[-1].lr, 0.01)}
    assert "seed   0, 1000 steps" in capsys.readouterr().out


def test_a_run_that_was_broken_off_goes_on_where_it_was(tmp_path):
    whole = all_done(Cache(tmp_path / "whole"), -2.5, ["adamw", "symo"], ["symo", "symo: signs"])
    assert len(whole) == len(set(whole)) == 2 * (6 + 3) + 2 * 2  # two rates for every line of the ablation
    lines = (tmp_path / "whole" / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "trials.jsonl").write_text("".join(lines[:7]) + lines[7][:50])
    rest = all_done(Cache(tmp_path / "part"), -2.5, ["adamw", "symo"], ["symo", "symo: signs"])
    assert len(rest) == len(whole) - 7
    assert set(Cache(tmp_path / "part").records) == set(Cache(tmp_path / "whole").records)


def test_the_summary_says_when_a_method_reaches_the_final_loss_of_adamw(tmp_path):
    cache = Cache(tmp_path)
    for key, best in (("adamw", -2.5), ("symo", -2.4), ("muon", -2.7)):
        all_done(cache, best, [key], [])
    done = finished(["gpt"], ["symo", "muon", "adamw", "soap"], cache.get)
    assert list(done["gpt"]) == ["symo", "muon", "adamw"]
    rows = rows_of(done, cache.get)["gpt"]
    assert rows["adamw"]["steps_to_adamw"] == 1000
    assert rows["adamw"]["seconds_to_adamw"] == 4.0
    assert rows["symo"]["steps_to_adamw"] is None  # its loss is higher by 0.1
    assert rows["symo"]["loss_se"] == pytest.approx(0.001 / 3**0.5, abs=1e-5)
    summary = summary_of({"gpt": rows})
    assert summary["symo_over_adamw_steps"] is None
    assert summary["symo_below_muon_in_se"] == pytest.approx(0.1 / 0.00082, rel=0.02)
    assert summary["state_over_adamw"] == 1.0
    assert ablated("symo", Cache(tmp_path / "empty").get) == ()
    assert tune("gpt", "soap", cache.get).best is None
