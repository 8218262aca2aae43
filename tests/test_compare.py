"""Comparing two run files: means by ir-measures, differences by hand, every qrels format."""

import ir_measures
import numpy as np
import pytest
from tiny_run import run_program

from rqv2_jax.errors import InputError
from rqv2_jax.recipe import compare

NAMES = ("RR@10", "Success@5", "R@1000", "nDCG@10")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two runs over 40 queries, one of which misses ten of them, and graded qrels in TREC format."""
    folder = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    labels = []
    for query in range(40):
        for passage in rng.choice(60, 3, replace=False):
            labels.append(f"q{query} 0 p{passage} {rng.integers(1, 4)}\n")
    (folder / "qrels").write_text("".join(labels))
    for name, queries in (("a", range(40)), ("b", range(10, 40))):
        rows = []
        for query in queries:
            scores = rng.permutation(60)
            ranked = enumerate(np.argsort(-scores)[:50], 1)
            rows += [f"q{query} Q0 p{p} {rank} {scores[p]} {name}\n" for rank, p in ranked]
        (folder / f"{name}.trec").write_text("".join(rows))
    return folder


def compared(folder, a="a.trec", b="b.trec", qrels="qrels", min_relevance=1):
    return compare.compare(
        folder / a,
        folder / b,
        folder / qrels,
        names=NAMES,
        min_relevance=min_relevance,
        permutations=500,
        seed=0,
    )


@pytest.mark.parametrize("least", [1, 2, 3])
def test_means_are_those_of_ir_measures(files, least):
    rows, queries, named = compared(files, min_relevance=least)
    assert queries == named[0] == 40
    # Run b misses a quarter.
    assert named[1] == 30
    said = f"(rel={least})" if least > 1 else ""
    names = [name.replace("@", f"{said}@") if name != "nDCG@10" else name for name in NAMES]
    assert [row["metric"] for row in rows] == names
    qrels = list(ir_measures.read_trec_qrels(str(files / "qrels")))
    for column in ("a", "b"):
        run = list(ir_measures.read_trec_run(str(files / f"{column}.trec")))
        expected = ir_measures.calc_aggregate(
            [ir_measures.parse_measure(n) for n in names], qrels, run
        )
        for row in rows:
            assert row[column] == pytest.approx(expected[ir_measures.parse_measure(row["metric"])])


def test_queries_that_find_themselves_first_are_measured_without(files, tmp_path, capsys):
    """As BM25 finds them in ArguAna, where each query is a passage."""
    plain = compared(files)
    for name in ("a.trec", "b.trec", "qrels"):
        (tmp_path / name).write_text((files / name).read_text())
    with (tmp_path / "b.trec").open("a") as file:
        file.writelines(f"q{n} Q0 q{n} 0 {1000 if n < 30 else -1} b\n" for n in range(10, 40))
    assert compared(tmp_path) == plain
    assert (
        "b.trec: 20 of 30 queries find themselves, as passages; these are"
        in capsys.readouterr().out
    )
    # Below the top a number may be the id of both.
    text = (tmp_path / "b.trec").read_text().replace(" 1000 b", " 57.5 b")
    (tmp_path / "b.trec").write_text(text)
    assert compared(tmp_path) != plain
    assert not capsys.readouterr().out


def test_differences_lie_in_their_intervals_and_change_sign(files):
    rows, *_ = compared(files)
    swapped, *_ = compared(files, "b.trec", "a.trec")
    for row, other in zip(rows, swapped):
        assert row["difference"] == pytest.approx(row["a"] - row["b"])
        assert row["low"] < row["difference"] < row["high"]
        assert other["difference"] == pytest.approx(-row["difference"])
    # Run b misses a quarter of the queries, which count as 0.
    by_name = {row["metric"]: row for row in rows}
    assert by_name["R@1000"]["p_value"] < 0.05
    assert by_name["R@1000"]["low"] > 0


def test_a_run_does_not_differ_from_itself(files):
    rows, *_ = compared(files, "a.trec", "a.trec")
    assert all((row["difference"], row["p_value"]) == (0, 1) for row in rows)


@pytest.mark.parametrize(
    ("line", "header"),
    [
        ("{q}\t0\t{p}\t1\n", ""),
        ("{q}\t{p}\t1\n", "query-id\tcorpus-id\tscore\n"),
        ("{q} {p} 1\n", ""),
        ("{q}\t{p}\n", ""),
    ],
    ids=["TREC", "BEIR", "BEIR without header", "RocketQA"],
)
def test_every_format_of_qrels(tmp_path, line, header):
    pairs = [("q1", "p1"), ("q1", "p2"), ("q2", "p1")]
    (tmp_path / "qrels").write_text(header + "".join(line.format(q=q, p=p) for q, p in pairs))
    assert compare.read_qrels(tmp_path / "qrels") == dict.fromkeys(pairs, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 0 p1 1\nq1 0 p1 1 x\n", "qrels:2: 5 columns"),
        ("q1 0 p1 1\n\nq1 0 p2 yes\n", "qrels:3: relevance 'yes' is no integer"),
        (
            "q1 0 p1 1\nq1 0 p1 2\n",
            "qrels:2: relevance 2 for query 'q1' and passage 'p1', but 1 on line 1",
        ),
        ("other 0 p1 1\n", "a.trec: holds no query of"),
    ],
)
def test_bad_qrels_are_one_line_with_the_place(files, tmp_path, text, message):
    (tmp_path / "qrels").write_text(text)
    with pytest.raises(InputError) as raised:
        compared(files, qrels=tmp_path / "qrels")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_program_prints_the_table_and_refuses_half_a_comparison(files):
    a, b = str(files / "a.trec"), str(files / "b.trec")
    flags = f"--qrels={files / 'qrels'}", "--min_relevance=2"
    ended = run_program("rqv2_jax.evaluate", "--compare", a, b, *flags)
    assert ended.returncode == 0, ended.stderr
    rows, *_ = compared(files, min_relevance=2)
    assert ended.stdout.splitlines()[:2] == [
        f"a: {a}",
        f"b: {b} (names 30 of the queries; the others count 0)",
    ]
    table = {line.split()[0]: line.split()[1:3] for line in ended.stdout.splitlines()[5:]}
    assert table["RR(rel=2)@10"] == [f"{rows[0]['a']:.4f}", f"{rows[0]['b']:.4f}"]
    assert table["nDCG@10"] == [f"{rows[-1]['a']:.4f}", f"{rows[-1]['b']:.4f}"]
    for arguments in ([a, f"--qrels={files / 'qrels'}"], [a, b], [a, b, "third"]):
        ended = run_program("rqv2_jax.evaluate", "--compare", *arguments)
        assert ended.returncode != 0
        assert ended.stderr.startswith("error: ")
        assert ended.stderr.count("\n") == 1
