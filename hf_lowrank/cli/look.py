"""Commands that look at checkpoints: measure, compare, score and predict."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from hf_lowrank.cli.app import INCOMPLETE_STATUS, command
from hf_lowrank.cli.arguments import (
    Json,
    Revisions,
    Runs,
    Steps,
    check_metrics,
    check_steps,
    existing_file,
    existing_folder,
)
from hf_lowrank.cli.output import print_json
from hf_lowrank.formats import console, echo, is_first_process, pluralize

# Of missing values; the tables have all.
MOST_REASONS = 5


@command(
    "hf-lowrank measure runs/full_rank runs/galore",
    "hf-lowrank measure runs/galore --metrics spectra --steps last",
    "hf-lowrank measure user/repo --revisions 'step*'",
    "accelerate launch --module hf_lowrank measure runs/galore --sharded",
)
def measure(
    runs: Runs,
    metrics: Annotated[
        str | None,
        Option(
            metavar="IDS",
            callback=check_metrics,
            help="Metric ids or dimensions, comma-separated, or all; default: the sixteen.",
        ),
    ] = None,
    steps: Annotated[str | None, Option(callback=check_steps, help="all, last, or numbers such as 100,200.")] = None,
    baseline: Annotated[
        str | None, Option(metavar="RUN", help="The run to compare with; default: the full-rank one among RUN.")
    ] = None,
    preset: Annotated[Literal["fast", "paper"], Option(help="Settings of the metrics.")] = "fast",
    settings: Annotated[
        Path | None,
        Option(metavar="YAML", callback=existing_file("settings"), help="Settings that override the preset's."),
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
    from hf_lowrank.metrics import METRICS

    rows = measure_runs(**options, progress=sys.stderr.isatty())
    undefined = sum(row.value != row.value for row in rows)
    rest = f", {undefined} without a value" if undefined else ""
    echo(f"{pluralize(len(rows), 'measurement')} of {pluralize(len(runs), 'run')}{rest}")
    asked = set(METRICS.select(metrics))
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.failed and row.metric in asked:
            reasons.setdefault(row.reason or "", {})[row.metric] = None
    for reason, without in list(reasons.items())[:MOST_REASONS]:
        echo(f"  no {', '.join(without)}: {reason}")
    if len(reasons) > MOST_REASONS:
        echo(f"  and {pluralize(len(reasons) - MOST_REASONS, 'more reason')}, in measurements.jsonl")


@command(
    "hf-lowrank report runs/full_rank runs/galore --output report",
    "hf-lowrank report runs/* --output report --json",
)
def report(
    runs: Annotated[
        list[str], Argument(metavar="RUN...", callback=existing_folder("run directory"), help="Run directories.")
    ],
    output: Annotated[Path, Option(metavar="DIR", help="Folder for the page.")],
    study: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            callback=existing_folder("study folder"),
            help="A study's directory, to show its claims and prediction.",
        ),
    ] = None,
    others: Annotated[
        list[Path] | None,
        Option(
            "--other-study",
            metavar="DIR",
            callback=existing_folder("study folder"),
            help="A study of the same methods at another size, to show side by side; repeatable.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs in a table in the terminal and on one self-contained page in DIR."""
    from hf_lowrank.report import terminal_table, write_report
    from hf_lowrank.report.terminal import answer_document

    page = write_report(runs, output, study=study, others=others or ())
    if as_json:
        print_json({"page": page, "answer": answer_document(runs, study=study)})
        return
    console().print(terminal_table(runs, study=study))
    typer.echo(f"page: {page}")


@command(
    "hf-lowrank evaluate runs/full_rank runs/galore",
    "hf-lowrank evaluate runs/galore --tasks blimp,arc_easy --steps last --limit 100",
)
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
    as_json: Json = False,
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
    if as_json:
        print_json({"scores": asked, "missing": missing})
    elif asked:
        console().print(score_table(asked))
    if missing:
        if is_first_process():
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            typer.echo(f"hf-lowrank: without a score: {missing[0]}{more}", err=True)
        raise typer.Exit(INCOMPLETE_STATUS)


@command(
    "hf-lowrank predict runs/*",
    "hf-lowrank predict runs/* --metrics random_sharpness,weight_effective_rank --output prediction",
)
def predict(
    runs: Runs,
    tasks: Annotated[str | None, Option(metavar="NAMES", help="Tasks whose mean score to predict.")] = None,
    metrics: Annotated[
        str | None, Option(metavar="IDS", callback=check_metrics, help="Metrics to predict from; default: all.")
    ] = None,
    permutations: Annotated[int, Option(help="Permutations of the permutation test.")] = 199,
    seed: Annotated[int, Option(help="Seed of the bootstrap and the permutations.")] = 0,
    output: Annotated[
        Path | None, Option(metavar="DIR", help="Folder for prediction.json and prediction.png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Test, on methods and runs left out, whether geometry adds to perplexity in predicting downstream scores."""
    from hf_lowrank.downstream import predict as predict_scores
    from hf_lowrank.downstream.figures import prediction_tables

    prediction = predict_scores(
        runs, tasks=tasks, metrics=metrics, permutations=permutations, seed=seed, output=output
    )
    if as_json:
        print_json(prediction)
        return
    for note in prediction.notes:
        typer.echo(f"hf-lowrank: {note}", err=True)
    for table in prediction_tables(prediction):
        console().print(table)


@command(
    "hf-lowrank lm-eval run --model_args pretrained=runs/galore/checkpoint-400 --tasks pylib",
    "hf-lowrank lm-eval ls tasks",
    name="lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with this package's models and tasks registered; all arguments are passed on."""
    from hf_lowrank.downstream import run_lm_eval

    run_lm_eval(context.args)
