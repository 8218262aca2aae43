"""The ablations: what each row changes, their training from one warm start, and their table.

Shape suffixes: S seeds, Q queries.
"""

import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from rqv2_jax import artifacts, config_check
from rqv2_jax import config as config_lib
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError, readable
from rqv2_jax.ranking import significance
from rqv2_jax.recipe import budget, evaluation, mining, pipeline
from rqv2_jax.recipe.claim import claim
from rqv2_jax.recipe.run import Run, open_run
from rqv2_jax.recipe.workdir import alone, branch, replace_stage
from rqv2_jax.training import checkpoint

# What the table compares, as (model, candidates, metric): a re-ranker ranks what its own retriever
# finds, and what the warm start's finds, where any gain is the re-ranker's own.
WARM = "warm_start"
MEASURES = (
    ("retriever", "exact", "RR@10"),
    ("retriever", "exact", "Success@50"),
    ("reranker", "exact", "RR@10"),
    ("reranker", WARM, "RR@10"),
)
# By a teacher that has trained on the labels of the same lists beforehand, as in `full`, and so has
# seen as many labelled lists as a dynamic one.
AS_TAUGHT = "static distillation of equal supervision"
# Half-way through joint training: the number of steps is known once the lists are.
REFRESHED = "half of the steps"


