"""The command line: one thin verb per stage. All logic is in the functions that the verbs call."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hf_lowrank.errors import STOPPED_STATUS, StoppedError, UserError
from hf_lowrank.formats import console, echo, lose_no_line, no_bars_in_logs, warn_in_lines
from hf_lowrank.storage.files import refusal_of
from hf_lowrank.storage.locks import is_first_process

# typer may carry a click of its own, so the base of its usage errors is reached through a public name.
UsageFault: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="hf-lowrank",
    help="Pre-train with low-rank methods, measure what kind of solution came out, and report it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Runs = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Run directories, folders of checkpoints, or user/repo@step-N.")
]


@app.callback()
def prepare() -> None:
    """Pre-train with low-rank methods, measure what kind of solution came out, and report it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    no_bars_in_logs()
    logger = logging.getLogger("hf_lowrank")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("hf-lowrank: %(message)s"))
        logger.addHandler(handler)
        # What all processes of a launch do is said once.
        logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as recipes/nano/galore.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key; can be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The run directory.")] = None,
) -> None:
    """Train by a recipe; an interrupted run continues from its last whole checkpoint."""
    from hf_lowrank.memory import memory_recorder
    from hf_lowrank.training import load_recipe, pretrain

    loaded = load_recipe(recipe, overrides=overrides or (), seed=seed)
    run = pretrain(loaded, output=output, recorder=memory_recorder)
    echo(f"run directory: {run}")


@app.command()
def measure(
    runs: Runs,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="IDS", help="Metric ids or dimensions, comma-separated, or all; default: the sixteen."),
    ] = None,
    steps: Annotated[str | None, typer.Option(help="all, last, or numbers as 100,200.")] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="RUN", help="The run to compare with; default: the full-rank one among RUN.")
    ] = None,
    preset: Annotated[str, typer.Option(help="fast or paper.")] = "fast",
    settings: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Settings of single metrics, over the preset's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where models are evaluated; auto: each over all accelerators.")
    ] = None,
    sharded: Annotated[
        bool,
        typer.Option("--sharded", help="Under accelerate launch, all processes hold each model together (FSDP2)."),
    ] = False,
    evaluation_set: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out sequences or a text; default: each run's own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where measurements go; default: each run's directory.")
    ] = None,
    revisions: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Which revisions are checkpoints, as 'step*'.")
    ] = None,
) -> None:
    """Measure checkpoints: rows of measurements.jsonl. What is there already is not measured again."""
    from hf_lowrank.formats import plain
    from hf_lowrank.measuring import measure as measure_runs

    rows = measure_runs(
        runs,
        metrics=metrics,
        steps=steps,
        baseline=baseline,
        preset=preset,
        settings=settings,
        device=device,
        evaluation_set=evaluation_set,
        output=output,
        revisions=revisions,
        sharded=sharded,
        progress=sys.stderr.isatty(),
    )
    without = sum(row.value != row.value for row in rows)
    rest = f", {without} without a value" if without else ""
    echo(f"{plain(len(rows), 'measurement')} of {plain(len(runs), 'run')}{rest}")


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the page goes.")],
    study: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A study's folder, whose claims and prediction are shown too.")
    ] = None,
) -> None:
    """Show runs side by side: a table here, and one self-contained page in DIR."""
    from hf_lowrank.report import terminal_table, write_report

    page = write_report(runs, output, study=study)
    console().print(terminal_table(runs, study=study))
    typer.echo(f"page: {page}")


