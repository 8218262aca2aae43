"""What denoising keeps and drops, by threshold: is the re-ranker to be believed? (paper, section 3.3)

Shape suffixes: C scored candidates of all queries, end to end.
"""

import numpy as np

from rqv2_jax.data import lists as lists_lib

# Of the probability of relevance: below these, negatives; above these, positives.
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
    """Counts of candidates on either side of every threshold, the `chosen` two among them.

    Args:
      positives_2xN: the training labels; the candidates they name are left out of all counts but
        the histogram.
      probability: slope and offset of `lists.calibrate`.
      chosen: `negative_below` and `positive_above` of the config.
      fuller_2xN: more complete labels of the same queries, if there are any. The candidates they
        name and the training labels do not are the *hidden* positives, by which denoising is judged.

    Returns:
      `histogram`: `edges` of re-ranker scores, and how many `labelled` and `unlabelled` (and
      `hidden`) candidates lie in each bin. `negatives` and `positives`: a row for each threshold with
      how many unlabelled candidates are `kept` and `dropped`, and with fuller labels `precision`
      (kept ones that are what they are taken for) and `recall` (of those there are), None of none.
    """
    here = (candidates.query_rows_Q, candidates.passages_QxN, num_passages)
    scored_QxN = ~np.isnan(candidates.reranker_QxN)
    score_C = candidates.reranker_QxN[scored_QxN]
    p_C = lists_lib.relevance(score_C.astype(np.float64), probability)
    labelled_C = lists_lib.known_positive(positives_2xN, *here)[scored_QxN]
    hidden_C = None
    if fuller_2xN is not None:
        hidden_C = lists_lib.known_positive(fuller_2xN, *here)[scored_QxN] & ~labelled_C

    edges = np.histogram_bin_edges(score_C, BINS)
    groups = {"labelled": labelled_C, "unlabelled": ~labelled_C}
    if hidden_C is not None:
        groups["hidden"] = hidden_C
    histogram = {"edges": edges.tolist()} | {
        name: np.histogram(score_C[of_C], edges)[0].tolist() for name, of_C in groups.items()
    }

    def row(name, threshold, taken_C, right_C):
        found = {name: threshold, "kept": int(taken_C.sum()), "dropped": int((~taken_C).sum())}
        if right_C is not None:
            hits = int((taken_C & right_C).sum())
            found["precision"] = hits / found["kept"] if found["kept"] else None
            found["recall"] = hits / int(right_C.sum()) if right_C.any() else None
        return found

    p_U = p_C[~labelled_C]
    hidden_U = None if hidden_C is None else hidden_C[~labelled_C]
    innocent_U = None if hidden_U is None else ~hidden_U
    below, above = (sorted({*more, one}) for more, one in zip((BELOW, ABOVE), chosen))
    return {
        "queries": int(scored_QxN.any(axis=1).sum()),
        "labelled": int(labelled_C.sum()),
        "unlabelled": len(p_U),
        **({} if hidden_U is None else {"hidden": int(hidden_U.sum())}),
        "probability": {"slope": probability[0], "offset": probability[1]},
        "range": [float(p_U.min(initial=1.0)), float(p_U.max(initial=0.0))],
        "chosen": {"negative_below": chosen[0], "positive_above": chosen[1]},
        "histogram": histogram,
        "negatives": [row("below", t, p_U < t, innocent_U) for t in below],
        "positives": [row("above", t, p_U > t, hidden_U) for t in above],
    }


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
    """At most `count` unlabelled candidates that are not trusted as negatives, drawn at random.

    Returns:
      (query row, passage row, probability of relevance) of each, the likeliest first.
    """
    known_QxN = lists_lib.known_positive(
        positives_2xN, candidates.query_rows_Q, candidates.passages_QxN, num_passages
    )
    p_QxN = lists_lib.relevance(candidates.reranker_QxN.astype(np.float64), probability)
    found_Fx2 = np.argwhere(~known_QxN & (p_QxN >= negative_below))
    found_Fx2 = np.random.default_rng(seed).permutation(found_Fx2)[:count]
    rows = [
        (int(candidates.query_rows_Q[q]), int(candidates.passages_QxN[q, n]), float(p_QxN[q, n]))
        for q, n in found_Fx2
    ]
    return sorted(rows, key=lambda row: -row[2])


def render(report: dict) -> str:
    """A `table`, with the counts of `dev` added, for people; the chosen thresholds carry a star."""
    lines = [
        f"{report['queries']} queries with scored candidates: {report['labelled']} labelled, "
        f"{report['unlabelled']} unlabelled"
        + (
            f", {report['hidden']} of them relevant by the fuller labels"
            if "hidden" in report
            else ""
        )
    ]
    slope, offset = report["probability"].values()
    lowest, highest = report["range"]
    lines += [
        f"probability of relevance: sigmoid({slope:.3f} score {offset:+.3f}), from "
        f"{report['dev']['candidates']} dev candidates, of which {report['dev']['labelled']} are "
        f"labelled, as if {lists_lib.RELEVANT_SHARE:.0%} were",
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
    judged = "hidden" in report
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
