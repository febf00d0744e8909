"""Estimates side by side with full-rank training, and in one sentence what the difference comes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.memory.estimates import COMPUTING, MemoryEstimate, estimate
from hf_lowrank.memory.units import size_text
from hf_lowrank.methods import METHODS
from hf_lowrank.training.recipe import Recipe, load_recipe

# Below this share of full-rank's peak a method does not help.
LEAST_SAVED = 0.05
LARGE_SHARE = 0.5


@dataclass(frozen=True)
class Comparison:
    """An estimate, full-rank training of the same model on the same batches, and what is to be said of them."""

    estimate: MemoryEstimate
    full_rank: MemoryEstimate
    verdict: str

    @property
    def saved(self) -> int:
        """Bytes of the peak that the method saves; negative where it needs more."""
        return self.full_rank.peak - self.estimate.peak


def compare(
    recipes: Iterable[str | Path | Recipe], *, overrides: Sequence[str] = (), **options: Any
) -> list[Comparison]:
    """Each recipe's estimate beside full-rank training with its model, data and training arguments.

    Args:
        overrides: `key=value` laid over each recipe.
        options: of `estimate`.

    Raises:
        UserError: a recipe or an option is wrong.
    """
    compared = []
    baselines: dict[str, MemoryEstimate] = {}
    for given in recipes:
        recipe = given if isinstance(given, Recipe) else load_recipe(given, overrides)
        found = estimate(recipe, both_activations=True, **options)
        plain = _full_rank(recipe)
        key = repr((plain.model, plain.data, {**plain.training, "learning_rate": 0}))
        if recipe.method is plain.method:
            baselines[key] = found
        elif key not in baselines:
            baselines[key] = estimate(plain, both_activations=True, **options)
        compared.append(Comparison(found, baselines[key], verdict(found, baselines[key])))
    return compared


def beside(recipe: str | Path) -> list[Path]:
    """The recipes of all methods of the table in `recipe`'s folder, which are files with the methods' names.

    Raises:
        UserError: the folder has none.
    """
    folder = Path(recipe).parent
    found = [folder / f"{name}.yaml" for name in METHODS if (folder / f"{name}.yaml").is_file()]
    if not found:
        raise UserError(
            f"{folder}: --all-methods needs recipes with the methods' names beside {Path(recipe).name}, "
            "as full_rank.yaml; there are none"
        )
    return found


def verdict(found: MemoryEstimate, full_rank: MemoryEstimate) -> str:
    """One sentence: what the method saves of full-rank's peak, and where that is little, why, and what would help."""
    title = METHODS[found.method].title
    if METHODS[found.method].kind == "baseline":
        return f"{title} holds {size_text(found.peak)} at its peak: {_where(found)}; {_remedy(found)}."
    saved = full_rank.peak - found.peak
    amount = f"{size_text(abs(saved))} of {size_text(full_rank.peak)} ({abs(saved) / full_rank.peak:.1%})"
    if helps(found, full_rank):
        return f"{title} saves {amount} of full-rank's peak."
    start = f"{title} saves only {amount}" if saved >= 0 else f"{title} needs {size_text(-saved)} more than full-rank"
    return f"{start}: {_where(found)}; {_remedy(found)}."


def helps(found: MemoryEstimate, full_rank: MemoryEstimate) -> bool:
    return full_rank.peak - found.peak >= LEAST_SAVED * full_rank.peak


def verdicts(comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence each for the methods that help, one for all others of the same full-rank training together."""
    if len(comparisons) == 1:
        return [comparisons[0].verdict]
    lines = []
    idle: dict[int, list[Comparison]] = {}
    for one in comparisons:
        if helps(one.estimate, one.full_rank):
            lines.append(one.verdict)
        elif METHODS[one.estimate.method].kind != "baseline":
            idle.setdefault(id(one.full_rank), []).append(one)
    for together in idle.values():
        plain = together[0].full_rank
        titles = list(dict.fromkeys(METHODS[one.estimate.method].title for one in together))
        names = " and ".join([", ".join(titles[:-1]), titles[-1]]) if len(titles) > 1 else titles[0]
        saves = "save" if len(titles) > 1 else "saves"
        lines.append(
            f"{names} {saves} less than {LEAST_SAVED:.0%} of full-rank's {size_text(plain.peak)}: "
            f"{_where(plain)}; {_remedy(plain)}."
        )
    return lines


def _passing(found: MemoryEstimate) -> int:
    """What a forward and backward pass holds at the peak beside weights and state."""
    if found.peak_phase not in COMPUTING:
        return 0
    return found.peak - found.weights - found.optimizer_state - found.communication


def _lasting(found: MemoryEstimate) -> int:
    return found.weights + found.gradients + found.optimizer_state


def _where(found: MemoryEstimate) -> str:
    share = _passing(found) / found.peak
    if share > LARGE_SHARE and found.peak_phase == "evaluation":
        return f"the logits and layers of an evaluation batch are {share:.0%} of the peak, whatever the method"
    if share > LARGE_SHARE:
        return f"activations and what passes through the layers are {share:.0%} of the peak, whatever the method"
    # Embeddings and head have weight, gradient and two moments in every method.
    share = 4 * found.embeddings / _lasting(found)
    if share > LARGE_SHARE:
        return f"embeddings and head, which every method trains in full, are {share:.0%} of weights and their state"
    return f"weights, gradients and optimizer state are {_lasting(found) / found.peak:.0%} of the peak"


def _remedy(found: MemoryEstimate) -> str:
    if _passing(found) > LARGE_SHARE * found.peak and found.peak_phase == "evaluation":
        return "a smaller per_device_eval_batch_size would hold less"
    if _passing(found) > LARGE_SHARE * found.peak:
        plain, light = found.activations_plain, found.activations_checkpointed
        if not found.gradient_checkpointing and plain and light is not None and light < 0.8 * plain:
            return f"gradient checkpointing would keep {size_text(light)} of activations instead of {size_text(plain)}"
        if found.batch_size > 1:
            return "a smaller batch with more accumulation would hold less"
        return "shorter sequences would hold less"
    if 4 * found.embeddings > LARGE_SHARE * _lasting(found):
        return "a smaller vocabulary or tied embeddings would hold less"
    return "a lower rank, bfloat16 weights or sharding over several devices would hold less"


def _full_rank(recipe: Recipe) -> Recipe:
    if recipe.method.kind == "baseline":
        return recipe
    method = next(method for method in METHODS.values() if method.kind == "baseline")
    return replace(recipe, method=method, settings=method.settings())
