"""A study's members: whether they are comparable, and those trained elsewhere as run directories of links to them."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from hf_lowrank.errors import UserError
from hf_lowrank.runs.layout import CONFIG, EVALUATION_SET, RECIPE, TOKENIZER, checkpoint_folder
from hf_lowrank.runs.run_files import write_recipe
from hf_lowrank.runs.selection import choose_steps, size_of
from hf_lowrank.runs.sources import open_source
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.storage.files import whole_file
from hf_lowrank.study.layout import ExternalRun, Run, Study
from hf_lowrank.study.spec import StudyFile
from hf_lowrank.study.units import Unit, evaluation_of
from hf_lowrank.training.recipe import Recipe
from hf_lowrank.training.sequences import load_tokenizer

logger = logging.getLogger(__name__)

# Fields of a configuration that change neither the shapes of weights nor what the model computes with them.
HARMLESS = {
    "architectures", "attention_dropout", "attn_pdrop", "dtype", "embd_pdrop", "hidden_dropout", "initializer_range",
    "resid_pdrop", "torch_dtype", "transformers_version", "use_cache", "_name_or_path", "name_or_path",
}  # fmt: skip
# Keys of a data block that change neither the training text nor the held-out sequences.
HARMLESS_DATA = {"evaluation_sequences_in_training"}


def check_members(file: StudyFile, runs: Sequence[Run], recipes: Mapping[str, Recipe]) -> dict[str, Trajectory]:
    """Compares every member with the baseline; returns the trajectories of external runs by run name.

    Raises:
        UserError: an external run has no checkpoints, or a member's architecture, size, tokenizer or data differ;
            names the member, the key and both values.
    """
    trajectories: dict[str, Trajectory] = {}
    external = [run for run in runs if isinstance(run, ExternalRun)]
    for run in external:
        key = f"members.{run.member}.runs"
        with file.blaming(key):
            trajectories[run.name] = Trajectory(run.source, revisions=file.settings.members[run.member].revisions)
            size_of(trajectories[run.name])
        if [other.source for other in external].count(run.source) > 1:
            raise file.fault(key, f"must name each run once, got {run.source} twice")
    _compare_recipes(file, recipes)
    if external:
        _compare_external(file, external, trajectories, recipes)
    return trajectories


def _compare_recipes(file: StudyFile, recipes: Mapping[str, Recipe]) -> None:
    """Compares trained members with the baseline or, if that is external, with the first of them."""
    blocks = {name: _comparable(recipe) for name, recipe in recipes.items()}
    baseline = file.settings.baseline if file.settings.baseline in blocks else next(iter(blocks), "")
    for name, own in blocks.items():
        for block, theirs in blocks[baseline].items():
            ours = own[block]
            keys = [*theirs, *(key for key in ours if key not in theirs)]
            for key in sorted(keys, key=lambda key: key != "model_type"):
                if ours.get(key) != theirs.get(key):
                    raise file.fault(
                        f"members.{name}",
                        f"has {block}.{key} {ours.get(key)!r}, the baseline {baseline} has {theirs.get(key)!r}; "
                        "members of a study share model and data",
                    )


def _comparable(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What of a recipe must be the same for all members, by block."""
    config = {key: value for key, value in recipe.config().to_dict().items() if key not in HARMLESS}
    if "vocab_size" not in recipe.model:
        config.pop("vocab_size", None)  # the tokenizer's, which the data block determines
    data = recipe.data.model_dump(mode="json")
    return {"model": config, "data": {key: value for key, value in data.items() if key not in HARMLESS_DATA}}


def _compare_external(
    file: StudyFile,
    runs: Sequence[ExternalRun],
    trajectories: Mapping[str, Trajectory],
    recipes: Mapping[str, Recipe],
) -> None:
    baseline = file.settings.baseline
    # An external baseline is compared with what is trained here, as every other external run.
    reference = baseline if baseline in recipes or not recipes else next(iter(recipes))
    tokenizer: PreTrainedTokenizerBase | None
    if reference in recipes:
        from hf_lowrank.training.corpus import corpus_tokenizer

        tokenizer = corpus_tokenizer(recipes[reference].data)
        shape = recipes[reference].config(vocab_size=len(tokenizer)).to_dict()
    else:
        first = trajectories[next(run.name for run in runs if run.member == baseline)]
        shape, tokenizer = json.loads(size_of(first)), tokenizer_of(first)
    fingerprint = None if tokenizer is None else ids_fingerprint(tokenizer)
    for run in runs:
        key, trajectory = f"members.{run.member}.runs", trajectories[run.name]
        for name, value in json.loads(size_of(trajectory)).items():
            if value != shape.get(name):
                raise file.fault(
                    key,
                    f"{run.source} has model.{name} {value!r}, {reference} has {shape.get(name)!r}; members of a "
                    "study share architecture, size and tokenizer",
                )
        own = tokenizer_of(trajectory)
        if own is None:
            logger.warning("%s: has no tokenizer; assuming that of %s", run.source, reference)
        elif fingerprint is not None and ids_fingerprint(own) != fingerprint:
            raise file.fault(
                key, f"{run.source} has another tokenizer than {reference}; losses per token are not comparable"
            )


def ids_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex; equal for tokenizers that encode plain text to the same ids, whatever their class and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    content = json.loads(backend.to_str())
    parts = {key: content.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_of(trajectory: Trajectory) -> PreTrainedTokenizerBase | None:
    """The tokenizer of an external run; None if it has none."""
    folder = trajectory.extra(TOKENIZER)
    candidates = [str(folder)] if folder is not None and Path(folder).is_dir() else []
    folder_or_repo = trajectory.tokenizer_source
    has_files = not Path(folder_or_repo).is_dir() or any(
        (Path(folder_or_repo) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    )
    for source in [*candidates, *([folder_or_repo] if has_files else [])]:
        try:
            return load_tokenizer(source, key="tokenizer")
        except UserError as error:
            logger.debug("%s", error)
    if Path(trajectory.path).is_dir() and (Path(trajectory.path) / "tokenizer.json").is_file():
        return load_tokenizer(trajectory.path, key="tokenizer")
    return None


@dataclass(frozen=True, kw_only=True)
class FetchUnit(Unit):
    """Makes the run directory of an external run; existing files stay.

    Attributes:
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
    method = {"name": member.method or run.member}
    recipe = {"name": run.name, "seed": run.seed, "method": method, "source": run.source}
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
