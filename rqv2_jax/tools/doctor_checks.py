"""What the doctor keeps of the streams it reads, the checks of that, and the report as text.

Of a stream 8-byte hashes of its ids and texts are kept, and a random sample of the texts themselves.

Shape suffixes: N items of a stream, M ids looked up or known pairs, D repeats, L lists, P passages of
a list.
"""

import dataclasses
import itertools
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.lists import training_lists
from rqv2_jax.data.tokenise import Tokenizer
from rqv2_jax.data.tokens import Store
from rqv2_jax.recipe import needs

SAMPLED = 20_000
# A length in tokens that no input has, so that nothing is truncated.
UNLIMITED = 1 << 40
QUANTILES = (0, 0.5, 0.9, 0.99, 1)
# More of all tokens, lost to truncation, or that the models cannot read, is a warning.
MUCH_LOST, MUCH_UNKNOWN = 0.1, 0.05
LISTS_AT_ONCE = 1 << 16


class Sample:
    """At most SAMPLED items of a stream, each as likely as any other (algorithm R, Vitter 1985)."""

    def __init__(self, seed: int):
        self.items: list[Any] = []
        self.seen, self.random = 0, random.Random(seed)

    def add(self, item: Any) -> None:
        """Offers the sample an item."""
        self.seen += 1
        if len(self.items) < SAMPLED:
            self.items.append(item)
        elif (place := int(self.random.random() * self.seen)) < SAMPLED:
            self.items[place] = item


class Hashes:
    """Hashes of the ids and of the texts of a stream, in its order."""

    def __init__(self):
        self._ids, self._texts = array("q"), array("q")
        self.id_bytes = 0

    def add(self, key: str, *texts: str) -> None:
        """Keeps hashes of an id and of what belongs to it."""
        # Python's hash has 64 bits, and another key in every process.
        self._ids.append(hash(key))
        self.id_bytes += len(key.encode())
        self._texts.append(hash(tuple(" ".join(text.split()).casefold() for text in texts)))

    def __len__(self):
        return len(self._ids)

    @property
    def ids_N(self) -> np.ndarray:
        """Returns the hashes of the ids."""
        return np.asarray(self._ids)

    @property
    def texts_N(self) -> np.ndarray:
        """Returns the hashes of the texts."""
        return np.asarray(self._texts)

    def rows(self, ids_M: np.ndarray) -> np.ndarray:
        """Returns the row of each id [M], -1 where there is none."""
        order = np.argsort(self.ids_N)
        place_M = np.searchsorted(self.ids_N, ids_M, sorter=order)
        row_M = np.append(order, -1)[place_M]
        return np.where(np.append(self.ids_N, 0)[row_M] == ids_M, row_M, -1)


class Split(NamedTuple):
    """The queries of a split's file, those that take part, and the positives, one in each row."""

    file: Hashes
    queries: Hashes
    complete: bool  # read without an error
    query_rows_N: np.ndarray
    passage_texts_N: np.ndarray

    def pairs_N(self) -> np.ndarray:
        """Returns a hash of each positive and its query together."""
        return pair(self.queries.texts_N[self.query_rows_N], self.passage_texts_N)


def pair(query_texts: np.ndarray, passage_texts: np.ndarray) -> np.ndarray:
    """Returns one hash for each two, which broadcast."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    return query_texts.view(np.uint64) * odd + passage_texts.view(np.uint64)


def repeats(texts_N: np.ndarray) -> np.ndarray:
    """Returns rows whose text is an earlier row's too, and the last such row before each, [2, D]."""
    order = np.argsort(texts_N, kind="stable")
    same = texts_N[order[1:]] == texts_N[order[:-1]]
    rows_2xD = np.stack([order[1:][same], order[:-1][same]])
    return rows_2xD[:, np.argsort(rows_2xD[0])]


def ids_of(items: Iterable, rows: list[int]) -> list[str]:
    """Returns the ids of some rows of a stream, as Python writes strings."""
    ids = {i: x.id for i, x in enumerate(itertools.islice(items, max(rows) + 1)) if i in rows}
    return [repr(ids[row]) for row in rows]


class Lengths(NamedTuple):
    """Lengths in tokens of sampled inputs before truncation, special tokens included.

    `quantiles` are those of QUANTILES. `cut` is the share of inputs that are longer than `limit`,
    `lost` the share of all tokens beyond it. Titles have no limit of their own.
    """

    name: str
    mean: float
    quantiles: tuple[float, ...]
    limit: int | None
    cut: float
    lost: float


