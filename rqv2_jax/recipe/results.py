"""Results in words: the table for people, the verdict, and which settings to look at.

Shape suffixes: N passages or pairs of a sample.
"""

import dataclasses
import textwrap

import numpy as np

from rqv2_jax.data import tokens
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.recipe.run import Run
from rqv2_jax.training.checkpoint import best_step

P_VALUE = 0.05
# Names of models in the words of a sentence: of whom it tells, and whom it compares with.
SUBJECTS = {
    "joint retriever": "The joint retriever",
    "joint reranker": "The joint re-ranker",
    "joint reranker on bm25": "The joint re-ranker of BM25's candidates",
}
OTHERS = {
    "released retriever": "the model as released",
    "bm25": "BM25",
    "zero_shot retriever": "the model it starts from",
    "retriever retriever": "its warm-up",
    "joint retriever": "its retriever",
    "reranker reranker": "its warm-up",
}
WIDTH = 100
# Share of a corpus's tokens or of all queries; less is not worth a word.
NOTABLE = 0.01


def name(state: str, model: str, index: str) -> str:
    """Returns what a row of the table is called: `joint reranker on bm25`, for example."""
    if model == "bm25":
        return "bm25"
    return f"{state} {model} on bm25" if index == "bm25" else f"{state} {model}"


def told(test: dict) -> str:
    """Returns how a significance test tells its `a` from its `b`: "better than" and so on."""
    if test["p_value"] >= P_VALUE:
        return "not told apart from"
    return "better than" if test["difference"] > 0 else "worse than"


def verdict(tests: list[dict]) -> list[str]:
    """Returns a sentence for each significance test."""
    return [
        f"{x['a']} is {told(x)} {x['b']}: {x['metric']} {x['difference']:+.4f} "
        f"(p = {x['p_value']:.4f}, {x['queries']} queries)"
        for x in tests
    ]


def sentences(tests: list[dict]) -> list[str]:
    """Returns a sentence for each joint model: what it is better than and by how much."""
    said = []
    for a, subject in SUBJECTS.items():
        told_of = [x for b in OTHERS for x in tests if (x["a"], x["b"]) == (a, b)]
        clauses = [
            # With spaces at which no line breaks.
            f"{told(x)} {OTHERS[x['b']]} ({x['difference']:+.4f}, p\xa0=\xa0{x['p_value']:.4f})"
            for x in told_of
        ]
        if clauses:
            every = " and ".join(filter(None, (", ".join(clauses[:-1]), clauses[-1])))
            queries = f"{told_of[0]['metric']} on {told_of[0]['queries']} queries"
            said.append(f"{subject} is {every}, by {queries}.")
    return said


def advice(run: Run, store: tokens.Store, worse: set, reachable: dict[str, float]) -> list[str]:
    """Returns facts of a run that may be why its models are worse than what they should beat.

    `worse` has their (state, model, index); `reachable`, by index, the share of queries with a relevant
    passage among the re-ranked ones.
    """
    models = {model for _, model, _ in worse}
    lines = _truncation(run, store, models)
    # On another collection than a run's own, more training is no remedy.
    lines += _training(run, store, worse) if "train" in store.splits else []
    for index in sorted({index for _, model, index in worse if model == "reranker"}):
        if reachable[index] < 1 - NOTABLE:
            lines.append(
                f"the {run.config.evaluate.rerank_depth} passages of {index} that are re-ranked "
                f"(config.evaluate.rerank_depth) hold a relevant one for {reachable[index]:.1%} of the "
                "queries, so the re-ranker cannot find more"
            )
    return [f"look at: {line}" for line in lines]


def cut_by(inputs: Inputs, store: tokens.Store) -> dict[str, float]:
    """Returns the share of all tokens that each length of `config.data` cuts off, from a sample.

    Special tokens count.
    """
    return {
        setting: 1 - float(read_N.sum() / whole_N.sum())
        for setting, (read_N, whole_N) in lengths_by(inputs, store).items()
    }


