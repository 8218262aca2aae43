"""The counts of a run from `config.budget`, minutes of training: speed is measured once, counts follow.

The budget covers both warm-ups, mining, joint training and compiling; reading texts and evaluation are
apart. The settings of the config are the most that is taken: `epochs` and `most_lists` of a stage, and
`mine.queries`, `mine.scored_queries` and `mine.scored_depth`. The counts are written to the workdir
before training, so that a run that resumes has the same, and equal counts give equal numbers.
"""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import ml_collections
import tqdm

from rqv2_jax import artifacts, hosts
from rqv2_jax.data import tokens
from rqv2_jax.errors import DAMAGE, InputError, one_line
from rqv2_jax.recipe.costs import Costs, measure, stages_of
from rqv2_jax.recipe.run import Run

FILE, TOOK = "budget.json", "took.json"
# Parts of a run that a budget does not cover.
BEYOND = ("prepare", "evaluate")
# Share of the budget for what is not measured: search, drawing lists, checkpoints, a slower moment.
RESERVE = 0.1
# Shares of the time that encoding and compiling leave: scores of candidates, at most; and, of the rest,
# the stages. What a stage does not need goes to the others.
SCORING = 0.1
SHARES = {"retriever": 0.2, "reranker": 0.45, "joint": 0.35}
# Share of a stage's time in which dev is measured, at most, and how often after its start.
DEV_SHARE, DEV_TIMES = 0.15, (1, 4)
# Share of a stage's steps in which its learning rate rises.
RISING = 0.1
# Share of the budget that encoding the corpus may take. If it takes more, BM25 alone finds candidates,
# where it is asked for; if not, all counts are the least.
ENCODING = 1 / 3
# Candidates of a query that are scored, at least, unless the config wants fewer.
LEAST_DEPTH = 16


def use(run: Run, store: tokens.Store) -> None:
    """Gives the run the counts of its workdir, which are made if no stage has begun, and prints them.

    Raises InputError if the file is gone or damaged, and a stage has begun.
    """
    given = run.config.mine.sources
    if not restore(run):
        costs, labelled = measure(run, store), store.splits["train"].positives().shape[1]
        sizes = len(store.splits["train"].ids), labelled
        # Each process has measured; the first one's figures hold.
        made = hosts.from_first(lambda: plan(run.config, costs, *sizes))
        made["minutes"] = run.config.budget
        artifacts.write_text(run.workdir / FILE, json.dumps(made, indent=1) + "\n")
        restore(run)
    config = run.config
    made = hosts.from_first(lambda: _read(config, run.workdir))
    if made["enough"]:
        tqdm.tqdm.write(
            f"budget: {config.budget:g} minutes are too few, encoding the corpus alone takes "
            f"{made['expected']['retrieve'] / 60:.1f}; all counts are the least; --config.budget="
            f"{made['enough']} would do"
        )
    if made["sources"] != list(given):
        tqdm.tqdm.write(
            "budget: encoding the corpus would take more than a third of it, so BM25 alone finds the "
            "candidates"
        )
    for name, seconds in made["expected"].items():
        what = ""
        if name in SHARES:
            lists = config[name].most_lists
            what = f"{lists:,} lists in {lists // config[name].batch:,} steps, "
        elif name == "mine":
            mine = config.mine
            what = (
                f"{mine.scored_queries:,} of {mine.queries:,} queries, {mine.scored_depth} each, "
            )
        tqdm.tqdm.write(f"  budget: {name}: {what}about {seconds / 60:.1f} minutes")


def restore(run: Run, workdir: pathlib.Path | None = None) -> bool:
    """Gives the run the counts of its workdir or another, and says whether there are any.

    Raises InputError as `use` does.
    """
    folder = run.workdir if workdir is None else workdir
    made = hosts.from_first(lambda: _read(run.config, folder)) if run.config.budget else None
    if made is not None:
        run.config.update_from_flattened_dict(made["counts"])
        run.config.mine.sources = tuple(made["sources"])
    return made is not None


