"""What the official programs say of small files, written down; ours must say the same.

MS MARCO's ms_marco_eval.py (github.com/microsoft/MSMARCO-Passage-Ranking), DPR's has_answer and top-k
accuracy (dpr/data/qa_validation.py of github.com/facebookresearch/DPR) and trec_eval 9.
"""

import numpy as np
import pytest

from rqv2_jax.ranking import answers, metrics
from rqv2_jax.recipe import compare


def holds(text, strings):
    """Whether a passage with this text answers a question with these answers."""
    return bool(len(answers.judge(np.array([[0]]), [strings], {0: answers.joined(text)})[0]))


def means(folder, run, qrels, names, min_relevance=1):
    """Of a run {query: {passage: score}} through both files, as evaluate --compare reads them."""
    (folder / "qrels").write_text(qrels)
    lines = [f"{q} Q0 {p} 0 {s} x\n" for q, found in run.items() for p, s in found.items()]
    (folder / "run.trec").write_text("".join(lines))
    files = [folder / name for name in ("run.trec", "run.trec", "qrels")]
    rows, queries, _ = compare.compare(
        *files, names=names, min_relevance=min_relevance, permutations=9, seed=0
    )
    return {row["metric"]: row["a"] for row in rows}, queries


def test_msmarco_passage_eval(tmp_path):
    """MRR @10: 0.2866666666666667; first hits at ranks 1, 3, 10 and 11, query 5 has no list."""
    ranked = {
        1: [101, 102, 103],
        2: [201, 202, 203, 204, 205],
        3: range(301, 312),
        4: range(401, 413),
        6: [601, 602],
    }
    run = {q: {p: -rank for rank, p in enumerate(found)} for q, found in ranked.items()}
    qrels = "1\t0\t101\t1\n2\t0\t203\t1\n2\t0\t205\t1\n3\t0\t310\t1\n4\t0\t411\t1\n5\t0\t501\t1\n"
    found, queries = means(tmp_path, run, qrels, ["RR@10"])
    assert found == {"RR@10": pytest.approx(0.2866666666666667, abs=1e-12)}
    assert queries == 5


# trec_eval -c -l LEVEL: recip_rank, success, recall and ndcg_cut over all queries of the qrels.
TREC_EVAL = {
    1: (0.4, 0.25, 0.5, 0.416667, 0.666667, 0.291003, 0.306179),
    2: (0.166667, 0.0, 0.5, 0.375, 0.625, 0.291003, 0.306179),
    3: (0.083333, 0.0, 0.25, 0.25, 0.5, 0.291003, 0.306179),
}


@pytest.mark.parametrize("level", [1, 2, 3])
def test_trec_eval(tmp_path, level):
    """Graded labels, a tie across a relevant passage, a query without results, one without labels."""
    run = {
        1: {"d1": 9, "d2": 8, "d3": 7, "d4": 6, "d5": 5},
        2: {"d9": 3, "d8": 3, "d7": 3, "d6": 2},
        3: {f"e{n}": 30 - n for n in range(10, 23)},
        5: {"d1": 1},
    }
    labels = {
        1: {"d2": 1, "d4": 3, "d7": 2, "d1": 0},
        2: {"d7": 2, "d9": 1, "d8": 0, "d1": -1},
        3: {"e19": 1, "e21": 3, "e22": 2},
        4: {"d1": 2},
    }
    qrels = "".join(f"{q} 0 {p} {r}\n" for q, judged in labels.items() for p, r in judged.items())
    names = ["RR@100", "Success@1", "Success@5", "R@5", "R@1000", "nDCG@5", "nDCG@10"]
    found, _ = means(tmp_path, run, qrels, names, level)
    assert tuple(found) == metrics.at_relevance(names, level)
    assert list(found.values()) == pytest.approx(TREC_EVAL[level], abs=5e-7)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Beyonc\u00e9 sang", "Beyonce\u0301", True),
        ("Beyonce\u0301 sang", "BEYONC\u00c9", True),
        ("Beyonce sang", "Beyonc\u00e9", False),
        ("東京都は日本の首都です", "東京", False),
        ("東京 は 首都", "東京", True),
        ("首都は、東京。", "東京", True),
        ("서울 특별시", "서울", True),
        ("서울특별시", "서울", False),
        ("नई दिल्ली में", "दिल्ली", True),
        ("\u0645\u064f\u062d\u064e\u0645\u064e\u0651\u062f", "\u0645\u062d\u0645\u062f", False),
        ("İstanbul", "istanbul", False),
        ("İSTANBUL", "İstanbul", True),
        ("die Straße", "STRASSE", False),
        ("\ufb01nland", "finland", False),
        ("ΟΔΟΣ", "οδος", True),
        ("ΟΔΟΣ", "οδοσ", False),
        ("O'Brien said", "o ' brien", True),
        ("O\u2019Brien said", "O'Brien", False),
        ("about 1,000 men", "1000", False),
        ("about 1,000 men", "1 , 000", True),
        ("x\u00b2 + y", "x2", False),
        ("foo_bar", "foo", True),
        ("co\u00adoperate", "cooperate", False),
        ("New\u00a0York", "new york", True),
        ("New\nYork", "New York", True),
        ("\U0001f469\u200d\U0001f52c at work", "\U0001f469\U0001f52c", True),
        ("the U.S. Army", "US", False),
        ("C++ and C#", "C#", True),
        ("a b", "a b c", False),
        ("", "a", False),
    ],
)
def test_dpr_has_answer(text, answer, expected):
    assert holds(text, [answer]) == expected
    assert holds(text, ["not there", answer]) == expected


@pytest.mark.parametrize("text", ["anything", ""])
@pytest.mark.parametrize("answer", ["", " \u200b\n"], ids=["empty", "without tokens"])
def test_answers_without_tokens_are_the_one_difference(text, answer):
    """DPR's loop finds them in every text, so that one would make all passages hits."""
    assert not holds(text, [answer])


def test_dpr_top_k_accuracy():
    """top_k_hits of calculate_matches: 1, 2, 2, 2, 4 of 5 questions for k from 1 to 5."""
    texts = [
        "Marie Curie was born in Warsaw.",
        "Warszawa is the capital.",
        "She moved to Paris in 1891.",
        "Curie\u0301 and Sk\u0142odowska",
        "No one.",
    ]
    asked = [["Warsaw", "Warszawa"], ["1891"], ["Curi\u00e9"], ["London"], ["capital"]]
    ranked = ["EBACD", "CABDE", "ABCED", "ABCDE", "EDCAB"]
    passages_QxK = np.array([["ABCDE".index(letter) for letter in row] for row in ranked])
    qrels = answers.judge(passages_QxK, asked, dict(enumerate(map(answers.joined, texts))))
    scores_QxK = np.tile(np.arange(5.0)[::-1], (5, 1))
    names = [f"Success@{k}" for k in range(1, 6)]
    found = metrics.evaluate(passages_QxK, scores_QxK, list("ABCDE"), qrels, names, np.arange(5))
    assert [values_Q.sum() for values_Q in found.values()] == [1, 2, 2, 2, 4]
