"""Downstream scores as the Hub's evaluation results, which model pages and the leaderboards of benchmarks read.

The Hub reads every `.eval_results/*.yaml` of a model's `main`; only the file named here is this package's. Scores on
items that are not from a Hub dataset have no place there: the card's metadata (`model-index`) has all.
"""

import math
from collections import Counter
from collections.abc import Sequence

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from hf_lowrank.hub.contents import EVAL_RESULTS, PushFile
from hf_lowrank.hub.metadata import name_of
from hf_lowrank.runs.scores import HUB_DATASET, PRIMARY, Score


def eval_results_file(scores: Sequence[Score], step: int) -> PushFile | None:
    """The evaluation results of the checkpoint of `step`: one entry per task with all items of a Hub dataset.

    None if there are none.
    """
    rows = _reported(scores, step)
    shared = Counter((row.dataset, row.subset) for row in rows)
    groups = {row.group for row in scores}
    entries = [
        EvalResultEntry(
            dataset_id=str(row.dataset),
            # Benchmarks name their tasks like their configurations; two tasks on one need a name each, and a group is
            # of several.
            task_id=name_of(
                row.task if shared[row.dataset, row.subset] > 1 or row.task in groups else row.subset or "default"
            ),
            value=row.value,
            notes=name_of(
                f"{row.metric} on {row.n} items, step {step}, lm-eval {row.lm_eval_version}, "
                f"{row.task} {row.task_version}"
            ),
        )
        for row in rows
    ]
    if not entries:
        return None
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return PushFile(EVAL_RESULTS, text.encode())


def _reported(scores: Sequence[Score], step: int) -> list[Score]:
    """The rows to report, by task: the task's score (see PRIMARY), else its first metric; no members of groups."""
    best: dict[str, Score] = {}
    for row in scores:
        of_benchmark = row.dataset is not None and HUB_DATASET.fullmatch(row.dataset) and row.limit is None
        if row.step != step or row.group is not None or not of_benchmark or not math.isfinite(row.value):
            continue
        if name_of(row.dataset) == row.dataset and (row.task not in best or _place(row) < _place(best[row.task])):
            best[row.task] = row
    return [best[task] for task in sorted(best)]


def _place(row: Score) -> int:
    return PRIMARY.index(row.metric) if row.metric in PRIMARY else len(PRIMARY)
