"""Matrix products of factors rounded to bfloat16, whose sums are float32: what TPUs do by default.

A CPU with tiles for such products (Intel's AMX) multiplies several times faster by them. JAX leaves
float32 factors as they are on a CPU, whatever its setting of precision says.
"""

import pathlib

import jax
import jax.numpy as jnp
from jax import Array

CHOICES = ("auto", "float32", "bfloat16")


def half(choice: str, platform: str) -> bool:
    """Says whether factors are rounded; "auto" does so on a CPU that has tiles for such products."""
    if choice != "auto":
        return choice == "bfloat16"
    described = pathlib.Path("/proc/cpuinfo")
    return platform == "cpu" and described.exists() and "amx_bf16" in described.read_text()


@jax.custom_vjp
def rounded(x_NxK: Array, y_KxM: Array) -> Array:
    """Returns the product [N, M] in float32; the factors of its gradient are rounded too."""
    return _product(_half(x_NxK), _half(y_KxM), 1, 0)


def _half(x: Array) -> Array:
    return x.astype(jnp.bfloat16)


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Sums the products of two matrices over an axis of each."""
    axes = ((x_axis,), (y_axis,)), ((), ())
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _transposed(x_NxK: Array) -> Array:
    """Returns the transpose as a copy in memory.

    XLA's CPU backend has no product of bfloat16 that sums over both first axes, and computes it from
    float32 in three times the time. The flat array stops XLA from seeing that it is one.
    """
    flat = jax.lax.optimization_barrier(x_NxK.T.reshape(-1))
    return flat.reshape(x_NxK.shape[::-1])


def _forward(x_NxK: Array, y_KxM: Array) -> tuple[Array, tuple[Array, Array]]:
    x_NxK, y_KxM = _half(x_NxK), _half(y_KxM)
    return _product(x_NxK, y_KxM, 1, 0), (x_NxK, y_KxM)


def _backward(factors: tuple[Array, Array], gradient_NxM: Array) -> tuple[Array, Array]:
    (x_NxK, y_KxM), gradient_NxM = factors, _half(gradient_NxM)
    of_x = _product(gradient_NxM, y_KxM, 1, 1)
    # The smaller factor is copied.
    if x_NxK.shape[1] > gradient_NxM.shape[1]:
        return of_x, jax.lax.optimization_barrier(
            _product(_transposed(gradient_NxM), x_NxK, 1, 0)
        ).T
    return of_x, _product(_transposed(x_NxK), gradient_NxM, 1, 0)


rounded.defvjp(_forward, _backward)
