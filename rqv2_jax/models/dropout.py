"""Which values dropout keeps: a hash of their index, made by two words of a key.

Unlike JAX's generators it is a few operations that XLA fuses into what follows, where on a CPU the
generators take most of a training step; and a kernel can make the same mask again from the words alone.
"""

import jax.numpy as jnp


def survive(index, start, factor, rate: float):
    """Returns whether the values of some indexes are kept, a share 1 - `rate` of them.

    The index, made another by two words, goes through MurmurHash3's finaliser.

    Args:
      index: uint32, of any shape.
      start, factor: uint32 scalars, random bits.
    """
    h = (index + start) * (factor | jnp.uint32(1))
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return (h ^ (h >> jnp.uint32(16))) >= jnp.uint32(rate * 2**32)
