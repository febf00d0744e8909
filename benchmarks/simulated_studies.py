"""Simulated runs with a known effect, to test `prediction`."""

from __future__ import annotations

import numpy as np
import torch

from hf_lowrank.downstream.prediction import Table
from hf_lowrank.downstream.ridge import Array


def simulated_table(
    seed: int, *, runs: int = 12, steps: int = 5, metrics: int = 16, effect: float = 0.0, noise: float = 0.3
) -> Table:
    """Runs whose scores follow log-perplexity and, with `effect`, the first two metrics beyond perplexity.

    Perplexity falls with the step and differs between runs. Every metric is partly determined by perplexity and has a
    component of its own that persists within a run; so has the score, and nothing explains it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Array:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).numpy()

    trend = np.linspace(1.0, -1.0, steps)[None, :]
    perplexity = trend + 0.5 * normal(runs, 1) + 0.1 * normal(runs, steps)
    loadings = 0.9 * np.cos(np.arange(metrics))  # the same in all simulations
    own = 0.8 * normal(runs, 1, metrics) + 0.4 * normal(runs, steps, metrics)
    geometry = perplexity[:, :, None] * loadings + own
    target = -perplexity + effect * (own[:, :, 0] - own[:, :, 1])
    target = target + noise * (0.7 * normal(runs, 1) + 0.7 * normal(runs, steps))
    names = [f"metric_{number}" for number in range(metrics)]
    return Table([f"run{r}" for r in range(runs)], list(range(steps)), names, perplexity, geometry, target)
