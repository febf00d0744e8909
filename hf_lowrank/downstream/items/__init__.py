"""Tasks without a network: items made from a run's own held-out text by seeded generators."""

from hf_lowrank.downstream.items.build import MAKERS, VERSION, items_for, load_items
from hf_lowrank.downstream.items.held_out import Source, held_out_sources

__all__ = ["MAKERS", "VERSION", "Source", "held_out_sources", "items_for", "load_items"]
