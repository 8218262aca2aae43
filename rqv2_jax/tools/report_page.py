"""The page of a report, section by section: what was collected, in words, tables and figures."""

import pathlib
import shlex
from typing import Any

from rqv2_jax import artifacts, hosts
from rqv2_jax.errors import one_line
from rqv2_jax.recipe import results
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.recipe.run import Run
from rqv2_jax.tools import report_data, report_figures, report_queries
from rqv2_jax.tools import report_html as html
from rqv2_jax.tools.report_data import Cut, Denoised, Lack, Record, Report, Stories, Story
from rqv2_jax.tools.report_queries import TOP, Difference, Measured

WITHOUT_LABELS = "the test split has no labels, so no passage is known to be relevant"
LENGTHS = {"query_length": "queries", "passage_length": "passages", "pair_length": "pairs"}


def write(run: Run, against: Run | None, to: pathlib.Path | None) -> pathlib.Path:
    """Writes the page of a run, beside another if there is one; returns where.

    Without `to` that is report.html in the workdir or, of two runs, compared.html.
    """
    path = to or run.workdir / ("report.html" if against is None else "compared.html")
    artifacts.replace_text(path, page(report_data.collect(run, against)))
    return path


def write_at_end(workdir: pathlib.Path) -> str:
    """Writes the page of a run that has ended; returns a line on it, which says so if that failed."""
    command = f"python -m rqv2_jax.report --workdir {shlex.quote(str(workdir))}"
    if hosts.count() > 1:
        return f"report:  one host writes it by {command}"
    try:
        return f"report:  {write(open_workdir(workdir), None, None)}"
    except Exception as e:
        # The run has its results; whatever is wrong here, the command shows in full.
        return f"report:  not written ({one_line(e)}); {command} says more"


def page(report: Report) -> str:
    """Returns the page of a report."""
    sections = {
        "Verdict": _verdict,
        "Results": _results,
        "Training": _training,
        "Scores": _scores,
        "Agreement": _agreement,
        "Ranks": _ranks,
        "Queries won and lost": _stories,
        "Denoising": _denoising,
        "Tokens cut": _cuts,
        "Time": _seconds,
        "Environment": _environment,
    }
    ids = {name: name.split()[0].lower() for name in sections}
    nav = "".join(f'<a href="#{ids[name]}">{name}</a> ' for name in sections)
    names = [record.workdir for record in report.records]
    title = "Report of " + " against ".join(names)
    parts = [f"<nav>{nav}</nav>"]
    if len(names) > 1:
        parts.append(f'<p class="note">A: {html.text(names[0])}<br>B: {html.text(names[1])}</p>')
    for name, write in sections.items():
        kind = ' class="verdict"' if name == "Verdict" else ""
        parts.append(
            f'<section id="{ids[name]}"{kind}>\n<h2>{name}</h2>\n{write(report)}\n</section>'
        )
    return html.PAGE.substitute(title=html.text(title), body="\n".join(parts))


def _each(report: Report, write: Any) -> str:
    """Returns `write(record)` for each run, below its letter if there are two."""
    heads = [""] if len(report.records) == 1 else [f"<h3>{name}</h3>\n" for name in "AB"]
    return "\n".join(head + write(record) for head, record in zip(heads, report.records))


def _verdict(report: Report) -> str:
    def of_one(record: Record) -> str:
        if isinstance(record.results, Lack):
            stages = ", ".join(f"{name}: {state}" for name, state in record.stages.items())
            return html.lack(record.results.why) + html.paragraph(f"Stages: {stages}.", "lack")
        sentences = results.sentences(record.results["significance"])
        advice = [x for x in record.results["verdict"] if x.startswith("look at: ")]
        notes = [html.paragraph(f"L{line[1:]}.", "note") for line in advice]
        return "\n".join([*(html.paragraph(each) for each in sentences), *notes])

    parts = [_each(report, of_one)]
    if len(report.records) == 2:
        parts.append("<h3>A less B</h3>")
        parts.append(_differences(report))
    return "\n".join(parts)


def _differences(report: Report) -> str:
    if isinstance(report.differences, Lack):
        return html.lack(report.differences.why)
    measured = report.records[0].measured
    metric = measured.metric if isinstance(measured, Measured) else ""
    head = ("state", "model", "index", f"{metric}, A - B", "95% interval", "p", "queries")
    rows = [[*key, *_difference(difference)] for key, difference in report.differences.items()]
    return html.table(head, rows, words=3) + html.paragraph(
        "On the test queries that both runs have.", "note"
    )


def _difference(found: Difference) -> list[str]:
    mean, low, high, p_value, queries = found
    return [f"{mean:+.4f}", f"[{low:+.4f}, {high:+.4f}]", f"{p_value:.4f}", str(queries)]


