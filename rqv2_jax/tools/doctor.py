"""The data doctor: reads everything a config will use and says what is wrong with it.

Every stream is read to its end, or to its first error. Of its ids and texts 8-byte hashes are kept,
and of some texts, drawn at random, the texts themselves. Two texts are the same where only case and
white space differ; titles count where `data.titles` says so.

An error is what a run would stop at, or what would make its results meaningless; a warning is what it
would bear, and what is left out of it. A note is what there is to know.
"""

import dataclasses
import functools
import itertools
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np
import tqdm

from rqv2_jax.data import collection, own_texts
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.lists import subset, training_lists
from rqv2_jax.data.readers import joint_tsv
from rqv2_jax.data.tokenise import Tokenizer
from rqv2_jax.data.tokens import Store
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import metrics

SAMPLED = 20_000
# Of all tokens; more, lost to truncation, is a warning.
MUCH_LOST = 0.1
# Of all tokens; more of [UNK] is a warning, for the models cannot read them.
MUCH_UNKNOWN = 0.05
# Of a split's queries; where training knows more, positives included, the split measures memory.
MOSTLY = 0.5
LISTS_AT_ONCE = 1 << 16
# Tokens; inputs of this length are not truncated.
WHOLE = 1 << 40
QUANTILES = (0, 0.5, 0.9, 0.99, 1)


class Finding(NamedTuple):
    """`kind` is error, warning or note; `where` is the stream it was found in."""

    kind: str
    where: str
    what: str


class Lengths(NamedTuple):
    """Lengths in tokens of sampled inputs before truncation, special tokens included.

    `quantiles` belong to QUANTILES. `cut` is the share of inputs that are longer than `limit`, `lost`
    the share of all tokens beyond it. Titles have no limit of their own.
    """

    name: str
    mean: float
    quantiles: tuple[float, ...]
    limit: int | None
    cut: float
    lost: float


@dataclasses.dataclass(frozen=True)
class Report:
    """`streams` are (name, items read, remark); `sampled` counts (passages, queries)."""

    name: str
    streams: list[tuple[str, int, str]]
    sampled: tuple[int, int]
    lengths: list[Lengths]
    findings: list[Finding]

    def verdict(self) -> str:
        """`ok`, `usable, with N warnings` or `not usable: N errors`."""
        errors, warnings = (
            sum(finding.kind == kind for finding in self.findings) for kind in ("error", "warning")
        )
        if errors:
            return f"not usable: {errors} error{'s' * (errors > 1)}"
        return f"usable, with {warnings} warning{'s' * (warnings > 1)}" if warnings else "ok"

    def usable(self) -> bool:
        """Whether there is no error."""
        return all(finding.kind != "error" for finding in self.findings)


class _Sample:
    """At most SAMPLED items of a stream, each as likely as any other (algorithm R, Vitter 1985)."""

    def __init__(self, seed: int):
        self.items, self.seen, self.random = [], 0, random.Random(seed)

    def add(self, item):
        self.seen += 1
        if len(self.items) < SAMPLED:
            self.items.append(item)
        elif (place := int(self.random.random() * self.seen)) < SAMPLED:
            self.items[place] = item


class _Hashes:
    """Hashes of the ids and of the texts of a stream, in its order."""

    def __init__(self):
        self._ids, self._texts = array("q"), array("q")

    def add(self, key: str, *texts: str):
        # Python's own: 64 bits, with another key in every process.
        self._ids.append(hash(key))
        self._texts.append(hash(tuple(" ".join(text.split()).casefold() for text in texts)))

    def __len__(self):
        return len(self._ids)

    @property
    def ids_N(self) -> np.ndarray:
        return np.asarray(self._ids)

    @property
    def texts_N(self) -> np.ndarray:
        return np.asarray(self._texts)

    def rows(self, ids_M: np.ndarray) -> np.ndarray:
        """The row of each id [M], -1 where there is none."""
        order = np.argsort(self.ids_N)
        place_M = np.searchsorted(self.ids_N, ids_M, sorter=order)
        row_M = np.append(order, -1)[place_M]
        return np.where(np.append(self.ids_N, 0)[row_M] == ids_M, row_M, -1)


@dataclasses.dataclass(frozen=True)
class _Split:
    """Its file's queries, those of them that take part, and the positives, one in each row.

    `complete` says whether all were read without an error.
    """

    file: _Hashes
    queries: _Hashes
    complete: bool
    query_rows_N: np.ndarray
    passage_texts_N: np.ndarray

    def pairs_N(self) -> np.ndarray:
        return _pair(self.queries.texts_N[self.query_rows_N], self.passage_texts_N)