def lengths_by(inputs: Inputs, store: tokens.Store) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns how long texts of a sample are as they are read, and uncut [N], by length of config.data.

    Pairs are of any test query with any passage.
    """
    asked, rows_N = store.splits["test"].texts, store.sample()
    any_N = np.resize(np.arange(len(asked)), len(rows_N))
    measures = {
        "query_length": lambda inputs: inputs.query_lengths(asked, np.arange(len(asked))),
        "passage_length": lambda inputs: inputs.passage_lengths(store, rows_N),
        "pair_length": lambda inputs: inputs.pair_lengths(store, asked, any_N, rows_N),
    }
    full = dataclasses.replace(inputs, query_length=2**30, passage_length=2**30, pair_length=2**30)
    return {setting: (lengths(inputs), lengths(full)) for setting, lengths in measures.items()}


def _truncation(run: Run, store: tokens.Store, models: set[str]) -> list[str]:
    """Says which lengths cut off a notable share of what the models read."""
    read_by = {
        "query_length": ("queries", models & {"retriever"}),
        "passage_length": ("passages", models & {"retriever"}),
        "pair_length": ("pairs", models & {"reranker"}),
    }
    lines = []
    for setting, share in cut_by(run.inputs, store).items():
        texts, readers = read_by[setting]
        if readers and share >= NOTABLE:
            value = run.config.data[setting]
            lines.append(
                f"config.data.{setting} = {value} cuts off {share:.1%} of the {texts}' tokens"
            )
    return lines


def _training(run: Run, store: tokens.Store, worse: set) -> list[str]:
    """Says how few lists the kept checkpoints have seen."""
    labelled = len(np.unique(store.splits["train"].positives()[0]))
    lines = []
    trained = ((run.trained_by(state=s, model=m), m) for s, m, _ in sorted(worse))
    for stage, model in dict.fromkeys(trained):
        if stage == "zero_shot":
            continue
        step = best_step(run.workdir / stage, model)
        lists = step * run.config[stage].batch
        if step == 0:
            lines.append(
                f"stage {stage} kept the {model} it started from, as dev found later steps worse; "
                f"lower config.{stage}.learning_rate, or train longer (config.{stage}.epochs)"
            )
        elif lists < labelled:
            raised = f"config.{stage}.epochs or config.mine.queries"
            lines.append(
                f"the kept {model} of stage {stage} has seen {lists} lists, and there are {labelled} "
                f"training queries; raise {'config.budget' if run.config.budget else raised}"
            )
    return lines


def render(report: dict) -> str:
    """Returns the report as a table for people, at most `WIDTH` columns wide where names allow."""
    rows = report["rows"]
    lines = _table(rows)
    every = [{**row, **row["all_queries"]} for row in rows if "all_queries" in row]
    more = f", a sample of {every[0]['queries']}" if every else ""
    counted = f"{rows[0]['queries']} {rows[0]['split']} queries{more}"
    for row in rows:
        if row.get("queries_named", row["queries"]) < row["queries"]:
            counted += f", {row['queries_named']} of them with candidates (the others count 0)"
    lines.append(f"{counted}; passages {'with' if report['titles'] else 'without'} titles")
    if every:
        lines += ["", f"the same over all {every[0]['queries']} queries:", *_table(every)]
    for row in rows:
        recalls = [f"{k} {v:.3f}" for k, v in row.items() if k.startswith("recall@")]
        if recalls:
            lines.append(f"{row['state']} {row['index']}: {', '.join(recalls)}")
    lines += [
        f"{s['metric']}: {s['a']} - {s['b']} = {s['difference']:+.4f} (p = {s['p_value']:.4f})"
        for s in report["significance"]
    ]
    if report["verdict"]:
        wrapped = (textwrap.fill(x, WIDTH, subsequent_indent="  ") for x in report["verdict"])
        lines += ["", *wrapped]
    return "\n".join(lines)


def _table(rows: list[dict]) -> list[str]:
    """Returns head and rows, once more for the metrics that do not fit into the width."""
    columns = {column: [row[column] for row in rows] for column in ("state", "model", "index")}
    widths = {column: max(map(len, (column, *cells))) for column, cells in columns.items()}
    first = sum(widths.values()) + len(widths) - 1
    parts, left = [list[str]()], WIDTH - first
    for metric in rows[0]["metrics"]:
        width = 1 + max(6, len(metric))
        if parts[-1] and width > left:
            parts.append([])
            left = WIDTH - first
        parts[-1].append(metric)
        left -= width
    lines = []
    for part in parts:
        head = [f"{column:{width}}" for column, width in widths.items()]
        lines.append(" ".join([*head, *(f"{metric:>6}" for metric in part)]))
        lines.append("-" * len(lines[-1]))
        for row in rows:
            cells = [f"{row[column]:{width}}" for column, width in widths.items()]
            cells += [f"{row['metrics'][m]:{max(6, len(m))}.4f}" for m in part]
            lines.append(" ".join(cells))
    return lines
