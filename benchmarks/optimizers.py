"""Symo next to AdamW, Muon, SOAP and Shampoo on four workloads, every method tuned on the same budget, three seeds.

Rates and weight decay are chosen on seed 100, then seeds 0, 1, 2 are trained: see `optimizers_protocol`. Every method has the
same batches, warm-up over a twentieth of the steps and a cosine to a tenth of the rate; one thread a trial, two trials side
by side. Times are CPU-seconds of gradients and of the optimiser; evaluation is not counted, set-up (the inference of the
symmetry) is listed apart. Finished trials are kept in the cache, so that a run that was broken off goes on where
it was; `--known` takes those of earlier results as finished too, to add a method to them.

    python -m benchmarks.optimizers [--quick] [--json PATH] [--figures DIR] [--known PATH] [--only ...] [--methods ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks import optimizers_corpus as corpus
from benchmarks.environment import report
from benchmarks.optimizers_protocol import TUNING_SEED, ablated, told, tune, wanted
from benchmarks.optimizers_rivals import ABLATION, METHODS
from benchmarks.optimizers_summary import ablation_of, finished, rows_of, summary_of
from benchmarks.optimizers_tables import printed
from benchmarks.optimizers_trials import Trial, run
from benchmarks.optimizers_workloads import WORKLOADS
from benchmarks.trial_pool import WORKERS, Cache, Record, pool, work_off

RESULTS = Path(__file__).parent / "results" / "optimizers.json"
QUICK, QUICK_STEPS = ("symo", "muon", "adamw", "soap"), 150


def compact(record: Record) -> Record:
    """A record for the results: training losses as means between evaluations, of tuning the outcome alone."""
    if record["seed"] == TUNING_SEED:
        return {key: value for key, value in record.items() if key not in ("curve", "losses")}
    stops, losses = record["curve"]["step"], record["losses"]
    if len(losses) < stops[-1]:  # means already, from earlier results
        return record
    means = [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(stops)]
    return {**record, "losses": [round(value, 4) for value in means]}


def known(path: Path | None) -> dict[str, Record]:
    """Trials of earlier results by their keys: all that they depend on but the code."""
    if path is None:
        return {}
    content = json.loads(path.read_text())
    lists = (
        content["trials"],
        content["tuning"],
        {"gpt": {"ablation": content["ablation_trials"]}},
    )
    return {
        r["key"]: r for found in lists for methods in found.values() for rs in methods.values() for r in rs
    }


def full(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run what the cache lacks; summarise everything it has."""
    cache = Cache(arguments.cache)
    cache.records = known(arguments.known) | cache.records
    pairs = [(name, key) for name in arguments.only for key in arguments.methods if key in METHODS]
    lines = ["symo", *ABLATION]
    ablations = [key for key in lines if key in arguments.methods] if "gpt" in arguments.only else []
    if not arguments.summary:
        work_off(lambda: wanted(pairs, ablations, cache.get), cache, arguments.workers, run, told)
    done = finished(WORKLOADS, METHODS, cache.get)
    tables, ablation = rows_of(done, cache.get), ablation_of(lines, cache.get)
    print(printed(tables, ablation))
    tuning = {
        name: {key: [r for t in tune(name, key, cache.get).seen if (r := cache.get(t))] for key in METHODS}
        for name in WORKLOADS
    }
    trials = {
        name: {key: [cache.get(t) for t in ts] for key, ts in found.items()} for name, found in done.items()
    }
    lists = {"trials": trials, "tuning": tuning}
    records = {
        which: {
            name: {key: [compact(r) for r in rs] for key, rs in found.items()}
            for name, found in lists[which].items()
        }
        for which in lists
    }
    short = [compact(r) for key in lines for t in ablated(key, cache.get) if (r := cache.get(t))]
    details = {"tables": tables, "ablation": ablation, "ablation_trials": short, **records}
    return summary_of(tables), {"quick": False, **details}


def tuned_rates() -> dict[str, tuple[float, float]]:
    """Rate and weight decay on the GPT from the committed results."""
    if not RESULTS.exists():
        raise SystemExit(
            f"--quick takes its rates from {RESULTS.name}, which is not there; run without --quick first"
        )
    rows = json.loads(RESULTS.read_text())["tables"]["gpt"]
    return {key: (rows[key]["lr"], rows[key]["weight_decay"]) for key in QUICK}


def quick(workers: int = WORKERS) -> tuple[dict[str, Any], dict[str, Any]]:
    """The GPT for 150 steps on seed 0 at the tuned rates, nothing taken from the cache."""
    trials = [Trial("gpt", key, lr, decay, 0, QUICK_STEPS) for key, (lr, decay) in tuned_rates().items()]
    with pool(workers) as executor:
        records = dict(zip(QUICK, executor.map(run, trials), strict=True))
    for trial, record in zip(trials, records.values(), strict=True):
        print(f"{trial}: loss {record['final']}")
    losses = {f"{key}_loss": record["final"] for key, record in records.items()}
    symo = records["symo"]
    ratio = round(symo["optimizer_seconds"] / symo["gradient_seconds"], 4)
    details = {"quick": True, "trials": {key: compact(r) for key, r in records.items()}}
    return {**losses, "optimizer_over_gradient": ratio}, details


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*METHODS, *ABLATION]
    parser.add_argument("--quick", action="store_true", help="the GPT alone, 150 steps at the tuned rates")
    parser.add_argument("--json", type=Path, help="where to write all results")
    parser.add_argument("--figures", type=Path, help="folder for the figures")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument(
        "--methods", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known)
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/optimizers"), help="folder of finished trials"
    )
    parser.add_argument("--known", type=Path, help="earlier results, whose trials are not run again")
    parser.add_argument("--workers", type=int, default=WORKERS, help="trials side by side")
    parser.add_argument("--summary", action="store_true", help="run nothing, summarise the cache")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    text = corpus.note()
    if not text["corpus_as_pinned"]:
        print(
            "The sources of this Python are not those of 3.11.7: losses on the GPT compare within this run alone."
        )
    summary, details = quick(arguments.workers) if arguments.quick else full(arguments)
    details |= text
    if arguments.figures is not None and not arguments.quick:
        from benchmarks.optimizers_figures import draw

        draw(details, arguments.figures)
    report(summary, details, arguments.json)


if __name__ == "__main__":
    main()
