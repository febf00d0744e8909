"""The same quantities by other people's packages: PyHessian, WeightWatcher, loss-landscapes."""

import loss_landscapes
import loss_landscapes.metrics
import pytest
import torch
import weightwatcher
from pyhessian import hessian

from hf_lowrank import geometry


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)).eval()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(64, 12, generator=generator), torch.randint(0, 5, (64,), generator=generator)


def test_hessian_against_pyhessian(data):
    model, criterion = network(), torch.nn.CrossEntropyLoss()

    def terms(model):
        yield criterion(model(data[0]), data[1])

    torch.manual_seed(0)
    peer = hessian(model, criterion, data=data, cuda=False)
    top = peer.eigenvalues(maxIter=300, tol=1e-7)[0][0]
    ours, *_ = geometry.hessian_top_eigenvalue(model, terms, iterations=60, tolerance=1e-7)
    assert ours == pytest.approx(top, rel=1e-4)

    drawn = torch.tensor(peer.trace(maxIter=300, tol=0))
    trace = geometry.hessian_trace(model, terms, probes=300)
    error = float(drawn.std() / len(drawn) ** 0.5)
    # Two independent estimates of one number: within four standard errors of their difference.
    own_error = (trace.high - trace.low) / 2 / 1.96
    assert abs(float(drawn.mean()) - trace.value) < 4 * (error**2 + own_error**2) ** 0.5


@pytest.mark.parametrize("degrees", [2.5, 5.0])
def test_spectrum_against_weightwatcher(degrees):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(120, 160, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.distributions.StudentT(degrees).sample((160, 120)) * 0.05)
    details = weightwatcher.WeightWatcher(model=model).analyze()
    sigma = geometry.singular_values(model[0].weight.detach())
    assert geometry.stable_rank(sigma) == pytest.approx(float(details.stable_rank.iloc[0]), rel=1e-5)
    assert geometry.tail_exponent(sigma) == pytest.approx(float(details.alpha.iloc[0]), rel=1e-4)


def test_interpolation_against_loss_landscapes(data):
    criterion, steps = torch.nn.CrossEntropyLoss(), 10
    theirs = loss_landscapes.linear_interpolation(
        network(0), network(1), loss_landscapes.metrics.Loss(criterion, *data), steps
    )
    # Their grid begins one step after the start and holds the end.
    positions = [(i + 1) / steps for i in range(steps)]
    ours = geometry.interpolation_curve(
        network(0), network(1), lambda m: float(criterion(m(data[0]), data[1])), positions=positions
    )
    assert torch.allclose(torch.as_tensor(theirs).double(), ours.double(), atol=1e-6)
