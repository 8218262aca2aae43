"""Search in a workdir: the best passages of a question as text, or a run file for many.

Shape suffixes: Q queries, K retrieved passages, R re-ranked passages.
"""

import pathlib
import textwrap

import numpy as np

from rqv2_jax.data import own_texts, tokens
from rqv2_jax.data.collection import Left
from rqv2_jax.data.readers import topics
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import trec
from rqv2_jax.recipe import scorer
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.texts import texts_of
from rqv2_jax.retrieval import rerank

# Of a printed passage: characters at most, and the width and indent of its lines.
CHARACTERS, WIDTH, INDENT = 280, 100, " " * 6
NO_LABELS_3x0 = np.zeros((3, 0), np.int64)


def show(run: Run, store: tokens.Store, question: str, state: str, index: str, shown: int) -> str:
    """Returns the best passages of a question, `shown` at most, as text for people.

    Raises:
      InputError: the texts have changed since the workdir was made, or what `scorer.search` raises.
    """
    asked = tokens.Queries(run.tokenizer.texts([question]), ["question"], NO_LABELS_3x0)
    passages_1xK, retriever_1xK, reranker_1xR = scorer.search(
        run, store, asked, state=state, index_name=index
    )
    scores_1xK = rerank.merge(reranker_1xR, retriever_1xK)
    order = np.argsort(-scores_1xK[0], kind="stable").tolist()
    order = [number for number in order if passages_1xK[0, number] >= 0][:shown]
    texts = texts_of(run, store.fingerprint)
    texts = texts.shown({int(passages_1xK[0, number]) for number in order})
    lines = ["rank  re-ranker  retriever  passage"]
    for rank, number in enumerate(order, start=1):
        row = int(passages_1xK[0, number])
        reranker = f"{reranker_1xR[0, number]:.3f}" if number < reranker_1xR.shape[1] else ""
        head = f"{rank:4}  {reranker:>9}  {retriever_1xK[0, number]:9.3f}  {store.passage_ids[row]}"
        text = textwrap.shorten(texts[row], CHARACTERS, placeholder=" ...")
        text = textwrap.fill(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
        lines += [head, text]
    return "\n".join(lines)


def write_run(
    run: Run,
    store: tokens.Store,
    topics_file: pathlib.Path,
    path: pathlib.Path,
    *,
    state: str,
    index: str,
) -> list[str]:
    """Writes the hits of each query of a file as a TREC run file; returns lines that say so.

    Raises:
      InputError: the file cannot be read or holds no query, or what `scorer.search` raises.
    """
    left = Left()
    queries = topics.asked(topics.topics(topics_file), left)
    if not queries:
        raise InputError(f"{topics_file}: holds no query; give one with text")
    texts, ids = [query.text for query in queries], [query.id for query in queries]
    asked = tokens.Queries(run.tokenizer.texts(texts), ids, NO_LABELS_3x0)
    asked = own_texts.of_queries(store, asked, run.config.data.ignore_identical_ids)
    passages_QxK, retriever_QxK, reranker_QxR = scorer.search(
        run, store, asked, state=state, index_name=index
    )
    scores_QxK = rerank.merge(reranker_QxR, retriever_QxK)
    tag = f"rqv2_jax.{state}.reranker"
    trec.write_run(path, ids, store.passage_ids, passages_QxK, scores_QxK, tag)
    lines = [f"{topics_file}: {line}" for line in left.lines()]
    return [*lines, f"run: {path}   {len(ids)} queries, {passages_QxK.shape[1]} passages each"]
