"""The command line: one thin function per stage. All logic is in the functions that they call.

What the commands need is imported inside them, so that help and errors in the arguments come at once.
"""

import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer import Argument, Option

from hf_lowrank.compat import silence_torchao
from hf_lowrank.errors import STOPPED_STATUS, StoppedError, UserError
from hf_lowrank.formats import (
    console,
    echo,
    hide_hub_progress_bars,
    is_first_process,
    pluralize,
    print_own_warnings_as_lines,
    replace_unencodable,
)
from hf_lowrank.storage.files import refusal_of

# typer may vendor click, so the base class of click's usage errors is taken from a public subclass.
UsageFault: type[Exception] = typer.BadParameter.__mro__[2]

# A test compares them with the study's own.
STAGES = ("sweep", "train", "measure", "evaluate", "predict", "claims", "report")

app = typer.Typer(
    name="hf-lowrank",
    help="Pre-train with low-rank methods, measure which solution was found, and report it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


# Checks that need nothing but the argument; the functions behind a command make them, too, but load more for it.


def _each(fault: Callable[[Any], str | None]) -> Callable[[Any], Any]:
    """A check of an argument, or of each of its values: `fault` says what is wrong with one, or None."""

    def check(given: Any) -> Any:
        for value in given if isinstance(given, list) else [given]:
            message = None if value is None else fault(value)
            if message is not None:
                raise UserError(message)
        return given

    return check


def _file(kind: str) -> Callable[[Any], Any]:
    return _each(lambda path: None if path.is_file() else f"{path}: no such {kind} file")


def _folder(kind: str) -> Callable[[Any], Any]:
    return _each(lambda path: None if os.path.isdir(path) else f"{path}: no such {kind}")


@_each
def _check_runs(run: str) -> str | None:
    if os.path.isdir(run) or (run.count("/") == 1 and not run.startswith((".", "/", "~"))):
        return None
    return f"{run}: no such folder; give a run directory, a folder of checkpoints, or user/repo"


@_each
def _check_steps(steps: str) -> str | None:
    valid = re.fullmatch(r"all|last|\s*\d+\s*(,\s*\d+\s*)*", steps)
    return None if valid else f"steps must be all, last or numbers such as 100,200, got {steps!r}"


@_each
def _check_metrics(names: str) -> None:
    from hf_lowrank.metrics import METRICS

    METRICS.select(names)


@_each
def _check_stages(names: str) -> str | None:
    wrong = [name for name in names.split(",") if name.strip() not in STAGES] if names else []
    return f"stages must be some of {','.join(STAGES)}, got {wrong[0]!r}" if wrong else None


Recipe = Argument(metavar="RECIPE", callback=_file("recipe"), help="A recipe, e.g. recipes/nano/galore.yaml.")
Runs = Annotated[
    list[str],
    Argument(
        metavar="RUN...",
        callback=_check_runs,
        help="Run directories, folders of checkpoints, or Hub repositories (user/repo@step-N).",
    ),
]
Overrides = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override one recipe key; repeatable.")
]
Revisions = Annotated[str | None, Option(metavar="PATTERN", help="Which revisions are checkpoints, e.g. 'step*'.")]
Steps = Annotated[
    str | None, Option(callback=_check_steps, help="all, last, or numbers such as 100,200; default: all.")
]


