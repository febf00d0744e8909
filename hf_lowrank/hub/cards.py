"""Cards: what a repository's page says about a run, from what is on disk; a person's own words survive.

Metadata is written by huggingface_hub's `ModelCardData`, never by a template; every value in the text is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hf_lowrank.hub import card_facts
from hf_lowrank.hub.card_facts import last_checkpoint, log_history, loss_at, read_json, read_yaml, section, step_of
from hf_lowrank.hub.markdown import CONTROL, Markdown, fenced, render
from hf_lowrank.hub.pictures import PICTURES
from hf_lowrank.hub.privacy import without_private
from hf_lowrank.storage.parsing import parse_plain_yaml

__all__ = ["log_history", "loss_at", "metric_card", "model_card", "read_yaml", "step_card"]

OWN_BEGIN = "<!-- Your own words: what stands from here … -->"
OWN_END = "<!-- … to here is kept when the card is written anew. -->"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TAG = re.compile(r"[^\w.+-]+")
# Metadata that is ours to write even when we have none, and what ModelCardData takes as something else than metadata.
NOT_KEPT = ("model-index", "model_name", "eval_results", "ignore_metadata_errors", "self")
LIMITS = (
    "It continues text and does nothing else: it was not tuned to follow instructions and not made safe.",
    "One training with one seed; another seed gives other numbers.",
    "It was trained by a recipe for comparing methods, on the text named above; expect it to know little beyond.",
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
        run: the run directory; None where a Trainer has none.
        repo_id: `user/name`; None where the weights are published nowhere.
        checkpoint: the folder that `main` holds; None: the last one of the run.
        previous: the card that is there: its own words and metadata that are not ours are kept.
        license: a Hub identifier; None: the previous card's, else "unknown".
        pictures: names of the pictures that lie in `picture_folder`, as `draw` gives them.
        picture_folder: relative to the card.
        name: the run's name; None: the recipe's.
    """
    recipe = read_yaml(run / "recipe.yaml") if run is not None else {}
    checkpoint = checkpoint or (last_checkpoint(run) if run is not None else None)
    config = read_json(checkpoint / "config.json") if checkpoint is not None else {}
    step = step_of(checkpoint)
    before, own = _taken_apart(previous)
    measured = card_facts.measured(run) if run is not None else None
    scores = card_facts.scores(run) if run is not None else []
    loss = loss_at(checkpoint, step) if checkpoint is not None else None
    facts = read_json(run / "facts.json") if run is not None else {}
    name = one(name or recipe.get("name") or (repo_id or "").rpartition("/")[2] or "unnamed")
    losses = _losses(checkpoint, step, measured)
    metadata = _metadata(recipe, config, before, license, name, losses, scores)
    rows, notes = _metric_rows(measured[1]) if measured else ([], [])
    sequences = next((row.settings.get("sequences") for row in measured[1]), None) if measured else None
    planned = section(recipe, "training").get("max_steps")
    body = render(
        "model_card.md.j2",
        name=name,
        parameters=_count(facts.get("parameters")),
        method=_method(recipe),
        under_way=isinstance(planned, int) and 0 < step < planned,
        step=step,
        own_begin=Markdown(OWN_BEGIN),
        own_words=Markdown(own),
        own_end=Markdown(OWN_END),
        published=repo_id is not None,
        loading=_loading(repo_id, config, None) if repo_id is not None else "",
        metrics=rows,
        metric_notes=notes,
        metrics_step=measured[0] if measured else None,
        sequences=sequences if sequences is not None else "the",
        loss=f"{loss:.4f}" if loss is not None else None,
        scores=[_score_row(row) for row in scores],
        scores_step=scores[0]["step"] if scores else None,
        harness=scores[0].get("lm_eval_version") if scores else None,
        pictures=_shown(pictures, picture_folder),
        corpus=card_facts.corpus(section(recipe, "data")),
        costs=card_facts.costs(run) if run is not None else [],
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
        limits=[*LIMITS, *_own_limits(recipe)],
    )
    return f"---\n{metadata}\n---\n\n{without_private(body)}"


