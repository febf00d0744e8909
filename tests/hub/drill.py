"""A drill for pushing: seeded fault plans against real processes, with real kills.

Each plan lets some requests of a push fail, or kills the pushing process with SIGKILL at a request. After the plan
the same push is started again until it succeeds; then every revision is compared with the run, byte by byte. Run
directly, `python -m tests.hub.drill PLANS OUTPUT.json` adds a kill at every single request and writes down the
figures.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.hub.faults import KINDS, FaultPlan
from tests.hub.server import TOKEN
from tests.hub.store import Store

REPO = "user/drill"
REQUESTS = 88  # a whole push of three checkpoints with optimizer state makes as many
MOST_TRIES = 8
PICTURES: dict[str, bytes] = {}


class ServerProcess:
    """The loopback Hub in a process of its own, so that killing the client leaves it alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.server", str(root)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def order(self, **order: Any) -> dict[str, Any]:
        request = urllib.request.Request(self.url + "/__control__", json.dumps(order).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


def push_child(run: str, url: str, result: str, training: bool) -> None:
    """One attempt in a forked process: `hf-lowrank push`, or the queue that a training left; its outcome to a file."""
    import huggingface_hub
    from huggingface_hub import constants

    from hf_lowrank.errors import UserError
    from hf_lowrank.hub import publisher, push

    logging.disable(logging.CRITICAL)
    # Drawing costs more than pushing; the pictures were drawn once, before the fork.
    publisher.draw = lambda run: PICTURES
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_DISABLE_XET = True
    # The client's own pauses between its tries take no time; nobody else's sleep is touched.
    huggingface_hub.utils._http.time = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        try:
            if training:
                train(Path(run), url)
                outcome = "trained"
            else:
                push(run, REPO, token=TOKEN, endpoint=url, optimizer=True, pauses=(0, 0))
                outcome = "whole"
        except UserError as error:
            outcome = f"told: {error}"
    Path(result).write_text(outcome)


def train(run: Path, url: str) -> None:
    """What a Trainer does with the callback, without the arithmetic: saves come one after the other, none waits."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hf_lowrank.hub import PushRevisionsCallback

    callback = PushRevisionsCallback(REPO, token=TOKEN, endpoint=url, optimizer=True, first_pause=0.01, wait_at_end=30)
    args, state, control = TrainingArguments(output_dir=str(run), use_cpu=True), TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control)
    for folder in sorted(run.glob("checkpoint-*")):
        state.global_step = int(folder.name.rpartition("-")[2])
        callback.on_save(args, state, control)
    callback.on_train_end(args, state, control)


def attempt(
    run: Path, server: ServerProcess, plan: FaultPlan, folder: Path, training: bool = False
) -> tuple[str, Any]:
    """One process; what it said in the end ("killed" if it could not), and what the server saw."""
    result = folder / "result"
    result.unlink(missing_ok=True)
    go = multiprocessing.get_context("fork").Event()

    def child() -> None:
        go.wait(10)
        push_child(str(run), server.url, str(result), training)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    server.order(plan={"at": plan.at, "always": plan.always}, kill_pid=process.pid)
    go.set()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        return "hung", server.order(log=True)
    seen = server.order(log=True)
    return (result.read_text() if result.exists() else "killed" if process.exitcode == -9 else "crashed"), seen


def wrong(root: Path, run: Path) -> list[str]:
    """Every way in which what the server holds is not the run: the drill's own eyes, sharing nothing with the push."""
    store = Store(root)
    found = []
    if not store.exists(REPO):
        return ["no repository"]
    branches = store.repo(REPO)["branches"]
    folders = {int(p.name.rpartition("-")[2]): p for p in run.glob("checkpoint-*")}
    expected = {"main", "latest"} | {f"{kind}step-{step}" for step in folders for kind in ("", "optimizer-")}
    if set(branches) != expected:
        found.append(f"branches {sorted(set(branches) ^ expected)}")
    pairs = [(f"step-{step}", folder) for step, folder in folders.items()]
    pairs += [("latest", folders[max(folders)]), ("main", folders[max(folders)])]
    for branch, folder in pairs:
        files = store.files(REPO, branch) if branch in branches else {}
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            if name not in files or store.content(files[name]) != (folder / name).read_bytes():
                found.append(f"{branch}/{name}")
    for step, folder in folders.items():
        files = store.files(REPO, f"optimizer-step-{step}") if f"optimizer-step-{step}" in branches else {}
        for name in ("optimizer.pt", "rng_state.pth"):
            if name not in files or store.content(files[name]) != (folder / name).read_bytes():
                found.append(f"optimizer-step-{step}/{name}")
    return found


def half_shown(root: Path) -> list[str]:
    """Revisions that can be seen and are not whole: never allowed, whatever was killed."""
    store = Store(root)
    if not store.exists(REPO):
        return []
    found = []
    for branch in store.repo(REPO)["branches"]:
        files = store.files(REPO, branch)
        whole = {"optimizer.pt"} if branch.startswith("optimizer-") else {"model.safetensors", "config.json"}
        fresh = branch == "main" and set(files) == {".gitattributes"}
        if not branch.startswith("incoming-") and not fresh and not whole <= set(files):
            found.append(branch)
    return found


def plans_of(count: int, sweep: bool) -> list[FaultPlan]:
    """`count` seeded plans, and with `sweep` a kill at every single request, before or after it in turn."""
    plans = [FaultPlan.seeded(seed, REQUESTS) for seed in range(count)]
    if sweep:
        plans += [FaultPlan({at: ("kill-before", "kill-after")[at % 2]}) for at in range(REQUESTS)]
    return plans


def drill(plans: list[FaultPlan], run: Path, folder: Path, server: ServerProcess) -> dict[str, Any]:
    """Runs the plans; the figures, and every breach."""
    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    tries: Counter[int] = Counter()
    breaches: list[str] = []
    requests = 0
    for seed, whole_plan in enumerate(plans):
        plan = whole_plan
        root = folder / f"hub-{seed}"
        server.order(new_root=str(root))
        for scrap in run.glob("push-queue"):
            subprocess.run(["rm", "-rf", str(scrap)], check=True)
        training = seed % 4 == 3
        for number in range(MOST_TRIES):
            outcome, seen = attempt(run, server, plan, folder, training and number == 0)
            requests += seen["requests"]
            kinds.update(fault for _, _, fault, _ in seen["log"] if fault)
            said = outcome.partition(":")[0]
            outcomes[said] += 1
            half = half_shown(root)
            if half:
                breaches.append(f"seed {seed}: shown half: {half}")
            if seen["repeated"]:
                breaches.append(f"seed {seed}: sent again: {seen['repeated']}")
            if said in ("hung", "crashed"):
                breaches.append(f"seed {seed}: {said}")
            if training and number == 0 and said not in ("trained", "killed"):
                breaches.append(f"seed {seed}: the training ended with {outcome}")
            faults = wrong(root, run)
            if said == "whole" and faults:
                breaches.append(f"seed {seed}: said whole, but {faults}")
            if said == "whole":
                tries[number + 1] += 1
                break
            # The rest of the plan is the next process's, with the requests of this one taken off.
            plan = FaultPlan({at - seen["requests"]: kind for at, kind in plan.at.items() if at >= seen["requests"]})
        else:
            breaches.append(f"seed {seed}: not whole after {MOST_TRIES} tries")
        subprocess.run(["rm", "-rf", str(root)], check=True)
    return {
        "plans": len(plans),
        "requests": requests,
        "faults": {kind: kinds[kind] for kind in KINDS},
        "processes": dict(outcomes),
        "processes_until_whole": {str(count): tries[count] for count in sorted(tries)},
        "breaches": breaches,
    }


def main(count: int, output: Path | None = None, *, sweep: bool = False) -> dict[str, Any]:
    from hf_lowrank.hub.cards import model_card
    from hf_lowrank.hub.pictures import draw
    from hf_lowrank.runs.weights import check_weights
    from tests.hub.runs import make_run

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = make_run(folder / "tiny-run")
        # What every child would import for itself is here before the first fork.
        PICTURES.update(draw(run))
        model_card(run, REPO)
        check_weights(run / "checkpoint-10")
        server = ServerProcess(folder / "hub")
        try:
            figures = drill(plans_of(count, sweep), run, folder, server)
        finally:
            server.close()
    figures["seconds"] = round(time.perf_counter() - began, 1)
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    drilled = main(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None, sweep=True)
    print(json.dumps(drilled, indent=2))
    sys.exit(bool(drilled["breaches"]))