@app.callback()
def prepare() -> None:
    """Pre-train with low-rank methods, measure which solution was found, and report it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    hide_hub_progress_bars()
    silence_torchao()
    logger = logging.getLogger("hf_lowrank")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("hf-lowrank: %(message)s"))
        logger.addHandler(handler)
        # The processes of a launch log the same lines; one of them prints them.
        logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)


@app.command()
def train(
    recipe: Annotated[Path, Recipe],
    overrides: Overrides = None,
    seed: Annotated[int | None, Option(help="Override the recipe's seed.")] = None,
    output: Annotated[Path | None, Option(metavar="DIR", help="The run directory.")] = None,
) -> None:
    """Train a recipe. An interrupted run resumes from its last complete checkpoint."""
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
        Option(
            metavar="IDS",
            callback=_check_metrics,
            help="Metric ids or dimensions, comma-separated, or all; default: the sixteen.",
        ),
    ] = None,
    steps: Annotated[str | None, Option(callback=_check_steps, help="all, last, or numbers such as 100,200.")] = None,
    baseline: Annotated[
        str | None, Option(metavar="RUN", help="The run to compare with; default: the full-rank one among RUN.")
    ] = None,
    preset: Annotated[Literal["fast", "paper"], Option(help="Settings of the metrics.")] = "fast",
    settings: Annotated[
        Path | None, Option(metavar="YAML", callback=_file("settings"), help="Settings that override the preset's.")
    ] = None,
    device: Annotated[
        str | None, Option(help="Device of the models; auto spreads each over all accelerators.")
    ] = None,
    sharded: Annotated[
        bool, Option("--sharded", help="Under accelerate launch, shard each model over all processes (FSDP2).")
    ] = False,
    evaluation_set: Annotated[
        Path | None, Option(metavar="FILE", help="Held-out sequences or a text file; default: each run's own.")
    ] = None,
    output: Annotated[
        Path | None, Option(metavar="DIR", help="Folder for the measurements; default: each run's directory.")
    ] = None,
    revisions: Revisions = None,
) -> None:
    """Measure checkpoints and add rows to measurements.jsonl. Skips finished measurements."""
    options = dict(locals())
    from hf_lowrank.measuring import measure as measure_runs

    rows = measure_runs(**options, progress=sys.stderr.isatty())
    undefined = sum(row.value != row.value for row in rows)
    rest = f", {undefined} without a value" if undefined else ""
    echo(f"{pluralize(len(rows), 'measurement')} of {pluralize(len(runs), 'run')}{rest}")


@app.command()
def report(
    runs: Annotated[list[str], Argument(metavar="RUN...", callback=_folder("run directory"), help="Run directories.")],
    output: Annotated[Path, Option(metavar="DIR", help="Folder for the page.")],
    study: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            callback=_folder("study folder"),
            help="A study's directory, to show its claims and prediction.",
        ),
    ] = None,
    others: Annotated[
        list[Path] | None,
        Option(
            "--other-study",
            metavar="DIR",
            callback=_folder("study folder"),
            help="A study of the same methods at another size, to show side by side; repeatable.",
        ),
    ] = None,
) -> None:
    """Compare runs in a table in the terminal and on one self-contained page in DIR."""
    from hf_lowrank.report import terminal_table, write_report

    page = write_report(runs, output, study=study, others=others or ())
    console().print(terminal_table(runs, study=study))
    typer.echo(f"page: {page}")


@app.command()
def evaluate(
    runs: Runs,
    tasks: Annotated[
        str | None, Option(metavar="NAMES", help="lm-eval tasks or groups, comma-separated; default: offline tasks.")
    ] = None,
    steps: Steps = None,
    limit: Annotated[int | None, Option(help="Items per task, for a quick try.")] = None,
    batch_size: Annotated[int | None, Option(help="Requests per batch.")] = None,
    device: Annotated[str | None, Option(help="Device of the models.")] = None,
    output: Annotated[
        Path | None, Option(metavar="DIR", help="Folder for the scores; default: each run's directory.")
    ] = None,
    revisions: Revisions = None,
) -> None:
    """Score checkpoints with lm-eval and add rows to downstream.jsonl. Skips finished scores. Exits with status 1 if
    a requested score is missing."""
    from hf_lowrank.downstream import evaluate as evaluate_runs
    from hf_lowrank.downstream.figures import score_table
    from hf_lowrank.downstream.runner import requested_scores
    from hf_lowrank.runs.trajectory import Trajectory

    trajectories = [Trajectory(run, revisions=revisions) for run in runs]
    wanted: dict[str, Any] = {"tasks": tasks, "steps": steps, "limit": limit, "output": output}
    evaluate_runs(
        trajectories,
        **wanted,
        batch_size=batch_size,
        device=device,
        warn=lambda line: typer.echo(f"hf-lowrank: {line}", err=True),
        progress=sys.stderr.isatty(),
    )
    asked, missing = requested_scores(trajectories, **wanted)
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
    tasks: Annotated[str | None, Option(metavar="NAMES", help="Tasks whose mean score to predict.")] = None,
    metrics: Annotated[
        str | None, Option(metavar="IDS", callback=_check_metrics, help="Metrics to predict from; default: all.")
    ] = None,
    permutations: Annotated[int, Option(help="Permutations of the permutation test.")] = 199,
    seed: Annotated[int, Option(help="Seed of the bootstrap and the permutations.")] = 0,
    output: Annotated[
        Path | None, Option(metavar="DIR", help="Folder for prediction.json and prediction.png.")
    ] = None,
) -> None:
    """Test, on methods and runs left out, whether geometry adds to perplexity in predicting downstream scores."""
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
    """Run lm-eval with this package's models and tasks registered; all arguments are passed on."""
    from hf_lowrank.downstream import run_lm_eval

    run_lm_eval(context.args)


@app.command()
def push(
    run: Annotated[str, Argument(metavar="RUN", callback=_folder("run directory"), help="A run directory.")],
    repo_id: Annotated[str, Argument(metavar="USER/REPO", help="The Hub repository; created if missing.")],
    steps: Annotated[str | None, Option(help="Only these checkpoints, e.g. 100,200.")] = None,
    every: Annotated[int | None, Option(help="Every k-th checkpoint and the last.")] = None,
    log_spaced: Annotated[int | None, Option(help="This many checkpoints, evenly spaced in log(step).")] = None,
    dense: Annotated[
        Literal["beside", "instead"] | None, Option(help="Also push the dense export, or only that.")
    ] = None,
    optimizer: Annotated[
        bool, Option("--optimizer", help="Also push optimizer states, to their own branches.")
    ] = False,
    bucket: Annotated[
        str | None,
        Option(metavar="USER/BUCKET", help="Also store every checkpoint, with optimizer states, in this bucket."),
    ] = None,
    public: Annotated[bool, Option("--public", help="Make a new repository, or bucket, public.")] = False,
    license_: Annotated[str | None, Option("--license", help="The card's license, as a Hub identifier.")] = None,
) -> None:
    """Publish a run's checkpoints as revisions step-N. Skips revisions that are already complete."""
    options = {**locals(), "steps": _numbers(steps)}
    from hf_lowrank.hub import push as push_run

    pushed = push_run(license=options.pop("license_"), **options)
    stored = "" if bucket is None else f"; the bucket {bucket} holds the run"
    typer.echo(f"{len(pushed)} revisions of {repo_id} are complete{stored}")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--steps must be numbers such as 100,200, got {text!r}") from None


