"""TREC run files, and what they hold as arrays. Shape suffixes as in `metrics`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rqv2_jax.data import files
from rqv2_jax.errors import InputError
from rqv2_jax.ranking.metrics import sort_run

# The columns of passage, rank and score, by the number of columns.
_COLUMNS = {6: (2, None, 4), 3: (1, 2, None), 4: (1, 2, 3)}


def write_run(
    path: Path,
    query_ids: Sequence[str],
    passage_ids: Sequence[str],
    passages_QxK: np.ndarray,
    scores_QxK: np.ndarray,
    tag: str,
) -> None:
    """Writes the run in rank order as lines `qid Q0 docid rank score tag`, ranks from 1.

    Scores have the nine digits from which a float32 is restored exactly, so ties neither arise nor
    vanish. The file is written under a temporary name and renamed when it is complete. Raises
    InputError for an id or a tag that is empty or has white space, and as `sort_run`.
    """
    passages_QxK, scores_QxK = sort_run(passages_QxK, scores_QxK, passage_ids)
    listed_rows = np.unique(passages_QxK[passages_QxK >= 0]).tolist()
    listed_ids = {row: passage_ids[row] for row in listed_rows}
    for what, names in (("query", query_ids), ("passage", listed_ids.values()), ("tag", [tag])):
        for name in names:
            if name.split() != [name]:
                raise InputError(
                    f"{path}: {what} {str(name)!r} is empty or has white space, which separates the"
                    " columns of a TREC run file: rename it"
                )
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for query_id, passages_K, scores_K in zip(query_ids, passages_QxK, scores_QxK, strict=True):
            results = zip(passages_K[passages_K >= 0].tolist(), scores_K.tolist())
            file.writelines(
                f"{query_id} Q0 {listed_ids[row]} {rank} {score:.9g} {tag}\n"
                for rank, (row, score) in enumerate(results, start=1)
            )
    os.replace(temporary, path)


def read_run(path: Path) -> dict[str, list[tuple[str, float]]]:
    """Returns each query's `(passage id, score)` pairs in the order of a run file, gzipped or not.

    Takes TREC's lines `qid Q0 docid rank score tag`, MS MARCO's `qid docid rank`, in which minus the
    rank is the score, and RocketQA's `qid docid rank score`; columns are separated by white space. As
    float32 the scores are bit for bit those that `write_run` was given. Ranks are not read if there are
    scores, because these rank (`sort_run`). Raises InputError for any other line, and for a passage
    that a query lists twice.
    """
    scores_by_query: dict[str, dict[str, float]] = {}
    width = 0
    for number, line in files.lines(files.open_file(path)):
        columns, where = line.split(), f"{path}:{number}"
        width = width or len(columns)
        if len(columns) != width or width not in _COLUMNS:
            raise InputError(
                f"{where}: {len(columns)} columns, but a line of a run has six, "
                "`qid Q0 docid rank score tag`, or three or four, `qid docid rank [score]`, all alike"
            )
        query, passage, score = _parse_run_line(columns, where)
        scores = scores_by_query.setdefault(query, {})
        if passage in scores:
            raise InputError(
                f"{where}: passage {passage} is listed twice for query {query}: keep one of them"
            )
        scores[passage] = score
    return {query: list(scores.items()) for query, scores in scores_by_query.items()}


def run_arrays(
    listed: Mapping[str, Sequence[tuple[str, float]]],
    query_ids: Sequence[str],
    passage_rows: Mapping[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `read_run` has read as a run `(passages_QxK, scores_QxK)`.

    It has a row for each of `query_ids`, all padding where the file does not name the query; K is the
    length of the longest. `passage_rows` has every listed passage's row number.
    """
    results_Q = [listed.get(query, ()) for query in query_ids]
    shape = len(query_ids), max(map(len, results_Q), default=0)
    passages_QxK, scores_QxK = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
    for row, pairs in enumerate(results_Q):
        passages_QxK[row, : len(pairs)] = [passage_rows[passage] for passage, _ in pairs]
        scores_QxK[row, : len(pairs)] = [score for _, score in pairs]
    return passages_QxK, scores_QxK


def _parse_run_line(columns: list[str], where: str) -> tuple[str, str, float]:
    passage, rank, score = _COLUMNS[len(columns)]
    value = np.nan
    for what, column, read in (("rank", rank, lambda text: -int(text)), ("score", score, float)):
        if column is not None:
            try:
                value = float(read(columns[column]))
            except ValueError:
                value = np.nan
            if np.isnan(value):
                fault = f"the {what} {columns[column]!r} is not a number: correct it"
                raise InputError(f"{where}: {fault}")
    return columns[0], columns[passage], value
