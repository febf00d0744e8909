"""From run folders to the table of claims."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from hf_lowrank.claims.activations import activations
from hf_lowrank.claims.claim import Claim
from hf_lowrank.claims.landscape import barriers, pca1_sharpness, random_sharpness
from hf_lowrank.claims.order import downstream_order
from hf_lowrank.claims.predicted import prediction_claim
from hf_lowrank.claims.ranks import rank_structure
from hf_lowrank.claims.study import load_study


def examine(
    runs: Iterable[Any],
    *,
    baseline: str = "full_rank",
    prediction: str | os.PathLike[str] | None = None,
    alpha: float = 0.05,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int | None] | None = None,
) -> list[Claim]:
    """The seven claims of arXiv 2605.13652, each tested over the seeds of these runs.

    Reads `measurements.jsonl`, `downstream.jsonl` and the training log. Compares only numbers measured with
    equal settings on the same sequences, at the last step that all methods have (`study.common`), paired by seed.
    Missing data make a claim undecided, with the reason; a verdict needs at least three seeds.

    Args:
        runs: run folders, or anything with a `path` to one. A run without a seed is left out.
        baseline: the method that the others are compared with.
        prediction: `prediction.json` as `hf_lowrank.downstream.predict` writes it, or its folder; None, or one that
            is not there, leaves that claim undecided.
        alpha: of every test; intervals have confidence 1 − alpha.
        methods: a name per run, instead of its recipe's method: for studies with several members of one method.
        seeds: a seed per run, instead of its recipe's: for runs that came without a recipe.

    Raises:
        UserError: a folder is not a run or is damaged; two runs have the same method and seed, or were evaluated on
            different sequences (both are named); `prediction` is not valid.
    """
    study = load_study(runs, baseline=baseline, alpha=alpha, methods=methods, seeds=seeds)
    return [
        random_sharpness(study),
        pca1_sharpness(study),
        barriers(study),
        activations(study),
        downstream_order(study),
        prediction_claim(prediction, alpha=alpha),
        rank_structure(study),
    ]
