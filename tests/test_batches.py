import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rqv2_jax.data import batches as batches_lib
from rqv2_jax.data.batches import BatchLayout, ListBatches, in_batch_labels
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.lists import Lists, Provenance
from rqv2_jax.data.packing import Packed, plan
from rqv2_jax.data.tokens import Queries, Store, Texts
from rqv2_jax.errors import InputError

BATCH, PASSAGES = 4, 3
INPUTS = Inputs(
    cls=1,
    sep=2,
    pair_cls=1,
    pair_sep=2,
    titles=True,
    passage_format="title_sep_text",
    query_prompt=(),
    passage_prompt=(),
    query_length=12,
    passage_length=40,
    pair_length=48,
)


def texts_of(count, longest, rng, first):
    """Texts of which no two share a token."""
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, longest, count))])
    return Texts(np.arange(first, first + offsets[-1]), offsets)


def world(*, lists=18, passages_per_list=PASSAGES, seed=0):
    """A store, queries with labels, and lists in which queries and passages come again."""
    rng = np.random.default_rng(seed)
    store = Store(
        titles=texts_of(30, 8, rng, 1_000),
        texts=texts_of(30, 60, rng, 10_000),
        passage_ids=[str(i) for i in range(30)],
        splits={},
        fingerprint="",
    )
    qrels_3xN = np.array([(q, p, 1) for q in range(9) for p in rng.permutation(30)[:4]]).T
    qrels_3xN = qrels_3xN[:, rng.permutation(qrels_3xN.shape[1])]
    qrels_3xN[2, ::5] = 0
    queries = Queries(texts_of(9, 15, rng, 100_000), [str(i) for i in range(9)], qrels_3xN)
    passages_LxP = np.array([rng.permutation(30)[:passages_per_list] for _ in range(lists)])
    provenance_LxP = np.full(passages_LxP.shape, Provenance.DENOISED_NEGATIVE)
    provenance_LxP[:, 0] = rng.integers(0, 2, lists)
    query_rows_L = rng.integers(0, 9, lists)
    return store, queries, Lists(query_rows_L, passages_LxP, provenance_LxP)


def batches_of(store, queries, lists, **changed):
    given = dict(models=("retriever", "reranker"), in_batch=False)
    given |= {name: changed.pop(name) for name in given.keys() & changed.keys()}
    layout = dict(batch=BATCH, shards=1, accumulate=1, max_blocks=3, flat=False) | changed
    layout.setdefault("made_here", range(layout["shards"] * layout["accumulate"]))
    return ListBatches(store, queries, INPUTS, lists, BatchLayout(**layout), **given)


def leaves(batch):
    """{name: array} of everything in a batch."""
    flat = {}
    for name, value in batch.items():
        if isinstance(value, Packed):
            flat[f"{name}.slot"] = value.slot_N
            for b, block in enumerate(value.blocks):
                flat |= {f"{name}.{b}.{x}": array for x, array in block._asdict().items()}
        else:
            flat[name] = value
    return flat


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert list(a) == list(b)
    for name, array in a.items():
        assert array.dtype == b[name].dtype, name
        np.testing.assert_array_equal(array, b[name], err_msg=name)


def recovered(packed):
    """[part][sequence] -> (tokens, types) as the model finds them, from the sequence's first token."""
    parts = []
    for part, slot_N in enumerate(packed.slot_N):
        flat = [
            np.concatenate([getattr(block, x)[part].reshape(-1) for block in packed.blocks])
            for x in ("tokens_RxT", "types_RxT", "positions_RxT", "sequence_RxT")
        ]
        tokens, types, positions, sequence = flat
        widths = np.repeat(*np.array([b.tokens_RxT.shape[:0:-1] for b in packed.blocks]).T)
        first_RxS = np.concatenate([block.first_RxS[part] for block in packed.blocks])
        first_N = ((np.cumsum(widths) - widths)[:, None] + first_RxS).reshape(-1)[slot_N]
        parts.append([])
        for n, first in enumerate(first_N):
            end = first + (sequence == n).sum()
            assert (sequence[first:end] == n).all()
            assert positions[first:end].tolist() == list(range(end - first))
            parts[-1].append((tokens[first:end].tolist(), types[first:end].tolist()))
    return parts


def alone(ragged):
    return ragged.tokens.tolist(), ragged.types.tolist()