@app.command()
def export(
    checkpoint: Annotated[str, Argument(metavar="RUN@STEP", help="A run's checkpoint, or its folder.")],
    output: Annotated[Path, Argument(metavar="DIR", help="A new folder.")],
) -> None:
    """Write a checkpoint as the plain dense architecture, which loads without this package."""
    from hf_lowrank.runs.export import export as export_dense

    typer.echo(f"dense model: {export_dense(checkpoint, output)}")


@app.command()
def study(
    path: Annotated[
        Path, Argument(metavar="STUDY", callback=_file("study"), help="A study file, e.g. recipes/studies/nano.yaml.")
    ],
    output: Annotated[Path | None, Option(metavar="DIR", help="The study's directory; default: runs/NAME.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only show the planned work and its cost.")] = False,
    stages: Annotated[
        str | None, Option(metavar="NAMES", callback=_check_stages, help=f"Some of {','.join(STAGES)}.")
    ] = None,
    jobs: Annotated[int | None, Option(help="Parallel units of work; default: the study's.")] = None,
    threads: Annotated[int | None, Option(help="CPU threads per unit; default: the study's.")] = None,
) -> None:
    """Train, measure, evaluate and report the runs of a study file. Skips finished work and resumes where it stopped.
    Exits with status 1 if a unit failed."""
    options = dict(locals())
    from hf_lowrank.study import run_study
    from hf_lowrank.study.show import print_plan, print_result

    out = console()
    result = run_study(
        **options,
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
    recipes: Annotated[
        list[Path],
        Argument(metavar="RECIPE...", callback=_file("recipe"), help="Recipes, e.g. recipes/nano/galore.yaml."),
    ],
    all_methods: Annotated[
        bool, Option("--all-methods", help="Also the other methods' recipes in RECIPE's folder.")
    ] = False,
    batch_size: Annotated[int | None, Option(help="Sequences per device; default: the recipe's.")] = None,
    sequence_length: Annotated[int | None, Option(help="Tokens per sequence; default: the recipe's.")] = None,
    checkpointing: Annotated[
        bool | None, Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Default: the recipe's.")
    ] = None,
    world_size: Annotated[int, Option(help="Number of devices.")] = 1,
    sharding: Annotated[Literal["ddp", "fsdp2"] | None, Option(help="Default with several devices: ddp.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, Option(help="Type of the weights.")] = None,
    device: Annotated[str | None, Option(help="cpu or cuda; default: the one of this machine.")] = None,
    overrides: Overrides = None,
) -> None:
    """Estimate the training memory of recipes, item by item and compared with full-rank training. Trains nothing."""
    from hf_lowrank.memory.compare import compare, comparison_table, item_table, sibling_recipes, verdicts

    paths = dict.fromkeys(
        path for recipe in recipes for path in (sibling_recipes(recipe) if all_methods else [recipe])
    )
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
    """List the methods that a recipe can name, and their settings."""
    from hf_lowrank.methods import METHODS, setting_sections

    width = console().width

    def show(indent: str, text: str) -> None:
        typer.echo(fill(text, width, initial_indent=indent, subsequent_indent=" " * len(indent)) or indent.rstrip())

    for heading, settings in setting_sections(METHODS):
        show("", heading)
        for setting in settings:
            show(f"    {setting.name:<23} {setting.default!s:<15} ", setting.description)
            for choice, meaning in setting.choices.items():
                show(f"{' ' * 44}{choice:<15} ", meaning)
        typer.echo()


@app.command()
def metrics() -> None:
    """List the metrics by dimension, and their meaning."""
    from hf_lowrank.metrics import METRICS

    for metric in METRICS.values():
        remarks = [metric.dimension, *(["needs a baseline"] if metric.needs_baseline else [])]
        remarks += ["extra"] if metric.extra else []
        typer.echo(f"{metric.id:24} {metric.summary} [{', '.join(remarks)}]")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. User errors are one line on stderr and exit status 2."""
    command = typer.main.get_command(app)
    given = sys.argv[1:] if arguments is None else arguments
    replace_unencodable()
    print_own_warnings_as_lines()
    try:
        status = command.main(args=given or ["--help"], prog_name="hf-lowrank", standalone_mode=False)
    except UserError as error:
        _stop(str(error))
    except UsageFault as error:
        context = getattr(error, "ctx", None)
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        message = message.replace(": Value error, ", ": ")  # typer's
        _stop(f"{message} (see {context.command_path} --help)" if context else message)
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
