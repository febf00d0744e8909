"""Which room of the package may import which, and that no two files import each other in a circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_lowrank

ROOT = Path(hf_lowrank.__file__).parent
GROUND = {"errors", "formats", "targets", "methods", "metrics", "statistics", "compat"}
TOP = {"cli", "__init__", "__main__"}
BELOW = ["storage", "optim", "adapters", "runs", "processes"]
# The rooms that each room may import. Every room but geometry may also import the ground.
ALLOWED = {
    "geometry": [],
    "storage": [],
    "optim": ["storage"],
    "adapters": ["storage"],
    "runs": ["storage", "optim", "adapters"],
    "processes": ["storage", "runs", "geometry"],
    "training": BELOW,
    "measuring": [*BELOW, "geometry"],
    # Tasks are made of the held-out text of a run's corpus, as training reads it.
    "downstream": [*BELOW, "geometry", "training"],
    "memory": [*BELOW, "training"],
    "evaluate_modules": ["measuring"],
    "claims": ["storage", "runs"],
    "report": ["storage", "runs", "claims"],
    "hub": ["storage", "runs", "adapters", "claims", "report"],
    "study": [*BELOW, "training", "memory", "measuring", "downstream", "claims", "report", "hub"],
}
FEW_GROUNDS = {"geometry": {"errors", "statistics"}} | {key: {"errors"} for key in ("errors", "metrics", "statistics")}


def package_modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = package_modules()


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """The package's own modules that a file imports: all of them, or those that are imported when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else _executed_at_load(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT.parent).parts[: -node.level]
            names = [".".join([*package, node.module or "", alias.name]).replace("..", ".") for alias in node.names]
        found |= {_module(name.split(".")[1:]) for name in names if name.split(".", 1)[0] == "hf_lowrank"}
    return found - {""}


def _module(parts: list[str]) -> str:
    """The longest beginning of a dotted name that is a module."""
    while parts and ".".join(parts) not in MODULES:
        parts = parts[:-1]
    return ".".join(parts)


def _executed_at_load(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements outside of functions and of `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef | ast.ExceptHandler):
            waiting += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)
            ]


def room_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


@pytest.mark.parametrize("room", [*ALLOWED, *sorted(GROUND)])
def test_imports_run_downwards(room):
    ground = FEW_GROUNDS.get(room, GROUND)
    allowed = {room, *ground, *ALLOWED.get(room, [])}
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if room_of(module) == room
        for other in sorted(imports(path, everywhere=True))
        if room_of(other) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_rule():
    assert {room_of(module) for module in MODULES} == set(ALLOWED) | GROUND | TOP


@pytest.mark.parametrize("everywhere", [False, True], ids=["at load", "anywhere"])
def test_no_two_files_import_each_other_in_a_circle(everywhere):
    graph = {module: imports(path, everywhere=everywhere) - {module} for module, path in MODULES.items()}
    if everywhere:  # a package's public names are in its own files, which import only one another
        packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
        graph = {
            module: {other for other in found if other not in packages or room_of(other) != room_of(module)}
            for module, found in graph.items()
        }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these files import each other: {' -> '.join(error.args[1])}")


def test_the_package_has_few_entries():
    entries = [path.name for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 26, sorted(entries)


def test_the_rules_can_fail(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from hf_lowrank.report import page\n"
        "import hf_lowrank.study.plan\n"
        "def later():\n"
        "    from hf_lowrank.hub.push import push\n"
    )
    assert {room_of(found) for found in imports(file, everywhere=True)} == {"report", "study", "hub"}
    assert {room_of(found) for found in imports(file, everywhere=False)} == {"report", "study"}
