"""What a step of a recipe takes on this machine, tried out on a little of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from hf_lowrank.training.recipe import Recipe

logger = logging.getLogger(__name__)

# Of what a model of so many parameters is trained with, four numbers each in float32.
BYTES_A_PARAMETER = 16
SHARE_OF_MEMORY = 0.25
# Parameters of a model whose step takes well below a second.
SMALL = 5_000_000


@dataclass(frozen=True)
class Costs:
    """What training takes; None where it is not known.

    Attributes:
        step_seconds: of an optimizer step with its batch, evaluation and saving left out.
        checkpoint_bytes: of a checkpoint with its optimizer state.
        memory_bytes: the peak.
    """

    step_seconds: float | None = None
    checkpoint_bytes: int | None = None
    memory_bytes: int | None = None


def probe(recipe: Recipe, threads: int) -> Costs:
    """Times one micro-batch and one optimizer step; a model that is large for this machine is not tried."""
    with _quiet():
        return _probe(recipe, threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """What an optimizer says about its groups is said when it trains."""
    package = logging.getLogger("hf_lowrank")
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)


def _probe(recipe: Recipe, threads: int) -> Costs:
    vocabulary = recipe.model.get("vocab_size") or recipe.data.vocabulary_size
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = recipe.method.build_model(recipe.config(vocab_size=vocabulary), recipe.settings, recipe.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = _memory(recipe, vocabulary)
    room = _memory_of_machine()
    step = None
    if room is None or parameters * BYTES_A_PARAMETER < SHARE_OF_MEMORY * room:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            step = _step_seconds(recipe, vocabulary)
        except (RuntimeError, ValueError, TypeError) as error:
            logger.debug("%s: cannot be timed: %s", recipe.name, error)
        finally:
            torch.set_num_threads(before)
    state = memory.optimizer_state if memory is not None else 8 * parameters
    weights = memory.weights if memory is not None else 4 * parameters
    return Costs(step, weights + state, memory.peak if memory is not None else None)


def _memory(recipe: Recipe, vocabulary: int) -> Any:
    from hf_lowrank.memory import estimate

    try:
        return estimate(recipe, vocabulary_size=None if "vocab_size" in recipe.model else vocabulary)
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        logger.debug("%s: memory cannot be estimated: %s", recipe.name, error)
        return None


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
    seconds, updates = [], []
    # The first step makes the optimizer's state and chooses its subspaces; the last ones are like those to come.
    for _ in range(3 if small else 2):
        began = _now()
        model(input_ids=ids, labels=ids).loss.backward()
        middle = _now()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(middle - began)
        updates.append(_now() - middle)
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return min(seconds) * sequences / count + min(updates)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _memory_of_machine() -> int | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
