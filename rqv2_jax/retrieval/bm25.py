"""BM25 over words, by bm25s (Lù 2024): what a trained retriever has to beat.

Shape suffixes: Q queries, K depth, P passages that a query is scored with.
"""

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tqdm
from ml_collections import ConfigDict

# The variant of BM25 in Lucene, and so in Anserini, Elasticsearch and the papers' baselines.
METHOD = "lucene"
PACKAGES = ("bm25s", "Stemmer")
# What bm25s takes for a word.
WORD = re.compile(r"(?u)\b\w\w+\b")


@dataclasses.dataclass(frozen=True)
class Index:
    """BM25's index of passages; `scorer` is bm25s's, None if no passage has a word."""

    scorer: Any
    count: int
    options: dict[str, Any]

    def search(self, queries: list[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the `depth` passages of each query with the highest BM25 scores, best first.

        Returns:
          (rows [Q, K] int64, scores [Q, K] float32); row -1 and score -inf where fewer passages
          share a word with the query.
        """
        depth = min(depth, self.count)
        if self.scorer is None:
            shape = len(queries), depth
            return np.full(shape, -1), np.full(shape, -np.inf, np.float32)
        # bm25s would take JAX, and with it an accelerator, for every query by itself.
        rows_QxK, scores_QxK = self.scorer.retrieve(
            self._words(queries), k=depth, backend_selection="numpy", show_progress=False
        )
        matched_QxK = scores_QxK > 0
        return np.where(matched_QxK, rows_QxK, -1), np.where(matched_QxK, scores_QxK, -np.inf)

    def scores(self, queries: list[str], rows_QxP: np.ndarray) -> np.ndarray:
        """Returns the scores [Q, P] float32 of some passages for each query, as `search` has them.

        It is 0 where a passage and the query share no word.
        """
        scores_QxP = np.zeros(rows_QxP.shape, np.float32)
        if self.scorer is None:
            return scores_QxP
        for scores_P, words, rows_P in zip(scores_QxP, self._words(queries), rows_QxP):
            if words:
                scores_P[:] = self.scorer.get_scores(words)[rows_P]
        return scores_QxP

    def _words(self, queries: list[str]) -> list[list[str]]:
        """Returns the stemmed words of each query."""
        import bm25s

        return bm25s.tokenize(queries, return_ids=False, **self.options)


def build(passages: Iterable[str], settings: ConfigDict) -> Index:
    """Indexes passages, which are read once; only their words are held in memory.

    Words are runs of two or more letters, digits or underscores, lower-cased and stemmed; there are no
    stop words. `settings` is `config.evaluate.bm25`.
    """
    # Slow to import, and needed by few commands.
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer(settings.stemmer) if settings.stemmer else None
    options = {"stopwords": None, "stemmer": stemmer, "show_progress": False}
    with tqdm.tqdm(passages, desc="bm25: read passages", unit=" passages") as bar:
        words = bm25s.tokenize(bar, **options)
    if not words.vocab:
        return Index(None, len(words.ids), options)
    scorer = bm25s.BM25(k1=settings.k1, b=settings.b, method=METHOD, csc_backend="scipy")
    scorer.index(words, show_progress=False)
    return Index(scorer, len(words.ids), options)


def search(
    passages: Iterable[str], queries: list[str], depth: int, settings: ConfigDict
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `Index.search` finds for queries in passages that are read once, by `build`."""
    return build(passages, settings).search(queries, depth)


def scores(
    passages: Iterable[str], queries: list[str], rows_QxP: np.ndarray, settings: ConfigDict
) -> np.ndarray:
    """Returns the scores [Q, P] that `Index.scores` gives passages that are read once, by `build`."""
    return build(passages, settings).scores(queries, rows_QxP)


def stemmer(settings: ConfigDict) -> Callable[[str], str]:
    """Returns a function that gives the stem by which a word is found, "" of an English stop word.

    BM25 itself has no stop words; they are for people, to whom every "the" that is marked is noise.
    """
    import Stemmer
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    stem = Stemmer.Stemmer(settings.stemmer).stemWord if settings.stemmer else str
    ignored = set(STOPWORDS_EN_PLUS) if settings.stemmer == "english" else set()
    return lambda word: "" if word.lower() in ignored else stem(word.lower())


def described(settings: ConfigDict) -> dict[str, Any]:
    """Returns the method as results record it: variant, parameters, stemmer, library and version."""
    library = f"bm25s {importlib.metadata.version('bm25s')}"
    parameters = {"k1": settings.k1, "b": settings.b, "stemmer": settings.stemmer}
    return {"variant": METHOD, **parameters, "library": library}
