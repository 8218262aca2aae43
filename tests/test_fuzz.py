"""Readers of users' files, given random damage: right values or one clear line, never a traceback.

A sound file has some of its bytes changed, cut out, repeated or put in. Whatever that leaves is either
read or refused by an `InputError` that names the file, in one line.
"""

import gzip
import json
import pathlib
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import write_beir

from rqv2_jax import config as config_lib
from rqv2_jax.data import files
from rqv2_jax.data.collection import Collection, Left
from rqv2_jax.data.readers import beir, dpr, joint_tsv, tables, tevatron, topics
from rqv2_jax.data.tokenise import Tokenizer, prepare
from rqv2_jax.data.tokens import open_store
from rqv2_jax.errors import InputError
from rqv2_jax.models import weights
from rqv2_jax.ranking import trec
from rqv2_jax.recipe.opening import open_inputs

LETTERS = Tokenizer(
    encode=lambda texts: [[ord(letter) % 1000 for letter in text] for text in texts],
    fingerprint="letters",
    vocab_size=1000,
    cls=1,
    sep=2,
)
FIXTURES = pathlib.Path(__file__).parent / "fixtures"
# Bytes that mean something to one of the formats, beside those that hypothesis thinks of.
TELLING = [
    b"\n",
    b"\r",
    b"\t",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"0",
    b"-1",
    b"1e999",
]
TELLING += [b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"NaN", b"null", b"\\ud800", b" "]

pieces = st.one_of(st.sampled_from(TELLING), st.binary(max_size=6))
# Where, as a share of the file; how many bytes go; what takes their place.
edits = st.lists(
    st.tuples(st.floats(0, 1), st.one_of(st.just(0), st.integers(0, 40)), pieces),
    min_size=1,
    max_size=4,
)


def damaged(content, changes):
    for share, cut, piece in changes:
        at = int(share * len(content))
        content = content[:at] + piece + content[at + cut :]
    return content


def consume(texts: Collection):
    """Reads all of a collection."""
    list(texts.passages())
    for split in texts.splits:
        list(texts.queries(split))
        list(texts.qrels(split))


def write_tevatron(folder):
    folder.mkdir()
    passage = {"docid": "p0", "title": "a town", "text": "one word"}
    other = {"docid": "p1", "title": "", "text": "another"}
    (folder / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in (passage, other)))
    asked = [
        {"query_id": f"q{i}", "query": f"asks {i}"}
        | {"positive_passages": [passage], "negative_passages": [other]}
        for i in range(3)
    ]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))


def unzipped(name):
    def write(folder):
        folder.mkdir()
        for path in (FIXTURES / name).iterdir():
            (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))

    return write


def a_file(name, text):
    def write(folder):
        folder.mkdir()
        (folder / name).write_text(text)

    return write


LISTS = "".join(f"ask {i}\ttown\tword {i} {j}\t{int(j == 0)}\n" for i in range(3) for j in range(3))
RUN = "".join(f"q{i} Q0 p{j} {j + 1} {1 / (j + 1)} tag\n" for i in range(3) for j in range(3))
# Each reader with what writes it a sound folder.
READERS = {
    "beir": (
        write_beir,
        lambda folder: consume(beir.beir(folder, train_qrels="qrels", eval_qrels="qrels")),
    ),
    "msmarco": (unzipped("msmarco"), lambda folder: consume(tables.msmarco(folder))),
    "dpr": (unzipped("nq"), lambda folder: consume(dpr.dpr(folder))),
    "tevatron": (write_tevatron, lambda folder: consume(tevatron.tevatron(folder))),
    "joint lists": (
        a_file("lists.tsv", LISTS),
        lambda folder: consume(joint_tsv.read(folder / "lists.tsv", 3)[0]),
    ),
    "run": (a_file("a.trec", RUN), lambda folder: trec.read_run(folder / "a.trec")),
    "labels": (
        a_file("qrels.txt", "q0 0 p0 1\nq1 0 p1 0\nq1 0 p2 2\n"),
        lambda folder: list(files.labels(folder / "qrels.txt")),
    ),
    "topics": (
        a_file("topics.tsv", "q0\twhat is it\nq1\twhere\n"),
        lambda folder: topics.asked(topics.topics(folder / "topics.tsv"), Left()),
    ),
    "topics as JSON": (
        a_file("topics.jsonl", '{"_id": "q0", "text": "what"}\n{"_id": "q1", "text": "where"}\n'),
        lambda folder: topics.asked(topics.topics(folder / "topics.jsonl"), Left()),
    ),
    "topics of TREC": (
        a_file("topics.txt", "<top>\n<num> Number: 1\n<title> what\n<desc> Description:\n</top>\n"),
        lambda folder: topics.asked(topics.topics(folder / "topics.txt"), Left()),
    ),
}


