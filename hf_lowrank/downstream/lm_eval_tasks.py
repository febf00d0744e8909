"""The functions of the YAML files in `tasks/`: items as data sets, and scores of items.

lm-eval imports this module when it loads one of these tasks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lowrank.downstream.catalogue import register_models
from hf_lowrank.downstream.items import items_for, load_items
from hf_lowrank.downstream.sharpness import DirectionRequest, Sharpness, direction_requests
from hf_lowrank.errors import UserError
from hf_lowrank.runs.selection import find_checkpoint
from hf_lowrank.runs.trajectory import Trajectory

# For lm-eval's own command line, which loads a task from its file.
register_models()

LogLikelihood = tuple[float, bool]


def items_dataset(*, pylib_task: str, **metadata: Any) -> dict[str, Any]:
    """The items of one of the pylib tasks, as lm-eval's `custom_dataset`.

    `metadata` holds what lm-eval passes to every task: the model's arguments and `--metadata`. The run is `run`, else
    that of `pretrained`.
    """
    from datasets import Dataset

    trajectory = _trajectory(metadata, pylib_task)
    return {"test": Dataset.from_list(load_items(items_for(trajectory, pylib_task)))}


def directions_dataset(*, direction: str, **metadata: Any) -> dict[str, Any]:
    """The directions of a sharpness task; `--metadata preset=paper` as for measuring."""
    from datasets import Dataset

    requests = direction_requests(direction, str(metadata.get("preset", "fast")))
    docs = [{"draw": request.draw, "request": request.to_text()} for request in requests]
    return {"test": Dataset.from_list(docs)}


def choice_results(doc: Mapping[str, Any], results: Sequence[LogLikelihood]) -> dict[str, float]:
    """`acc`: whether the right choice is the most likely one; for syntax also as `acc_KIND`."""
    scores = [likelihood for likelihood, _ in results]
    right = float(scores.index(max(scores)) == doc["gold"])
    return {"acc": right, f"acc_{doc['kind']}": right} if str(doc["id"]).startswith("pylib_syntax") else {"acc": right}


def cloze_results(doc: Mapping[str, Any], results: Sequence[LogLikelihood]) -> dict[str, float]:
    """`acc` among the four words, and `greedy`: whether the right one is the greedy continuation."""
    return {**choice_results(doc, results), "greedy": float(results[doc["gold"]][1])}


def sharpness_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """The sharpness along one direction, which only this package's model class computes.

    Raises:
        UserError: the task ran with another model class, which scored the request as text.
    """
    (answer,) = results
    if not isinstance(answer, Sharpness):
        task = DirectionRequest.from_text(doc["request"]).task
        raise UserError(f"{task} needs --model hf-lowrank, which evaluates its loss at perturbed weights")
    return {"sharpness": float(answer)}


def _trajectory(metadata: Mapping[str, Any], task: str) -> Trajectory:
    if named := metadata.get("run"):
        return named if isinstance(named, Trajectory) else Trajectory(str(named))
    pretrained = metadata.get("pretrained")
    if not isinstance(pretrained, str):
        raise UserError(f"{task}: its items come from a run's held-out text; name the run with --metadata run=RUN")
    checkpoint = find_checkpoint(pretrained, metadata.get("revision"))
    if checkpoint.run is not None:
        return Trajectory(checkpoint.run)
    if Path(checkpoint.path).is_dir():
        raise UserError(
            f"{task}: {checkpoint.path} is not in a run directory, so its held-out text is unknown; "
            "name the run with --metadata run=RUN"
        )
    return Trajectory(checkpoint.path)
