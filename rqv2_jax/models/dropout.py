"""Dropout masks from a hash of each value's index and two words of a key.

JAX's generators take most of a training step on a CPU; XLA fuses these few operations into the next
ones. A kernel can make the same mask again from the two words alone.
"""

import jax
import jax.numpy as jnp


def survive(index: jax.Array, start: jax.Array, factor: jax.Array, rate: float) -> jax.Array:
    """Says which values are kept, a share 1 - `rate` of them: MurmurHash3's finaliser of their index.

    `index` is uint32, of any shape; `start` and `factor` are uint32 scalars, random bits.
    """
    h = (index + start) * (factor | jnp.uint32(1))
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return (h ^ (h >> jnp.uint32(16))) >= jnp.uint32(rate * 2**32)
