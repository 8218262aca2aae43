"""Does a passage answer a question? DPR's rule for open-domain question answering.

A passage is a hit if the tokens of one of the question's answers stand in its text, one after the
other. Both are put into Unicode's NFD form, lower-cased, and cut into runs of letters, digits and marks
and single other characters (Karpukhin et al. 2020, as in DrQA). The title does not count. An answer
without tokens is in no passage, where DPR's own loop finds it in every one.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import regex

from rqv2_jax.ranking.metrics import Qrels

_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def joined(text: str) -> str:
    """The tokens of a text between single spaces, which no token holds."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFD", text))
    return f" {' '.join(token.lower() for token in tokens)} "


def holds(text: str, answers: Iterable[str]) -> bool:
    """Whether one of the answers stands in the text."""
    return bool(_answering([joined(text)], [joined(answer) for answer in answers])[0])


def _answering(texts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    answers = [answer for answer in answers if answer.strip()]
    return [any(answer in text for answer in answers) for text in texts]


def judge(
    passages_QxK: np.ndarray, answers_Q: Sequence[Iterable[str]], texts: Mapping[int, str]
) -> Qrels:
    """Qrels of a run, in which every retrieved passage that holds an answer is relevant.

    Args:
      passages_QxK: passage rows, negative where there is none.
      answers_Q: the answers of each query.
      texts: text of every retrieved passage by its row, without its title, as `joined` gives it.
    """
    hits = []
    for query, (passages_K, answers) in enumerate(zip(passages_QxK, answers_Q, strict=True)):
        rows = passages_K[passages_K >= 0].tolist()
        found = _answering([texts[row] for row in rows], [joined(a) for a in answers])
        hits += [(query, row, 1) for row, hit in zip(rows, found) if hit]
    table_Hx3 = np.array(hits, np.int64).reshape(-1, 3)
    return table_Hx3[:, 0], table_Hx3[:, 1], table_Hx3[:, 2]
