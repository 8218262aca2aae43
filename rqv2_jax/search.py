"""Searches the passages of a workdir: its retriever finds, its re-ranker orders the first of them.

With a question, prints the best passages with both models' scores. With --topics, writes what is found
for each query of the file (`qid <tab> text`, TREC topics or BEIR's queries.jsonl), which needs no
labels, as a TREC run file. Data or weights that have moved since are given as --data, --weights,
--reranker_weights.

Examples:
  python -m rqv2_jax.search --workdir workdir/quickstart "sort an array"
  python -m rqv2_jax.search --workdir workdir/msmarco --topics msmarco-test2020-queries.tsv \\
      --to run.trec --index scann
"""

import pathlib
import textwrap

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

program.define_places()
_WORKDIR = flags.DEFINE_string("workdir", None, "A workdir that rqv2_jax.main has finished.")
_TOPICS = flags.DEFINE_string("topics", None, "With --to: file of queries, in place of a question.")
_TO = flags.DEFINE_string("to", None, "With --topics: the run file to write.")
_STATE = flags.DEFINE_enum(
    "state", "joint", ["reranker", "joint"], "Models: both warmed up, or joint."
)
_INDEX = flags.DEFINE_enum("index", "exact", ["exact", "scann"], "How passages are searched.")
_SHOWN = flags.DEFINE_integer("shown", 10, "Passages printed for a question, at most.", 1)

# Of a passage that is printed, at most, and of its lines.
CHARACTERS, WIDTH, INDENT = 280, 100, " " * 6


def main(*question: str):
    """Prints what is found for the question, or writes the run of the topics."""
    if (_TOPICS.value is None) != (_TO.value is None):
        raise InputError("--topics and --to go together; --help shows an example")
    if (_TOPICS.value is None) != bool(question):
        raise InputError("give a question or --topics FILE, not both; --help shows an example")
    if question and not question[0].strip():
        raise InputError("the question is empty; --help shows an example")
    to = program.file_to_write("to")

    import numpy as np

    from rqv2_jax.data import tokens
    from rqv2_jax.recipe import scorer as score
    from rqv2_jax.recipe.claim import open_workdir
    from rqv2_jax.recipe.texts import open_store
    from rqv2_jax.recipe.workdir import alone

    run = open_workdir(pathlib.Path(_WORKDIR.value), **program.places())
    with alone(run.workdir):
        store = open_store(run)
        if question:
            no_labels = np.zeros((3, 0), np.int64)
            asked = tokens.Queries(run.tokenizer.texts(question), ["question"], no_labels)
            how = {"state": _STATE.value, "index_name": _INDEX.value}
            found = score.search(run, store, asked, **how)
            print(render(run, store, *found, shown=_SHOWN.value))
        else:
            _write_run(run, store, pathlib.Path(_TOPICS.value), to)


def render(run, store, passages_1xK, retriever_1xK, reranker_1xR, *, shown: int) -> str:
    """The best passages of one question as text for people.

    Raises:
      InputError: the texts have changed since the workdir was made.
    """
    import numpy as np

    from rqv2_jax.recipe.texts import texts_of
    from rqv2_jax.retrieval import rerank

    scores_1xK = rerank.merge(reranker_1xR, retriever_1xK)
    order = np.argsort(-scores_1xK[0], kind="stable").tolist()
    order = [number for number in order if passages_1xK[0, number] >= 0][:shown]
    texts = texts_of(run, store.fingerprint).shown(
        {int(passages_1xK[0, number]) for number in order}
    )
    blocks = ["rank  re-ranker  retriever  passage"]
    for rank, number in enumerate(order, start=1):
        row = int(passages_1xK[0, number])
        reranker = f"{reranker_1xR[0, number]:.3f}" if number < reranker_1xR.shape[1] else ""
        head = f"{rank:4}  {reranker:>9}  {retriever_1xK[0, number]:9.3f}  {store.passage_ids[row]}"
        text = textwrap.shorten(texts[row], CHARACTERS, placeholder=" ...")
        blocks += [
            head,
            textwrap.fill(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT),
        ]
    return "\n".join(blocks)


def _write_run(run, store, topics_file: pathlib.Path, path: pathlib.Path):
    import numpy as np

    from rqv2_jax.data import own_texts, tokens
    from rqv2_jax.data.collection import Left
    from rqv2_jax.data.readers import topics
    from rqv2_jax.ranking import trec
    from rqv2_jax.recipe import scorer as score
    from rqv2_jax.retrieval import rerank

    left = Left()
    queries = topics.asked(topics.topics(topics_file), left)
    if not queries:
        raise InputError(f"{topics_file}: holds no query; give one with text")
    state = _STATE.value
    texts = [query.text for query in queries]
    ids, no_labels = [query.id for query in queries], np.zeros((3, 0), np.int64)
    asked = tokens.Queries(run.tokenizer.texts(texts), ids, no_labels)
    asked = own_texts.of_queries(store, asked, run.config.data.ignore_identical_ids)
    found = score.search(run, store, asked, state=state, index_name=_INDEX.value)
    passages_QxK, retriever_QxK, reranker_QxR = found
    scores_QxK = rerank.merge(reranker_QxR, retriever_QxK)
    tag = f"rqv2_jax.{state}.reranker"
    trec.write_run(path, ids, store.passage_ids, passages_QxK, scores_QxK, tag)
    for line in left.lines():
        print(f"{topics_file}: {line}")
    print(f"run: {path}   {len(ids)} queries, {passages_QxK.shape[1]} passages each")


if __name__ == "__main__":
    program.run(main, __doc__, required=("workdir",), arguments=1)
