"""Products of rounded factors, against the same sums in NumPy."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rqv2_jax.models import products

rng = np.random.default_rng(0)


def rounded(x):
    """An array as bfloat16 holds it, in float64."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def exact(a, b):
    return rounded(a) @ rounded(b)


@pytest.mark.parametrize("wide", [2, 4])
def test_a_product_and_its_gradients_sum_rounded_factors(wide):
    x, y = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 3), (3, wide)))
    product, pull = jax.vjp(products.rounded, x, y)
    gradient = rng.normal(size=product.shape).astype(np.float32)
    of_x, of_y = pull(jnp.asarray(gradient))
    assert {part.dtype for part in (product, of_x, of_y)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(product, exact(x, y), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_x, exact(gradient, y.T), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_y, exact(x.T, gradient), rtol=1e-5, atol=1e-6)
    assert np.abs(product - x @ y).max() > 1e-4


def test_auto_rounds_where_a_cpu_has_tiles(monkeypatch):
    for flags, half in (("fma avx2 amx_bf16 amx_tile", True), ("fma avx2 avx512f", False)):
        monkeypatch.setattr(pathlib.Path, "read_text", lambda _, flags=flags: f"flags : {flags}")
        monkeypatch.setattr(pathlib.Path, "exists", lambda _: True)
        assert products.half("auto", "cpu") is half
        assert not products.half("auto", "gpu")
        assert products.half("bfloat16", "gpu")
        assert not products.half("float32", "cpu")
    monkeypatch.setattr(pathlib.Path, "exists", lambda _: False)
    assert not products.half("auto", "cpu")
