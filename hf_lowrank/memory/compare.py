"""Memory estimates compared with full-rank training: a sentence about the difference, and tables for the terminal."""

import re
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

# In order; indented items are parts of the one above, and are left out if they are zero.
ITEMS = (
    ("weights", "weights"),
    ("  embeddings and head", "embeddings"),
    ("  dense layers and norms", "dense"),
    ("  low-rank factors", "factors"),
    ("  sparse values", "sparse"),
    ("  frozen in total", "frozen"),
    ("gradients", "gradients"),
    ("optimizer state", "optimizer_state"),
    ("  moments", "moments"),
    ("  bases", "bases"),
    ("activations kept", "activations"),
    ("  without checkpointing", "activations_plain"),
    ("  with checkpointing", "activations_checkpointed"),
    ("workspace at the peak", "workspace"),
    ("communication", "communication"),
)
COLUMNS = ("weights", "gradients", "optimizer_state", "activations", "workspace")


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

    def document(self) -> dict[str, Any]:
        """All items of the estimate in bytes, full-rank's peak and the sentence, for JSON."""
        found = self.estimate
        return {**found.plain(), "full_rank_peak": self.full_rank.peak, "saved": self.saved, "verdict": self.verdict}


# Training arguments that no tensor depends on.
_WITHOUT_MEMORY = re.compile(r"learning_rate|lr_scheduler_.*|warmup_.*|adam_.*|weight_decay")


def compare(
    recipes: Iterable[str | Path | Recipe], *, overrides: Sequence[str] = (), **options: Any
) -> list[Comparison]:
    """Compares each recipe with full-rank training with its model, data and training arguments.

    `overrides` are `key=value` overrides of each recipe file, `options` arguments of `estimate`. Recipes whose
    full-rank training takes the same memory share its estimate.

    Raises:
        UserError: a recipe or an option is wrong.
    """
    compared = []
    baselines: dict[str, MemoryEstimate] = {}
    for given in recipes:
        recipe = given if isinstance(given, Recipe) else load_recipe(given, overrides)
        found = estimate(recipe, both_activations=True, **options)
        full_rank = _full_rank(recipe)
        arguments = {name: value for name, value in full_rank.training.items() if not _WITHOUT_MEMORY.match(name)}
        key = repr((full_rank.model, full_rank.data, arguments))
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
    """One sentence for each method that helps, and one for all that save little, or need more, for one reason."""
    if len(comparisons) == 1:
        return [comparisons[0].verdict]
    lines = [one.verdict for one in comparisons if one.helps]
    useless: dict[tuple[bool, str], dict[str, None]] = {}
    for one in comparisons:
        method, full_rank = METHODS[one.estimate.method], one.full_rank
        if not one.helps and method.kind != "baseline":
            end = f"full-rank's {byte_size(full_rank.peak)}: {_cause(full_rank)}; {_remedy(full_rank)}."
            useless.setdefault((one.saved < 0, end), {})[method.title] = None
    for (more, end), found in useless.items():
        titles, verb = list(found), "need" if more else "save"
        difference = "more than" if more else f"less than {LEAST_SAVED:.0%} of"
        lines.append(f"{join_words(titles)} {verb}{'' if len(titles) > 1 else 's'} {difference} {end}")
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
        share = f"{embedding:.0%} of weights and their state"
        return f"embeddings and head, which every method trains in full, are {share}"
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


def item_table(comparison: Comparison) -> Any:
    """One recipe: items, phases and peak, next to full-rank training."""
    found, plain = comparison.estimate, comparison.full_rank
    shown = [found] if found is plain else [found, plain]
    table = _table(_title(found))
    table.add_column("")
    for one in shown:
        table.add_column(one.method, justify="right")
    for label, field in ITEMS:
        sizes = [getattr(one, field) for one in shown]
        if any(sizes) or not (label.startswith(" ") or field == "communication"):
            table.add_row(label, *map(_text, sizes))
    table.add_section()
    for phase in dict.fromkeys(name for one in shown for name in one.phases):
        table.add_row(f"phase: {phase}", *(_text(one.phases.get(phase)) for one in shown))
    table.add_section()
    table.add_row("peak", *(_text(one.peak) for one in shown), style="bold")
    return table


def comparison_table(comparisons: Sequence[Comparison]) -> Any:
    """One line per recipe, in MiB, with the peak as a share of full-rank's."""
    found = [one.estimate for one in comparisons]
    # A narrow terminal has room for the method only, which is enough if each occurs once.
    by_method = len({one.method for one in found}) == len(found)
    table = _table(f"{_title(found[0])}; MiB")
    table.add_column("method" if by_method else "recipe", overflow="fold")
    for name in ("weights", "gradi-\nents", "state", "acti-\nvations", "work-\nspace", "peak", "of full\nrank"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in comparisons:
        sizes = [*(getattr(one.estimate, name) for name in COLUMNS), one.estimate.peak]
        texts = [f"{size / 2**20:.{1 if size < 1000 * 2**20 else 0}f}" for size in sizes]
        share = f"{one.estimate.peak / one.full_rank.peak:.1%}"
        table.add_row(one.estimate.method if by_method else one.estimate.recipe, *texts, share)
    return table


def _table(title: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")


def _title(found: MemoryEstimate) -> str:
    many = f", each of {found.world_size} processes under {found.sharding}" if found.world_size > 1 else ""
    kept = ", gradient checkpointing" if found.gradient_checkpointing else ""
    return f"{found.batch_size} sequences of {found.sequence_length} tokens on {found.device}{kept}{many}"


def _text(size: int | None) -> str:
    return "—" if size is None else byte_size(size)
