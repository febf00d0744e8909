"""Activations drift from full-rank's more in later layers, and more as training goes on; GaLore stays closest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from hf_lowrank.claims.claim import Claim, Detail
from hf_lowrank.claims.study import Common, Study, common, kind_of, null_reasons, paired_differences
from hf_lowrank.claims.verdicts import every_above, on_average, paired_test, pooled_by_seed, slope
from hf_lowrank.claims.words import (
    Part,
    claim_of_parts,
    detail,
    interval,
    listed,
    listed_are,
    seeds_and_step,
    too_few_seeds,
    undecided_reason,
    untested,
)
from hf_lowrank.formats import p_text, pluralize, significant
from hf_lowrank.runs.records import RunRecord
from hf_lowrank.statistics import SEEDS_FOR_A_VERDICT

# The distance, and its substitutes if it was not measured: (metric, distance from its value, name).
DISTANCES: tuple[tuple[str, Callable[[float], float], str], ...] = (
    ("activation_l2", lambda value: value, "relative distance"),
    ("activation_cka", lambda value: 1.0 - value, "1 − CKA"),
    ("activation_cosine", lambda value: 1.0 - value, "1 − cosine"),
)
LAYERS, STEPS, CLOSEST = "over layers", "over training", "GaLore closest"
CLOSE_METHOD = "galore"
TEST = (
    "Distance of hidden states from the baseline's ({name}). Over layers: each run's least-squares slope over depth "
    "(0 at the embedding, 1 at the last layer) at the last common step. Over training: each run's slope of the "
    "model's distance over steps (1 is the whole training), without step 0, where equal weights are equal by "
    "construction. Both are averaged over methods within each seed and tested by Student's t over seeds: reproduced "
    "above zero with two-sided p < {alpha:g} and no method significantly (Holm) below, contradicted below zero. "
    "GaLore closest: each other method's distance minus GaLore's, paired by seed; reproduced if all lie above zero "
    "(intersection–union), contradicted if one lies below (Holm). The claim is reproduced if all three parts are, "
    "contradicted if one is."
)
_LAYER = re.compile(r"hidden_states\.(\d+)$")

Layers = tuple[float, ...]


def activations(study: Study) -> Claim:
    """Three parts, each with a verdict among the details; the claim itself has no one effect."""
    statement = (
        f"Activations drift from {study.title(study.baseline)}'s more in later layers and more as training goes on; "
        "GaLore stays closest."
    )
    # The first distance that any run other than the baseline's has.
    measured = {row.metric for (m, _), run in study.runs.items() if m != study.baseline for row in run.rows}
    metric, distance, name = next((entry for entry in DISTANCES if entry[0] in measured), DISTANCES[0])
    about = {"id": "activations", "statement": statement, "test": TEST.format(name=name, alpha=study.alpha)}
    if why_not := study.no_baseline:
        return untested(why_not, **about)
    profiles = common(
        _entries(study, metric, distance),
        study.others,
        {**null_reasons(study, metric), **_other_baselines(study, metric)},
    )
    parts = [
        _over_layers(study, profiles),
        _over_training(study, profiles, metric, distance),
        _closest(study, profiles),
    ]
    missing = "".join(f"; {study.title(method)}: {why}" for method, why in profiles.missing.items())
    return claim_of_parts(
        parts, missing if profiles.values else "", **about, unit=name,
        n=min((len(values) for values in profiles.values.values()), default=0),
    )  # fmt: skip


def _other_baselines(study: Study, metric: str) -> dict[str, str]:
    """Of methods that were compared with runs that are not the baseline's: with which."""
    return {
        method: f"measured against {row.baseline}, which is not a run of the baseline here"
        for (method, _), run in study.runs.items()
        for row in run.model_rows(metric)
        if row.has_value and row.baseline not in study.baseline_names
    }


