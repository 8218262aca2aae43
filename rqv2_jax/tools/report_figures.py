"""Figures of a report as SVG that stands inside a page: small, and in the page's own colours."""

import html
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rqv2_jax.tools.report_data import Lack, Record
from rqv2_jax.tools.report_queries import RANKS, Found, Measured, ranks_counted

# What is drawn in this colour takes that of the page's text, which is light where the page is dark.
INK = "#010203"
BLUE, ORANGE, GREEN, PURPLE = "#3a86c8", "#e08214", "#3f9b58", "#9a6bc9"
COLOURS = {"retriever": BLUE, "reranker": ORANGE}
# Points of a scatter, relevant candidates and others, and of a curve, at most.
POINTS, CURVE = {True: 300, False: 600}, 400
# Of a histogram, fewer where few candidates are relevant.
BINS = (8, 30)
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "svg.fonttype": "none",
    "svg.hashsalt": "rqv2_jax",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.framealpha": 0,
    "lines.linewidth": 1.5,
}
LINES = ("-", "--")


def _panel(alt: str, draw: Any, size: tuple[float, float] = (4.2, 3.3)) -> str:
    """Returns what `draw(axes)` draws as an SVG element; `alt` says in words what it shows."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.grid(alpha=0.25, color=INK, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            # Outside, where it covers no point.
            figure.legend(loc="outside lower center", ncols=2)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue(), alt)


def _inline(svg: str, alt: str) -> str:
    """Makes an SVG file an element of a page: no width of its own, ids that no other figure has."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', body))
    names = {name for pair in used for name in pair if name}
    prefix = f"f{zlib.crc32(svg.encode()):08x}"

    def rename(match: re.Match) -> str:
        return f' id="{prefix}{match[1]}"' if match[1] in names else ""

    body = re.sub(r' id="([^"]*)"', rename, body)
    body = body.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    body = re.sub(r"\s*\n\s*", "\n", body)
    label = html.escape(alt)
    return f'<svg {box[0] if box else ""} role="img" aria-label="{label}">{body.strip()}'


def _named(records: Sequence[Record]) -> Iterator[tuple[Record, str, str]]:
    """Yields each record, the words that tell it from the other, and its kind of line."""
    for record, name, line in zip(records, "AB", LINES):
        yield record, f" ({name})" if len(records) > 1 else "", line


def _in_words(model: str) -> str:
    return model.replace("reranker", "re-ranker")


def curves(records: Sequence[Record]) -> list[str]:
    """Draws dev scores, entropies and loss terms of each stage over its steps, a panel for each."""
    panels = []
    for stage in records[0].curves:
        names = list(dict.fromkeys(name for record in records for name in record.curves[stage]))
        kinds: dict[str, list[str]] = {
            "score on dev": [name for name in names if name.startswith("dev/")],
            "loss": [x for x in ("loss", "kl", "supervised", "in_batch") if x in names],
            "entropy over a list, nats": [name for name in names if name.endswith("_entropy")],
        }
        for kind, shown in kinds.items():
            if shown:
                panels.append(_curve_panel(records, stage, kind, shown))
    return panels


def _curve_panel(records: Sequence[Record], stage: str, kind: str, names: list[str]) -> str:
    title = f"{_in_words(stage)} stage: {kind}"

    def draw(axes: Any) -> None:
        palette = dict(zip(names, (BLUE, ORANGE, GREEN, PURPLE)))
        for name in names:
            model = name.removeprefix("dev/").split(" ")[0].removesuffix("_entropy")
            label = _in_words(name.removeprefix("dev/").removesuffix("_entropy").replace("_", " "))
            for record, run, line in _named(records):
                points = _thinned(record.curves[stage].get(name, []))
                if points:
                    colour = COLOURS.get(model, palette[name])
                    marker = "." if kind.startswith("score") or len(points) < 2 else ""
                    axes.plot(
                        *zip(*points), line, color=colour, marker=marker, label=f"{label}{run}"
                    )
        axes.set(title=title, xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if kind.startswith("entropy"):
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])

    last = "; ".join(
        f"{_in_words(name)}{run} from {points[0][1]:.3f} to {points[-1][1]:.3f}"
        for name in names
        for record, run, _ in _named(records)
        if (points := record.curves[stage].get(name))
    )
    return _panel(f"{title}: {last}", draw)


