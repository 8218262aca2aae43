"""Counts of what denoising keeps and drops, by threshold (paper, section 3.3).

Shape suffixes: Q queries, N candidates of a query (or pairs), C scored candidates of all queries,
end to end, U those of them without a label, F candidates that are not trusted.
"""

from typing import Any

import numpy as np

from rqv2_jax.data import calibration
from rqv2_jax.data import lists as lists_lib

# Thresholds on the probability of relevance: negatives are below, positives above.
BELOW = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
ABOVE = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
BINS = 16


def table(
    candidates: lists_lib.Candidates,
    positives_2xN: np.ndarray,
    probability: tuple[float, float],
    num_passages: int,
    *,
    chosen: tuple[float, float],
    fuller_2xN: np.ndarray | None = None,
) -> dict:
    """Counts candidates on either side of every threshold, the `chosen` two among them.

    Args:
      positives_2xN: the training labels; the candidates they name are left out of all counts but
        the histogram.
      probability: slope and offset of `calibration.calibrate`.
      chosen: `negative_below` and `positive_above` of the config.
      fuller_2xN: more complete labels of the same queries, if there are any. Candidates that only
        these name are the *hidden* positives, by which denoising is judged.

    Returns:
      `histogram`: `edges` of re-ranker scores, and how many `labelled` and `unlabelled` (and
      `hidden`) candidates lie in each bin. `negatives` and `positives`: a row for each threshold with
      how many unlabelled candidates are `kept` and `dropped`, and with fuller labels `precision`
      (the share of the kept ones that is right) and `recall` (the share of the right ones that is
      kept), None of none.
    """
    rows = candidates.query_rows_Q, candidates.passages_QxN, num_passages
    scored_QxN = ~np.isnan(candidates.reranker_QxN)
    score_C = candidates.reranker_QxN[scored_QxN]
    p_C = calibration.relevance(score_C.astype(np.float64), probability)
    labelled_C = lists_lib.known_positive(positives_2xN, *rows)[scored_QxN]
    groups = {"labelled": labelled_C, "unlabelled": ~labelled_C}
    hidden_U = innocent_U = None
    if fuller_2xN is not None:
        fuller_C = lists_lib.known_positive(fuller_2xN, *rows)[scored_QxN]
        groups["hidden"] = fuller_C & ~labelled_C
        hidden_U = fuller_C[~labelled_C]
        innocent_U = ~hidden_U
    p_U = p_C[~labelled_C]
    below, above = (sorted({*more, one}) for more, one in zip((BELOW, ABOVE), chosen))
    return {
        "queries": int(scored_QxN.any(axis=1).sum()),
        **{name: int(of_C.sum()) for name, of_C in groups.items()},
        "probability": {"slope": probability[0], "offset": probability[1]},
        "range": [float(p_U.min(initial=1.0)), float(p_U.max(initial=0.0))],
        "chosen": {"negative_below": chosen[0], "positive_above": chosen[1]},
        "histogram": _histogram(score_C, groups),
        "negatives": [_row("below", t, p_U < t, innocent_U) for t in below],
        "positives": [_row("above", t, p_U > t, hidden_U) for t in above],
    }


def _histogram(score_C: np.ndarray, groups: dict[str, np.ndarray]) -> dict[str, list]:
    """Returns the edges of bins of scores, and the number of candidates of each group in each bin."""
    edges = np.histogram_bin_edges(score_C, BINS)
    return {"edges": edges.tolist()} | {
        name: np.histogram(score_C[of_C], edges)[0].tolist() for name, of_C in groups.items()
    }


def _row(name: str, threshold: float, kept_U: np.ndarray, right_U: np.ndarray | None) -> dict:
    """Returns counts at a threshold, and precision and recall if it is known which are right."""
    kept = int(kept_U.sum())
    row: dict[str, Any] = {name: threshold, "kept": kept, "dropped": len(kept_U) - kept}
    if right_U is not None:
        hits = int((kept_U & right_U).sum())
        row["precision"] = hits / kept if kept else None
        row["recall"] = hits / int(right_U.sum()) if right_U.any() else None
    return row


