"""One training stage from its lists to its end: batches, dev scores, checkpoints, TensorBoard.

Shape suffixes: Q queries, K passages of a query, N passages of the pool, D vector size.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts, optional
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import own_texts, tokens
from rqv2_jax.data.batches import BatchLayout, ListBatches
from rqv2_jax.models.scoring import tower
from rqv2_jax.ranking import metrics
from rqv2_jax.recipe import space
from rqv2_jax.recipe.opening import in_training
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.workdir import begin, finish_stage, finished
from rqv2_jax.retrieval import encode, index, rerank
from rqv2_jax.retrieval.stream import Forward
from rqv2_jax.training import stages, train
from rqv2_jax.training.checkpoint import Checkpoints, best_steps


class Dev:
    """Measures both models on dev queries during training, on a fixed pool of passages.

    The retriever ranks a pool: the positives of the dev queries, their candidates if there are any, or
    else the passages `hard_QxK`, and random passages up to `config.dev.pool`. The re-ranker re-ranks
    each query's candidates. Both are measured by `config.dev.metric`. `start` has the values [Q] of
    models that a stage starts from, where they are known, and None for one that is new: neither is
    measured before training.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        forward: Forward,
        store: tokens.Store,
        candidates: lists_lib.Candidates | None,
        hard_QxK: np.ndarray | None = None,
        start: Mapping[str, np.ndarray | None] | None = None,
    ):
        self.start = start or {}
        self.forward, self.store, self.queries = forward, store, store.splits["dev"]
        self.metric = config.dev.metric
        _, self.depth, _ = metrics.parse_metric(self.metric)
        if candidates is None:
            rows_Q = lists_lib.subset(len(self.queries.ids), config.dev.queries, config.seed)
            passages_QxK = np.empty((len(rows_Q), 0), np.int64)
        else:
            rows_Q, passages_QxK = candidates.query_rows_Q, candidates.passages_QxN
        order_Q = np.argsort(rows_Q)
        self.rows_Q, self.candidates_QxK = rows_Q[order_Q], passages_QxK[order_Q]
        self.qrels = self.queries.labels_of(self.rows_Q)
        found = passages_QxK if hard_QxK is None else hard_QxK
        pool = np.unique(np.append(self.qrels[1][self.qrels[2] > 0], found[found >= 0]))
        others = np.setdiff1d(np.arange(len(store.passage_ids)), pool)
        others = np.random.default_rng(config.seed).permutation(others)
        fill = max(config.dev.pool - len(pool), 0)
        self.pool_N = np.sort(np.append(pool, others[:fill]))

    def values(self, params: dict[str, Any]) -> dict[str, np.ndarray]:
        """Returns `self.metric` for each query [Q], by model, of the models whose params these are."""
        measures = {"retriever": self.retriever, "reranker": self.reranker}
        return {model: measures[model](tree) for model, tree in params.items()}

    def retriever(self, params: dict[str, Any]) -> np.ndarray:
        """Returns the metric of the retriever over the pool, for each query."""
        query, passage = (tower(params, side) for side in ("query", "passage"))
        passages_NxD = encode.passages(self.forward, passage, self.store, self.pool_N)
        queries_QxD = encode.queries(self.forward, query, self.queries.texts, self.rows_Q)
        own_Q = own_texts.of_rows(self.queries, self.rows_Q)
        depth = own_texts.deeper(self.depth, own_Q)
        rows_QxK, scores_QxK = index.exact(queries_QxD, [passages_NxD], depth)
        return self._values(*own_texts.without(self.pool_N[rows_QxK], scores_QxK, own_Q))

    def reranker(self, params: dict[str, Any]) -> np.ndarray:
        """Returns the metric of the re-ranker over each query's candidates."""
        pairs = self.store, self.queries.texts, self.rows_Q, self.candidates_QxK
        return self._values(self.candidates_QxK, rerank.scores(self.forward, params, *pairs))

    def _values(self, passages_QxK: np.ndarray, scores_QxK: np.ndarray) -> np.ndarray:
        if np.isnan(scores_QxK).any():
            # Training stops at it with a message that names the stage and the step.
            return np.full(len(scores_QxK), np.nan)
        return metrics.evaluate(
            passages_QxK, scores_QxK, self.store.passage_ids, self.qrels, [self.metric]
        )[self.metric]


def stage_batches(
    run: Run, store: tokens.Store, name: str, stage: stages.Stage, lists: lists_lib.Lists
) -> ListBatches:
    """Returns the batches that a training stage makes of its lists, the same on every host."""
    drawn = lists.query_rows_L, lists.passages_LxP
    taught = () if lists.teacher_LxP is None else (lists.teacher_LxP,)
    hosts.check_same(f"the lists of stage {name}", *drawn, *taught)
    shards = run.sharding.shards
    layout = BatchLayout(
        batch=run.config[name].batch,
        shards=shards,
        accumulate=stage.accumulate,
        made_here=run.sharding.own_parts(shards * stage.accumulate),
        max_blocks=run.config.packing.blocks,
        flat=run.models.flat,
    )
    return ListBatches(
        store,
        store.splits["train"],
        in_training(run.inputs, run.config.data),
        lists,
        layout,
        models=stage.models,
        in_batch=stage.in_batch,
    )