def step_card(
    repo_id: str, name: str, step: int, branch: str, *, config: Mapping[str, Any], recipe: Mapping[str, Any]
) -> str:
    """The short page of one revision; the same however often it is pushed."""
    tags = ["hf_lowrank", _tag(section(recipe, "method").get("name"))]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=[t for t in tags if t])
    body = render(
        "step_card.md.j2",
        name=one(name),
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

    Args:
        title, summary: its name, and what it measures in a sentence or two.
        usage: Python that calls it.
        metrics: entries with `id`, `summary`, `better` and `unit`, as those of `hf_lowrank.metrics.METRICS`.
        limits: sentences.
        citation: BibTeX, or nothing.
        tags, sdk: metadata of the Space.
    """
    from huggingface_hub import SpaceCardData

    data = SpaceCardData(title=one(title), sdk=sdk, app_file="app.py", tags=["evaluate", "metric", *tags])
    body = render(
        "metric_card.md.j2",
        title=one(title), summary=summary, usage=usage, metrics=list(metrics), limits=list(limits), citation=citation,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def one(value: object) -> str:
    """A name: one line of at most 120 characters, without anything private."""
    return " ".join(CONTROL.sub("", without_private(str(value))).split())[:120]


# -- the parts


def _metadata(
    recipe: Mapping[str, Any],
    config: Mapping[str, Any],
    before: dict[str, Any],
    license: str | None,
    name: str,
    losses: Mapping[str, tuple[int, float]],
    scores: Sequence[Mapping[str, Any]],
) -> str:
    data = section(recipe, "data")
    dataset = data.get("dataset") if data.get("source") == "hub" else None
    kept = before.get("license")
    tags = ["hf_lowrank", "low-rank", "pre-training", _tag(section(recipe, "method").get("name"))]
    if config.get("model_type") == "lowrank":
        tags.append("lowrank")
    earlier = before.get("tags")
    if isinstance(earlier, list):
        tags.extend(tag for tag in earlier if isinstance(tag, str))
    base = config.get("_name_or_path")
    results = [*_loss_results(losses, dataset), *(_score_result(row) for row in scores)]
    ours: dict[str, Any] = {
        "license": license or (kept if isinstance(kept, str) and kept else "unknown"),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
    }
    if isinstance(dataset, str) and HUB_ID.fullmatch(dataset):
        ours["datasets"] = [dataset]
    if isinstance(base, str) and "/" in base and HUB_ID.fullmatch(base):
        ours["base_model"] = base
    others = {key: value for key, value in before.items() if isinstance(key, str) and key not in (*ours, *NOT_KEPT)}
    if results:
        ours |= {"model_name": name, "eval_results": results}
    return ModelCardData(**ours, **others).to_yaml()


def _losses(
    checkpoint: Path | None, step: int, measured: tuple[int, list[Any]] | None
) -> dict[str, tuple[int, float]]:
    """Loss and perplexity with their step: on all sequences that training evaluated, else as they were measured."""
    loss = card_facts.evaluated_loss(checkpoint, step) if checkpoint is not None else None
    if loss is not None:
        return {"loss": (step, loss), "perplexity": (step, math.exp(min(loss, 700.0)))}
    rows = measured[1] if measured is not None else []
    return {
        row.metric: (row.step, row.value)
        for row in rows
        if row.metric in ("loss", "perplexity") and math.isfinite(row.value)
    }


def _loss_results(losses: Mapping[str, tuple[int, float]], dataset: object) -> list[EvalResult]:
    known = isinstance(dataset, str) and HUB_ID.fullmatch(dataset) is not None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(dataset) if known else "held-out",
            dataset_name=f"held-out part of {dataset}" if known else "held-out sequences of this run",
            metric_type=metric,
            metric_name=f"{metric} at step {step}",
            metric_value=value,
        )
        for metric, (step, value) in losses.items()
    ]


def _score_result(row: Mapping[str, Any]) -> EvalResult:
    task = one(row["task"])
    return EvalResult(
        task_type="text-generation",
        task_name=task,
        dataset_type=_tag(task) or "task",
        dataset_name=task,
        metric_type=_tag(row["metric"]) or "score",
        metric_name=one(row["metric"]),
        metric_value=row["value"],
    )


def _metric_rows(rows: Sequence[Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    from hf_lowrank.formats import significant
    from hf_lowrank.metrics import describe, metric_order

    shown, notes = [], []
    for row in sorted(rows, key=lambda r: metric_order(r.metric)):
        title = describe(row.metric).title
        interval = math.isfinite(row.ci_low) and math.isfinite(row.ci_high)
        shown.append(
            {
                "title": title,
                "value": significant(row.value) if math.isfinite(row.value) else "none",
                "interval": f"{significant(row.ci_low)} … {significant(row.ci_high)}" if interval else "",
                "baseline": row.baseline or "",
            }
        )
        if row.reason:
            notes.append({"title": title, "reason": row.reason})
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


def _score_row(row: Mapping[str, Any]) -> dict[str, str]:
    error = row.get("stderr")
    error = f"{error:.4f}" if isinstance(error, int | float) and math.isfinite(error) else ""
    return {
        "task": one(row["task"]),
        "metric": one(row["metric"]),
        "value": f"{row['value']:.4f}",
        "stderr": error,
        "n": str(row.get("n", "")),
    }


def _taken_apart(previous: str | None) -> tuple[dict[str, Any], str]:
    """Metadata and the person's own words of the card that is there."""
    if not previous:
        return {}, ""
    metadata: dict[str, Any] = {}
    match = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", previous, re.S)
    body = previous[match.end() :] if match else previous
    if match:
        try:
            parsed = parse_plain_yaml(match[1])
            metadata = parsed if isinstance(parsed, dict) else {}
        except yaml.YAMLError:
            metadata = {}
    return metadata, own_words(body)


def own_words(previous: str | None) -> str:
    """What stands between the two marks of a card's text; all of a card without them, which somebody else wrote."""
    if not previous:
        return ""
    # Whole lines only: a name that holds a mark is no mark.
    own = re.search(f"^{re.escape(OWN_BEGIN)}\r?$(.*?)^{re.escape(OWN_END)}\r?$", previous, re.S | re.M)
    return (own[1] if own else previous).strip("\n")


def _loading(repo_id: str, config: Mapping[str, Any], revision: str | None) -> Markdown:
    chosen = f', revision="{revision}"' if revision else ""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{chosen})',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{chosen})',
    ]
    adapted = config.get("model_type") == "lowrank"
    first = ["import hf_lowrank  # makes the architecture known"] if adapted else []
    code = fenced("\n".join([*first, *lines]), "python")
    if revision is not None:
        return code
    after = (
        "Its layers are factorised, so `pip install hf-lowrank` comes first; where a `dense-step-N` revision or an "
        "export (`hf-lowrank export`) is there, that loads with transformers alone."
        if adapted
        else "With hf_lowrank, all checkpoints in step order, each tensor read on its own:"
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
    from hf_lowrank.methods import METHODS

    name = section(recipe, "method").get("name")
    if isinstance(name, str) and name in METHODS:
        method = METHODS[name]
        return {"title": method.title, "source": method.source, "summary": method.summary}
    return {"title": one(name) if name else "an unnamed method", "source": "", "summary": ""}


def _own_limits(recipe: Mapping[str, Any]) -> list[str]:
    if section(recipe, "method").get("name") == "cola":
        return ["CoLA's layers have no dense weight: its spectra are those of the product B A, which stands for it."]
    return []


def _count(value: object) -> str:
    from hf_lowrank.formats import big_count

    return big_count(value) if isinstance(value, int | float) else "An unknown number of"


def _tag(value: object) -> str:
    return TAG.sub("-", str(value)).strip("-")[:60] if value else ""
