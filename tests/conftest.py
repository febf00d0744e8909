"""What every test runs under: no network, no progress bars, one thread a worker."""

import logging
import os
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

# tqdm's own lock is shared with forks: one that is killed while it holds it would stop all others for good.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="of tests/gpu; cpu tries them without")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_logging():
    """Removes the handlers that a test's command line adds: they write to its captured stream, closed by then."""
    logger = logging.getLogger("hf_lowrank")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def tiny_llama():
    """A Llama of two blocks, hidden 16, seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)
