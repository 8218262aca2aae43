"""The token store: every text tokenised once, into flat memory-mapped arrays with offsets.

Layout of a store folder:

    manifest.json                                  tokeniser and source hashes, counts, format, and
                                                   remarks: lines about what was left out, and how
                                                   splits were made
    passages/{titles,texts}.bin, .offsets.npy      token numbers end to end; where each text starts
    passages/ids.json                              the user's ids, one JSON string a line, by row
    <split>/queries.bin, .offsets.npy, ids.json    the queries of a split
    <split>/qrels.npy                              [3, N] query row, passage row, relevance

Where the re-ranker has another tokenizer, its tokens lie beside the others, in `titles.pairs.bin` etc.
Ids stay the user's strings in ids.json and are row numbers everywhere else.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable

import numpy as np
import tqdm

from rqv2_jax.data import collection as collection_lib
from rqv2_jax.errors import DAMAGE, InputError, readable

FORMAT = 2
CHUNK = 4096
SAMPLE = 2**16  # passages that lengths are measured by
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"),
)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokenised texts: text i is `tokens[offsets[i] : offsets[i + 1]]`.

    `pairs` are the same texts by the re-ranker's tokenizer, where that is another.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    pairs: "Texts | None" = None

    def for_pairs(self) -> "Texts":
        """Returns the texts as the re-ranker reads them."""
        return self if self.pairs is None else self.pairs

    def __len__(self):
        return len(self.offsets) - 1

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Number of tokens of each text in `rows` (any shape)."""
        return self.offsets[rows + 1] - self.offsets[rows]


