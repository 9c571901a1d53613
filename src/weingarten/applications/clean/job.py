"""The whole of ``weingarten clean``: every seed, the means, the output folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from weingarten.applications.clean.data import rehearse, split
from weingarten.applications.clean.errors import UserError
from weingarten.applications.clean.folder import Folder, plain, write_json
from weingarten.applications.clean.labels import label_table
from weingarten.applications.clean.network import MODELS
from weingarten.applications.clean.report import write_report
from weingarten.applications.clean.seed import SeedResult, run_seed
from weingarten.applications.clean.settings import LAYERS, Settings
from weingarten.applications.clean.source import Request, Source, load
from weingarten.applications.clean.summary import Summary, summarise
from weingarten.bilevel.methods import METHODS

__all__ = ["Job", "finished_seeds", "run"]

ONE_THREAD = 50_000_000
"""Multiplications of one pass through the data below which one thread is used."""

PREPARING = 0.3
"""The share of the first seed's progress that encoding texts gets."""

VERSION = "4"
"""Of the output folder's contents: a folder of another version is not resumed. 2 teaches the cleaned model in rounds, 3
lets held-back trusted rows choose the noise model and takes an encoder's dead units for constant, 4 reads texts by two layers."""


@dataclass(frozen=True)
class Job:
    """What to do and where to leave it."""

    request: Request = field(default_factory=Request)
    settings: Settings = field(default_factory=Settings)
    seeds: int = 3
    seed: int = 0
    output: Path = Path("runs/clean")
    resume: bool = False
    overwrite: bool = False

    def folder(self, source: Source) -> Folder:
        """The output folder, with all that determines its contents."""
        by_digest = ("train", "trusted", "encoder")
        request = {key: value for key, value in asdict(self.request).items() if key not in by_digest}
        settings = {"version": VERSION, "data": source.digests(), **request, **asdict(self.settings)}
        return Folder(self.output, settings | {"seeds": self.seeds, "seed": self.seed})


def run(job: Job, progress: Callable[[int, float, str], None] | None = None) -> dict[str, Any]:
    """Clean, compare, write the output folder.

    Args:
        job: what to do.
        progress: called with how many seeds are done, which part of the current one, and what is going on.

    Returns:
        What ``summary.json`` holds.

    Raises:
        UserError: if the input cannot be used; nothing has been written then.
        KeyboardInterrupt: if interrupted; finished seeds are kept in ``<output>.partial``.
    """
    progress = progress or (lambda done, part, text: None)
    _check(job)
    source = load(job.request)
    folder = job.folder(source)
    folder.check(job.resume, job.overwrite)
    if job.resume and folder.finished() and not folder.partial.exists():
        found: dict[str, Any] = json.loads((job.output / "summary.json").read_text(encoding="utf-8"))
        return found
    rehearse(source, job.seed)  # before anything is written
    folder.begin(job.resume)
    try:
        start = time.perf_counter()
        share = PREPARING if source.readers else 0.0
        source.prepare(folder.vectors, lambda part, text: progress(0, share * part, text))
        prepared = time.perf_counter() - start
        size = split(source, job.seed, job.seed).x.numel() * job.settings.hidden
        with _threads_for(size if job.settings.layers == "head" else ONE_THREAD):
            summary = _work(job, source, folder, share, prepared, progress)
        _write(folder.partial, summary)
        folder.finish()
    except Exception:
        if not finished_seeds(job):
            folder.discard()
        raise
    return plain(summary.values)


def _work(
    job: Job,
    source: Source,
    folder: Folder,
    share: float,
    prepared: float,
    progress: Callable[[int, float, str], None],
) -> Summary:
    """Every seed, those finished earlier from disk, and their means.

    Args:
        job: what to do.
        source: with its readers prepared.
        folder: for the seeds.
        share: of the first seed's progress that is done.
        prepared: seconds that took.
        progress: see :func:`run`.
    """
    start = time.perf_counter() - prepared
    seeds = range(job.seed, job.seed + job.seeds)
    earlier = [
        found for seed in seeds if (found := SeedResult.load(folder.seed(seed), source.readers)) is not None
    ]
    results = []
    for done, seed in enumerate(seeds):

        def tell(part: float, text: str, done: int = done) -> None:
            progress(done, part if done else share + (1 - share) * part, text)

        results.append(run_seed(source, job.settings, seed, job.seed, folder.seed(seed), job.resume, tell))
    seconds = time.perf_counter() - start + sum(result.values["seconds"]["total"] for result in earlier)
    progress(job.seeds, 0.0, "report")
    return summarise(
        source, asdict(job.request), asdict(job.settings), results, label_table(source, results), seconds
    )


@contextmanager
def _threads_for(multiplications: int) -> Iterator[None]:
    """One thread for small data: as fast there, many times faster on a busy machine, and the same bits on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if multiplications < ONE_THREAD else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def finished_seeds(job: Job) -> int:
    """How many seeds an unfinished run has left behind."""
    return len(list(job.output.with_name(job.output.name + ".partial").glob("seeds/*/result.json")))


def _check(job: Job) -> None:
    settings = job.settings
    if settings.method not in METHODS:
        raise UserError(f"--method: unknown method {settings.method!r}, expected one of {', '.join(METHODS)}")
    if settings.model not in MODELS:
        raise UserError(f"--model: unknown model {settings.model!r}, expected one of {', '.join(MODELS)}")
    if settings.layers not in LAYERS:
        raise UserError(f"--layers: found {settings.layers!r}, expected one of {', '.join(LAYERS)}")
    if settings.layers != "head" and job.request.text is None:
        raise UserError(
            f"--layers: found {settings.layers!r} without texts, expected --text and --encoder; nothing else has layers to train"
        )
    if settings.layers != "head" and not settings.correct_labels:
        raise UserError(
            f"--layers: found {settings.layers!r} together with --no-correct-labels, expected one of them; leave one out"
        )
    if settings.hidden < 1:
        raise UserError(f"--hidden: found {settings.hidden}, expected at least 1 unit")
    if settings.damping is not None and not 0 < settings.damping < float("inf"):
        raise UserError(
            f"--damping: found {settings.damping}, expected a positive number, or nothing for the default"
        )
    if settings.steps is not None and settings.steps < 1:
        raise UserError(f"--steps: found {settings.steps}, expected at least 1")
    if settings.seconds is not None and not 0 < settings.seconds < float("inf"):
        raise UserError(f"--seconds: found {settings.seconds}, expected a positive number")
    if job.seeds < 1:
        raise UserError(f"--seeds: found {job.seeds}, expected at least 1")
    if job.seed < 0:
        raise UserError(f"--seed: found {job.seed}, expected 0 or more")


def _write(folder: Path, summary: Summary) -> None:
    summary.labels.to_csv(folder / "labels.csv", index=False)
    summary.results[0].classifier.save(folder)
    write_report(folder, summary)
    write_json(folder / "summary.json", summary.values)
