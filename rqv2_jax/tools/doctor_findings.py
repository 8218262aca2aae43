"""The doctor's findings, the checks of what has been read, and the report as text for people.

Shape suffixes: N passages of the lists, L lists, P passages of a list, M known pairs.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rqv2_jax.data.lists import training_lists
from rqv2_jax.data.tokens import Tokenizer
from rqv2_jax.tools.doctor_streams import SAMPLED, Lengths, pair

# Shares of all tokens. More, lost to truncation, is a warning.
MUCH_LOST = 0.1
# More of [UNK] is a warning, for the models cannot read them.
MUCH_UNKNOWN = 0.05
LISTS_AT_ONCE = 1 << 16


class Finding(NamedTuple):
    """A fact about the data: `kind` is error, warning or note, `where` the stream it is in."""

    kind: str
    where: str
    what: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The doctor's result.

    `streams` are (name, items read, remark), `sampled` counts (passages, queries).
    """

    name: str
    streams: list[tuple[str, int, str]]
    sampled: tuple[int, int]
    lengths: list[Lengths]
    findings: list[Finding]

    def verdict(self) -> str:
        """Returns `ok`, `usable, with N warnings` or `not usable: N errors`."""
        errors, warnings = (
            sum(finding.kind == kind for finding in self.findings) for kind in ("error", "warning")
        )
        if errors:
            return f"not usable: {errors} error{'s' * (errors > 1)}"
        return f"usable, with {warnings} warning{'s' * (warnings > 1)}" if warnings else "ok"

    def usable(self) -> bool:
        """Says whether there is no error."""
        return all(finding.kind != "error" for finding in self.findings)


def share(part: int, whole: int, what: str) -> str:
    """Returns `part of whole what (percent)` as text."""
    return f"{part:,} of {whole:,} {what} ({part / max(whole, 1):.1%})"


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


def render(report: Report) -> str:
    """Returns the report as tables for people: findings, errors first, and the verdict last."""
    lines = [report.name, ""]
    if report.streams:
        lines.append(f"{'stream':<16}{'read':>12}")
    lines += [f"{name:<16}{count:>12,}   {remark}" for name, count, remark in report.streams]
    if report.lengths:
        passages, queries = report.sampled
        head = "".join(f"{name:>8}" for name in ("min", "median", "mean", "90%", "99%", "max"))
        lines += ["", f"tokens{head}{'limit':>10}{'inputs cut':>12}{'tokens lost':>13}"]
        for row in report.lengths:
            low, median, *high = (f"{value:>8,.0f}" for value in row.quantiles)
            line = f"{row.name:<8}{low[2:]}{median}{row.mean:>8.1f}{''.join(high)}"
            cut = f"{row.limit:>10}{row.cut:>12.1%}{row.lost:>13.1%}" if row.limit else f"{'-':>10}"
            lines.append(line + cut)
        lines.append(
            f"(of {queries:,} queries, {passages:,} passages and {SAMPLED:,} pairs of them, drawn at "
            "random; special tokens included)"
        )
    if lines[-1]:
        lines.append("")
    for kind in ("error", "warning", "note"):
        lines += [f"{kind:<8} {f.where}: {f.what}" for f in report.findings if f.kind == kind]
    lines += ["", report.verdict()] if report.findings else [report.verdict()]
    return "\n".join(lines)
