"""Judgement of passages by answer strings: DPR's rule for open-domain question answering.

A passage is a hit if its text contains the tokens of one of the question's answers in a row. Text and
answers are put into Unicode's NFD form, lower-cased, and cut into runs of letters, digits and marks and
single other characters (Karpukhin et al. 2020, as in DrQA). The title does not count. An answer without
tokens is in no passage, where DPR's own loop finds it in every one.

Shape suffixes: Q queries, K results of a query, H passages that hold an answer.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import regex

from rqv2_jax.ranking.metrics import Qrels

_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def joined(text: str) -> str:
    """Returns the tokens of a text between single spaces, which no token contains."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFD", text))
    return f" {' '.join(token.lower() for token in tokens)} "


def judge(
    passages_QxK: np.ndarray, answers_Q: Sequence[Iterable[str]], texts: Mapping[int, str]
) -> Qrels:
    """Returns qrels of a run, in which every retrieved passage that holds an answer is relevant.

    `passages_QxK` are rows, negative where there is none; `texts` has each one's text by its row,
    without the title, as `joined` gives it.
    """
    hits = []
    for query, (passages_K, answers) in enumerate(zip(passages_QxK, answers_Q, strict=True)):
        wanted = [tokens for tokens in map(joined, answers) if tokens.strip()]
        rows = passages_K[passages_K >= 0].tolist()
        hits += [(query, row, 1) for row in rows if any(tokens in texts[row] for tokens in wanted)]
    table_Hx3 = np.array(hits, np.int64).reshape(-1, 3)
    return table_Hx3[:, 0], table_Hx3[:, 1], table_Hx3[:, 2]
