"""Which runs repeat one another: the same method with the same settings and another seed.

Runs of one method with different settings (a sweep, two ranks) are not repetitions: each setting becomes a method
of its own, named by the study's member or by what differs. So does each run without a recipe, named by its folder;
folders `NAME-seed-1` and `NAME-seed-2` are two seeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from hf_lowrank.claims.results import Trial, read_sweep
from hf_lowrank.claims.study import in_order, titles
from hf_lowrank.methods import SPARE_LOOKS, Look, registered
from hf_lowrank.report.standings import BASELINE
from hf_lowrank.runs.records import RunRecord
from hf_lowrank.runs.run_files import SEEDED, UNKNOWN, method_by_name, section
from hf_lowrank.storage.parsing import parse_plain_yaml

# Settings that do not affect what is learnt.
_IRRELEVANT = re.compile(
    r"(method\.(name|seed|diagnostics)|training\.(seed|data_seed|output_dir|run_name|logging_.*|save_.*|eval_.*|report_to"
    r"|project|trackio_.*|hub_.*|push_to_hub|dataloader_.*|disable_tqdm|per_device_eval_batch_size|use_cpu|log_level.*))$"
)
_MOST_DIFFERENCES = 3


def member_of(run: RunRecord, study: Path | None) -> str | None:
    """The member of the study that `run` is a seed of; None for a run from elsewhere."""
    if study is None or run.path.resolve().parent != (study / "runs").resolve():
        return None
    found = SEEDED.match(run.path.resolve().name)
    return found[1] if found else None


def with_distinct_methods(runs: Sequence[RunRecord], study: Path | None = None) -> list[RunRecord]:
    """The runs, where those of one method and size with different settings get method names of their own."""
    kinds: dict[tuple[Any, ...], list[RunRecord]] = {}
    for run in runs:
        method = (member_of(run, study) or method_by_name(run.name)) if run.method == UNKNOWN else run.method
        kinds.setdefault((run.fingerprint, run.size, method), []).append(replace(run, method=method))
    renamed = {run.name: one for members in kinds.values() for run, one in _renamed(members, study)}
    titled = _titles(study)
    return [replace(renamed[run.name], method=titled.get(member_of(run, study), renamed[run.name].method))
            for run in runs]  # fmt: skip


def baseline_of(runs: Sequence[RunRecord], study: Path | None) -> str:
    """The method that the others are compared with: that of the study's baseline, else full-rank training."""
    wanted = _study_file(study).get("baseline")
    return next((run.method for run in runs if wanted is not None and member_of(run, study) == wanted), BASELINE)


def sweep_of(runs: Sequence[RunRecord], study: Path | None) -> tuple[Trial, ...]:
    """The trials of a study's sweep, with its members named as the methods of their runs."""
    trials = () if study is None else read_sweep(study)
    names = {member: run.method for run in runs if (member := member_of(run, study)) is not None}
    return tuple(replace(trial, member=names.get(trial.member, trial.member)) for trial in trials)


def _study_file(study: Path | None) -> Mapping[str, Any]:
    """What a study's file says; empty where there is none that can be read."""
    file = study / "study.yaml" if study is not None else None
    if file is None or not file.is_file():
        return {}
    try:
        said = parse_plain_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return said if isinstance(said, Mapping) else {}


def _titles(study: Path | None) -> dict[str | None, str]:
    """The titles that a study's file gives to its members."""
    members = _study_file(study).get("members")
    found = {name: section(members, name).get("title") for name in members} if isinstance(members, Mapping) else {}
    return {str(name): title for name, title in found.items() if isinstance(title, str)}


def _renamed(runs: Sequence[RunRecord], study: Path | None) -> Iterator[tuple[RunRecord, RunRecord]]:
    settings = [_settings(run) for run in runs]
    variants = [json.dumps(found, sort_keys=True, default=str) for found in settings]
    if len(set(variants)) == 1:
        yield from zip(runs, runs, strict=True)
        return
    keys = dict.fromkeys(key for found in settings for key in found)
    differing = [key for key in keys if len({_text(found.get(key)) for found in settings}) > 1][:_MOST_DIFFERENCES]
    (title,) = titles([runs[0].method]).values()
    names: dict[str, str] = {}
    for run, found, variant in zip(runs, settings, variants, strict=True):
        said = ", ".join(f"{key.partition('.')[2].replace('_', ' ')} {_text(found.get(key))}" for key in differing)
        name = member_of(run, study) or f"{title}, {said}"
        while names.setdefault(name, variant) != variant:
            name += "′"
        yield run, replace(run, method=name)


def _settings(run: RunRecord) -> dict[str, Any]:
    found = {
        f"{name}.{key}": value for name in ("method", "training") for key, value in section(run.recipe, name).items()
    }
    return {path: value for path, value in found.items() if not _IRRELEVANT.match(path)}


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


LIGHT_GROUND = "#fdfcf9"
DARK_GROUND = "#15171a"


@dataclass(frozen=True)
class TitledLook(Look):
    """A method's look with its title in tables and pictures."""

    title: str


def looks(methods: Iterable[str]) -> dict[str, TitledLook]:
    """The look of each of `methods`, in the order of legends and tables.

    Names that are not registered, such as the members of a study, take the spare looks in alphabetical order.
    """
    chosen, unknown = {}, 0
    for name in in_order(methods):
        entry = registered(name)
        look = entry.look if entry else SPARE_LOOKS[unknown % len(SPARE_LOOKS)]
        unknown += entry is None
        chosen[name] = TitledLook(**vars(look), title=entry.title if entry else name)
    return chosen
