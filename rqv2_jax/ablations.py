"""Runs the paper's ablations of joint training from one shared warm start, over several seeds.

Rows: the paper's Table 4 (static distillation, a pointwise re-ranker, no denoised lists), both presets
of the loss, the teacher's gradient, list sizes (Figure 4), and what goes beyond the paper. Each row
changes `full`, the config as given, in one place; in-batch negatives come without the KL term, too.
The table compares both models, and the re-ranker also on the candidates of the warm start. Finished
rows are kept, so the same command resumes.
Writes ablations.json and ablations.md into the workdir (with --rows, ablations.some.json and .md), anew
after every seed; rqv2_jax.report draws the figures.

Example:
  python -m rqv2_jax.ablations --config configs/ablations.py --workdir workdir/ablations --seeds 3
"""

import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import readable

# What the table compares, as (model, candidates, metric): a re-ranker ranks what its own retriever
# finds, and what that of the warm start does, where its gain is its own.
WARM = "warm_start"
MEASURES = (
    ("retriever", "exact", "RR@10"),
    ("retriever", "exact", "Success@50"),
    ("reranker", "exact", "RR@10"),
    ("reranker", WARM, "RR@10"),
)

# Half-way through joint training: the number of steps is known once the lists are.
REFRESHED = "half of the steps"


