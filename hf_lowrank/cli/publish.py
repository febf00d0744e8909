"""Commands that hand checkpoints to others: Hub revisions and dense exports."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from hf_lowrank.cli.app import command
from hf_lowrank.cli.arguments import existing_folder
from hf_lowrank.errors import UserError


@command(
    "hf-lowrank push runs/galore user/repo --every 2",
    "hf-lowrank push runs/galore user/repo --every 4 --bucket user/states",
    "hf-lowrank push runs/sltrain user/repo --steps 100,400 --dense beside --license apache-2.0",
)
def push(
    run: Annotated[str, Argument(metavar="RUN", callback=existing_folder("run directory"), help="A run directory.")],
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


@command(
    "hf-lowrank export runs/sltrain@400 dense",
    "hf-lowrank export runs/relora/checkpoint-400 dense",
)
def export(
    checkpoint: Annotated[str, Argument(metavar="RUN@STEP", help="A run's checkpoint, or its folder.")],
    output: Annotated[Path, Argument(metavar="DIR", help="A new folder.")],
) -> None:
    """Write a checkpoint as the plain dense architecture, which loads without this package."""
    from hf_lowrank.runs.export import export as export_dense

    typer.echo(f"dense model: {export_dense(checkpoint, output)}")
