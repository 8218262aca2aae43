"""Attention within sequences that lie end to end: a GPU kernel that computes no padding.

One call serves all sequences of a batch, whatever their lengths. A tile of queries visits the tiles of
keys that its own sequences touch, and skips all others (as FlashAttention-2, Dao 2023, does within one
sequence). Dropout masks are a hash of the weights' index, so the gradient's kernels make them again
from the key alone: the same bits in every pass, on every run.

The kernels are Pallas kernels for Triton. On other backends they are interpreted: exact, and slow.

Shape suffixes: A queries, N keys, H heads, K size of a head, E columns of several heads side by side,
q queries of a tile, k keys of a tile, G tiles of queries, C tiles of keys.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rqv2_jax.data.packing import FLAT_SLOTS
from rqv2_jax.models.dropout import survive

# Queries and keys of a tile; FLAT_TOKENS is a multiple of both. Where only first tokens are queries, a
# tile holds few: each belongs to another sequence, and the tile visits the keys of all of them.
QUERIES, KEYS, FEW = 64, 32, FLAT_SLOTS
# Warps that compute a tile, and loads of keys that are under way.
WARPS, STAGES = 4, 3

# The name, for rematerialisation, of this attention's outputs.
KEPT = "attention"

LOG2E = 1.4426950408889634
# Finite: -inf gives NaN gradients in a softmax row that is masked throughout.
MASKED = -1e9

Arrays = tuple[Array, ...]
# A Pallas reference to an array in the device's memory.
Ref = Any


class Spans(NamedTuple):
    """The keys that each query sees: start_A[a] <= key < end_A[a], none where they are equal.

    Both ascend with a. `keys_2xG` are the first and one past the last tile of keys that a tile of
    queries visits, `queries_2xC` the first and one past the last tile of queries for a tile of keys.
    """

    start_A: Array
    end_A: Array
    keys_2xG: Array
    queries_2xC: Array


def tile_of(queries: int, keys: int) -> int:
    """Returns how many queries one tile holds."""
    return QUERIES if queries == keys else FEW


def token_spans(sequence_N: Array) -> tuple[Array, Array]:
    """Returns the first key and one past the last key that each token sees, both [N].

    `sequence_N` has the number of each token's sequence; runs of equal numbers are one sequence.
    """
    index_N = jnp.arange(len(sequence_N))
    changes_N = sequence_N[1:] != sequence_N[:-1]
    true = jnp.ones(1, bool)
    first_N = jnp.where(jnp.concatenate([true, changes_N]), index_N, 0)
    last_N = jnp.where(jnp.concatenate([changes_N, true]), index_N + 1, len(sequence_N))
    start_N = jax.lax.cummax(first_N)
    end_N = jax.lax.cummin(last_N, reverse=True)
    return start_N, end_N


def spans(start_A: Array, end_A: Array, real_A: Array, keys: int) -> Spans:
    """Returns the `Spans` of queries that see `start_A` to `end_A` of `keys` keys; none if not real."""
    # Empty spans keep their start, so that the ends still ascend.
    end_A = jnp.where(real_A, end_A, start_A)
    tile = tile_of(len(start_A), keys)
    start_Gxq, end_Gxq = start_A.reshape(-1, tile), end_A.reshape(-1, tile)
    seen_Gxq = end_Gxq > start_Gxq
    first_G = jnp.where(seen_Gxq, start_Gxq, keys).min(axis=1) // KEYS
    last_G = -(-jnp.where(seen_Gxq, end_Gxq, 0).max(axis=1) // KEYS)
    edges_C = jnp.arange(0, keys, KEYS)
    first_C = jnp.searchsorted(end_A, edges_C, side="right") // tile
    last_C = -(-jnp.searchsorted(start_A, edges_C + KEYS, side="left") // tile)
    bounds = jnp.stack([first_G, last_G]), jnp.stack([first_C, last_C])
    return Spans(*(x.astype(jnp.int32) for x in (start_A, end_A, *bounds)))


class _Shape(NamedTuple):
    """The static part of a call: sizes, and where columns begin."""

    heads: int
    size: int  # of a head
    queries: int
    keys: int
    tile: int  # queries of a tile
    key_column: int  # of the array of keys and values
    rate: float  # of dropout
    longest: int  # positions that a sequence may have

    @property
    def value_column(self) -> int:
        return self.key_column + self.heads * self.size


def _dot(a: Array, b: Array) -> Array:
    # float32 factors would be rounded to 10 bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _part(ref: Ref, tile: Array, count: int, column: Array, size: int) -> Array:
    """Returns a tile's rows of `size` columns."""
    return triton.load(ref.at[pl.ds(tile * count, count), pl.ds(column, size)])


