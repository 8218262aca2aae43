import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rqv2_jax.data.packing import (
    WIDTH_MULTIPLE,
    Block,
    Packed,
    Piece,
    Ragged,
    assemble,
    pack,
    plan,
    stack,
)


def ragged_of(lengths, seed=0):
    """Sequences of random tokens, 0 (what padding is filled with) among them, and random types."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, sum(lengths)).astype(np.int32)
    return Ragged(
        tokens, rng.integers(0, 2, len(tokens)).astype(np.int32), np.array(lengths, np.int64)
    )


def sequences(ragged):
    """(tokens, types) of each sequence as lists."""
    cuts = np.cumsum(ragged.lengths_N)[:-1]
    return [
        (tokens.tolist(), types.tolist())
        for tokens, types in zip(np.split(ragged.tokens, cuts), np.split(ragged.types, cuts))
    ]


def sorted_lengths(*batches):
    return np.sort(np.array(batches, np.int64), axis=1)


@st.composite
def pieces_and_sequences(draw):
    """Pieces, and the (tokens, types) they stand for, joined in plain Python."""
    count = draw(st.integers(1, 6))
    pieces, expected = [], [([], []) for _ in range(count)]
    for _ in range(draw(st.integers(1, 4))):
        source = draw(st.lists(st.integers(0, 2**16 - 1), max_size=8))
        spans = [sorted(draw(st.tuples(*2 * [st.integers(0, len(source))]))) for _ in range(count)]
        kind = draw(st.integers(0, 1))
        starts_N, ends_N = np.array(spans, np.int64).T
        pieces.append(Piece(np.array(source, np.uint16), starts_N, ends_N - starts_N, kind))
        for (tokens, types), (start, end) in zip(expected, spans):
            tokens += source[start:end]
            types += [kind] * (end - start)
    return pieces, expected


@given(pieces_and_sequences())
@settings(deadline=None)
def test_assemble_joins_the_pieces_of_each_sequence(case):
    pieces, expected = case
    ragged = assemble(pieces)
    assert ragged.tokens.dtype == ragged.types.dtype == np.int32
    assert ragged.lengths_N.tolist() == [len(tokens) for tokens, _ in expected]
    assert sequences(ragged) == expected


@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=14),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_every_sequence_comes_back_from_its_place(lengths, max_blocks, slack, seed):
    ragged = ragged_of(lengths, seed)
    # Rows may be wider than this batch needs: other batches need them.
    shapes = [(r, w + slack) for r, w in plan(sorted_lengths(lengths), max_blocks)]
    packed = pack(ragged, shapes)
    assert [block.tokens_RxT.shape for block in packed.blocks] == shapes
    for block in packed.blocks:
        assert {x.dtype for x in block} == {np.dtype(np.int32)}
        assert len({x.shape for x in block}) == 1
    assert packed.first_N.dtype == np.int32

    flat = Block(*(np.concatenate([x.reshape(-1) for x in part]) for part in zip(*packed.blocks)))
    row_starts = np.cumsum([0, *itertools.chain(*([w] * r for r, w in shapes))])[:-1]
    # One sequence a row, from its first column.
    assert sorted(packed.first_N) == row_starts.tolist()
    padding = np.ones(len(flat.tokens_RxT), bool)
    for n, (tokens, types) in enumerate(sequences(ragged)):
        at = slice(packed.first_N[n], packed.first_N[n] + len(tokens))
        assert flat.tokens_RxT[at].tolist() == tokens
        assert flat.types_RxT[at].tolist() == types
        assert flat.positions_RxT[at].tolist() == list(range(len(tokens)))
        assert (flat.sequence_RxT[at] == n).all()
        assert padding[at].all(), "no two sequences overlap"
        padding[at] = False
    assert (flat.sequence_RxT[padding] == len(lengths)).all()
    for rest in flat[:3]:
        assert not rest[padding].any()


def test_rows_of_one_width_keep_the_order_of_the_sequences():
    packed = pack(ragged_of([3, 9, 3, 2]), [(4, 16)])
    assert packed.first_N.tolist() == [16, 48, 32, 0]


def cost(shapes):
    return sum(rows * width for rows, width in shapes)


def cheapest(sorted_BxN, max_blocks):
    """The fewest tokens over every way to cut the columns into at most `max_blocks` groups."""
    longest = [-(-int(n) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE for n in sorted_BxN.max(axis=0)]
    return min(
        sum((end - start) * longest[end - 1] for start, end in itertools.pairwise((0, *cuts, n)))
        for n in [len(longest)]
        for groups in range(1, min(max_blocks, n) + 1)
        for cuts in itertools.combinations(range(1, n), groups - 1)
    )


@given(
    st.integers(1, 8).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(1, 130), min_size=n, max_size=n), min_size=1, max_size=4
        )
    ),
    st.integers(1, 5),
)
@settings(deadline=None, max_examples=300)
@example([[1, 16, 17, 32, 33]], 5)
@example([[40, 1, 1, 1], [5, 50, 50, 1]], 2)
@example([[16] * 5], 3)
def test_plan_computes_the_fewest_tokens_and_every_batch_fits(batches, max_blocks):
    sorted_BxN = sorted_lengths(*batches)
    shapes = plan(sorted_BxN, max_blocks)
    assert 1 <= len(shapes) <= max_blocks
    assert sum(rows for rows, _ in shapes) == sorted_BxN.shape[1]
    assert all(rows > 0 and width % 16 == 0 for rows, width in shapes)
    assert all(isinstance(x, int) for shape in shapes for x in shape), "static under jax.jit"
    widths = [width for _, width in shapes]
    assert widths == sorted(set(widths))
    assert cost(shapes) == cheapest(sorted_BxN, max_blocks)
    for lengths in batches:
        pack(ragged_of(lengths), shapes)


def test_plan_by_hand():
    lengths = sorted_lengths([10, 10, 10, 100], [20, 5, 5, 60])
    # Column by column the longest are 10, 10, 20, 100: widths 16, 16, 32, 112.
    assert plan(lengths, 1) == ((4, 112),)
    assert plan(lengths, 2) == ((3, 32), (1, 112))
    assert plan(lengths, 3) == ((2, 16), (1, 32), (1, 112))
    assert plan(lengths, 9) == plan(lengths, 3), "never more blocks than there are widths"


def test_pack_refuses_rows_that_do_not_match():
    ragged = ragged_of([5, 17])
    for shapes in ([(1, 32)], [(2, 16), (1, 32)]):
        with pytest.raises(ValueError, match="rows for 2 sequences"):
            pack(ragged, shapes)
    # 32 + 16 columns are enough tokens, but the longest goes last.
    for shapes in ([(2, 16)], [(1, 32), (1, 16)]):
        with pytest.raises(ValueError, match="longer than its row"):
            pack(ragged, shapes)
    pack(ragged_of([16, 32]), [(1, 16), (1, 32)])


def test_stack_adds_a_leading_axis_of_shards():
    shapes = [(2, 16), (1, 32)]
    parts = [pack(ragged_of(lengths), shapes) for lengths in ([3, 20, 16], [31, 1, 2])]
    stacked = stack(parts)
    assert isinstance(stacked, Packed)
    assert stacked.first_N.tolist() == [part.first_N.tolist() for part in parts]
    assert [block.tokens_RxT.shape for block in stacked.blocks] == [(2, 2, 16), (2, 1, 32)]
    for b, block in enumerate(stacked.blocks):
        assert isinstance(block, Block)
        for x, array in enumerate(block):
            for shard, part in enumerate(parts):
                np.testing.assert_array_equal(array[shard], part.blocks[b][x])
