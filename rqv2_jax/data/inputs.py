"""Model inputs from stored tokens: special tokens, types and truncation of each model.

Shape suffix: N sequences.
"""

import dataclasses

import numpy as np

from rqv2_jax.data.packing import Piece, Ragged, assemble
from rqv2_jax.data.tokens import Store, Texts


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The special tokens, formats and lengths of model inputs.

    Query `[CLS] prompt query [SEP]`; pair `[CLS] query [SEP] title text [SEP]` with types 0 and 1, by
    the re-ranker's tokenizer; passage `[CLS] prompt title [SEP] text [SEP]` with types 0 and 1
    (`title_sep_text`, as RocketQAv2) or `[CLS] prompt title text [SEP]` of type 0 (`title_text`, as
    sentence-transformers). Lengths are in tokens, special tokens included. Where too long,
    `title text` is cut at its end in a passage of one type; elsewhere the longer of title and text
    loses tokens first, and so does the longer of a pair's query and passage: `query_length` is the
    retriever's alone.
    """

    cls: int
    sep: int
    pair_cls: int
    pair_sep: int
    titles: bool
    passage_format: str
    query_prompt: tuple[int, ...]
    passage_prompt: tuple[int, ...]
    query_length: int
    passage_length: int
    pair_length: int

    def queries(self, texts: Texts, rows_N: np.ndarray) -> Ragged:
        """Builds queries as the retriever reads them."""
        n = len(rows_N)
        kept_N = np.minimum(texts.lengths(rows_N), self.query_length - 2 - len(self.query_prompt))
        query = Piece(texts.tokens, texts.offsets[rows_N], kept_N, 0)
        start = _special((self.cls, *self.query_prompt), n, 0)
        return assemble([start, query, _special((self.sep,), n, 0)])

    def passages(self, store: Store, rows_N: np.ndarray) -> Ragged:
        """Builds passages as the retriever reads them."""
        n = len(rows_N)
        separate = self.passage_format == "title_sep_text"
        specials = (3 if separate else 2) + len(self.passage_prompt)
        budget_N = np.full(n, self.passage_length - specials)
        types = 0, int(separate)
        pieces = self._title_and_text(store, rows_N, budget_N, types, title_first=not separate)
        between = [_special((self.sep,), n, 0)] if separate else []
        start = _special((self.cls, *self.passage_prompt), n, 0)
        end = _special((self.sep,), n, int(separate))
        return assemble([start, pieces[0], *between, pieces[1], end])

    def pairs(
        self, store: Store, texts: Texts, query_rows_N: np.ndarray, passage_rows_N: np.ndarray
    ) -> Ragged:
        """Builds pairs as the re-ranker reads them."""
        n, texts = len(query_rows_N), texts.for_pairs()
        store, budget = store.for_pairs(), self.pair_length - 3
        body_N = self._body_lengths(store, passage_rows_N)
        kept_N = _kept_of_first(texts.lengths(query_rows_N), body_N, budget)
        query = Piece(texts.tokens, texts.offsets[query_rows_N], kept_N, 0)
        pieces = self._title_and_text(
            store, passage_rows_N, budget - kept_N, (1, 1), title_first=False
        )
        start, middle = _special((self.pair_cls,), n, 0), _special((self.pair_sep,), n, 0)
        return assemble([start, query, middle, *pieces, _special((self.pair_sep,), n, 1)])

    def query_lengths(self, texts: Texts, rows: np.ndarray) -> np.ndarray:
        """Returns the lengths `queries` gives, without building them; any shape of rows."""
        return np.minimum(texts.lengths(rows) + 2 + len(self.query_prompt), self.query_length)

    def passage_lengths(self, store: Store, rows: np.ndarray) -> np.ndarray:
        """Returns the lengths `passages` gives, without building them; any shape of rows."""
        specials = 3 if self.passage_format == "title_sep_text" else 2
        specials += len(self.passage_prompt)
        body = self._body_lengths(store, rows)
        return np.minimum(body + specials, self.passage_length)

    def pair_lengths(
        self, store: Store, texts: Texts, query_rows: np.ndarray, passage_rows: np.ndarray
    ) -> np.ndarray:
        """Returns the lengths `pairs` gives, without building them; shapes of rows broadcast."""
        body = self._body_lengths(store.for_pairs(), passage_rows)
        return np.minimum(texts.for_pairs().lengths(query_rows) + body + 3, self.pair_length)

    def _body_lengths(self, store: Store, rows: np.ndarray) -> np.ndarray:
        return store.texts.lengths(rows) + (store.titles.lengths(rows) if self.titles else 0)

    def _title_and_text(
        self,
        store: Store,
        rows_N: np.ndarray,
        budget_N: np.ndarray,
        types: tuple[int, int],
        *,
        title_first: bool,
    ) -> tuple[Piece, Piece]:
        titles, texts = store.titles, store.texts
        text_N = texts.lengths(rows_N)
        title_N = titles.lengths(rows_N) if self.titles else np.zeros_like(text_N)
        if title_first:
            kept_title_N = np.minimum(title_N, budget_N)
        else:
            kept_title_N = _kept_of_first(title_N, text_N, budget_N)
        kept_text_N = np.minimum(text_N, budget_N - kept_title_N)
        return (
            Piece(titles.tokens, titles.offsets[rows_N], kept_title_N, types[0]),
            Piece(texts.tokens, texts.offsets[rows_N], kept_text_N, types[1]),
        )


def _kept_of_first(
    first_N: np.ndarray, second_N: np.ndarray, budget: np.ndarray | int
) -> np.ndarray:
    """Returns how many tokens of a pair's first text stay, as by transformers' `longest_first`."""
    half = budget // 2
    # The longer keeps an odd token; on equal lengths the second.
    share_N = np.where(first_N > second_N, budget - half, half)
    return np.minimum(first_N, np.maximum(share_N, budget - second_N))


def _special(tokens: tuple[int, ...], count: int, type: int) -> Piece:
    return Piece(np.array(tokens), np.zeros(count, np.int64), np.full(count, len(tokens)), type)