def _read(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any] | None:
    """Reads what `plan` has returned; None if it is not there, and no stage has begun by it."""
    path = workdir / FILE
    try:
        made = json.loads(path.read_text())
        wrong = [k for k, v in made["counts"].items() if type(v) is not int or v < 0]
        if wrong or made["minutes"] != config.budget or made["counts"].keys() != _keys(config):
            raise ValueError("it does not hold the counts of this config")
        sources = made.setdefault("sources", list(config.mine.sources))
        if not {*sources} <= {*config.mine.sources}:
            raise ValueError("its candidates are found by others than this config asks for")
        return {key: made[key] for key in ("counts", "expected", "enough", "sources")}
    except DAMAGE as e:
        if any((workdir / name).exists() for name in (*SHARES, "lists")):
            raise InputError(
                f"{path}: cannot be read ({one_line(e)}), and training has begun by its counts; bring "
                "it back, or run in a new --workdir"
            ) from e
        if path.exists():
            tqdm.tqdm.write(f"{path}: cannot be read ({one_line(e)}); it is made again")
        return None


def _keys(config: ml_collections.ConfigDict) -> set[str]:
    """Returns the settings that are counts of a run by this config."""
    counts = ("most_lists", "warmup_steps", "evaluate_every")
    mine = {f"mine.{key}" for key in ("queries", "scored_queries", "scored_depth")}
    return mine | {f"{name}.{key}" for name in stages_of(config) for key in counts}


