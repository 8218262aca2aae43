"""Attention within sequences, by the implementations that `config.model.attention` names.

What tells tokens of one sequence from those of others is made once for a batch (`views`) and read by
every layer.

Shape suffixes: R rows of a block, T tokens of a row, S sequences of a row, N tokens of all blocks,
A tokens that ask, H heads, K size of a head, D hidden size, E projections side by side.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rqv2_jax.data.packing import Block
from rqv2_jax.errors import InputError
from rqv2_jax.models import ragged_attention
from rqv2_jax.models.ragged_attention import MASKED


class Rows(NamedTuple):
    """What the rows of a block see: a bias [R, 1, A, T], and the tokens of each row's sequence [R].

    Rows without tokens have the length 1, as softmax needs a key.
    """

    bias_Rx1xAxT: jax.Array
    length_R: jax.Array | None


def implementation(choice: str, platform: str, head_sizes: Iterable[int]) -> str:
    """Returns what `config.model.attention` asks for; "auto" goes by platform and sizes of heads.

    Raises:
      InputError: the kernel is asked for, and cannot compute heads of such a size.
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


def views(name: str, blocks: tuple[Block, ...]):
    """Returns what tells the tokens of all sequences apart: spans, or `Rows` of each block."""
    if name == "ragged":
        start_N, end_N, real_N = _flat(blocks)
        return ragged_attention.spans(start_N, end_N, real_N, len(real_N))
    return tuple(_rows(block, block.sequence_RxT) for block in blocks)


def first_views(name: str, blocks: tuple[Block, ...]):
    """Returns the same where only the first token of each sequence asks."""
    if name == "ragged":
        start_N, end_N, real_N = _flat(blocks)
        first_A = blocks[0].first_RxS[0]
        return ragged_attention.spans(*(x[first_A] for x in (start_N, end_N, real_N)), len(real_N))
    firsts = (jnp.take_along_axis(b.sequence_RxT, b.first_RxS, axis=1) for b in blocks)
    return tuple(_rows(block, first_RxS) for block, first_RxS in zip(blocks, firsts))


def _flat(blocks):
    (block,) = blocks
    sequence_N = block.sequence_RxT.reshape(-1)
    return *ragged_attention.token_spans(sequence_N), sequence_N >= 0


def _rows(block: Block, asking_RxA) -> Rows:
    same_RxAxT = asking_RxA[:, :, None] == block.sequence_RxT[:, None, :]
    bias_Rx1xAxT = jnp.where(same_RxAxT, 0.0, MASKED)[:, None]
    length_R = jnp.maximum((block.sequence_RxT >= 0).sum(axis=1), 1)
    return Rows(bias_Rx1xAxT, length_R if block.first_RxS.shape[1] == 1 else None)


def by_rows(name: str, projections, views: tuple[Rows, ...], heads: int, dropout: Callable):
    """Returns what every asking token reads from the values of its sequence [A, D].

    Args:
      name: "plain", or an implementation of `jax.nn.dot_product_attention`.
      projections: ([N, 3 D],) queries, keys and values of all tokens side by side; or ([A, D],
        [N, 2 D]) where only some ask.
      views: from `views` or `first_views`.
      dropout: of the weights, by "plain".
    """
    if len(projections) == 1:
        q_AxD, k_NxD, v_NxD = jnp.split(projections[0], 3, axis=1)
    else:
        q_AxD, (k_NxD, v_NxD) = projections[0], jnp.split(projections[1], 2, axis=1)
    shapes = [view.bias_Rx1xAxT.shape for view in views]
    asking_ends = np.cumsum([rows * asking for rows, _, asking, _ in shapes])[:-1]
    ends = np.cumsum([rows * length for rows, _, _, length in shapes])[:-1]
    arrays = zip(*map(jnp.split, (q_AxD, k_NxD, v_NxD), (asking_ends, ends, ends)))
    found = []
    for (rows, _, asking, length), view, qkv in zip(shapes, views, arrays):
        # First tokens alone are little work, and cuDNN takes no odd number of them.
        attend = _plain if name == "plain" or asking != length else _fused
        q_RxAxHxK, *kv = (x.reshape(rows, -1, heads, x.shape[1] // heads) for x in qkv)
        y_RxAxHxK = attend(name, q_RxAxHxK, *kv, view, dropout)
        found.append(y_RxAxHxK.reshape(rows * asking, -1))
    return jnp.concatenate(found)


def _fused(name, q_RxAxHxK, k_RxTxHxK, v_RxTxHxK, view, _):
    """Lengths alone where a row holds one sequence: a bias costs its gradient in every layer."""
    if view.length_R is None:
        only = {"bias": view.bias_Rx1xAxT.astype(q_RxAxHxK.dtype)}
    else:
        only = dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths"), view.length_R)
    qkv = q_RxAxHxK, k_RxTxHxK, v_RxTxHxK
    return jax.nn.dot_product_attention(*qkv, **only, implementation=name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _exp(x, dtype):
    """Returns exp of float32 in `dtype`: the gradient keeps no float32 copy of its own."""
    return jnp.exp(x).astype(dtype)


@_exp.defjvp
def _exp_jvp(dtype, primals, tangents):
    y = _exp(*primals, dtype)
    return y, y * tangents[0].astype(dtype)


def _plain(_, q_RxAxHxK, k_RxTxHxK, v_RxTxHxK, view, dropout):
    dtype, size = q_RxAxHxK.dtype, q_RxAxHxK.shape[-1]
    # Heads in front of tokens and keys already transposed: plain batched products, which XLA's CPU
    # backend runs faster than any other order of the axes.
    q_RxHxAxK = q_RxAxHxK.transpose(0, 2, 1, 3) * size**-0.5
    k_RxHxKxT, v_RxHxTxK = k_RxTxHxK.transpose(0, 2, 3, 1), v_RxTxHxK.transpose(0, 2, 1, 3)
    logits_RxHxAxT = jnp.matmul(q_RxHxAxK, k_RxHxKxT).astype(jnp.float32) + view.bias_Rx1xAxT
    # Softmax, divided by its sum behind the product with the values: so the largest arrays of a layer
    # are written in `dtype` and once.
    top_RxHxAx1 = jax.lax.stop_gradient(logits_RxHxAxT.max(axis=-1, keepdims=True))
    e_RxHxAxT = _exp(logits_RxHxAxT - top_RxHxAx1, dtype)
    sum_RxHxAx1 = e_RxHxAxT.astype(jnp.float32).sum(axis=-1, keepdims=True)
    y_RxHxAxK = jnp.matmul(dropout(e_RxHxAxT), v_RxHxTxK).astype(jnp.float32)
    return (y_RxHxAxK / sum_RxHxAx1).astype(dtype).transpose(0, 2, 1, 3)
