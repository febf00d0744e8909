"""Products of matrices by oneDNN and by torch's own kernel."""

import pytest
import torch

from hf_lowrank import compat
from hf_lowrank.optim import products
from hf_lowrank.optim.products import add_product_, product

ROWS, INNER, COLUMNS = 40, 30, 12


@pytest.fixture(params=["oneDNN", "torch"])
def kernel(request, monkeypatch):
    """Both kernels, for matrices of any size; the calls of oneDNN's are counted."""
    calls = []
    linear = compat.onednn_linear()
    if request.param == "oneDNN" and linear is None:
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(products, "LEAST", 0)
    counted = None if request.param == "torch" else lambda x, w: calls.append(1) or linear(x, w)
    monkeypatch.setattr(products, "onednn_linear", lambda: counted)
    yield request.param
    assert bool(calls) == (request.param == "oneDNN")


def matrices(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("left_stored", ["rows", "columns"])
@pytest.mark.parametrize("right_stored", ["rows", "columns"])
@pytest.mark.parametrize("count", [1, 3])
def test_products_are_those_of_float64(kernel, left_stored, right_stored, count):
    left, right = matrices((count, ROWS, INNER), (count, INNER, COLUMNS))
    exact = left.double() @ right.double()
    left = left.mT.contiguous().mT if left_stored == "columns" else left
    right = right.mT.contiguous().mT if right_stored == "columns" else right
    assert torch.allclose(products.products(left, right).double(), exact, rtol=0, atol=1e-5)
    assert torch.allclose(product(left[0], right[0]).double(), exact[0], rtol=0, atol=1e-5)
    out = torch.empty(ROWS, COLUMNS)
    product(left[0], right[0], out=out)
    assert torch.equal(out, product(left[0], right[0]))


@pytest.mark.parametrize("stored", ["rows", "columns"])
@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_a_product_is_added_in_place(kernel, stored, keep, monkeypatch):
    monkeypatch.setattr(products, "MOST_ADDED", 100)  # several parts
    matrix, left, right = matrices((ROWS, COLUMNS), (ROWS, INNER), (INNER, COLUMNS))
    exact = keep * matrix.double() - 0.5 * left.double() @ right.double()
    held = matrix.mT.contiguous() if stored == "columns" else matrix.clone()
    add_product_(held.mT if stored == "columns" else held, left, right, keep=keep, factor=-0.5)
    assert torch.allclose((held.mT if stored == "columns" else held).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_products_are_added_to_stacked_matrices(kernel, count):
    matrix, left, right = matrices((count, ROWS, COLUMNS), (count, ROWS, INNER), (count, INNER, COLUMNS))
    exact = 0.9 * matrix.double() - 0.5 * left.double() @ right.double()
    found = products.add_products(matrix, left, right, keep=0.9, factor=-0.5)
    assert torch.allclose(found.double(), exact, rtol=0, atol=1e-5)


def test_small_and_other_matrices_are_multiplied_by_torch(monkeypatch):
    monkeypatch.setattr(products, "onednn_linear", lambda: pytest.fail("asked for"))
    left, right = matrices((ROWS, INNER), (INNER, COLUMNS))
    assert torch.equal(product(left, right), left @ right)
    monkeypatch.setattr(products, "LEAST", 0)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(product(left.to(dtype), right.to(dtype)), left.to(dtype) @ right.to(dtype))