def plan(
    config: ml_collections.ConfigDict, costs: Costs, queries: int, positives: int
) -> dict[str, Any]:
    """Returns `counts` by setting, `expected` seconds by part, and `enough`, the least minutes.

    And `sources`, who finds candidates. `queries` are those of the training split, `positives` their
    labels.
    """
    budget, mine = 60 * config.budget, config.mine
    sources, costs = _affordable(config, costs)
    encoding = costs.once["retrieve"]
    needed = _needed(costs)
    left = (1 - RESERVE) * budget - sum(costs.once.values()) if needed <= budget else 0.0
    scored = config.joint.denoised_share > 0 and not config.joint.lists
    scoring = max(SCORING * left, 0.0) * scored
    step = dict(costs.step)
    if config.joint.refresh_every:
        step["joint"] += (encoding + scoring) / config.joint.refresh_every
    mined = min(mine.queries, queries) * positives / queries
    most = {}
    for name in step:
        stage = config[name]
        # A file's lists are not known yet, so that only its settings bound their number.
        of_file = name == "joint" and config.joint.lists
        one_pass = math.inf if of_file else positives if name == "retriever" else mined
        most[name] = max(int(min(stage.epochs * one_pass, stage.most_lists)) // stage.batch, 1)
    seconds = _share(left - scoring, step, costs, most)
    counts, expected = {}, dict(costs.once)
    for name, given in seconds.items():
        stage, start, dev = config[name], costs.start[name], costs.dev[name]
        times = _times(given, start, dev)
        # What exactly so many steps need may come out a hair short of them.
        steps = int((given - start - times * dev) / step[name] + 1e-6)
        steps = min(max(steps, 1), most[name])
        counts[f"{name}.most_lists"] = steps * stage.batch
        counts[f"{name}.warmup_steps"] = int(RISING * steps)
        counts[f"{name}.evaluate_every"] = every = -(-steps // times)
        expected[name] += steps * step[name] + start + -(-steps // every) * dev
    # A stage of less than one pass takes that share of the lists.
    wanted = {
        name: counts[f"{name}.most_lists"] / min(config[name].epochs, 1.0) * queries / positives
        for name in seconds
        if name != "retriever" and not (name == "joint" and config.joint.lists)
    }
    counts["mine.queries"] = min(mine.queries, queries, max(math.ceil(sum(wanted.values())), 1))
    denoised = min(mine.scored_queries, counts["mine.queries"], math.ceil(wanted.get("joint", 1)))
    pairs = int(scoring / costs.pair)
    depth = min(mine.scored_depth, mine.depth, max(LEAST_DEPTH, pairs // denoised))
    counts["mine.scored_queries"] = max(min(denoised, pairs // depth), 1)
    counts["mine.scored_depth"] = depth
    expected["mine"] += counts["mine.scored_queries"] * depth * costs.pair * scored
    return {
        "counts": counts,
        "expected": expected,
        "sources": sources,
        "enough": 0 if needed <= budget else math.ceil(needed / 60),
    }


def _affordable(config: ml_collections.ConfigDict, costs: Costs) -> tuple[list[str], Costs]:
    """Returns who finds candidates, and what is left of the costs where the corpus is not encoded."""
    sources = list(config.mine.sources)
    if "bm25" not in sources or costs.once["retrieve"] <= ENCODING * 60 * config.budget:
        return sources, costs
    return ["bm25"], costs._replace(once={**costs.once, "retrieve": 0.0})


def _needed(costs: Costs) -> float:
    """Returns the seconds of a budget in which encoding and a step of every stage have their shares."""
    weight = sum(SHARES[name] for name in costs.step)
    least = max(
        (seconds + costs.start[name] + costs.dev[name]) * weight / SHARES[name]
        for name, seconds in costs.step.items()
    )
    least = (sum(costs.once.values()) + least / (1 - SCORING)) / (1 - RESERVE)
    return max(costs.once["retrieve"] / ENCODING, least)


def _times(seconds: float, start: float, dev: float) -> int:
    """Returns how often dev is measured after the start of a stage with so many seconds."""
    least, most = DEV_TIMES
    return min(max(int((DEV_SHARE * seconds - start) / dev), least), most)


def _share(
    seconds: float, step: dict[str, float], costs: Costs, most: dict[str, int]
) -> dict[str, float]:
    """Shares seconds among the stages, of which none gets more than its `most` steps need."""
    shared: dict[str, float] = {}
    while True:
        weight = sum(SHARES[name] for name in step if name not in shared)
        left = seconds - sum(shared.values())
        parts = {n: left * SHARES[n] / weight for n in step if n not in shared}
        needed = {}
        for name, part in parts.items():
            start, dev = costs.start[name], costs.dev[name]
            needed[name] = most[name] * step[name] + start + _times(part, start, dev) * dev
        full = {n: needed[n] for n in parts if needed[n] < parts[n]}
        if not full:
            return {n: (shared | parts)[n] for n in step}
        shared |= full


@contextlib.contextmanager
def timed(run: Run, name: str) -> Iterator[None]:
    """Adds the seconds of a part of the run to those that its workdir keeps."""
    started = time.monotonic()
    try:
        yield
    finally:
        if hosts.first():
            seconds = took(run.workdir)
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started
            artifacts.replace_text(run.workdir / TOOK, json.dumps(seconds, indent=1) + "\n")


def took(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the seconds that each part of a run has taken, in their order; none if not known."""
    try:
        return json.loads((workdir / TOOK).read_text())
    except DAMAGE:
        return {}


def spent(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the seconds that the parts have taken that a budget covers."""
    return {name: seconds for name, seconds in took(workdir).items() if name not in BEYOND}


def report(run: Run) -> None:
    """Prints what the parts of a run under a budget took."""
    if run.config.budget:
        seconds = hosts.from_first(lambda: spent(run.workdir))
        made = hosts.from_first(lambda: _read(run.config, run.workdir))
        parts = ", ".join(
            f"{name} {part / 60:.1f} (expected {made['expected'][name] / 60:.1f})"
            for name, part in seconds.items()
        )
        total = sum(seconds.values()) / 60
        tqdm.tqdm.write(f"budget: took {total:.1f} of {run.config.budget:g} minutes: {parts}")
