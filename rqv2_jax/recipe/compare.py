"""Two run files on the same qrels: every metric of both, and whether they differ.

Files that cannot be used raise InputError. Shape suffixes: J queries with a relevant passage, N labels.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import tqdm

from rqv2_jax.data import files, own_texts
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import metrics, significance, trec


def read_qrels(path: pathlib.Path) -> dict[tuple[str, str], int]:
    """Reads the relevance of every judged (query id, passage id), as `files.labels` does."""
    return {(q.query_id, q.passage_id): q.relevance for q in files.labels(files.open_file(path))}


def compare(
    a: pathlib.Path,
    b: pathlib.Path,
    qrels: pathlib.Path,
    *,
    names: Sequence[str],
    min_relevance: int,
    permutations: int,
    seed: int,
) -> tuple[list[dict], int, tuple[int, ...]]:
    """Compares two TREC run files by every metric on the same qrels.

    A row has the means `a` and `b`, `difference` = a - b with its 95% bootstrap interval from `low`
    to `high`, and the p-value of the two-sided paired randomisation test. All queries with a relevant
    passage count; in a run that does not name one it has 0. `min_relevance` is that of a relevant
    passage in all metrics but nDCG, as their names then say. Of a run in which most queries find the
    passage with their own id first, being in the corpus themselves, these passages are left out, and
    that is printed.

    Returns:
      (a row for each metric, number of queries, how many of them a and b name).
    """
    judged, runs = read_qrels(qrels), [trec.read_run(path) for path in (a, b)]
    query_ids = sorted({query for query, _ in judged})
    for path, run in zip((a, b), runs):
        if not run.keys() & set(query_ids):
            raise InputError(f"{path}: holds no query of {qrels}; give the qrels of its queries")
    runs = [_without_own(path, run) for path, run in zip((a, b), runs)]
    listed = {passage for run in runs for ranking in run.values() for passage, _ in ranking}
    passage_ids = sorted(listed | {passage for _, passage in judged})
    query_rows, passage_rows = (
        {name: row for row, name in enumerate(ids)} for ids in (query_ids, passage_ids)
    )
    pairs = [(query_rows[q], passage_rows[p], relevance) for (q, p), relevance in judged.items()]
    qrels_3xN = tuple(np.array(pairs, np.int64).T)
    names = metrics.at_relevance(names, min_relevance)
    values = [
        metrics.evaluate(
            *trec.run_arrays(run, query_ids, passage_rows), passage_ids, qrels_3xN, names
        )
        for run in runs
    ]
    rows = []
    for name in names:
        a_J, b_J = (value[name] for value in values)
        difference, p_value = significance.paired_test(
            a_J, b_J, permutations=permutations, seed=seed
        )
        low, high = significance.interval(a_J - b_J, resamples=permutations, seed=seed)
        row = {"metric": name, "a": float(a_J.mean()), "b": float(b_J.mean())}
        rows.append({**row, "difference": difference, "low": low, "high": high, "p_value": p_value})
    relevant = {query_ids[row] for row in metrics.judged_queries(qrels_3xN)}
    return rows, len(a_J), tuple(len(relevant & run.keys()) for run in runs)


def _without_own(path: pathlib.Path, run: dict[str, list[tuple[str, float]]]) -> dict:
    """Returns a run without the passages that are the queries themselves, if most queries have one."""
    best = {query: max(ranking, key=lambda pair: pair[1])[0] for query, ranking in run.items()}
    own = sum(query == passage for query, passage in best.items())
    # Numbers may be ids of both by chance, but then not at the top.
    if own < own_texts.MOST * len(run):
        return run
    tqdm.tqdm.write(
        f"{path}: {own:,} of {len(run):,} queries find themselves, as passages; these are ignored"
    )
    return {q: [pair for pair in ranking if pair[0] != q] for q, ranking in run.items()}


def render(rows: list[dict], queries: int, named: tuple[int, ...], a: str, b: str) -> str:
    """Returns the comparison as a table for people."""
    lines = []
    for name, path, count in zip("ab", (a, b), named):
        missing = f" (names {count} of the queries; the others count 0)" if count < queries else ""
        lines.append(f"{name}: {path}{missing}")
    lines += [f"{queries} queries with a relevant passage", ""]
    width = max(12, *(len(row["metric"]) for row in rows))
    lines.append(f"{'metric':{width}} {'a':>8} {'b':>8} {'a - b':>9} {'95% interval':>20} {'p':>8}")
    for row in rows:
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        lines.append(
            f"{row['metric']:{width}} {row['a']:8.4f} {row['b']:8.4f} {row['difference']:+9.4f} "
            f"{interval:>20} {row['p_value']:8.4f}"
        )
    return "\n".join(lines)
