"""Exact products: whole numbers on every path, the same bits everywhere."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coar.regression import products
from coar.regression.products import FixedPoint, add_counts, add_products, fixed_point, mirror

FLOATS = st.floats(-1e30, 1e30, allow_nan=False)


def random_masks(rows, components, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((rows, components)) < 0.9).to(torch.int8)


def counts_of(masks):
    gram = torch.zeros(masks.shape[1], masks.shape[1], dtype=torch.int32)
    add_counts(masks, gram)
    mirror(gram)
    return gram


def product_of(masks, numbers):
    cross = torch.zeros(masks.shape[1], numbers.whole.shape[1], dtype=torch.float64)
    add_products(masks, numbers, cross)
    return cross


@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=20))
def test_rounding_is_that_of_24_bits_of_the_largest_value(values):
    values = torch.tensor(values, dtype=torch.float64)
    found = fixed_point(values)
    error = (found.whole * found.scale - values).abs()
    assert (error <= values.abs().amax(dim=0).clamp_min(1e-270) * 2.0**-23).all()
    assert found.whole.abs().max() < 2**23


@given(st.lists(st.integers(-int(0.99 * 2**23), int(0.99 * 2**23)), min_size=1, max_size=30))
def test_three_signed_bytes_are_the_number(numbers):
    whole = torch.tensor(numbers, dtype=torch.int32)[:, None]
    low, middle, high = FixedPoint(whole, torch.ones(1)).digits().long().chunk(3, dim=1)
    assert torch.equal(high * 65536 + middle * 256 + low, whole.long())


@pytest.mark.parametrize("components", [1, 7, 512, 513, 1100])
def test_counts_are_those_of_whole_numbers(components):
    masks = random_masks(100, components)
    assert torch.equal(counts_of(masks).long(), masks.long().T @ masks.long())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 99),
    st.sampled_from([1, 1e-20, 1e20]),
)
def test_products_are_those_of_the_whole_numbers(rows, components, columns, seed, size):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * size
    masks, numbers = random_masks(rows, components, seed), fixed_point(values)
    exact = masks.long().T @ numbers.whole.long()
    assert torch.equal(product_of(masks, numbers), exact.double() * numbers.scale)
    whole = numbers.whole.long()
    assert torch.equal(numbers.total(), whole.sum(dim=0).double() * numbers.scale)
    assert torch.equal(numbers.squares(), (whole**2).sum(dim=0).double() * numbers.scale**2)


def test_extreme_whole_numbers_do_not_overflow():
    """2,048 rows of the largest digits: what a block can hold at most."""
    largest = int(0.99 * 2**23)
    whole = torch.tensor([[largest, -largest]], dtype=torch.int32).repeat(2048, 1)
    numbers = FixedPoint(whole, torch.ones(2, dtype=torch.float64))
    found = product_of(torch.ones(2048, 600, dtype=torch.int8), numbers)
    assert (found == torch.tensor([2048.0 * largest, -2048.0 * largest])).all()
    assert numbers.squares().tolist() == [float(2048 * largest**2)] * 2


def test_the_order_of_the_rows_and_the_path_do_not_change_a_bit(monkeypatch):
    masks, values = random_masks(2000, 40), torch.randn(2000, 6, dtype=torch.float64)
    numbers, order = fixed_point(values), torch.randperm(2000)
    expected = product_of(masks, numbers)
    assert torch.equal(product_of(masks[order], numbers[order]), expected)
    gram = counts_of(masks)
    monkeypatch.setattr(products, "fast_int8", lambda _: False)
    assert torch.equal(product_of(masks, numbers), expected)
    assert torch.equal(counts_of(masks), gram)


def test_int8_is_not_used_where_it_saturates(monkeypatch):
    """As on processors that add pairs of products in 16 bits."""

    def saturating(left, right):
        pairs = (left.long() + 128)[:, :, None] * right.long()[None]
        summed = pairs[:, 0::2] + pairs[:, 1::2]
        return (summed.clamp(-(2**15), 2**15 - 1).sum(dim=1) - 128 * right.long().sum(dim=0)).int()

    assert products._exact("cpu")
    monkeypatch.setattr(products, "int8_product", saturating)
    assert not products._exact("cpu")


SCRIPT = """
import hashlib, torch
from coar.regression.products import add_products, fast_int8, fixed_point
generator = torch.Generator().manual_seed(0)
masks = (torch.rand(700, 300, generator=generator) < 0.9).to(torch.int8)
numbers = fixed_point(torch.randn(700, 50, generator=generator).double())
cross = torch.zeros(300, 50, dtype=torch.float64)
add_products(masks, numbers, cross)
print(hashlib.sha256(cross.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_older_processors_get_the_same_bits():
    found = set()
    for limit in (
        {},
        {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        {"OMP_NUM_THREADS": "2"},
    ):
        environment = os.environ | limit
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_gpu_gives_the_same_bits():
    masks, numbers = random_masks(1000, 301), fixed_point(torch.randn(1000, 37, dtype=torch.float64))
    expected, gram = product_of(masks, numbers), counts_of(masks)
    on_gpu = FixedPoint(numbers.whole.cuda(), numbers.scale.cuda())
    cross = torch.zeros(301, 37, dtype=torch.float64, device="cuda")
    add_products(masks.cuda(), on_gpu, cross)
    assert torch.equal(cross.cpu(), expected)
    found = torch.zeros(301, 301, dtype=torch.int32, device="cuda")
    add_counts(masks.cuda(), found)
    mirror(found)
    assert torch.equal(found.cpu(), gram)
