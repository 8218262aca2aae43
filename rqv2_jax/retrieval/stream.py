"""A model over any number of sequences: sorted by length, in a few compiled shapes, streamed.

Shape suffixes: N sequences, S device shards.
"""

from collections.abc import Callable

import numpy as np
import tqdm

from rqv2_jax.data import packing
from rqv2_jax.sharding import Sharding

MAX_SHAPES = 4


def run(
    fn: Callable,
    params,
    sharding: Sharding,
    *,
    lengths_N: np.ndarray,
    widths: tuple[int, ...],
    build: Callable[[np.ndarray], packing.Ragged],
    batch_tokens: int,
    bar: tqdm.tqdm,
) -> np.ndarray:
    """`fn(params, packed)` for all N sequences, in their order.

    Args:
      fn: from `sharding.per_shard`; gives one result for each sequence.
      lengths_N: the length of each sequence in tokens.
      widths: the row widths to use, from `row_widths`.
      build: the sequences of some numbers.
      batch_tokens: rows times width of one forward pass, over all devices.
      bar: progress, counted in sequences.

    Returns:
      float32 [N, ...].
    """
    order_N = np.argsort(lengths_N, kind="stable")
    ends = np.searchsorted(lengths_N[order_N], widths, side="right")
    results, numbers = [], []
    pending: tuple | None = None
    start = 0
    for width, end in zip(widths, ends):
        rows = max(batch_tokens // width // sharding.shards, 1) * sharding.shards
        while end - start >= rows or (width == widths[-1] and start < end):
            chosen = order_N[start : min(start + rows, end)]
            start += len(chosen)
            # The last batch repeats a sequence: shapes are fixed.
            filled = np.append(chosen, np.full(rows - len(chosen), chosen[-1]))
            packed = [
                packing.pack(build(part), ((len(part), width),))
                for part in np.split(filled, sharding.shards)
            ]
            output = fn(params, sharding.put_batch(packing.stack(packed)))
            if pending is not None:
                results.append(np.asarray(pending[0])[: pending[1]])
            pending = (output, len(chosen))
            numbers.append(chosen)
            bar.update(len(chosen))
    if pending is None:
        raise ValueError("no sequences")
    results.append(np.asarray(pending[0])[: pending[1]])
    joined = np.concatenate(results)
    ordered = np.empty_like(joined)
    ordered[np.concatenate(numbers)] = joined
    return ordered


def row_widths(lengths_N: np.ndarray) -> tuple[int, ...]:
    """The few row widths that waste least on sequences of these lengths."""
    return tuple(width for _, width in packing.plan(np.sort(lengths_N)[None], MAX_SHAPES))
