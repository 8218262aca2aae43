"""DPR's rule: which passages hold an answer."""

import unicodedata

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from rqv2_jax.ranking import answers


def holds(text, strings):
    """Whether a passage with this text answers a question with these answers."""
    return bool(len(answers.judge(np.array([[0]]), [strings], {0: answers.joined(text)})[0]))


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("It was Paris, in 1900.", "paris", True),
        ("It was Paris, in 1900.", "Paris in", False),
        ("It was Paris, in 1900.", "paris, IN", True),
        ("a party of three", "art", False),
        ("the U. S. army", "U.S.", True),
        ("the US army", "U.S.", False),
        ("14 July 1789", "July 17", False),
        ("the café", "the cafe\u0301", True),
        ("the cafe", "café", False),
        ("ΑΘΗΝΑ is a city", "αθηνα", True),
        ("price: $5", "$ 5", True),
        ("line\nbreaks do\tnot count", "breaks do not", True),
        ("anything", "", False),
        ("anything", " \u200b\n", False),
        ("", "anything", False),
    ],
)
def test_by_hand(text, answer, expected):
    assert holds(text, [answer]) == expected
    assert holds(text, ["nowhere to be found", answer]) == expected


def test_no_answers_are_nowhere():
    assert not holds("anything", [])


@given(
    st.text(st.sampled_from("aB é.\u0301,\u200b\n 1"), max_size=12),
    st.lists(st.text(st.sampled_from("aB é.\u0301,\u200b\n 1"), max_size=4), max_size=3),
)
def test_against_slices_of_token_lists(text, strings):
    def words(string):
        string = unicodedata.normalize("NFD", string)
        found = regex.finditer(r"([\p{L}\p{N}\p{M}]+)|([^\p{Z}\p{C}])", string)
        return [match.group().lower() for match in found]

    def within(part, whole):
        starts = range(len(whole) - len(part) + 1)
        return bool(part) and any(whole[i : i + len(part)] == part for i in starts)

    expected = any(within(words(string), words(text)) for string in strings)
    assert holds(text, strings) == expected


def test_judge_names_the_retrieved_passages_that_answer():
    texts = {3: "born in Ulm", 5: "died in Princeton", 8: "Ulm and Princeton"}
    texts = {row: answers.joined(text) for row, text in texts.items()}
    passages_QxK = np.array([[5, 3, 8], [3, -1, -1], [8, 5, -1]])
    found = answers.judge(passages_QxK, [("ulm",), ("princeton",), ("Princeton", "x")], texts)
    assert np.stack(found).T.tolist() == [[0, 3, 1], [0, 8, 1], [2, 8, 1], [2, 5, 1]]
    nothing = answers.judge(passages_QxK, [(), ("",), ()], texts)
    assert [array.shape for array in nothing] == [(0,), (0,), (0,)]
