"""The table of the ablations: every row against `full`, by model, candidates and metric.

Shape suffixes: S seeds, Q queries.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np
from scipy import stats

from rqv2_jax import artifacts
from rqv2_jax.errors import readable
from rqv2_jax.ranking import metrics

# What the table compares, as (model, candidates, metric): a re-ranker ranks what its own retriever
# finds, and what the warm start's finds, where any gain is the re-ranker's own.
WARM = "warm_start"
MEASURES = (
    ("retriever", "exact", "RR@10"),
    ("retriever", "exact", "Success@50"),
    ("reranker", "exact", "RR@10"),
    ("reranker", WARM, "RR@10"),
)


def summarise(measured: list[dict], *, permutations: int) -> list[dict]:
    """Returns a row for each ablation, model, candidates and metric, in the order of `measured`.

    Values of a query are averaged over seeds before runs are compared. `p_value` is of the paired
    randomisation test against `full` over the queries, corrected by Holm's rule for the number of
    rows compared by the same measure; `low` and `high` bound the 95% bootstrap interval. Both speak
    of other queries, not of other seeds. For these there are the `differences` of each, and from two
    seeds on `seeds_p_value` of the t-test that their mean is 0, not corrected. `kept_steps` are those
    of joint training that dev chose, 0 where it was the start.
    """
    names = list(dict.fromkeys(m["row"] for m in measured))
    kept = {name: [m["kept_step"] for m in measured if m["row"] == name] for name in names}
    first = measured[0]["values"]
    warmed_up = any(key.startswith("retriever.") for key in first)
    warm = {"retriever": "retriever" if warmed_up else "zero_shot", "reranker": "reranker"}
    rows = []
    for model, candidates, metric in MEASURES:
        key = f"joint.{model}.{candidates}.{metric}"
        values = {"warm start": first[f"{warm[model]}.{model}.exact.{metric}"][None]}
        values |= {
            n: np.stack([m["values"][key] for m in measured if m["row"] == n]) for n in names
        }
        part = []
        for name, values_SxQ in values.items():
            row = {"row": name, "model": model, "candidates": candidates, "metric": metric}
            means_S = values_SxQ.mean(axis=1)
            row |= {"queries": values_SxQ.shape[1], "mean": float(means_S.mean())}
            row |= {"seeds": len(means_S), "spread": None, "kept_steps": kept.get(name, [])}
            if len(means_S) > 1:
                row["spread"] = float(means_S.std(ddof=1))
            if name != "full":
                row |= _compared(values_SxQ, values["full"], permutations)
            part.append(row)
        compared = [row for row in part if "p_value" in row]
        for row, p in zip(compared, metrics.holm([row["p_value"] for row in compared])):
            row["p_value"] = p
        rows += part
    return rows


def _compared(values_SxQ: np.ndarray, full_SxQ: np.ndarray, permutations: int) -> dict:
    """Returns the differences of a row to `full` and their tests, not corrected."""
    difference_S = values_SxQ.mean(axis=1) - full_SxQ.mean(axis=1)
    found = {"differences": difference_S.tolist()}
    # Equal differences differ by rounding, of which a t-test would make much.
    if np.ptp(difference_S) > 1e-9:
        found["seeds_p_value"] = float(stats.ttest_1samp(difference_S, 0).pvalue)
    mean_Q, full_Q = values_SxQ.mean(axis=0), full_SxQ.mean(axis=0)
    low, high = metrics.interval(mean_Q - full_Q, resamples=permutations, seed=0)
    difference, p = metrics.paired_test(mean_Q, full_Q, permutations=permutations, seed=0)
    return found | {"difference": difference, "low": low, "high": high, "p_value": p}


def render(summary: list[dict]) -> str:
    """Returns the rows as tables in Markdown."""
    lines = []
    for measure in MEASURES:
        model, candidates, metric = measure
        keys = ("model", "candidates", "metric")
        part = [row for row in summary if tuple(row[key] for key in keys) == measure]
        given = " on the warm start's candidates" if candidates == WARM else ""
        lines += [
            f"{model}{given}, {metric}, {part[0]['queries']} test queries",
            "",
            "| row | steps kept | mean | spread | difference to full | 95% interval | p (Holm) | "
            "of each seed | p over seeds |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in part:
            spread = "" if row["spread"] is None else f"{row['spread']:.4f}"
            compared = " | | | | "
            if "difference" in row:
                each = ", ".join(f"{difference:+.4f}" for difference in row["differences"])
                seeds_p = f"{row['seeds_p_value']:.4f}" if "seeds_p_value" in row else ""
                compared = (
                    f"{row['difference']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} | "
                    f"{row['p_value']:.4f} | {each} | {seeds_p}"
                )
            kept = ", ".join(map(str, row["kept_steps"]))
            lines.append(f"| {row['row']} | {kept} | {row['mean']:.4f} | {spread} | {compared} |")
        lines.append("")
    return "\n".join(lines)


def write(
    measurements: Iterator[list[dict]], path: pathlib.Path, *, seeds: int, permutations: int
) -> str:
    """Writes `path`.json and .md after each of `seeds` measurements; returns the last as Markdown.

    A table of the same rows by more seeds, which a run that resumes has yet to reach, stays meanwhile.
    """
    table = ""
    for done, measured in enumerate(measurements, 1):
        summary = summarise(measured, permutations=permutations)
        table = render(summary)
        if done == seeds or not _knows_more(path.with_name(f"{path.name}.json"), summary):
            text = json.dumps(summary, indent=1) + "\n"
            artifacts.write_text(path.with_name(f"{path.name}.json"), text)
            artifacts.write_text(path.with_name(f"{path.name}.md"), table)
    return table


def _knows_more(path: pathlib.Path, summary: list[dict]) -> bool:
    """Says whether the table in a file holds the same rows by more seeds."""
    known = None
    if path.is_file():
        known = readable(path, lambda: json.loads(path.read_text()))
    if known is None:
        return False
    names, others = ({row["row"]: row["seeds"] for row in x} for x in (summary, known))
    return names.keys() == others.keys() and others["full"] > names["full"]
