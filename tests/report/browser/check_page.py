"""The page in a real browser: every control used, every width and theme looked at by axe.

Not part of `make test`; needs Node.js, Chromium and the packages of package.json (`npm install` here):
    pytest tests/report/browser/check_page.py
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


@pytest.mark.parametrize("shape", ["one seed", "five seeds", "fifty runs"])
def test_every_control_works_and_axe_finds_nothing_serious(make_run, tmp_path, shape):
    steps = (0, 50, 100, 150, 200)
    if shape == "one seed":
        runs = [make_run(method, method, loss=3.3, steps=steps) for method in METHODS[:3]]
    elif shape == "five seeds":
        runs = [
            make_run(f"{method}-{seed}", method, seed, activations=True, barriers=("full_rank-0", "galore-0"))
            for method in METHODS
            for seed in range(5)
        ]
    else:
        steps = tuple(range(100, 1001, 100))
        runs = [
            make_run(f"run{i}", METHODS[i % 8], i // 8, steps=steps, blocks=8, activations=True) for i in range(50)
        ]
    page = write_report(runs, tmp_path / "report")
    shots = os.environ.get("BROWSER_SHOTS")
    found = browse(page, shots)
    size = page.stat().st_size
    print(f"{shape}: {size / 1e6:.2f} MB, filter {found['filter_ms']} ms")
    assert found["faults"] == []
    assert found["requests"] == []
    assert found["overflow"] == []
    assert [fault for fault in found["axe"] if fault["impact"] in ("serious", "critical")] == []
    assert {name: result for name, result in found["controls"].items() if result is not True} == {}
    assert size < 10e6
    assert max(found["filter_ms"]) < 200
