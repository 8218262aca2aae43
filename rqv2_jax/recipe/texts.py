"""The texts of a run: its collection, the token store made from it, and further queries from files."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import ml_collections
import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts, optional
from rqv2_jax.data import collection, files, offsets, own_texts, tokenise, tokens
from rqv2_jax.data.readers import beir, tables, tevatron, topics
from rqv2_jax.errors import DAMAGE, InputError, readable
from rqv2_jax.recipe.run import Run


def open_collection(data: ml_collections.ConfigDict, folder: pathlib.Path) -> collection.Collection:
    """Opens the texts and labels that `config.data` names; docstrings are extracted into `folder`."""
    if data.dataset != "docstrings" and not data.path:
        return _load("readers.builders").fetched(data.dataset)
    if data.dataset == "docstrings":
        docstrings = _load("docstrings").docstrings
        return artifacts.kept(folder, lambda: docstrings(folder, preset=data.preset))
    if data.dataset == "dpr":
        return optional.load("rqv2_jax.data.readers.dpr", "data in DPR's layout").dpr(data.path)
    if data.dataset.startswith("beir"):
        qrels = {"train_qrels": data.train_qrels, "eval_qrels": data.eval_qrels}
        return beir.beir(pathlib.Path(data.path), **qrels)
    readers = {
        "msmarco": tables.msmarco,
        "rocketqa": tables.rocketqa,
        "tevatron": tevatron.tevatron,
    }
    return readers[data.dataset](data.path)


def open_corpus(data: ml_collections.ConfigDict) -> collection.Corpus | None:
    """Returns the files of the passages that `config.data` names; None if no line can be read alone."""
    if data.dataset == "docstrings" or not data.path:
        return None
    folder = pathlib.Path(data.path)
    if data.dataset == "dpr":
        reader = optional.load("rqv2_jax.data.readers.dpr", "data in DPR's layout").corpus
    elif data.dataset.startswith("beir"):
        reader = beir.corpus
    else:
        reader = {
            "msmarco": tables.msmarco_corpus,
            "rocketqa": tables.rocketqa_corpus,
            "tevatron": tevatron.corpus,
        }[data.dataset]
    corpus = reader(folder)
    return corpus if corpus.by_offset() else None


def _load(module: str):
    """Returns one of the modules that keep texts as tensorflow-datasets."""
    return optional.load(f"rqv2_jax.data.{module}", "data that is not read from a folder")


def open_store(run: Run) -> tokens.Store:
    """Opens a workdir's token store, queries' own texts marked; made again if it is damaged."""
    folder = run.workdir / "data" / "tokens"

    def mend():
        if folder.is_dir() and readable(folder, lambda: tokens.read_store(folder)) is None:
            try:
                made_from = tokens.read_fingerprint(folder)
            except DAMAGE:
                made_from = ""
            tokenise.prepare(texts_of(run, made_from), run.tokenizer, folder)

    hosts.from_first(mend)
    return own_texts.marked(tokens.open_store(folder), run.config.data.ignore_identical_ids)


def texts_of(run: Run, fingerprint: str) -> collection.Collection:
    """Returns the texts of a store's fingerprint ("": any); InputError if they changed or are gone."""
    _check_place(run)
    texts = open_collection(run.config.data, run.workdir / "data" / "tfds")
    if fingerprint not in ("", f"{texts.fingerprint}-{run.tokenizer.fingerprint}"):
        raise InputError(
            f"{run.workdir}: the texts of {texts.name} have changed since this workdir was made; "
            "bring the old ones back, or run in a new workdir"
        )
    return texts


def _check_place(run: Run) -> None:
    path = run.config.data.path
    embedded = run.config.data.dataset == "docstrings"
    if path and not embedded and not pathlib.Path(path).exists():
        raise InputError(
            f"{path}: the texts of {run.workdir} are not there any more; give their new place as "
            "--data DIR"
        )


def show_passages(run: Run, store: tokens.Store, rows: Iterable[int]) -> dict[int, str]:
    """Returns passages of a store by row as text for people, as `open_passages` reads them."""
    ordered = set(rows)
    return open_passages(run, store)(ordered) if ordered else {}