def _thinned(points: list) -> list:
    """Returns CURVE points at most, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(points) - 1, min(len(points), CURVE))
    return [points[int(place)] for place in places]


def scores(records: Sequence[Record]) -> list[str]:
    """Draws the scores of relevant and other candidates before and after, a panel for each model."""
    return [
        _score_panel(record.measured, model, before, run)
        for record, run, _ in _named(records)
        if not isinstance(record.measured, Lack) and record.measured.found
        for model, before in (("retriever", "zero_shot"), ("reranker", "reranker"))
    ]


def _score_panel(measured: Measured, model: str, before: str, run: str) -> str:
    title = f"scores of the {_in_words(model)}{run}"
    states = {"before": measured.found[before, model], "after": measured.found["joint", model]}

    def draw(axes: Any) -> None:
        every = np.concatenate([found.scores_RxD.ravel() for found in states.values()])
        relevant = sum(int(found.relevant_RxD.sum()) for found in states.values())
        bins = int(np.clip(2 * relevant**0.5, *BINS))
        low, high = np.nanpercentile(every, (0.2, 99.8))
        edges = np.linspace(low, high, bins + 1)
        for when, found in states.items():
            for relevant, colour in ((True, GREEN), (False, PURPLE)):
                chosen = found.scores_RxD[found.relevant_RxD == relevant]
                counts, _ = np.histogram(chosen, edges)
                axes.stairs(
                    counts / max(counts.sum(), 1),
                    edges,
                    color=colour,
                    linestyle=":" if when == "before" else "-",
                    linewidth=1.5,
                    label=f"{'relevant' if relevant else 'other'}, {when}",
                )
        axes.set(title=title, xlabel="score of a candidate", ylabel="share")

    means = ", ".join(
        f"{when} {np.nanmean(found.scores_RxD[found.relevant_RxD]):.3g} and "
        f"{np.nanmean(found.scores_RxD[~found.relevant_RxD]):.3g}"
        for when, found in states.items()
        if found.relevant_RxD.any() and not found.relevant_RxD.all()
    )
    return _panel(f"{title}: means of relevant and other candidates: {means}", draw)


def agreement(records: Sequence[Record], rho: Any) -> list[str]:
    """Draws the re-ranker's score of each candidate against the retriever's, before and after.

    `rho(retriever, reranker)` is the correlation that stands in the title.
    """
    panels = []
    for record, run, _ in _named(records):
        if isinstance(record.measured, Lack) or not record.measured.found:
            continue
        for state, when in (("reranker", "before"), ("joint", "after")):
            pair = [record.measured.found[state, model] for model in ("retriever", "reranker")]
            title = f"{when} joint training{run}: mean rho {rho(*pair):.3f}"
            panels.append(_scatter(title, *pair))
    return panels


def _scatter(title: str, retriever: Found, reranker: Found) -> str:
    def draw(axes: Any) -> None:
        rng, relevant_RxD = np.random.default_rng(0), retriever.relevant_RxD
        both_RxD = ~np.isnan(retriever.scores_RxD) & ~np.isnan(reranker.scores_RxD)
        for relevant, colour, label in ((False, PURPLE, "other"), (True, GREEN, "relevant")):
            places = np.argwhere(both_RxD & (relevant_RxD == relevant))
            places = rng.permutation(places)[: POINTS[relevant]]
            x, y = (each.scores_RxD[tuple(places.T)] for each in (retriever, reranker))
            size = 6 if relevant else 3
            axes.plot(x, y, ".", color=colour, markersize=size, alpha=0.7, label=label)
        axes.set(title=title, xlabel="retriever's score", ylabel="re-ranker's score")

    return _panel(f"scatter of both models' scores of candidates, {title}", draw)


def ranks(records: Sequence[Record]) -> list[str]:
    """Draws where the first relevant passage of the re-ranked queries stands, a panel for each run."""
    return [
        _rank_panel(record.measured, run)
        for record, run, _ in _named(records)
        if not isinstance(record.measured, Lack) and record.measured.found
    ]


def _rank_panel(measured: Measured, run: str) -> str:
    ranked_Q = measured.found["joint", "reranker"].rank_Q >= 0
    bars = {
        "start": (measured.found["zero_shot", "retriever"], "#888888"),
        "joint retriever": (measured.found["joint", "retriever"], BLUE),
        "joint re-ranker": (measured.found["joint", "reranker"], ORANGE),
    }
    counts = {name: ranks_counted(found.rank_Q[ranked_Q]) for name, (found, _) in bars.items()}
    lows = [1, *(rank + 1 for rank in RANKS)]
    labels = [f"{a}-{b}" if a < b else str(a) for a, b in zip(lows, RANKS)]
    labels += [f"{lows[-1]}+", "none"]
    title = f"rank of the first relevant passage{run}"

    def draw(axes: Any) -> None:
        places = np.arange(len(labels))
        for number, (name, (_, colour)) in enumerate(bars.items()):
            axes.bar(places + 0.27 * (number - 1), counts[name], 0.25, color=colour, label=name)
        axes.set(title=title, ylabel="queries")
        axes.set_xticks(places, labels)

    words = "; ".join(f"{n} {dict(zip(labels, c))}" for n, c in counts.items())
    return _panel(f"{title}: {words}", draw)
