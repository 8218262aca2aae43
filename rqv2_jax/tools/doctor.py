"""The data doctor: reads everything a config will use and says what is wrong with it.

Every stream is read to its end, or to its first error. Two texts are the same where only case and
white space differ; titles count where `data.titles` says so.

An error is what a run would stop at, or what would make its results meaningless; a warning is what it
would bear, and what is left out of it. A note is what there is to know.

Shape suffixes: N labels, Q queries, L lists, P passages of a list.
"""

import itertools
import tempfile
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from ml_collections import ConfigDict

from rqv2_jax.data import collection, own_texts
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.lists import subset
from rqv2_jax.data.readers import joint_tsv
from rqv2_jax.data.tokenise import Tokenizer
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import metrics
from rqv2_jax.recipe import needs, opening
from rqv2_jax.recipe.texts import open_collection
from rqv2_jax.tools import doctor_checks
from rqv2_jax.tools.doctor_checks import Finding, Hashes, Report, Sample, Split, ids_of, share

# Share of a split's queries; if training knows more, positives included, the split measures memory.
MOSTLY = 0.5


def examine_config(config: ConfigDict) -> tuple[Report, opening.Opened]:
    """Examines what a config will use, after printing the notes on its models; needs no devices.

    Also returns the opened models.
    """
    opened, tokenizer, inputs = opening.open_inputs(config)
    for note in opened.notes:
        print(f"model: {note}")
    with tempfile.TemporaryDirectory() as folder:
        texts = partial(open_collection, config.data, Path(folder))
        return examine(opened.config, texts, tokenizer, inputs), opened


def examine(
    config: ConfigDict,
    open_texts: Callable[[], collection.Collection],
    tokenizer: Tokenizer,
    inputs: Inputs,
) -> Report:
    """Reads the collection, and the file of `joint.lists` if the config names one.

    Whatever raises `InputError` on the way, `open_texts` included, becomes a finding.
    """
    doctor = _Doctor(config, inputs.titles)
    texts = doctor.attempt("collection", open_texts)
    if texts is not None:
        doctor.examine(texts)
    if config.joint.lists:
        doctor.lists()
    findings = [*doctor.findings, *doctor_checks.batches(config, doctor.num_lists)]
    passages, queries = doctor.passage_sample.items, doctor.query_sample.items
    lengths = []
    if passages and queries:
        trained = opening.in_training(inputs, config.data)
        texts_of = queries, passages, config.seed, trained
        lengths = doctor_checks.measure(tokenizer, inputs, *texts_of)
        findings += doctor_checks.truncation(lengths)
        findings += doctor_checks.unknown_tokens(tokenizer, passages, queries)
    name = config.data.dataset if texts is None else texts.name
    sampled, sizes = (len(passages), len(queries)), doctor.sizes(tokenizer)
    return Report(name, doctor.streams, sampled, lengths, findings, sizes)


