"""What training takes on this machine: recorded by finished runs, or probed with a few steps."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.memory import MemoryEstimate, estimate
from hf_lowrank.runs.run_files import read_facts
from hf_lowrank.training.recipe import Recipe

logger = logging.getLogger(__name__)

# Training holds at least this per parameter: weight, gradient and two moments in float32.
BYTES_PER_PARAMETER = 16
# A model that needs more than this share of the machine's memory is not probed.
MEMORY_SHARE = 0.25
# Below this number of parameters a step takes well under a second.
SMALL = 5_000_000


@dataclass(frozen=True)
class Costs:
    """What training takes; None if unknown.

    Attributes:
        step_seconds: of an optimizer step with its batch, without evaluation and saving.
        checkpoint_bytes: of a checkpoint with its optimizer state.
        memory_bytes: the peak.
    """

    step_seconds: float | None = None
    checkpoint_bytes: int | None = None
    memory_bytes: int | None = None


def recorded_costs(folders: Sequence[Path]) -> Costs | None:
    """Costs recorded in run directories; None if there are none.

    The seconds are those of the median run: some may have shared the machine.
    """
    facts = [fact for folder in folders if (fact := read_facts(folder)).get("wall_seconds")]
    if not facts:
        return None
    seconds = sorted(fact["wall_seconds"] / fact["step"] for fact in facts if fact.get("step"))
    last = facts[-1]
    parameters, state = last.get("parameters"), last.get("optimizer_state_bytes") or 0
    return Costs(
        step_seconds=seconds[len(seconds) // 2] if seconds else None,
        checkpoint_bytes=4 * parameters + state if parameters else None,
        memory_bytes=(last.get("memory") or {}).get("measured_peak") or last.get("peak_memory_bytes"),
    )


def probe(recipe: Recipe, threads: int) -> Costs:
    """Estimates memory, and times a batch and an optimizer step unless the model is too large for this machine."""
    with _quiet():
        vocabulary = recipe.model.get("vocab_size") or recipe.data.vocabulary_size
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = recipe.method.build_model(recipe.config(vocab_size=vocabulary), recipe.settings, recipe.seed)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        memory = _memory(recipe, vocabulary)
        step, machine = None, _machine_memory()
        if machine is None or parameters * BYTES_PER_PARAMETER < MEMORY_SHARE * machine:
            step = _timed(recipe, vocabulary, threads)
    if memory is None:
        return Costs(step, 12 * parameters)
    return Costs(step, memory.weights + memory.optimizer_state, memory.peak)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what an optimizer logs about its groups, which it logs again when it trains."""
    package = logging.getLogger("hf_lowrank")
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)


def _memory(recipe: Recipe, vocabulary: int) -> MemoryEstimate | None:
    try:
        return estimate(recipe, vocabulary_size=None if "vocab_size" in recipe.model else vocabulary)
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        logger.debug("%s: memory cannot be estimated: %s", recipe.name, error)
        return None


def _timed(recipe: Recipe, vocabulary: int, threads: int) -> float | None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _step_seconds(recipe, vocabulary)
    except (RuntimeError, ValueError, TypeError) as error:
        logger.debug("%s: cannot be timed: %s", recipe.name, error)
        return None
    finally:
        torch.set_num_threads(before)


def _step_seconds(recipe: Recipe, vocabulary: int) -> float:
    args = recipe.arguments(recipe.path.parent)
    device = args.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model: Any = recipe.method.build_model(recipe.config(vocab_size=vocabulary), recipe.settings, recipe.seed)
        model.to(device).train()
        build = recipe.method.build_optimizer
        if build is not None:
            optimizer = build(model, recipe.settings, args)
        else:
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate)
        small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
        count = min(args.per_device_train_batch_size, 4 if small else 1)
        ids = torch.randint(vocabulary, (count, recipe.data.sequence_length), device=device)
    passes, updates = [], []
    # The first step creates the optimizer state and chooses subspaces; later ones are typical.
    for _ in range(3 if small else 2):
        start = _now()
        model(input_ids=ids, labels=ids).loss.backward()
        middle = _now()
        optimizer.step()
        optimizer.zero_grad()
        passes.append(middle - start)
        updates.append(_now() - middle)
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return min(passes) * sequences / count + min(updates)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _machine_memory() -> int | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
