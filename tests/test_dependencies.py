"""What the package stands on: pinned, in agreement with itself, without a compiler, and under which licences."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = canonicalize_name(PROJECT["name"])
# What `python -m venv` brings itself.
VENV = {"pip", "wheel"}
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|PSFL|HPND|Zlib|Python Software Foundation|Unlicense)\b",
    re.IGNORECASE,
)
RESTRICTED = re.compile(r"\b[AL]?GPL|\bMPL|Mozilla|General Public|EUPL|CC-BY-NC|NonCommercial", re.IGNORECASE)
# Changes to these libraries themselves must stay open; using them asks nothing of whoever does.
FILE_COPYLEFT = {"certifi": "MPL-2.0", "tqdm": "MPL-2.0 AND MIT", "chardet": "LGPL-2.1-or-later"}
# Their metadata says no more than that.
KNOWN = {"python-dateutil": "Apache-2.0 OR BSD-3-Clause", "kiwisolver": "BSD-3-Clause", "matplotlib": "PSF-2.0"}
# On the package index these have no wheel; lm-eval asks for them. pip makes theirs without a compiler.
WITHOUT_WHEEL = {"rouge-score", "sqlitedict", "word2number"}


@cache
def installed():
    """The distributions of this environment by name, without this package and what every environment has."""
    found = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
    return {name: each for name, each in found.items() if name not in VENV | {OURS}}


def pins():
    """(pins, pins of witnesses) of constraints.txt by name."""
    parts = (ROOT / "constraints.txt").read_text().split("# witnesses", 1)
    found = []
    for part in parts:
        lines = [line.strip() for line in part.splitlines() if "==" in line and not line.startswith("#")]
        requirements = [Requirement(line) for line in lines]
        assert all([each.operator for each in requirement.specifier] == ["=="] for requirement in requirements)
        found.append(
            {canonicalize_name(each.name): Version(next(iter(each.specifier)).version) for each in requirements}
        )
    return found


def version_of(name):
    return Version(Version(installed()[name].version).public)


def applying(requirements, extras=()):
    """Those requirements whose markers hold here, of the plain package or with one of `extras`."""
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def faults_of(requirements, extras=()):
    """The requirements that this environment does not satisfy, as text."""
    return [
        str(requirement)
        for requirement in applying(requirements, extras)
        if canonicalize_name(requirement.name) not in installed()
        or not requirement.specifier.contains(version_of(canonicalize_name(requirement.name)), prereleases=True)
    ]


def runtime():
    """All that `pip install hf-lowrank` brings, with the extras that are asked for of each."""
    found, waiting = {}, [(each, frozenset(each.extras)) for each in applying(PROJECT["dependencies"])]
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found and extras <= found[name]:
            continue
        found[name] = found.get(name, frozenset()) | extras
        for inner in applying(installed()[name].requires or (), found[name]):
            waiting.append((inner, frozenset(inner.extras)))
    return found


def test_the_environment_is_the_pinned_one():
    plain, witnesses = pins()
    expected = {**plain, **witnesses}
    assert {name: version_of(name) for name in installed()} == expected


def test_what_is_installed_agrees():
    """As `pip check`; witnesses are installed without what they ask for."""
    witnesses = pins()[1]
    faults = {
        name: faults
        for name, each in installed().items()
        if name not in witnesses and (faults := faults_of(each.requires or ()))
    }
    assert not faults


def test_a_requirement_that_is_not_satisfied_is_found():
    assert faults_of(["torch<2"]) == ["torch<2"]
    assert faults_of(["bitsandbytes"]) == ["bitsandbytes"]
    assert not faults_of(["bitsandbytes; extra == 'x'", "torch; python_version < '3'"])


def test_bounds_and_pins_agree():
    everything = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    plain, witnesses = pins()
    for line in everything:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name != OURS:
            assert requirement.specifier.contains({**plain, **witnesses}[name]), line
    assert all(Requirement(line).specifier for line in PROJECT["dependencies"]), "a dependency without a lower bound"


def imported():
    """The distributions that files of the package import, anywhere in them, with one such file each."""
    # The app of a Hugging Face Space, which brings gradio itself.
    files = set((ROOT / "hf_lowrank").rglob("*.py")) - {ROOT / "hf_lowrank/evaluate_modules/lowrank_geometry/app.py"}
    owners, found = packages_distributions(), {}
    for file in sorted(files):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in (
                {module.partition(".")[0] for module in modules}
                - sys.stdlib_module_names
                - {"hf_lowrank", "_typeshed"}
            ):
                for owner in owners.get(top, [top]):
                    found.setdefault(canonicalize_name(owner), file.relative_to(ROOT).as_posix())
    return found


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    extras = PROJECT["optional-dependencies"]
    needed = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    optional = {canonicalize_name(Requirement(line).name) for line in [*extras["8bit"], *extras["ray"]]}
    assert {name: file for name, file in imported().items() if name not in needed | optional} == {}
    assert needed | optional <= set(imported()), "declared, but no file imports it"


def test_every_dependency_of_the_package_is_pinned():
    assert set(runtime()) <= set(pins()[0])


def test_nothing_asks_for_a_compiler():
    for name in runtime():
        wheel = installed()[name].read_text("WHEEL")
        assert wheel, f"{name} was not installed from a wheel"
        tags = re.findall(r"^Tag: \S+-(\S+)$", wheel, re.MULTILINE)
        # A wheel that pip compiled here would say linux_x86_64 and the like, and not say which systems it fits.
        assert tags
        assert all(tag == "any" or tag.startswith(("manylinux", "musllinux", "macosx", "win")) for tag in tags), name
        assert name not in WITHOUT_WHEEL or tags == ["any"], name
    assert "bitsandbytes" not in installed()


def licence_of(name):
    """What the metadata say, the shortest that says something."""
    metadata = installed()[name].metadata
    trove = [
        line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or () if line.startswith("License ::")
    ]
    said = metadata.get("License-Expression") or "; ".join(trove) or metadata.get("License") or ""
    return KNOWN.get(name, said)


def test_licences_are_permissive():
    for name in runtime():
        licence = licence_of(name)
        if name in FILE_COPYLEFT:
            assert licence.startswith(FILE_COPYLEFT[name].split()[0]) or RESTRICTED.search(licence), (name, licence)
            continue
        assert PERMISSIVE.search(licence), (name, licence[:200])
        assert not RESTRICTED.search(licence), (name, licence[:200])


@pytest.mark.parametrize(
    "licence", ["GPL-3.0-only", "LGPLv3", "AGPL-3.0", "CC-BY-NC-4.0", "Mozilla Public License 2.0"]
)
def test_what_is_not_permissive_is_found(licence):
    assert RESTRICTED.search(licence)
    assert not PERMISSIVE.search(licence)


def test_the_libraries_that_quantise_lie_outside_the_environment():
    """Without them their tests would be skipped."""
    wanted = dict(re.findall(r"([\w-]+)==([\w.]+)", re.search(r"^QUANTIZERS := (.*)$", MAKEFILE, re.MULTILINE)[1]))
    found = distributions(path=[str(Path(sys.prefix) / "quantizers")])
    assert {canonicalize_name(each.metadata["Name"]): each.version for each in found} == wanted
    assert not wanted.keys() & installed().keys()
