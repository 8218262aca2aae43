"""BM25 over words, by bm25s (Lù 2024): what a trained retriever has to beat.

Shape suffixes: Q queries, K depth, P passages that a query is scored with.
"""

import importlib.metadata
from collections.abc import Iterable
from typing import Any

import numpy as np
import tqdm
from ml_collections import ConfigDict

# The variant of BM25 in Lucene, and so in Anserini, Elasticsearch and the papers' baselines.
METHOD = "lucene"
PACKAGES = ("bm25s", "Stemmer")


def search(
    passages: Iterable[str], queries: list[str], depth: int, settings: ConfigDict
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `depth` passages of each query with the highest BM25 scores, best first.

    Words are runs of two or more letters, digits or underscores, lower-cased and stemmed; there are no
    stop words. The passages are read once, and only their words are held in memory. `settings` is
    `config.evaluate.bm25`.

    Returns:
      (rows [Q, K] int64, scores [Q, K] float32); row -1 and score -inf where fewer passages
      share a word with the query.
    """
    index, asked, count = _index(passages, queries, settings)
    depth = min(depth, count)
    if index is None:
        shape = len(queries), depth
        return np.full(shape, -1), np.full(shape, -np.inf, np.float32)
    # bm25s would take JAX, and with it an accelerator, for every query by itself.
    rows_QxK, scores_QxK = index.retrieve(
        asked, k=depth, backend_selection="numpy", show_progress=False
    )
    matched_QxK = scores_QxK > 0
    return np.where(matched_QxK, rows_QxK, -1), np.where(matched_QxK, scores_QxK, -np.inf)


def scores(
    passages: Iterable[str], queries: list[str], rows_QxP: np.ndarray, settings: ConfigDict
) -> np.ndarray:
    """Returns the BM25 scores [Q, P] float32 of some passages for each query, as `search` has them.

    It is 0 where a passage and the query share no word.
    """
    index, asked, _ = _index(passages, queries, settings)
    if index is None:
        return np.zeros(rows_QxP.shape, np.float32)
    scores_QxP = np.zeros(rows_QxP.shape, np.float32)
    for scores_P, words, rows_P in zip(scores_QxP, asked, rows_QxP):
        if words:
            scores_P[:] = index.get_scores(words)[rows_P]
    return scores_QxP


def _index(
    passages: Iterable[str], queries: list[str], settings: ConfigDict
) -> tuple[Any, list[list[str]], int]:
    """Returns an index, None if no passage has a word; the queries' words; the number of passages."""
    # Slow to import, and needed by few commands.
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer(settings.stemmer) if settings.stemmer else None
    options = {"stopwords": None, "stemmer": stemmer, "show_progress": False}
    with tqdm.tqdm(passages, desc="bm25: read passages", unit=" passages") as bar:
        words = bm25s.tokenize(bar, **options)
    asked, count = bm25s.tokenize(queries, return_ids=False, **options), len(words.ids)
    if not words.vocab:
        return None, asked, count
    index = bm25s.BM25(k1=settings.k1, b=settings.b, method=METHOD, csc_backend="scipy")
    index.index(words, show_progress=False)
    return index, asked, count


def described(settings: ConfigDict) -> dict[str, Any]:
    """Returns the method as results record it: variant, parameters, stemmer, library and version."""
    library = f"bm25s {importlib.metadata.version('bm25s')}"
    parameters = {"k1": settings.k1, "b": settings.b, "stemmer": settings.stemmer}
    return {"variant": METHOD, **parameters, "library": library}
