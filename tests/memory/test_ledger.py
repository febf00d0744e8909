"""The ledger against sums by hand, on real tensors and on fake ones."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lowrank.memory.ledger import Ledger, StandIns


@pytest.mark.parametrize("fake", [False, True])
def test_storages_are_counted_once_until_they_are_freed(fake):
    with FakeTensorMode() if fake else nullcontext():
        ledger = Ledger()
        with ledger, ledger.phase("work") as peak:
            whole = torch.empty(1000)
            part = whole[10:20].view(2, 5)
            whole.add_(1)
            assert ledger.total == 4000
            other = part + 1
            assert ledger.total == 4040
            del whole
            assert ledger.total == 4040  # the view holds it
            del part
            gc.collect()
            assert ledger.total == 40
            double = torch.empty(10, dtype=torch.float64)
        assert (peak.total, peak.kinds) == (4040, {"work": 4040})
        assert ledger.claim([other, other.view(5, 2)], "kept") == 40
        assert (ledger.held("kept"), ledger.held("work")) == (40, 80)
        del other, double
        assert ledger.total == 0


def test_values_of_fake_tensors_have_stand_ins():
    with FakeTensorMode(), StandIns(), Ledger():
        assert torch.isfinite(torch.ones(2, 2)).tolist() == [[True, True], [True, True]]
        assert float(torch.zeros(()).sum()) == 1.0
        assert bool(torch.zeros(3).any())
        generator = torch.Generator().manual_seed(1)
        assert torch.randn(3, generator=generator).shape == (3,)
    assert torch.randn(3, generator=generator).equal(torch.randn(3, generator=torch.Generator().manual_seed(1)))
    with StandIns():
        assert torch.tensor([2.0, 3.0]).tolist() == [2.0, 3.0]