def expected_sequences(store, queries, query, passages):
    """What one list is made of, each sequence built alone."""
    query = np.array([query])
    rows = [np.array([p]) for p in passages]
    return {
        "queries": [alone(INPUTS.queries(queries.texts, query))],
        "passages": [alone(INPUTS.passages(store, row)) for row in rows],
        "pairs": [alone(INPUTS.pairs(store, queries.texts, query, row)) for row in rows],
    }


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_every_passage_of_a_list_is_at_its_place(parts, flat):
    store, queries, lists = world()
    batches = batches_of(store, queries, lists, shards=parts, flat=flat)
    assert batches.steps == 4
    # The lists of the first four batches, in another order.
    lists, given = batches.lists, lists
    assert sorted(map(str, zip(lists.query_rows_L, lists.passages_LxP.tolist()))) == sorted(
        map(str, zip(given.query_rows_L[:16], given.passages_LxP[:16].tolist()))
    )
    seen = 0
    for step in range(batches.steps):
        batch = batches.make(step)
        found = {kind: recovered(batch[kind]) for kind in ("queries", "passages", "pairs")}
        per_part = BATCH // parts
        assert all(len(x) == parts for x in found.values())
        for part, b in itertools.product(range(parts), range(per_part)):
            row = step * BATCH + part * per_part + b
            wanted = expected_sequences(
                store, queries, lists.query_rows_L[row], lists.passages_LxP[row]
            )
            for kind, sequences in wanted.items():
                here = slice(b * len(sequences), (b + 1) * len(sequences))
                assert found[kind][part][here] == sequences, (kind, row)
            assert batch["positive"][part, b].tolist() == [True, False, False]
            assert batch["where"][part, b].all()
            seen += 1
        for kind, count in (("queries", 1), ("passages", PASSAGES), ("pairs", PASSAGES)):
            assert [len(x) for x in found[kind]] == [per_part * count] * parts
    assert seen == 16, "the last two lists make no whole batch"


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_share_the_same_lists_and_labels(parts, in_batch):
    given = world()
    whole = batches_of(*given, in_batch=in_batch)
    split = batches_of(*given, in_batch=in_batch, shards=parts)
    assert split.steps == whole.steps
    for step in range(whole.steps):
        one, many = whole.make(step), split.make(step)
        for kind in ("queries", "passages", "pairs"):
            joined = list(itertools.chain(*recovered(many[kind])))
            assert joined == recovered(one[kind])[0]
        columns = {"positive": PASSAGES, "where": PASSAGES}
        if in_batch:
            columns |= dict.fromkeys(("in_batch_positive", "in_batch_where"), BATCH * PASSAGES)
        for label, count in columns.items():
            assert many[label].shape == (parts, BATCH // parts, count)
            assert many[label].reshape(one[label].shape).tolist() == one[label].tolist()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("order", [1, -1], ids=["longest last", "longest first"])
def test_shapes_are_the_same_at_every_step(parts, order):
    store, queries, lists = world(lists=32, seed=4)
    # Most batches know nothing of the longest texts.
    length_L = INPUTS.passage_lengths(store, lists.passages_LxP).max(axis=1)
    order_L = np.argsort(length_L)[::order]
    lists = lists.take(order_L)
    batches = batches_of(store, queries, lists, shards=parts)
    shapes = [
        {name: (x.shape, x.dtype) for name, x in leaves(batches.make(step)).items()}
        for step in range(batches.steps)
    ]
    assert len(shapes) == 8
    assert all(x == shapes[0] for x in shapes)
    assert all(shape[0] == parts for shape, _ in shapes[0].values())


def test_batches_change_lists_within_a_window_only(monkeypatch):
    monkeypatch.setattr(batches_lib, "WINDOW", 8)
    store, queries, lists = world(lists=22, seed=4)
    batches = batches_of(store, queries, lists)
    for first, last in ((0, 8), (8, 16), (16, 20)):
        given, found = (sorted(x.passages_LxP[first:last].tolist()) for x in (lists, batches.lists))
        assert found == given


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_balance_only_changes_the_order_of_lists(batch, count, seed):
    lengths_LxN = np.random.default_rng(seed).integers(1, 50, (batch * count, 3))
    order_L = batches_lib.balance([lengths_LxN, lengths_LxN[:, :1]], batch)
    assert sorted(order_L) == list(range(batch * count))


@pytest.mark.parametrize(("parts", "most", "by_chance"), [(1, 1.11, 1.13), (4, 1.15, 1.24)])
def test_balanced_batches_and_their_parts_need_rows_of_the_same_widths(parts, most, by_chance):
    """With the lengths of MS MARCO's passages, batches of 16 lists of 8."""
    rng = np.random.default_rng(0)
    lengths_LxN = np.clip(rng.lognormal(np.log(76), 0.36, (16 * 60, 8)), 16, 128).astype(int)

    def computed(lengths_LxN):
        rows_SxN = lengths_LxN.reshape(60 * parts, -1)
        shapes = plan(np.sort(rows_SxN, axis=1).max(axis=0), 12)
        return sum(s.rows * s.width for s in shapes) * len(rows_SxN) / rows_SxN.sum()

    assert computed(lengths_LxN) > by_chance
    assert computed(lengths_LxN[batches_lib.balance([lengths_LxN], 16)]) < most


@pytest.mark.parametrize("in_batch", [False, True])
def test_a_stream_can_start_at_any_step(in_batch):
    batches = batches_of(*world(lists=26), in_batch=in_batch, shards=2)
    made = [batches.make(step) for step in range(batches.steps)]
    assert len({batch["queries"].blocks[0].tokens_RxT.tobytes() for batch in made}) == 6
    for first in (0, 1, 4, 5):
        streamed = list(batches.stream(first))
        assert len(streamed) == batches.steps - first
        for step, batch in enumerate(streamed, first):
            assert isinstance(batch["queries"], Packed)
            assert_same(batch, made[step])


def test_a_batch_is_a_function_of_its_step():
    batches = batches_of(*world())
    third = batches.make(3)
    batches.make(0)
    assert_same(batches.make(3), third)
    assert_same(batches_of(*world()).make(3), third)


@pytest.mark.parametrize(
    ("models", "kinds"),
    [
        (("retriever",), {"queries", "passages"}),
        (("reranker",), {"pairs"}),
        (("retriever", "reranker"), {"queries", "passages", "pairs"}),
    ],
)
def test_each_model_gets_its_own_inputs(models, kinds):
    batches = batches_of(*world(), models=models)
    assert set(batches.make(0)) == {*kinds, "positive", "where"}
    assert set(batches.shapes) == kinds


@pytest.mark.parametrize("max_blocks", [1, 2, 9])
def test_no_more_blocks_than_allowed(max_blocks):
    batches = batches_of(*world(), max_blocks=max_blocks)
    counts = [len(x.blocks) for x in batches.make(0).values() if isinstance(x, Packed)]
    assert max(counts) <= max_blocks
    # Passages have widths of 8 to 40.
    assert max(counts) == min(max_blocks, 5)


def in_batch_by_hand(queries, passages, relevant):
    """Labels in plain Python: `relevant` is the set of (query, passage)."""
    flat = [(b, p) for b, row in enumerate(passages) for p in range(len(row))]
    positive, where = [], []
    for b, query in enumerate(queries):
        heads = [own[0] for other, own in zip(queries, passages) if other == query]
        positive.append([at == (b, 0) for at in flat])
        where.append(
            [
                at == (b, 0)
                or (
                    passages[at[0]][at[1]] not in heads
                    and (query, passages[at[0]][at[1]]) not in relevant
                )
                for at in flat
            ]
        )
    return positive, where


@given(
    st.integers(1, 4).flatmap(
        lambda p: st.lists(
            st.tuples(st.integers(0, 4), st.lists(st.integers(0, 6), min_size=p, max_size=p)),
            min_size=1,
            max_size=5,
        )
    ),
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=20),
)
@settings(deadline=None, max_examples=300)
# The same passage heads two lists; a query has two positives, one of them in another's list.
@example([(0, [3]), (1, [3]), (2, [4])], {(0, 3), (1, 3), (0, 4), (2, 4)})
# The same query twice.
@example([(0, [3, 5]), (0, [4, 3])], {(0, 3), (0, 4)})
# Heads that no label names: denoised positives, one of them the negative of another list.
@example([(0, [3, 5]), (1, [4, 3])], {(1, 4)})
@example([(0, [3, 5]), (0, [4, 6]), (1, [6, 4])], {(0, 3), (1, 6)})
def test_in_batch_labels_against_plain_python(lists, relevant):
    queries, passages = zip(*lists)
    pairs_2xN = np.array(sorted(relevant), np.int64).reshape(-1, 2).T
    positive, where = in_batch_labels(
        np.array(queries), np.array(passages), pairs_2xN, np.arange(len(queries))
    )
    assert positive.dtype == where.dtype == bool
    assert (positive.tolist(), where.tolist()) == in_batch_by_hand(queries, passages, relevant)


