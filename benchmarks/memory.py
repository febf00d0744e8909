"""Estimated memory peaks compared with measured ones, for every method, with and without gradient checkpointing.

    python benchmarks/memory.py [--device cpu|cuda] [--scales nano,60m] [--methods galore,cola] [--jobs 4]

Each method trains for two steps in its own process with a plain loop. On the CPU its peak is measured twice: from the
blocks of torch's allocator, and from the resident memory of the process, independently of torch. For the latter,
blocks return to the system when they are freed (MALLOC_ settings), and what libraries keep after a first run is
subtracted. On a GPU it is torch's own count. Neither side includes evaluation.
The result is written to benchmarks/results/ as JSON after each method, and to the terminal as a Markdown table.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

sys.path.insert(0, str(Path(__file__).parent))
from _common import RESULTS, machine, versions, write_result

from hf_lowrank.errors import UserError
from hf_lowrank.memory import estimate
from hf_lowrank.memory.recorder import AllocatorPeak
from hf_lowrank.methods import METHODS
from hf_lowrank.training.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
# Recipe folder, sequences per step on the CPU and on a GPU, vocabulary.
SCALES = {"nano": ("nano", 16, 16, 2048), "60m": ("llama_60m", 1, 32, 32_000), "350m": ("llama_350m", 1, 16, 32_000)}
STEPS = 2
REQUIRED = 0.1
PR_SET_THP_DISABLE = 41
# Every block of at least 64 KiB is mapped separately, and returns to the system when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def train(recipe: Recipe, vocabulary: int, device: torch.device, watch: AllocatorPeak | None = None) -> int:
    """Two training steps like Trainer's, on random tokens; returns the peak that `watch` measured, or 0."""
    args = recipe.arguments(RECIPES)
    torch.manual_seed(recipe.seed)
    model: PreTrainedModel = recipe.method.build_model(
        recipe.config(vocab_size=vocabulary), recipe.settings, recipe.seed
    )
    nn.Module.to(model, device).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = recipe.method.optimizer(model, recipe.settings, args)
    if optimizer is None:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = kind([p for p in model.parameters() if p.requires_grad], **options)
    if watch is not None:
        watch.start(model, optimizer)
    for _ in range(STEPS):
        shape = (args.per_device_train_batch_size, recipe.data.sequence_length)
        ids = torch.randint(vocabulary, shape, device=device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        model.zero_grad()
    return watch.stop() if watch is not None else 0


def status(field: str) -> int:
    """A field of this process's /proc status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def small_pages() -> None:
    """Disables huge pages, so that resident memory counts touched small pages only."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def process_peak(recipe: Recipe, vocabulary: int, device: torch.device) -> int:
    train(recipe, vocabulary, device)  # libraries have allocated what they keep
    settle()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the resident peak
    train(recipe, vocabulary, device)
    return status("VmHWM") - before


def allocator_peak(recipe: Recipe, vocabulary: int, device: torch.device) -> int:
    if device.type == "cpu":
        return train(recipe, vocabulary, device, AllocatorPeak())
    train(recipe, vocabulary, device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(recipe, vocabulary, device)
    return torch.cuda.max_memory_allocated()


def rows_of(method: str, scale: str, device: torch.device) -> list[dict[str, Any]]:
    """The result rows of a method, measured in this process."""
    folder, batch, batch_on_gpu, vocabulary = SCALES[scale]
    batch = batch if device.type == "cpu" else batch_on_gpu
    rows: list[dict[str, Any]] = []
    recipes = []
    for checkpointing in (False, True):
        changes = [
            f"training.per_device_train_batch_size={batch}",
            f"training.gradient_checkpointing={str(checkpointing).lower()}",
            "training.bf16=false",
            "training.gradient_accumulation_steps=1",
        ]
        recipe = load_recipe(RECIPES / folder / f"{method}.yaml", changes)
        # `train` makes packed batches, whatever the recipe's corpus.
        object.__setattr__(recipe, "data", recipe.data.model_copy(update={"shape": "packed"}))
        expected = estimate(recipe, device=device, vocabulary_size=vocabulary)
        peak = max(size for phase, size in expected.phases.items() if phase != "evaluation")
        rows.append(
            {
                "method": method,
                "gradient_checkpointing": checkpointing,
                "estimated": peak,
                "items": expected.plain(),
            }
        )
        recipes.append(recipe)
    # The allocator's profiler leaves memory allocated, so the process is measured first.
    for way in ways(device):
        for row, recipe in zip(rows, recipes, strict=True):
            row[f"measured_{way}"] = WAYS[way](recipe, vocabulary, device)
            row[f"ratio_{way}"] = row["estimated"] / row[f"measured_{way}"]
    return rows


WAYS = {"process": process_peak, "allocator": allocator_peak}


def ways(device: torch.device) -> list[str]:
    return ["process", "allocator"] if device.type == "cpu" else ["allocator"]


def rows_in_process(method: str, scale: str, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """`rows_of` in a new process, forked from one that has only imported modules.

    Imports (of torchao) may have initialised CUDA, which no fork can use then; on a GPU the process is spawned.
    """
    context = multiprocessing.get_context("forkserver" if device.type == "cpu" else "spawn")
    if device.type == "cpu":
        context.set_forkserver_preload(["hf_lowrank.memory", "transformers.models.llama.modeling_llama"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, method, scale, device, threads))
    process.start()
    theirs.close()
    try:
        rows: list[dict[str, Any]] = ours.recv()
    except EOFError:
        raise UserError(f"{method} at {scale} failed; see its error above") from None
    process.join()
    return rows


def _send(pipe: Any, method: str, scale: str, device: torch.device, threads: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    if device.type == "cpu":
        small_pages()
    pipe.send(rows_of(method, scale, device))


def earlier(name: str, here: dict[str, str], scales: list[str]) -> list[dict[str, Any]]:
    """Earlier results for other scales, made with the same versions."""
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {"versions": None}
    return (
        [result for result in known["results"] if result["scale"] not in scales] if known["versions"] == here else []
    )


def line(row: dict[str, Any]) -> str:
    measured = [way for way in WAYS if f"measured_{way}" in row]
    cells = [f"{row[f'measured_{way}'] / 2**20:.1f} | {row[f'ratio_{way}']:.3f}" for way in measured]
    kept = "checkpointing" if row["gradient_checkpointing"] else ""
    return f"| {row['method']} | {kept} | {row['estimated'] / 2**20:.1f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scales", default="nano,60m", help=f"of {', '.join(SCALES)}")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="methods in parallel; their processes share the device")
    parser.add_argument("--name", help="of the result file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu here: no GPU is available")
    scales = options.scales.split(",")
    for scale in scales:
        if scale not in SCALES:
            parser.error(f"--scales must be of {', '.join(SCALES)}, got {scale!r}")
    os.environ.update(MALLOC)  # for the child processes
    name = options.name or ("memory" if device.type == "cpu" else f"memory_{device.type}")
    results = earlier(name, versions(), scales)
    pool = ThreadPoolExecutor(options.jobs)
    for scale in scales:
        _, batch, batch_on_gpu, _ = SCALES[scale]
        batch = batch if device.type == "cpu" else batch_on_gpu
        seen = ways(device)
        print(f"\n{scale}, {batch} sequences per step, {device}, MiB\n")
        print("| method | | estimated | " + " | ".join(f"{way} | ratio" for way in seen) + " |")
        print("|---|---|---|" + "---|---|" * len(seen))
        result: dict[str, Any] = {"scale": scale, "batch_size": batch, "rows": []}
        results.append(result)
        rows_of_method = partial(rows_in_process, scale=scale, device=device, threads=options.threads)
        for rows in pool.map(rows_of_method, options.methods.split(",")):
            for row in rows:
                result["rows"].append(row)
                print(line(row), flush=True)
            result["farthest"] = max(abs(row[f"ratio_{way}"] - 1) for row in result["rows"] for way in seen)
            content = {"machine": machine(device), "versions": versions(), "steps": STEPS, "results": results}
            path = write_result(name, content)
        print(
            f"\nfarthest from the measured peak: {result['farthest']:.1%} (required: at most {REQUIRED:.0%})",
            flush=True,
        )
    print(f"\n{path}")


if __name__ == "__main__":
    main()