@app.command()
def evaluate(
    runs: Runs,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="lm-eval tasks or groups, comma-separated; default: offline ones."),
    ] = None,
    steps: Annotated[str | None, typer.Option(help="all, last, or numbers as 100,200; default: all.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many items of each task, to try it out.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    device: Annotated[str | None, typer.Option(help="Where models are evaluated.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where scores go; default: each run's directory.")
    ] = None,
    revisions: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Which revisions are checkpoints, as 'step*'.")
    ] = None,
) -> None:
    """Score checkpoints with lm-eval: rows of downstream.jsonl. No checkpoint and task is scored twice. Status 1: some
    of what was asked for has no score."""
    from hf_lowrank.downstream import evaluate as evaluate_runs
    from hf_lowrank.downstream.figures import score_table
    from hf_lowrank.downstream.runner import asked_for
    from hf_lowrank.runs.trajectory import Trajectory

    trajectories = [Trajectory(run, revisions=revisions) for run in runs]
    evaluate_runs(
        trajectories,
        tasks=tasks,
        steps=steps,
        limit=limit,
        batch_size=batch_size,
        device=device,
        output=output,
        say=lambda line: typer.echo(f"hf-lowrank: {line}", err=True),
        progress=sys.stderr.isatty(),
    )
    asked, missing = asked_for(trajectories, output=output, tasks=tasks, steps=steps, limit=limit)
    if asked:
        console().print(score_table(asked))
    if missing:
        if is_first_process():
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            typer.echo(f"hf-lowrank: without a score: {missing[0]}{more}", err=True)
        raise typer.Exit(1)


@app.command()
def predict(
    runs: Runs,
    tasks: Annotated[str | None, typer.Option(metavar="NAMES", help="Tasks whose mean score is predicted.")] = None,
    metrics: Annotated[str | None, typer.Option(metavar="IDS", help="Metrics that may help; default: all.")] = None,
    permutations: Annotated[int, typer.Option(help="Of the permutation test.")] = 199,
    seed: Annotated[int, typer.Option(help="Of bootstrap and permutations.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Writes prediction.json and .png there.")] = None,
) -> None:
    """Ask whether geometry adds to perplexity in predicting downstream scores, by leave-one-run-out."""
    from hf_lowrank.downstream import predict as predict_scores
    from hf_lowrank.downstream.figures import prediction_tables

    prediction = predict_scores(
        runs, tasks=tasks, metrics=metrics, permutations=permutations, seed=seed, output=output
    )
    for note in prediction.notes:
        typer.echo(f"hf-lowrank: {note}", err=True)
    for table in prediction_tables(prediction):
        console().print(table)


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with this package's models and tasks known to it; every flag is passed on."""
    from hf_lowrank.downstream import run_lm_eval

    run_lm_eval(context.args)


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/REPO", help="The Hub repository; made if there is none.")],
    steps: Annotated[str | None, typer.Option(help="Only these checkpoints, as 100,200.")] = None,
    every: Annotated[int | None, typer.Option(help="Every k-th checkpoint and the last.")] = None,
    log_spaced: Annotated[int | None, typer.Option(help="So many, evenly spaced in log(step).")] = None,
    dense: Annotated[
        str | None, typer.Option(help="beside or instead: the dense export too, or in its place.")
    ] = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Optimizer states too, on their own branches.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public.")] = False,
    license_: Annotated[str | None, typer.Option("--license", help="The card's licence, as a Hub identifier.")] = None,
) -> None:
    """Publish a run's checkpoints as revisions step-N; what is there already is not sent again."""
    from hf_lowrank.hub import push as push_run

    pushed = push_run(
        run,
        repo_id,
        steps=_numbers(steps),
        every=every,
        log_spaced=log_spaced,
        dense=dense,  # type: ignore[arg-type]
        optimizer=optimizer,
        public=public,
        license=license_,
    )
    typer.echo(f"{len(pushed)} revisions of {repo_id} are whole")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--steps must be numbers as 100,200, got {text!r}") from None


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="RUN@STEP", help="A run's checkpoint, or its folder.")],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet.")],
) -> None:
    """Write a checkpoint as the plain dense architecture, which loads without this package."""
    from hf_lowrank.runs.export import export as export_dense

    typer.echo(f"dense model: {export_dense(checkpoint, output)}")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="A study file, as recipes/studies/nano.yaml.")],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The study's directory; default: runs/NAME.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would run, and what it takes.")] = False,
    stages: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Some of sweep,train,measure,evaluate,predict,claims,report."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Units of work side by side; default: the study's.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each; default: the study's.")] = None,
) -> None:
    """Do all that a study file asks for and is not done yet; a killed study is continued. Status 1: some of it failed.

    Recipes by seeds are trained, measured against the baseline, evaluated, and reported.
    """
    from hf_lowrank.study import run_study
    from hf_lowrank.study.show import print_plan, print_result

    out = console()
    result = run_study(
        file,
        output=output,
        stages=stages,
        dry_run=dry_run,
        jobs=jobs,
        threads=threads,
        say=lambda line: typer.echo(line, err=True),
        show_plan=lambda plan: print_plan(plan, out),
        stream=sys.stderr if sys.stderr.isatty() else None,
    )
    if not dry_run:
        print_result(result, out)
        if result.failures:
            raise typer.Exit(1)


