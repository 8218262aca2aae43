"""Tokenizers, and the token stores that they write (the layout is that of `tokens`)."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable

import numpy as np
import tqdm

from rqv2_jax import disk
from rqv2_jax.data import chunks, offsets, own_texts
from rqv2_jax.data import collection as collection_lib
from rqv2_jax.data.collection import Collection, Corpus, Passage, Query
from rqv2_jax.data.tokens import Ids, Texts, read_store
from rqv2_jax.errors import InputError, one_line, readable

FORMAT = 4
BATCH = 2**12  # texts that are encoded at once
CHUNK = 2**17  # passages or queries that are written at once, and lost by a kill
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


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


def prepare(collection: Collection, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Builds the token store of a collection in `folder`, or keeps one that is up to date.

    A store made by another tokenizer, from other files or in another format is made again, and so is
    one that is damaged. It appears under its name only when complete. What a killed process has
    tokenised is kept: its chunks lie beside, in `<folder>.partial`.
    """
    corpus = collection.corpus if collection.corpus and collection.corpus.by_offset() else None
    manifest = {
        "format": FORMAT,
        "collection": collection.name,
        "source": collection.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "dtype": _dtype(tokenizer.vocab_size),
        "splits": list(collection.splits),
        "corpus_files": len(corpus.files) if corpus else 0,
    }
    if tokenizer.pairs is not None:
        manifest["pairs_dtype"] = _dtype(tokenizer.pairs.vocab_size)
    if not _is_current(folder, manifest):
        partial = folder.with_name(folder.name + ".partial")
        _begin(partial, manifest)
        manifest["passages"] = _write_passages(collection, corpus, tokenizer, partial)
        left = collection_lib.Left()
        counts = _write_queries(collection, tokenizer, partial, left)
        manifest |= {f"{split}_queries": count for split, count in counts.items()}
        manifest["remarks"] = [*collection.remarks, *left.lines()]
        disk.replace_text(partial / "manifest.json", json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        disk.settle(partial, folder)
    # They are there until now, so that a process that is killed in the last moment can go on too.
    for journal in folder.glob(f"*/{chunks.JOURNAL}"):
        journal.unlink()


def _is_current(folder: pathlib.Path, manifest: dict) -> bool:
    """Says whether the folder holds an undamaged store with these entries in its manifest."""
    path = folder / "manifest.json"
    if not path.is_file():
        return False
    existing = readable(path, lambda: dict(json.loads(path.read_text())))
    if existing is None:
        return False
    if other := _differing(existing, manifest):
        tqdm.tqdm.write(f"{folder}: is of another {', '.join(other)}; it is made again")
        return False
    return readable(folder, lambda: read_store(folder)) is not None


def _differing(existing: dict, manifest: dict) -> list[str]:
    """Returns the entries of a manifest that an existing one does not share."""
    # A folder that has moved may have another name.
    keys = [key for key in manifest if key != "collection"]
    return [key for key in keys if key not in existing or existing[key] != manifest[key]]


def _begin(partial: pathlib.Path, manifest: dict) -> None:
    """Empties the folder of an unfinished store, unless it was begun with the same manifest."""
    path = partial / "manifest.json"
    if path.is_file():
        existing = readable(path, lambda: dict(json.loads(path.read_text())))
        if existing is not None and not _differing(existing, manifest):
            return
    shutil.rmtree(partial, ignore_errors=True)
    disk.replace_text(path, json.dumps(manifest, indent=1))


def _write_passages(
    collection: Collection, corpus: Corpus | None, tokenizer: Tokenizer, partial: pathlib.Path
) -> int:
    """Writes ids, tokens and, of a corpus, where its lines begin; returns the number of passages."""
    recorded = offsets.Recorded(corpus) if corpus else None
    stream = recorded.passages() if recorded else collection.passages()
    with tqdm.tqdm(stream, desc="tokenise passages", unit=" passages") as passages:
        texts = {"title": "titles", "text": "texts"}
        count = _write(passages, tokenizer, partial / "passages", texts)
    if not count:
        raise InputError(f"{collection.name}: the corpus is empty; give at least one passage")
    if recorded:
        np.save(partial / "passages" / "lines.npy", recorded.table(count))
    return count


def _write_queries(
    collection: Collection, tokenizer: Tokenizer, partial: pathlib.Path, left: collection_lib.Left
) -> dict[str, int]:
    """Writes the queries and labels of all splits; returns the number of queries of each."""
    mute = dict.fromkeys(collection_lib.left_out(collection, left), -1)
    query_rows: dict[str, dict[str, int]] = {}
    for split in collection.splits:
        if not _write(collection.queries(split), tokenizer, partial / split, {"text": "queries"}):
            raise InputError(
                f"{collection.name}: no query of {split} has a positive or an answer; label some, and "
                "two of train where dev is held out from it"
            )
        query_rows[split] = {key: row for row, key in enumerate(Ids(partial / split / "ids.json"))}
    named = {key for rows in query_rows.values() for key in rows}
    named |= {label.passage_id for split in query_rows for label in collection.qrels(split)}
    ids = Ids(partial / "passages" / "ids.json")
    passage_rows = {key: row for row, key in enumerate(ids) if key in named}
    for split, rows in query_rows.items():
        labels = collection_lib.check_qrels(
            collection.qrels(split), mute | rows, passage_rows, left
        )
        np.save(partial / split / "qrels.npy", np.stack([np.asarray(r, np.int64) for r in labels]))
        both = ((passage_rows[key], key) for key in rows if key in passage_rows)
        np.save(partial / split / "same_ids.npy", own_texts.same_ids(rows, both))
    return {split: len(rows) for split, rows in query_rows.items()}


def _write(
    items: Iterable[Passage | Query],
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    fields: dict[str, str],
) -> int:
    """Writes ids, and the tokens of each field that `fields` names a file for; returns the number.

    Goes on behind the chunks of a process that was killed.
    """
    growing, items = chunks.Growing(folder), iter(items)
    if growing.items:
        tqdm.tqdm.write(f"{folder}: goes on after {growing.items:,}, which are tokenised already")
    # Read once more, as what is checked is checked for all, but not tokenised.
    for _ in itertools.islice(items, growing.items):
        pass
    while chunk := list(itertools.islice(items, CHUNK)):
        keys = [json.dumps(item.id).encode() + b"\n" for item in chunk]
        lengths = np.array([len(key) for key in keys])
        contents = _flat(growing, "ids", "uint8", b"".join(keys), lengths, ".json")
        for field, name in fields.items():
            texts = [getattr(item, field) for item in chunk]
            contents |= _tokens(growing, name, tokenizer, texts)
        growing.append(len(chunk), contents)
    return growing.items


def _tokens(
    growing: chunks.Growing, name: str, tokenizer: Tokenizer, texts: list[str]
) -> dict[str, bytes]:
    """Returns what a chunk of texts adds to the files of tokens, by each tokenizer, and of offsets."""
    dtype, parts, lengths = _dtype(tokenizer.vocab_size), [], []
    for start in range(0, len(texts), BATCH):
        tokens = tokenizer.encode(texts[start : start + BATCH])
        lengths += [len(each) for each in tokens]
        parts.append(np.fromiter(itertools.chain.from_iterable(tokens), dtype).tobytes())
    contents = _flat(growing, name, dtype, b"".join(parts), np.array(lengths), ".bin")
    if tokenizer.pairs is not None:
        contents |= _tokens(growing, f"{name}.pairs", tokenizer.pairs, texts)
    return contents


def _flat(
    growing: chunks.Growing,
    name: str,
    dtype: str,
    content: bytes,
    lengths_N: np.ndarray,
    suffix: str,
) -> dict[str, bytes]:
    """Returns what items of some lengths add to a file and to that of their offsets."""
    start = growing.size(name + suffix) // np.dtype(dtype).itemsize
    ends_N = start + np.cumsum(lengths_N, dtype=np.int64)
    offsets_N = ends_N if growing.items else np.append(np.zeros(1, np.int64), ends_N)
    return {name + suffix: content, f"{name}.offsets.bin": offsets_N.tobytes()}
