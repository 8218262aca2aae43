"""What users get from a finished workdir: run files, model folders, the report of denoising.

Shape suffixes: Q queries, K retrieved passages, R re-ranked passages, N labels or candidates.
"""

import os
import pathlib
import shutil

import numpy as np
import tqdm
from ml_collections import ConfigDict

from rqv2_jax.data import collection, denoise, files, own_texts, tokens
from rqv2_jax.data.readers import topics
from rqv2_jax.errors import InputError
from rqv2_jax.models import exported
from rqv2_jax.ranking import trec
from rqv2_jax.recipe import mining, scorer
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.texts import rows_of, show_passages
from rqv2_jax.retrieval import rerank
from rqv2_jax.tools import cards

NO_LABELS_3x0 = np.zeros((3, 0), np.int64)


def write_run(
    run: Run, store: tokens.Store, asked: pathlib.Path, to: pathlib.Path, state: str, index: str
) -> list[str]:
    """Writes the hits of each query of the file `asked` as a TREC run file; returns lines on it."""
    left = collection.Left()
    given = topics.asked(topics.topics(asked), left)
    if not given:
        raise InputError(f"{asked}: holds no query; give one with text")
    texts, ids = [query.text for query in given], [query.id for query in given]
    queries = tokens.Queries(run.tokenizer.texts(texts), ids, NO_LABELS_3x0)
    queries = own_texts.of_queries(store, queries, run.config.data.ignore_identical_ids)
    search = scorer.open_search(run, store, state=state, index_name=index)
    passages_QxK, retriever_QxK, reranker_QxR = search(queries)
    scores_QxK = rerank.merge(reranker_QxR, retriever_QxK)
    tag = f"rqv2_jax.{state}.reranker"
    trec.write_run(to, ids, store.passage_ids, passages_QxK, scores_QxK, tag)
    lines = [f"{asked}: {line}" for line in left.lines()]
    return [*lines, f"run: {to}   {len(ids)} queries, {passages_QxK.shape[1]} passages each"]


def write_models(run: Run, state: str, path: pathlib.Path) -> str:
    """Writes a state's models as folders for transformers; returns a line on how passages are read."""
    models, data = run.models, run.config.data
    retriever, reranker = (
        run.params(state=state, model=model) for model in ("retriever", "reranker")
    )
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    lengths = {"query": data.query_length, "passage": data.passage_length}
    lengths["both"] = max(lengths.values())
    for name, encoder in retriever.items():
        source, shape = run.sources.query.folder, models.retriever
        folder = partial / ("retriever" if name == "both" else name)
        exported.save_encoder(folder, source, shape, encoder)
        exported.describe_retriever(folder, shape.hidden_size, run.config.model, lengths[name])
        cards.write_card(run, state, folder)
    source, shape, folder = run.sources.reranker.folder, models.reranker, partial / "reranker"
    exported.save_encoder(folder, source, shape, reranker["encoder"], reranker["head"])
    exported.describe_reranker(
        folder, shape.hidden_size, models.head, models.reranker_pooling, data.pair_length
    )
    cards.write_card(run, state, folder)
    os.replace(partial, path)
    joined = "title and text joined by a space" if data.titles else "text"
    if data.titles and run.config.model.passage_format == "title_sep_text":
        joined = "title and text as a pair of texts"
    limit = f"at most {data.passage_length} tokens"
    return f"models: {path}   the retriever reads a passage's {joined}, {limit}"


def denoise_report(run: Run, labels: str, samples: int) -> tuple[dict, list[dict]]:
    """Returns what denoising keeps and drops, by threshold, and some untrusted candidates as text.

    `labels` is the qrels folder with more complete training labels, or "" where there are none; labels
    of queries that were not trained on are left out. Raises InputError if the candidates have not been
    scored, or there are no such labels.
    """
    config = run.config
    if config.joint.denoised_share == 0:
        raise InputError(
            f"{run.workdir}: config.joint.denoised_share is 0, so no candidate has a score; run with "
            "a share above 0"
        )
    if config.joint.lists:
        raise InputError(
            f"{run.workdir}: config.joint.lists is {config.joint.lists!r}, so no candidates were "
            "scored for it; run without it"
        )
    if labels and config.data.dataset != "beir":
        raise InputError(f"--labels: {config.data.dataset} has no other labels; leave the flag out")
    store, candidates, texts = mining.mined(run)
    candidates, probability = mining.comparable(config, store, candidates)
    _, relevant_N = mining.labelled_scores(store, candidates["dev"])
    positives_2xN = store.splits["train"].positives()
    fuller_2xN = _fuller_labels(config.data, labels, store) if labels else None
    below, above = config.mine.negative_below, config.mine.positive_above
    known = (candidates["train"], positives_2xN, probability, len(store.passage_ids))
    report = denoise.table(*known, chosen=(below, above), fuller_2xN=fuller_2xN)
    report["dev"] = {"candidates": len(relevant_N), "labelled": int(relevant_N.sum())}
    by = ("probability", "calibrate", "relevant_share")
    report["by"] = {key: config.mine[key] for key in by}
    shown = denoise.rejected(*known, negative_below=below, count=samples, seed=config.seed)
    labelled = dict(positives_2xN.T[::-1].tolist())
    rows = {row for query, row, _ in shown for row in (row, labelled[query])}
    passages = show_passages(run, store, rows)
    queries = [query.text for query in texts.queries("train")]
    keys = ("query", "labelled", "candidate", "probability")
    return report, [
        dict(zip(keys, (queries[query], passages[labelled[query]], passages[row], p)))
        for query, row, p in shown
    ]


def _fuller_labels(data: ConfigDict, labels: str, store: tokens.Store) -> np.ndarray:
    """Returns the relevant pairs [2, N], query row and passage row, of another qrels folder."""
    folder = pathlib.Path(data.path) / labels
    if not folder.is_dir():
        raise InputError(f"{folder}: no such qrels folder; add it or name another one")
    query_rows, passage_rows = rows_of(store.splits["train"].ids), rows_of(store.passage_ids)
    # All of the file: which queries were held out depends on the labels.
    fuller = files.labels(files.required(folder, "qrels", "train.tsv"))
    trained_on = (label for label in fuller if label.query_id in query_rows)
    left = collection.Left()
    *pairs, relevance_N = collection.check_qrels(trained_on, query_rows, passage_rows, left)
    for line in left.lines():
        tqdm.tqdm.write(f"{labels}: {line}")
    return np.stack(pairs)[:, relevance_N > 0]
