"""A drill for pushing: seeded fault plans against real processes, with real kills.

Each plan lets some requests of a push fail, or kills the pushing process with SIGKILL at a request. After the plan
the same push is started again until it succeeds; then every revision, and every file of the bucket, is compared with
the run, byte by byte. Half of the plans push optimizer states as revisions, half store every checkpoint in a bucket
and publish two; a quarter begin as a training does. Run directly, `python -m tests.hub.drill PLANS OUTPUT.json` adds a
kill at every single request and writes down the figures; without OUTPUT it runs the seeded plans alone, so
`python -m tests.hub.drill 200` runs 200.
"""

from __future__ import annotations

import contextlib
import hashlib
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

import yaml

from tests.hub.faults import KINDS, FaultPlan
from tests.hub.runs import BENCHMARK
from tests.hub.server import TOKEN
from tests.hub.store import Store

REPO, BUCKET = "user/drill", "user/drill-states"
PUBLISHED = [10, 30]  # next to a bucket, which gets all
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


def push_child(run: str, url: str, root: Path, result: str, training: bool, bucket: bool) -> None:
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
    # What the client remembers of a Hub's Xet storage lies next to that Hub.
    quick = {"HF_XET_TELEMETRY_ENABLED": "0", "HF_XET_CLIENT_RETRY_BASE_DELAY": "1ms"}
    os.environ |= {"HF_XET_CACHE": str(root / "remembered"), **quick}
    # The client's own pauses between its tries take no time; nobody else's sleep is touched.
    huggingface_hub.utils._http.time = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        try:
            if training:
                train(Path(run), url, bucket)
                outcome = "trained"
            elif bucket:
                push(run, REPO, steps=PUBLISHED, token=TOKEN, endpoint=url, bucket=BUCKET, pauses=(0, 0))
                outcome = "whole"
            else:
                push(run, REPO, token=TOKEN, endpoint=url, optimizer=True, pauses=(0, 0))
                outcome = "whole"
        except UserError as error:
            outcome = f"told: {error}"
    Path(result).write_text(outcome)


def train(run: Path, url: str, bucket: bool) -> None:
    """What a Trainer does with the callback, without the arithmetic: saves come one after the other, none waits."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hf_lowrank.hub import PushRevisionsCallback

    kind: dict[str, Any] = {"bucket": BUCKET, "every": 2} if bucket else {"optimizer": True}
    callback = PushRevisionsCallback(REPO, token=TOKEN, endpoint=url, first_pause=0.01, wait_at_end=30, **kind)
    args, state, control = TrainingArguments(output_dir=str(run), use_cpu=True), TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control)
    for folder in sorted(run.glob("checkpoint-*")):
        state.global_step = int(folder.name.rpartition("-")[2])
        callback.on_save(args, state, control)
    callback.on_train_end(args, state, control)


def attempt(
    run: Path, server: ServerProcess, plan: FaultPlan, root: Path, *, training: bool = False, bucket: bool = False
) -> tuple[str, Any]:
    """One process; what it said in the end ("killed" if it could not), and what the server saw."""
    result = root / "result"
    result.unlink(missing_ok=True)
    go = multiprocessing.get_context("fork").Event()

    def child() -> None:
        go.wait(10)
        push_child(str(run), server.url, root, str(result), training, bucket)

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


def wrong(root: Path, run: Path, bucket: bool) -> list[str]:
    """Every way in which what the server holds is not the run: the drill's own eyes, sharing nothing with the push."""
    store = Store(root)
    found = []
    if not store.exists(REPO):
        return ["no repository"]
    branches = store.repo(REPO)["branches"]
    every = {int(p.name.rpartition("-")[2]): p for p in run.glob("checkpoint-*")}
    folders = {step: folder for step, folder in every.items() if not bucket or step in PUBLISHED}
    kinds = ("",) if bucket else ("", "optimizer-")
    expected = {"main", "latest"} | {f"{kind}step-{step}" for step in folders for kind in kinds}
    if set(branches) != expected:
        found.append(f"branches {sorted(set(branches) ^ expected)}")
    pairs = [(f"step-{step}", folder) for step, folder in folders.items()]
    pairs += [("latest", folders[max(folders)]), ("main", folders[max(folders)])]
    for branch, folder in pairs:
        files = store.files(REPO, branch) if branch in branches else {}
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            if name not in files or store.content(files[name]) != (folder / name).read_bytes():
                found.append(f"{branch}/{name}")
    results = store.files(REPO, "main").get(".eval_results/hf_lowrank.yaml")
    values = [] if results is None else [entry["value"] for entry in yaml.safe_load(store.content(results))]
    if values != [BENCHMARK["value"]]:
        found.append(f"evaluation results {values}")
    if bucket:
        return found + wrong_in_bucket(store, every, run)
    for step, folder in folders.items():
        files = store.files(REPO, f"optimizer-step-{step}") if f"optimizer-step-{step}" in branches else {}
        for name in ("optimizer.pt", "rng_state.pth"):
            if name not in files or store.content(files[name]) != (folder / name).read_bytes():
                found.append(f"optimizer-step-{step}/{name}")
    return found


