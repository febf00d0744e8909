"""Checkpoints that were trained elsewhere, as a run directory of the study: links to them, which stay untouched."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hf_lowrank.runs.layout import CONFIG, EVALUATION_SET, RECIPE, TOKENIZER, checkpoint_folder
from hf_lowrank.runs.run_files import write_recipe
from hf_lowrank.runs.selection import choose_steps
from hf_lowrank.runs.sources import open_source
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.files import whole_file
from hf_lowrank.study.layout import ExternalRun, Study
from hf_lowrank.study.members import tokenizer_of
from hf_lowrank.study.units import Unit, evaluation_of


@dataclass(frozen=True, kw_only=True)
class FetchUnit(Unit):
    """Makes the run directory of an external run; existing files stay.

    Attributes:
        source, revisions: where its checkpoints are.
        output: the run directory.
        steps: the checkpoints to link or download.
        recipe: what its `recipe.yaml` contains unless the source has one.
        renamed: whether the study file names its method.
        reference: a run that is trained here, whose tokenizer and sequences it takes; None if there is none.
        tokenizer_source: the source whose tokenizer it takes otherwise.
        text: what its sequences are made from otherwise.
    """

    stage: ClassVar[str] = "fetch"
    source: str
    revisions: str | None
    output: str
    steps: list[int]
    recipe: dict[str, Any] = field(repr=False)
    renamed: bool
    reference: str | None
    tokenizer_source: str | None
    text: str | None

    def outputs(self) -> list[Path]:
        folder = Path(self.output)
        return [folder / RECIPE, *(checkpoint_folder(folder, step) / CONFIG for step in self.steps)]

    def perform(self) -> str | None:
        folder = Path(self.output)
        trajectory = Trajectory(self.source, revisions=self.revisions)
        checkpoints = open_source(self.source, self.revisions)
        folder.mkdir(parents=True, exist_ok=True)
        for step in self.steps:
            _link(checkpoint_folder(folder, step), checkpoints.folder(step, weights=True))
        self._save_tokenizer(folder / TOKENIZER, trajectory)
        self._save_sequences(folder, trajectory)
        recipe, own = dict(self.recipe), trajectory.run.recipe
        if own is not None:
            stored = own.get("method")
            method: dict[str, Any] = stored if isinstance(stored, dict) else {}
            name = recipe["method"]["name"] if self.renamed else method.get("name", recipe["method"]["name"])
            recipe = {**recipe, **own, "name": recipe["name"], "method": {**method, "name": name}}
        # The recipe completes the directory.
        write_recipe(folder, recipe)
        return None

    def _save_tokenizer(self, folder: Path, trajectory: Trajectory) -> None:
        """One tokenizer for the whole study: the members' are equal, but may be saved differently."""
        if folder.exists():
            return
        partial = folder.with_name(f".{folder.name}.making")
        shutil.rmtree(partial, ignore_errors=True)
        if self.reference is not None:
            shutil.copytree(Path(self.reference) / TOKENIZER, partial)
        else:
            assert self.tokenizer_source is not None
            tokenizer = tokenizer_of(Trajectory(self.tokenizer_source)) or tokenizer_of(trajectory)
            if tokenizer is None:
                return
            tokenizer.save_pretrained(partial)
        os.replace(partial, folder)

    def _save_sequences(self, folder: Path, trajectory: Trajectory) -> None:
        """What losses are measured on: the reference run's sequences, else those of the text or of the source."""
        if (folder / EVALUATION_SET).exists():
            return
        own = trajectory.extra(EVALUATION_SET)
        stored = Path(self.reference) / EVALUATION_SET if self.reference is not None else own
        if stored is not None and (self.reference is not None or self.text is None):
            with whole_file(folder / EVALUATION_SET) as temporary:
                shutil.copyfile(stored, temporary)
        elif self.text is not None:
            evaluation_of(self.text, Trajectory(folder)).save(folder)


def fetch_unit(study: Study, run: ExternalRun) -> FetchUnit:
    """The unit that makes the run directory of an external run."""
    settings, reference = study.settings, study.reference_run
    member, baseline = settings.members[run.member], study.baseline_of(run)
    recipe = {
        "name": run.name,
        "seed": run.seed,
        "method": {"name": member.method or run.member},
        "source": run.source,
    }
    if reference is not None:
        recipe["data"] = study.recipe(reference).plain()["data"]
    no_reference = reference is None
    return FetchUnit(
        name=run.name,
        source=run.source,
        revisions=member.revisions,
        output=str(run.folder),
        steps=wanted_steps(study, run),
        recipe=recipe,
        renamed=member.method is not None,
        reference=None if reference is None else str(reference.folder),
        tokenizer_source=baseline.source if no_reference and isinstance(baseline, ExternalRun) else None,
        text=settings.measure.evaluation_set or settings.evaluation_text if no_reference else None,
    )


def wanted_steps(study: Study, run: ExternalRun) -> list[int]:
    """The checkpoints to fetch: all of a folder; of a repository only those that are measured or scored."""
    available, settings = study.trajectories[run.name].steps, study.settings
    wanted = [settings.measure.steps, settings.evaluate.steps]
    if os.path.isdir(run.source) or None in wanted:
        return list(available)
    if settings.measure.pairs is not None:
        wanted.append(settings.measure.pairs)
    return sorted({step for steps in wanted for step in choose_steps(available, steps, "all")})


def _link(link: Path, target: Path) -> None:
    target = target.resolve()
    if link.is_symlink() and link.resolve() != target:
        link.unlink()
    if not link.exists():
        try:
            link.symlink_to(target, target_is_directory=True)
        except OSError:  # the file system has no links
            shutil.copytree(target, link)
