"""The seconds that the parts of a run take on this machine, for the counts of `budget`.

Shape suffixes: L lists, P passages of a list, N passages or positives.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm

from rqv2_jax import config_check
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import tokens
from rqv2_jax.data.batches import ListBatches
from rqv2_jax.models.scoring import tower
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.stage import stage_batches
from rqv2_jax.retrieval import encode, rerank
from rqv2_jax.training import stages, train

# Steps that are timed, and the batches of a forward pass.
TIMED_STEPS, TIMED_BATCHES = 3, 2


class Costs(NamedTuple):
    """Seconds that the parts of a run take; `step` and `dev` by stage, of the stages there are."""

    # By part, whatever the counts: "measuring", "retrieve" (encoding the corpus), "mine" (scores of
    # dev's candidates), and compiling each stage's step.
    once: dict[str, float]
    pair: float  # a query and a candidate, scored by the re-ranker
    step: dict[str, float]
    start: dict[str, float]  # dev before the first step, as far as it is measured then
    dev: dict[str, float]  # dev after a step


def stages_of(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the training stages of a run, in their order."""
    return [name for name in config_check.STAGES if config[name].epochs > 0]


def measure(run: Run, store: tokens.Store) -> Costs:
    """Measures what the parts of the run take, by its own models, lengths, batches and devices."""
    started, config = time.monotonic(), run.config
    tqdm.tqdm.write("budget: measure speed")
    (passage, pair), size = _forward(run, store), len(store.texts)
    steps = _steps(run, store)
    asked = min(config.dev.queries, len(store.splits["dev"].ids))
    rerank_dev = asked * config.dev.depth * pair
    warm, both = (
        min(max(config.dev.pool, asked * each), size) * passage
        for each in (1, 1 + config.dev.depth)
    )
    trained = config.reranker.epochs > 0
    start = {
        "retriever": warm,
        "reranker": 0.0 if run.new_reranker else rerank_dev,
        "joint": both + (0.0 if trained else rerank_dev),
    }
    dev = {"retriever": warm, "reranker": rerank_dev, "joint": both + rerank_dev}
    compiling = {name: max(first - later, 0.0) for name, (first, later) in steps.items()}
    scored = config.joint.denoised_share > 0 and not config.joint.lists
    return Costs(
        once={"measuring": time.monotonic() - started, "retrieve": size * passage}
        | compiling
        | {"mine": rerank_dev * scored},
        pair=pair,
        step={name: later for name, (_, later) in steps.items()},
        start={name: start[name] for name in steps},
        dev={name: dev[name] for name in steps},
    )


def _forward(run: Run, store: tokens.Store) -> tuple[float, float]:
    """Returns the seconds of a passage encoded, and of a pair scored."""
    forward = run.forward
    lengths_N = forward.inputs.passage_lengths(store, store.sample())
    tokens_once = TIMED_BATCHES * forward.batch_tokens * run.sharding.shards
    rows_N = np.resize(store.sample(), max(int(tokens_once / lengths_N.mean()), 1))
    rows_N = np.random.default_rng(0).permutation(rows_N)
    encoder, queries = tower(run.initial("retriever"), "passage"), store.splits["train"].texts
    passage = _second(lambda: encode.passages(forward, encoder, store, rows_N)) / len(rows_N)
    reranker, asked_N = run.initial("reranker"), np.resize(np.arange(len(queries)), len(rows_N))
    pairs = forward, reranker, store, queries, asked_N, rows_N[:, None]
    pair = _second(lambda: rerank.scores(*pairs)) / len(rows_N)
    tqdm.tqdm.write(
        f"  {lengths_N.mean() / passage:,.0f} passage tokens and {1 / pair:,.1f} pairs a second"
    )
    return passage, pair


def _second(work: Callable[[], Any]) -> float:
    """Returns the seconds of some work when it is done again, everything being compiled."""
    work()
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _steps(run: Run, store: tokens.Store) -> dict[str, tuple[float, float]]:
    """Returns the seconds of each stage's first step, which compiles, and of a later one.

    All are measured but the retriever's, which follow from those of the last stage: it computes the
    same layers, of other kinds of inputs and as many tokens as its lists have.
    """
    names, made = stages_of(run.config), functools.partial(_batches, run, store)
    timed = {name: _timed(run, name, *made(name)) for name in names if name != "retriever"}
    if not timed:
        return {name: _timed(run, name, *made(name)) for name in names}
    if "retriever" in names:
        (_, batches), (_, whole) = made("retriever"), made(names[-1])
        compiling, step = timed[names[-1]]
        kinds = len(batches.shapes) / len(whole.shapes)
        share = step * _tokens(batches) / _tokens(whole)
        timed["retriever"] = (compiling - step) * kinds + share, share
    return {name: timed[name] for name in names}


def _tokens(batches: ListBatches) -> int:
    """Returns the tokens of the timed steps of a stage."""
    return sum(
        int(batches.ragged(kind, step).lengths_N.sum())
        for kind in batches.shapes
        for step in range(TIMED_STEPS + 1)
    )


def _batches(run: Run, store: tokens.Store, name: str) -> tuple[stages.Stage, ListBatches]:
    """Returns a stage with the batches of steps to time, on labelled pairs and random negatives."""
    settings, stage = run.config[name], stages.make_stage(run.config, run.models, name)
    rng, positives_2xN = np.random.default_rng(0), store.splits["train"].positives()
    count = (TIMED_STEPS + 1) * settings.batch
    query_rows_L, heads_L = np.resize(
        positives_2xN[:, rng.permutation(positives_2xN.shape[1])[:count]].T, (count, 2)
    ).T
    passages_LxP = rng.integers(len(store.texts), size=(count, stage.list_size))
    passages_LxP[:, 0] = heads_L
    provenance_LxP = np.full(passages_LxP.shape, lists_lib.Provenance.UNDENOISED_NEGATIVE)
    provenance_LxP[:, 0] = lists_lib.Provenance.LABELLED_POSITIVE
    lists = lists_lib.Lists(query_rows_L, passages_LxP, provenance_LxP)
    return stage, stage_batches(run, store, name, stage, lists)


def _timed(run: Run, name: str, stage: stages.Stage, batches: ListBatches) -> tuple[float, float]:
    """Returns the seconds of a stage's first step, which compiles, and of a later one."""
    how = run.config.optimizer, run.config[name], TIMED_STEPS + 1, stage.rates
    optimizer = train.make_optimizer(*how)
    params = {model: run.initial(model) for model in stage.models}
    state = train.init_state(params, optimizer, run.sharding)
    parts = stage.loss_fn, optimizer, run.sharding
    step_fn, key = train.make_step(*parts, by_part=stage.by_part), jax.random.key(0)
    seconds = []
    for step in range(TIMED_STEPS + 1):
        batch = run.sharding.put_batch(batches.make(step))
        started = time.monotonic()
        state, terms = step_fn(state, batch, key)
        jax.block_until_ready((state.params, terms))
        seconds.append(time.monotonic() - started)
    return seconds[0], float(np.median(seconds[1:]))