def test_in_batch_labels_of_a_batch_use_the_relevant_pairs():
    store, queries, lists = world(passages_per_list=2, lists=24)
    # Heads are what the labels say, as in the retriever's warm-up.
    pairs = {(q, p) for q, p, relevance in queries.qrels_3xN.T.tolist() if relevance > 0}
    rng = np.random.default_rng(0)
    query_rows_L, head_L = rng.permutation(sorted(pairs))[:24].T
    lists = Lists(
        query_rows_L, np.stack([head_L, lists.passages_LxP[:, 0]], axis=1), lists.provenance_LxP
    )
    batches = batches_of(store, queries, lists, batch=8, shards=2, in_batch=True)
    lists = batches.lists
    masked = 0
    for step in range(3):
        part = slice(step * 8, (step + 1) * 8)
        batch = batches.make(step)
        positive, where = in_batch_by_hand(
            lists.query_rows_L[part].tolist(), lists.passages_LxP[part].tolist(), pairs
        )
        assert batch["in_batch_positive"].reshape(8, 16).tolist() == positive
        assert batch["in_batch_where"].reshape(8, 16).tolist() == where
        masked += np.sum(np.logical_not(where))
    assert masked > 10


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_slots_hold_every_list_once_and_equally_many_in_each_turn(lists, shards, accumulate):
    batch = lists * accumulate
    found = batches_lib.slots(batch, shards, accumulate).reshape(shards, accumulate, -1)
    turns = [turn[turn >= 0].tolist() for turn in found.swapaxes(0, 1).reshape(accumulate, -1)]
    assert list(itertools.chain(*turns)) == list(range(batch))
    assert {len(turn) for turn in turns} == {lists}
    assert found.size - batch < shards * accumulate


