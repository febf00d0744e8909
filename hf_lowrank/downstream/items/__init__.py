"""Tasks that need no network: items that seeded generators make from a run's held-out text."""

from hf_lowrank.downstream.items.build import MAKERS, VERSION, items_for, load_items
from hf_lowrank.downstream.items.held_out import Source, held_out_sources

__all__ = ["MAKERS", "VERSION", "Source", "held_out_sources", "items_for", "load_items"]
