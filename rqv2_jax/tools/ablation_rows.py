"""The rows of the ablations: what each changes, and their training from one shared warm start."""

import pathlib
import shutil
from collections.abc import Iterator, Sequence

import ml_collections
import numpy as np

from rqv2_jax import config as config_lib
from rqv2_jax import config_check
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import evaluation, mining, pipeline
from rqv2_jax.recipe.workdir import alone, branch, claim, open_run
from rqv2_jax.tools.ablation_table import MEASURES, WARM
from rqv2_jax.training import checkpoint

# Half-way through joint training: the number of steps is known once the lists are.
REFRESHED = "half of the steps"


def rows(config: ml_collections.ConfigDict, sizes: Sequence[int] | None = None) -> dict[str, dict]:
    """Returns what each row changes of `config`, by dotted key, without rows that change nothing.

    `sizes` are those of lists; half and twice that of `full` if there are none.
    """
    joint = config.joint

    def preset(name: str) -> dict:
        return {f"joint.loss.{key}": value for key, value in config_lib.LOSSES[name].items()}

    through = not joint.loss.teacher_gradient
    warmer = 2 * joint.loss.temperature
    changes = {
        "static distillation": {"joint.train_reranker": False},
        "pointwise re-ranker": {"joint.loss.reranker_loss": "pointwise"},
        "without denoised lists": {"joint.denoised_share": 0.0},
        "preset paper": preset("paper"),
        "preset official_code": preset("official_code"),
        f"teacher gradient {'on' if through else 'off'}": {"joint.loss.teacher_gradient": through},
        f"temperature {warmer:g}": {"joint.loss.temperature": warmer},
        "one learning rate": {"joint.reranker_rate": 1.0},
        "in-batch negatives": {"joint.in_batch_weight": 1.0},
        # What the labels alone would gain, without a teacher.
        "in-batch negatives alone": {"joint.in_batch_weight": 1.0, "joint.kl_weight": 0.0},
        "refreshed candidates": {"joint.refresh_every": REFRESHED},
    }
    around = (size for size in (joint.list_size // 2, joint.list_size * 2) if size >= 2)
    for size in around if sizes is None else sizes:
        changes[f"list size {size}"] = {"joint.list_size": size}
    kept = {
        name: change
        for name, change in changes.items()
        if config_lib.differences(_changed(config, change), config)
    }
    return {"full": {}, **kept}


def _changed(
    config: ml_collections.ConfigDict, change: dict, steps: int = 1
) -> ml_collections.ConfigDict:
    """Returns a copy of `config` with a row's change; `steps` are those between new candidates."""
    changed = config_lib.loads(config_lib.dumps(config))
    values = {key: steps if value == REFRESHED else value for key, value in change.items()}
    changed.update_from_flattened_dict(values)
    return changed


def _chosen(
    config: ml_collections.ConfigDict, only: list[str] | None, sizes: Sequence[int] | None
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
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    seeds: int,
    only: list[str] | None = None,
    sizes: Sequence[int] | None = None,
) -> Iterator[list[dict]]:
    """Runs the warm start, then every row (`only` some and `full`) by every seed.

    Yields after each seed what all rows have measured so far. Every row trains on as many lists as
    `full`. `sizes` are those of `rows`.

    Raises:
      InputError: a row is not known, the config cannot be ablated, or what `pipeline.main` raises.
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

    def count_lists(run, candidates) -> int:
        return len(mining.draw_lists(run, store, candidates, "joint").query_rows_L)

    lists = count_lists(warm, candidates)
    half = max(-(-(lists // config.joint.batch) // 2), 1)
    measured = []
    for seed in range(seeds):
        for name, change in changes.items():
            print(f"\n== {name}, seed {seed}", flush=True)
            row_config = _changed(config, change, half)
            row_config.seed = seed
            run = open_run(row_config, workdir / "rows" / f"{name.replace(' ', '_')}.{seed}")
            row_candidates = candidates
            if run.config.joint.denoised_share == 0:
                # A pass over undenoised lists alone is shorter: no denoised positive heads a list.
                row_candidates = mining.retrieve(warm, store)
                run.config.joint.epochs *= lists / count_lists(run, row_candidates)
            with alone(run.workdir):
                claim(run)
                branch(run, warm)
                pipeline.finish(run, store, row_candidates, ("exact",))
                evaluation.evaluate_candidates(run, store, "test", given, WARM, states=("joint",))
            measured.append({"row": name, "seed": seed, **_measured(run.workdir)})
        yield measured


def _measured(folder: pathlib.Path) -> dict:
    """Returns the step that a finished row kept and its metrics; deletes its optimizer's state."""
    values = {}
    for part in ("test", f"test.{WARM}"):
        with np.load(folder / "eval" / f"{part}.per_query.npz") as file:
            values |= dict(file)
    # Half of what a row takes on disk, and nothing goes on from it.
    shutil.rmtree(folder / "joint" / "last", ignore_errors=True)
    return {"kept_step": checkpoint.best_step(folder / "joint"), "values": values}
