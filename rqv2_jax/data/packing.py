"""Packing of token sequences into dense blocks of a few fixed shapes, in vectorised numpy.

Shape suffixes: N sequences, R rows of a block, T its width, S sequences a row may hold, B batches (or
shards of batches).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

WIDTH_MULTIPLE = 8
SLACK = 1.01
# A flat row's width in tokens, and the number of sequences it may hold, are multiples of these.
FLAT_TOKENS, FLAT_SLOTS = 128, 16


Array: TypeAlias = Any  # of NumPy or, in a compiled function, of JAX


class Shape(NamedTuple):
    """R, T and S of a block: a row for every sequence (S = 1), or one flat row for all of them."""

    rows: int
    width: int
    slots: int = 1


class Block(NamedTuple):
    """Rows of one width. A row holds one sequence, or a flat one all; int32 throughout.

    `sequence_RxT` is the number of the sequence a token belongs to, or -1 on padding: it keeps
    attention inside a sequence and tells mean pooling which tokens to average. Positions restart at 0
    with every sequence. `first_RxS` is the column of each sequence's first token; where a row holds
    fewer than S, that of padding.
    """

    tokens_RxT: Array
    types_RxT: Array
    positions_RxT: Array
    sequence_RxT: Array
    first_RxS: Array


class Packed(NamedTuple):
    """N sequences: blocks, and which entry of all blocks' flattened `first_RxS` each sequence is."""

    blocks: tuple[Block, ...]
    slot_N: Array


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


def _ranges(starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """Returns the numbers starts_N[i] .. starts_N[i] + lengths_N[i] - 1 for every i, end to end."""
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


def plan(longest_N: np.ndarray, max_blocks: int) -> tuple[Shape, ...]:
    """Returns at most `max_blocks` shapes that hold every batch, one sequence a row.

    `longest_N` says how long the j-th shortest sequence of a batch may be; widths are multiples of 8.
    Of all ways to cut the sorted sequences into groups this one has the fewest groups that compute no
    more than 1% above the fewest tokens: every block of a batch takes time to compile.
    """
    envelope_N = -(-longest_N // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    widths, last = np.unique(envelope_N[::-1], return_index=True)
    # The number of sequences that fit in each width, after 0.
    ends = [0, *(len(envelope_N) - last).tolist()]
    # best[k][i]: fewest tokens for the first ends[i] sequences in k blocks, and the cut before them.
    best = [{0: (0, 0)}]
    for _ in range(max_blocks):
        row = {0: (0, 0)}
        for i in range(1, len(ends)):
            row[i] = min(
                (best[-1][j][0] + (ends[i] - ends[j]) * widths[i - 1], j) for j in best[-1] if j < i
            )
        best.append(row)
    shapes, i = [], len(ends) - 1
    enough = next(k for k in range(1, max_blocks + 1) if best[k][i][0] <= SLACK * best[-1][i][0])
    for row in reversed(best[1 : enough + 1]):
        if i > 0:
            j = row[i][1]
            shapes.append(Shape(ends[i] - ends[j], int(widths[i - 1])))
            i = j
    return tuple(reversed(shapes))


def size(shapes: Sequence[Shape]) -> int:
    """Returns the number of tokens, padding included, in blocks of these shapes."""
    return sum(shape.rows * shape.width for shape in shapes)


def plan_flat(tokens: int, sequences: int) -> Shape:
    """Returns the shape of one row that holds so many sequences, with this many tokens, end to end."""
    width, slots = -(-tokens // FLAT_TOKENS) * FLAT_TOKENS, -(-sequences // FLAT_SLOTS) * FLAT_SLOTS
    return Shape(1, width, slots)


def pack(ragged: Ragged, shapes: Sequence[Shape]) -> Packed:
    """Lays the sequences into blocks: a row each, shortest first, or end to end into one flat row.

    Raises ValueError if the rows do not hold them, or are not as many.
    """
    count = len(ragged.lengths_N)
    if shapes[0].slots > 1:
        (shape,), ends_N = shapes, np.cumsum(ragged.lengths_N)
        if ends_N[-1] > shape.width or count > shape.slots:
            raise ValueError(f"{shape} for {count} sequences of {ends_N[-1]} tokens")
        start_N, slot_N = ends_N - ragged.lengths_N, np.arange(count)
        # Sequences without tokens may begin behind the last token, where empty slots point.
        first_S = np.full(shape.slots, min(ends_N[-1], shape.width - 1))
        first_S[:count] = start_N.clip(max=shape.width - 1)
    else:
        widths = np.repeat([shape.width for shape in shapes], [shape.rows for shape in shapes])
        if len(widths) != count:
            raise ValueError(f"{len(widths)} rows for {count} sequences")
        order_N = np.argsort(ragged.lengths_N, kind="stable")
        if np.any(ragged.lengths_N[order_N] > widths):
            raise ValueError("a sequence is longer than its row")
        start_N, slot_N = np.empty((2, count), np.int64)
        start_N[order_N] = np.cumsum(widths) - widths
        slot_N[order_N] = np.arange(count)
        first_S = np.zeros(count, np.int64)

    flat_tokens, flat_types, flat_positions = np.zeros((3, size(shapes)), np.int32)
    flat_sequence = np.full(size(shapes), -1, np.int32)
    to = _ranges(start_N, ragged.lengths_N)
    flat_tokens[to] = ragged.tokens
    flat_types[to] = ragged.types
    flat_positions[to] = _ranges(np.zeros(count, np.int64), ragged.lengths_N)
    flat_sequence[to] = np.repeat(np.arange(count), ragged.lengths_N)
    flat_first = first_S.astype(np.int32)

    blocks, start, slot = [], 0, 0
    for rows, width, slots in shapes:
        part = slice(start, start + rows * width)
        flats = (flat_tokens, flat_types, flat_positions, flat_sequence)
        arrays = [flat[part].reshape(rows, width) for flat in flats]
        arrays.append(flat_first[slot : slot + rows * slots].reshape(rows, slots))
        blocks.append(Block(*arrays))
        start, slot = part.stop, slot + rows * slots
    return Packed(tuple(blocks), slot_N.astype(np.int32))


def stack(parts: Sequence[Packed]) -> Packed:
    """Stacks shards along a new leading axis; all have the same shapes."""
    blocks = tuple(
        Block(*(np.stack(arrays) for arrays in zip(*blocks)))
        for blocks in zip(*(part.blocks for part in parts))
    )
    return Packed(blocks, np.stack([part.slot_N for part in parts]))
