"""A loopback Hub for each test, with huggingface_hub's client pointed at it, and runs to push."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub.runs import make_run
from tests.hub.server import TOKEN, LoopbackHub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; the client of this process and of its children talks to it, logged in as `user`."""
    with LoopbackHub(tmp_path / "hub-server") as running:
        environment = {
            "HF_ENDPOINT": running.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf-home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_XET_TELEMETRY_ENABLED": "0",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for module, name, value in (
            (constants, "ENDPOINT", running.url),
            (constants, "HF_HUB_OFFLINE", False),
            (constants, "HF_HUB_DISABLE_XET", True),
            (constants, "HF_HUB_CACHE", str(tmp_path / "hf-home" / "hub")),
            (constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"),
            (huggingface_hub.hf_api.api, "endpoint", running.url),
        ):
            monkeypatch.setattr(module, name, value)
        huggingface_hub.utils.disable_progress_bars()
        huggingface_hub.utils._http.close_session()
        yield running
        huggingface_hub.utils._http.close_session()


@pytest.fixture
def quick_client(monkeypatch):
    """huggingface_hub's own pauses between its tries take no time."""
    quick = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", quick)


@pytest.fixture(scope="session")
def made_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "tiny-run")


@pytest.fixture
def run(made_run, tmp_path) -> Path:
    """A run directory of three checkpoints that a test may change."""
    folder = tmp_path / "tiny-run"
    shutil.copytree(made_run, folder, copy_function=os.link)
    return folder
