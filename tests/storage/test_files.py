"""What writers say where a file cannot become as long as it must."""

import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from hf_lowrank.storage.files import refusal_of

CONTENT = {"moments": torch.zeros(1200), "support": torch.arange(300)}


@contextmanager
def longest_file(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["torch", "safetensors"])
def test_a_disk_that_is_full_at_any_byte_is_said_in_a_line(save, tmp_path):
    file = tmp_path / "file"
    save(CONTENT, file)
    size = file.stat().st_size
    for limit in [*range(0, size, 61), size - 1]:
        with pytest.raises(Exception) as failed, longest_file(limit):  # noqa: PT011  each writer has its own
            save(CONTENT, file)
        said = refusal_of(failed.value) or "nothing\n"
        assert "\n" not in said, f"at byte {limit}: {failed.value!r}"