def rows(config: ConfigDict, sizes: Sequence[int] | None = None) -> dict[str, dict]:
    """Returns what each row changes of `config`, by dotted key, without rows that change nothing.

    `sizes` are those of lists; half and twice that of `full` if there are none.
    """
    joint = config.joint
    through, warmer = not joint.loss.teacher_gradient, 2 * joint.loss.temperature
    changes: dict[str, dict[str, Any]] = {
        "static distillation": {"joint.train_reranker": False},
        AS_TAUGHT: {"joint.train_reranker": False},
        "pointwise re-ranker": {"joint.loss.reranker_loss": "pointwise"},
        "without denoised lists": {"joint.denoised_share": 0.0},
        **{
            f"preset {name}": {f"joint.loss.{key}": value for key, value in loss.items()}
            for name, loss in config_lib.LOSSES.items()
        },
        f"teacher gradient {'on' if through else 'off'}": {"joint.loss.teacher_gradient": through},
        f"temperature {warmer:g}": {"joint.loss.temperature": warmer},
        "one learning rate": {"joint.reranker_rate": 1.0},
        f"{'without ' if joint.in_batch_weight else ''}in-batch negatives": {
            "joint.in_batch_weight": 0.0 if joint.in_batch_weight else 1.0
        },
        # What the labels alone would gain, without a teacher.
        "in-batch negatives alone": {"joint.in_batch_weight": 1.0, "joint.kl_weight": 0.0},
        "refreshed candidates": {"joint.refresh_every": REFRESHED},
    }
    around = (size for size in (joint.list_size // 2, joint.list_size * 2) if size >= 2)
    for size in around if sizes is None else sizes:
        changes[f"list size {size}"] = {"joint.list_size": size}
    if config.reranker.epochs == 0:
        # It has no warm-up whose place the teacher's training could take.
        del changes[AS_TAUGHT]
    return {"full": {}} | {
        name: change
        for name, change in changes.items()
        if config_lib.differences(_changed(config, change), config)
    }


def _changed(config: ConfigDict, change: dict, steps: int = 1) -> ConfigDict:
    """Returns a copy of `config` with a row's change; `steps` are those between new candidates."""
    changed = config_lib.loads(config_lib.dumps(config))
    values = {key: steps if value == REFRESHED else value for key, value in change.items()}
    changed.update_from_flattened_dict(values)
    return changed


def _chosen(
    config: ConfigDict, only: list[str] | None, sizes: Sequence[int] | None
) -> dict[str, dict]:
    """Returns the changes of the rows that are run, once all of them are known to be usable."""
    changes = rows(config, sizes)
    unknown = set(only or ()) - set(changes)
    if unknown:
        raise InputError(f"--rows: no row {sorted(unknown)[0]!r}; choose of {', '.join(changes)}")
    missing = {metric for *_, metric in MEASURES} - set(config.evaluate.metrics)
    if missing:
        raise InputError(f"config.evaluate.metrics: the table needs {sorted(missing)[0]}; add it")
    if config.joint.lists:
        raise InputError("config.joint.lists: rows draw their own lists; leave it empty")
    if config.evaluate.min_relevance > 1:
        raise InputError(
            "config.evaluate.min_relevance: the table counts relevance 1; leave it at 1"
        )
    changes = {n: change for n, change in changes.items() if only is None or n in ("full", *only)}
    for name, change in changes.items():
        try:
            config_check.check(_changed(config, change))
        except InputError as e:
            raise InputError(f"row {name!r}: {e}; or leave it out by --rows") from e
    return changes


def run_all(
    config: ConfigDict,
    workdir: pathlib.Path,
    seeds: int,
    only: list[str] | None = None,
    sizes: Sequence[int] | None = None,
) -> Iterator[list[dict]]:
    """Runs the warm start, then every row (`only` some and `full`) by every seed.

    Yields after each seed what all rows have measured so far. Every row trains on as many lists as
    `full`. `sizes` are those of `rows`. Raises InputError if a row is not known or the config cannot be
    ablated, and as `pipeline.main` does.
    """
    changes = _chosen(config, only, sizes)
    warm = open_run(config, workdir / "warm")
    with alone(warm.workdir):
        claim(warm)
        store, candidates = pipeline.warm_up(warm)
        states = ("zero_shot", "retriever", "reranker")
        evaluation.evaluate(warm, store, "test", ("exact",), states=states)
    start = "zero_shot" if config.retriever.epochs == 0 else "retriever"
    given = warm.workdir / "runs" / f"test.{start}.retriever.exact.trec"

    def count_lists(run: Run, candidates: dict) -> int:
        return len(mining.draw_lists(run.config, store, candidates, "joint").query_rows_L)

    lists = count_lists(warm, candidates)
    half = max(-(-(lists // config.joint.batch) // 2), 1)
    measured = []
    for seed in range(seeds):
        for name, change in changes.items():
            print(f"\n== {name}, seed {seed}", flush=True)
            row_config = _changed(config, change, half)
            row_config.seed = seed
            run = open_run(row_config, workdir / "rows" / f"{name.replace(' ', '_')}.{seed}")
            budget.restore(run, warm.workdir)
            row_candidates = candidates
            if run.config.joint.denoised_share == 0:
                # A pass over undenoised lists alone is shorter: no denoised positive heads a list.
                row_candidates = mining.retrieve(warm, store)
                run.config.joint.epochs *= lists / count_lists(run, row_candidates)
            with alone(run.workdir):
                claim(run)
                branch(run.workdir, warm.workdir)
                if name == AS_TAUGHT:
                    teacher = workdir / "teachers" / str(seed)
                    _teach(row_config, teacher, warm.workdir, store, candidates)
                    replace_stage(run.workdir / "reranker", teacher / "joint")
                pipeline.finish(run, store, row_candidates, ("exact",))
                evaluation.evaluate_candidates(run, store, "test", given, WARM, states=("joint",))
            measured.append({"row": name, "seed": seed, **_measured(run.workdir)})
        yield measured


def _teach(
    config: ConfigDict,
    workdir: pathlib.Path,
    warm: pathlib.Path,
    store: tokens.Store,
    candidates: mining.Candidates,
) -> None:
    """Trains the re-ranker of the warm start as joint training would, but for the KL term."""
    # As many labels as the dynamic teacher sees, whatever dev prefers.
    alone_by_labels = {"joint.train_reranker": True, "joint.kl_weight": 0.0, "joint.keep": "last"}
    run = open_run(_changed(config, alone_by_labels), workdir)
    with alone(workdir):
        claim(run)
        branch(workdir, warm)
        pipeline.train_joint(run, store, candidates)
    shutil.rmtree(workdir / "joint" / "last", ignore_errors=True)


def _measured(folder: pathlib.Path) -> dict:
    """Returns which step of each model a finished row kept, and its metrics; deletes its optimizer."""
    values: dict[str, np.ndarray] = {}
    for part in ("test", f"test.{WARM}"):
        with np.load(folder / "eval" / f"{part}.per_query.npz") as file:
            values |= dict(file)
    # Half of what a row takes on disk, and nothing goes on from it.
    shutil.rmtree(folder / "joint" / "last", ignore_errors=True)
    return {"kept_step": checkpoint.best_steps(folder / "joint"), "values": values}


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
    first = measured[0]["values"]
    warmed_up = any(key.startswith("retriever.") for key in first)
    warm = {"retriever": "retriever" if warmed_up else "zero_shot", "reranker": "reranker"}
    rows = []
    for model, candidates, metric in MEASURES:
        key = f"joint.{model}.{candidates}.{metric}"
        values = {"warm start": first[f"{warm[model]}.{model}.exact.{metric}"][None]}
        for name in names:
            values[name] = np.stack([m["values"][key] for m in measured if m["row"] == name])
        compared = []
        for name, values_SxQ in values.items():
            means_S = values_SxQ.mean(axis=1)
            spread = float(means_S.std(ddof=1)) if len(means_S) > 1 else None
            row: dict[str, Any] = {"row": name, "model": model, "candidates": candidates}
            row |= {"metric": metric, "queries": values_SxQ.shape[1], "mean": float(means_S.mean())}
            kept = [m["kept_step"][model] for m in measured if m["row"] == name]
            row |= {"seeds": len(means_S), "spread": spread, "kept_steps": kept}
            if name != "full":
                row |= _compared(values_SxQ, values["full"], permutations)
                compared.append(row)
            rows.append(row)
        for row, p in zip(compared, significance.holm([row["p_value"] for row in compared])):
            row["p_value"] = p
    return rows


def _compared(values_SxQ: np.ndarray, full_SxQ: np.ndarray, permutations: int) -> dict:
    """Returns the differences of a row to `full` and their tests, not corrected."""
    difference_S = values_SxQ.mean(axis=1) - full_SxQ.mean(axis=1)
    row: dict[str, Any] = {"differences": difference_S.tolist()}
    # Equal differences differ by rounding, of which a t-test would make much.
    if np.ptp(difference_S) > 1e-9:
        row["seeds_p_value"] = float(stats.ttest_1samp(difference_S, 0).pvalue)
    mean_Q, full_Q = values_SxQ.mean(axis=0), full_SxQ.mean(axis=0)
    low, high = significance.interval(mean_Q - full_Q, resamples=permutations, seed=0)
    difference, p = significance.paired_test(mean_Q, full_Q, permutations=permutations, seed=0)
    return row | {"difference": difference, "low": low, "high": high, "p_value": p}


def render(summary: list[dict]) -> str:
    """Returns the rows as tables in Markdown."""
    lines = []
    for model, candidates, metric in MEASURES:
        measure = {"model": model, "candidates": candidates, "metric": metric}
        part = [row for row in summary if measure.items() <= row.items()]
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
    known = readable(path, lambda: json.loads(path.read_text())) if path.is_file() else None
    if known is None:
        return False
    names, others = ({row["row"]: row["seeds"] for row in x} for x in (summary, known))
    return names.keys() == others.keys() and others["full"] > names["full"]