def _results(report: Report) -> str:
    return _each(report, _results_of)


def _results_of(record: Record) -> str:
    found = record.results
    if isinstance(found, Lack):
        return html.lack(found.why)
    rows, measured = found["rows"], record.measured
    floors = sum(row["state"] in ("bm25", "released") for row in rows)
    names, metric = list(rows[0]["metrics"]), next(iter(rows[0]["metrics"]))
    keys = [(row["state"], row["model"], row["index"]) for row in rows]
    values = measured.values if isinstance(measured, Measured) else {}
    head = ["state", "model", "index", metric, "95% interval", *names[1:]]
    cells = []
    for key, row in zip(keys, rows):
        first, *others = (f"{value:.4f}" for value in row["metrics"].values())
        interval = ""
        if isinstance(measured, Measured) and key in values:
            interval = "[{:.4f}, {:.4f}]".format(*measured.interval(key))
        cells.append([*key, first, interval, *others])
    tested = {results.name(*key): key for key in reversed(keys)}
    head_tests = ["a", "b", f"{metric}, a - b", "95% interval", "p", "queries"]
    tests = []
    for x in found["significance"]:
        a, b = tested[x["a"]], tested[x["b"]]
        interval = ""
        if isinstance(measured, Measured) and a in values and b in values:
            interval = _difference(measured.difference(a, b))[1]
        told = f"{x['difference']:+.4f}", interval, f"{x['p_value']:.4f}", x["queries"]
        tests.append([x["a"], x["b"], *told])
    counted = f"{rows[0]['queries']} {rows[0]['split']} queries; floors are shaded."
    parts = [html.table(head, cells, words=3, floors=floors), html.paragraph(counted, "note")]
    every = [(key, row["all_queries"]) for key, row in zip(keys, rows) if "all_queries" in row]
    if every:
        more = [[*k, *(f"{row['metrics'][name]:.4f}" for name in names)] for k, row in every]
        parts.append(html.paragraph(f"The same over all {every[0][1]['queries']} queries:"))
        parts.append(html.table(["state", "model", "index", *names], more, words=3, floors=floors))
    parts.append(html.table(head_tests, tests, words=2))
    if isinstance(measured, Lack):
        parts.append(html.paragraph(f"No intervals: {measured.why}.", "lack"))
    return "\n".join(parts)


def _training(report: Report) -> str:
    drawn = report_figures.curves(report.records)
    if not drawn:
        return html.lack("the workdir has no TensorBoard events of any stage")
    note = ""
    if len(report.records) == 2:
        note = html.paragraph("A is drawn solid, B dashed.", "note")
    return note + html.figures(drawn)


def _measured(report: Report) -> str:
    """Returns lines on the runs whose test queries are not known."""
    return "".join(
        html.lack(record.measured.why)
        if isinstance(record.measured, Lack)
        else html.lack(WITHOUT_LABELS)
        for record in report.records
        if isinstance(record.measured, Lack) or not record.measured.found
    )


def _known(report: Report) -> list[Record]:
    return [x for x in report.records if isinstance(x.measured, Measured) and x.measured.found]


def _scores(report: Report) -> str:
    note = (
        "Scores of the passages that the re-ranker reads: the first that each state's retriever finds. "
        "Before is the model that a run starts from or, for the re-ranker, its warm-up; after is joint "
        "training."
    )
    if not _known(report):
        return _measured(report)
    drawn = report_figures.scores(report.records)
    return _measured(report) + html.paragraph(note, "note") + html.figures(drawn)


def _agreement(report: Report) -> str:
    note = (
        "Each point is a candidate of a test query. Rho is Spearman's correlation of both models' "
        "scores of one query's candidates, the mean over queries."
    )
    if not _known(report):
        return _measured(report)
    drawn = report_figures.agreement(report.records, report_queries.agreement)
    return _measured(report) + html.paragraph(note, "note") + html.figures(drawn)


def _ranks(report: Report) -> str:
    if not _known(report):
        return _measured(report)
    drawn = report_figures.ranks(report.records)
    return _measured(report) + html.figures(drawn) + _each(report, _moves)


def _moves(record: Record) -> str:
    if isinstance(record.measured, Lack) or not record.measured.found:
        return ""
    found = record.measured.found
    pairs = {
        "start to joint retriever": (found["zero_shot", "retriever"], found["joint", "retriever"]),
        "joint retriever to re-ranker": (found["joint", "retriever"], found["joint", "reranker"]),
    }
    rows = []
    for name, pair in pairs.items():
        moved = report_queries.moved(*pair)
        steps = (f"{a} to {b}" for a, b in (moved.first, moved.top))
        rows.append([name, moved.up, moved.same, moved.down, *steps, moved.queries])
    head = ["", "up", "same", "down", "at rank 1", f"in the first {TOP}", "queries"]
    return html.table(head, rows, words=1)


