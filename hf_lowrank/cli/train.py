"""Commands that train: a recipe, or all of a study; and what training will take."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from hf_lowrank.cli.app import INCOMPLETE_STATUS, command
from hf_lowrank.cli.arguments import STAGES, Json, Overrides, Recipe, check_stages, existing_file
from hf_lowrank.cli.output import print_json
from hf_lowrank.formats import console, echo


@command(
    "hf-lowrank train recipes/nano/galore.yaml",
    "hf-lowrank train recipes/nano/galore.yaml --set method.rank=16 --output runs/rank16",
    "hf-lowrank train recipes/llama_60m/fira.yaml --seed 1",
    "accelerate launch --module hf_lowrank train recipes/llama_1b/galore.yaml",
)
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


@command(
    "hf-lowrank study recipes/studies/nano.yaml --dry-run",
    "hf-lowrank study recipes/studies/nano.yaml --jobs 2",
    "hf-lowrank study recipes/studies/nano.yaml --stages claims,report --json",
    "hf-lowrank study recipes/studies/nano.yaml --ray auto",
)
def study(
    path: Annotated[
        Path,
        Argument(
            metavar="STUDY", callback=existing_file("study"), help="A study file, e.g. recipes/studies/nano.yaml."
        ),
    ],
    output: Annotated[Path | None, Option(metavar="DIR", help="The study's directory; default: runs/NAME.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only show the planned work and its cost.")] = False,
    stages: Annotated[
        str | None, Option(metavar="NAMES", callback=check_stages, help=f"Some of {','.join(STAGES)}.")
    ] = None,
    jobs: Annotated[int | None, Option(help="Parallel units of work; default: the study's.")] = None,
    threads: Annotated[int | None, Option(help="CPU threads per unit; default: the study's.")] = None,
    ray: Annotated[
        str | None,
        Option(metavar="ADDRESS", help="Run the units on a Ray cluster: auto or HOST:PORT. Needs hf-lowrank[ray]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train, measure, evaluate and report the runs of a study file. Skips finished work and resumes where it stopped.
    Exits with status 1 if a unit failed."""
    options = dict(locals())
    del options["as_json"]
    from hf_lowrank.study import run_study
    from hf_lowrank.study.show import print_plan, print_result, result_document

    out = console()
    result = run_study(
        **options,
        say=lambda line: typer.echo(line, err=True),
        show_plan=lambda plan: None if as_json else print_plan(plan, out),
        stream=sys.stderr if sys.stderr.isatty() else None,
    )
    if as_json:
        print_json(result_document(result))
    elif not dry_run:
        print_result(result, out)
    if result.failures:
        raise typer.Exit(INCOMPLETE_STATUS)


@command(
    "hf-lowrank memory recipes/llama_60m/galore.yaml",
    "hf-lowrank memory recipes/llama_60m/galore.yaml --all-methods --batch-size 1",
    "hf-lowrank memory recipes/llama_350m/fira.yaml --world-size 8 --sharding fsdp2 --json",
)
def memory(
    recipes: Annotated[
        list[Path],
        Argument(
            metavar="RECIPE...", callback=existing_file("recipe"), help="Recipes, e.g. recipes/nano/galore.yaml."
        ),
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
    as_json: Json = False,
) -> None:
    """Estimate the training memory of recipes, item by item and compared with full-rank training. Trains nothing."""
    from tqdm.auto import tqdm

    from hf_lowrank.memory.compare import compare, comparison_table, item_table, sibling_recipes, verdicts

    paths = dict.fromkeys(
        path for recipe in recipes for path in (sibling_recipes(recipe) if all_methods else [recipe])
    )
    comparisons = compare(
        tqdm(paths, unit="recipe", delay=1, leave=False, disable=None),
        overrides=overrides or (),
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=checkpointing,
        world_size=world_size,
        sharding=sharding,
        dtype=dtype,
        device=device,
    )
    if as_json:
        print_json([comparison.document() for comparison in comparisons])
        return
    table = item_table(comparisons[0]) if len(comparisons) == 1 else comparison_table(comparisons)
    console().print(table)
    for line in verdicts(comparisons):
        typer.echo(line)
