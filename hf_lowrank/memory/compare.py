"""Memory estimates compared with full-rank training, and a sentence about the difference."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.formats import byte_size, join_words
from hf_lowrank.memory.estimates import COMPUTING, MemoryEstimate, estimate
from hf_lowrank.methods import METHODS
from hf_lowrank.training.recipe import Recipe, load_recipe

# A method that saves less than this share of full-rank's peak does not help.
LEAST_SAVED = 0.05
# What takes more than this share of the peak is named as its cause.
LARGE_SHARE = 0.5


@dataclass(frozen=True)
class Comparison:
    """A recipe's estimate, and that of full-rank training of the same model on the same batches."""

    estimate: MemoryEstimate
    full_rank: MemoryEstimate

    @property
    def saved(self) -> int:
        """Bytes of the peak that the method saves; negative if it needs more."""
        return self.full_rank.peak - self.estimate.peak

    @property
    def helps(self) -> bool:
        return self.saved >= LEAST_SAVED * self.full_rank.peak

    @property
    def verdict(self) -> str:
        """One sentence: what the method saves, and if that is little, why, and what would save more."""
        found, peak = self.estimate, byte_size(self.estimate.peak)
        title = METHODS[found.method].title
        if METHODS[found.method].kind == "baseline":
            return f"{title} needs {peak} at its peak: {_cause(found)}; {_remedy(found)}."
        share = abs(self.saved) / self.full_rank.peak
        amount = f"{byte_size(abs(self.saved))} of {byte_size(self.full_rank.peak)} ({share:.1%})"
        if self.helps:
            return f"{title} saves {amount} of full-rank's peak."
        start = f"saves only {amount}" if self.saved >= 0 else f"needs {byte_size(-self.saved)} more than full-rank"
        return f"{title} {start}: {_cause(found)}; {_remedy(found)}."


def compare(
    recipes: Iterable[str | Path | Recipe], *, overrides: Sequence[str] = (), **options: Any
) -> list[Comparison]:
    """Compares each recipe with full-rank training with its model, data and training arguments.

    Args:
        recipes: recipes or recipe files.
        overrides: `key=value` overrides of each recipe file.
        options: arguments of `estimate`.

    Raises:
        UserError: a recipe or an option is wrong.
    """
    compared = []
    baselines: dict[str, MemoryEstimate] = {}
    for given in recipes:
        recipe = given if isinstance(given, Recipe) else load_recipe(given, overrides)
        found = estimate(recipe, both_activations=True, **options)
        full_rank = _full_rank(recipe)
        key = repr((full_rank.model, full_rank.data, {**full_rank.training, "learning_rate": 0}))
        if recipe.method is full_rank.method:
            baselines[key] = found
        elif key not in baselines:
            baselines[key] = estimate(full_rank, both_activations=True, **options)
        compared.append(Comparison(found, baselines[key]))
    return compared


def _full_rank(recipe: Recipe) -> Recipe:
    if recipe.method.kind == "baseline":
        return recipe
    method = next(method for method in METHODS.values() if method.kind == "baseline")
    return replace(recipe, method=method, settings=method.settings())


def sibling_recipes(recipe: str | Path) -> list[Path]:
    """The recipes in `recipe`'s folder that are named after a method.

    Raises:
        UserError: the folder has none.
    """
    folder = Path(recipe).parent
    found = [folder / f"{name}.yaml" for name in METHODS if (folder / f"{name}.yaml").is_file()]
    if not found:
        raise UserError(
            f"{folder}: --all-methods needs recipes named after methods, e.g. full_rank.yaml, next to "
            f"{Path(recipe).name}; there are none"
        )
    return found


def verdicts(comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence for each method that helps, and one for all others compared with the same full-rank training."""
    if len(comparisons) == 1:
        return [comparisons[0].verdict]
    lines = [one.verdict for one in comparisons if one.helps]
    useless: dict[int, list[Comparison]] = {}
    for one in comparisons:
        if not one.helps and METHODS[one.estimate.method].kind != "baseline":
            useless.setdefault(id(one.full_rank), []).append(one)
    for group in useless.values():
        full_rank = group[0].full_rank
        titles = list(dict.fromkeys(METHODS[one.estimate.method].title for one in group))
        lines.append(
            f"{join_words(titles)} {'save' if len(titles) > 1 else 'saves'} less than {LEAST_SAVED:.0%} of "
            f"full-rank's {byte_size(full_rank.peak)}: {_cause(full_rank)}; {_remedy(full_rank)}."
        )
    return lines


def _passing_share(found: MemoryEstimate) -> float:
    """The share of the peak that only a forward and backward pass holds."""
    if found.peak_phase not in COMPUTING:
        return 0.0
    return (found.peak - found.weights - found.optimizer_state - found.communication) / found.peak


def _embedding_share(found: MemoryEstimate) -> float:
    """The share of embeddings and head, which have weight, gradient and two moments in every method."""
    return 4 * found.embeddings / (found.weights + found.gradients + found.optimizer_state)


def _cause(found: MemoryEstimate) -> str:
    passing, embedding = _passing_share(found), _embedding_share(found)
    if passing > LARGE_SHARE:
        evaluation = found.peak_phase == "evaluation"
        what = "logits and activations of an evaluation batch" if evaluation else "activations and temporary tensors"
        return f"{what} are {passing:.0%} of the peak, whatever the method"
    if embedding > LARGE_SHARE:
        return (
            f"embeddings and head, which every method trains in full, are {embedding:.0%} of weights and their state"
        )
    lasting = found.weights + found.gradients + found.optimizer_state
    return f"weights, gradients and optimizer state are {lasting / found.peak:.0%} of the peak"


def _remedy(found: MemoryEstimate) -> str:
    if _passing_share(found) > LARGE_SHARE and found.peak_phase == "evaluation":
        return "a smaller per_device_eval_batch_size would help"
    if _passing_share(found) > LARGE_SHARE:
        kept, checkpointed = found.activations_plain, found.activations_checkpointed
        if not found.gradient_checkpointing and kept and checkpointed is not None and checkpointed < 0.8 * kept:
            return f"gradient checkpointing would keep {byte_size(checkpointed)} of activations, not {byte_size(kept)}"
        if found.batch_size > 1:
            return "a smaller batch with more gradient accumulation would help"
        return "shorter sequences would help"
    if _embedding_share(found) > LARGE_SHARE:
        return "a smaller vocabulary or tied embeddings would help"
    return "a lower rank, bfloat16 weights or sharding over several devices would help"
