"""Batches through tf.data: batch s is a function of (lists, s), so a step number resumes a run.

Every leaf has a leading axis that counts parts, the same number for each device; no list is divided
between parts.

Shape suffixes: S parts of the batch (in `balance`, halves of batches), O parts made here, L lists of
the run in the order of training, P passages of a list, B lists of a part (of a batch where no S or O
precedes), C lists that get labels, N sequences or pairs, T steps, W widths, M exchanged pairs.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rqv2_jax import optional
from rqv2_jax.data import packing
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.lists import Lists
from rqv2_jax.data.packing import Ragged
from rqv2_jax.data.tokens import Queries, Store
from rqv2_jax.errors import InputError

# Lists that change places with each other, and whose lengths are computed at once.
WINDOW = 2**14
# Rounds of such changes.
EXCHANGES = 400

# The kinds of input that each model reads.
READS = {"retriever": ("queries", "passages"), "reranker": ("pairs",)}
KINDS = (*READS["retriever"], *READS["reranker"])


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How many lists a batch has, the parts it is computed in, and the rows that hold its sequences."""

    batch: int  # lists of a batch
    shards: int  # of devices; if they do not divide the batch, some hold lists without passages
    accumulate: int  # parts of a shard, computed one after the other; must divide `batch`
    made_here: Sequence[int]  # numbers of the parts that this host makes
    max_blocks: int  # most shapes for one kind of input, with a row for each sequence
    flat: bool  # whether all sequences of a part lie end to end in one row instead


