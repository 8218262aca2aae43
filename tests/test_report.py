"""The page of a run: its numbers against results.json, run files and brute force; what it lacks."""

import dataclasses
import html.parser
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from tiny_run import run_program

from rqv2_jax import config as config_lib
from rqv2_jax.ranking import trec
from rqv2_jax.recipe import compare, results
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.tools import report_data, report_figures, report_page, report_queries
from rqv2_jax.tools.report_data import Lack
from rqv2_jax.tools.report_queries import Found

VOID = ("meta", "link", "br", "img", "hr", "input")
HOSTILE = "<script>alert(1)</script> \"'&amp; </pre></svg>"


class Page(html.parser.HTMLParser):
    """The elements of a page: tags with their attributes, rows of tables and text, by section."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.rows, self.sections = [], [], [], {}
        self.section = ""
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
        elif tag == "tr":
            self.rows.append((self.section, []))
        elif tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.sections[self.section] = self.sections.get(self.section, "") + data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][1][-1] += data

    def table(self, section):
        """The rows of all tables of a section."""
        return [cells for name, cells in self.rows if name == section]


@pytest.fixture(scope="module")
def report(finished):
    return report_data.collect(open_workdir(finished[1]))


@pytest.fixture(scope="module")
def page(report):
    return report_page.page(report)


@pytest.fixture(scope="module")
def by_hand(finished):
    """Ranks and RR@10 of the relevant passage by system, read from the run files line by line."""
    config, workdir = finished
    qrels = compare.read_qrels(config_path(config) / "qrels" / "test.tsv")
    relevant = {query: passage for (query, passage), relevance in qrels.items() if relevance > 0}
    ranks = {}
    for path in (workdir / "runs").glob("test.*.trec"):
        ranked = trec.read_run(path)
        ranks[path.name.removeprefix("test.").removesuffix(".trec")] = {
            query: [passage for passage, _ in ranked[query]].index(passage) + 1
            if passage in dict(ranked[query])
            else 0
            for query, passage in relevant.items()
        }
    return ranks


def config_path(config):
    return pathlib.Path(config.data.path)


def test_the_numbers_on_the_page_are_those_of_results_json(finished, page):
    found = json.loads((finished[1] / "results.json").read_text())
    shown = {tuple(cells[:3]): cells[3:] for cells in Page(page).table("results")}
    for row in found["rows"]:
        cells = shown[row["state"], row["model"], row["index"]]
        assert re.fullmatch(r"\[\d\.\d{4}, \d\.\d{4}\]", cells.pop(1))
        assert cells == [f"{value:.4f}" for value in row["metrics"].values()]
    tests = {tuple(cells[:2]): cells[2:] for cells in Page(page).table("results")}
    for x in found["significance"]:
        difference, _, p_value, queries = tests[x["a"], x["b"]]
        assert difference == f"{x['difference']:+.4f}"
        assert (p_value, queries) == (f"{x['p_value']:.4f}", str(x["queries"]))
    for sentence in results.sentences(found["significance"]):
        assert sentence in Page(page).sections["verdict"]


def test_intervals_are_those_of_the_run_files(finished, page):
    """As `evaluate --compare` has them, which knows nothing of the workdir."""
    config, workdir = finished
    names = {"joint retriever": "joint.retriever.exact", "bm25": "bm25.bm25.bm25"}
    (row,), *_ = compare.compare(
        *(workdir / "runs" / f"test.{name}.trec" for name in names.values()),
        config_path(config) / "qrels" / "test.tsv",
        names=["RR@10"],
        min_relevance=1,
        permutations=config.evaluate.permutations,
        seed=config.seed,
    )
    (cells,) = (x for x in Page(page).table("results") if x[:2] == list(names))
    assert cells[2] == f"{row['difference']:+.4f}"
    assert cells[3] == f"[{row['low']:+.4f}, {row['high']:+.4f}]"
    assert cells[4] == f"{row['p_value']:.4f}"


def test_queries_won_and_lost_are_those_of_the_run_files(finished, report, by_hand):
    before, after = (by_hand[f"{s}.retriever.exact"] for s in ("zero_shot", "joint"))
    reranked = by_hand["joint.reranker.exact"]

    def value(rank):
        return 1 / rank if 0 < rank <= 10 else 0

    gains = {query: value(after[query]) - value(before[query]) for query in after}
    texts = {
        q["_id"]: q["text"]
        for q in map(json.loads, (config_path(finished[0]) / "queries.jsonl").open())
    }
    for part, sign in (("won", 1), ("lost", -1)):
        told = getattr(report.stories, part)
        expected = [q for q in sorted(gains, key=lambda q: -sign * gains[q]) if sign * gains[q] > 0]
        assert len(told) == len(expected)
        for story in told:
            (query,) = (q for q in expected if texts[q] == story.query)
            ranks = before[query], after[query], reranked[query]
            assert (story.before, story.after, story.reranked) == ranks
            assert set(story.query.split()) <= set(re.findall(r"\w+", story.relevant))
        order = [gains[next(q for q in expected if texts[q] == s.query)] * sign for s in told]
        assert order == sorted(order, reverse=True)
    counts = [sum(np.sign(g) == sign for g in gains.values()) for sign in (1, 0, -1)]
    assert list(report.stories.counts) == counts
    assert counts[0] + counts[2] > 0


def test_the_passage_ranked_first_is_that_of_the_worse_ranking(finished, report):
    runs = finished[1] / "runs"
    before, after = (
        trec.read_run(runs / f"test.{s}.retriever.exact.trec") for s in ("zero_shot", "joint")
    )
    data = config_path(finished[0])
    passages = {p["_id"]: p for p in map(json.loads, (data / "corpus.jsonl").open())}
    ids = {q["text"]: q["_id"] for q in map(json.loads, (data / "queries.jsonl").open())}
    for told, ranked in ((report.stories.won, before), (report.stories.lost, after)):
        for story in told:
            first = passages[ranked[ids[story.query]][0][0]]
            assert story.first == f"{first['title']}: {first['text']}"


def test_moves_and_counts_of_ranks_are_those_of_the_run_files(report, by_hand, page):
    systems = ["zero_shot.retriever.exact", "joint.retriever.exact", "joint.reranker.exact"]
    start, retriever, reranker = (list(by_hand[name].values()) for name in systems)
    rows = {cells[0]: cells[1:] for cells in Page(page).table("ranks")}
    for name, a, b in (
        ("start to joint retriever", start, retriever),
        ("joint retriever to re-ranker", retriever, reranker),
    ):
        pairs = [(x or 999, y or 999) for x, y in zip(a, b)]
        moves = [sum(y < x for x, y in pairs), sum(y == x for x, y in pairs)]
        moves.append(sum(y > x for x, y in pairs))
        assert rows[name][:3] == [str(count) for count in moves]
        assert rows[name][3] == f"{a.count(1)} to {b.count(1)}"
        assert rows[name][4] == " to ".join(str(sum(0 < r <= 10 for r in x)) for x in (a, b))
    for state, model, ranks in (("joint", "retriever", retriever), ("joint", "reranker", reranker)):
        assert sorted(report.records[0].measured.found[state, model].rank_Q) == sorted(ranks)


def test_ranks_are_counted_up_to_each_limit():
    counts = report_queries.ranks_counted(np.array([1, 1, 2, 3, 4, 10, 11, 100, 101, 0, 0, 0]))
    assert counts == [2, 2, 2, 2, 1, 3]


def test_agreement_is_the_mean_of_spearmans_correlations():
    """Of two queries: one in the opposite order, one with a tie and padding."""
    nan, relevant = np.nan, np.zeros((3, 4), bool)
    retriever, reranker = (
        Found(np.zeros(3), np.zeros(3), np.array(scores), relevant)
        for scores in (
            [[4.0, 3, 2, 1], [9, 5, 1, nan], [1, 1, 1, 1]],
            [[-7.0, -6, 0, 50], [2, 2, 1, nan], [4, 3, 2, 1]],
        )
    )
    # Ranks 3, 2, 1 and 2.5, 2.5, 1.
    rho = 1.5 / np.sqrt(2 * 1.5)
    assert report_queries.agreement(retriever, reranker) == pytest.approx((-1 + rho) / 2)


def test_the_page_needs_nothing_from_elsewhere(page):
    for tag, attributes in Page(page).elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert name != "src"
            assert not name.startswith("on")
            if name.endswith("href"):
                assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import|javascript:", page)
    assert len(page.encode()) < 1e6


def test_the_page_is_well_formed(page):
    elements = Page(page).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {v[1:] for _, a in elements for k, v in a.items() if k.endswith("href")}
    assert targets | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    figures = [attributes for tag, attributes in elements if tag == "svg"]
    assert len(figures) >= 10
    for attributes in figures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
    assert page.startswith("<!DOCTYPE html>\n<html lang=")


def test_texts_that_hold_markup_are_shown_and_inert(report):
    (record,) = report.records
    story = report_data.Story(HOSTILE, 1, 2, None, HOSTILE, HOSTILE)
    rejected = {"query": HOSTILE, "labelled": HOSTILE, "candidate": HOSTILE, "probability": 0.4}
    hostile = dataclasses.replace(
        report,
        records=[
            dataclasses.replace(
                record,
                workdir=HOSTILE,
                denoised=record.denoised._replace(text=HOSTILE, rejected=[rejected]),
                cuts=Lack(HOSTILE),
                environment={**record.environment, "command": HOSTILE, "machine": HOSTILE},
            )
        ],
        stories=report_data.Stories([story], [story], (1, 0, 1)),
    )
    shown = Page(report_page.page(hostile))
    assert "script" not in {tag for tag, _ in shown.elements}
    times = {"queries": 6, "denoising": 4, "tokens": 1, "environment": 2}
    assert {name: shown.sections[name].count(HOSTILE) for name in times} == times
    svg = report_figures._panel(HOSTILE, lambda axes: axes.set(title=HOSTILE))
    (element,) = (a for tag, a in Page(svg).elements if tag == "svg")
    assert element["aria-label"] == HOSTILE
    assert "<script" not in svg


def test_figures_of_long_runs_and_many_queries_stay_small(report):
    (record,), rng = report.records, np.random.default_rng(0)
    found = {
        key: Found(rng.integers(0, 300, 1000), np.zeros(1000), rng.normal(size=(1000, 50)), mask)
        for mask in [rng.random((1000, 50)) < 0.1]
        for key in record.measured.found
    }
    long = {"loss": [(step, rng.normal()) for step in range(100_000)]}
    large = dataclasses.replace(
        record,
        measured=dataclasses.replace(record.measured, found=found),
        curves={stage: {**curves, **long} for stage, curves in record.curves.items()},
    )
    two = dataclasses.replace(report, records=[large, large], differences=Lack("none"))
    assert len(report_page.page(two)) < 1e6


def test_a_run_that_stopped_says_what_is_missing(finished, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(finished[1], workdir)
    for name in ("reranker", "joint", "lists", "eval", "runs", "index"):
        shutil.rmtree(workdir / name)
    (workdir / "results.json").unlink()
    run = open_workdir(workdir)
    shown = Page(report_page.page(report_data.collect(run)))
    missing = "The run has not been evaluated; joint training: not begun."
    for section in ("verdict", "results", "scores", "agreement", "ranks", "queries"):
        assert missing in shown.sections[section]
    assert "retriever: finished, reranker: not begun" in shown.sections["verdict"]
    assert "Joint training has not begun" in shown.sections["denoising"]
    assert "retriever stage: loss" in shown.sections["training"]
    shutil.rmtree(workdir / "data")
    shown = Page(report_page.page(report_data.collect(run)))
    assert "holds no token store" in shown.sections["tokens"]


def test_another_evaluation_gives_no_intervals(finished, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(finished[1], workdir)
    path = workdir / "eval" / "test.per_query.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{name: values[::-1] * 0.5 for name, values in arrays.items()})
    shown = Page(report_page.page(report_data.collect(open_workdir(workdir))))
    assert "No intervals" in shown.sections["results"]
    assert "of another evaluation than results.json" in shown.sections["queries"]
    # As `rqv2_jax.evaluate` leaves them, which searches by one index.
    exact = {name: values for name, values in arrays.items() if ".scann." not in name}
    np.savez(path, **exact)
    shown = Page(report_page.page(report_data.collect(open_workdir(workdir))))
    intervals = {tuple(cells[1:3]): cells[4] for cells in shown.table("results")[1:]}
    assert intervals["retriever", "scann"] == ""
    assert intervals["retriever", "exact"].startswith("[")


@pytest.fixture(scope="module")
def untrained(finished, tmp_path_factory):
    """A workdir whose joint retriever is its start, and otherwise that of `finished`."""
    workdir = tmp_path_factory.mktemp("untrained") / "w"
    shutil.copytree(finished[1], workdir)
    folder = workdir / "eval"
    # Files of the stage whose checkpoint the joint retriever has.
    shutil.copy(folder / "test.zero_shot.exact.npz", folder / "test.joint.exact.npz")
    arrays = dict(np.load(folder / "test.per_query.npz"))
    report = json.loads((workdir / "results.json").read_text())
    rows = {(row["state"], row["model"], row["index"]): row for row in report["rows"]}
    start, joint = (rows[state, "retriever", "exact"] for state in ("zero_shot", "joint"))
    joint["metrics"] = start["metrics"]
    for name in start["metrics"]:
        name = f"retriever.exact.{name}"
        arrays[f"joint.{name}"] = arrays[f"zero_shot.{name}"]
    np.savez(folder / "test.per_query.npz", **arrays)
    (workdir / "results.json").write_text(json.dumps(report))
    return workdir


def test_two_runs_differ_as_one_differs_from_its_start(finished, report, untrained):
    both = report_data.collect(open_workdir(finished[1]), open_workdir(untrained))
    assert both.stories == report.stories
    expected = next(
        x
        for x in report.records[0].results["significance"]
        if (x["a"], x["b"]) == ("joint retriever", "zero_shot retriever")
    )
    mean, low, high, p_value, queries = both.differences["joint", "retriever", "exact"]
    assert (mean, p_value, queries) == tuple(
        expected[k] for k in ("difference", "p_value", "queries")
    )
    assert low < mean < high
    assert both.differences["bm25", "bm25", "bm25"] == (0, 0, 0, 1, queries)
    page = report_page.page(both)
    shown = Page(page)
    cells = ["joint", "retriever", "exact", f"{mean:+.4f}", f"[{low:+.4f}, {high:+.4f}]"]
    assert [*cells, f"{p_value:.4f}", str(queries)] in shown.table("verdict")
    assert f"A: {finished[1]}B: {untrained}" in shown.sections[""]
    for section in ("results", "tokens", "environment"):
        assert len([c for c in shown.table(section) if c]) == 2 * len(
            [c for c in Page(report_page.page(report)).table(section) if c]
        )
    assert {f"retriever RR@10 ({name})" in page for name in "AB"} == {True}


def test_runs_on_other_queries_are_not_compared(report):
    measured = report.records[0].measured
    moved = [frozenset({"p0"}) for _ in measured.labels]
    other = dataclasses.replace(measured, labels=moved)
    with pytest.raises(ValueError, match="no test query in common"):
        report_queries.differences(measured, other)
    other = dataclasses.replace(measured, ids=measured.ids[::-1], labels=measured.labels[::-1])
    a_C, b_C = report_queries.common(measured, other)
    np.testing.assert_array_equal(a_C, b_C[::-1])
    with pytest.raises(ValueError, match=r"by RR@10, the other by RR@5"):
        report_queries.differences(measured, dataclasses.replace(measured, metric="RR@5"))


def test_the_command_writes_the_page_of_two_workdirs(finished, untrained, tmp_path):
    to = tmp_path / "page.html"
    arguments = f"--workdir={finished[1]}", f"--against={untrained}", f"--to={to}"
    ended = run_program("rqv2_jax.report", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == str(to)
    assert "A less B" in Page(to.read_text()).sections["verdict"]


def test_main_writes_the_page_at_its_end(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    (tmp_path / "config.json").write_text(config_lib.dumps(config))
    (tmp_path / "config.py").write_text(
        "import pathlib\nfrom rqv2_jax import config\n\ndef get_config():\n"
        "    return config.loads(pathlib.Path(__file__).with_suffix('.json').read_text())\n"
    )
    arguments = f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'w'}"
    ended = run_program("rqv2_jax.main", *arguments)
    assert ended.returncode == 0, ended.stderr
    path = tmp_path / "w" / "report.html"
    assert ended.stdout.splitlines()[-1] == f"report:  {path}"
    shown = Page(path.read_text())
    assert "rqv2_jax.main --config=" in shown.sections["environment"]
    seconds = dict(json.loads((tmp_path / "w" / "took.json").read_text()))
    assert {"prepare", "retriever", "joint", "evaluate"} <= seconds.keys()
    times = {cells[0]: cells[1] for cells in shown.table("time")}
    assert times["all"] == f"{sum(seconds.values()):.1f}"
    assert times["joint"] == f"{seconds['joint']:.1f}"


def test_a_page_that_cannot_be_written_fails_no_run(finished, monkeypatch):
    monkeypatch.setattr(report_data, "collect", lambda *_: 1 / 0)
    line = report_page.write_at_end(finished[1])
    assert line.startswith("report:  not written (division by zero); python -m rqv2_jax.report")
