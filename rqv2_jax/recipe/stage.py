"""One training stage from its lists to its end: batches, dev scores, checkpoints, TensorBoard."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import tqdm

from rqv2_jax import artifacts, hosts, optional
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import tokens
from rqv2_jax.data.batches import BatchLayout, ListBatches
from rqv2_jax.recipe.dev import DEV_METRIC, Dev
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.workdir import begin, finish_stage, finished
from rqv2_jax.training import stages, train
from rqv2_jax.training.checkpoint import Checkpoints, best_step


def stage_batches(
    run: Run, store: tokens.Store, name: str, stage: stages.Stage, lists: lists_lib.Lists
) -> ListBatches:
    """Returns the batches that a training stage makes of its lists, the same on every host."""
    hosts.check_same(f"the lists of stage {name}", lists.query_rows_L, lists.passages_LxP)
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
        run.inputs,
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


def _evaluate(dev: Dev, checkpoints: Checkpoints, log: _Log, step: int, params: dict[str, Any]):
    """Scores the models of a step on dev, and keeps them if they are the best so far."""
    scores = dev.scores(params)
    terms = {f"dev/{model} {DEV_METRIC}": score for model, score in scores.items()}
    train.check_finite(log.name, step, terms)
    log.write(step, terms)
    mean = sum(scores.values()) / len(scores)
    checkpoints.save_best(step, params, f"dev {DEV_METRIC}, mean of models", mean)


def train_stage(
    run: Run,
    store: tokens.Store,
    name: str,
    params: dict[str, Any],
    origin: str,
    lists: lists_lib.Lists,
    dev: Dev,
    redraw: Callable[[int, train.TrainState, int], lists_lib.Lists] | None = None,
) -> None:
    """Runs one training stage to its end, from its last checkpoint if there is one.

    Raises InputError if it has begun with other lists or params, or its numbers are not finite.

    Args:
      origin: names `params`; with the lists it says whether a checkpoint is of this training.
      redraw: `redraw(step, state, number)` gives that many lists for the steps from `step` on, a
        multiple of the stage's `refresh_every`; `state` may be a later one, of a run that resumes.
        None if all steps are made of `lists`.
    """
    settings, stage = run.config[name], stages.make_stage(run.config, run.models, name)
    folder, steps = run.workdir / name, len(lists.query_rows_L) // settings.batch
    trained_on = f"{origin} {store.fingerprint}"
    trained_on = artifacts.digest(trained_on, lists.query_rows_L, lists.passages_LxP)
    done = finished(folder)
    batches = None if done else stage_batches(run, store, name, stage, lists)
    begin(folder, trained_on)
    if done:
        tqdm.tqdm.write(f"  done; best on dev at step {best_step(folder)} of {steps}")
        return
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder)))
        optimizer = train.make_optimizer(run.config.optimizer, settings, steps, stage.rates)
        state = checkpoints.restore_last(train.init_state(params, optimizer, run.sharding))
        log = stack.enter_context(contextlib.closing(_Log(name, folder, steps)))
        evaluate = functools.partial(_evaluate, dev, checkpoints, log)
        step_fn = train.make_step(stage.loss_fn, optimizer, run.sharding)
        every = settings.refresh_every if redraw else steps
        # A process may have been killed after its last checkpoint, before it marked the stage's end.
        start = int(state.step) // every * every if int(state.step) < steps else steps
        for first in range(start, steps, every):
            stop = min(first + every, steps)
            if first > 0:
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
    finish_stage(folder)
    tqdm.tqdm.write(f"  best on dev at step {best_step(folder)} of {steps}")