class ListBatches:
    """The batches of a run: lists in order, `batch` a step, each model's inputs packed.

    Args:
      lists: all lists of the run; those beyond the last full batch are left out. Within a window of
        `WINDOW` lists they change places so that all batches need rows of the same widths.
      models: which inputs to build: "retriever" (queries and passages), "reranker" (pairs), or both.
      in_batch: also labels over all passages of the batch, other positives of a query masked out.

    A batch is a dict: `queries`, `passages`, `pairs` (`packing.Packed`), `positive` and `where`
    [O, B, P], and with `in_batch` the same two over all lists of the batch, `in_batch_positive` and
    `in_batch_where` [O, B, S*B*P].
    """

    def __init__(
        self,
        store: Store,
        queries: Queries,
        inputs: Inputs,
        lists: Lists,
        layout: BatchLayout,
        *,
        models: tuple[str, ...],
        in_batch: bool,
    ):
        batch, count = layout.batch, len(lists.query_rows_L)
        if batch % layout.accumulate:
            raise InputError(
                f"a batch of {batch} lists cannot be computed in {layout.accumulate} equal parts; "
                "make the stage's accumulate a divisor of its batch"
            )
        if count < batch:
            raise InputError(
                f"the stage has {count} lists, fewer than one batch of {batch}; "
                "lower the stage's batch or raise its epochs"
            )
        self.store, self.queries, self.inputs = store, queries, inputs
        self.batch, self.in_batch = batch, in_batch
        self.slots_SxB = slots(batch, layout.shards, layout.accumulate)
        self.made_O = np.array(layout.made_here)
        self.steps = count // batch
        self.lists = self._balanced(lists)
        self.positive_LxP = self.lists.positive()
        if in_batch:
            query_N, passage_N = queries.never_negative()
            rows = np.append(passage_N, lists.passages_LxP)
            # A passage with the text of a positive under another id is no negative either.
            self.text_N = store.same_text(rows, inputs.titles)
            self.never_negative_2xN = np.stack([query_N, self.text_N[passage_N]])
        if not (self.positive_LxP[:, 0].all() and (self.positive_LxP.sum(axis=1) == 1).all()):
            raise ValueError("a list does not have its one positive first")
        self.shapes = {kind: self._plan(kind, layout) for model in models for kind in READS[model]}

    def _lengths(self, kind: str, lists: Lists) -> np.ndarray:
        """Returns the lengths of lists' sequences of a kind [L, 1 or P]."""
        queries_Lx1, passages_LxP = lists.query_rows_L[:, None], lists.passages_LxP
        if kind == "queries":
            return self.inputs.query_lengths(self.queries.texts, queries_Lx1)
        if kind == "passages":
            return self.inputs.passage_lengths(self.store, passages_LxP)
        return self.inputs.pair_lengths(self.store, self.queries.texts, queries_Lx1, passages_LxP)

    def _balanced(self, lists: Lists) -> Lists:
        order = []
        for rows_L in self._windows():
            # All kinds, so that the batches do not depend on the models that are trained.
            lengths = [self._lengths(kind, lists.take(rows_L)) for kind in KINDS]
            order.append(rows_L[balance(lengths, self.batch)])
        return lists.take(np.concatenate(order))

    def _windows(self) -> list[np.ndarray]:
        """Returns the numbers of the lists of each window."""
        size, total = max(WINDOW // self.batch, 1) * self.batch, self.steps * self.batch
        return [np.arange(first, min(first + size, total)) for first in range(0, total, size)]

    def _plan(self, kind: str, layout: BatchLayout) -> tuple[packing.Shape, ...]:
        """Returns the shapes that hold this kind of input of all parts."""
        longest_N, tokens = np.zeros(1, np.int64), 0
        for rows_L in self._windows():
            lengths_LxN = self._lengths(kind, self.lists.take(rows_L))
            lengths_BxN = by_part(lengths_LxN, self.batch, self.slots_SxB)
            longest_N = np.maximum(longest_N, np.sort(lengths_BxN, axis=1).max(axis=0))
            tokens = max(tokens, int(lengths_BxN.sum(axis=1).max()))
        if layout.flat:
            return (packing.plan_flat(tokens, len(longest_N)),)
        return packing.plan(longest_N, layout.max_blocks)

    def make(self, step: int) -> dict:
        """Makes batch number `step` as numpy arrays."""
        rows_SxB = step * self.batch + self.slots_SxB.clip(0)
        rows_OxB = rows_SxB[self.made_O]
        packed = {
            kind: packing.stack(
                [packing.pack(self._ragged(kind, rows_B), shapes) for rows_B in rows_OxB]
            )
            for kind, shapes in self.shapes.items()
        }
        real_SxB = self.slots_SxB >= 0
        real_OxBx1 = real_SxB[self.made_O][..., None]
        positive_OxBxP = self.positive_LxP[rows_OxB] & real_OxBx1
        labels = {"positive": positive_OxBxP, "where": np.ones_like(positive_OxBxP) & real_OxBx1}
        if self.lists.teacher_LxP is not None:
            labels["teacher"] = self.lists.teacher_LxP[rows_OxB]
        if self.in_batch:
            rows_N = rows_SxB.reshape(-1)
            passages_NxP = self.text_N[self.lists.passages_LxP[rows_N]]
            made_N = np.arange(len(rows_N)).reshape(rows_SxB.shape)[self.made_O].reshape(-1)
            in_batch = in_batch_labels(
                self.lists.query_rows_L[rows_N], passages_NxP, self.never_negative_2xN, made_N
            )
            real_N = real_SxB.reshape(-1).repeat(passages_NxP.shape[1])
            for name, label_BxN in zip(("in_batch_positive", "in_batch_where"), in_batch):
                labels[name] = label_BxN.reshape(*real_OxBx1.shape[:2], -1) & real_OxBx1 & real_N
        return packed | labels

    def ragged(self, kind: str, step: int) -> Ragged:
        """Returns one kind of input of all parts of batch number `step`."""
        return self._ragged(kind, np.arange(step * self.batch, (step + 1) * self.batch))

    def _ragged(self, kind: str, rows_B: np.ndarray) -> Ragged:
        queries_B, passages_BxP = self.lists.query_rows_L[rows_B], self.lists.passages_LxP[rows_B]
        if kind == "queries":
            return self.inputs.queries(self.queries.texts, queries_B)
        if kind == "passages":
            return self.inputs.passages(self.store, passages_BxP.reshape(-1))
        repeated = queries_B.repeat(passages_BxP.shape[1])
        return self.inputs.pairs(self.store, self.queries.texts, repeated, passages_BxP.reshape(-1))

    def stream(self, first_step: int) -> Iterator[dict]:
        """Yields the batches from `first_step` on, made ahead of time by tf.data threads."""
        tf = optional.tensorflow("the stream of training batches")
        example = self.make(first_step)
        flat = tf.nest.flatten(example)

        def load(step: Any) -> list[Any]:
            arrays = tf.numpy_function(
                lambda s: tf.nest.flatten(self.make(int(s))), [step], [x.dtype for x in flat]
            )
            for array, x in zip(arrays, flat):
                array.set_shape(x.shape)
            return arrays

        dataset = (
            tf.data.Dataset.range(first_step, self.steps)
            .map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            .prefetch(2)
        )
        for arrays in dataset.as_numpy_iterator():
            yield tf.nest.pack_sequence_as(example, arrays)


def balance(lengths: Sequence[np.ndarray], batch: int) -> np.ndarray:
    """Returns an order of lists [L] whose batches hold about equally many sequences of any length.

    `lengths` has the lengths of lists' sequences [L, N], for every kind of input; `batch` divides L.
    The batch with the most sequences of a length sets the number of rows of that width. As parts of a
    batch may be computed apart, batches are halved as long as that leaves undivided lists and 32
    sequences of a kind, and the halves are made alike: lists of two halves change places if that lowers
    their summed excess, the fourth power of how far each exceeds the mean number of sequences longer
    than a width, summed over the widths.
    """
    size = batch
    while size % 2 == 0 and size // 2 * max(x.shape[1] for x in lengths) >= 32:
        size //= 2
    # How many of a list's sequences are too long for each width.
    longer_LxW = np.concatenate(
        [
            (x[..., None] > np.arange(0, x.max(), packing.WIDTH_MULTIPLE)).sum(axis=1)
            for x in lengths
        ],
        axis=1,
        dtype=np.float32,
    )
    order_SxB = np.arange(len(longer_LxW)).reshape(-1, size)
    longer_SxW = longer_LxW[order_SxB].sum(axis=1)
    mean_W = longer_SxW.mean(axis=0)

    def excess(longer_SxW: np.ndarray) -> np.ndarray:
        # A high power, as the part that exceeds most sets the number of rows.
        return (((longer_SxW - mean_W).clip(0) ** 2) ** 2).sum(axis=-1)

    excess_S, rng = excess(longer_SxW), np.random.default_rng(0)
    for _ in range(EXCHANGES):
        pairs_2xN = rng.permutation(len(order_SxB))[: len(order_SxB) // 2 * 2].reshape(2, -1)
        places_2xN = rng.integers(0, size, pairs_2xN.shape)
        lists_2xN = order_SxB[pairs_2xN, places_2xN]
        gain_NxW = longer_LxW[lists_2xN[1]] - longer_LxW[lists_2xN[0]]
        changed = longer_SxW[pairs_2xN] + np.stack([gain_NxW, -gain_NxW])
        excess_2xN = excess(changed)
        better_N = excess_2xN.sum(axis=0) < excess_S[pairs_2xN].sum(axis=0)
        pairs_2xM = pairs_2xN[:, better_N]
        order_SxB[pairs_2xM, places_2xN[:, better_N]] = lists_2xN[::-1, better_N]
        longer_SxW[pairs_2xM], excess_S[pairs_2xM] = changed[:, better_N], excess_2xN[:, better_N]
    return order_SxB.reshape(-1)


def slots(batch: int, shards: int, accumulate: int) -> np.ndarray:
    """Returns which list of a batch each slot of each part holds [S, B], or -1 for none.

    Part `s * accumulate + k` is the k-th of shard s. The k-th parts of all shards together hold an
    equal share of the batch, so that the mean over k of their means is the mean over the batch.
    """
    per_step = batch // accumulate
    size = -(-per_step // shards)
    numbers = np.full((accumulate, shards * size), -1)
    numbers[:, :per_step] = np.arange(batch).reshape(accumulate, per_step)
    return numbers.reshape(accumulate, shards, size).swapaxes(0, 1).reshape(-1, size)


def by_part(lengths_LxN: np.ndarray, batch: int, slots_SxB: np.ndarray) -> np.ndarray:
    """Returns the lengths of the sequences in each part of each batch [steps * S, B * N].

    A slot without a list has the lengths of the batch's first list.
    """
    lengths_TxBxN = lengths_LxN.reshape(-1, batch, lengths_LxN.shape[1])
    return lengths_TxBxN[:, slots_SxB.clip(0)].reshape(len(lengths_TxBxN) * len(slots_SxB), -1)


def in_batch_labels(
    queries_B: np.ndarray,
    passages_BxP: np.ndarray,
    never_negative_2xN: np.ndarray,
    chosen_C: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns positives and valid passages [C, B*P] when each query ranks every passage of the batch.

    Only the lists numbered `chosen_C`, of the batch's B, get a row. The positive is the first passage
    of the list. Every other passage that is no negative of the query, or the positive of another of
    its lists, is left out, in all lists.
    """
    passages_N = passages_BxP.reshape(-1)
    heads_C = chosen_C * passages_BxP.shape[1]
    positive_CxN = np.zeros((len(chosen_C), len(passages_N)), bool)
    positive_CxN[np.arange(len(chosen_C)), heads_C] = True
    where_CxN = np.ones_like(positive_CxN)
    for c, query in enumerate(queries_B[chosen_C]):
        first, last = np.searchsorted(never_negative_2xN[0], [query, query + 1])
        heads = passages_BxP[queries_B == query, 0]
        barred = np.append(never_negative_2xN[1, first:last], heads)
        where_CxN[c] = ~np.isin(passages_N, barred)
    return positive_CxN, where_CxN | positive_CxN