def _of_run(
    study: Study, run: RunRecord, metric: str, distance: Callable[[float], float]
) -> Iterable[tuple[int, str, float, Layers]]:
    """(step, settings, the model's distance, each layer's) of one run, against runs of the baseline only."""
    layers: dict[tuple[int, str], dict[int, float]] = {}
    whole: dict[tuple[int, str], float] = {}
    for row in run.rows:
        if row.metric != metric or not row.has_value or row.baseline not in study.baseline_names:
            continue
        key = (row.step, kind_of(row.settings))
        if match := _LAYER.fullmatch(row.scope):
            layers.setdefault(key, {})[int(match[1])] = distance(row.value)
        elif row.scope == "model":
            whole[key] = distance(row.value)
    for (step, kind), value in whole.items():
        by_layer = layers.get((step, kind), {})
        gapless = sorted(by_layer) == list(range(len(by_layer)))
        yield step, kind, value, tuple(by_layer[i] for i in sorted(by_layer)) if gapless else ()


Profile = tuple[float, Layers]


def _entries(
    study: Study, metric: str, distance: Callable[[float], float]
) -> Iterable[tuple[str, int, int, str, Profile]]:
    for (method, seed), run in study.runs.items():
        if method != study.baseline:
            for step, kind, value, layers in _of_run(study, run, metric, distance):
                yield method, seed, step, kind, (value, layers)


Course = tuple[Sequence[float], Sequence[float]]  # positions and the distance at each


def _trend(
    study: Study,
    part: str,
    courses: Mapping[str, Mapping[int, Course]],
    labels: Sequence[str],
    missing_what: str,
    step: int,
) -> Part:
    """Whether distances grow, on the mean over methods of each seed's slopes; with the mean distance at each label.

    The mean distances are not tested, since a distance is above zero anyway.
    """
    slopes = {method: {seed: slope(x, y) for seed, (x, y) in seeds.items()} for method, seeds in courses.items()}
    decision, pooled = on_average(slopes, alpha=study.alpha)
    missing = {} if slopes else {study.titles[method]: f"no {missing_what}" for method in study.others}
    reason = f"{part}: " + (undecided_reason(decision, missing, study) if missing else "")
    if pooled is None:
        reason += "" if missing else "no seed that all methods have"
        return _untested_part(part, reason, f"{part.capitalize()}: not tested.")
    against = listed([study.title(method) for method in decision.against])
    if decision.verdict == "contradicted":
        reason += "the distance falls"
    elif decision.verdict == "reproduced":
        reason += "the distance grows"
    elif pooled.n < SEEDS_FOR_A_VERDICT:
        reason += too_few_seeds(pooled.n)
    elif decision.against:
        reason += f"it grows on average, but falls for {against}"
    else:
        reason += "the interval of the mean over methods includes zero"
    head = replace(detail(part, pooled, "", part=part, reason=reason), verdict=decision.verdict)
    rest = [detail(f"{study.title(m)}, {part}", t, "", part=part) for m, t in decision.tested.items()]
    for position, label in enumerate(labels):
        at = pooled_by_seed({m: {s: y[position] for s, (_, y) in seeds.items()} for m, seeds in courses.items()})
        mean = paired_test(list(at.values()), confidence=study.confidence)
        rest.append(Detail(label=f"mean distance at {label}", **mean.estimate, n=mean.n, part=part))
    growing = sum(test.effect > 0 for test in decision.tested.values())
    sentence = (
        f"{part.capitalize()} the distance changes by {interval(pooled, significant, study.confidence)} on average, "
        f"{p_text(pooled.p_value)}, upwards for {growing} of {len(slopes)} methods; {seeds_and_step(pooled.n, step)}."
    )
    return Part(head, rest, sentence)


def _untested_part(part: str, reason: str, sentence: str) -> Part:
    return Part(Detail(label=part, part=part, verdict="undecided", reason=reason), [], sentence)


