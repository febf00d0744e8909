"""Estimates as tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from hf_lowrank.formats import byte_size
from hf_lowrank.memory.compare import Comparison
from hf_lowrank.memory.estimates import MemoryEstimate

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


def item_table(comparison: Comparison) -> Any:
    """One recipe: items, phases and peak, next to full-rank training."""
    from rich import box
    from rich.table import Table

    found, plain = comparison.estimate, comparison.full_rank
    alone = found is plain
    table = Table(box=box.SIMPLE_HEAD, title=_title(found), title_justify="left")
    table.add_column("")
    for name in [found.method] if alone else [found.method, plain.method]:
        table.add_column(name, justify="right")
    shown = [found] if alone else [found, plain]
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
    from rich import box
    from rich.table import Table

    found = [one.estimate for one in comparisons]
    # A narrow terminal has room for the method only, which is enough if each occurs once.
    by_method = len({one.method for one in found}) == len(found)
    table = Table(box=box.SIMPLE_HEAD, title=f"{_title(found[0])}; MiB", title_justify="left")
    table.add_column("method" if by_method else "recipe", overflow="fold")
    for name in ("weights", "gradi-\nents", "state", "acti-\nvations", "work-\nspace", "peak", "of full\nrank"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in comparisons:
        sizes = [*(getattr(one.estimate, name) for name in COLUMNS), one.estimate.peak]
        texts = [f"{size / 2**20:.{1 if size < 1000 * 2**20 else 0}f}" for size in sizes]
        share = f"{one.estimate.peak / one.full_rank.peak:.1%}"
        table.add_row(one.estimate.method if by_method else one.estimate.recipe, *texts, share)
    return table


def _title(found: MemoryEstimate) -> str:
    many = f", each of {found.world_size} processes under {found.sharding}" if found.world_size > 1 else ""
    kept = ", gradient checkpointing" if found.gradient_checkpointing else ""
    return f"{found.batch_size} sequences of {found.sequence_length} tokens on {found.device}{kept}{many}"


def _text(size: int | None) -> str:
    return "—" if size is None else byte_size(size)
