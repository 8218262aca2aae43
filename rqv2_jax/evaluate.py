"""Evaluates every model state of a workdir, or compares two run files.

The first form retrieves, re-ranks, writes run files and metrics. With --topics and --qrels its queries
and labels are those of the files (`qid <tab> text`, TREC topics or BEIR's queries.jsonl; TREC, MS MARCO
or BEIR qrels), the passages the workdir's; what it writes is named after the topics file. With
--candidates, a run file of any system, nothing is retrieved: the re-rankers re-rank the first passages
that the file lists. With --elsewhere the passages and queries are those of another folder in BEIR
layout, on which the trained models are measured beside the released one: what training has cost there.
With --distributed all these run on several hosts, as rqv2_jax.main does. Data or
weights that have moved since are given as --data, --weights, --reranker_weights.
The last form takes any two run files and qrels and prints differences, 95% intervals and paired
p-values. Run files are TREC's, MS MARCO's (qid, pid, rank) or RocketQA's (qid, pid, rank, score).

Examples:
  python -m rqv2_jax.evaluate --workdir workdir/docstrings --split dev --index exact
  python -m rqv2_jax.evaluate --workdir workdir/msmarco --topics msmarco-test2019-queries.tsv \\
      --qrels 2019qrels-pass.txt --min_relevance 2
  python -m rqv2_jax.evaluate --workdir workdir/msmarco --candidates anserini.trec
  python -m rqv2_jax.evaluate --workdir workdir/docstrings --elsewhere scifact
  python -m rqv2_jax.evaluate --compare A.trec B.trec --qrels qrels/test.tsv
"""

import pathlib

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

# Results of these names are not those of a file of candidates.
RESERVED = ("exact", "scann", "bm25")

program.define_workdir()
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "dev", "test"], "Which queries.")
_INDEX = flags.DEFINE_enum("index", "exact", ["exact", "scann"], "How passages are searched.")
_COMPARE = flags.DEFINE_bool("compare", False, "Compare the two run files given as arguments.")
flags.DEFINE_string("topics", None, "With --qrels: file of queries, in place of a split.")
flags.DEFINE_string("candidates", None, "TREC run file to re-rank.")
flags.DEFINE_string("elsewhere", None, "Folder of another collection, in BEIR layout.")
flags.DEFINE_string("qrels", None, "With --topics or --compare: file of relevance labels.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the processes of the other hosts.")
_RERANK_DEPTH = flags.DEFINE_integer(
    "rerank_depth", None, "Passages re-ranked; else config.evaluate.rerank_depth.", 1
)
_MIN_RELEVANCE = flags.DEFINE_integer(
    "min_relevance", None, "Lowest label that is relevant; else config.evaluate.min_relevance.", 1
)


def main(*files: str) -> None:
    """Prints the table of the split, or of the comparison."""
    topics, qrels, candidates = flags.FLAGS.topics, flags.FLAGS.qrels, flags.FLAGS.candidates
    if _COMPARE.value:
        if len(files) != 2 or qrels is None:
            raise InputError(
                "--compare takes two run files and --qrels FILE; --help shows an example"
            )
        _compare(*files, qrels)
        return
    if files:
        raise InputError(f"unexpected argument {files[0]!r}; --help shows an example")
    if flags.FLAGS.workdir is None:
        raise InputError("--workdir is missing; --help shows an example")
    if (topics is None) != (qrels is None):
        raise InputError("--topics and --qrels go together; --help shows an example")
    if topics and flags.FLAGS["split"].present:
        raise InputError("--topics takes the place of --split; give one of the two")
    if candidates and flags.FLAGS["index"].present:
        raise InputError("--candidates takes the place of --index; give one of the two")

    if flags.FLAGS.elsewhere and (topics or candidates):
        raise InputError("--elsewhere goes with neither --topics nor --candidates; leave them out")

    from rqv2_jax import hosts

    with hosts.joined(_DISTRIBUTED.value):
        _evaluate(topics, qrels, candidates)


def _evaluate(topics: str | None, qrels: str | None, candidates: str | None) -> None:
    """Evaluates the workdir's models on a split, on topics or on given candidates."""
    from rqv2_jax.recipe import elsewhere, evaluation, results
    from rqv2_jax.recipe.run import STATES
    from rqv2_jax.recipe.texts import open_store, stem, with_topics

    with program.opened() as run:
        store, split = open_store(run), _SPLIT.value
        states: tuple[str, ...] = STATES
        if flags.FLAGS.elsewhere:
            run, store = elsewhere.on(run, pathlib.Path(flags.FLAGS.elsewhere), split)
            states = elsewhere.STATES
        if topics and qrels:
            store, split = with_topics(run, store, pathlib.Path(topics), pathlib.Path(qrels))
        for flag in (_MIN_RELEVANCE, _RERANK_DEPTH):
            if flag.value:
                run.config.evaluate[flag.name] = flag.value
        if candidates:
            path = pathlib.Path(candidates)
            name = stem(path)
            if name in RESERVED:
                raise InputError(f"{path}: results are named after the file; rename it")
            report = evaluation.evaluate_candidates(run, store, split, path, name)
        else:
            report = evaluation.evaluate(run, store, split, (_INDEX.value,), states)
        print(results.render(report))


def _compare(a: str, b: str, qrels: str) -> None:
    from rqv2_jax import config as config_lib
    from rqv2_jax.recipe import compare

    defaults = config_lib.default()
    rows, queries, named = compare.compare(
        pathlib.Path(a),
        pathlib.Path(b),
        pathlib.Path(qrels),
        names=defaults.evaluate.metrics,
        min_relevance=_MIN_RELEVANCE.value or defaults.evaluate.min_relevance,
        permutations=defaults.evaluate.permutations,
        seed=defaults.seed,
    )
    print(compare.render(rows, queries, named, a, b))


if __name__ == "__main__":
    program.run(main, __doc__, arguments=2)
