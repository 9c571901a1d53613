"""The tasks of bilevel learning: every method at equal seconds and equal tuning, what cleaning gains on TREC, what a BERT costs.

Trials are run two side by side, one thread each, and kept as they finish, so that a run that was broken off goes on. Rows whose
data is absent are left out. See `bilevel_protocol` for the budget and the modules of the rows for the tasks. `--quick` repeats
three methods on one row at the settings of the committed results, cleans TREC once against logistic regression, and takes two
steps of a BERT.

    python -m benchmarks.bilevel [--quick] [--json PATH] [--figures DIR] [--rows NAME ...] [--summary]
    python -m benchmarks.bilevel --at "TREC head" KFAC 3 0.01
    python -m benchmarks.bilevel --cleaning --json PATH --figures DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import bilevel_cleaning, bilevel_figures
from benchmarks.bilevel_bert import costs, ratios
from benchmarks.bilevel_probes import probed
from benchmarks.bilevel_protocol import SEEDS
from benchmarks.bilevel_summary import (
    ahead,
    averages,
    compared,
    line_of,
    overview,
    printed,
    tasks_ahead,
    within_one_error,
)
from benchmarks.bilevel_trec import DATA
from benchmarks.bilevel_trials import ROWS, Trial, execute, final, methods_of, told, tuning, wanted
from benchmarks.environment import report
from benchmarks.trial_pool import WORKERS, Cache, pool, work_off

RESULTS = Path(__file__).parent / "results" / "bilevel.json"
QUICK_ROW, QUICK_METHODS = "images linear", ("identity", "one step", "KFAC")
ON_BERT = ("identity", "KFAC")


def kept(path: Path, make: Any) -> Any:
    """What a file holds, made and written first if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def trec(folder: Path) -> dict[str, Any]:
    """Splits of TREC, by the number of trusted questions."""
    splits = kept(folder / "cleaning.json", lambda: bilevel_cleaning.gained(SEEDS))
    most, tenths = bilevel_cleaning.MOST, bilevel_cleaning.TENTHS
    found: dict[str, Any] = splits | kept(
        folder / "cleaning tenths.json", lambda: bilevel_cleaning.gained(tenths, (most,))
    )
    return found


def without_curve(record: dict[str, Any]) -> dict[str, Any]:
    """A trial of tuning, whose curve is not shown."""
    return {key: value for key, value in record.items() if key != "curve"}


def trec_of(cleaning: dict[str, Any] | None) -> dict[str, Any]:
    """The summary's two keys from splits of TREC; None where the data is absent."""
    if cleaning is None:
        return {"trec_gain_points": None, "trec_seconds": None}
    line = bilevel_cleaning.summary(cleaning)["100"]
    return {"trec_gain_points": line["gain_points"], "trec_seconds": line["seconds"]}


def bert_of(found: dict[str, Any]) -> dict[str, Any]:
    """The summary's two keys from the costs on a BERT."""
    ratio = ratios(found)
    return {"bert_kfac_over_identity_time": ratio["time"], "bert_kfac_over_identity_memory": ratio["memory"]}


