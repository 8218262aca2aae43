"""The models' forward passes over any number of sequences, in batches of two compiled shapes.

Shape suffixes: N sequences, S shards, R rows of a shard, K widths of rows, C counts of usual batches.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from rqv2_jax import hosts
from rqv2_jax.data import packing
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.models.bert import Params
from rqv2_jax.models.scoring import Models
from rqv2_jax.training import sharding as sharding_lib
from rqv2_jax.training.sharding import Sharding

# Size of a spare batch relative to a usual one, in tokens.
SPARE_SHARE = 0.25
# Slots of a flat row relative to the sequences of usual length that it holds.
SPARE_SLOTS = 1.5


class Layout(NamedTuple):
    """The shapes of one device's rows, in the two batches that are compiled.

    A `usual` batch has short and long rows in the proportions of the usual lengths; a `spare` one has
    rows for any length, for the few sequences that are left over. Where sequences lie end to end in one
    flat row, both are the same.
    """

    usual: tuple[packing.Shape, ...]
    spare: tuple[packing.Shape, ...]


class Batch(NamedTuple):
    """The numbers of the sequences in each shard's rows, -1 in empty rows, and the rows' shapes."""

    numbers_SxR: np.ndarray
    shapes: tuple[packing.Shape, ...]


@dataclasses.dataclass(frozen=True)
class Forward:
    """Both models' forward passes, compiled once for the mesh.

    `vectors` and `reranker_scores` are those of `Models` over all shards. In one pass a device computes
    at most `batch_tokens` tokens, padding included, unless one row is longer; the rows have at most
    `max_blocks` widths, or are one flat row, as the models want them.
    """

    models: Models
    inputs: Inputs
    sharding: Sharding
    batch_tokens: int
    max_blocks: int
    vectors: Callable
    reranker_scores: Callable

    @functools.cached_property
    def own(self) -> "Forward":
        """Returns those over this process's devices alone, which wait for no other process."""
        if hosts.count() == 1:
            return self
        devices = jax.local_devices()
        fsdp = math.gcd(self.sharding.mesh.shape["fsdp"], len(devices))
        sharding = sharding_lib.over(devices, len(devices) // fsdp, fsdp)
        sizes = {"batch_tokens": self.batch_tokens, "max_blocks": self.max_blocks}
        return make_forward(self.models, self.inputs, sharding, **sizes)

    def run(
        self,
        fn: Callable,
        params: Params,
        *,
        lengths_N: np.ndarray,
        layout: Layout,
        build: Callable[[np.ndarray], packing.Ragged],
        bar: tqdm.tqdm,
    ) -> np.ndarray:
        """Returns `fn(params, packed)` for N sequences, in their order: float32 [N, ...].

        Args:
          fn: `vectors` or `reranker_scores`.
          layout: from `layout`.
          build: makes the sequences of some numbers.
          bar: progress, counted in sequences.
        """
        local_shards = self.sharding.own_parts(self.sharding.shards)
        results, order, waiting = [], [], list[tuple[jax.Array, np.ndarray]]()

        def fetch(output: jax.Array, real_N: np.ndarray) -> None:
            results.append(np.asarray(output)[real_N])
            bar.update(int(real_N.sum()))

        for numbers_SxR, shapes in schedule(lengths_N, layout, self.sharding.shards):
            parts = [_filled(build, numbers_R) for numbers_R in numbers_SxR[local_shards]]
            packed = packing.stack([packing.pack(part, shapes) for part in parts])
            output = fn(params, self.sharding.put_batch(packed))
            # The devices work on this batch while the host fetches the one before.
            for before in waiting:
                fetch(*before)
            numbers_N = numbers_SxR.reshape(-1)
            waiting = [(output, numbers_N >= 0)]
            order.append(numbers_N[numbers_N >= 0])
        fetch(*waiting[0])
        joined = np.concatenate(results)
        ordered = np.empty_like(joined)
        ordered[np.concatenate(order)] = joined
        return ordered

    def layout(self, usual_N: np.ndarray, longest: int) -> Layout:
        """Plans the shapes for sequences of usual lengths, up to the longest."""
        if self.models.flat:
            return plan_flat(usual_N, longest, self.batch_tokens)
        return plan(usual_N, longest, self.batch_tokens, self.max_blocks)


def plan(usual_N: np.ndarray, longest: int, tokens: int, max_blocks: int) -> Layout:
    """Returns the rows that waste least on the usual lengths and hold sequences up to `longest`.

    A device computes at most `tokens`, unless one row is longer. The same lengths give the same shapes,
    however many sequences are streamed.
    """
    sorted_N = np.sort(usual_N)
    spare = packing.plan(np.full(max(int(SPARE_SHARE * tokens / longest), 1), longest), 1)
    rows = max(int(tokens / usual_N.mean()), 1)
    while True:
        # The j-th shortest of a batch's sequences may be as long as that share of the usual ones.
        longest_R = sorted_N[-(-np.arange(1, rows + 1) * len(usual_N) // rows) - 1]
        longest_R[-1] = longest
        usual = packing.plan(longest_R, max_blocks)
        computed = packing.size(usual)
        if computed <= tokens or rows == 1:
            return Layout(usual, spare)
        rows = max(int(rows * tokens / computed), 1)


def plan_flat(usual_N: np.ndarray, longest: int, tokens: int) -> Layout:
    """Returns one flat row of at most `tokens`, unless a sequence is longer, with slots to spare."""
    tokens = max(tokens // packing.FLAT_TOKENS * packing.FLAT_TOKENS, longest)
    shape = packing.plan_flat(tokens, int(SPARE_SLOTS * tokens / usual_N.mean()) + 1)
    return Layout((shape,), (shape,))


def make_forward(
    models: Models, inputs: Inputs, sharding: Sharding, *, batch_tokens: int, max_blocks: int
) -> Forward:
    """Returns the forward passes; each shape compiles when it is first used."""
    vectors, scores = (sharding.per_shard(fn) for fn in (models.vectors, models.reranker_scores))
    return Forward(models, inputs, sharding, batch_tokens, max_blocks, vectors, scores)


def _in_flat_rows(lengths_N: np.ndarray, shape: packing.Shape, shards: int) -> Iterator[Batch]:
    """Yields batches of flat rows, filled with the sequences in their order."""
    ends_N, first, rows = np.append(0, np.cumsum(lengths_N)), 0, []
    while first < len(lengths_N):
        last = np.searchsorted(ends_N, ends_N[first] + shape.width, side="right") - 1
        last = min(int(last), first + shape.slots)
        rows.append(_padded([np.arange(first, last)], shape.slots))
        first = last
    rows += [np.full(shape.slots, -1)] * (-len(rows) % shards)
    for numbers_SxR in np.stack(rows).reshape(-1, shards, shape.slots):
        yield Batch(numbers_SxR, (shape,))


def schedule(lengths_N: np.ndarray, layout: Layout, shards: int) -> Iterator[Batch]:
    """Yields the batches that hold all sequences with the fewest tokens computed."""
    if layout.usual[0].slots > 1:
        yield from _in_flat_rows(lengths_N, layout.usual[0], shards)
        return
    widths_K, rows_K = np.array([(shape.width, shape.rows) for shape in layout.usual]).T[:, ::-1]
    order_N = np.argsort(-lengths_N, kind="stable")
    # Each sequence's kind of rows, the narrowest that hold it; kinds are numbered from the widest.
    kinds_N = len(widths_K) - 1 - np.searchsorted(widths_K[::-1], lengths_N[order_N])
    wanted_K = np.cumsum(np.bincount(kinds_N, minlength=len(widths_K)))
    rows_up_to_K = shards * np.cumsum(rows_K)
    counts_C = np.arange((-(-wanted_K // rows_up_to_K)).max() + 1)
    # By Hall's theorem, as rows of a kind hold the sequences of all narrower kinds.
    left_C = (wanted_K - counts_C[:, None] * rows_up_to_K).max(axis=1).clip(0)
    (spare,) = layout.spare
    spares_C = -(-left_C // (shards * spare.rows))
    tokens_C = counts_C * packing.size(layout.usual) + spares_C * packing.size(layout.spare)
    count = np.argmin(tokens_C)

    free, placed, left = 0, [], []
    first_K = np.searchsorted(kinds_N, range(1, len(rows_K)))
    for rows, group in zip(rows_K, np.split(order_N, first_K)):
        free += count * shards * rows
        placed.append(group[:free])
        left.append(group[free:])
        free -= len(placed[-1])

    # The longest go to different shards' widest rows, then the next longest, ...
    dealt_RxC = _padded(placed, count * rows_up_to_K[-1]).reshape(rows_K.sum(), count * shards)
    for numbers_SxR in dealt_RxC.T.reshape(count, shards, rows_K.sum()):
        yield Batch(numbers_SxR, layout.usual)
    spares = _padded(left, spares_C[count] * shards * spare.rows)
    for numbers_SxR in spares.reshape(-1, shards, spare.rows):
        yield Batch(numbers_SxR, layout.spare)


def _padded(groups: list[np.ndarray], size: int) -> np.ndarray:
    """Joins groups of numbers and adds -1 up to a size."""
    numbers = np.concatenate(groups)
    return np.pad(numbers, (0, size - len(numbers)), constant_values=-1)


def _filled(build: Callable, numbers_R: np.ndarray) -> packing.Ragged:
    """Builds the sequences of some numbers; those of -1, which come last, have no tokens."""
    real_R = numbers_R >= 0
    ragged = build(numbers_R[real_R])
    lengths_R = np.zeros(len(numbers_R), ragged.lengths_N.dtype)
    lengths_R[real_R] = ragged.lengths_N
    return ragged._replace(lengths_N=lengths_R)