def rows(config, sizes: Sequence[int] | None = None) -> dict[str, dict]:
    """What each row changes of `config`, as dotted keys, without rows that would change nothing.

    `sizes` of lists; half and twice that of `full` if there are none.
    """
    from rqv2_jax import config as config_lib

    joint = config.joint

    def preset(name):
        return {f"joint.loss.{key}": value for key, value in config_lib.LOSSES[name].items()}

    through = not joint.loss.teacher_gradient
    warmer = 2 * joint.loss.temperature
    found = {
        "static distillation": {"joint.train_reranker": False},
        "pointwise re-ranker": {"joint.loss.reranker_loss": "pointwise"},
        "without denoised lists": {"joint.denoised_share": 0.0},
        "preset paper": preset("paper"),
        "preset official_code": preset("official_code"),
        f"teacher gradient {'on' if through else 'off'}": {"joint.loss.teacher_gradient": through},
        f"temperature {warmer:g}": {"joint.loss.temperature": warmer},
        "one learning rate": {"joint.reranker_rate": 1.0},
        "in-batch negatives": {"joint.in_batch_weight": 1.0},
        # What of their gain the labels would bring without a teacher.
        "in-batch negatives alone": {"joint.in_batch_weight": 1.0, "joint.kl_weight": 0.0},
        "refreshed candidates": {"joint.refresh_every": REFRESHED},
    }
    around = (size for size in (joint.list_size // 2, joint.list_size * 2) if size >= 2)
    for size in around if sizes is None else sizes:
        found[f"list size {size}"] = {"joint.list_size": size}
    kept = {
        name: change
        for name, change in found.items()
        if config_lib.differences(_changed(config, change), config)
    }
    return {"full": {}, **kept}


def _changed(config, change: dict, steps: int = 1):
    """A copy of `config` with a row's change."""
    from rqv2_jax import config as config_lib

    own = config_lib.loads(config_lib.dumps(config))
    values = {key: steps if value == REFRESHED else value for key, value in change.items()}
    own.update_from_flattened_dict(values)
    return own


def run_all(
    config,
    workdir: pathlib.Path,
    seeds: int,
    only: list[str] | None = None,
    sizes: Sequence[int] | None = None,
) -> Iterator[list[dict]]:
    """Warm start, then every row (`only` some and `full`) by every seed.

    Gives after each seed what all rows have measured until then. Every row trains on as many lists as
    `full`. `sizes` are those of `rows`.

    Raises:
      InputError: a row is not known, the config cannot be ablated, or what `pipeline.main` raises.
    """
    import numpy as np

    from rqv2_jax import config as config_lib
    from rqv2_jax.errors import InputError
    from rqv2_jax.recipe import evaluation, mining, pipeline
    from rqv2_jax.recipe.claim import claim
    from rqv2_jax.recipe.run import open_run
    from rqv2_jax.recipe.workdir import alone, branch
    from rqv2_jax.training import checkpoint

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
            config_lib.check(_changed(config, change))
        except InputError as e:
            raise InputError(f"row {name!r}: {e}; or leave it out by --rows") from e
    warm = open_run(config, workdir / "warm")
    with alone(warm.workdir):
        claim(warm)
        store, candidates = pipeline.warm_up(warm)
        evaluation.evaluate(
            warm, store, "test", ("exact",), states=("zero_shot", "retriever", "reranker")
        )
    start = "zero_shot" if config.retriever.epochs == 0 else "retriever"
    given = warm.workdir / "runs" / f"test.{start}.retriever.exact.trec"

    def count(run, candidates):
        return len(mining.draw_lists(run.config, store, candidates, "joint").query_rows_L)

    lists = count(warm, candidates)
    steps = lists // config.joint.batch
    measured = []
    for seed in range(seeds):
        for name, change in changes.items():
            print(f"\n== {name}, seed {seed}", flush=True)
            own = _changed(config, change, max(-(-steps // 2), 1))
            own.seed = seed
            folder = workdir / "rows" / f"{name.replace(' ', '_')}.{seed}"
            run = open_run(own, folder)
            own = run.config
            found = candidates
            if own.joint.denoised_share == 0:
                # Without the lists that denoised positives head there are fewer to a pass.
                found = mining.retrieve(warm, store)
                own.joint.epochs *= lists / count(run, found)
            with alone(folder):
                claim(run)
                branch(folder, warm.workdir)
                pipeline.finish(run, store, found, ("exact",))
                evaluation.evaluate_candidates(run, store, "test", given, WARM, states=("joint",))
            values = {}
            for part in ("test", f"test.{WARM}"):
                with np.load(folder / "eval" / f"{part}.per_query.npz") as file:
                    values |= dict(file)
            # Half of what a row takes on disk, and nothing goes on from it.
            shutil.rmtree(folder / "joint" / "last", ignore_errors=True)
            kept = checkpoint.best_step(folder / "joint")
            measured.append({"row": name, "seed": seed, "kept_step": kept, "values": values})
        yield measured


def summarise(measured: list[dict], *, permutations: int) -> list[dict]:
    """A row for each ablation, model, candidates and metric, in the order of `measured`.

    Values of a query are averaged over seeds before runs are compared. `p_value` is of the paired
    randomisation test against `full` over the queries, corrected by Holm's rule for the number of
    rows compared by the same measure; `low` and `high` bound the 95% bootstrap interval. Both speak
    of other queries, not of other seeds. For these there are the `differences` of each, and from two
    seeds on `seeds_p_value` of the t-test that their mean is 0, not corrected. `kept_steps` are those
    of joint training that dev chose, 0 where it was the start.
    """
    import numpy as np
    from scipy import stats

    from rqv2_jax.ranking import significance

    names = list(dict.fromkeys(m["row"] for m in measured))
    kept = {name: [m["kept_step"] for m in measured if m["row"] == name] for name in names}
    first = measured[0]["values"]
    warmed_up = any(key.startswith("retriever.") for key in first)
    warm = {"retriever": "retriever" if warmed_up else "zero_shot", "reranker": "reranker"}
    found = []
    for model, candidates, metric in MEASURES:
        key = f"joint.{model}.{candidates}.{metric}"
        values = {n: np.stack([m["values"][key] for m in measured if m["row"] == n]) for n in names}
        values["warm start"] = first[f"{warm[model]}.{model}.exact.{metric}"][None]
        summary, p_values = [], []
        for name in ["warm start", *names]:
            mean_Q = values[name].mean(axis=0)
            difference_Q = mean_Q - values["full"].mean(axis=0)
            row = {"row": name, "model": model, "candidates": candidates, "metric": metric}
            per_seed = values[name].mean(axis=1)
            row |= {"queries": len(mean_Q), "mean": float(per_seed.mean()), "seeds": len(per_seed)}
            row["spread"] = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None
            row["kept_steps"] = kept.get(name, [])
            if name != "full":
                difference_S = per_seed - values["full"].mean(axis=1)
                row["differences"] = difference_S.tolist()
                # Equal differences differ by rounding, of which a t-test would make much.
                if np.ptp(difference_S) > 1e-9:
                    row["seeds_p_value"] = float(stats.ttest_1samp(difference_S, 0).pvalue)
                low, high = significance.interval(difference_Q, resamples=permutations, seed=0)
                difference, p = significance.paired_test(
                    mean_Q, values["full"].mean(axis=0), permutations=permutations, seed=0
                )
                row |= {"difference": difference, "low": low, "high": high}
                p_values.append(p)
            summary.append(row)
        corrected = iter(significance.holm(p_values))
        for row in summary:
            if row["row"] != "full":
                row["p_value"] = next(corrected)
        found += summary
    return found


def render(summary: list[dict]) -> str:
    """The rows as a table in Markdown."""
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


def _knows_more(path: pathlib.Path, summary: list[dict]) -> bool:
    """Does the table in a file hold the same rows by more seeds?"""
    known = None
    if path.is_file():
        known = readable(path, lambda: json.loads(path.read_text()))
    if known is None:
        return False
    names, others = ({row["row"]: row["seeds"] for row in x} for x in (summary, known))
    return names.keys() == others.keys() and others["full"] > names["full"]


def main():
    """Runs what is not finished, writes the table after every seed and prints it at the end.

    A table of the same rows by more seeds, which a run that resumes has yet to reach, stays meanwhile.
    """
    from rqv2_jax import artifacts
    from rqv2_jax.errors import InputError
    from rqv2_jax.recipe.workdir import alone

    given = flags.FLAGS
    config, workdir = given.config, pathlib.Path(given.workdir)
    try:
        sizes = None if given.list_sizes is None else [int(size) for size in given.list_sizes]
    except ValueError as e:
        raise InputError(f"--list_sizes: {e}; give whole numbers, as 2,8,16") from e
    with alone(workdir):
        name = "ablations" if given.rows is None else "ablations.some"
        measurements = run_all(config, workdir, given.seeds, given.rows, sizes)
        for seeds, measured in enumerate(measurements, 1):
            summary = summarise(measured, permutations=config.evaluate.permutations)
            if seeds < given.seeds and _knows_more(workdir / f"{name}.json", summary):
                continue
            artifacts.write_text(workdir / f"{name}.json", json.dumps(summary, indent=1) + "\n")
            artifacts.write_text(workdir / f"{name}.md", render(summary))
    print(render(summary))


if __name__ == "__main__":
    program.define_config()
    flags.DEFINE_string("workdir", None, "Folder of everything these runs write.")
    flags.DEFINE_integer("seeds", 3, "Seeds of joint training, from 0.", lower_bound=1)
    flags.DEFINE_list("rows", None, "Only these rows and full; all if not given.")
    flags.DEFINE_list("list_sizes", None, "Of the rows for Figure 4; half and twice that of full.")
    program.run(main, __doc__, required=("config", "workdir"))
