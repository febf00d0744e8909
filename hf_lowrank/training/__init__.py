"""Recipes, corpora, and pre-training into run directories."""

from hf_lowrank.training.pretrain import pretrain
from hf_lowrank.training.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe", "pretrain"]
