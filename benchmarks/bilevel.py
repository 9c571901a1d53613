"""The tasks of bilevel learning: every method at equal seconds and equal tuning, what cleaning gains on TREC, what a BERT costs.

Trials are run two side by side, one thread each, and kept as they finish, so that a run that was broken off goes on. Rows whose
data is absent are left out. See `bilevel_protocol` for the budget and the modules of the rows for the tasks.

    python -m benchmarks.bilevel [--quick] [--json PATH] [--figures DIR] [--rows NAME ...] [--summary]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_trials import ROWS, execute, told, wanted
from benchmarks.optimizers_protocol import WORKERS, pool, work_off
from benchmarks.optimizers_trials import Cache

CHEAP = tuple(name for name in METHODS if not name.startswith("orbit"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="; ".join(ROWS)
    )
    parser.add_argument("--json", type=Path, help="where to write all results")
    parser.add_argument("--figures", type=Path, help="folder for the figures")
    parser.add_argument("--cache", type=Path, default=Path("runs/bilevel"), help="folder of finished trials")
    parser.add_argument("--workers", type=int, default=WORKERS, help="trials side by side")
    parser.add_argument("--summary", action="store_true", help="run nothing, summarise what is there")
    arguments = parser.parse_args()
    cache = Cache(arguments.cache)
    if not arguments.summary:
        work_off(lambda: wanted(arguments.rows, cache.get), cache, arguments.workers, execute, pool, told)


if __name__ == "__main__":
    main()
