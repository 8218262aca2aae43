"""A model over any number of sequences: sorted by length, in a few compiled shapes, streamed.

Shape suffixes: N sequences.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import tqdm

from rqv2_jax.data import packing
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.models import Models
from rqv2_jax.sharding import Sharding

MAX_SHAPES = 4


@dataclasses.dataclass(frozen=True)
class Forward:
    """Both models' forward passes, compiled once for the mesh.

    `vectors` and `reranker_scores` are those of `Models` over all shards; `batch_tokens` is rows
    times width of one pass.
    """

    inputs: Inputs
    sharding: Sharding
    batch_tokens: int
    vectors: Callable
    reranker_scores: Callable

    def run(
        self,
        fn: Callable,
        params,
        *,
        lengths_N: np.ndarray,
        widths: tuple[int, ...],
        build: Callable[[np.ndarray], packing.Ragged],
        bar: tqdm.tqdm,
    ) -> np.ndarray:
        """`fn(params, packed)` for N sequences, in their order: float32 [N, ...].

        Args:
          fn: `vectors` or `reranker_scores`.
          lengths_N: the length of each sequence in tokens.
          widths: of rows, ascending, from `row_widths`; as many shapes are compiled.
          build: makes the sequences of some numbers.
          bar: progress, counted in sequences.
        """
        shards = self.sharding.shards
        own = self.sharding.own_parts(shards)
        results, order, waiting = [], [], None
        for chosen, rows, width in self.schedule(lengths_N, widths):
            # The last batch repeats a sequence: shapes are fixed.
            filled = np.append(chosen, np.full(rows - len(chosen), chosen[-1]))
            packed = [
                packing.pack(build(part), (packing.Shape(len(part), width),))
                for part in filled.reshape(shards, -1)[own]
            ]
            output = fn(params, self.sharding.put_batch(packing.stack(packed)))
            # The devices work on this batch while the host fetches the one before.
            if waiting is not None:
                results.append(np.asarray(waiting[0])[: waiting[1]])
                bar.update(waiting[1])
            waiting = output, len(chosen)
            order.append(chosen)
        results.append(np.asarray(waiting[0])[: waiting[1]])
        bar.update(waiting[1])
        joined = np.concatenate(results)
        ordered = np.empty_like(joined)
        ordered[np.concatenate(order)] = joined
        return ordered

    def schedule(
        self, lengths_N: np.ndarray, widths: tuple[int, ...]
    ) -> Iterator[tuple[np.ndarray, int, int]]:
        """The batches in their order: (numbers of the sequences, rows, width of a row)."""
        shards, order_N, start = self.sharding.shards, np.argsort(lengths_N, kind="stable"), 0
        ends = np.searchsorted(lengths_N[order_N], widths, side="right")
        for width, end in zip(widths, ends):
            rows = max(self.batch_tokens // width // shards, 1) * shards
            while end - start >= rows or (width == widths[-1] and start < end):
                yield order_N[start : min(start + rows, end)], rows, width
                start += rows


def make_forward(models: Models, inputs: Inputs, sharding: Sharding, batch_tokens: int) -> Forward:
    """Compiles nothing yet: each shape compiles when it is first met."""
    return Forward(
        inputs,
        sharding,
        batch_tokens,
        sharding.per_shard(models.vectors),
        sharding.per_shard(models.reranker_scores),
    )


def row_widths(usual_N: np.ndarray, longest: int) -> tuple[int, ...]:
    """The few row widths that waste least on the usual lengths; sequences up to `longest` fit."""
    shapes = packing.plan(np.append(np.sort(usual_N), longest), MAX_SHAPES)
    return tuple(shape.width for shape in shapes)
