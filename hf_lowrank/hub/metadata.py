"""The metadata of a card, which the Hub reads: ours, and what others wrote into an existing card."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hf_lowrank.hub.markdown import CONTROL
from hf_lowrank.hub.privacy import without_private
from hf_lowrank.runs.run_files import section
from hf_lowrank.runs.scores import Score
from hf_lowrank.storage.parsing import parse_plain_yaml

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TAG = re.compile(r"[^\w.+-]+")
# Metadata that only we write, even where we have none, and keywords that ModelCardData takes for something else.
NOT_KEPT = ("model-index", "model_name", "eval_results", "ignore_metadata_errors", "self")


def read_card(previous: str | None) -> tuple[dict[str, Any], str]:
    """Metadata and text of an existing card; damaged metadata counts as none."""
    match = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", previous or "", re.S)
    if match is None:
        return {}, previous or ""
    try:
        metadata = parse_plain_yaml(match[1])
    except yaml.YAMLError:
        metadata = {}
    return metadata if isinstance(metadata, dict) else {}, match.string[match.end() :]


def written_metadata(
    recipe: Mapping[str, Any],
    config: Mapping[str, Any],
    before: Mapping[str, Any],
    license: str | None,
    name: str,
    losses: Mapping[str, tuple[int, float]],
    scores: Sequence[Score],
) -> str:
    """The metadata of a model card, as YAML, from the public part of the recipe, the checkpoint's configuration, the
    metadata of the existing card, and the results; `losses` has step and value by metric."""
    data = section(recipe, "data")
    named = data.get("dataset") if data.get("source") == "hub" else None
    dataset = named if isinstance(named, str) and HUB_ID.fullmatch(named) else None
    kept = before.get("license")
    tags = ["hf_lowrank", "low-rank", "pre-training", tag_of(section(recipe, "method").get("name"))]
    if config.get("model_type") == "lowrank":
        tags.append("lowrank")
    earlier = before.get("tags")
    if isinstance(earlier, list):
        tags.extend(tag for tag in earlier if isinstance(tag, str))
    base = config.get("_name_or_path")
    results = _results(losses, dataset, scores)
    ours: dict[str, Any] = {
        "license": license or (kept if isinstance(kept, str) and kept else "unknown"),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
    }
    if dataset is not None:
        ours["datasets"] = [dataset]
    if isinstance(base, str) and "/" in base and HUB_ID.fullmatch(base):
        ours["base_model"] = base
    others = {key: value for key, value in before.items() if isinstance(key, str) and key not in (*ours, *NOT_KEPT)}
    if results:
        ours |= {"model_name": name, "eval_results": results}
    return ModelCardData(**ours, **others).to_yaml()


def study_metadata(methods: Sequence[str], before: Mapping[str, Any]) -> str:
    """The metadata of a study's card, as YAML; the license is the existing card's, which `before` has."""
    kept = before.get("license")
    tags = ["hf_lowrank", "low-rank", "pre-training", *map(tag_of, methods)]
    data = ModelCardData(
        license=kept if isinstance(kept, str) and kept else "unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tag for tag in tags if tag)),
    )
    return data.to_yaml()


def name_of(value: object) -> str:
    """A name: one line of at most 120 characters, without anything private."""
    return " ".join(CONTROL.sub("", without_private(str(value))).split())[:120]


def tag_of(value: object) -> str:
    """A value as a tag of the Hub; empty for an empty value."""
    return TAG.sub("-", str(value)).strip("-")[:60] if value else ""


def _results(
    losses: Mapping[str, tuple[int, float]], dataset: str | None, scores: Sequence[Score]
) -> list[EvalResult]:
    """Loss and perplexity on the held-out part of `dataset`, if that is on the Hub, and downstream scores."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset or "held-out",
            dataset_name=f"held-out part of {dataset}" if dataset else "held-out sequences of this run",
            metric_type=metric,
            metric_name=f"{metric} at step {step}",
            metric_value=value,
        )
        for metric, (step, value) in losses.items()
    ]
    for row in scores:
        task = name_of(row.task)
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name=task,
                dataset_type=tag_of(task) or "task",
                dataset_name=task,
                metric_type=tag_of(row.metric) or "score",
                metric_name=name_of(row.metric),
                metric_value=row.value,
            )
        )
    return results
