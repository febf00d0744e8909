"""What the packages hold and say, built from this checkout without the network."""

import json
import re
import subprocess
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from hatchling.build import build_sdist, build_wheel

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def tracked():
    """What git keeps, or would with the next commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout")
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return zipfile.ZipFile(folder / build_wheel(str(folder)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return tarfile.open(folder / build_sdist(str(folder)))


def test_the_wheel_holds_the_package_and_nothing_else(wheel, tracked):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == {name for name in tracked if name.startswith("hf_lowrank/")}
    assert {"hf_lowrank/py.typed", "hf_lowrank/hub/templates/model_card.md.j2"} <= inside
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "hf-lowrank = hf_lowrank.cli:main" in wheel.read(entry).decode()


def test_the_source_distribution_holds_what_the_tests_and_documents_need(source, tracked):
    top = f"hf_lowrank-{PROJECT['version']}/"
    inside = {member.name.removeprefix(top) for member in source.getmembers() if member.isfile()}
    # Of git's files only those about git, reviews and servers stay out.
    left_out = {name for name in tracked if name.startswith((".ci/", ".github/", ".pre-commit"))}
    assert inside - {"PKG-INFO"} == tracked - left_out


def test_what_the_metadata_say(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Author"] == "the hf_lowrank authors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Project-URL")
    pythons = [each.rpartition(" ")[2] for each in metadata.get_all("Classifier") if " :: 3." in each]
    assert metadata["Requires-Python"] == f">={pythons[0]}"


def test_the_workflow_tests_every_version_of_python(tracked):
    """In a checkout: a source distribution has no workflows."""
    assert ".github/workflows/ci.yml" in tracked
    pythons = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if " :: 3." in each]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert pythons == workflow["jobs"]["versions"]["strategy"]["matrix"]["python"]


def test_hooks_before_a_commit_run_what_the_makefile_installs(tracked):
    assert ".pre-commit-config.yaml" in tracked
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin").replace("$(VENV)", ".venv")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    programs = {hook["entry"].split()[0] for hook in hooks}
    assert {program for program in programs if program not in makefile} == {"node_modules/.bin/prettier"}
    assert "prettier" in json.loads((ROOT / "package.json").read_text())["devDependencies"]


def test_one_version_everywhere():
    version = PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading[1] == version


def test_the_oldest_versions_are_the_lower_bounds():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    bounds = dict(
        re.fullmatch(r"([\w.-]+)>=([\w.]+)", line).groups()
        for line in [*PROJECT["dependencies"], *extras["test"], *extras["8bit"], *extras["ray"]]
        if not line.startswith("hf-lowrank")
    )
    assert bounds.keys() <= pins.keys()
    for name, bound in bounds.items():
        # 0.22 is 0.22.0: a pin names the whole version.
        assert pins[name] == bound or pins[name].removesuffix(".0") == bound, name


def test_every_source_of_a_method_is_cited():
    from hf_lowrank.methods import METHODS

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    cited = {identifier["value"] for reference in citation["references"] for identifier in reference["identifiers"]}
    sources = {number for method in METHODS.values() for number in re.findall(r"arXiv (\d{4}\.\d{5})", method.source)}
    assert sources
    assert {f"arXiv:{number}" for number in sources | {"2605.13652"}} <= cited
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year", "url"} <= reference.keys()
        assert reference["url"].endswith(reference["identifiers"][0]["value"].removeprefix("arXiv:"))