@app.command()
def memory(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes, as recipes/nano/galore.yaml.")],
    all_methods: Annotated[
        bool, typer.Option("--all-methods", help="Every method's recipe in RECIPE's folder beside it.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a device; default: the recipe's.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a sequence; default: the recipe's.")] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Default: the recipe's."),
    ] = None,
    world_size: Annotated[int, typer.Option(help="Devices.")] = 1,
    sharding: Annotated[str | None, typer.Option(help="ddp or fsdp2; default with several devices: ddp.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: what is here.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key of every recipe.")
    ] = None,
) -> None:
    """Tell how much memory training by a recipe takes, item by item, beside full-rank training; nothing is trained."""
    from hf_lowrank.memory.compare import beside, compare, verdicts
    from hf_lowrank.memory.show import comparison_table, item_table

    paths = dict.fromkeys(path for recipe in recipes for path in (beside(recipe) if all_methods else [recipe]))
    comparisons = compare(
        paths,
        overrides=overrides or (),
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=checkpointing,
        world_size=world_size,
        sharding=sharding,
        dtype=dtype,
        device=device,
    )
    table = item_table(comparisons[0]) if len(comparisons) == 1 else comparison_table(comparisons)
    console().print(table)
    for line in verdicts(comparisons):
        typer.echo(line)


@app.command()
def methods() -> None:
    """List the methods that a recipe can name, with their settings."""
    from hf_lowrank.methods import METHODS

    for method in METHODS.values():
        typer.echo(f"{method.name:12} {method.summary}" + (f" [{method.source}]" if method.source else ""))
        for name, field in method.settings.model_fields.items():
            default = "required" if field.is_required() else f"= {field.get_default(call_default_factory=True)!r}"
            typer.echo(f"{'':14}{name} {default}" + (f"  {field.description}" if field.description else ""))


@app.command()
def metrics() -> None:
    """List the metrics by dimension, with their meaning."""
    from hf_lowrank.metrics import METRICS

    for metric in METRICS.values():
        remarks = [metric.dimension, *(["needs a baseline"] if metric.needs_baseline else [])]
        remarks += ["extra"] if metric.extra else []
        typer.echo(f"{metric.id:24} {metric.summary} [{', '.join(remarks)}]")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; user errors are one line on stderr and exit status 2."""
    command = typer.main.get_command(app)
    given = sys.argv[1:] if arguments is None else arguments
    lose_no_line()
    warn_in_lines()
    try:
        status = command.main(args=given or ["--help"], prog_name="hf-lowrank", standalone_mode=False)
    except UserError as error:
        _stop(str(error))
    except UsageFault as error:
        context = getattr(error, "ctx", None)
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _stop(f"{message} ({context.command_path} --help lists what is there)" if context else message)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("hf-lowrank: interrupted", err=True)
        sys.exit(130)
    except StoppedError as stop:
        typer.echo(f"hf-lowrank: {stop}", err=True)
        sys.exit(STOPPED_STATUS)
    except OSError as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        _stop(refusal)
    sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str) -> NoReturn:
    typer.echo("hf-lowrank: " + " ".join(message.split()), err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