class Sound:
    """A folder of sound files, what they hold, and what reads them."""

    def __init__(self, folder, read):
        read(folder)
        self.folder, self.read = folder, read
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.contents = {path: path.read_bytes() for path in paths}

    def __repr__(self):
        return f"Sound({self.folder})"

    def read_or_refused(self):
        """Reads, or is refused in one line that names a file or the folder."""
        said = f"{self.folder}: fine"
        try:
            self.read(self.folder)
        except InputError as e:
            said = str(e)
        assert str(self.folder) in said
        assert len(said) < 1000
        assert "\n" not in said

    def damage(self, data, changes, *, packed=False, until=1.0):
        """Changes a file, in its first part, and reads; then it is sound again."""
        path = data.draw(st.sampled_from(sorted(self.contents)))
        place = path.with_name(f"{path.name}.gz") if packed else path
        content = gzip.compress(self.contents[path], mtime=0) if packed else self.contents[path]
        part = until if path.suffix == ".safetensors" else 1.0
        try:
            path.unlink()
            place.write_bytes(damaged(content, [(at * part, *rest) for at, *rest in changes]))
            self.read_or_refused()
        finally:
            place.unlink(missing_ok=True)
            path.write_bytes(self.contents[path])


@pytest.fixture(scope="module", params=READERS)
def sound(request, tmp_path_factory):
    write, read = READERS[request.param]
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    write(folder)
    return Sound(folder, read)


def checked(examples):
    ignored = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, suppress_health_check=ignored, deadline=None)


@checked(80)
@given(data=st.data(), changes=edits, packed=st.booleans())
def test_damage_is_read_over_or_told(sound, data, changes, packed):
    # What is one file has its name given.
    sound.damage(data, changes, packed=packed and len(sound.contents) > 1)


@checked(60)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_told(sound, content):
    for path in sound.contents:
        try:
            path.write_bytes(content)
            sound.read_or_refused()
        finally:
            path.write_bytes(sound.contents[path])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_beir(folder / "data")
    texts = beir.beir(folder / "data", train_qrels="qrels", eval_qrels="qrels")
    prepare(texts, LETTERS, folder / "store")
    return Sound(folder / "store", open_store)


@checked(150)
@given(data=st.data(), changes=edits)
def test_a_damaged_store_opens_or_is_told_of(store, data, changes):
    store.damage(data, changes)


def read_model(folder):
    config = config_lib.default()
    config.data.path = "nowhere"
    config.model.update({"weights": str(folder), "dropout": 0.0, "attention": "plain"})
    opened, _, _ = open_inputs(config)
    weights.load_encoder(folder, opened.models.retriever)


@pytest.fixture(scope="module")
def model(bert_folder, tmp_path_factory):
    folder = shutil.copytree(bert_folder, tmp_path_factory.mktemp("fuzz") / "model")
    return Sound(folder, read_model)


@checked(100)
@given(data=st.data(), changes=edits)
def test_a_damaged_model_folder_opens_or_is_told_of(model, data, changes):
    # The headers of tensors are at the beginning.
    model.damage(data, changes, until=0.02)
