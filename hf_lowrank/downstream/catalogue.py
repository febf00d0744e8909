"""Names in lm-eval: this package's model class and tasks, and the tasks that a name stands for."""

import fnmatch
import sys
import traceback
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError, nearest

MODEL_NAMES = ("hf-lowrank", "hf_lowrank")
MODEL_CLASS = "hf_lowrank.downstream.lm_eval_model:LowRankLM"
TASK_FOLDER = Path(__file__).parent / "tasks"
"""The folder of this package's tasks, for lm-eval's `--include_path`."""
TASK_FOLDERS = [TASK_FOLDER]
OFFLINE = ("pylib_cloze", "pylib_syntax", "pylib_copy", "pylib_bits_per_byte")
OWN_GROUPS = {"pylib": OFFLINE}
OWN = (*OFFLINE, "lowrank_random_sharpness", "lowrank_pca1_sharpness")


def register_models() -> None:
    """Registers the model class with lm-eval; may be called again.

    lm-eval after 0.4.13 finds it by the entry point `lm_eval.models`; 0.4.13 has no such discovery.
    """
    import lm_eval.models  # noqa: F401  (registers lm-eval's own models first)
    from lm_eval.api.registry import model_registry

    for name in MODEL_NAMES:
        if name not in model_registry:
            model_registry.register(name, target=MODEL_CLASS)


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
                near = nearest(name, index)
                if not near.startswith("did"):
                    near = "lm-eval ls tasks lists all; pylib and lowrank_paper are this package's"
                problems.append(f"unknown task {name!r}; {near}")
            for match in known:
                found.extend(_expanded(match, index))
    return list(dict.fromkeys(found)), problems


def _expanded(name: str, index: dict[str, Any]) -> list[str]:
    """The members of a tag or group, unless the group has a score of its own."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return [task for member in sorted(entry.tags) for task in _expanded(member, index)]
    members = (entry.cfg or {}).get("task")
    if entry.kind.name != "GROUP" or (entry.cfg or {}).get("aggregate_metric_list") or not isinstance(members, list):
        return [name]
    return [task for m in members if isinstance(m, str) and m in index for task in _expanded(m, index)]


def manager(*, own_only: bool, metadata: dict[str, Any] | None = None) -> Any:
    """lm-eval's task manager.

    Args:
        own_only: whether it knows this package's tasks only, or lm-eval's as well.
        metadata: passed to this package's tasks.
    """
    return _manager(include_defaults=False, metadata=metadata) if own_only else _all_tasks()


@cache
def _all_tasks() -> Any:
    """Cached, since reading lm-eval's thousands of files takes seconds."""
    return _manager(include_defaults=True)


def _manager(**options: Any) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(map(str, TASK_FOLDERS)), **options)


# The modules of lm-eval that check its arguments.
ARGUMENT_MODULES = ("lm_eval._cli", "lm_eval.config")


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Runs `lm-eval ARGUMENTS…`; every flag is lm-eval's. The model defaults to `hf-lowrank`.

    Raises:
        UserError: a checkpoint, tokenizer or task of this package is unusable.
        SystemExit: raised by lm-eval's parser.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import hf_lowrank.adapters  # noqa: F401  (registers adapted models, for `--model hf`)

    register_models()
    setup_logging()
    given, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        # The parser reads sys.argv itself, since `run` may be left out.
        parser = HarnessCLI()
        parsed = parser.parse_args()
    finally:
        sys.argv = given
    if hasattr(parsed, "include_path"):
        own = str(TASK_FOLDER)
        parsed.include_path = [own, parsed.include_path] if parsed.include_path else own
    if getattr(parsed, "command", None) == "run" and not parsed.model and not parsed.config:
        parsed.model = "hf-lowrank"
    try:
        parser.execute(parsed)
    except (ValueError, FileNotFoundError) as error:
        # Errors of its argument checks become one line; errors of what it runs keep their traceback.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, UserError) or not frame.f_globals.get("__name__", "").startswith(ARGUMENT_MODULES):
            raise
        raise UserError(str(error)) from None
