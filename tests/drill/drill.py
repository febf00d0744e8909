"""One drill: the faults of a plan, then the same call without faults, which gives equal bits or names the damage."""

from __future__ import annotations

import os
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.drill.faults import Plan, Strike, damaged, plan_of, victims
from tests.drill.oracle import damaged_checkpoints, differences, not_finite, snapshot
from tests.drill.processes import Child, Ended, commands
from tests.drill.ranks import train_in_ranks
from tests.drill.world import World, lines, settle

MOST_REPAIRS = 5
STOPPED = 75
# Exit statuses that a call with a fault may have; any other is a breach.
ALLOWED: dict[str, tuple[int, ...]] = {
    "killed": (0, -9),
    "terminated": (0, STOPPED, -15),
    "disk full": (0, 2),
    "read-only": (0, 2),
    "memory": (0, 1, 2, 127, -6, -9, -11),  # 127: glibc, without memory for a new thread
    "clock": (0,),
    "not a number": (0, 2),
    "two at once": (0, 2),
}


@dataclass
class Result:
    """The result of a drill: `survived` with equal bits, or `refused` by name; with breaches it is neither."""

    seed: int
    kind: str
    detail: str
    method: str
    outcome: str = "survived"
    struck: bool = False
    breaches: list[str] = field(default_factory=list)


def drill(world: World, seed: int) -> Result:
    """Runs the plan of a seed."""
    plan = plan_of(seed)
    if plan.kind == "study damaged":
        from tests.drill.studies import study_drill

        return study_drill(world, plan)
    return _Drill(world, plan).result()


