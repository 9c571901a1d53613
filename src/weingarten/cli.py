"""The command line: arguments, tables, progress; no mathematics."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    from weingarten.applications.clean import Job, Request, Settings, UserError, finished_seeds, run
    from weingarten.applications.clean.rivals import ACCURACY, AUROC
    from weingarten.applications.inspect import Inspection, InspectionError, examine, load
    from weingarten.applications.inspect_figure import draw
    from weingarten.applications.inspect_optimizer import plan_optimizer
    from weingarten.applications.inspect_optimizer_tables import (
        TOKENS,
        cost_table,
        routes_table,
        shards_table,
    )
    from weingarten.bilevel import METHODS, CheckpointError
    from weingarten.solvers import DivergenceError
except ModuleNotFoundError as missing:
    extra = (missing.name or "weingarten").split(".")[0]
    if extra == "weingarten":  # a fault of ours, not of the installation
        raise
    sys.exit(
        f"error: the command line needs {extra!r}, which is not installed; run: pip install 'weingarten[cli,data,plots]'"
    )

__all__ = ["app"]

ENCODER = "With --text: a Hugging Face encoder's folder (config.json, tokenizer, model.safetensors)."
LAYERS = "With --text: train the head alone, the encoder's last block too, or all layers (head, last, all)."
DEVICE = "With --text: what the encoder runs on (auto: a CUDA GPU where there is one; cpu, cuda, cuda:1)."
IMAGES = "The column of paths of image files, relative to the table's folder; pixels are features."

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"weingarten {installed_version('weingarten')}")
        except PackageNotFoundError:
            typer.echo("weingarten (not installed)")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    """Curvature for deep learning, put to use."""


@app.command()
def clean(
    train: Annotated[
        str, typer.Argument(metavar="TRAIN", help="CSV or Parquet file to clean, or the built-in 'digits'.")
    ] = "digits",
    label: Annotated[str | None, typer.Option(help="The column that holds the labels.")] = None,
    trusted: Annotated[
        str | None,
        typer.Option(help="File of rows whose labels are right. Without it, some rows of TRAIN are taken."),
    ] = None,
    trusted_size: Annotated[
        int | None,
        typer.Option(help="Rows of TRAIN to trust, if no file is given (default: digits 50, else a tenth)."),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Rows to hold out for measuring, or a file of them (default: digits 500, else a part)."
        ),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(help="Put in wrong labels: pair:P, symmetric:P or feature:P, such as pair:0.45."),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="A column that is no feature, such as an identifier. May be repeated."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="The column of texts, which --encoder reads.")] = None,
    encoder: Annotated[str | None, typer.Option(help=ENCODER)] = None,
    images: Annotated[str | None, typer.Option(help=IMAGES)] = None,
    layers: Annotated[str, typer.Option(help=LAYERS)] = Settings.layers,
    device: Annotated[str, typer.Option(help=DEVICE)] = Request.device,
    model: Annotated[str, typer.Option(help="linear or mlp.")] = Settings.model,
    hidden: Annotated[int, typer.Option(help="Hidden units of the mlp.")] = Settings.hidden,
    method: Annotated[
        str, typer.Option(help=f"How hypergradients are computed: {', '.join(METHODS)}.")
    ] = Settings.method,
    damping: Annotated[
        float | None, typer.Option(help="Of the curvature (default: chosen by itself).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Outer steps (default: the recipe's).")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time for cleaning, per seed (default: no limit).")
    ] = None,
    correct_labels: Annotated[
        bool, typer.Option(help="Correct labels as well as weights.")
    ] = Settings.correct_labels,
    seeds: Annotated[int, typer.Option(help="How often to repeat, each time with another seed.")] = 3,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/clean"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of other settings.")
    ] = False,
) -> None:
    """Find wrong labels in TRAIN and train a model that withstands them.

    The last line printed is one JSON object: auroc, accuracy, accuracy_all, accuracy_trusted, accuracy_both,
    accuracy_true, seconds.
    """
    table = train, label, trusted, trusted_size, held_out, noise, tuple(drop or ())
    job = Job(
        Request(*table, text, encoder, images, device),
        Settings(model, hidden, method, damping, steps, seconds, correct_labels, layers),
        seeds,
        seed,
        output,
        resume,
        overwrite,
    )
    try:
        summary = _run(job)
    except UserError as error:
        _fail(f"error: {' '.join(str(error).split())}", 2)
    except (CheckpointError, DivergenceError) as error:
        _fail(f"error: {' '.join(str(error).split())}", 1)
    except KeyboardInterrupt:
        _fail(
            f"interrupted: {finished_seeds(job)} of {seeds} seeds finished and saved; go on with: {_again()}",
            130,
        )
    except OSError as error:  # a full disk, say
        _fail(f"error: {error}; what was finished is kept, go on with: {_again()}", 1)
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(summary))
    console.print(
        f"{summary['suspects']} of {summary['judged']} labels are suspect. Report: {output / 'report.html'}"
    )
    typer.echo(json.dumps(summary["line"]))


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function without arguments that returns (model, example_inputs), or a model with that attribute.",
        ),
    ],
    max_block: Annotated[
        int | None,
        typer.Option(help="Largest block (default: 1024 of an estimate; Symo's own with --plan)."),
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the blocks to this PNG or SVG file.")] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Show instead what the optimiser Symo would do, and what it costs."),
    ] = False,
    ranks: Annotated[int, typer.Option(help="With --plan: how many ranks share the blocks.")] = 8,
    tokens: Annotated[int, typer.Option(help="With --plan: tokens of a step.")] = TOKENS,
) -> None:
    """Show the symmetry of a model, what bounds it, and which curvature it allows at which cost.

    The model may be on the meta device, where it takes no memory.
    """
    try:
        if plan:
            _show_plan(target, max_block, figure, ranks, tokens)
            return
        found = examine(*load(target), 1024 if max_block is None else max_block)
        if figure is not None:
            draw(found, figure)
    except (InspectionError, OSError) as error:
        _fail(f"error: {' '.join(str(error).split())}", 2)
    console = Console(highlight=False, soft_wrap=True)
    for table in _inspection_tables(found):
        console.print(table)
    cost = found.plan.cost
    console.print(
        f"{found.size:,} parameters: largest block {cost.largest}, blocks {cost.bytes / 1e6:.2f} MB, moment "
        f"{cost.gram_flops / 1e6:.1f} Mflop, product {cost.apply_flops / 1e6:.1f} Mflop"
    )
    if figure is not None:
        console.print(f"Figure: {figure}")


def _show_plan(target: str, max_block: int | None, figure: Path | None, ranks: int, tokens: int) -> None:
    if figure is not None:
        raise InspectionError("--figure draws the blocks of an estimate; leave out --plan or --figure")
    for option, value in (("--ranks", ranks), ("--tokens", tokens)):
        if value < 1:
            raise InspectionError(f"{option} is {value}, expected >= 1")
    found = plan_optimizer(*load(target), max_block)
    console = Console(highlight=False, soft_wrap=True)
    for title, columns, rows in (routes_table(found), cost_table(found, tokens), shards_table(found, ranks)):
        table = _plain(title, *columns)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _inspection_tables(found: Inspection) -> list[Table]:
    inference, symmetry = found.inference, found.inference.symmetry
    frozen = f", {found.frozen:,} frozen" if found.frozen else ""
    leaves = _plain(
        f"{found.name}: {found.size:,} parameters{frozen}",
        "leaf",
        "shape",
        "symmetry",
        "planned blocks: columns x copies",
    )
    for row in found.leaves():
        leaves.add_row(*row)
    names = _plain("names: axes that are moved together", "name", "group", "bounded by")
    for name in symmetry.names():
        names.add_row(name, str(symmetry.groups[name]), inference.bounds[name] or "linear maps only")
    freed = _plain("free: axes on which nothing acts", "because of", "axes")
    for reason, axes in found.freed().items():
        unknown = f"{reason} (no rule for it)" if reason in inference.unknown else reason
        freed.add_row(unknown, ", ".join(axes[:4]) + (f" and {len(axes) - 4} more" if len(axes) > 4 else ""))
    decisions = _plain("plan", "", "name or leaf", "reason")
    for decision in found.plan.decisions:
        decisions.add_row(decision.action, decision.subject, decision.reason)
    return [table for table in (leaves, names, freed, decisions) if table.row_count]


def _plain(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _run(job: Job) -> dict[str, Any]:
    columns = [
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=job.seeds)

        def tell(done: int, part: float, text: str) -> None:
            which = f"seed {done + 1} of {job.seeds}: " if done < job.seeds and job.seeds > 1 else ""
            bar.update(task, completed=done + part, description=(which + text)[:32])

        return run(job, tell)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)


def _again() -> str:
    """The command that resumes this one."""
    arguments = [a for a in sys.argv[1:] if a not in ("--resume", "--overwrite")]
    return shlex.join(["weingarten", *arguments, "--resume"])


def _table(summary: dict[str, Any]) -> Table:
    counts = summary["counts"]
    table = Table(
        title=f"{summary['data']}: {counts['train']} rows judged by {counts['trusted']} trusted ones",
        caption="accuracy on held-out rows"
        + "; AUROC: are wrong labels ranked first?" * bool(summary["auroc"]),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    if summary["auroc"]:
        table.add_column("AUROC", justify="right", no_wrap=True)
    accuracy, ranking = summary["accuracy"], summary["auroc"]
    for key in sorted(accuracy, key=lambda k: (k == "true", -accuracy[k]["mean"])):
        cells = [ACCURACY[key], _cell(accuracy[key])]
        if ranking:
            cells.append(_cell(ranking["cleaned"]) if key == "cleaned" else "")
        table.add_row(*cells, style="bold cyan" if key == "cleaned" else "dim" if key == "true" else None)
    for key in sorted(
        (k for k in ranking if k != "cleaned" or not accuracy), key=lambda k: -ranking[k]["mean"]
    ):
        table.add_row(AUROC[key], "", _cell(ranking[key]))
    return table


def _cell(spread: dict[str, Any]) -> str:
    deviation = spread["deviation"]
    return f"{spread['mean']:.3f}" if deviation is None else f"{spread['mean']:.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    app()
