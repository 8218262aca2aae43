"""Attention within sequences, by the implementations that `config.model.attention` names.

Which tokens belong to one sequence is worked out once for a batch (`views`) and read by every layer.

Shape suffixes: R rows of a block, T tokens of a row, S sequences of a row, N tokens of all blocks,
A queries (the tokens that attend), H heads, K size of a head, D hidden size.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rqv2_jax.data.packing import Block
from rqv2_jax.errors import InputError
from rqv2_jax.models import ragged_attention
from rqv2_jax.models.ragged_attention import MASKED, Arrays, Spans

Blocks = tuple[Block, ...]


class Rows(NamedTuple):
    """The attention bias of a block's rows; with one sequence in each row, its length too.

    Rows without tokens have the length 1, as softmax needs a key.
    """

    bias_Rx1xAxT: Array
    length_R: Array | None


def implementation(choice: str, platform: str, head_sizes: Iterable[int]) -> str:
    """Returns the attention that a config asks for; "auto" depends on the platform and head sizes.

    Raises InputError if the kernel is asked for, and cannot compute heads of such a size.
    """
    # Triton's products take powers of 2 from 16 on.
    fits = all(size >= 16 and size & (size - 1) == 0 for size in head_sizes)
    if choice == "ragged" and not fits:
        raise InputError(
            "config.model.attention is 'ragged', whose heads must have 16, 32, 64, ... columns; choose "
            "'cudnn' or 'plain' for this model"
        )
    if choice != "auto":
        return choice
    return "ragged" if platform == "gpu" and fits else "plain"


def views(name: str, blocks: Blocks, *, first_only: bool = False) -> Spans | tuple[Rows, ...]:
    """Returns the keys that each query sees: `Spans` for "ragged", else `Rows` of each block.

    With `first_only`, only the first token of each sequence is a query.
    """
    if name != "ragged":
        return tuple(_rows(block, first_only) for block in blocks)
    (block,) = blocks
    sequence_N = block.sequence_RxT.reshape(-1)
    start_N, end_N = ragged_attention.token_spans(sequence_N)
    at = block.first_RxS[0] if first_only else slice(None)
    return ragged_attention.spans(start_N[at], end_N[at], (sequence_N >= 0)[at], len(sequence_N))


def _rows(block: Block, first_only: bool) -> Rows:
    query_RxA = block.sequence_RxT
    if first_only:
        query_RxA = jnp.take_along_axis(query_RxA, block.first_RxS, axis=1)
    same_RxAxT = query_RxA[:, :, None] == block.sequence_RxT[:, None, :]
    bias_Rx1xAxT = jnp.where(same_RxAxT, 0.0, MASKED)[:, None]
    length_R = jnp.maximum((block.sequence_RxT >= 0).sum(axis=1), 1)
    return Rows(bias_Rx1xAxT, length_R if block.first_RxS.shape[1] == 1 else None)


def by_rows(
    name: str, projections: Arrays, views: tuple[Rows, ...], heads: int, dropout: Callable
) -> Array:
    """Returns each query's weighted mean of the values of its sequence [A, D].

    Args:
      name: "plain", or an implementation of `jax.nn.dot_product_attention`.
      projections: ([N, 3 D],) queries, keys and values of all tokens side by side; or ([A, D],
        [N, 2 D]) where only some tokens are queries.
      views: from `views`.
      dropout: applied to the weights by "plain" alone.
    """
    if len(projections) == 1:
        q_AxD, k_NxD, v_NxD = jnp.split(projections[0], 3, axis=1)
    else:
        q_AxD, (k_NxD, v_NxD) = projections[0], jnp.split(projections[1], 2, axis=1)
    shapes = [view.bias_Rx1xAxT.shape for view in views]
    query_ends = np.cumsum([rows * queries for rows, _, queries, _ in shapes])[:-1]
    ends = np.cumsum([rows * length for rows, _, _, length in shapes])[:-1]
    arrays = zip(*map(jnp.split, (q_AxD, k_NxD, v_NxD), (query_ends, ends, ends)))
    outputs = []
    for (rows, _, queries, length), view, qkv in zip(shapes, views, arrays):
        qkv = tuple(x.reshape(rows, -1, heads, x.shape[1] // heads) for x in qkv)
        # First tokens alone are little work, and cuDNN takes no odd number of them.
        plain = name == "plain" or queries != length
        y_RxAxHxK = _plain(qkv, view, dropout) if plain else _fused(name, qkv, view)
        outputs.append(y_RxAxHxK.reshape(rows * queries, -1))
    return jnp.concatenate(outputs)


def _fused(name: str, qkv: Arrays, view: Rows) -> Array:
    settings: dict[str, Any] = {"implementation": name}
    # Lengths alone where a row holds one sequence: a bias costs its gradient in every layer.
    if view.length_R is None:
        settings["bias"] = view.bias_Rx1xAxT.astype(qkv[0].dtype)
    else:
        settings |= dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths"), view.length_R)
    return jax.nn.dot_product_attention(*qkv, **settings)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _exp(x: Array, dtype: jnp.dtype) -> Array:
    """Returns exp of float32 in `dtype`: the gradient keeps no float32 copy of its own."""
    return jnp.exp(x).astype(dtype)


@_exp.defjvp
def _exp_jvp(dtype: jnp.dtype, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    y = _exp(*primals, dtype)
    return y, y * tangents[0].astype(dtype)


def _plain(qkv: Arrays, view: Rows, dropout: Callable) -> Array:
    q_RxAxHxK, k_RxTxHxK, v_RxTxHxK = qkv
    dtype, size = q_RxAxHxK.dtype, q_RxAxHxK.shape[-1]
    # Heads in front of tokens and keys already transposed: plain batched products, which XLA's CPU
    # backend runs faster than any other order of the axes.
    q_RxHxAxK = q_RxAxHxK.transpose(0, 2, 1, 3) * size**-0.5
    k_RxHxKxT, v_RxHxTxK = k_RxTxHxK.transpose(0, 2, 3, 1), v_RxTxHxK.transpose(0, 2, 1, 3)
    logits_RxHxAxT = jnp.matmul(q_RxHxAxK, k_RxHxKxT).astype(jnp.float32) + view.bias_Rx1xAxT
    # The softmax is divided by its sum after the product with the values, so the largest arrays of a
    # layer are written once, in `dtype`.
    top_RxHxAx1 = jax.lax.stop_gradient(logits_RxHxAxT.max(axis=-1, keepdims=True))
    e_RxHxAxT = _exp(logits_RxHxAxT - top_RxHxAx1, dtype)
    sum_RxHxAx1 = e_RxHxAxT.astype(jnp.float32).sum(axis=-1, keepdims=True)
    y_RxHxAxK = jnp.matmul(dropout(e_RxHxAxT), v_RxHxTxK).astype(jnp.float32)
    return (y_RxHxAxK / sum_RxHxAx1).astype(dtype).transpose(0, 2, 1, 3)
