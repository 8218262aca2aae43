"""Model inputs from stored tokens: which special tokens, types and truncation each model reads."""

import dataclasses

import numpy as np

from rqv2_jax.data.packing import Piece, Ragged, assemble
from rqv2_jax.data.tokens import Store, Texts


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How tokens become model inputs.

    Query `[CLS] query [SEP]`; pair `[CLS] query [SEP] title text [SEP]` with types 0 and 1; passage
    `[CLS] title [SEP] text [SEP]` with types 0 and 1 (`title_sep_text`, as RocketQAv2) or
    `[CLS] title text [SEP]` of type 0 (`title_text`, as sentence-transformers). Lengths are in tokens,
    special tokens included. Where title and text are too long together, the longer loses tokens first.
    """

    cls: int
    sep: int
    titles: bool
    passage_format: str
    query_length: int
    passage_length: int
    pair_length: int

    def queries(self, texts: Texts, rows_N: np.ndarray) -> Ragged:
        """Queries as the retriever reads them."""
        n = len(rows_N)
        kept_N = np.minimum(texts.lengths(rows_N), self.query_length - 2)
        query = Piece(texts.tokens, texts.offsets[rows_N], kept_N, 0)
        return assemble([_special(self.cls, n, 0), query, _special(self.sep, n, 0)])

    def passages(self, store: Store, rows_N: np.ndarray) -> Ragged:
        """Passages as the retriever reads them."""
        n = len(rows_N)
        separate = self.passage_format == "title_sep_text"
        budget_N = np.full(n, self.passage_length - (3 if separate else 2))
        title, text = self._title_and_text(store, rows_N, budget_N, (0, int(separate)))
        between = [_special(self.sep, n, 0)] if separate else []
        end = _special(self.sep, n, int(separate))
        return assemble([_special(self.cls, n, 0), title, *between, text, end])

    def pairs(self, store: Store, texts: Texts, query_rows_N, passage_rows_N) -> Ragged:
        """Pairs as the re-ranker reads them."""
        n = len(query_rows_N)
        kept_N = np.minimum(texts.lengths(query_rows_N), self.query_length - 2)
        query = Piece(texts.tokens, texts.offsets[query_rows_N], kept_N, 0)
        budget_N = self.pair_length - 3 - kept_N
        title, text = self._title_and_text(store, passage_rows_N, budget_N, (1, 1))
        start, middle = _special(self.cls, n, 0), _special(self.sep, n, 0)
        return assemble([start, query, middle, title, text, _special(self.sep, n, 1)])

    def query_lengths(self, texts: Texts, rows: np.ndarray) -> np.ndarray:
        """The lengths `queries` gives, without building them; any shape of rows."""
        return np.minimum(texts.lengths(rows) + 2, self.query_length)

    def passage_lengths(self, store: Store, rows: np.ndarray) -> np.ndarray:
        """The lengths `passages` gives, without building them; any shape of rows."""
        specials = 3 if self.passage_format == "title_sep_text" else 2
        return np.minimum(self._body_lengths(store, rows) + specials, self.passage_length)

    def pair_lengths(self, store: Store, texts: Texts, query_rows, passage_rows) -> np.ndarray:
        """The lengths `pairs` gives, without building them; the shapes of the rows broadcast."""
        query = np.minimum(texts.lengths(query_rows), self.query_length - 2)
        return np.minimum(query + self._body_lengths(store, passage_rows) + 3, self.pair_length)

    def _body_lengths(self, store, rows):
        titles = store.titles.lengths(rows) if self.titles else 0
        return store.texts.lengths(rows) + titles

    def _title_and_text(self, store, rows_N, budget_N, types) -> tuple[Piece, Piece]:
        text_N = store.texts.lengths(rows_N)
        title_N = store.titles.lengths(rows_N) if self.titles else np.zeros_like(text_N)
        half_N = budget_N // 2
        # The longer keeps an odd token; on equal lengths the text, as in tokenizers' longest_first.
        share_N = np.where(title_N > text_N, budget_N - half_N, half_N)
        kept_title_N = np.minimum(title_N, np.maximum(share_N, budget_N - text_N))
        kept_text_N = np.minimum(text_N, budget_N - kept_title_N)
        return (
            Piece(store.titles.tokens, store.titles.offsets[rows_N], kept_title_N, types[0]),
            Piece(store.texts.tokens, store.texts.offsets[rows_N], kept_text_N, types[1]),
        )


def _special(token: int, count: int, type: int) -> Piece:
    return Piece(np.array([token]), np.zeros(count, np.int64), np.ones(count, np.int64), type)
