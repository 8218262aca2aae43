"""The doctor's checks of what has been read: whole batches, joint lists, truncation, tokens.

Shape suffixes: N passages of the lists, L lists, P passages of a list, M known pairs.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rqv2_jax.data.lists import training_lists
from rqv2_jax.data.tokens import Tokenizer
from rqv2_jax.tools.doctor_report import Finding, share
from rqv2_jax.tools.doctor_streams import Lengths, pair

# Shares of all tokens. More, lost to truncation, is a warning.
MUCH_LOST = 0.1
# More of [UNK] is a warning, for the models cannot read them.
MUCH_UNKNOWN = 0.05
LISTS_AT_ONCE = 1 << 16


def batches(config: ConfigDict, num_lists: dict[str, int]) -> list[Finding]:
    """Finds stages whose lists are known to be too few for a single step.

    Denoised positives, which the re-ranker finds, may head more lists of joint training.
    """
    hybrid = config.joint.denoised_share > 0 and not config.joint.lists
    findings = []
    for stage, count in num_lists.items():
        settings = config[stage]
        lists = training_lists(settings, count)
        if settings.epochs and lists < settings.batch:
            kind = "warning" if stage == "joint" and hybrid else "error"
            what = (
                f"{lists:,} lists in {settings.epochs:g} epochs, fewer than one batch of "
                f"{settings.batch}; lower config.{stage}.batch or raise config.{stage}.epochs"
            )
            findings.append(Finding(kind, f"{stage} stage", what))
    return findings


def lists(
    path: Path,
    query_texts_L: np.ndarray,
    texts_N: np.ndarray,
    passages_LxP: np.ndarray,
    known_M: np.ndarray,
) -> list[Finding]:
    """Finds lists that hold a passage twice, or a known positive among the negatives.

    Texts are given by their hashes, known positives by those of query and passage together.
    """
    repeated_L, doubtful_L = np.zeros((2, len(query_texts_L)), bool)
    for first in range(0, len(query_texts_L), LISTS_AT_ONCE):
        part = slice(first, first + LISTS_AT_ONCE)
        texts_LxP = texts_N[passages_LxP[part]]
        sorted_LxP = np.sort(texts_LxP, axis=1)
        repeated_L[part] = (sorted_LxP[:, 1:] == sorted_LxP[:, :-1]).any(axis=1)
        pairs_LxP = pair(query_texts_L[part, None], texts_LxP[:, 1:])
        doubtful_L[part] = np.isin(pairs_LxP, known_M).any(axis=1)
    findings = []
    for wrong_L, what in (
        (repeated_L, "hold a passage twice"),
        (doubtful_L, "have a known positive of their query among the negatives"),
    ):
        if wrong_L.any():
            what = f"{share(wrong_L.sum(), len(wrong_L), 'lists')} {what}"
            what += f", first list {wrong_L.argmax() + 1:,} of {path}; mend or remove them"
            findings.append(Finding("warning", "joint lists", what))
    return findings


def truncation(lengths: list[Lengths]) -> list[Finding]:
    """Finds inputs of which truncation takes many tokens."""
    return [
        Finding(
            "warning",
            f"{row.name} tokens",
            f"truncation to {row.limit} shortens {row.cut:.1%} of the inputs and takes "
            f"{row.lost:.1%} of the tokens; raise config.data.{row.name}_length, or split long "
            "texts",
        )
        for row in lengths
        if row.lost > MUCH_LOST
    ]


def unknown_tokens(
    tokenizer: Tokenizer, passages: list[tuple[str, str]], queries: list[str]
) -> list[Finding]:
    """Finds texts that the tokenizer has no tokens for."""
    findings = []
    if tokenizer.unknown is None:
        return findings
    joined = [f"{title} {text}" for title, text in passages]
    for where, strings in (("passages", joined), ("queries", queries)):
        tokens = tokenizer.texts(strings).tokens
        count = (tokens == tokenizer.unknown).sum()
        if count > MUCH_UNKNOWN * len(tokens):
            what = (
                f"{share(count, len(tokens), 'sampled tokens')} are [UNK], which says nothing to "
                "the models; take weights whose vocabulary has this language"
            )
            findings.append(Finding("warning", where, what))
    return findings
