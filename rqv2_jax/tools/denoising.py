"""What denoising does with the scored candidates of a workdir, for people to judge the re-ranker by.

Shape suffixes: N labels or candidates.
"""

import pathlib

import ml_collections
import numpy as np
import tqdm

from rqv2_jax.data import collection, denoise, files, tokens
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import mining
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.texts import rows_of


def denoise_report(run: Run, labels: str, samples: int) -> tuple[dict, list[dict]]:
    """Returns what denoising keeps and drops, by threshold, and some untrusted candidates as text.

    Args:
      labels: qrels folder with more complete training labels, or "" where there are none; labels of
        queries that were not trained on are left out.

    Raises:
      InputError: the candidates have not been scored, or there are no such labels.
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
    scores_N, relevant_N = mining.labelled_scores(store, candidates["dev"])
    probability = lists_lib.calibrate(scores_N, relevant_N)
    positives_2xN = store.splits["train"].positives()
    fuller_2xN = _fuller_labels(config.data, labels, store) if labels else None
    below, above = config.mine.negative_below, config.mine.positive_above
    known = (candidates["train"], positives_2xN, probability, len(store.passage_ids))
    report = denoise.table(*known, chosen=(below, above), fuller_2xN=fuller_2xN)
    report["dev"] = {"candidates": len(relevant_N), "labelled": int(relevant_N.sum())}
    shown = denoise.rejected(*known, negative_below=below, count=samples, seed=config.seed)
    labelled = {query: passage for query, passage in positives_2xN.T[::-1].tolist()}
    passages = texts.shown({row for query, row, _ in shown for row in (row, labelled[query])})
    queries = [query.text for query in texts.queries("train")]
    return report, [
        {
            "query": queries[query],
            "labelled": passages[labelled[query]],
            "candidate": passages[passage],
            "probability": p,
        }
        for query, passage, p in shown
    ]


def _fuller_labels(data: ml_collections.ConfigDict, labels: str, store: tokens.Store) -> np.ndarray:
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
