"""Tokenizers, and the token stores that they write (the layout is that of `tokens`)."""

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
from rqv2_jax.data import own_texts
from rqv2_jax.data.collection import Collection, Passage, Query
from rqv2_jax.data.tokens import Texts, read_store
from rqv2_jax.errors import InputError, one_line, readable

FORMAT = 3
CHUNK = 4096
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"),
)


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
        """Returns texts tokenised in memory, once by each tokenizer."""
        tokens = self.encode(strings)
        lengths = [len(t) for t in tokens]
        flat = np.fromiter(itertools.chain.from_iterable(tokens), np.int32, sum(lengths))
        pairs = None if self.pairs is None else self.pairs.texts(strings)
        return Texts(flat, np.cumsum([0, *lengths]), pairs)

    def beside(self, reranker: "Tokenizer") -> "Tokenizer":
        """Returns this tokenizer, the retriever's, with the re-ranker's if it is another."""
        if reranker.fingerprint == self.fingerprint:
            return self
        both = f"{self.fingerprint}+{reranker.fingerprint}"
        return dataclasses.replace(self, fingerprint=both, pairs=reranker)

    def can_begin_with(self, prompt: str) -> bool:
        """Says whether a text after the prompt is tokenised as it is alone."""
        return all(
            self.encode([prompt + text])[0] == self.encode([prompt])[0] + self.encode([text])[0]
            for text in ("a", "1")
        )


def load_tokenizer(folder: pathlib.Path, vocab_size: int) -> Tokenizer:
    """Loads a model folder's tokenizer; raises InputError for one that does not fit the model."""
    # Slow to import, and used by few stages.
    import transformers

    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {"tokenizer.json", "vocab.txt"} & {f.name for f in files}:
        raise InputError(
            f"{folder}: has no tokenizer.json or vocab.txt; copy the model's tokenizer"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:
        # The library that reads tokenizer.json raises Exception itself.
        raise InputError(
            f"{folder}: its tokenizer cannot be read ({one_line(e)}); copy it again"
        ) from e
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

    def encode(texts: list[str]) -> list[list[int]]:
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
    """A writer of `<path>.bin` and, by the re-ranker's tokenizer, `<path>.pairs.bin`, with offsets."""

    def __init__(self, path: pathlib.Path, tokenizer: Tokenizer):
        self.path, self.tokenizer = path, tokenizer
        self.pairs = None
        if tokenizer.pairs is not None:
            self.pairs = _TextsWriter(path.with_name(f"{path.name}.pairs"), tokenizer.pairs)
        self.dtype = _dtype(tokenizer.vocab_size)
        self.lengths: list[np.ndarray] = []
        self.file = open(f"{path}.bin", "wb")  # noqa: SIM115 (closed by close)

    def add(self, texts: list[str]) -> None:
        tokens = self.tokenizer.encode(texts)
        self.lengths.append(np.array([len(t) for t in tokens]))
        np.fromiter(itertools.chain.from_iterable(tokens), self.dtype).tofile(self.file)
        if self.pairs is not None:
            self.pairs.add(texts)

    def close(self) -> None:
        if self.pairs is not None:
            self.pairs.close()
        self.file.close()
        lengths = np.concatenate([[0], *self.lengths]).astype(np.int64)
        np.save(f"{self.path}.offsets.npy", np.cumsum(lengths))


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


def prepare(collection: Collection, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Builds the token store of a collection in `folder`, or keeps one that is up to date.

    A store made by another tokenizer, from other files or in another format is rebuilt, and so is one
    that is damaged. It appears under its name only when complete.
    """
    manifest = {
        "format": FORMAT,
        "collection": collection.name,
        "source": collection.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "dtype": _dtype(tokenizer.vocab_size),
        "splits": list(collection.splits),
    }
    if tokenizer.pairs is not None:
        manifest["pairs_dtype"] = _dtype(tokenizer.pairs.vocab_size)
    if _is_current(folder, manifest):
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    texts = {"title": "titles", "text": "texts"}
    with tqdm.tqdm(collection.passages(), desc="tokenise passages", unit=" passages") as passages:
        passage_rows = _write(passages, tokenizer, partial / "passages", texts)
    if not passage_rows:
        raise InputError(f"{collection.name}: the corpus is empty; give at least one passage")
    left = collection_lib.Left()
    mute = dict.fromkeys(collection_lib.left_out(collection, left), -1)
    for split in collection.splits:
        queries = {"text": "queries"}
        query_rows = _write(collection.queries(split), tokenizer, partial / split, queries)
        if not query_rows:
            raise InputError(
                f"{collection.name}: no query of {split} has a positive or an answer; label some, and "
                "two of train where dev is held out from it"
            )
        labels = collection.qrels(split)
        rows = collection_lib.check_qrels(labels, mute | query_rows, passage_rows, left)
        np.save(partial / split / "qrels.npy", np.stack([np.asarray(r, np.int64) for r in rows]))
        both = ((passage_rows[key], key) for key in query_rows if key in passage_rows)
        np.save(partial / split / "same_ids.npy", own_texts.same_ids(query_rows, both))
        manifest[f"{split}_queries"] = len(query_rows)
    manifest["passages"] = len(passage_rows)
    manifest["remarks"] = [*collection.remarks, *left.lines()]
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _is_current(folder: pathlib.Path, manifest: dict) -> bool:
    """Says whether the folder holds an undamaged store with these entries in its manifest."""
    path = folder / "manifest.json"
    if not path.is_file():
        return False
    existing = readable(path, lambda: json.loads(path.read_text())) or {}
    # A folder that has moved may have another name.
    wanted = {key: value for key, value in manifest.items() if key != "collection"}
    current = {**existing, **wanted} == existing
    return current and readable(folder, lambda: read_store(folder)) is not None


def _write(
    items: Iterable[Passage | Query],
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    files: dict[str, str],
) -> dict[str, int]:
    """Writes ids, and the tokens of each field that `files` names a file for; returns ids' rows."""
    folder.mkdir(parents=True)
    rows: dict[str, int] = {}
    writers = {field: _TextsWriter(folder / name, tokenizer) for field, name in files.items()}
    items = iter(items)
    while chunk := list(itertools.islice(items, CHUNK)):
        rows.update(zip([item.id for item in chunk], itertools.count(len(rows))))
        for field, writer in writers.items():
            writer.add([getattr(item, field) for item in chunk])
    for writer in writers.values():
        writer.close()
    (folder / "ids.json").write_text("".join(json.dumps(key) + "\n" for key in rows))
    return rows