def rejected(
    candidates: lists_lib.Candidates,
    positives_2xN: np.ndarray,
    probability: tuple[float, float],
    num_passages: int,
    *,
    negative_below: float,
    count: int,
    seed: int,
) -> list[tuple[int, int, float]]:
    """Draws at most `count` unlabelled candidates that are not trusted as negatives.

    As (query row, passage row, probability of relevance), the likeliest first.
    """
    known_QxN = lists_lib.known_positive(
        positives_2xN, candidates.query_rows_Q, candidates.passages_QxN, num_passages
    )
    p_QxN = calibration.relevance(candidates.reranker_QxN.astype(np.float64), probability)
    places_Fx2 = np.argwhere(~known_QxN & (p_QxN >= negative_below))
    places_Fx2 = np.random.default_rng(seed).permutation(places_Fx2)[:count]
    rows = [
        (int(candidates.query_rows_Q[q]), int(candidates.passages_QxN[q, n]), float(p_QxN[q, n]))
        for q, n in places_Fx2
    ]
    return sorted(rows, key=lambda row: -row[2])


def render(report: dict) -> str:
    """Renders a `table` with `dev`, its counts there, and `by`, three settings of `config.mine`, added.

    The chosen thresholds carry a star.
    """
    judged = "hidden" in report
    hidden = f", {report['hidden']} of them relevant by the fuller labels" if judged else ""
    slope, offset = report["probability"].values()
    lowest, highest = report["range"]
    by, dev = report["by"], report["dev"]
    relative = by["calibrate"] == "query_mean" and by["probability"] == "calibrated"
    fitted = (
        f", from {dev['candidates']} dev candidates, of which {dev['labelled']} are labelled, as if "
        f"{by['relevant_share']:.0%} were" + ", scores less the mean of their query's" * relative
    )
    lines = [
        f"{report['queries']} queries with scored candidates: {report['labelled']} labelled, "
        f"{report['unlabelled']} unlabelled{hidden}",
        f"probability of relevance: sigmoid({slope:.3f} score {offset:+.3f})"
        + fitted * (by["probability"] == "calibrated"),
        f"of unlabelled candidates: {lowest:.3f} to {highest:.3f}",
    ]
    if slope == 0:
        lines.append(
            "the re-ranker scores labelled dev candidates no higher than others: train it longer"
        )
    histogram = report["histogram"]
    names = [name for name in ("labelled", "unlabelled", "hidden") if name in histogram]
    lines += ["", "re-ranker score      " + "".join(f"{name:>32}" for name in names)]
    tallest = {name: max(*histogram[name], 1) for name in names}
    for i, (low, high) in enumerate(zip(histogram["edges"], histogram["edges"][1:])):
        cells = (
            f"{'#' * round(22 * histogram[name][i] / tallest[name]):>24}{histogram[name][i]:>8}"
            for name in names
        )
        lines.append(f"{low:8.2f} to {high:8.2f} {''.join(cells)}")
    for kind, name, chosen in (
        ("negatives", "below", report["chosen"]["negative_below"]),
        ("positives", "above", report["chosen"]["positive_above"]),
    ):
        head = f"{kind} {name:>7}{'kept':>10}{'dropped':>10}"
        lines += ["", head + (f"{'precision':>11}{'recall':>9}" if judged else "")]
        for row in report[kind]:
            star = "*" if row[name] == chosen else " "
            line = f"{row[name]:>16.3f}{star}{row['kept']:>10}{row['dropped']:>10}"
            if judged:
                for key, width in (("precision", 11), ("recall", 9)):
                    line += f"{'-' if row[key] is None else format(row[key], '.3f'):>{width}}"
            lines.append(line)
    return "\n".join(lines)