def _row(ref: Ref, tile: Array, count: int, *lead: Array) -> Array:
    """Returns a tile's part of a row."""
    return triton.load(ref.at[(*lead, pl.ds(tile * count, count))])


def _seen(shape: _Shape, span_refs: tuple[Ref, Ref], query_tile: Array, key_tile: Array) -> Arrays:
    """Returns the queries' first keys [q], the keys' numbers [k] and which queries see which [q, k]."""
    start_q, end_q = (_row(ref, query_tile, shape.tile) for ref in span_refs)
    key_k = key_tile * KEYS + jnp.arange(KEYS)
    seen_qxk = (key_k[None] >= start_q[:, None]) & (key_k[None] < end_q[:, None])
    return start_q, key_k, seen_qxk


def _dropped(shape: _Shape, x_qxk: Array, seed_ref: Ref, place: Arrays, seen: Arrays) -> Array:
    """Drops out weights: the same ones whenever query, key and head are the same.

    `place` numbers the head, the tile of queries and the tile of keys; `seen` is from `_seen`.
    """
    if shape.rate == 0:
        return x_qxk
    (head, query_tile, _), (start_q, key_k, _) = place, seen
    query_q = head * shape.queries + query_tile * shape.tile + jnp.arange(shape.tile)
    offset_qxk = (key_k[None] - start_q[:, None]).astype(jnp.uint32)
    index_qxk = query_q.astype(jnp.uint32)[:, None] * jnp.uint32(shape.longest) + offset_qxk
    kept_qxk = survive(index_qxk, seed_ref[0], seed_ref[1], shape.rate)
    return jnp.where(kept_qxk, x_qxk * (1 / (1 - shape.rate)), 0.0)


def _forward_kernel(shape: _Shape, *arrays: Ref) -> None:
    seed, start, end, bounds, q, kv, out, log_sum = arrays
    tile, head = pl.program_id(0), pl.program_id(1)
    column = head * shape.size
    q_qxK = _part(q, tile, shape.tile, column, shape.size)

    def step(key_tile: Array, carry: Arrays) -> Arrays:
        out_qxK, top_q, sum_q = carry
        k_kxK = _part(kv, key_tile, KEYS, shape.key_column + column, shape.size)
        v_kxK = _part(kv, key_tile, KEYS, shape.value_column + column, shape.size)
        seen = _seen(shape, (start, end), tile, key_tile)
        logits_qxk = _dot(q_qxK, k_kxK.T) * (LOG2E * shape.size**-0.5)
        logits_qxk = jnp.where(seen[-1], logits_qxk, MASKED)
        higher_q = jnp.maximum(top_q, logits_qxk.max(axis=1))
        weights_qxk = jnp.where(seen[-1], jnp.exp2(logits_qxk - higher_q[:, None]), 0.0)
        shrink_q = jnp.exp2(top_q - higher_q)
        sum_q = sum_q * shrink_q + weights_qxk.sum(axis=1)
        dropped_qxk = _dropped(shape, weights_qxk, seed, (head, tile, key_tile), seen)
        out_qxK = out_qxK * shrink_q[:, None] + _dot(dropped_qxk.astype(v_kxK.dtype), v_kxK)
        return out_qxK, higher_q, sum_q

    zeros = jnp.zeros((shape.tile, shape.size), jnp.float32)
    nothing = zeros, jnp.full(shape.tile, MASKED), jnp.zeros(shape.tile)
    first, last = bounds[0, tile], bounds[1, tile]
    out_qxK, top_q, sum_q = jax.lax.fori_loop(first, last, step, nothing)
    sum_q = jnp.where(sum_q > 0, sum_q, 1.0)
    rows = pl.ds(tile * shape.tile, shape.tile)
    mean_qxK = out_qxK / sum_q[:, None]
    triton.store(out.at[rows, pl.ds(column, shape.size)], mean_qxK.astype(out.dtype))
    triton.store(log_sum.at[head, rows], top_q + jnp.log2(sum_q))


