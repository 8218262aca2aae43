"""Scores of another ranker, BM25 or one that wrote a run file, from which the re-ranker learns.

Its warm-up on the labels of the lists learns them too (config.reranker.teacher).

Shape suffixes: L lists, P passages of a list.
"""

import dataclasses
import pathlib

import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts, optional
from rqv2_jax.data import files, tokens
from rqv2_jax.data.lists import Lists
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import trec
from rqv2_jax.recipe.rankings import score_bm25
from rqv2_jax.recipe.run import Run
from rqv2_jax.retrieval import bm25


def check(run: Run) -> None:
    """Raises InputError if the teacher's file, or a package that it needs, is not there."""
    if run.config.reranker.teacher == "bm25":
        for package in bm25.PACKAGES:
            optional.load(package, "BM25 as the re-ranker's teacher")
    elif run.config.reranker.teacher:
        files.open_file(pathlib.Path(run.config.reranker.teacher))


def taught(run: Run, store: tokens.Store, lists: Lists) -> Lists:
    """Returns the lists with the scores of `config.reranker.teacher`, kept in `lists/`.

    Raises InputError if a run file cannot be used, or scores no passage of the lists.
    """
    teacher = run.config.reranker.teacher
    if not teacher:
        return lists
    if teacher == "bm25":
        named = f"{bm25.described(run.config.evaluate.bm25)}"
    else:
        named = files.content_hash([files.open_file(pathlib.Path(teacher))])
    source = artifacts.digest(f"{store.fingerprint} {named}", *lists.identity())

    def scores() -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}

        def by_first() -> None:
            if teacher == "bm25":
                found["scores"] = score_bm25(run, store, lists)
            else:
                found["scores"] = _of_run_file(pathlib.Path(teacher), store, lists)

        hosts.from_first(by_first)
        return found

    path = run.workdir / "lists" / "reranker.teacher.npz"
    teacher_LxP = artifacts.cached(path, source, scores)["scores"]
    scored = ~np.isnan(teacher_LxP)
    tqdm.tqdm.write(f"  {teacher} scores {scored.mean():.1%} of the lists' passages")
    return dataclasses.replace(lists, teacher_LxP=teacher_LxP)


def _of_run_file(path: pathlib.Path, store: tokens.Store, lists: Lists) -> np.ndarray:
    """Returns a run file's scores [L, P] in float32, NaN for what it does not list."""
    listed, query_ids = trec.read_run(files.open_file(path)), store.splits["train"].ids
    scores_LxP = np.full(lists.passages_LxP.shape, np.nan, np.float32)
    for scores_P, query, passages_P in zip(scores_LxP, lists.query_rows_L, lists.passages_LxP):
        of_query = dict(listed.get(query_ids[query], ()))
        scores_P[:] = [of_query.get(store.passage_ids[row], np.nan) for row in passages_P]
    if np.isnan(scores_LxP).all():
        raise InputError(
            f"{path}: scores no passage of a training list; give a run of the training queries that "
            "ranks their candidates and labelled passages"
        )
    return scores_LxP
