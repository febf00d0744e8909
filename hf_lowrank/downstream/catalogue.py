"""Names of tasks: which exist, which tasks a group stands for, and which need the network."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from hf_lowrank.downstream.lm_eval_registry import TASK_FOLDER
from hf_lowrank.errors import UserError, nearest

OFFLINE = ("pylib_cloze", "pylib_syntax", "pylib_copy", "pylib_bits_per_byte")
OWN_GROUPS = {"pylib": OFFLINE}
OWN = (*OFFLINE, "lowrank_random_sharpness", "lowrank_pca1_sharpness")


def wanted_tasks(tasks: str | Iterable[str] | None) -> list[str]:
    """The names in a list or a comma-separated string; None: the offline tasks."""
    if tasks is None:
        return list(OFFLINE)
    given = [tasks] if isinstance(tasks, str) else tasks
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("there must be at least one task, e.g. pylib or lowrank_paper")
    return list(dict.fromkeys(names))


def expand_tasks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the tasks, and groups with a score of their own, that the names stand for; a line for each unknown name)."""
    found: list[str] = []
    problems: list[str] = []
    for name in names:
        if name in OWN_GROUPS:
            found.extend(OWN_GROUPS[name])
        elif name in OWN:
            found.append(name)
        else:
            index = _all_tasks().task_index
            matches = [n for n in index if fnmatch.fnmatchcase(n, name)] if set(name) & set("*?[") else [name]
            known = [match for match in matches if match in index]
            if not known:
                problems.append(f"unknown task {name!r}; {_suggestion(name, index)}")
            for match in known:
                found.extend(_expanded(match, index))
    return list(dict.fromkeys(found)), problems


def _suggestion(name: str, index: dict[str, Any]) -> str:
    near = nearest(name, index)
    return near if near.startswith("did") else "lm-eval ls tasks lists all; pylib and lowrank_paper are this package's"


def _expanded(name: str, index: dict[str, Any]) -> list[str]:
    """The members of a tag or group, unless the group has a score of its own."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return [task for member in sorted(entry.tags) for task in _expanded(member, index)]
    members = (entry.cfg or {}).get("task")
    if entry.kind.name != "GROUP" or (entry.cfg or {}).get("aggregate_metric_list") or not isinstance(members, list):
        return [name]
    return [task for m in members if isinstance(m, str) and m in index for task in _expanded(m, index)]


@lru_cache(maxsize=1)
def _paths() -> tuple[str, ...]:
    return (str(TASK_FOLDER),)


def manager(*, own_only: bool, metadata: dict[str, Any] | None = None) -> Any:
    """lm-eval's task manager.

    Args:
        own_only: whether it knows this package's tasks only, or lm-eval's as well.
        metadata: passed to this package's tasks.
    """
    return _manager(include_defaults=False, metadata=metadata) if own_only else _all_tasks()


@lru_cache(maxsize=1)
def _all_tasks() -> Any:
    """Cached, since reading lm-eval's thousands of files takes seconds."""
    return _manager(include_defaults=True)


def _manager(**options: Any) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(_paths()), **options)
