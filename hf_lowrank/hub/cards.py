"""Cards: a repository's page about a run, written from what is on disk. The text that a person added is kept.

Metadata is written by huggingface_hub's `ModelCardData`, never by a template; every value in the text is escaped.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCardData, SpaceCardData

from hf_lowrank.errors import UserError
from hf_lowrank.formats import big_count, byte_size, duration, significant
from hf_lowrank.hub.markdown import Markdown, fenced, render
from hf_lowrank.hub.metadata import name_of, read_card, tag_of, written_metadata
from hf_lowrank.hub.pictures import PICTURES, draw, write_pictures
from hf_lowrank.hub.privacy import without_private, without_private_parts
from hf_lowrank.methods import METHODS
from hf_lowrank.metrics import NOT_DENSE_MARK, describe, metric_order
from hf_lowrank.runs.layout import RECIPE, step_of
from hf_lowrank.runs.measurements import Measurement
from hf_lowrank.runs.records import RunRecord, read_config_file, read_run
from hf_lowrank.runs.run_files import TrainerState, read_recipe, read_trainer_state, section
from hf_lowrank.runs.scores import Score
from hf_lowrank.storage.files import write_text

NAME = re.compile(r"\w[\w-]*", re.ASCII)
OWN_BEGIN = "<!-- Your own words: what stands from here … -->"
OWN_END = "<!-- … to here is kept when the card is written anew. -->"
LIMITS = (
    "It continues text; it was not tuned to follow instructions or to be safe.",
    "One training run with one seed; another seed gives other numbers.",
    "It was trained to compare methods, on the text named above; do not expect knowledge beyond it.",
)
COLA_LIMIT = (
    "CoLA's layers have no dense weight: spectra are those of the product B A, a surrogate, and landscapes and the "
    "step barrier are of the model's own parameters, which do not compare with those of dense weights."
)
COSTS = (
    ("Tokens seen", "tokens_seen", big_count),
    ("Time in training steps", "training_seconds", duration),
    ("Processor time of training steps", "cpu_seconds", duration),
    ("Total time", "wall_seconds", duration),
    ("Peak memory of the process", "peak_memory_bytes", byte_size),
    ("Optimizer state", "optimizer_state_bytes", byte_size),
)


def model_card(
    run: Path | None,
    repo_id: str | None,
    *,
    checkpoint: Path | None = None,
    previous: str | None = None,
    license: str | None = None,
    pictures: Sequence[str] = (),
    picture_folder: str = "pictures",
    name: str | None = None,
) -> str:
    """The page of a repository, metadata and text.

    Args:
        run: the run directory; None for a checkpoint without one.
        repo_id: `user/name`; None where the weights are not published.
        checkpoint: the folder that `main` holds; None: the last one of the run.
        previous: the existing card: a person's text in it, and metadata of other sources, are kept.
        license: a Hub identifier; None: the previous card's, else "unknown".
        pictures: names of the pictures in `picture_folder`, as `draw` returns them.
        picture_folder: relative to the card.
        name: the run's name; None: the recipe's.
    """
    record = _record(run, checkpoint)
    recipe = without_private_parts(dict(record.recipe))
    step = step_of(record.checkpoint) if record.checkpoint is not None else 0
    before, own = read_card(previous)
    measured, scores = measured_last(record), scored_last(record)
    loss = record.state.loss_at(step)
    name = name_of(name or recipe.get("name") or (repo_id or "").rpartition("/")[2] or "unnamed")
    losses = _losses(record.state, step, measured)
    metadata = written_metadata(recipe, record.config, before, license, name, losses, scores)
    rows, notes = _metric_rows(record, measured)
    planned = section(recipe, "training").get("max_steps")
    parameters = record.fact("parameters")
    body = render(
        "model_card.md.j2",
        name=name,
        parameters=big_count(parameters) if parameters is not None else "An unknown number of",
        method=_method(recipe),
        under_way=isinstance(planned, int) and 0 < step < planned,
        step=step,
        own_begin=Markdown(OWN_BEGIN),
        own_words=Markdown(own_words(own)),
        own_end=Markdown(OWN_END),
        published=repo_id is not None,
        loading=_loading(repo_id, record.config, None) if repo_id is not None else "",
        metrics=rows,
        metric_notes=notes,
        metrics_step=measured[0].step if measured else None,
        sequences=measured[0].settings.get("sequences", "the") if measured else "the",
        loss=f"{loss:.4f}" if loss is not None else None,
        scores=[_score_row(row) for row in scores],
        scores_step=scores[0].step if scores else None,
        harness=scores[0].lm_eval_version if scores else None,
        pictures=_shown(pictures, picture_folder),
        corpus=_corpus(section(recipe, "data")),
        costs=_costs(record),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
        limits=[*LIMITS, *([COLA_LIMIT] if section(recipe, "method").get("name") == "cola" else [])],
    )
    return f"---\n{metadata}\n---\n\n{without_private(body)}"


def public_recipe(run: Path | None) -> dict[str, Any]:
    """The recipe of a run without private parts; empty without one."""
    return without_private_parts(read_recipe(run) or {}) if run is not None else {}


def measured_last(record: RunRecord) -> list[Measurement]:
    """The rows of the whole model at the last measured step, one per metric and baseline, without points of curves."""
    rows = [row for row in record.rows if row.scope == "model" and not {"t", "x"} & row.settings.keys()]
    last = max((row.step for row in rows), default=0)
    return list({(row.metric, row.baseline): row for row in rows if row.step == last}.values())


def scored_last(record: RunRecord) -> list[Score]:
    """The scores of the last scored step, one per task and metric."""
    rows = [row for row in record.scores if math.isfinite(row.value)]
    last = max((row.step for row in rows), default=0)
    return list({(row.task, row.metric): row for row in rows if row.step == last}.values())


def step_card(
    repo_id: str, name: str, step: int, branch: str, *, config: Mapping[str, Any], recipe: Mapping[str, Any]
) -> str:
    """The short page of one revision; the same however often it is pushed."""
    tags = ["hf_lowrank", tag_of(section(recipe, "method").get("name"))]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=[t for t in tags if t])
    body = render(
        "step_card.md.j2",
        name=name_of(name),
        step=step,
        dense=branch.startswith("dense-"),
        loading=_loading(repo_id, config, branch),
        repo_url=Markdown(repo_id),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{without_private(body)}"


def metric_card(
    *,
    title: str,
    summary: str,
    usage: str,
    metrics: Sequence[Any],
    limits: Sequence[str] = (),
    citation: str = "",
    tags: Sequence[str] = (),
    sdk: str = "gradio",
) -> str:
    """The card of an `evaluate` module, as a Space wants it.

    `metrics` are entries with `id`, `summary`, `better` and `unit`, as those of `hf_lowrank.metrics.METRICS`; `usage`
    is Python, `limits` sentences, `citation` BibTeX.
    """
    data = SpaceCardData(title=name_of(title), sdk=sdk, app_file="app.py", tags=["evaluate", "metric", *tags])
    body = render(
        "metric_card.md.j2",
        title=name_of(title),
        summary=summary,
        usage=usage,
        metrics=metrics,
        limits=limits,
        citation=citation,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _record(run: Path | None, checkpoint: Path | None) -> RunRecord:
    if run is not None:
        return read_run(run, checkpoint)
    if checkpoint is None:
        return RunRecord(Path(), "")
    state = read_trainer_state(checkpoint) or TrainerState()
    return RunRecord(checkpoint, "", state=state, checkpoint=checkpoint, config=read_config_file(checkpoint))


def _losses(state: TrainerState, step: int, measured: Sequence[Measurement]) -> dict[str, tuple[int, float]]:
    """Loss and perplexity with their step: on all sequences that training evaluated, else as measured."""
    loss = state.logged("eval_loss").get(step)
    if loss is not None:
        return {"loss": (step, loss), "perplexity": (step, math.exp(min(loss, 700.0)))}
    return {
        row.metric: (row.step, row.value) for row in measured if row.metric in ("loss", "perplexity") and row.has_value
    }


def _metric_rows(record: RunRecord, rows: Sequence[Measurement]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    shown, notes = [], []
    for row in sorted(rows, key=lambda row: metric_order(row.metric)):
        title = describe(row.metric).title
        not_dense = record.not_dense(row)
        mark = "" if not_dense is None else f" {NOT_DENSE_MARK}"
        shown.append(
            {
                "title": title,
                "value": significant(row.value) + mark if row.has_value else "none",
                "interval": f"{significant(row.ci_low)} … {significant(row.ci_high)}" if row.has_interval else "",
                "baseline": row.baseline or "",
            }
        )
        if why := row.reason or not_dense:
            notes.append({"title": title + mark, "reason": why})
    return shown, notes


def _shown(pictures: Sequence[str], folder: str) -> list[dict[str, str]]:
    return [
        {
            "file": Markdown(f"{quote(folder)}/{name}.png"),
            "title": PICTURES[name].title if name in PICTURES else name,
            "meaning": PICTURES[name].meaning if name in PICTURES else "",
        }
        for name in pictures
        if re.fullmatch(r"[\w-]+", name)
    ]


def _score_row(row: Score) -> dict[str, str]:
    return {
        "task": name_of(row.task),
        "metric": name_of(row.metric),
        "value": f"{row.value:.4f}",
        "stderr": f"{row.stderr:.4f}" if row.stderr is not None and math.isfinite(row.stderr) else "",
        "n": str(row.n),
    }


def own_words(text: str) -> str:
    """The text between the two marks of a card; the whole text without them, since a person wrote it."""
    # Whole lines only: a name that contains a mark is not a mark.
    own = re.search(f"^{re.escape(OWN_BEGIN)}\r?$(.*?)^{re.escape(OWN_END)}\r?$", text, re.S | re.M)
    return (own[1] if own else text).strip("\n")


def _loading(repo_id: str, config: Mapping[str, Any], revision: str | None) -> Markdown:
    chosen = f', revision="{revision}"' if revision else ""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{chosen})',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{chosen})',
    ]
    adapted = config.get("model_type") == "lowrank"
    first = ["import hf_lowrank  # registers the architecture"] if adapted else []
    code = fenced("\n".join([*first, *lines]), "python")
    if revision is not None:
        return code
    after = (
        "Its model class is hf_lowrank's, so `pip install hf-lowrank` first; a `dense-step-N` revision or an export "
        "(`hf-lowrank export`) loads with transformers alone."
        if adapted
        else "With hf_lowrank, all checkpoints in step order, tensor by tensor:"
    )
    trajectory = fenced(
        "\n".join(
            [
                "from hf_lowrank import Trajectory",
                f'trajectory = Trajectory("{repo_id}")',
                "model = trajectory.model(trajectory.steps[-1])",
            ]
        ),
        "python",
    )
    return Markdown(f"{code}\n\n{after}\n\n{trajectory}")


def _method(recipe: Mapping[str, Any]) -> dict[str, str]:
    name = section(recipe, "method").get("name")
    if isinstance(name, str) and name in METHODS:
        method = METHODS[name]
        return {"title": method.title, "source": method.source, "summary": method.summary}
    return {"title": name_of(name) if name else "an unnamed method", "source": "", "summary": ""}


def _corpus(data: Mapping[str, Any]) -> str:
    """The training text, in words."""
    source = data.get("source")
    shape = f", in sequences of {data['sequence_length']} tokens" if "sequence_length" in data else ""
    if source == "python-library":
        return f"the sources of the Python standard library on the machine that trained it{shape}"
    if source == "hub":
        subset = f", {data['subset']}" if data.get("subset") else ""
        return f"the dataset {data.get('dataset')}{subset}{shape}"
    if source == "files":
        files: Sequence[Any] = data.get("train_files") or ()
        return "local files" + (f" ({', '.join(Path(str(f)).name for f in files[:3])})" if files else "") + shape
    return ""


def _costs(record: RunRecord) -> list[dict[str, str]]:
    """Compute and memory, as rows of a table."""
    values = [(title, write, record.fact(key)) for title, key, write in COSTS]
    rows = [{"title": title, "value": write(value)} for title, write, value in values if value is not None]
    if rows and isinstance(record.facts.get("device"), str):
        rows.append({"title": "Device", "value": str(record.facts["device"])})
    return rows


def render_cards(
    runs: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str], *, license: str | None = None
) -> list[Path]:
    """Writes `folder/METHOD.md` for each run, and its pictures into `folder/METHOD/`; returns the pages in order.

    Where several runs share a method, pages are named after the runs' folders. Existing pages are rewritten; the text
    between the two marks is kept.

    Args:
        runs: run directories.
        folder: created if it does not exist.
        license: of the weights, a Hub identifier; None: that of the existing page, else "unknown".

    Raises:
        UserError: `runs` is empty, or one is not a run directory or is named twice; nothing is written.
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise UserError("runs must name at least one run directory, got none")
    names = _names(folders)
    pictures = {run: draw(run) for run in folders}
    pages = []
    for run, name in zip(folders, names, strict=True):
        page = Path(folder) / f"{name}.md"
        write_pictures(Path(folder) / name, pictures[run], PICTURES)
        previous = page.read_text(encoding="utf-8") if page.is_file() else None
        card = model_card(
            run, None, previous=previous, license=license, pictures=tuple(pictures[run]), picture_folder=name
        )
        write_text(page, card)
        pages.append(page)
    return pages


def _names(runs: Sequence[Path]) -> list[str]:
    """A file name for each run: its method, or its folder where the method is not unique."""
    methods = []
    for run in runs:
        recipe = read_recipe(run)
        if recipe is None:
            raise UserError(f"{run}: must be a run directory, there is no {RECIPE} in it")
        methods.append(str(section(recipe, "method").get("name") or run.resolve().name))
    names = [
        method if methods.count(method) == 1 and NAME.fullmatch(method) else run.resolve().name
        for run, method in zip(runs, methods, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"runs must be of different methods or folder names, got {name} twice; name each run once")
    return names