class _Doctor:
    """The streams read so far, and the findings in them."""

    texts: collection.Collection

    def __init__(self, config: ConfigDict, titles: bool):
        self.config, self.titles = config, titles
        self.streams: list[tuple[str, int, str]] = []
        self.findings: list[Finding] = []
        self.corpus, self.corpus_complete = Hashes(), False
        # The passages without their titles, to be compared with queries.
        self.bodies = Hashes()
        self.unasked: set[str] = set()
        self.splits: dict[str, Split] = {}
        self.num_lists: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.passage_sample, self.query_sample = Sample(config.seed), Sample(config.seed)

    def report(self, kind: str, where: str, what: str) -> None:
        self.findings.append(Finding(kind, where, what))

    def examine(self, texts: collection.Collection) -> None:
        self.texts = texts
        self.passages()
        for split in texts.splits:
            self.split(split)
        self.between_splits()

    def attempt(self, where: str, action: Callable) -> Any:
        """Returns what `action` returns; None, and reports an error, if it raises InputError."""
        try:
            return action()
        except InputError as error:
            # Several streams may read one file.
            if all(finding.what != str(error) for finding in self.findings):
                self.report("error", where, str(error))
            return None

    def read(self, where: str, stream: Callable[[], Iterator], take: Callable) -> bool:
        """Hands every item of a stream to `take`; returns False if an error, reported, ends it."""

        def consume() -> bool:
            for item in tqdm.tqdm(stream(), desc=where, leave=False, delay=1):
                take(item)
            return True

        return self.attempt(where, consume) is not None

    def sizes(self, tokenizer: Tokenizer) -> needs.Sizes:
        """Returns the sizes of what has been read, numbers of tokens as in the samples."""
        asked = {name: len(split.queries) for name, split in self.splits.items()}
        return needs.Sizes(
            passages=len(self.corpus),
            tokens=doctor_checks.mean_tokens(tokenizer, map(" ".join, self.passage_sample.items)),
            queries=asked,
            query_tokens=doctor_checks.mean_tokens(tokenizer, self.query_sample.items),
            labels=self.labels,
            passage_id=self.corpus.id_bytes / max(len(self.corpus), 1),
            query_id=sum(split.queries.id_bytes for split in self.splits.values())
            / max(sum(asked.values()), 1),
        )

    def add_stream(self, name: str, count: int, remark: str, complete: bool) -> None:
        self.streams.append((name, count, remark if complete else f"{remark}, then an error"))

    def add_passage(self, hashes: Hashes, passage: collection.Passage) -> None:
        hashes.add(passage.id, passage.title if self.titles else "", passage.text)

    def passages(self) -> None:
        titled, left, texts = 0, collection.Left(), self.texts

        def take(passage: collection.Passage) -> None:
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
        self.add_stream("passages", len(self.corpus), remark, self.corpus_complete)
        if self.corpus_complete and not len(self.corpus):
            what = f"{texts.name}: the corpus is empty; give at least one passage"
            self.report("error", "passages", what)
        self.warn("passages", left)
        mend = "keep one, or copies of a positive become its negatives"
        self.repeats("passages", self.corpus, texts.passages, mend)

    def split(self, split: str) -> None:
        texts, file, queries, labels = self.texts, Hashes(), Hashes(), array("q")

        def take_label(label: collection.Qrel) -> None:
            labels.extend((hash(label.query_id), hash(label.passage_id), label.relevance))

        def take_query(query: collection.Query) -> None:
            queries.add(query.id, query.text)
            self.query_sample.add(query.text)

        def take_any(query: collection.Query) -> None:
            if query.text.strip():
                file.add(query.id, query.text)
            else:
                self.unasked.add(query.id)

        where = f"{split} queries"
        judged = self.read(f"{split} qrels", lambda: texts.qrels(split), take_label)
        # Before the selected ones, which an error in the qrels would hide.
        self.read(where, lambda: texts.query_file(split), take_any)
        complete = self.read(where, lambda: texts.queries(split), take_query)
        query_N, passage_N, relevance_N = np.asarray(labels).reshape(-1, 3).T
        relevant_N, self.labels[split] = relevance_N > 0, len(relevance_N)
        query_rows_N, passage_rows_N = queries.rows(query_N), self.corpus.rows(passage_N)
        unasked_N = np.isin(query_N, np.array([hash(key) for key in self.unasked], np.int64))
        self.unknown(
            split,
            (passage_rows_N < 0) & self.corpus_complete,
            (query_rows_N < 0) & relevant_N & ~unasked_N & complete,
        )
        if complete and not len(queries):
            self.report("error", where, f"{texts.name}: {split} is empty; label some queries")
        self.own_texts(split, queries)
        mend = "join them and their labels, or the positives of one become negatives of the other"
        self.repeats(where, queries, lambda: texts.queries(split), mend)
        if split == "train" and judged and complete:
            self.count_lists(query_rows_N[relevant_N], len(queries))
        answered = split in texts.answer_splits
        remark = f"{len(queries):,} with {'an answer' if answered else 'a positive'}"
        self.add_stream(where, len(file) or len(queries), remark, complete)
        if not answered:
            remark = f"{relevant_N.sum():,} positive"
            self.add_stream(f"{split} qrels", len(relevant_N), remark, judged)
        if split == "test" and judged:
            settings = self.config.evaluate
            names = metrics.at_relevance(settings.metrics, settings.min_relevance)
            labels_N = None if answered else relevance_N
            self.attempt("config", lambda: metrics.check_measurable(names, labels_N))
        kept_N = (query_rows_N >= 0) & (passage_rows_N >= 0) & relevant_N
        positives = query_rows_N[kept_N], self.corpus.texts_N[passage_rows_N[kept_N]]
        self.splits[split] = Split(file, queries, judged and complete, *positives)

    def count_lists(self, query_rows_N: np.ndarray, queries: int) -> None:
        """Counts the lists of each stage from the queries of the positives, -1 for unknown ones."""
        mined = subset(queries, self.config.mine.queries, self.config.seed)
        lists = int(np.isin(query_rows_N, mined).sum())
        self.num_lists |= {"retriever": int((query_rows_N >= 0).sum()), "reranker": lists}
        if not self.config.joint.lists:
            self.num_lists["joint"] = lists

    def repeats(self, where: str, hashes: Hashes, stream: Callable, mend: str) -> None:
        repeats_2xD = doctor_checks.repeats(hashes.texts_N)
        if repeats_2xD.size:
            later, earlier = ids_of(stream(), repeats_2xD[:, 0].tolist())
            part = share(repeats_2xD.shape[1], len(hashes), where.split()[-1])
            text = f"have the text of an earlier one, first {later} that of {earlier}"
            self.report("warning", where, f"{part} {text}; {mend}")

    def warn(self, where: str, left: collection.Left) -> None:
        for line in left.lines():
            self.report("warning", where, line)

    def unknown(self, split: str, *wrong: np.ndarray) -> None:
        """Reports labels of unknown passages, and positives of unknown queries, as the run would."""
        left = collection.Left()

        def check(wrong_N: np.ndarray, is_passage: bool) -> None:
            labels = list(itertools.compress(self.texts.qrels(split), wrong_N.tolist()))
            known = {} if is_passage else {label.passage_id: 0 for label in labels}
            collection.check_qrels(labels, {}, known, left)

        for number, wrong_N in enumerate(wrong):
            if wrong_N.any():
                self.attempt(f"{split} qrels", partial(check, wrong_N, number == 0))
        self.warn(f"{split} qrels", left)

    def own_texts(self, split: str, queries: Hashes) -> None:
        """Reports queries that stand in the corpus under their own ids."""
        rows_N = self.corpus.rows(queries.ids_N)
        count = (rows_N >= 0).sum()
        same = (self.bodies.texts_N[rows_N[rows_N >= 0]] == queries.texts_N[rows_N >= 0]).sum()
        mode, where = self.config.data.ignore_identical_ids, f"{split} queries"
        alike = count > 0 and same >= own_texts.MOST * count
        part = f"{share(count, len(queries), 'queries')} stand in the corpus under their own id"
        setting = f"(config.data.ignore_identical_ids is {mode!r})"
        if mode == "never" and alike:
            self.report("warning", where, f"{part}, as negatives and wrong hits {setting}")
        elif alike or (mode == "always" and count):
            self.report("note", where, f"{part}; such passages are ignored for them {setting}")

    def between_splits(self) -> None:
        """Reports what the splits miss, and the queries and positives that they share."""
        left = collection.Left()
        for remark in self.texts.remarks:
            self.report("note", "collection", remark)
        for key in sorted(self.unasked):
            left.add("queries have no text; left out", repr(key))
        self.warn("queries", left)
        missing = {"train", "dev", "test"} - self.splits.keys()
        if missing:
            names = ", ".join(sorted(missing))
            what = f"{self.texts.name}: has no qrels for {names}; add them"
            self.report("error", "collection", what)
        if all(split.complete for split in self.splits.values()):
            files, selected = (
                np.unique(np.concatenate([hashes.ids_N for hashes in kind]))
                for kind in zip(*((split.file, split.queries) for split in self.splits.values()))
            )
            unlabelled = len(np.setdiff1d(files, selected))
            if unlabelled:
                part = share(unlabelled, len(files), "queries")
                self.report("note", "queries", f"{part} have no positive in any split; left out")
        train = self.splits["train"]
        self.leaks("train", train.queries.texts_N, train.pairs_N())
        for name, split in self.splits.items():
            positives = np.unique(split.passage_texts_N)
            shared = np.isin(positives, train.passage_texts_N).sum()
            if name != "train" and shared:
                part = share(shared, len(positives), "positives")
                self.report("note", f"{name} qrels", f"{part} are positives in train too")

    def leaks(self, source: str, trained_texts: np.ndarray, trained_pairs: np.ndarray) -> None:
        """Reports the queries of dev and test that `source` trains on."""
        for name, split in self.splits.items():
            leaked_Q = np.isin(split.queries.texts_N, trained_texts)
            if name == "train" or not leaked_Q.any():
                continue
            same = len(np.unique(split.query_rows_N[np.isin(split.pairs_N(), trained_pairs)]))
            (first,) = ids_of(self.texts.queries(name), [int(leaked_Q.argmax())])
            part = share(leaked_Q.sum(), len(leaked_Q), "queries")
            self.report(
                "error" if same > MOSTLY * len(leaked_Q) else "warning",
                f"{name} queries",
                f"{part} are in {source} too, {same:,} of them with a positive of theirs, "
                f"first {first}; remove them from either",
            )

    def lists(self) -> None:
        path, size = Path(self.config.joint.lists), self.config.joint.list_size
        read = self.attempt("joint lists", partial(joint_tsv.read, path, size))
        if read is None:
            return
        given, lists = read
        for remark in given.remarks:
            self.report("warning", "joint lists", remark)
        corpus, queries = Hashes(), Hashes()
        for passage in given.passages():
            self.add_passage(corpus, passage)
        for query in given.queries("train"):
            queries.add(query.id, query.text)
        count = self.num_lists["joint"] = len(lists.query_rows_L)
        remark = f"of {size}: {len(queries):,} queries, {len(corpus):,} passages"
        self.add_stream("joint lists", count, remark, True)
        query_texts_L = queries.texts_N[lists.query_rows_L]
        heads_L = doctor_checks.pair(query_texts_L, corpus.texts_N[lists.passages_LxP[:, 0]])
        known = np.concatenate([heads_L, *(split.pairs_N() for split in self.splits.values())])
        given_lists = query_texts_L, corpus.texts_N, lists.passages_LxP
        self.findings += doctor_checks.lists(path, *given_lists, known)
        if self.corpus_complete:
            foreign = (~np.isin(corpus.texts_N, self.corpus.texts_N)).sum()
            if foreign:
                part = share(foreign, len(corpus), "passages")
                self.report("note", "joint lists", f"{part} are not in the corpus")
        self.leaks("joint.lists", query_texts_L, heads_L)