def measure(
    tokenizer: Tokenizer,
    inputs: Inputs,
    queries: list[str],
    passages: list[tuple[str, str]],
    seed: int,
    trained: Inputs | None = None,
) -> list[Lengths]:
    """Returns lengths of queries, titles, passages (title, text) and SAMPLED random pairs.

    Passages and pairs have a second row, of `trained`, where training cuts them at another length.
    """
    titles, texts = (tokenizer.texts(list(strings)) for strings in zip(*passages))
    store, asked = Store(titles, texts, [], {}, ""), tokenizer.texts(queries)
    queries_N, passages_N = np.arange(len(queries)), np.arange(len(passages))
    pair_queries_N = np.random.default_rng(seed).permutation(np.resize(queries_N, SAMPLED))
    pair_rows = pair_queries_N, np.resize(passages_N, SAMPLED)
    unlimited = dataclasses.replace(
        inputs, query_length=UNLIMITED, passage_length=UNLIMITED, pair_length=UNLIMITED
    )

    def row(name: str, lengths: Callable[[Inputs], np.ndarray], inputs: Inputs = inputs) -> Lengths:
        whole_N, kept_N = lengths(unlimited), lengths(inputs)
        return Lengths(
            f"train_{name}" if inputs is trained else name,
            float(whole_N.mean()),
            tuple(np.quantile(whole_N, QUANTILES, method="nearest").tolist()),
            getattr(inputs, f"{name}_length", None),
            float((whole_N > kept_N).mean()),
            float((whole_N - kept_N).sum() / max(whole_N.sum(), 1)),
        )

    title = row("title", lambda _: titles.lengths(passages_N))
    rows = [
        row("query", lambda inputs: inputs.query_lengths(asked, queries_N)),
        *([title] if inputs.titles else []),
    ]
    measures: dict[str, Callable[[Inputs], np.ndarray]] = {
        "passage": lambda inputs: inputs.passage_lengths(store, passages_N),
        "pair": lambda inputs: inputs.pair_lengths(store, asked, *pair_rows),
    }
    for name, lengths in measures.items():
        rows.append(row(name, lengths))
        limit = f"{name}_length"
        if trained and getattr(trained, limit) != getattr(inputs, limit):
            rows.append(row(name, lengths, trained))
    return rows


class Finding(NamedTuple):
    """A fact about the data: `kind` is error, warning or note, `where` the stream it is in."""

    kind: str
    where: str
    what: str


class Report(NamedTuple):
    """The doctor's result."""

    name: str
    streams: list[tuple[str, int, str]]  # (name, items read, remark)
    sampled: tuple[int, int]  # passages, queries
    lengths: list[Lengths]
    findings: list[Finding]
    sizes: needs.Sizes

    def verdict(self) -> str:
        """Returns `ok`, `usable, with N warnings` or `not usable: N errors`."""
        kinds = [finding.kind for finding in self.findings]
        errors, warnings = kinds.count("error"), kinds.count("warning")
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
    """Yields a finding for each stage whose lists are known to be too few for a single step."""
    # Positives that the re-ranker finds may head more lists of joint training.
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

    `queries_L` and `texts_N` are hashes of the lists' queries and of all passages, `rows_LxP` rows of
    these, and `known_M` hashes of known positives and their queries together.
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
            place = f"first list {wrong_L.argmax() + 1:,} of {path}"
            told = f"{some} {what}, {place}; mend or remove them"
            yield Finding("warning", "joint lists", told)


def mean_tokens(tokenizer: Tokenizer, strings: Iterable[str]) -> float:
    """Returns the mean number of tokens of texts, without special ones; 0 of none."""
    tokens = tokenizer.encode(list(strings))
    return sum(map(len, tokens)) / max(len(tokens), 1)


def truncation(lengths: list[Lengths]) -> Iterator[Finding]:
    """Yields a finding for each kind of input of which truncation takes many tokens."""
    for row in lengths:
        if row.lost > MUCH_LOST:
            yield Finding(
                # It is cut shorter on purpose where search reads more.
                "note" if row.name.startswith("train_") else "warning",
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
            name = "trained" if row.name.startswith("train_") else row.name
            line = f"{name:<8}{low[2:]}{median}{row.mean:>8.1f}{''.join(high)}"
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