def _pulled_back(shape: _Shape, refs: list[Ref], place: Arrays, parts: Arrays) -> Arrays:
    """Returns the weights after dropout and the logits' gradient, both [q, k].

    `refs` are the seed, the spans' starts and ends, `log_sum` and `delta`; `place` is as in `_dropped`;
    `parts` are the queries, keys, values and gradients of the output there.
    """
    seed, start, end, log_sum, delta = refs
    head, query_tile, key_tile = place
    q_qxK, k_kxK, v_kxK, back_qxK = parts
    seen = _seen(shape, (start, end), query_tile, key_tile)
    logits_qxk = _dot(q_qxK, k_kxK.T) * (LOG2E * shape.size**-0.5)
    log_sum_q, delta_q = (_row(ref, query_tile, shape.tile, head) for ref in (log_sum, delta))
    weights_qxk = jnp.where(seen[-1], jnp.exp2(logits_qxk - log_sum_q[:, None]), 0.0)
    back_qxk = _dropped(shape, _dot(back_qxK, v_kxK.T), seed, place, seen) - delta_q[:, None]
    dropped_qxk = _dropped(shape, weights_qxk, seed, place, seen)
    return dropped_qxk, weights_qxk * back_qxk * shape.size**-0.5


def _query_gradient_kernel(shape: _Shape, *arrays: Ref) -> None:
    *refs, bounds, q, kv, back, gradient = arrays
    tile, head = pl.program_id(0), pl.program_id(1)
    column = head * shape.size
    q_qxK, back_qxK = (_part(x, tile, shape.tile, column, shape.size) for x in (q, back))

    def step(key_tile: Array, total_qxK: Array) -> Array:
        k_kxK = _part(kv, key_tile, KEYS, shape.key_column + column, shape.size)
        v_kxK = _part(kv, key_tile, KEYS, shape.value_column + column, shape.size)
        parts, place = (q_qxK, k_kxK, v_kxK, back_qxK), (head, tile, key_tile)
        _, back_qxk = _pulled_back(shape, refs, place, parts)
        return total_qxK + _dot(back_qxk.astype(k_kxK.dtype), k_kxK)

    first, last = bounds[0, tile], bounds[1, tile]
    zeros = jnp.zeros((shape.tile, shape.size), jnp.float32)
    total_qxK = jax.lax.fori_loop(first, last, step, zeros)
    rows = pl.ds(tile * shape.tile, shape.tile)
    triton.store(gradient.at[rows, pl.ds(column, shape.size)], total_qxK.astype(gradient.dtype))


def _key_gradient_kernel(shape: _Shape, *arrays: Ref) -> None:
    *refs, bounds, q, kv, back, key_gradient, value_gradient = arrays
    tile, head = pl.program_id(0), pl.program_id(1)
    column = head * shape.size
    k_kxK = _part(kv, tile, KEYS, shape.key_column + column, shape.size)
    v_kxK = _part(kv, tile, KEYS, shape.value_column + column, shape.size)

    def step(query_tile: Array, totals: Arrays) -> Arrays:
        key_kxK, value_kxK = totals
        q_qxK, back_qxK = (_part(x, query_tile, shape.tile, column, shape.size) for x in (q, back))
        parts, place = (q_qxK, k_kxK, v_kxK, back_qxK), (head, query_tile, tile)
        weights_qxk, back_qxk = _pulled_back(shape, refs, place, parts)
        key_kxK += _dot(back_qxk.T.astype(q_qxK.dtype), q_qxK)
        value_kxK += _dot(weights_qxk.T.astype(back_qxK.dtype), back_qxK)
        return key_kxK, value_kxK

    zeros = jnp.zeros((KEYS, shape.size), jnp.float32)
    first, last = bounds[0, tile], bounds[1, tile]
    totals = jax.lax.fori_loop(first, last, step, (zeros, zeros))
    rows = pl.ds(tile * KEYS, KEYS)
    for ref, total_kxK in zip((key_gradient, value_gradient), totals):
        triton.store(ref.at[rows, pl.ds(column, shape.size)], total_kxK.astype(ref.dtype))


