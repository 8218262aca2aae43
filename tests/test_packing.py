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
    Shape,
    assemble,
    pack,
    plan,
    plan_flat,
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


def longest(*batches):
    """How long the j-th shortest sequence of the batches is at most."""
    return np.sort(np.array(batches, np.int64), axis=1).max(axis=0)


def flat_of(packed):
    """The blocks end to end, without `first_RxS`, and where each sequence's first token is."""
    flat = [np.concatenate([x.reshape(-1) for x in part]) for part in list(zip(*packed.blocks))[:4]]
    starts, offset = [], 0
    for block in packed.blocks:
        rows, width = block.tokens_RxT.shape
        starts.append((offset + np.arange(rows)[:, None] * width + block.first_RxS).reshape(-1))
        offset += rows * width
    return flat, np.concatenate(starts)[packed.slot_N]


def assert_every_sequence_is_at_its_place(packed, ragged):
    (tokens, types, positions, sequence), first_N = flat_of(packed)
    padding = np.ones(len(tokens), bool)
    for n, (own_tokens, own_types) in enumerate(sequences(ragged)):
        at = slice(first_N[n], first_N[n] + len(own_tokens))
        assert tokens[at].tolist() == own_tokens
        assert types[at].tolist() == own_types
        assert positions[at].tolist() == list(range(len(own_tokens)))
        assert (sequence[at] == n).all()
        assert padding[at].all(), "no two sequences overlap"
        padding[at] = False
    assert (sequence[padding] == -1).all()
    for rest in (tokens, types, positions):
        assert not rest[padding].any()


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
    shapes = [s._replace(width=s.width + slack) for s in plan(longest(lengths), max_blocks)]
    packed = pack(ragged, shapes)
    assert [block.tokens_RxT.shape for block in packed.blocks] == [s[:2] for s in shapes]
    for block in packed.blocks:
        assert {x.dtype for x in block} == {np.dtype(np.int32)}
        assert len({x.shape for x in block[:4]}) == 1
        # One sequence a row, from its first column.
        assert block.first_RxS.shape == (len(block.tokens_RxT), 1)
        assert not block.first_RxS.any()
    assert packed.slot_N.dtype == np.int32
    assert sorted(packed.slot_N) == list(range(len(lengths)))
    assert_every_sequence_is_at_its_place(packed, ragged)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=40), st.integers(0, 300))
@settings(deadline=None)
def test_sequences_lie_end_to_end_in_a_flat_row(lengths, spare):
    """Those without tokens too; the row may be longer than this batch needs."""
    ragged, shape = ragged_of(lengths), plan_flat(sum(lengths) + spare + 1, len(lengths))
    assert shape.rows == 1
    assert shape.width % 128 == shape.slots % 16 == 0
    assert shape.width - 128 <= sum(lengths) + spare < shape.width
    packed = pack(ragged, [shape])
    (block,) = packed.blocks
    assert block.tokens_RxT.shape == shape[:2]
    assert block.first_RxS.shape == (1, shape.slots)
    assert {x.dtype for x in (*block, packed.slot_N)} == {np.dtype(np.int32)}
    assert_every_sequence_is_at_its_place(packed, ragged)
    # In their order, and slots without a sequence stand on padding.
    first_S = block.first_RxS[0]
    assert (np.diff(first_S) >= 0).all()
    assert (block.sequence_RxT[0, first_S[len(lengths) :]] == -1).all()


def test_a_flat_row_that_is_full_keeps_its_slots_inside():
    packed = pack(ragged_of([100, 28, 0]), [Shape(1, 128, 16)])
    assert packed.blocks[0].first_RxS.max() == 127


def test_a_flat_row_that_does_not_suffice_is_refused():
    with pytest.raises(ValueError, match="for 2 sequences of 129 tokens"):
        pack(ragged_of([100, 29]), [Shape(1, 128, 16)])
    with pytest.raises(ValueError, match="for 17 sequences of 34 tokens"):
        pack(ragged_of([2] * 17), [Shape(1, 128, 16)])


def test_rows_of_one_width_keep_the_order_of_the_sequences():
    packed = pack(ragged_of([3, 9, 3, 2]), [Shape(4, 16)])
    assert packed.slot_N.tolist() == [1, 3, 2, 0]


def cost(shapes):
    return sum(rows * width for rows, width, _ in shapes)


def cheapest(longest_N, max_blocks):
    """The fewest tokens over every way to cut the columns into at most `max_blocks` groups."""
    widths = [-(-int(n) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE for n in longest_N]
    return min(
        sum((end - start) * widths[end - 1] for start, end in itertools.pairwise((0, *cuts, n)))
        for n in [len(widths)]
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
def test_plan_computes_few_tokens_in_few_blocks_and_every_batch_fits(batches, max_blocks):
    longest_N = longest(*batches)
    shapes = plan(longest_N, max_blocks)
    assert 1 <= len(shapes) <= max_blocks
    assert sum(shape.rows for shape in shapes) == len(longest_N)
    assert all(s.rows > 0 and s.width % WIDTH_MULTIPLE == 0 and s.slots == 1 for s in shapes)
    assert all(isinstance(x, int) for shape in shapes for x in shape), "static under jax.jit"
    widths = [shape.width for shape in shapes]
    assert widths == sorted(set(widths))
    bound = 1.01 * cheapest(longest_N, max_blocks)
    assert cost(shapes) == cheapest(longest_N, len(shapes)) <= bound
    assert len(shapes) == 1 or cheapest(longest_N, len(shapes) - 1) > bound
    for lengths in batches:
        pack(ragged_of(lengths), shapes)


def test_plan_by_hand():
    lengths = longest([10, 10, 10, 100], [20, 5, 5, 60])
    # Column by column the longest are 10, 10, 20, 100: widths 16, 16, 24, 104.
    assert plan(lengths, 1) == (Shape(4, 104),)
    assert plan(lengths, 2) == (Shape(3, 24), Shape(1, 104))
    assert plan(lengths, 3) == (Shape(2, 16), Shape(1, 24), Shape(1, 104))
    assert plan(lengths, 9) == plan(lengths, 3), "never more blocks than there are widths"


def test_pack_refuses_rows_that_do_not_match():
    ragged = ragged_of([5, 17])
    for shapes in ([Shape(1, 32)], [Shape(2, 16), Shape(1, 32)]):
        with pytest.raises(ValueError, match="rows for 2 sequences"):
            pack(ragged, shapes)
    # 32 + 16 columns are enough tokens, but the longest goes last.
    for shapes in ([Shape(2, 16)], [Shape(1, 32), Shape(1, 16)]):
        with pytest.raises(ValueError, match="longer than its row"):
            pack(ragged, shapes)
    pack(ragged_of([16, 32]), [Shape(1, 16), Shape(1, 32)])


def test_stack_adds_a_leading_axis_of_shards():
    shapes = [Shape(2, 16), Shape(1, 32)]
    parts = [pack(ragged_of(lengths), shapes) for lengths in ([3, 20, 16], [31, 1, 2])]
    stacked = stack(parts)
    assert isinstance(stacked, Packed)
    assert stacked.slot_N.tolist() == [part.slot_N.tolist() for part in parts]
    assert [block.tokens_RxT.shape for block in stacked.blocks] == [(2, 2, 16), (2, 1, 32)]
    for b, block in enumerate(stacked.blocks):
        assert isinstance(block, Block)
        for x, array in enumerate(block):
            for shard, part in enumerate(parts):
                np.testing.assert_array_equal(array[shard], part.blocks[b][x])
