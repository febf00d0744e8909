"""Publishes one run's checkpoints in one repository: a branch `step-N` for each, `latest`, and `main` with the card.

`latest` is a chain of commits, one for each checkpoint in step order, and the branch `step-N` is created at its
commit: the Hub cannot move a branch to another commit, but a commit advances it atomically. The first checkpoint, and
one out of order, go through a temporary branch `incoming-…` instead.
"""

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from hf_lowrank.errors import UserError
from hf_lowrank.hub import cards
from hf_lowrank.hub.contents import (
    MANIFEST,
    Files,
    PushFile,
    checkpoint_files,
    files_of,
    run_files,
    state_files,
)
from hf_lowrank.hub.eval_results import eval_results_file
from hf_lowrank.hub.pictures import draw
from hf_lowrank.hub.privacy import one_line, without_private
from hf_lowrank.hub.repository import INCOMING, Repository, UnreachedError
from hf_lowrank.runs.layout import CONFIG, OPTIMIZER, RECIPE
from hf_lowrank.runs.run_files import read_trainer_state
from hf_lowrank.runs.scores import read_scores
from hf_lowrank.storage.parsing import parse_json

Dense = Literal["beside", "instead"]
STEP = re.compile(r"step-(\d+)")
WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")
LATEST, MAIN, README = "latest", "main", "README.md"
# Files that a repository may have before its first push and still count as empty.
BLANK = (".gitattributes", README, "LICENSE", "LICENSE.md", "LICENSE.txt")


@dataclass(frozen=True)
class Job:
    """A checkpoint to publish: its optimizer steps, and the folder with its files."""

    step: int
    folder: Path

    @property
    def branch(self) -> str:
        return f"step-{self.step}"


def run_identity(run: Path | None, job: Job) -> str:
    """Identifies a run: the SHA-256 of its recipe, or of the model's configuration without one."""
    recipe = None if run is None else run / RECIPE
    file = recipe if recipe is not None and recipe.is_file() else job.folder / CONFIG
    text = without_private(file.read_text(encoding="utf-8"))
    return hashlib.sha256(text.encode()).hexdigest()


def run_name(run: Path | None, destination: str) -> str:
    """The run's name: from its recipe, else its folder, else the last part of `destination`."""
    folder = run.resolve().name if run is not None else destination.rpartition("/")[2]
    return str(cards.public_recipe(run).get("name") or folder)