def _pair(query_texts: np.ndarray, passage_texts: np.ndarray) -> np.ndarray:
    """One hash of two, which broadcast."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    return query_texts.view(np.uint64) * odd + passage_texts.view(np.uint64)


def _repeats(texts_N: np.ndarray) -> np.ndarray:
    """[2, D]: rows whose text stands in an earlier row, and the last row before that it stands in."""
    order = np.argsort(texts_N, kind="stable")
    same = texts_N[order[1:]] == texts_N[order[:-1]]
    rows_2xD = np.stack([order[1:][same], order[:-1][same]])
    return rows_2xD[:, np.argsort(rows_2xD[0])]


def _ids(items: Iterable, rows: Iterable[int]) -> list[str]:
    """The ids of some rows of a stream, as Python writes strings."""
    rows = list(rows)
    found = {i: x.id for i, x in enumerate(itertools.islice(items, max(rows) + 1)) if i in rows}
    return [repr(found[row]) for row in rows]


def _share(part: int, whole: int, what: str) -> str:
    return f"{part:,} of {whole:,} {what} ({part / max(whole, 1):.1%})"


def examine(
    config: ml_collections.ConfigDict,
    open_collection: Callable[[], collection.Collection],
    tokenizer: Tokenizer,
    inputs: Inputs,
) -> Report:
    """Reads the collection, and the file of `joint.lists` if the config names one.

    What raises `InputError` on the way, opening the collection included, becomes a finding.
    """
    doctor = _Doctor(config, inputs)
    texts = doctor.attempt("collection", open_collection)
    if texts is not None:
        doctor.passages(texts)
        for split in texts.splits:
            doctor.split(texts, split)
        doctor.between_splits(texts)
    if config.joint.lists:
        doctor.lists(texts)
    doctor.batches()
    passages, queries = doctor.passage_sample.items, doctor.query_sample.items
    lengths = []
    if passages and queries:
        lengths = measure(tokenizer, inputs, queries, passages, config.seed)
        doctor.truncation(lengths)
        doctor.unknown_tokens(tokenizer)
    return Report(
        config.data.dataset if texts is None else texts.name,
        doctor.streams,
        (len(passages), len(queries)),
        lengths,
        doctor.findings,
    )


class _Doctor:
    """What has been read and found so far."""

    def __init__(self, config: ml_collections.ConfigDict, inputs: Inputs):
        self.config, self.titles = config, inputs.titles
        self.streams: list[tuple[str, int, str]] = []
        self.findings: list[Finding] = []
        self.corpus, self.corpus_complete = _Hashes(), False
        # Of the passages without their titles, to be compared with queries.
        self.bodies = _Hashes()
        self.unasked: set[str] = set()
        self.splits: dict[str, _Split] = {}
        self.num_lists: dict[str, int] = {}
        self.passage_sample, self.query_sample = _Sample(config.seed), _Sample(config.seed)

    def found(self, kind: str, where: str, what: str):
        self.findings.append(Finding(kind, where, what))

    def attempt(self, where: str, action: Callable):
        """What `action` returns; None, and an error found, if it raises InputError."""
        try:
            return action()
        except InputError as error:
            # Several streams may read one file.
            if all(finding.what != str(error) for finding in self.findings):
                self.found("error", where, str(error))
            return None

    def read(self, where: str, stream: Callable[[], Iterator], take: Callable) -> bool:
        """Hands every item of a stream to `take`; False, and an error found, if it breaks off."""

        def consume():
            for item in tqdm.tqdm(stream(), desc=where, leave=False, delay=1):
                take(item)
            return True

        return self.attempt(where, consume) is not None

    def streamed(self, name: str, count: int, remark: str, complete: bool):
        self.streams.append((name, count, remark if complete else f"{remark}, then an error"))

    def add_passage(self, hashes: _Hashes, passage: collection.Passage):
        hashes.add(passage.id, passage.title if self.titles else "", passage.text)

    def passages(self, texts: collection.Collection):
        titled, left = 0, collection.Left()

        def take(passage):
            nonlocal titled
            titled += bool(passage.title.strip())
            self.add_passage(self.corpus, passage)
            self.bodies.add(passage.id, passage.text)
            if not (passage.text.strip() or (self.titles and passage.title.strip())):
                left.add("passages have no text; kept, empty", repr(passage.id))
                return
            self.passage_sample.add((passage.title, passage.text))

        self.corpus_complete = self.read("passages", texts.passages, take)
        remark = f"{titled:,} with a title ({titled / max(len(self.corpus), 1):.1%})"
        self.streamed("passages", len(self.corpus), remark, self.corpus_complete)
        if self.corpus_complete and not len(self.corpus):
            self.found(
                "error", "passages", f"{texts.name}: the corpus is empty; give at least one passage"
            )
        self.warn("passages", left)
        mend = "keep one, or copies of a positive become its negatives"
        self.repeats("passages", self.corpus, texts.passages, mend)

    def split(self, texts: collection.Collection, split: str):
        file, queries, labels = _Hashes(), _Hashes(), array("q")

        def take_label(label):
            labels.extend((hash(label.query_id), hash(label.passage_id), label.relevance))

        def take_query(query):
            queries.add(query.id, query.text)
            self.query_sample.add(query.text)

        def take_any(query):
            if query.text.strip():
                file.add(query.id, query.text)
            else:
                self.unasked.add(query.id)

        where, answered = f"{split} queries", split in texts.answer_splits
        judged = self.read(f"{split} qrels", lambda: texts.qrels(split), take_label)
        # Before the selected ones, which an error in the qrels would hide.
        self.read(where, lambda: texts.query_file(split), take_any)
        complete = self.read(where, lambda: texts.queries(split), take_query)
        query_N, passage_N, relevance_N = np.asarray(labels).reshape(-1, 3).T
        relevant_N = relevance_N > 0
        query_rows_N, passage_rows_N = queries.rows(query_N), self.corpus.rows(passage_N)
        unasked_N = np.isin(query_N, np.array([hash(key) for key in self.unasked], np.int64))
        self.unknown(
            texts,
            split,
            (passage_rows_N < 0) & self.corpus_complete,
            (query_rows_N < 0) & relevant_N & ~unasked_N & complete,
        )
        if complete and not len(queries):
            self.found("error", where, f"{texts.name}: {split} is empty; label some queries")
        self.own_texts(split, queries)
        mend = "join them and their labels, or the positives of one become negatives of the other"
        self.repeats(where, queries, lambda: texts.queries(split), mend)
        if split == "train" and judged and complete:
            mined = subset(len(queries), self.config.mine.queries, self.config.seed)
            counted_N = np.isin(query_rows_N, mined) & relevant_N
            asked_N = relevant_N & (query_rows_N >= 0)
            found = {"retriever": asked_N.sum(), "reranker": counted_N.sum()}
            if not self.config.joint.lists:
                found["joint"] = counted_N.sum()
            self.num_lists |= {stage: int(count) for stage, count in found.items()}
        remark = f"{len(queries):,} with {'an answer' if answered else 'a positive'}"
        self.streamed(where, len(file) or len(queries), remark, complete)
        if not answered:
            remark = f"{relevant_N.sum():,} positive"
            self.streamed(f"{split} qrels", len(relevant_N), remark, judged)
        if split == "test" and judged:
            settings = self.config.evaluate
            names = metrics.at_relevance(settings.metrics, settings.min_relevance)
            judgements = None if answered else relevance_N
            self.attempt("config", lambda: metrics.check_measurable(names, judgements))
        kept_N = (query_rows_N >= 0) & (passage_rows_N >= 0) & relevant_N
        passage_texts_N = self.corpus.texts_N[passage_rows_N[kept_N]]
        self.splits[split] = _Split(
            file, queries, judged and complete, query_rows_N[kept_N], passage_texts_N
        )

    def repeats(self, where: str, hashes: _Hashes, stream: Callable, mend: str):
        repeats_2xD = _repeats(hashes.texts_N)
        if repeats_2xD.size:
            later, earlier = _ids(stream(), repeats_2xD[:, 0].tolist())
            share = _share(repeats_2xD.shape[1], len(hashes), where.split()[-1])
            what = (
                f"{share} have the text of an earlier one, first {later} that of {earlier}; {mend}"
            )
            self.found("warning", where, what)

    def warn(self, where: str, left: collection.Left):
        for line in left.lines():
            self.found("warning", where, line)

    def unknown(self, texts: collection.Collection, split: str, *wrong: np.ndarray):
        """Reports labels that name what there is not, as the run itself would.

        `wrong` are those whose passage is not there, and positives whose query is not.
        """
        left = collection.Left()

        def check(wrong_N, is_passage):
            found = list(itertools.compress(texts.qrels(split), wrong_N.tolist()))
            known = {} if is_passage else {label.passage_id: 0 for label in found}
            collection.check_qrels(found, {}, known, left)

        for number, wrong_N in enumerate(wrong):
            if wrong_N.any():
                self.attempt(f"{split} qrels", functools.partial(check, wrong_N, number == 0))
        self.warn(f"{split} qrels", left)

    def own_texts(self, split: str, queries: _Hashes):
        """Reports queries that stand in the corpus under their own ids."""
        rows_N = self.corpus.rows(queries.ids_N)
        count = (rows_N >= 0).sum()
        same = (self.bodies.texts_N[rows_N[rows_N >= 0]] == queries.texts_N[rows_N >= 0]).sum()
        mode, where = self.config.data.ignore_identical_ids, f"{split} queries"
        alike = count > 0 and same >= own_texts.MOST * count
        share = f"{_share(count, len(queries), 'queries')} stand in the corpus under their own id"
        setting = f"(config.data.ignore_identical_ids is {mode!r})"
        if mode == "never" and alike:
            self.found("warning", where, f"{share}, as negatives and wrong hits {setting}")
        elif alike or (mode == "always" and count):
            self.found("note", where, f"{share}; such passages are ignored for them {setting}")

    def unknown_tokens(self, tokenizer: Tokenizer):
        """Reports texts that a tokenizer, or the re-ranker's beside it, has no tokens for."""
        passages = [f"{title} {text}" for title, text in self.passage_sample.items]
        sampled = {"passages": passages, "queries": self.query_sample.items}
        readers = {"the models": tokenizer}
        if tokenizer.pairs is not None:
            readers = {"the retriever": tokenizer, "the re-ranker": tokenizer.pairs}
        for (reader, own), (where, strings) in itertools.product(readers.items(), sampled.items()):
            if own.unknown is None:
                continue
            tokens = list(itertools.chain.from_iterable(own.encode(strings)))
            count = tokens.count(own.unknown)
            if count > MUCH_UNKNOWN * len(tokens):
                self.found(
                    "warning",
                    where,
                    f"{_share(count, len(tokens), 'sampled tokens')} are [UNK], which says nothing to "
                    f"{reader}; take weights whose vocabulary has this language",
                )

    def between_splits(self, texts: collection.Collection):
        left = collection.Left()
        for remark in texts.remarks:
            self.found("note", "collection", remark)
        for key in sorted(self.unasked):
            left.add("queries have no text; left out", repr(key))
        self.warn("queries", left)
        missing = {"train", "dev", "test"} - self.splits.keys()
        if missing:
            names = ", ".join(sorted(missing))
            self.found("error", "collection", f"{texts.name}: has no qrels for {names}; add them")
        if all(split.complete for split in self.splits.values()):
            files, selected = (
                np.unique(np.concatenate([hashes.ids_N for hashes in of]))
                for of in zip(*((split.file, split.queries) for split in self.splits.values()))
            )
            unlabelled = len(np.setdiff1d(files, selected))
            if unlabelled:
                share = _share(unlabelled, len(files), "queries")
                self.found("note", "queries", f"{share} have no positive in any split; left out")
        train = self.splits["train"]
        self.leaks(texts, "train", train.queries.texts_N, train.pairs_N())
        for name, split in self.splits.items():
            positives = np.unique(split.passage_texts_N)
            shared = np.isin(positives, train.passage_texts_N).sum()
            if name != "train" and shared:
                share = _share(shared, len(positives), "positives")
                self.found("note", f"{name} qrels", f"{share} are positives in train too")

    def leaks(self, texts, source: str, trained_texts, trained_pairs):
        """Reports the queries of dev and test that `source` trains on."""
        for name, split in self.splits.items():
            leaked_Q = np.isin(split.queries.texts_N, trained_texts)
            if name == "train" or not leaked_Q.any():
                continue
            same = len(np.unique(split.query_rows_N[np.isin(split.pairs_N(), trained_pairs)]))
            (first,) = _ids(texts.queries(name), [int(leaked_Q.argmax())])
            share = _share(leaked_Q.sum(), len(leaked_Q), "queries")
            self.found(
                "error" if same > MOSTLY * len(leaked_Q) else "warning",
                f"{name} queries",
                f"{share} are in {source} too, {same:,} of them with a positive of theirs, "
                f"first {first}; remove them from either",
            )

    def lists(self, texts: collection.Collection | None):
        path, size = Path(self.config.joint.lists), self.config.joint.list_size
        read = self.attempt("joint lists", lambda: joint_tsv.read(path, size))
        if read is None:
            return
        given, lists = read
        for remark in given.remarks:
            self.found("warning", "joint lists", remark)
        corpus, queries = _Hashes(), _Hashes()
        for passage in given.passages():
            self.add_passage(corpus, passage)
        for query in given.queries("train"):
            queries.add(query.id, query.text)
        count = self.num_lists["joint"] = len(lists.query_rows_L)
        remark = f"of {size}: {len(queries):,} queries, {len(corpus):,} passages"
        self.streamed("joint lists", count, remark, True)
        query_texts_L = queries.texts_N[lists.query_rows_L]
        heads_L = _pair(query_texts_L, corpus.texts_N[lists.passages_LxP[:, 0]])
        known = np.concatenate([heads_L, *(split.pairs_N() for split in self.splits.values())])
        repeated_L, doubtful_L = np.zeros((2, count), bool)
        for first in range(0, count, LISTS_AT_ONCE):
            part = slice(first, first + LISTS_AT_ONCE)
            texts_LxP = corpus.texts_N[lists.passages_LxP[part]]
            sorted_LxP = np.sort(texts_LxP, axis=1)
            repeated_L[part] = (sorted_LxP[:, 1:] == sorted_LxP[:, :-1]).any(axis=1)
            pairs_LxN = _pair(query_texts_L[part, None], texts_LxP[:, 1:])
            doubtful_L[part] = np.isin(pairs_LxN, known).any(axis=1)
        for wrong_L, what in (
            (repeated_L, "hold a passage twice"),
            (doubtful_L, "have a known positive of their query among the negatives"),
        ):
            if wrong_L.any():
                share = _share(wrong_L.sum(), count, "lists")
                first = f"first list {wrong_L.argmax() + 1:,} of {path}"
                self.found(
                    "warning", "joint lists", f"{share} {what}, {first}; mend or remove them"
                )
        if self.corpus_complete:
            foreign = (~np.isin(corpus.texts_N, self.corpus.texts_N)).sum()
            if foreign:
                share = _share(foreign, len(corpus), "passages")
                self.found("note", "joint lists", f"{share} are not in the corpus")
        self.leaks(texts, "joint.lists", query_texts_L, heads_L)

    def batches(self):
        """Reports stages whose lists are known to be too few for a single step.

        Denoised positives, which the re-ranker finds, may head more lists of joint training.
        """
        hybrid = self.config.joint.denoised_share > 0 and not self.config.joint.lists
        for stage, count in self.num_lists.items():
            settings = self.config[stage]
            lists = training_lists(settings, count)
            if settings.epochs and lists < settings.batch:
                self.found(
                    "warning" if stage == "joint" and hybrid else "error",
                    f"{stage} stage",
                    f"{lists:,} lists in {settings.epochs:g} epochs, fewer than one batch of "
                    f"{settings.batch}; lower config.{stage}.batch or raise config.{stage}.epochs",
                )

    def truncation(self, lengths: list[Lengths]):
        for row in lengths:
            if row.lost > MUCH_LOST:
                self.found(
                    "warning",
                    f"{row.name} tokens",
                    f"truncation to {row.limit} shortens {row.cut:.1%} of the inputs and takes "
                    f"{row.lost:.1%} of the tokens; raise config.data.{row.name}_length, or split long "
                    "texts",
                )