def _stories(report: Report) -> str:
    stories = report.stories
    if isinstance(stories, Lack):
        return html.lack(stories.why)
    against = "B's" if len(report.records) == 2 else "the model it starts from"
    whose = "A's joint retriever" if len(report.records) == 2 else "The joint retriever"
    won, same, lost = stories.counts
    metric = report.records[0].measured
    by = metric.metric if isinstance(metric, Measured) else ""
    line = f"{whose} against {against}, by {by}: {won} queries won, {same} equal, {lost} lost."
    return "\n".join([html.paragraph(line), _told(stories, "won"), _told(stories, "lost")])


def _told(stories: Stories, part: str) -> str:
    told = stories.won if part == "won" else stories.lost
    shown = "\n".join(_story(story, part) for story in told)
    return f"<h3>{part.title()}, the largest differences first: {len(told)}</h3>\n{shown}"


def _story(story: Story, part: str) -> str:
    before, after = ("none" if rank == 0 else rank for rank in (story.before, story.after))
    ranks = f"{before} to {after}"
    if story.reranked is not None:
        ranks += f", re-ranked {story.reranked or 'none'}"
    lines = [
        ("Rank of the relevant passage", ranks),
        ("Relevant", story.relevant),
        (f"Ranked first {'before' if part == 'won' else 'now'}", story.first or "nothing"),
    ]
    return html.story(lines, story.query, part)


def _denoising(report: Report) -> str:
    return _each(report, lambda record: _denoised(record.denoised))


def _denoised(found: Denoised | Lack) -> str:
    if isinstance(found, Lack):
        return html.lack(found.why)
    counts, chosen = found.counts, found.counts["chosen"]
    below, above = chosen["negative_below"], chosen["positive_above"]
    negatives = next(row for row in counts["negatives"] if row["below"] == below)
    positives = next(row for row in counts["positives"] if row["above"] == above)
    line = (
        f"Of {counts['unlabelled']} unlabelled candidates of {counts['queries']} queries, "
        f"{negatives['kept']} are kept as negatives, because the warm re-ranker gives them a "
        f"probability of relevance below {below:g}; {negatives['dropped']} are dropped, as they are "
        f"not; {positives['kept']} of these, above {above:g}, are positives."
    )
    dropped = "\n".join(
        html.story(
            [
                (f"Dropped, probability {x['probability']:.3f}", x["candidate"]),
                ("Labelled", x["labelled"]),
            ],
            x["query"],
        )
        for x in found.rejected
    )
    text = html.text(found.text)
    more = f"<details><summary>Counts by threshold</summary><pre>{text}</pre></details>"
    head = f"<h3>{len(found.rejected)} of those dropped</h3>" if found.rejected else ""
    return "\n".join([html.paragraph(line), more, head, dropped])


def _cuts(report: Report) -> str:
    def of_one(record: Record) -> str:
        if isinstance(record.cuts, Lack):
            return html.lack(record.cuts.why)
        head = ["in", "what", "length", "tokens cut off", "texts cut"]
        return html.table(head, [_cut(cut) for cut in record.cuts], words=2)

    return _each(report, of_one)


def _cut(cut: Cut) -> list[str]:
    shares = f"{cut.tokens:.1%}", f"{cut.texts:.1%}"
    return [cut.use, LENGTHS[cut.setting], str(cut.length), *shares]


def _seconds(report: Report) -> str:
    def of_one(record: Record) -> str:
        if isinstance(record.seconds, Lack):
            return html.lack(record.seconds.why)
        rows = [[name, f"{seconds:.1f}"] for name, seconds in record.seconds.items()]
        rows.append(["all", f"{sum(record.seconds.values()):.1f}"])
        return html.table(["stage", "seconds"], rows, words=1)

    return _each(report, of_one)


def _environment(report: Report) -> str:
    def of_one(record: Record) -> str:
        found = record.environment
        if isinstance(found, Lack):
            return html.lack(found.why)
        rows = [["commit", found["commit"]], ["Python", found["python"]]]
        rows += [[name, version] for name, version in found["packages"].items()]
        rows += [["machine", found["machine"]], ["devices", ", ".join(found["devices"])]]
        made = html.lack("the command is not recorded, as by earlier versions")
        if "command" in found:
            made = f"<p>Made by</p><pre>{html.text(found['command'])}</pre>"
        return made + html.table(["", ""], rows, words=2)

    return _each(report, of_one)