class Publisher:
    """Publishes checkpoints of a run, or a checkpoint without one; the options are those of `push`."""

    finish = MAIN  # what `settle` completes, in messages

    def __init__(
        self,
        repository: Repository,
        run: Path | None,
        *,
        private: bool = True,
        dense: Dense | None = None,
        optimizer: bool = False,
        license: str | None = None,
    ) -> None:
        self.repository, self.run = repository, run
        self.private, self.dense, self.optimizer, self.license = private, dense, optimizer, license
        self._ready = False
        self._contents: dict[int, dict[str, Files]] = {}

    # -- the repository

    def prepare(self, job: Job) -> None:
        """Creates the repository, or checks that it belongs to this run.

        Raises:
            UserError: it holds another run, or something else.
        """
        if self._ready:
            return
        self.repository.create(private=self.private)
        branches = self.repository.branches()
        head = branches[MAIN]
        there = self.repository.manifest(branches.get(LATEST, head)) or self.repository.manifest(head)
        if there:
            if there.get("identity") != run_identity(self.run, job):
                raise UserError(
                    f"{self.repository.repo_id}: taken: it holds the run {one_line(there.get('run'), limit=80)!r} "
                    "with another recipe; choose another name"
                )
        else:
            other = [path for path in self.repository.tree(head) if path not in BLANK]
            if other:
                raise UserError(
                    f"{self.repository.repo_id}: taken: it holds other files, such as "
                    f"{one_line(other[0], limit=80)}; choose another name"
                )
        self._ready = True

    @property
    def destination(self) -> str:
        return self.repository.repo_id

    def label(self, job: Job) -> str:
        """What messages call a checkpoint here."""
        return job.branch

    @property
    def name(self) -> str:
        return run_name(self.run, self.repository.repo_id)

    # -- the revisions

    def contents(self, job: Job) -> dict[str, Files]:
        """The files of every branch of a checkpoint except `main`, by branch; `step-N` comes first."""
        if job.step in self._contents:
            return self._contents[job.step]
        trained = checkpoint_files(job.folder, self.run)
        dense = self._dense_files(job, trained)
        models = {job.branch: dense if dense and self.dense == "instead" else trained}
        if dense and self.dense != "instead":
            models[f"dense-{job.branch}"] = dense
        branches = {branch: self._finished(job, branch, files) for branch, files in models.items()}
        if self.optimizer:
            state = state_files(job.folder)
            if OPTIMIZER in state:
                state[MANIFEST] = self._manifest(job, state)
                branches[f"optimizer-{job.branch}"] = state
        self._contents[job.step] = branches
        return branches

    def _finished(self, job: Job, branch: str, files: Files) -> Files:
        config = parse_json(files[CONFIG].read())
        card = cards.step_card(
            self.repository.repo_id, self.name, job.step, branch, config=config, recipe=self.recipe()
        )
        return {**files, README: PushFile(README, card.encode()), MANIFEST: self._manifest(job, files)}

    def _manifest(self, job: Job, files: Files) -> PushFile:
        """The manifest of a revision: run, step, and the SHA-256 of every file."""
        content = {
            "run": without_private(self.name),
            "identity": run_identity(self.run, job),
            "step": job.step,
            "files": {path: file.sha256 for path, file in sorted(files.items())},
        }
        return PushFile(MANIFEST, (json.dumps(content, indent=1) + "\n").encode())

    def _dense_files(self, job: Job, trained: Files) -> Files | None:
        """The files with the model exported to its base architecture; None if that is not asked for or not needed."""
        if self.dense is None or parse_json(trained[CONFIG].read()).get("model_type") != "lowrank":
            return None
        from hf_lowrank.runs.export import export

        if not hasattr(self, "_scratch"):
            self._scratch = tempfile.TemporaryDirectory(prefix="hf-lowrank-dense-")
        folder = Path(self._scratch.name) / job.branch
        if not folder.exists():
            export(job.folder, folder)
        exported = checkpoint_files(folder, self.run)
        kept = {path: file for path, file in trained.items() if not WEIGHTS.fullmatch(path)}
        return {**kept, **exported}

    def recipe(self) -> dict[str, Any]:
        """The run's recipe without private parts; empty without one."""
        return cards.public_recipe(self.run)

    # -- publishing

    def publish(self, job: Job) -> None:
        """Completes the checkpoint's branches, advances `latest` if it is the newest, and checks both on the Hub.

        Raises:
            UnreachedError: the Hub does not show what was sent.
        """
        self.prepare(job)
        title, description = self._message(job)
        contents = self.contents(job)
        branches = self.repository.branches()
        files = contents[job.branch]
        latest = self._step_of_latest(branches)
        commit = self.repository.publish(
            job.branch,
            files,
            title,
            description,
            branches=branches,
            base=self._base(job, branches),
            carrier=LATEST if latest is not None and job.step >= latest else None,
        )
        if latest is None:
            self.repository.api.create_branch(self.repository.repo_id, branch=LATEST, revision=commit, exist_ok=True)
        elif job.step >= latest and job.branch in branches:
            now = self.repository.branches()
            self.repository.bring(LATEST, now[LATEST], files, title, description)
        for branch, others in contents.items():
            if branch != job.branch:
                kind = branch.partition("-")[0]
                base = commit if kind == "dense" else self._root(branches[MAIN])
                self.repository.publish(branch, others, f"{title} ({kind})", description, branches=branches, base=base)
        for branch in contents:
            if INCOMING + branch in branches:
                self.repository.remove(INCOMING + branch)
        faults = self.faults(job)
        if faults:
            raise UnreachedError(f"the Hub does not show what was sent: {'; '.join(faults)}")

    def settle(self, job: Job | None) -> None:
        """Updates the card on `main`, and its weights to those of `job`, unless `main` holds a later checkpoint."""
        head = self.repository.branches()[MAIN]
        there = self.repository.manifest(head).get("step")
        before = self.repository.read(README, head)
        pictures = draw(self.run) if self.run is not None else {}
        card = cards.model_card(
            self.run,
            self.repository.repo_id,
            checkpoint=job.folder if job is not None else None,
            previous=None if before is None else before.decode("utf-8", errors="replace"),
            license=self.license,
            pictures=tuple(pictures),
            name=self.name,
        )
        files = run_files(self.run) if self.run is not None else {}
        files |= files_of(PushFile(f"pictures/{name}.png", data) for name, data in pictures.items())
        files[README] = PushFile(README, card.encode())
        newer = job if job is not None and not (isinstance(there, int) and there > job.step) else None
        step = newer.step if newer is not None else there
        if self.run is not None and isinstance(step, int):
            results = eval_results_file(read_scores(self.run), step)
            files |= files_of([results] if results is not None else [])
        if newer is not None:
            files = {**self.contents(newer)[newer.branch], **files}
            self.repository.bring(MAIN, head, files, *self._message(newer))
            return
        self.repository.bring(MAIN, head, files, "Card and measurements", keep=True)

    def forget(self, job: Job) -> None:
        """Drops the cached contents of a checkpoint, whose files may be gone."""
        self._contents.pop(job.step, None)

    def faults(self, job: Job) -> list[str]:
        """What is wrong with a checkpoint on the Hub: branches that are missing or differ, `latest` behind."""
        branches, found = self.repository.branches(), []
        latest = self._step_of_latest(branches)
        if latest is None or latest < job.step:
            found.append(f"{LATEST} is behind")
        for branch, files in self.contents(job).items():
            if branch not in branches:
                found.append(f"{branch} is missing")
                continue
            changed, extra = self.repository.differing(branches[branch], files)
            if changed or extra:
                names = ", ".join([*(file.path for file in changed), *extra][:4])
                found.append(f"{branch} differs in {names}")
            if INCOMING + branch in branches:
                found.append(f"{INCOMING + branch} is left over")
        return found

    def _step_of_latest(self, branches: dict[str, str]) -> int | None:
        """The step of `latest`; None without that branch."""
        if LATEST not in branches:
            return None
        same = [branch for branch, commit in branches.items() if commit == branches[LATEST] and STEP.fullmatch(branch)]
        if same:
            return max(int(branch.removeprefix("step-")) for branch in same)
        step = self.repository.manifest(branches[LATEST]).get("step")
        if not isinstance(step, int):
            raise UserError(f"{self.repository.repo_id}: taken: its branch {LATEST!r} belongs to something else")
        return step

    def _base(self, job: Job, branches: dict[str, str]) -> str:
        """The commit of the previous checkpoint, whose unchanged files need not be sent again."""
        steps = {int(match[1]): commit for name, commit in branches.items() if (match := STEP.fullmatch(name))}
        before = [step for step in steps if step < job.step]
        if before:
            return steps[max(before)]
        return steps[min(steps)] if steps else branches[MAIN]

    def _root(self, head: str) -> str:
        """The repository's first commit, which has none of our files."""
        return self.repository.api.list_repo_commits(self.repository.repo_id, revision=head)[-1].commit_id

    def _message(self, job: Job) -> tuple[str, str]:
        """Title and description of a commit: step, loss and recipe."""
        state = read_trainer_state(job.folder)
        loss = state.loss_at(job.step) if state is not None else None
        title = f"Step {job.step}" + (f", loss {loss:.4f}" if loss is not None else "")
        name = one_line(self.name, limit=80)
        recipe = self.recipe()
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else ""
        return f"{title}: {name}", without_private(text)