@dataclasses.dataclass(frozen=True)
class Queries:
    """The queries of one split with their labels: `qrels_3xN` = query row, passage row, relevance.

    `fingerprint` and `strings`, the texts as such, are those of queries which do not belong to the
    store. `own_2xN` are pairs of a query row and the row of the passage that is this query's own text,
    sorted: neither a negative nor a hit.
    """

    texts: Texts
    ids: list[str]
    qrels_3xN: np.ndarray
    fingerprint: str = ""
    own_2xN: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0), np.int64))
    strings: tuple[str, ...] = ()

    def positives(self) -> np.ndarray:
        """The relevant pairs [2, N]: query row, passage row; sorted by query row."""
        pairs_2xN = self.qrels_3xN[:2, self.qrels_3xN[2] > 0]
        return pairs_2xN[:, np.argsort(pairs_2xN[0], kind="stable")]

    def never_negative(self) -> np.ndarray:
        """The relevant pairs and those of `own_2xN` [2, N], sorted by query row."""
        pairs_2xN = np.concatenate([self.positives(), self.own_2xN], axis=1)
        return pairs_2xN[:, np.argsort(pairs_2xN[0], kind="stable")]

    def labels_of(self, rows_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the labels of some queries, in ascending order; their rows count through `rows_Q`."""
        query_N, passage_N, relevance_N = self.qrels_3xN
        chosen_N = np.isin(query_N, rows_Q)
        query_N = np.searchsorted(rows_Q, query_N[chosen_N])
        return query_N, passage_N[chosen_N], relevance_N[chosen_N]


@dataclasses.dataclass(frozen=True)
class Store:
    """An opened token store. `splits` maps train, dev, test to their queries."""

    titles: Texts
    texts: Texts
    passage_ids: list[str]
    splits: dict[str, Queries]
    fingerprint: str

    def empty(self, titles: bool) -> np.ndarray:
        """Row numbers of passages without a token, in the title either where titles are used."""
        lengths_N = np.diff(self.texts.offsets)
        return np.flatnonzero(lengths_N + np.diff(self.titles.offsets) * titles == 0)

    def sample(self) -> np.ndarray:
        """Row numbers of passages, evenly spread, to measure lengths by."""
        count = len(self.texts)
        return np.arange(min(count, SAMPLE)) * count // min(count, SAMPLE)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A fast Hugging Face tokenizer and the hash of the files it was read from.

    `encode` turns texts into token numbers without special tokens, not truncated. `unknown` is the
    number of [UNK], None where every text can be written in tokens. `pairs` is the re-ranker's, where
    that is another; then `fingerprint` is that of both.
    """

    encode: Callable[[list[str]], list[list[int]]]
    fingerprint: str
    vocab_size: int
    cls: int
    sep: int
    unknown: int | None = None
    pairs: "Tokenizer | None" = None

    def texts(self, strings: list[str]) -> Texts:
        """Texts tokenised in memory, once by each tokenizer."""
        tokens = self.encode(strings)
        lengths = [len(t) for t in tokens]
        flat = np.fromiter(itertools.chain.from_iterable(tokens), np.int32, sum(lengths))
        pairs = None if self.pairs is None else self.pairs.texts(strings)
        return Texts(flat, np.cumsum([0, *lengths]), pairs)

    def beside(self, reranker: "Tokenizer") -> "Tokenizer":
        """Returns this one, the retriever's, with that of the re-ranker if it is another."""
        if reranker.fingerprint == self.fingerprint:
            return self
        both = f"{self.fingerprint}+{reranker.fingerprint}"
        return dataclasses.replace(self, fingerprint=both, pairs=reranker)

    def can_begin_with(self, prompt: str) -> bool:
        """Is a text behind a prompt tokenised as it is alone?"""
        return all(
            self.encode([prompt + text])[0] == self.encode([prompt])[0] + self.encode([text])[0]
            for text in ("a", "1")
        )


def load_tokenizer(folder: pathlib.Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
      InputError: there is none, it lacks [CLS] or [SEP], or it has more tokens than the model.
    """
    # Slow to import, and needed by few stages.
    import transformers

    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {"tokenizer.json", "vocab.txt"} & {f.name for f in files}:
        raise InputError(
            f"{folder}: has no tokenizer.json or vocab.txt; copy the model's tokenizer"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{folder}: its tokenizer cannot be read ({reason}); copy it again") from e
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no [CLS] and [SEP]; use a BERT tokenizer")
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    digest = hashlib.sha256()
    for f in files:
        digest.update(f.name.encode() + b"\0" + f.read_bytes())

    def encode(texts):
        return tokenizer(
            texts, add_special_tokens=False, truncation=False, padding=False, verbose=False
        )["input_ids"]

    return Tokenizer(
        encode,
        digest.hexdigest()[:16],
        len(tokenizer),
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.unk_token_id,
    )


class _TextsWriter:
    """Appends tokenised texts to `<path>.bin`; `close` writes the offsets beside it.

    The same goes to `<path>.pairs.bin` by the re-ranker's tokenizer, where that is another.
    """

    def __init__(self, path: pathlib.Path, tokenizer: Tokenizer):
        self.path, self.tokenizer = path, tokenizer
        self.pairs = None
        if tokenizer.pairs is not None:
            self.pairs = _TextsWriter(path.with_name(f"{path.name}.pairs"), tokenizer.pairs)
        self.dtype = _dtype(tokenizer.vocab_size)
        self.lengths: list[np.ndarray] = []
        self.file = open(f"{path}.bin", "wb")  # noqa: SIM115 (closed by close)

    def add(self, texts: list[str]):
        tokens = self.tokenizer.encode(texts)
        self.lengths.append(np.array([len(t) for t in tokens]))
        np.fromiter(itertools.chain.from_iterable(tokens), self.dtype).tofile(self.file)
        if self.pairs is not None:
            self.pairs.add(texts)

    def close(self):
        if self.pairs is not None:
            self.pairs.close()
        self.file.close()
        lengths = np.concatenate([[0], *self.lengths]).astype(np.int64)
        np.save(f"{self.path}.offsets.npy", np.cumsum(lengths))


def _dtype(vocab_size: int):
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _chunks(items: Iterable, size: int):
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _write_ids(path: pathlib.Path, ids: Iterable[str]):
    path.write_text("".join(json.dumps(i) + "\n" for i in ids))


def prepare(collection: collection_lib.Collection, tokenizer: Tokenizer, folder: pathlib.Path):
    """Builds the token store of a collection in `folder`, or keeps one that is up to date.

    A store made by another tokeniser, from other files or in another format is rebuilt, and so is one
    that is damaged. It appears under its name only when complete.

    Raises:
      InputError: whatever the readers find wrong with the files.
    """
    manifest = {
        "format": FORMAT,
        "collection": collection.name,
        "source": collection.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "dtype": np.dtype(_dtype(tokenizer.vocab_size)).name,
        "splits": list(collection.splits),
    }
    if tokenizer.pairs is not None:
        manifest["pairs_dtype"] = np.dtype(_dtype(tokenizer.pairs.vocab_size)).name
    path = folder / "manifest.json"
    if path.is_file():
        existing = readable(path, lambda: json.loads(path.read_text())) or {}
        # A folder that has moved may have another name.
        wanted = {key: value for key, value in manifest.items() if key != "collection"}
        current = {**existing, **wanted} == existing
        if current and readable(folder, lambda: read_store(folder)) is not None:
            return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "passages").mkdir(parents=True)

    passage_rows: dict[str, int] = {}
    titles = _TextsWriter(partial / "passages/titles", tokenizer)
    texts = _TextsWriter(partial / "passages/texts", tokenizer)
    with tqdm.tqdm(desc="tokenise passages", unit=" passages") as bar:
        for chunk in _chunks(collection.passages(), CHUNK):
            passage_rows.update(zip([p.id for p in chunk], itertools.count(len(passage_rows))))
            titles.add([p.title for p in chunk])
            texts.add([p.text for p in chunk])
            bar.update(len(chunk))
    titles.close()
    texts.close()
    if not passage_rows:
        raise InputError(f"{collection.name}: the corpus is empty; give at least one passage")
    _write_ids(partial / "passages/ids.json", passage_rows)

    left = collection_lib.Left()
    mute = dict.fromkeys(collection_lib.left_out(collection, left), -1)
    for split in collection.splits:
        (partial / split).mkdir()
        query_rows: dict[str, int] = {}
        queries = _TextsWriter(partial / split / "queries", tokenizer)
        for chunk in _chunks(collection.queries(split), CHUNK):
            query_rows.update(zip([q.id for q in chunk], itertools.count(len(query_rows))))
            queries.add([q.text for q in chunk])
        queries.close()
        if not query_rows:
            raise InputError(
                f"{collection.name}: no query of {split} has a positive or an answer; label some "
                f"(every {collection_lib.HELD_OUT}th training query is dev where the files have none)"
            )
        _write_ids(partial / split / "ids.json", query_rows)
        rows = collection_lib.check_qrels(
            collection.qrels(split), mute | query_rows, passage_rows, left
        )
        np.save(partial / split / "qrels.npy", np.stack([np.asarray(r, np.int64) for r in rows]))
        manifest[f"{split}_queries"] = len(query_rows)
    manifest["passages"] = len(passage_rows)
    manifest["remarks"] = [*collection.remarks, *left.lines()]
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def remarks(folder: pathlib.Path) -> list[str]:
    """Lines for people about a store's collection: what was left out, and how splits were made."""
    return json.loads((folder / "manifest.json").read_text())["remarks"]


def open_store(folder: pathlib.Path) -> Store:
    """Opens a store; token arrays stay on disk until they are read.

    Raises:
      InputError: there is no store in `folder`, or it is damaged.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"{folder}: holds no token store; run rqv2_jax.main on this workdir first")
    try:
        return read_store(folder)
    except DAMAGE as e:
        raise InputError(
            f"{folder}: the token store is damaged ({e}); run rqv2_jax.main on this workdir again"
        ) from e


def read_store(folder: pathlib.Path) -> Store:
    """Does what `open_store` does; raises one of `errors.DAMAGE` if a file is missing or cut short."""
    manifest = json.loads((folder / "manifest.json").read_text())

    def check(name, found, expected):
        if found != expected:
            raise ValueError(f"{name} holds {found} in place of {expected}")

    def texts(name, count, dtype=manifest["dtype"], pairs=None):
        if "pairs_dtype" in manifest and not name.endswith(".pairs"):
            pairs = texts(f"{name}.pairs", count, manifest["pairs_dtype"])
        file = folder / f"{name}.bin"
        offsets = np.load(folder / f"{name}.offsets.npy")
        check(f"{name}.offsets.npy", len(offsets) - 1, count)
        size = np.dtype(dtype).itemsize * int(offsets[-1])
        check(file.relative_to(folder), file.stat().st_size, size)
        # An empty file cannot be mapped: a corpus may well have no titles at all.
        tokens = np.memmap(file, dtype, "r") if size else np.zeros(0, dtype)
        return Texts(tokens, offsets, pairs)

    def ids(name, count):
        with (folder / name / "ids.json").open() as f:
            found = [json.loads(line) for line in f]
        check(f"{name}/ids.json", len(found), count)
        return found

    def queries(split):
        count, qrels_3xN = manifest[f"{split}_queries"], np.load(folder / split / "qrels.npy")
        return Queries(texts(f"{split}/queries", count), ids(split, count), qrels_3xN)

    passages = manifest["passages"]
    return Store(
        titles=texts("passages/titles", passages),
        texts=texts("passages/texts", passages),
        passage_ids=ids("passages", passages),
        splits={split: queries(split) for split in manifest["splits"]},
        fingerprint=_fingerprint(manifest),
    )


def read_fingerprint(folder: pathlib.Path) -> str:
    """Returns the fingerprint of a store, for which its manifest has to be readable."""
    return _fingerprint(json.loads((folder / "manifest.json").read_text()))


def _fingerprint(manifest: dict) -> str:
    return f"{manifest['source']}-{manifest['tokenizer']}"
