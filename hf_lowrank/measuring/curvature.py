"""Extras that need derivatives: the Hessian's top eigenvalue and trace, and the critical sharpness."""

from __future__ import annotations

from hf_lowrank.geometry import critical_sharpness, gradient, hessian_top_eigenvalue, hessian_trace
from hf_lowrank.measuring.context import StepContext
from hf_lowrank.measuring.rows import Row


def hessian_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Top eigenvalue (the interval is the residual of Lanczos) and trace, over all parameters."""
    at.run.placement.require_whole_models("the Hessian")
    chosen = at.settings.hessian
    settings = at.run.settings_of("hessian")
    model = at.model.requires_grad_(True)
    rows = []
    if "hessian_top" in wanted:
        top, error = hessian_top_eigenvalue(
            model, at.run.loss.terms, iterations=chosen.iterations, seed=chosen.seed, progress=at.run.tick
        )
        rows.append(Row(metric="hessian_top", value=top, ci_low=top - error, ci_high=top + error, settings=settings))
    if "hessian_trace" in wanted:
        trace = hessian_trace(
            model,
            at.run.loss.terms,
            probes=chosen.probes,
            seed=chosen.seed,
            progress=at.run.tick,
            replicas=at.run.placement.replicas,
        )
        rows.append(Row.of("hessian_trace", trace, settings=settings))
    return rows


def critical_rows(at: StepContext, wanted: set[str]) -> list[Row]:
    """Critical sharpness along the gradient on the held-out sequences."""
    at.run.placement.require_whole_models("the gradient")
    model = at.model.requires_grad_(True)
    direction = gradient(model, at.run.loss.terms)
    value = critical_sharpness(
        model, at.run.loss, direction, center=at.center, memory=at.settings.memory, progress=at.run.tick
    )
    settings = {"direction": "gradient", **at.run.evaluated_on}
    return [Row(metric="critical_sharpness", value=value, settings=settings)]