class _Drill:
    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.processes = 2 if plan.kind == "rank dies" else 1
        self.recipe = world.recipe(plan.method, self.processes)
        self.expected = world.reference(plan.method, self.processes, plan.evaluate)
        self.operations = world.operations[plan.method, self.processes, plan.evaluate]
        self.place = world.fresh(f"drill-{plan.seed}", cached=plan.cached)
        self.run = self.place / "run"
        detail = "" if plan.damage is None else f"{plan.damage.file_kind} {plan.damage.how}"
        self.found = Result(plan.seed, plan.kind, detail, plan.method)

    def result(self) -> Result:
        plan = self.plan
        if plan.kind == "rank dies":
            self._ranks(plan.strikes[0])
        elif plan.damage is not None and plan.damage.finished:
            shutil.copytree(self.world.kept(plan.method, plan.evaluate) / "run", self.run)
        for strike in plan.strikes if self.processes == 1 else ():
            self._struck(strike)
        broken = self._damage()
        if broken is not None and plan.damage is not None and plan.damage.readers_first:
            self._finish(broken, tuple(stage for stage in plan.stages if stage != "train"), whole=False)
        self._finish(broken, plan.stages, whole=True)
        if not self.found.breaches:
            shutil.rmtree(self.place)
        return self.found

    def call(self, stages: tuple[str, ...], strike: Strike | None = None) -> Child:
        job = commands(lines(self.recipe, self.place, stages), lambda: settle(self.place / "cache"))
        return Child(job, self.place, strike, self.operations)

    def breach(self, what: str, ended: Ended | None = None) -> None:
        said = "" if ended is None else f": status {ended.status}: {ended.output[-1500:]}"
        self.found.breaches.append(f"seed {self.plan.seed}: {what}{said}")

    def _struck(self, strike: Strike) -> None:
        child = self.call(self.plan.stages, strike)
        ended = child.wait(stopped=strike.kind == "two at once")
        if ended is None:
            ended = self._second(child)
        self.found.struck = self.found.struck or ended.struck
        if (2 if ended.refused else ended.status) not in ALLOWED[strike.kind]:
            self.breach(f"{strike.kind}: unexpected exit status", ended)
        elif ended.status == 2 and not ended.refused:
            self.breach(f"{strike.kind}: refused in more than one line", ended)
        elif ended.status == STOPPED and "SIGTERM" not in ended.output:
            self.breach("stopped by SIGTERM without reporting it", ended)
        elif ended.status == 0 and strike.kind in ("disk full", "read-only") and ended.struck:
            # It struck after the last write.
            self.found.struck = True
        if strike.kind == "clock":
            self._shift_times(strike)
        bad = not_finite(self.run)
        if bad:
            self.breach(f"{strike.kind}: {bad} saved with non-finite weights", ended)

    def _shift_times(self, strike: Strike) -> None:
        """Changes the files' times as if the clock had jumped while they were written."""
        generator = random.Random(strike.size)
        for file in sorted(path for path in self.place.rglob("*") if path.is_file()):
            moment = file.stat().st_mtime + generator.uniform(-1e5, 1e5)
            os.utime(file, (moment, moment))

    def _second(self, first: Child) -> Ended:
        """Runs the same call in another process while the first is stopped in the middle of its own."""
        second = self.call(self.plan.stages).wait()
        assert second is not None
        if not (
            second.status == 0 or (second.refused and re.search("in use by another|another process", second.last_line))
        ):
            self.breach("two at once: the second neither succeeded nor was refused because of the first", second)
        first.resume()
        ended = first.wait()
        assert ended is not None
        if ended.status == 2 and not re.search("in use by another|another process", ended.last_line):
            self.breach("two at once: the first was refused for another reason", ended)
        if 0 not in (ended.status, second.status):
            self.breach("two at once: neither succeeded", ended)
        return ended

    def _ranks(self, strike: Strike) -> None:
        ends = train_in_ranks(self.recipe, self.place, self.place / "cache", strike)
        self.found.struck = ends[1].status == -9
        if self.found.struck and ends[0].status in (0, None):
            self.breach("a rank died and the other did not fail", ends[0])
        again = train_in_ranks(self.recipe, self.place, self.place / "cache")
        for ended in again:
            if ended.status != 0:
                self.breach("ranks: the next launch did not succeed", ended)

    def _damage(self) -> Path | None:
        damage = self.plan.damage
        if damage is None:
            return None
        if damage.file_kind == "part of measurements" and (self.run / "measurements.jsonl").exists():
            whole = (self.run / "measurements.jsonl").read_bytes().splitlines(keepends=True)
            (self.run / ".measurements-1.part.jsonl").write_bytes(b"".join(whole[len(whole) // 2 :]))
            (self.run / "measurements.jsonl").write_bytes(b"".join(whole[: len(whole) // 2]))
        if damage.file_kind == "lock" and self.run.is_dir():
            (self.run / ".train.lock").write_text("4711")
        if damage.file_kind.startswith("cached") and not (self.place / "cache").is_dir():
            shutil.copytree(self.world.folder / "cache", self.place / "cache")
        there = victims(self.place, damage.file_kind)
        if not there:
            return None
        file = there[int(damage.place * len(there))]
        share = damage.place * len(there) % 1
        file.write_bytes(damaged(file.read_bytes(), damage.how, share))
        self.found.struck = True
        self.found.detail = f"{damage.file_kind} {damage.how}"
        return file

    def _finish(self, broken: Path | None, stages: tuple[str, ...], *, whole: bool) -> None:
        """Repeats the call until it succeeds, repairing the damaged file as messages say and nothing else."""
        stages = stages[1:] if self.processes > 1 else stages
        for _ in range(MOST_REPAIRS):
            ended = self.call(stages).wait()
            assert ended is not None
            if ended.status == 0:
                named = damaged_checkpoints(self.run) if whole else {}
                if not named:
                    break
                if broken is None or not any(broken.name in said for said in named.values()):
                    self.breach(f"checkpoints are reported as damaged that nothing damaged: {named}", ended)
                    return
                self.found.outcome = "refused"
                self._remove(broken)
            elif not whole and not self.plan.damage.finished:  # type: ignore[union-attr]
                if not ended.refused:
                    self.breach("a reader did not fail with one line", ended)
                return
            elif not ended.refused:
                self.breach("neither success nor a one-line refusal", ended)
                return
            elif broken is None or broken.name not in ended.reason:
                self.breach("refused, but not because of the damaged file", ended)
                return
            else:
                self.found.outcome = "refused"
                if not whole:
                    return
                self._remove(broken, ended.last_line)
        else:
            self.breach("following the messages about the damaged file fails", ended)
            return
        if whole:
            other = differences(snapshot(self.run), self.expected)
            if self.found.outcome == "refused" and broken is not None and broken.name == "facts.json":
                other = [name for name in other if name != "facts.json"]  # the record of costs is lost, as it says
            if other:
                self.breach(f"different results in {other[:6]}", ended)

    def _remove(self, broken: Path, said: str = "") -> None:
        """Removes what the message names: lines from the damaged one on, a file, or a checkpoint and later ones."""
        line = re.search(r"line (\d+)", said)
        if line and broken.suffix == ".jsonl" and broken.is_file():
            rows = broken.read_bytes().split(b"\n")
            broken.write_bytes(b"".join(row + b"\n" for row in rows[: int(line[1]) - 1]))
            return
        match = re.fullmatch(r"checkpoint-(\d+)", broken.parent.name)
        if match and match[1] != "0":
            for folder in self.run.glob("checkpoint-*"):
                if int(folder.name.rpartition("-")[2]) >= int(match[1]):
                    shutil.rmtree(folder)
        elif match or broken.parent.name == "tokenizer":
            shutil.rmtree(broken.parent, ignore_errors=True)
        else:
            broken.unlink(missing_ok=True)
