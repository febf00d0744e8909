"""Checkpoints that others trained, as a run directory of the study: links to them, and nothing written into theirs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.layout import CONFIG, EVALUATION_SET, RECIPE, TOKENIZER, checkpoint_folder
from hf_lowrank.runs.recipe_file import write_recipe
from hf_lowrank.runs.selection import choose_steps
from hf_lowrank.runs.sources import open_source
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.files import whole_file
from hf_lowrank.study.layout import Run, Study


def view_work(study: Study, run: Run) -> dict[str, Any]:
    """What a worker must do to make the run directory of a stranger."""
    settings, ours = study.settings, study.first_trained
    text = settings.measure.evaluation_set or settings.evaluation_text
    member = settings.members[run.member]
    seeds = settings.seeds
    recipe = {
        "name": run.name,
        "seed": seeds[run.place] if run.place < len(seeds) else run.place,
        "method": {"name": study.method(run)},
        "source": run.source,
    }
    if ours is not None:
        recipe["data"] = study.recipe(ours).plain()["data"]
    baseline = study.baseline_of(run)
    return {
        "kind": "view",
        "source": run.source,
        "revisions": member.revisions,
        "output": str(run.folder),
        "steps": wanted_steps(study, run),
        "recipe": recipe,
        "renamed": member.method is not None,
        "like": None if ours is None else str(ours.folder),
        "tokenizer_of": baseline.source if ours is None else None,
        "text": None if ours is not None else text,
    }


def wanted_steps(study: Study, run: Run) -> list[int]:
    """The checkpoints that are measured or scored: all of a folder, of a repository only what was asked for."""
    available, settings = study.strangers[run.name].steps, study.settings
    if os.path.isdir(run.source or ""):
        return list(available)
    wanted = [settings.measure.steps, settings.evaluate.steps]
    if None in wanted:
        return list(available)
    if settings.measure.pairs is not None:
        wanted.append(settings.measure.pairs)
    return sorted({step for steps in wanted for step in choose_steps(available, steps, "all")})


def is_whole(study: Study, run: Run) -> bool:
    """Whether the stranger's run directory has all that is wanted of it."""
    configs = (checkpoint_folder(run.folder, step) / CONFIG for step in wanted_steps(study, run))
    return all(file.is_file() for file in [run.folder / RECIPE, *configs])


def make_view(work: dict[str, Any]) -> None:
    """Makes a stranger's run directory; what is there already stays."""
    theirs = Trajectory(work["source"], revisions=work["revisions"])
    source = open_source(work["source"], work["revisions"])
    folder = Path(work["output"])
    folder.mkdir(parents=True, exist_ok=True)
    for step in work["steps"]:
        _link(checkpoint_folder(folder, step), source.folder(step, weights=True))
    _tokenizer(folder, theirs, work)
    _sequences(folder, theirs, work)
    recipe = dict(work["recipe"])
    own = theirs.run.recipe
    if own is not None:
        said = own.get("method")
        method: dict[str, Any] = said if isinstance(said, dict) else {}
        name = recipe["method"]["name"] if work["renamed"] else method.get("name", recipe["method"]["name"])
        recipe = {**recipe, **own, "name": recipe["name"], "method": {**method, "name": name}}
    # With its recipe the view is whole.
    write_recipe(folder, recipe)


def _link(place: Path, target: Path) -> None:
    target = target.resolve()
    if place.is_symlink() and place.resolve() != target:
        place.unlink()
    if not place.exists():
        try:
            place.symlink_to(target, target_is_directory=True)
        except OSError:  # no links on this file system
            shutil.copytree(target, place)


def _tokenizer(folder: Path, theirs: Trajectory, work: dict[str, Any]) -> None:
    """One tokenizer for the whole study: they have been found equal, but may be saved differently."""
    place = folder / TOKENIZER
    if place.exists():
        return
    fresh = folder / f".{TOKENIZER}.making"
    shutil.rmtree(fresh, ignore_errors=True)
    if work["like"] is not None:
        shutil.copytree(Path(work["like"]) / TOKENIZER, fresh)
    else:
        from hf_lowrank.study.members import tokenizer_of

        tokenizer = tokenizer_of(Trajectory(work["tokenizer_of"])) or tokenizer_of(theirs)
        if tokenizer is None:
            return
        tokenizer.save_pretrained(fresh)
    os.replace(fresh, place)


def _sequences(folder: Path, theirs: Trajectory, work: dict[str, Any]) -> None:
    """What losses are measured on: the sequences of the study's other runs, else the stranger's own or the text."""
    if (folder / EVALUATION_SET).exists():
        return
    own = theirs.extra(EVALUATION_SET)
    if work["like"] is not None or (own is not None and work["text"] is None):
        source = Path(work["like"]) / EVALUATION_SET if work["like"] is not None else own
        with whole_file(folder / EVALUATION_SET) as temporary:
            shutil.copyfile(source, temporary)
    elif work["text"] is not None:
        evaluation_of(work["text"], Trajectory(folder)).save(folder)


def evaluation_of(given: str, trajectory: Trajectory) -> EvaluationSet:
    """The sequences in a safetensors file or folder, or cut from a text by the trajectory's tokenizer."""
    from hf_lowrank.downstream.sources import context_length
    from hf_lowrank.runs.evaluation_text import SEQUENCE_LENGTH, evaluation_set_from_text

    path = Path(given)
    if path.is_dir() or path.suffix == ".safetensors":
        return EvaluationSet.load(path)
    return evaluation_set_from_text(path, trajectory, min(SEQUENCE_LENGTH, context_length(trajectory)))
