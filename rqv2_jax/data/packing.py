"""Token sequences to dense blocks of a few fixed shapes, all in vectorised numpy.

Shape suffixes: N sequences, R rows of a block, T its width, B batches (or shards of batches).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH_MULTIPLE = 16


class Block(NamedTuple):
    """Rows of one width. A row holds one sequence or several; int32 throughout.

    `sequence_RxT` is the number of the sequence a token belongs to, or N on padding: it keeps
    attention inside a sequence and tells mean pooling which tokens to average. Positions restart at 0
    with every sequence.
    """

    tokens_RxT: np.ndarray
    types_RxT: np.ndarray
    positions_RxT: np.ndarray
    sequence_RxT: np.ndarray


class Packed(NamedTuple):
    """N sequences: blocks, and where each sequence's first token is once all blocks are flattened.

    If there are N rows, each holds one sequence, from the row's start on. With any other number of
    rows, sequences share them.
    """

    blocks: tuple[Block, ...]
    first_N: np.ndarray


class Ragged(NamedTuple):
    """N token sequences end to end: tokens and type numbers, and each sequence's length."""

    tokens: np.ndarray
    types: np.ndarray
    lengths_N: np.ndarray


class Piece(NamedTuple):
    """Part of every sequence: `source[starts_N : starts_N + lengths_N]`, with one type number."""

    source: np.ndarray
    starts_N: np.ndarray
    lengths_N: np.ndarray
    type: int


def _ranges(starts_N, lengths_N):
    """The numbers starts_N[i] .. starts_N[i] + lengths_N[i] - 1 for every i, end to end."""
    ends_N = np.cumsum(lengths_N)
    total = ends_N[-1] if len(ends_N) else 0
    return np.arange(total) + np.repeat(starts_N - (ends_N - lengths_N), lengths_N)


def assemble(pieces: Sequence[Piece]) -> Ragged:
    """Joins the pieces of each sequence in their order."""
    lengths_N = np.sum([piece.lengths_N for piece in pieces], axis=0)
    tokens = np.empty(lengths_N.sum(), np.int32)
    types = np.empty_like(tokens)
    cursor_N = np.cumsum(lengths_N) - lengths_N
    for piece in pieces:
        to = _ranges(cursor_N, piece.lengths_N)
        tokens[to] = piece.source[_ranges(piece.starts_N, piece.lengths_N)]
        types[to] = piece.type
        cursor_N = cursor_N + piece.lengths_N
    return Ragged(tokens, types, lengths_N)


def plan(sorted_lengths_BxN: np.ndarray, max_blocks: int) -> tuple[tuple[int, int], ...]:
    """At most `max_blocks` shapes (rows, width) that hold every batch, one sequence a row.

    `sorted_lengths_BxN` holds each batch's lengths in ascending order, so column j says how long the
    j-th shortest sequence may be; widths are multiples of 16. Of all ways to cut the sorted
    sequences into groups this is the one that computes the fewest tokens.
    """
    longest_N = sorted_lengths_BxN.max(axis=0)
    envelope_N = -(-longest_N // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    widths, last = np.unique(envelope_N[::-1], return_index=True)
    ends = len(envelope_N) - last  # one past the last sequence that fits in each width
    # best[k][i]: fewest tokens for the first ends[i] sequences in k blocks, and the cut before them.
    best = [{-1: (0, -1)}]
    for _ in range(max_blocks):
        row = {-1: (0, -1)}
        for i in range(len(ends)):
            row[i] = min(
                (best[-1][j][0] + (ends[i] - (ends[j] if j >= 0 else 0)) * widths[i], j)
                for j in best[-1]
                if j < i
            )
        best.append(row)
    shapes, i = [], len(ends) - 1
    for row in reversed(best[1:]):
        if i < 0:
            break
        j = row[i][1]
        shapes.append((int(ends[i] - (ends[j] if j >= 0 else 0)), int(widths[i])))
        i = j
    return tuple(reversed(shapes))


def pack(ragged: Ragged, shapes: Sequence[tuple[int, int]]) -> Packed:
    """Lays the sequences, shortest first, into blocks of the given (rows, width) shapes.

    Raises:
      ValueError: the rows are not as many as the sequences, or a sequence is longer than its row.
    """
    count = len(ragged.lengths_N)
    rows = np.array([r for r, _ in shapes])
    widths = np.array([w for _, w in shapes])
    if rows.sum() != count:
        raise ValueError(f"{rows.sum()} rows for {count} sequences")
    order_N = np.argsort(ragged.lengths_N, kind="stable")
    row_starts_N = np.concatenate([[0], np.cumsum(np.repeat(widths, rows))])
    if np.any(ragged.lengths_N[order_N] > np.repeat(widths, rows)):
        raise ValueError("a sequence is longer than its row")
    first_N = np.empty(count, np.int32)
    first_N[order_N] = row_starts_N[:-1]

    flat_tokens, flat_types, flat_positions = np.zeros((3, row_starts_N[-1]), np.int32)
    flat_sequence = np.full(row_starts_N[-1], count, np.int32)
    to = _ranges(first_N, ragged.lengths_N)
    flat_tokens[to] = ragged.tokens
    flat_types[to] = ragged.types
    flat_positions[to] = _ranges(np.zeros(count, np.int64), ragged.lengths_N)
    flat_sequence[to] = np.repeat(np.arange(count), ragged.lengths_N)

    blocks, start = [], 0
    for r, w in shapes:
        part = slice(start, start + r * w)
        flats = (flat_tokens, flat_types, flat_positions, flat_sequence)
        blocks.append(Block(*(flat[part].reshape(r, w) for flat in flats)))
        start += r * w
    return Packed(tuple(blocks), first_N)


def stack(parts: Sequence[Packed]) -> Packed:
    """One shard after the other along a new leading axis; all have the same shapes."""
    blocks = tuple(
        Block(*(np.stack(arrays) for arrays in zip(*blocks)))
        for blocks in zip(*(part.blocks for part in parts))
    )
    return Packed(blocks, np.stack([part.first_N for part in parts]))
