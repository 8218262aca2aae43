"""Searches the passages of a workdir: its retriever finds, its re-ranker orders the first of them.

With a question, prints the best passages with both models' scores. With --topics, writes the hits
of each query of the file (`qid <tab> text`, TREC topics or BEIR's queries.jsonl), which needs no
labels, as a TREC run file. Data or weights that have moved since are given as --data, --weights,
--reranker_weights.

Examples:
  python -m rqv2_jax.search --workdir workdir/quickstart "sort an array"
  python -m rqv2_jax.search --workdir workdir/msmarco --topics msmarco-test2020-queries.tsv \\
      --to run.trec --index scann
"""

import pathlib
from typing import Any

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

program.define_workdir()
flags.DEFINE_string("topics", None, "With --to: file of queries, in place of a question.")
flags.DEFINE_string("to", None, "With --topics: the run file to write.")
_STATE = flags.DEFINE_enum(
    "state", "joint", ["reranker", "joint"], "Models: both warmed up, or joint."
)
_INDEX = flags.DEFINE_enum("index", "exact", ["exact", "scann"], "How passages are searched.")
_SHOWN = flags.DEFINE_integer("shown", 10, "Passages printed for a question, at most.", 1)


def main(*question: str) -> None:
    """Prints the best passages for the question, or writes the run of the topics."""
    topics = flags.FLAGS.topics
    if (topics is None) != (flags.FLAGS.to is None):
        raise InputError("--topics and --to go together; --help shows an example")
    if (topics is None) != bool(question):
        raise InputError("give a question or --topics FILE, not both; --help shows an example")
    if question and not question[0].strip():
        raise InputError("the question is empty; --help shows an example")
    to, how = program.file_to_write("to"), (_STATE.value, _INDEX.value)

    from rqv2_jax.recipe.texts import open_store
    from rqv2_jax.tools import outputs

    def is_made(run: Any) -> bool:
        evaluated = (run.workdir / "results.json").is_file()
        return evaluated and _INDEX.value in run.config.evaluate.indexes

    with program.opened(reads=is_made) as run:
        store = open_store(run)
        if to is None:
            print(outputs.show(run, store, question[0], *how, _SHOWN.value))
        else:
            print(*outputs.write_run(run, store, pathlib.Path(topics), to, *how), sep="\n")


if __name__ == "__main__":
    program.run(main, __doc__, required=("workdir",), arguments=1)
