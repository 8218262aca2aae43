"""The doctor's findings, the checks of what has been read, and the report as text for people.

Shape suffixes: N passages of the lists, L lists, P passages of a list, M known pairs.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rqv2_jax.data.lists import training_lists
from rqv2_jax.data.tokenise import Tokenizer
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


def batches(config: ConfigDict, num_lists: dict[str, int]) -> Iterator[Finding]:
    """Yields a finding for each stage whose lists are known to be too few for a single step.

    Denoised positives, which the re-ranker finds, may head more lists of joint training.
    """
    hybrid = config.joint.denoised_share > 0 and not config.joint.lists
    for stage, count in num_lists.items():
        settings = config[stage]
        lists = training_lists(settings, count)
        if settings.epochs and lists < settings.batch:
            yield Finding(
                "warning" if stage == "joint" and hybrid else "error",
                f"{stage} stage",
                f"{lists:,} lists in {settings.epochs:g} epochs, fewer than one batch of "
                f"{settings.batch}; lower config.{stage}.batch or raise config.{stage}.epochs",
            )


def lists(
    path: Path,
    queries_L: np.ndarray,
    texts_N: np.ndarray,
    rows_LxP: np.ndarray,
    known_M: np.ndarray,
) -> Iterator[Finding]:
    """Yields findings of lists with a passage twice, or with a known positive among the negatives.

    Args:
      queries_L, texts_N: hashes of the lists' queries and of all passages, of which `rows_LxP` are
        rows.
      known_M: hashes of known positives and their queries together.
    """
    repeated_L, doubtful_L = np.zeros((2, len(queries_L)), bool)
    for first in range(0, len(queries_L), LISTS_AT_ONCE):
        part = slice(first, first + LISTS_AT_ONCE)
        texts_LxP = texts_N[rows_LxP[part]]
        sorted_LxP = np.sort(texts_LxP, axis=1)
        repeated_L[part] = (sorted_LxP[:, 1:] == sorted_LxP[:, :-1]).any(axis=1)
        pairs_LxP = pair(queries_L[part, None], texts_LxP[:, 1:])
        doubtful_L[part] = np.isin(pairs_LxP, known_M).any(axis=1)
    for wrong_L, what in (
        (repeated_L, "hold a passage twice"),
        (doubtful_L, "have a known positive of their query among the negatives"),
    ):
        if wrong_L.any():
            some = share(wrong_L.sum(), len(wrong_L), "lists")
            first = f"first list {wrong_L.argmax() + 1:,} of {path}"
            what = f"{some} {what}, {first}; mend or remove them"
            yield Finding("warning", "joint lists", what)


def truncation(lengths: list[Lengths]) -> Iterator[Finding]:
    """Yields a finding for each kind of input of which truncation takes many tokens."""
    for row in lengths:
        if row.lost > MUCH_LOST:
            yield Finding(
                "warning",
                f"{row.name} tokens",
                f"truncation to {row.limit} shortens {row.cut:.1%} of the inputs and takes "
                f"{row.lost:.1%} of the tokens; raise config.data.{row.name}_length, or split long "
                "texts",
            )


def unknown_tokens(
    tokenizer: Tokenizer, passages: list[tuple[str, str]], queries: list[str]
) -> Iterator[Finding]:
    """Yields a finding for texts that a tokenizer, or the re-ranker's beside it, has no tokens for."""
    sampled = {"passages": [f"{title} {text}" for title, text in passages], "queries": queries}
    readers = {"the models": tokenizer}
    if tokenizer.pairs is not None:
        readers = {"the retriever": tokenizer, "the re-ranker": tokenizer.pairs}
    for (reader, own), (where, strings) in itertools.product(readers.items(), sampled.items()):
        if own.unknown is None:
            continue
        tokens = list(itertools.chain.from_iterable(own.encode(strings)))
        count = tokens.count(own.unknown)
        if count > MUCH_UNKNOWN * len(tokens):
            yield Finding(
                "warning",
                where,
                f"{share(count, len(tokens), 'sampled tokens')} are [UNK], which says nothing to "
                f"{reader}; take weights whose vocabulary has this language",
            )


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
