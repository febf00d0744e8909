"""Simulated studies with a known answer, to check how `prediction` behaves."""

from __future__ import annotations

import numpy as np
import torch

from hf_lowrank.downstream.prediction import Table
from hf_lowrank.downstream.ridge import Array


def simulated_table(
    seed: int,
    *,
    methods: int = 8,
    runs: int = 5,
    steps: int = 3,
    metrics: int = 16,
    between: float = 0.0,
    within: float = 0.0,
    noise: float = 0.3,
) -> Table:
    """A study of `methods` × `runs` × `steps` checkpoints whose scores follow log-perplexity and its square.

    Perplexity falls with the step and differs between methods and runs. Every metric follows perplexity in part, and
    has a fingerprint of the method, one of the run, and noise of its own. Scores have parts of the method and of the
    run that nothing explains.

    Args:
        between: what the first two metrics' fingerprints of the method add to the scores, beyond perplexity.
        within: the same for the fingerprints of the runs.
        noise: standard deviation of what nothing explains in the scores.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Array:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).numpy()

    trend = np.linspace(1.0, -1.0, steps)[None, None, :]
    perplexity = trend + 0.5 * normal(methods, 1, 1) + 0.15 * normal(methods, runs, 1)
    perplexity = perplexity + 0.1 * normal(methods, runs, steps)
    loadings = 0.9 * np.cos(np.arange(metrics))  # the same in every simulation, or each had a truth of its own
    of_method, of_run = 0.8 * normal(methods, 1, 1, metrics), 0.3 * normal(methods, runs, 1, metrics)
    geometry = perplexity[..., None] * loadings + of_method + of_run + 0.2 * normal(methods, runs, steps, metrics)
    score = 0.2 * perplexity**2 - perplexity
    score = score + between * (of_method[..., 0] - of_method[..., 1]) + within * (of_run[..., 0] - of_run[..., 1])
    score = score + noise * (0.7 * normal(methods, 1, 1) + 0.5 * normal(methods, runs, 1))
    score = score + noise * 0.3 * normal(methods, runs, steps)
    names = [f"method{m}" for m in range(methods)]
    count = methods * runs
    return Table(
        methods=names,
        runs=[f"{name}-seed{run}" for name in names for run in range(runs)],
        metrics=[f"metric_{number}" for number in range(metrics)],
        method_R=np.repeat(np.arange(methods), runs),
        run_N=np.repeat(np.arange(count), steps),
        step_N=np.tile(np.arange(steps), count),
        log_perplexity_N=perplexity.reshape(-1),
        geometry_NP=geometry.reshape(-1, metrics),
        target_N=score.reshape(-1),
    )