class _Log:
    """The terms of a stage by step, written to TensorBoard and to the terminal."""

    def __init__(self, name: str, folder: pathlib.Path, steps: int):
        self.name, self.steps = name, steps
        summary = self.summary = optional.tensorflow("writing TensorBoard's events").summary
        self.events = (
            summary.create_file_writer(str(folder))
            if hosts.first()
            else summary.create_noop_writer()
        )
        self.close = self.events.close

    def write(self, step: int, terms: Mapping[str, float]) -> None:
        """Writes the terms of one step."""
        with self.events.as_default(step):
            for key, value in terms.items():
                self.summary.scalar(key, value)
        self.events.flush()
        shown = "  ".join(f"{key} {value:.4g}" for key, value in terms.items())
        tqdm.tqdm.write(f"  {self.name} {step}/{self.steps}  {shown}")


def _evaluate(
    dev: Dev, checkpoints: Checkpoints, log: _Log, keep: str, step: int, params: dict[str, Any]
):
    """Measures the models of a step on dev; keeps each that is its best so far, or else the last."""
    known = dev.start if step == 0 else {}
    values = dev.values({model: tree for model, tree in params.items() if model not in known})
    values |= {model: values_Q for model, values_Q in known.items() if values_Q is not None}
    params = {model: params[model] for model in values}
    terms = {f"dev/{model} {dev.metric}": float(x.mean()) for model, x in values.items()}
    if not terms:
        return
    train.check_finite(log.name, step, terms)
    log.write(step, terms)
    if keep == "best" or step == log.steps:
        checkpoints.save_best(step, params, f"dev {dev.metric}", values)


def _kept(folder: pathlib.Path, steps: int, keep: str, metric: str) -> str:
    """Says which params of a finished stage are handed on."""
    kept = best_steps(folder)
    if keep == "last":
        return f"kept the last params, of step {max(kept.values())}, whatever dev says"
    parts = [
        f"{model}: best on dev at step {step} of {steps}"
        if step
        else f"{model}: kept the start, as dev finds later steps worse by {metric}"
        for model, step in kept.items()
    ]
    return "; ".join(parts)


def train_stage(
    run: Run,
    store: tokens.Store,
    name: str,
    params: Callable[[], dict[str, Any]],
    origin: str,
    lists: lists_lib.Lists,
    dev: Dev,
    redraw: Callable[[int, train.TrainState, int], lists_lib.Lists] | None = None,
) -> None:
    """Runs one training stage to its end, from its last checkpoint if there is one.

    Raises InputError if it has begun with other lists or params, or its numbers are not finite.

    Args:
      params: gives those that the stage starts from. They are not held beside the state that training
        resumes from, as two copies may not fit.
      origin: names `params`; with the lists it says whether a checkpoint is of this training.
      redraw: `redraw(step, state, number)` gives that many lists for the steps from `step` on, a
        multiple of the stage's `refresh_every`; `state` may be a later one, of a run that resumes.
        None if all steps are made of `lists`.
    """
    settings, stage = run.config[name], stages.make_stage(run.config, run.models, name)
    folder, steps = run.workdir / name, len(lists.query_rows_L) // settings.batch
    trained_on = f"{origin} {store.fingerprint}"
    trained_on = artifacts.digest(trained_on, *lists.identity())
    if finished(folder):
        begin(folder, trained_on)
    # Unless its mark was damaged.
    if finished(folder):
        tqdm.tqdm.write(f"  done; {_kept(folder, steps, settings.keep, dev.metric)}")
        return
    batches = stage_batches(run, store, name, stage, lists)
    space.check_stage(run, name)
    begin(folder, trained_on)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder)))
        optimizer = train.make_optimizer(run.config.optimizer, settings, steps, stage.rates)
        state = checkpoints.restore_last(
            lambda: train.state_shapes(params(), optimizer, run.sharding)
        )
        if state is None:
            state = train.init_state(params(), optimizer, run.sharding)
        log = stack.enter_context(contextlib.closing(_Log(name, folder, steps)))
        evaluate = functools.partial(_evaluate, dev, checkpoints, log, settings.keep)
        step_fn = train.make_step(stage.loss_fn, optimizer, run.sharding, by_part=stage.by_part)
        every = settings.refresh_every if redraw else steps
        # A process may have been killed after its last checkpoint, before it marked the stage's end.
        start = int(state.step) // every * every if int(state.step) < steps else steps
        for first in range(start, steps, every):
            stop = min(first + every, steps)
            if redraw and first > 0:
                lists = redraw(first, state, (stop - first) * settings.batch)
                batches = stage_batches(run, store, name, stage, lists)

            def stream(step: int, batches: ListBatches = batches, first: int = first) -> Iterator:
                return map(run.sharding.put_batch, batches.stream(step - first))

            state = train.train(
                state,
                step_fn=step_fn,
                batches=stream,
                dropout_key=jax.random.key(run.config.seed),
                total_steps=steps,
                stop=stop,
                stage=settings,
                hooks=train.Hooks(evaluate, checkpoints.save_last, log.write),
                name=name,
            )
        checkpoints.finish()
    finish_stage(folder)
    tqdm.tqdm.write(f"  {_kept(folder, steps, settings.keep, dev.metric)}")