def _call(kernel: Callable, shape: _Shape, tiles: int, outputs: tuple, *arrays: Array) -> Arrays:
    """Runs a kernel for every tile and head over whole arrays."""

    def on(interpret: bool) -> Callable:
        return pl.pallas_call(
            functools.partial(kernel, shape),
            out_shape=outputs,
            grid=(tiles, shape.heads),
            in_specs=[pl.BlockSpec(None, None) for _ in arrays],
            out_specs=[pl.BlockSpec(None, None) for _ in outputs],
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )

    return jax.lax.platform_dependent(*arrays, cuda=on(False), default=on(True))


def _shape_of(projections: Arrays, heads: int, rate: float, longest: int) -> _Shape:
    q, kv = projections[0], projections[-1]
    together = len(projections) == 1
    width = kv.shape[1] // (3 if together else 2)
    tile, key_column = tile_of(len(q), len(kv)), width if together else 0
    return _Shape(heads, width // heads, len(q), len(kv), tile, key_column, rate, longest)


def _forward(shape: _Shape, projections: Arrays, spans: Spans, seed_2: Array) -> Arrays:
    q, kv = projections[0], projections[-1]
    outputs = (
        jax.ShapeDtypeStruct((shape.queries, shape.heads * shape.size), q.dtype),
        jax.ShapeDtypeStruct((shape.heads, shape.queries), jnp.float32),
    )
    start_A, end_A, keys_2xG, _ = spans
    tiles = shape.queries // shape.tile
    return _call(_forward_kernel, shape, tiles, outputs, seed_2, start_A, end_A, keys_2xG, q, kv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def attend(
    projections: Arrays, spans: Spans, seed_2: Array, heads: int, rate: float, longest: int
) -> Array:
    """Returns each query's mean of the values it sees, weighted by the softmax of its logits [A, D].

    Args:
      projections: ([N, 3 D],) queries, keys and values of the same tokens side by side; or ([A, D],
        [N, 2 D]), queries apart. N is a multiple of `packing.FLAT_TOKENS`; A of `FEW`, or equal to N.
      spans: from `spans`.
      seed_2: two words of uint32 that decide which weights are dropped out.
      rate: of dropout; 0 switches it off.
      longest: most keys that a query sees.
    """
    shape = _shape_of(projections, heads, rate, longest)
    return _forward(shape, projections, spans, seed_2)[0]


def _attend_forward(
    projections: Arrays, spans: Spans, seed_2: Array, *static: Any
) -> tuple[Array, tuple]:
    outputs = _forward(_shape_of(projections, *static), projections, spans, seed_2)
    out_AxD, log_sum_HxA = (checkpoint_name(x, KEPT) for x in outputs)
    return out_AxD, (projections, spans, seed_2, out_AxD, log_sum_HxA)


def _attend_backward(heads: int, rate: float, longest: int, kept: tuple, back_AxD: Array) -> tuple:
    projections, spans, seed_2, out_AxD, log_sum_HxA = kept
    q, kv = projections[0], projections[-1]
    shape = _shape_of(projections, heads, rate, longest)
    products_AxD = back_AxD.astype(jnp.float32) * out_AxD.astype(jnp.float32)
    delta_HxA = products_AxD.reshape(shape.queries, heads, shape.size).sum(axis=-1).T
    start_A, end_A, keys_2xG, queries_2xC = spans

    def call(kernel: Callable, tiles: int, rows: int, count: int, bounds: Array) -> Arrays:
        output = jax.ShapeDtypeStruct((rows, heads * shape.size), q.dtype)
        arrays = (seed_2, start_A, end_A, log_sum_HxA, delta_HxA, bounds, q, kv, back_AxD)
        return _call(kernel, shape, tiles, (output,) * count, *arrays)

    tiles = shape.queries // shape.tile
    (query_AxD,) = call(_query_gradient_kernel, tiles, shape.queries, 1, keys_2xG)
    keys_and_values = call(_key_gradient_kernel, shape.keys // KEYS, shape.keys, 2, queries_2xC)
    if len(projections) == 1:
        return (jnp.concatenate([query_AxD, *keys_and_values], axis=1),), None, None
    return (query_AxD, jnp.concatenate(keys_and_values, axis=1)), None, None


attend.defvjp(_attend_forward, _attend_backward)
