"""The device of these tests: a GPU, unless they are tried without one."""

import pytest
import torch


@pytest.fixture
def device(request):
    chosen = request.config.getoption("--device")
    assert chosen == "cpu" or torch.cuda.is_available(), "no GPU here; --device cpu tries the tests themselves"
    return torch.device(chosen)
