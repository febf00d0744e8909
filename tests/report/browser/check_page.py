"""The page in a real browser: every control used, every width and theme looked at by axe.

Not part of `make test`; needs Node.js, Chromium and the packages of package.json:
    make browser-test
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hf_lowrank.report import write_report

HERE = Path(__file__).parent
METHODS = ("full_rank", "low_rank", "galore", "fira", "apollo", "relora", "cola", "sltrain")


def browse(page, shots=None):
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "Chromium must be installed, or named by the variable CHROMIUM"
    command = ["node", str(HERE / "check_page.mjs"), str(page), chromium, *([str(shots)] if shots else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TASKS = ("pylib_syntax", "pylib_cloze", "pylib_copy")


@pytest.mark.parametrize("shape", ["one seed", "two sizes", "a study", "fifty runs"])
def test_every_control_works_and_axe_finds_nothing_serious(make_run, make_study, tmp_path, shape):
    steps = (0, 50, 100, 150, 200)
    study = None
    if shape == "one seed":
        runs = [make_run(method, method, loss=3.3, steps=steps, tasks=TASKS) for method in METHODS[:3]]
    elif shape == "two sizes":
        runs = [
            make_run(f"{method}-{width}-{seed}", method, seed, width=width, loss=3.3 + 64 / width, tasks=TASKS)
            for method in METHODS[:3]
            for width in (128, 256)
            for seed in range(3)
        ]
    elif shape == "a study":
        study = make_study(tmp_path, METHODS)
        others = ("full_rank-seed0", "galore-seed0")
        runs = [
            make_run(f"runs/{m}-seed{seed}", m, seed, activations=True, barriers=others, tasks=TASKS)
            for m in METHODS
            for seed in range(5)
        ]
    else:
        steps = tuple(range(100, 1001, 100))
        runs = [
            make_run(f"run{i}", METHODS[i % 8], i // 8, steps=steps, blocks=8, activations=True, tasks=TASKS)
            for i in range(50)
        ]
    page = write_report(runs, tmp_path / "report", study=study)
    shots = None
    if os.environ.get("BROWSER_SHOTS"):
        shots = Path(os.environ["BROWSER_SHOTS"]) / shape.replace(" ", "-")
        shots.mkdir(parents=True, exist_ok=True)
    found = browse(page, shots)
    size = page.stat().st_size
    print(f"{shape}: {size / 1e6:.2f} MB, filter {found['filter_ms']} ms, axe {found['axe']}")
    assert found["faults"] == []
    assert found["requests"] == []
    assert found["overflow"] == []
    assert [fault for fault in found["axe"] if fault["impact"] in ("serious", "critical")] == []
    assert {name: result for name, result in found["controls"].items() if result is not True} == {}
    assert size < 10e6
    assert found["without_script"]
    assert max(found["filter_ms"]["least"]) < 200