def measure(
    tokenizer: Tokenizer,
    inputs: Inputs,
    queries: list[str],
    passages: list[tuple[str, str]],
    seed: int,
) -> list[Lengths]:
    """Lengths of queries, titles, passages (title, text), and of SAMPLED random pairs of the two."""
    titles, texts = (tokenizer.texts(list(strings)) for strings in zip(*passages))
    store, asked = Store(titles, texts, [], {}, ""), tokenizer.texts(queries)
    queries_N, passages_N = np.arange(len(queries)), np.arange(len(passages))
    pair_queries_N = np.random.default_rng(seed).permutation(np.resize(queries_N, SAMPLED))
    pair_passages_N = np.resize(passages_N, SAMPLED)
    whole = dataclasses.replace(inputs, query_length=WHOLE, passage_length=WHOLE, pair_length=WHOLE)

    def row(name, lengths):
        whole_N, kept_N = lengths(whole), lengths(inputs)
        return Lengths(
            name,
            float(whole_N.mean()),
            tuple(np.quantile(whole_N, QUANTILES, method="nearest").tolist()),
            getattr(inputs, f"{name}_length", None),
            float((whole_N > kept_N).mean()),
            float((whole_N - kept_N).sum() / max(whole_N.sum(), 1)),
        )

    title = row("title", lambda _: titles.lengths(passages_N))
    return [
        row("query", lambda inputs: inputs.query_lengths(asked, queries_N)),
        *([title] if inputs.titles else []),
        row("passage", lambda inputs: inputs.passage_lengths(store, passages_N)),
        row(
            "pair",
            lambda inputs: inputs.pair_lengths(store, asked, pair_queries_N, pair_passages_N),
        ),
    ]


def render(report: Report) -> str:
    """The report as tables for people, errors first among the findings, the verdict last."""
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
