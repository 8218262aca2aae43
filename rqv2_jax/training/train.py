"""One pure training step and one loop for all three training stages.

A stage supplies its loss and its batches. Shape suffixes: B lists, P passages of a list, N all
passages of the global batch, D vector size.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from rqv2_jax.errors import InputError
from rqv2_jax.models import losses
from rqv2_jax.models.scoring import Models, retriever_scores
from rqv2_jax.training.sharding import Sharding

# Of the lists that a CPU computes at once: what their layers hold stays in its caches.
CPU_TOKENS = 10_000


class TrainState(NamedTuple):
    """All that changes from step to step; arrays only. `params` is keyed by model."""

    step: jax.Array
    params: Any
    opt_state: Any


def _vectors(models: Models, params, batch, query_key, passage_key):
    """The batch's queries [B, D], scaled, and passages [B*P, D] by the two towers.

    The scale belongs to no one loss term, so it is in the queries, which all terms read.
    """
    queries_BxD = models.scale * models.vectors(params["query"], batch["queries"], query_key)
    return queries_BxD, models.vectors(params["passage"], batch["passages"], passage_key)


def _in_batch(queries_BxD, passages_NxD, batch, gather):
    """Listwise cross-entropy of each query over all passages of the global batch."""
    return losses.listwise(
        gather(queries_BxD) @ gather(passages_NxD).T,
        gather(batch["in_batch_positive"]),
        where_BxP=gather(batch["in_batch_where"]),
    )


def retriever_loss(models: Models, params, batch, key, gather):
    """In-batch negatives: every passage of the global batch that is not a positive of the query."""
    vectors = _vectors(models, params["retriever"], batch, *jax.random.split(key))
    loss = _in_batch(*vectors, batch, gather)
    return loss, {"loss": loss}


def reranker_loss(models: Models, params, batch, key, gather):
    """Listwise cross-entropy of the re-ranker (paper eq. 5)."""
    positive_BxP, where_BxP = gather(batch["positive"]), gather(batch["where"])
    scores_N = gather(models.reranker_scores(params["reranker"], batch["pairs"], key))
    loss = losses.listwise(scores_N.reshape(where_BxP.shape), positive_BxP, where_BxP=where_BxP)
    return loss, {"loss": loss}


def joint_loss(models: Models, settings, params, batch, key, gather):
    """Both models score the same lists: weighted KL, supervised and in-batch terms.

    Paper eq. 6 is weight 1 for the KL term and 0 for the in-batch one, the retriever's own listwise
    cross-entropy over all passages of the batch.

    Args:
      settings: the joint stage's (`loss`, the reading of the loss; `kl_weight`; `in_batch_weight`;
        `accumulate`; `train_reranker`, without which the re-ranker gets no gradient).
    """
    query_key, passage_key, pair_key = jax.random.split(key, 3)
    vectors = _vectors(models, params["retriever"], batch, query_key, passage_key)
    reranker = params["reranker"]
    if not settings["train_reranker"]:
        reranker, pair_key = jax.lax.stop_gradient(reranker), None
    pairs_N = gather(models.reranker_scores(reranker, batch["pairs"], pair_key))
    retriever_BxP = gather(retriever_scores(*vectors))
    _, terms = losses.joint_distillation(
        retriever_BxP,
        pairs_N.reshape(retriever_BxP.shape),
        gather(batch["positive"]),
        where_BxP=gather(batch["where"]),
        **settings["loss"],
    )
    if settings["loss"]["kl_reduction"] == "sum":
        # The parts of a batch are averaged, but this term is a sum over its lists.
        terms["kl"] *= settings["accumulate"]
    loss = settings["kl_weight"] * terms["kl"] + terms["supervised"]
    if settings["in_batch_weight"] > 0:
        terms["in_batch"] = _in_batch(*vectors, batch, gather)
        loss += settings["in_batch_weight"] * terms["in_batch"]
    return loss, {**terms, "loss": loss}


class Stage(NamedTuple):
    """What a training stage computes: its loss, the models in it, and how its batches are made."""

    loss_fn: Callable
    models: tuple[str, ...]  # keys of the params
    rates: dict[str, float]  # by model, as `make_optimizer` takes them
    list_size: int
    in_batch: bool  # whether batches have labels over all their passages
    accumulate: int


def make_stage(config, models: Models, name: str) -> Stage:
    """The stage "retriever", "reranker" or "joint" of a config."""
    settings = config[name]
    if name == "retriever":
        return Stage(partial(retriever_loss, models), ("retriever",), {}, 1, True, 1)
    accumulate = _parts(config, name)
    if name == "reranker":
        loss_fn, trained, rates = partial(reranker_loss, models), ("reranker",), {}
        in_batch = False
    else:
        own = settings.to_dict() | {"accumulate": accumulate}
        loss_fn, trained = partial(joint_loss, models, own), ("retriever", "reranker")
        rates = {"reranker": settings.reranker_rate if settings.train_reranker else 0.0}
        in_batch = settings.in_batch_weight > 0
    return Stage(loss_fn, trained, rates, settings.list_size, in_batch, accumulate)


def _parts(config, name: str) -> int:
    """In how many parts a device computes its lists of a batch."""
    settings, data = config[name], config.data
    if settings.accumulate:
        return settings.accumulate
    if jax.default_backend() != "cpu" or (name == "joint" and settings.in_batch_weight > 0):
        return 1
    passages = 0 if name == "reranker" else data.passage_length
    tokens = data.query_length + settings.list_size * (passages + data.pair_length)
    most, shards = max(CPU_TOKENS // tokens, 1), config.mesh.data * config.mesh.fsdp
    return next(
        parts
        for parts in range(1, settings.batch + 1)
        if settings.batch % parts == 0 and settings.batch <= most * parts * shards
    )


def make_optimizer(
    settings, stage, total_steps: int, rates: Mapping[str, float] = MappingProxyType({})
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (none on biases and norms) after clipping the global norm.

    `rates` says with which multiple of the stage's learning rate a model learns, 1 if it says nothing.
    Models with 0 stay as they are and have no optimizer state.
    """
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

    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            schedule,
            b1=settings.b1,
            b2=settings.b2,
            weight_decay=settings.weight_decay,
            mask=decayed,
        ),
        optax.stateless(
            lambda updates, _: {
                model: optax.tree.scale(rates.get(model, 1.0), tree)
                for model, tree in updates.items()
            }
        ),
    )
    frozen = [model for model, rate in rates.items() if rate == 0]
    if not frozen:
        return optimizer
    return optax.partition(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        lambda params: {model: "frozen" if model in frozen else "trained" for model in params},
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


def check_finite(stage: str, step: int, terms: Mapping[str, Any]):
    """Raises InputError, which names stage, step and terms, if a number of a step is not finite."""
    wrong = [f"{term} is {float(x):g}" for term, x in terms.items() if not np.isfinite(x)]
    if wrong:
        raise InputError(
            f"{stage}, step {step}: {', '.join(wrong)}; the last checkpoint before it stays, and the "
            f"same command resumes from there; if it stops here again, lower config.{stage}."
            "learning_rate, in a new --workdir"
        )


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
    stop: int | None = None,
) -> TrainState:
    """Runs to `total_steps` from wherever `state` stands: evaluate, save, draw a batch, step.

    With `stop`, it saves there and returns; another call goes on from that state.

    Steps are dispatched ahead: the terms of a step are read after the next one was dispatched, so
    the host never waits for the step it has just started. Before anything is saved, all are read.

    Args:
      batches: `batches(first_step)` gives the device batches from that step on.
      stage: the stage's settings (`log_every`, `evaluate_every`, `save_every`, `batch`).
      name: shown on the progress bar.

    Raises:
      InputError: a term is not finite; nothing has been saved since.
    """
    first, stop = int(state.step), total_steps if stop is None else stop
    window: list[dict] = []
    started = time.monotonic()

    def flush(step, terms):
        nonlocal window, started
        means = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(terms))
        # Only now have the steps been computed; before, they had been dispatched.
        now = time.monotonic()
        hooks.log(step, {**means, "lists_per_second": len(terms) * stage.batch / (now - started)})
        started = now

    unread: list[tuple[int, dict]] = []

    def read(*, but: int = 0):
        while len(unread) > but:
            number, terms = unread.pop(0)
            check_finite(name, number, jax.device_get(terms))

    pending: tuple[int, list[dict]] | None = None
    stream = batches(first) if first < stop else iter(())
    with tqdm.tqdm(total=total_steps, initial=first, desc=name, unit="step", smoothing=0.1) as bar:
        for step in range(first, stop):
            if step % stage.evaluate_every == 0:
                read()
                pause = time.monotonic()
                hooks.evaluate(step, state.params)
                started += time.monotonic() - pause
            if step % stage.save_every == 0 and step > first:
                read()
                hooks.save(step, state)
            state, terms = step_fn(state, next(stream), dropout_key)
            unread.append((step + 1, terms))
            # Bounds, too, how far the host runs ahead of the devices.
            read(but=1)
            if pending is not None:
                flush(*pending)
                pending = None
            window.append(terms)
            if (step + 1) % stage.log_every == 0:
                pending, window = (step + 1, window), []
            bar.update()
        read()
        if pending is not None:
            flush(*pending)
        if window:
            flush(stop, window)
        if first < stop:
            if stop == total_steps:
                hooks.evaluate(stop, state.params)
            hooks.save(stop, state)
    return state