def wrong_in_bucket(store: Store, every: dict[int, Path], run: Path) -> list[str]:
    if not store.buckets.exists(BUCKET):
        return ["no bucket"]
    files = store.buckets.files(BUCKET)
    names = ("model.safetensors", "tokenizer.json", "config.json", "optimizer.pt", "rng_state.pth", "scheduler.pt")
    local = {f"checkpoint-{step}/{name}": folder / name for step, folder in every.items() for name in names}
    local |= {name: run / name for name in ("evaluation.safetensors", "facts.json", "downstream.jsonl")}
    found = [
        path
        for path, file in local.items()
        if path not in files or store.buckets.content(BUCKET, path) != file.read_bytes()
    ]
    found += [
        f"checkpoint-{step}/checksums.json" for step in every if f"checkpoint-{step}/checksums.json" not in files
    ]
    return [f"bucket/{path}" for path in found]


def half_shown(root: Path) -> list[str]:
    """What can be seen and is not whole: never allowed, whatever was killed.

    Of a bucket these are checkpoints with checksums, if a file that these name is missing or another one.
    """
    store = Store(root)
    found = []
    files = store.buckets.files(BUCKET) if store.buckets.exists(BUCKET) else {}
    for path in files:
        folder, _, name = path.rpartition("/")
        if name == "checksums.json":
            entries = json.loads(store.buckets.content(BUCKET, path))
            for file, entry in entries.items():
                inside = f"{folder}/{file}"
                if file != "checksum" and (
                    inside not in files
                    or hashlib.sha256(store.buckets.content(BUCKET, inside)).hexdigest() != entry["sha256"]
                ):
                    found.append(inside)
    if not store.exists(REPO):
        return found
    for branch in store.repo(REPO)["branches"]:
        files = store.files(REPO, branch)
        whole = {"optimizer.pt"} if branch.startswith("optimizer-") else {"model.safetensors", "config.json"}
        fresh = branch == "main" and set(files) == {".gitattributes"}
        if not branch.startswith("incoming-") and not fresh and not whole <= set(files):
            found.append(branch)
    return found


def in_bucket(seed: int) -> bool:
    """Whether a seed's plan is for a push with a bucket: half of those of each kind, and of the trainings."""
    return bool((seed ^ seed >> 2) & 1)


Plan = tuple[int, bool, bool, FaultPlan]  # number, whether with a bucket, whether it begins with a training


def plans_of(count: int, requests: dict[bool, int], sweep: bool) -> list[Plan]:
    """`count` seeded plans, and with `sweep` a kill at every single request, before or after it in turn.

    `requests` says how many a push makes, with a bucket and without.
    """
    plans = [
        (seed, in_bucket(seed), seed % 4 == 3, FaultPlan.seeded(seed, requests[in_bucket(seed)]))
        for seed in range(count)
    ]
    if sweep:
        for bucket in (False, True):
            for at in range(requests[bucket]):
                kill = FaultPlan({at: ("kill-before", "kill-after")[at % 2]})
                plans.append((len(plans), bucket, False, kill))
    return plans


def fresh(folder: Path, name: str, run: Path, server: ServerProcess) -> Path:
    """An empty Hub."""
    root = folder / name
    server.order(new_root=str(root))
    subprocess.run(["rm", "-rf", str(run / "push-queue")], check=True)
    return root


def drill(plans: list[Plan], run: Path, folder: Path, server: ServerProcess) -> dict[str, Any]:
    """Runs the plans; the figures, and every breach."""
    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    tries: Counter[int] = Counter()
    breaches: list[str] = []
    requests = 0
    for seed, bucket, training, whole_plan in plans:
        plan = whole_plan
        root = fresh(folder, f"hub-{seed}", run, server)
        for number in range(MOST_TRIES):
            outcome, seen = attempt(run, server, plan, root, training=training and number == 0, bucket=bucket)
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
            faults = wrong(root, run, bucket)
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
        "with_bucket": sum(bucket for _, bucket, _, _ in plans),
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
        (run / "downstream.jsonl").write_text(json.dumps(BENCHMARK) + "\n")
        # What every child would import for itself is here before the first fork.
        PICTURES.update(draw(run))
        model_card(run, REPO)
        check_weights(run / "checkpoint-10")
        server = ServerProcess(folder / "hub")
        try:
            requests = {}
            for bucket in (False, True):
                root = fresh(folder, f"hub-without-faults-{bucket}", run, server)
                outcome, seen = attempt(run, server, FaultPlan(), root, bucket=bucket)
                assert outcome == "whole", outcome
                assert wrong(root, run, bucket) == []
                requests[bucket] = seen["requests"]
            figures = drill(plans_of(count, requests, sweep), run, folder, server)
        finally:
            server.close()
    figures["seconds"] = round(time.perf_counter() - began, 1)
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    drilled = main(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None, sweep=len(sys.argv) > 2)
    print(json.dumps(drilled, indent=2))
    sys.exit(bool(drilled["breaches"]))