def open_passages(run: Run, store: tokens.Store) -> Callable[[Iterable[int]], dict[int, str]]:
    """Returns the function that gives passages of a store by row, as text for people, the title first.

    It reads their lines alone where the corpus's files allow that, and then checks nothing else of
    them; it raises InputError if these are other passages than those of the store.
    """
    _check_place(run)
    corpus, lines_FxN = open_corpus(run.config.data), store.lines_FxN
    if corpus is None or lines_FxN is None:
        texts = texts_of(run, store.fingerprint)
        return lambda rows: texts.shown(set(rows))
    return lambda rows: _by_lines(run, store, corpus, lines_FxN, sorted(set(rows)))


def _by_lines(
    run: Run,
    store: tokens.Store,
    corpus: collection.Corpus,
    lines_FxN: np.ndarray,
    ordered: list[int],
) -> dict[int, str]:
    """Returns the passages of some rows as text; their lines begin at `lines_FxN` in the files."""
    if not ordered:
        return {}
    try:
        if len(lines_FxN) != len(corpus.files):
            raise InputError("other files of titles")
        passages = offsets.read(corpus, lines_FxN, ordered)
        if not _are(run, store, ordered, passages):
            raise InputError("another passage")
    except InputError:
        names = " and ".join(map(str, corpus.files))
        raise InputError(
            f"{names}: not the texts that {run.workdir} was prepared from any more; bring these back, "
            "or run in a new workdir"
        ) from None
    return {row: passage.shown() for row, passage in zip(ordered, passages)}


def _are(
    run: Run, store: tokens.Store, rows: list[int], passages: list[collection.Passage]
) -> bool:
    """Says whether these are the passages of some rows of the store, by their ids and tokens."""
    if [passage.id for passage in passages] != [store.passage_ids[row] for row in rows]:
        return False
    titles, texts = (
        run.tokenizer.texts([getattr(passage, field) for passage in passages])
        for field in ("title", "text")
    )
    return all(
        np.array_equal(given.row(number), kept.row(row))
        for given, kept in ((titles, store.titles), (texts, store.texts))
        for number, row in enumerate(rows)
    )


def with_topics(
    run: Run, store: tokens.Store, topics_file: pathlib.Path, qrels_file: pathlib.Path
) -> tuple[tokens.Store, str]:
    """Returns the store with a further split, and its name: queries and labels of files.

    The split is named after the topics file. Its queries are those with a relevant passage. Raises
    InputError for labels of what the corpus or the topics lack, and for files that cannot be used.
    """
    name = stem(topics_file)
    if name in store.splits:
        raise InputError(
            f"{topics_file}: the run has a split {name!r} of its own, and results are named after the "
            "file; rename it"
        )
    qrels = list(files.labels(files.open_file(qrels_file)))
    judged = {label.query_id for label in qrels if label.relevance > 0}
    given, left = list(topics.topics(topics_file)), collection.Left()
    queries = [query for query in topics.asked(given, left) if query.id in judged]
    ids = [query.id for query in queries]
    query_rows = {query.id: -1 for query in given if not query.text.strip()} | rows_of(ids)
    labels = collection.check_qrels(qrels, query_rows, rows_of(store.passage_ids), left)
    for line in left.lines():
        tqdm.tqdm.write(f"  {name}: {line}")
    if not ids:
        raise InputError(f"{qrels_file}: no relevance is above 0; give labels of {topics_file}")
    strings = tuple(query.text for query in queries)
    further = tokens.Queries(
        run.tokenizer.texts(list(strings)),
        ids,
        np.stack(labels).astype(np.int64),
        fingerprint=files.content_hash([topics_file, qrels_file]),
        strings=strings,
    )
    further = own_texts.of_queries(store, further, run.config.data.ignore_identical_ids)
    return dataclasses.replace(store, splits={**store.splits, name: further}), name


def rows_of(ids: Sequence[str]) -> dict[str, int]:
    """Returns the row number of each id."""
    return {key: row for row, key in enumerate(ids)}


def stem(file: pathlib.Path) -> str:
    """Returns the name without its ending of a file of topics or candidates, as results are named."""
    return re.sub(r"(\.tsv|\.txt|\.jsonl|\.trec|\.run)?(\.gz)?$", "", file.name)