def full(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run what the cache lacks; summarise everything it has."""
    cache, folder = Cache(arguments.cache), arguments.cache
    bert = kept(folder / "bert.json", lambda: costs(2, ON_BERT))
    cleaning = trec(folder) if DATA.exists() else None
    digits = kept(folder / "cleaning digits.json", lambda: bilevel_cleaning.gained_on_digits(SEEDS))
    if not arguments.summary:
        work_off(lambda: wanted(arguments.rows, cache.get), cache, arguments.workers, execute, told)
    tables = compared(ROWS, cache.get)
    probes = {row: kept(folder / f"probe {row}.json", lambda row=row: probed(row)) for row in tables}
    print(printed(tables), overview(tables), overview(averages(tables)), sep="\n\n")
    verdict = tasks_ahead(tables)
    counts = {key: value for key, value in verdict.items() if key not in ("averages", "verdicts")}
    trials = {
        row: {
            name: [
                *(without_curve(found) for t in tuning(row, name, cache.get) if (found := cache.get(t))),
                *(found for t in final(row, name, cache.get) if t.seed in SEEDS and (found := cache.get(t))),
            ]
            for name in lines
        }
        for row, lines in tables.items()
    }
    details = {
        "quick": False,
        "tables": tables,
        "verdicts": verdict["verdicts"],
        "averages": verdict["averages"],
        "within_one_error": within_one_error(tables),
        "probes": probes,
        "cleaning": None if cleaning is None else bilevel_cleaning.summary(cleaning),
        "cleaning_splits": cleaning,
        "cleaning_digits": digits,
        "bert": bert,
        "bert_ratios": {name: ratios(bert, name) for name in ON_BERT[1:]},
        "trials": trials,
    }
    return {**counts, **trec_of(cleaning), **bert_of(bert)}, details


def cleaned_again(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results that are there, with the splits of TREC that the cache has; those it lacks are measured.

    Raises:
        ValueError: if there are no results, or no data.
    """
    if arguments.json is None or not arguments.json.exists():
        raise ValueError(
            f"--cleaning: found --json {arguments.json}, expected a file of results whose other parts stay; name one, or run "
            "without --cleaning"
        )
    if not DATA.exists():
        raise ValueError(
            "--cleaning: found no questions of TREC, expected shared/data/trec beside the checkout; put it there"
        )
    found = json.loads(arguments.json.read_text())
    cleaning = trec(arguments.cache)
    found |= {"cleaning": bilevel_cleaning.summary(cleaning), "cleaning_splits": cleaning}
    return found.pop("summary") | trec_of(cleaning), found


def committed(row: str, methods: tuple[str, ...], seeds: tuple[int, ...]) -> list[Trial]:
    """Trials of methods at the settings of the committed results, the methods in turns on each seed."""
    lines = json.loads(RESULTS.read_text())["tables"][row]
    return [
        Trial(row, name, lines[name]["rate"], lines[name]["damping"] or ROWS[row].dampings[0], seed)
        for seed in seeds
        for name in methods
    ]


def quick() -> tuple[dict[str, Any], dict[str, Any]]:
    """Three methods on one row at the committed settings, one split of TREC, two steps of a BERT; nothing from the cache."""
    bert = costs(0, ON_BERT)
    trials = committed(QUICK_ROW, QUICK_METHODS, SEEDS)
    with pool(WORKERS) as executor:
        cleaned = executor.submit(bilevel_cleaning.quickly) if DATA.exists() else None
        records = list(executor.map(execute, trials))
        cleaning = None if cleaned is None else {"100": [cleaned.result()]}
    lines = {name: line_of(name, [r for r in records if r["method"] == name]) for name in QUICK_METHODS}
    print(printed({QUICK_ROW: lines}))
    verdict = ahead(lines)
    summary = {
        "row_ahead": verdict["tied_with_best"] and verdict["beyond_plain"],
        **trec_of(cleaning),
        **bert_of(bert),
    }
    return summary, {"quick": True, "table": lines, "verdict": verdict, "cleaning": cleaning, "bert": bert}


def at(row: str, method: str, rate: str, damping: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method on a row at a setting that tuning need not try.

    Raises:
        ValueError: if the row, or the method among the row's, is not known, or a number is none.
    """
    if row not in ROWS:
        raise ValueError(f"--at: found the row {row!r}, expected one of {'; '.join(ROWS)}")
    if method not in methods_of(row):
        raise ValueError(f"--at: found the method {method!r}, expected one of {'; '.join(methods_of(row))}")
    try:
        setting = float(rate), float(damping)
    except ValueError:
        raise ValueError(
            f"--at: found {rate!r} and {damping!r}, expected a rate and a damping as numbers"
        ) from None
    with pool() as executor:
        trials = [Trial(row, method, *setting, seed) for seed in ROWS[row].seeds]
        found = line_of(method, list(executor.map(execute, trials)))
    return found, {"quick": False}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="a part of it, in under three minutes")
    part.add_argument(
        "--cleaning", action="store_true", help="TREC's splits alone, the rest as --json has it"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="; ".join(ROWS)
    )
    part.add_argument(
        "--at",
        nargs=4,
        metavar=("ROW", "METHOD", "RATE", "DAMPING"),
        help="the row's seeds at one setting, no more",
    )
    parser.add_argument("--json", type=Path, help="where to write all results")
    parser.add_argument("--figures", type=Path, help="folder for the figures")
    parser.add_argument("--cache", type=Path, default=Path("runs/bilevel"), help="folder of finished trials")
    parser.add_argument("--workers", type=int, default=WORKERS, help="trials side by side")
    parser.add_argument("--summary", action="store_true", help="run no trials, summarise those there are")
    arguments = parser.parse_args()
    if arguments.at is not None or arguments.cleaning:
        try:
            summary, details = at(*arguments.at) if arguments.at else cleaned_again(arguments)
        except ValueError as error:
            parser.error(str(error))
    else:
        summary, details = quick() if arguments.quick else full(arguments)
    if arguments.figures is not None and "cleaning_splits" in details:
        bilevel_figures.draw(details, arguments.figures)
    report(summary, details, arguments.json)


if __name__ == "__main__":
    main()