@pytest.mark.parametrize("in_batch", [False, True])
def test_slots_without_a_list_count_nowhere(in_batch):
    given = world()
    whole = batches_of(*given, in_batch=in_batch).make(0)
    batches = batches_of(*given, in_batch=in_batch, shards=3)
    assert batches.slots_SxB.tolist() == [[0, 1], [2, 3], [-1, -1]]
    batch = batches.make(0)
    for name in ("positive", "where"):
        assert batch[name][:2].reshape(whole[name].shape).tolist() == whole[name].tolist()
        assert not batch[name][2].any()
        if in_batch:
            label, count = batch[f"in_batch_{name}"], whole[f"in_batch_{name}"].shape[-1]
            expected = whole[f"in_batch_{name}"].reshape(2, 2, count).tolist()
            assert label[:2, :, :count].tolist() == expected
            assert not label[2].any()
            assert not label[..., count:].any()


@pytest.mark.parametrize("own", [[1], [0, 3], [2, 3, 4, 5]])
def test_a_host_makes_its_own_parts_of_the_same_batch(own):
    given, split = world(), {"in_batch": True, "shards": 3, "accumulate": 2}
    whole = leaves(batches_of(*given, **split).make(1))
    parts = leaves(batches_of(*given, **split, made_here=own).make(1))
    assert parts.keys() == whole.keys() > {"pairs.slot", "where", "in_batch_where"}
    for name, part in parts.items():
        np.testing.assert_array_equal(part, whole[name][own], err_msg=name)


def test_a_batch_must_split_into_equal_parts():
    with pytest.raises(InputError, match="4 lists cannot be computed in 3 equal parts; make"):
        batches_of(*world(), accumulate=3)


def test_positives_come_first():
    """Labels over the batch are by place and those of a list by provenance; they must agree."""
    store, queries, lists = world()
    swapped = Lists(
        lists.query_rows_L, lists.passages_LxP[:, ::-1], lists.provenance_LxP[:, ::-1].copy()
    )
    two = lists.provenance_LxP.copy()
    two[3, 1] = Provenance.LABELLED_POSITIVE
    for wrong in (swapped, Lists(lists.query_rows_L, lists.passages_LxP, two)):
        with pytest.raises(ValueError, match="does not have its one positive first"):
            batches_of(store, queries, wrong)


def test_there_must_be_lists_for_one_batch():
    with pytest.raises(InputError, match="3 lists, fewer than one batch of 4; lower"):
        batches_of(*world(lists=3))
    assert batches_of(*world(lists=4)).steps == 1
