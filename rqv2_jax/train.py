"""One pure training step and one loop for all three training stages.

A stage supplies its loss and its batches. Shape suffixes: B lists, P passages of a list, N all
passages of the global batch, D vector size.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from rqv2_jax import losses
from rqv2_jax.models import Models, retriever_scores
from rqv2_jax.sharding import Sharding


class TrainState(NamedTuple):
    """All that changes from step to step; arrays only. `params` is keyed by model."""

    step: jax.Array
    params: Any
    opt_state: Any


def retriever_loss(models: Models, params, batch, key, gather):
    """In-batch negatives: every passage of the global batch that is not a positive of the query."""
    query_key, passage_key = jax.random.split(key)
    queries_BxD = models.vectors(params["retriever"]["query"], batch["queries"], query_key)
    passages_NxD = models.vectors(params["retriever"]["passage"], batch["passages"], passage_key)
    scores_BxN = gather(queries_BxD) @ gather(passages_NxD).T
    where_BxN, positive_BxN = gather(batch["where"]), gather(batch["positive"])
    loss = losses.listwise(scores_BxN, positive_BxN, where_BxP=where_BxN)
    return loss, {"loss": loss}


def reranker_loss(models: Models, params, batch, key, gather):
    """Listwise cross-entropy of the re-ranker (paper eq. 5)."""
    positive_BxP, where_BxP = gather(batch["positive"]), gather(batch["where"])
    scores_N = gather(models.reranker_scores(params["reranker"], batch["pairs"], key))
    loss = losses.listwise(scores_N.reshape(where_BxP.shape), positive_BxP, where_BxP=where_BxP)
    return loss, {"loss": loss}


def joint_loss(models: Models, settings, params, batch, key, gather):
    """Both models score the same lists (paper eq. 6); `settings` choose the reading of the loss."""
    query_key, passage_key, pair_key = jax.random.split(key, 3)
    queries_BxD = models.vectors(params["retriever"]["query"], batch["queries"], query_key)
    passages_NxD = models.vectors(params["retriever"]["passage"], batch["passages"], passage_key)
    retriever_BxP = gather(retriever_scores(queries_BxD, passages_NxD))
    pairs_N = gather(models.reranker_scores(params["reranker"], batch["pairs"], pair_key))
    return losses.joint_distillation(
        retriever_BxP,
        pairs_N.reshape(retriever_BxP.shape),
        gather(batch["positive"]),
        where_BxP=gather(batch["where"]),
        **settings,
    )


def make_optimizer(settings, stage, total_steps: int) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (none on biases and norms) after clipping the global norm."""
    if stage.schedule == "linear":
        decay_steps = max(total_steps - stage.warmup_steps, 1)
        schedule = optax.linear_schedule(stage.learning_rate, 0.0, decay_steps)
    else:
        schedule = optax.constant_schedule(stage.learning_rate)
    if stage.warmup_steps:
        warmup = optax.linear_schedule(0.0, stage.learning_rate, stage.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [stage.warmup_steps])

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key not in ("bias", "scale"), params
        )

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            schedule,
            b1=settings.b1,
            b2=settings.b2,
            weight_decay=settings.weight_decay,
            mask=decayed,
        ),
    )


def init_state(params, optimizer: optax.GradientTransformation, sharding: Sharding) -> TrainState:
    """Step 0; the optimizer state is made on the devices, sharded as the params are."""
    params = sharding.put_params(params)
    opt_shapes = jax.eval_shape(optimizer.init, params)
    opt_state = jax.jit(optimizer.init, out_shardings=sharding.of_params(opt_shapes))(params)
    return TrainState(sharding.put_params(jnp.zeros((), jnp.int32)), params, opt_state)


def train_step(state: TrainState, batch, dropout_key, *, grad_fn, optimizer):
    """One update. The dropout key of step s is a function of (dropout_key, s) alone.

    Returns:
      The next state, and the loss terms with the norm of the gradient before clipping.
    """
    key = jax.random.fold_in(dropout_key, state.step)
    (_, terms), grads = grad_fn(state.params, batch, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    terms = {**terms, "gradient_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state), terms


def make_step(loss_fn, optimizer, sharding: Sharding) -> Callable:
    """`train_step` compiled for the mesh; the state it is given is donated."""
    step = partial(train_step, grad_fn=sharding.value_and_grad(loss_fn), optimizer=optimizer)
    return jax.jit(step, donate_argnums=0)


class Hooks(NamedTuple):
    """What the loop calls on its way; each gets the number of steps done."""

    evaluate: Callable[[int, Any], None]  # (step, params)
    save: Callable[[int, TrainState], None]
    log: Callable[[int, dict[str, float]], None]


def train(
    state: TrainState,
    *,
    step_fn,
    batches: Callable[[int], Iterator],
    dropout_key,
    total_steps: int,
    stage,
    hooks: Hooks,
    name: str,
) -> TrainState:
    """Runs to `total_steps` from wherever `state` stands: evaluate, save, draw a batch, step.

    Steps are dispatched ahead: the terms of a step are read after the next one was dispatched, so
    the host never waits for the step it has just started.

    Args:
      batches: `batches(first_step)` gives the device batches from that step on.
      stage: the stage's settings (`log_every`, `evaluate_every`, `save_every`, `batch`).
      name: shown on the progress bar.
    """
    first = int(state.step)
    window: list[dict] = []
    started = time.monotonic()

    def flush(step, terms):
        nonlocal window, started
        means = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(terms))
        # Only now have the steps been computed; before, they had been dispatched.
        now = time.monotonic()
        hooks.log(step, {**means, "lists_per_second": len(terms) * stage.batch / (now - started)})
        started = now

    pending: tuple[int, list[dict]] | None = None
    stream = batches(first) if first < total_steps else iter(())
    with tqdm.tqdm(total=total_steps, initial=first, desc=name, unit="step", smoothing=0.1) as bar:
        for step in range(first, total_steps):
            if step % stage.evaluate_every == 0:
                pause = time.monotonic()
                hooks.evaluate(step, state.params)
                started += time.monotonic() - pause
            if step % stage.save_every == 0 and step > first:
                hooks.save(step, state)
            state, terms = step_fn(state, next(stream), dropout_key)
            if pending is not None:
                flush(*pending)
                pending = None
            window.append(terms)
            if (step + 1) % stage.log_every == 0:
                pending, window = (step + 1, window), []
            if len(window) > 1:
                # Bounds how far the host runs ahead of the devices.
                jax.block_until_ready(window[-2]["loss"])
            bar.update()
        if pending is not None:
            flush(*pending)
        if window:
            flush(total_steps, window)
        if first < total_steps:
            hooks.evaluate(total_steps, state.params)
            hooks.save(total_steps, state)
    return state
