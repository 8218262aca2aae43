"""Answers questions over a finished workdir, one after the other, by models that are loaded once.

An answer has a column for each system that ranks passages: the retriever, the re-ranker, and, where
asked for, the floors that training has to beat. Shape suffixes: K passages found, R re-ranked.
"""

import contextlib
import dataclasses
import io
import json
import textwrap
import time
from collections.abc import Callable

import numpy as np

from rqv2_jax import optional
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import rankings, scorer
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.texts import open_passages, open_store
from rqv2_jax.retrieval import bm25, rerank

NO_LABELS_3x0 = np.zeros((3, 0), np.int64)


@dataclasses.dataclass(frozen=True)
class Column:
    """How one system ranks passages: their rows in the corpus, best first, with scores.

    A score is None where the system has none: beyond the first passages, which are re-ranked, the
    re-ranker keeps the retriever's order. `missing` says why a system has no passages at all.
    """

    system: str  # "retriever", "reranker", "bm25" or "released"
    rows: tuple[int, ...] = ()
    scores: tuple[float | None, ...] = ()
    missing: str = ""

    def rank(self, row: int) -> int | None:
        """Returns a passage's rank, from 1; None if the system did not find it."""
        return self.rows.index(row) + 1 if row in self.rows else None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the systems found for a question among so many passages; ids and texts of the shown ones."""

    question: str
    columns: tuple[Column, ...]
    passages: int
    shown: int
    ids: dict[int, str]
    texts: dict[int, str]
    seconds: float

    def column(self, system: str) -> Column:
        """Returns the column of a system."""
        (found,) = (column for column in self.columns if column.system == system)
        return found


Answers = Callable[[str], Answer]


def open_answers(run: Run, *, state: str, index_name: str, shown: int) -> Answers:
    """Loads a state's retriever and re-ranker; returns the function that answers by both.

    `shown` passages of each column, at most, come with id and text. Raises InputError for a state that
    has not been reached, and for texts that are gone or have changed.
    """
    store = open_store(run)
    by_models = _by_models(run, store, state=state, index_name=index_name)
    return _answers(run, store, by_models, shown=shown)


def open_compared(run: Run, *, state: str, index_name: str, shown: int, encoded: bool) -> Answers:
    """Does what `open_answers` does, with columns of BM25 and of the released model beside.

    Unless the released model's vectors of the passages may be `encoded` now, it is a column that says
    that they are missing, where they are.
    """
    store = open_store(run)
    systems = (
        _by_models(run, store, state=state, index_name=index_name),
        _floor("bm25", lambda: _by_bm25(run, store)),
        _floor("released", lambda: _by_released(run, store, encoded)),
    )
    return _answers(run, store, *systems, shown=shown)


def open_stemmer(run: Run) -> Callable[[str], str]:
    """Returns the function by which words of a question are found in passages, as BM25 finds them.

    Where its packages are missing, words have to be the same.
    """
    try:
        for package in bm25.PACKAGES:
            optional.load(package, "stems of words")
    except InputError:
        return str.lower
    return bm25.stemmer(run.config.evaluate.bm25)


# Columns for a question, given as text and as tokens.
System = Callable[[str, tokens.Queries], list[Column]]


def _answers(run: Run, store: tokens.Store, *systems: System, shown: int) -> Answers:
    passages = open_passages(run, store)

    def answer(question: str) -> Answer:
        started = time.perf_counter()
        asked = tokens.Queries(run.tokenizer.texts([question]), ["question"], NO_LABELS_3x0)
        # A progress bar for each of so short steps would bury the answer.
        with contextlib.redirect_stderr(io.StringIO()):
            columns = tuple(column for system in systems for column in system(question, asked))
        rows = {row for column in columns for row in column.rows[:shown]}
        ids = {row: store.passage_ids[row] for row in rows}
        texts = passages(rows)
        seconds = time.perf_counter() - started
        return Answer(question, columns, len(store.passage_ids), shown, ids, texts, seconds)

    return answer


def _by_models(run: Run, store: tokens.Store, *, state: str, index_name: str) -> System:
    """Returns the columns of the retriever and the re-ranker."""
    search = scorer.open_search(run, store, state=state, index_name=index_name)

    def columns(_: str, asked: tokens.Queries) -> list[Column]:
        passages_1xK, retriever_1xK, reranker_1xR = search(asked)
        merged_K = rerank.merge(reranker_1xR, retriever_1xK)[0]
        reranked_K = np.argsort(-merged_K, kind="stable")
        scores: list[float | None] = [None] * len(merged_K)
        scores[: reranker_1xR.shape[1]] = map(_number, reranker_1xR[0])
        ranked = [n for n in reranked_K.tolist() if passages_1xK[0, n] >= 0]
        return [
            _column("retriever", passages_1xK[0], retriever_1xK[0]),
            Column(
                "reranker",
                tuple(passages_1xK[0, ranked].tolist()),
                tuple(scores[n] for n in ranked),
            ),
        ]

    return columns


def _by_bm25(run: Run, store: tokens.Store) -> System:
    search = rankings.open_bm25(run, store)

    def columns(question: str, _: tokens.Queries) -> list[Column]:
        passages_1xK, scores_1xK = search([question])
        found = _column("bm25", passages_1xK[0], scores_1xK[0])
        if not found.rows:
            found = Column("bm25", missing="no passage has a word of the question")
        return [found]

    return columns


def _by_released(run: Run, store: tokens.Store, encoded: bool) -> System:
    search = rankings.open_released(run, store, encoded=encoded)

    def columns(_: str, asked: tokens.Queries) -> list[Column]:
        passages_1xK, scores_1xK = search(asked, np.arange(1))
        return [_column("released", passages_1xK[0], scores_1xK[0])]

    return columns


def _floor(system: str, opened: Callable[[], System]) -> System:
    """Returns the columns of a floor; if it cannot be opened, one column that says why."""
    try:
        return opened()
    except InputError as e:
        missing = Column(system, missing=str(e))
        return lambda *_: [missing]


def _column(system: str, passages_K: np.ndarray, scores_K: np.ndarray) -> Column:
    """Returns a column of passages that are ranked already, without padding."""
    found_K = passages_K >= 0
    scores = tuple(map(_number, scores_K[found_K]))
    return Column(system, tuple(passages_K[found_K].tolist()), scores)


def _number(score: np.float32) -> float:
    """Returns the shortest decimal number that is this one in float32."""
    return float(str(score))


def as_text(answer: Answer) -> str:
    """Returns the best passages by the re-ranker, with both scores, as text for people."""
    retriever, reranker = answer.column("retriever"), answer.column("reranker")
    score_of = dict(zip(retriever.rows, retriever.scores))
    lines = ["rank  re-ranker  retriever  passage"]
    best = zip(reranker.rows[: answer.shown], reranker.scores)
    for rank, (row, score) in enumerate(best, start=1):
        by_reranker = "" if score is None else f"{score:.3f}"
        lines.append(f"{rank:4}  {by_reranker:>9}  {score_of[row]:9.3f}  {answer.ids[row]}")
        text = textwrap.fill(textwrap.shorten(answer.texts[row], 280, placeholder=" ..."), 94)
        lines.append(textwrap.indent(text, " " * 6))
    return "\n".join(lines)


def as_json(answer: Answer) -> str:
    """Returns the best passages by the re-ranker, with ranks and scores of both, as a line of JSON."""
    retriever, reranker = answer.column("retriever"), answer.column("reranker")
    score_of = dict(zip(retriever.rows, retriever.scores))
    hits = [
        {
            "id": answer.ids[row],
            "reranker_rank": rank,
            "reranker_score": score,
            "retriever_rank": retriever.rank(row),
            "retriever_score": score_of[row],
            "text": answer.texts[row],
        }
        for rank, (row, score) in enumerate(
            zip(reranker.rows[: answer.shown], reranker.scores), start=1
        )
    ]
    return json.dumps({"query": answer.question, "hits": hits})