def _over_layers(study: Study, profiles: Common[str, Profile]) -> Part:
    chosen: dict[str, dict[int, Course]] = {}
    for method, values in profiles.values.items():
        for seed, (_, layers) in values.items():
            if len(layers) > 1:
                depths = [i / (len(layers) - 1) for i in range(len(layers))]
                chosen.setdefault(method, {})[seed] = depths, layers
    depth = min((len(y) for values in chosen.values() for _, y in values.values()), default=0)
    labels = [f"hidden_states.{layer}" for layer in range(depth)]
    return _trend(study, LAYERS, chosen, labels, "distances of layers", profiles.step)


def _over_training(
    study: Study, profiles: Common[str, Profile], metric: str, distance: Callable[[float], float]
) -> Part:
    by_step: dict[tuple[str, int], dict[int, float]] = {
        (method, seed): {
            step: value
            for step, kind, value, _ in _of_run(study, study.runs[method, seed], metric, distance)
            if kind == profiles.kind and 0 < step <= profiles.step
        }
        for method, values in profiles.values.items()
        for seed in values
    }
    steps = sorted(set.intersection(*map(set, by_step.values()))) if by_step else []
    courses: dict[str, dict[int, Course]] = {}
    if len(steps) > 1:
        for (method, seed), course in by_step.items():
            courses.setdefault(method, {})[seed] = [s / profiles.step for s in steps], [course[s] for s in steps]
    what = f"two steps after 0 that all runs have ({pluralize(len(steps), 'step')})"
    labels = [f"step {step}" for step in steps] if courses else []
    return _trend(study, STEPS, courses, labels, what, profiles.step)


def _close_method(study: Study) -> str | None:
    """The method that is GaLore: by its own name, else the one that its recipe calls so."""
    if CLOSE_METHOD in study.others:
        return CLOSE_METHOD
    called = {method for (method, _), run in study.runs.items() if run.method == CLOSE_METHOD}
    return called.pop() if len(called) == 1 else None


def _closest(study: Study, profiles: Common[str, Profile]) -> Part:
    close = _close_method(study)
    values = {method: {seed: value for seed, (value, _) in seeds.items()} for method, seeds in profiles.values.items()}
    if close is None or close not in values:
        why = "GaLore is not among the methods" if close is None else f"GaLore: {profiles.missing.get(close)}"
        return _untested_part(CLOSEST, f"{CLOSEST}: {why}", f"{CLOSEST}: not tested, {why}.")
    rivals = [method for method in values if method != close]
    decision = every_above(
        {method: list(paired_differences(values[close], values[method]).values()) for method in rivals},
        alpha=study.alpha,
    )
    missing = {m: profiles.missing.get(m, "no seed in common with GaLore") for m in study.others if m != close}
    missing = {method: why for method, why in missing.items() if method not in decision.tested}
    verdict = decision.despite(missing)
    if not rivals and not missing:
        reason = "no method other than GaLore"
    elif verdict == "contradicted":
        reason = f"{listed_are([study.title(m) for m in decision.against])} closer than GaLore"
    elif verdict == "reproduced":
        reason = f"all {len(rivals)} others are further away than GaLore"
    else:
        reason = undecided_reason(decision, missing, study)
    rest = [detail(f"{study.title(m)} minus GaLore", t, "", part=CLOSEST) for m, t in decision.tested.items()]
    if decision.decisive is None or decision.deciding is None:
        return _untested_part(CLOSEST, f"{CLOSEST}: {reason}", f"{CLOSEST}: not tested, {reason}.")
    shown = detail(CLOSEST, decision.decisive, "", part=CLOSEST, reason=f"{CLOSEST}: {reason}")
    head = replace(shown, verdict=verdict, p_value=decision.p_value)
    means = {method: fmean(v.values()) for method, v in values.items()}
    nearest = min(means, key=means.__getitem__)
    difference = interval(decision.decisive, significant, study.confidence)
    sentence = (
        f"{study.title(nearest)} has the smallest mean distance, {significant(means[nearest])}; "
        f"{study.title(decision.deciding)} minus GaLore is {difference}, "
        f"{pluralize(decision.fewest_seeds, 'seed')}."
    )
    return Part(head, rest, sentence)
