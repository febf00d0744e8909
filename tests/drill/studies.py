"""Drills on a finished study with one damaged file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from hf_lowrank.errors import UserError
from tests.drill.drill import MOST_REPAIRS, Result
from tests.drill.faults import Plan, damaged, victims
from tests.drill.oracle import damaged_checkpoints, differences, snapshot
from tests.drill.processes import Child, Ended, Job
from tests.drill.world import World, settle

LONGEST = 3600.0
# Prediction needs a task with a known chance level, whose items need long texts, and eight runs.
DATA = {"source": "python-library", "sequence_length": 128, "vocabulary_size": 2048, "evaluation_sequences": 8}
MEMBERS = ("full_rank", "galore")
STUDY = {
    "name": "drill",
    "baseline": "full_rank",
    "members": {member: f"study-{member}.yaml" for member in MEMBERS},
    "seeds": [0, 1, 2, 3],
    "set": ["training.max_steps=2", "training.save_steps=2"],
    "sweep": {"learning_rate": [0.001, 0.004], "seed": 9},
    "measure": {
        "metrics": ["loss", "perplexity", "weight_stable_rank", "method_barrier"],
        "settings": {"sequences": 4},
    },
    "evaluate": {"tasks": "pylib_copy", "steps": "last"},
    "predict": {"permutations": 19},
    "threads": 1,
}


def study_drill(world: World, plan: Plan) -> Result:
    """Damages a file of a finished study; repeating the call must repair it or name it."""
    assert plan.damage is not None
    template = _template(world)
    expected = _results(template)
    place = world.fresh(f"drill-{plan.seed}", cached=True)
    shutil.copytree(template, place / "study")
    found = Result(plan.seed, plan.kind, f"{plan.damage.file_kind} {plan.damage.how}", "study")
    there = victims(place, plan.damage.file_kind)
    file = there[int(plan.damage.place * len(there))]
    file.write_bytes(damaged(file.read_bytes(), plan.damage.how, plan.damage.place * len(there) % 1))
    found.struck = True
    for _ in range(MOST_REPAIRS):
        ended = _call(world, place)
        if ended.status == 0:
            named = _named(place / "study")
        elif ended.status in (1, 2) and "Traceback" not in ended.last_line:
            named = [line for line in ended.output.splitlines() if line.startswith("hf-lowrank: ")]
        else:
            found.breaches.append(f"seed {plan.seed}: study ended with {ended.status}: {ended.output[-1500:]}")
            return found
        if not named:
            break
        if not any(file.name in said for said in named):
            found.breaches.append(f"seed {plan.seed}: study refuses, but not because of {file.name}: {named[:3]}")
            return found
        found.outcome = "refused"
        _remove(file, named)
    else:
        found.breaches.append(f"seed {plan.seed}: following the messages about {file.name} fails: {named[:3]}")
        return found
    other = differences(_results(place / "study"), expected)
    if found.outcome == "refused" and file.name == "facts.json":
        other = [name for name in other if not name.endswith("facts.json")]
    if other:
        found.breaches.append(f"seed {plan.seed}: {file} {plan.damage.how}: different results in {other[:6]}")
    else:
        shutil.rmtree(place)
    return found


def _template(world: World) -> Path:
    directory = world.folder / "references" / "study"
    if not directory.exists():
        for member in MEMBERS:
            recipe = yaml.safe_load(world.recipe(member).read_text())
            recipe["model"]["max_position_embeddings"] = DATA["sequence_length"]
            (world.folder / f"study-{member}.yaml").write_text(yaml.safe_dump({**recipe, "data": DATA}))
        (world.folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
        place = world.fresh("study-reference", cached=False)
        ended = Child(_job(world, place, world.folder / "cache"), place).wait(within=LONGEST)
        if ended is None or ended.status != 0:
            raise RuntimeError(f"a study without faults failed: {ended}")
        directory.parent.mkdir(exist_ok=True)
        (place / "study").rename(directory)
    return directory


def _call(world: World, place: Path) -> Ended:
    ended = Child(_job(world, place, place / "cache"), place).wait(within=LONGEST)
    assert ended is not None
    return ended


def _job(world: World, place: Path, cache: Path) -> Job:
    def job() -> int:
        from hf_lowrank.study import run_study
        from hf_lowrank.study.plan import Costs

        settle(cache)
        plan: Any = __import__("hf_lowrank.study.plan", fromlist=["probe"])
        plan.probe = lambda recipe, threads: Costs()
        try:
            result = run_study(world.folder / "study.yaml", output=place / "study", fork_here=True, say=print)
        except UserError as error:
            print(f"hf-lowrank: {error}")
            return 2
        for failure in result.failures:
            print(f"hf-lowrank: {failure.what} {failure.stage} {failure.reason}")
        return 1 if result.failures else 0

    return job


def _results(directory: Path) -> dict[str, Any]:
    """What must be equal in a study; reports and logs contain times, and the page is drawn from the rest."""
    found = snapshot(directory)
    kept = {name: content for name, content in found.items() if not name.startswith(("logs/", "report/"))}
    for name in ("claims.json", "prediction.json", "sweep.json"):
        if (directory / name).is_file():
            kept[name] = json.loads((directory / name).read_text().replace(f"{directory}/", ""))
            kept[name] = _unsealed(kept[name])
    return {name: content for name, content in kept.items() if not name.endswith(".png")}


def _unsealed(content: Any) -> Any:
    if isinstance(content, list):
        return [_unsealed(entry) for entry in content]
    if isinstance(content, dict):
        return {key: value for key, value in content.items() if key != "checksum"}
    return content


def _named(directory: Path) -> list[str]:
    """The damage that the readers of a study's files and the checks of its checkpoints report."""
    from hf_lowrank.claims.results import load_results
    from hf_lowrank.runs.records import load_run

    said = []
    runs = [*(directory / "runs").iterdir(), *(directory / "sweep").iterdir()]
    for read, folder in [(load_results, directory), *((load_run, run) for run in runs)]:
        try:
            read(folder)
        except UserError as error:
            said.append(str(error))
    for run in runs:
        said += damaged_checkpoints(run).values()
    return said


def _remove(file: Path, said: list[str]) -> None:
    """Removes the file; if it is of a checkpoint, that checkpoint and all later ones."""
    if file.parent.name.startswith("checkpoint-"):
        step = int(file.parent.name.rpartition("-")[2])
        for folder in file.parent.parent.glob("checkpoint-*"):
            if (step == 0 and folder.name == "checkpoint-0") or 0 < step <= int(folder.name.rpartition("-")[2]):
                shutil.rmtree(folder)
    else:
        file.unlink(missing_ok=True)
