"""One pure training step and one loop for all three training stages, which `stages` describes."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax import Array
from jax.tree_util import tree_map_with_path
from ml_collections import ConfigDict

from rqv2_jax import hosts, stopping
from rqv2_jax.errors import InputError
from rqv2_jax.models.bert import Params
from rqv2_jax.training.sharding import Sharding

# Seconds after which a state is saved, however many steps are left until `save_every`; and the steps
# after which several processes look at the clock.
SAVED_AFTER, ASKED_EVERY = 600.0, 16

Terms = dict[str, Any]  # of a loss, by name
Optimizer: TypeAlias = optax.GradientTransformation


class TrainState(NamedTuple):
    """All that changes from step to step; arrays only. `params` is keyed by model."""

    step: Array
    params: Params
    opt_state: Any


def make_optimizer(
    settings: ConfigDict, stage: ConfigDict, total_steps: int, rates: Mapping[str, float]
) -> Optimizer:
    """Returns Adam with decoupled weight decay (none on biases and norms) after clipping the norm.

    The norm is over all models of the stage, or over each of them if `settings.clip` is "apart".

    `rates` are the models' multiples of the stage's learning rate, 1 if a model has none. Models with
    rate 0 stay as they are and have no optimizer state.
    """
    if stage.schedule == "linear":
        decay_steps = max(total_steps - stage.warmup_steps, 1)
        schedule = optax.linear_schedule(stage.learning_rate, 0.0, decay_steps)
    else:
        schedule = optax.constant_schedule(stage.learning_rate)
    if stage.warmup_steps:
        warmup = optax.linear_schedule(0.0, stage.learning_rate, stage.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [stage.warmup_steps])

    def decays(path: tuple, _: Array) -> bool:
        return path[-1].key not in ("bias", "scale")

    def scale(updates: Params, _: Params) -> Params:
        return {model: optax.tree.scale(rates.get(model, 1.0), x) for model, x in updates.items()}

    betas, mask = {"b1": settings.b1, "b2": settings.b2}, partial(tree_map_with_path, decays)
    clip = whole = optax.clip_by_global_norm(settings.clip_norm)
    if settings.clip == "apart":
        # What one model's gradient is clipped to does not depend on the other's.
        clip = optax.stateless(
            lambda updates, _: {
                model: whole.update(x, whole.init(x))[0] for model, x in updates.items()
            }
        )
    optimizer = optax.chain(
        clip,
        optax.adamw(schedule, **betas, weight_decay=settings.weight_decay, mask=mask),
        optax.stateless(scale),
    )
    frozen = [model for model, rate in rates.items() if rate == 0]
    if not frozen:
        return optimizer
    return optax.partition(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        lambda params: {model: "frozen" if model in frozen else "trained" for model in params},
    )


def init_state(params: Params, optimizer: Optimizer, sharding: Sharding) -> TrainState:
    """Returns the state of step 0; the optimizer's is made on the devices, sharded as the params."""
    params = sharding.put_params(params)
    opt_shapes = jax.eval_shape(optimizer.init, params)
    opt_state = jax.jit(optimizer.init, out_shardings=sharding.of_params(opt_shapes))(params)
    return TrainState(sharding.put_params(jnp.zeros((), jnp.int32)), params, opt_state)


def state_shapes(params: Params, optimizer: Optimizer, sharding: Sharding) -> TrainState:
    """Returns the shapes and shardings of the state that `init_state` makes, which takes no memory."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    opt_state = jax.eval_shape(optimizer.init, shapes)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, shapes, opt_state)

    def placed(shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    return jax.tree.map(placed, state, sharding.of_params(state))


def train_step(
    state: TrainState, batch: Any, dropout_key: Array, *, grad_fn: Callable, optimizer: Optimizer
) -> tuple[TrainState, Terms]:
    """Makes one update. The dropout key of step s is a function of (dropout_key, s) alone.

    Returns the next state, and the loss terms with the norm of the gradient before clipping.
    """
    key = jax.random.fold_in(dropout_key, state.step)
    (_, terms), grads = grad_fn(state.params, batch, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    terms = {**terms, "gradient_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state), terms


def make_step(
    loss_fn: Callable, optimizer: Optimizer, sharding: Sharding, *, by_part: bool = False
) -> Callable:
    """Returns `train_step` compiled for the mesh; the state it is given is donated.

    `by_part` as in `Sharding.value_and_grad`.
    """
    grad_fn = sharding.value_and_grad(loss_fn, by_part=by_part)
    step = partial(train_step, grad_fn=grad_fn, optimizer=optimizer)
    return jax.jit(step, donate_argnums=0)


class Hooks(NamedTuple):
    """The functions that the loop calls on its way; each gets the number of steps done."""

    evaluate: Callable[[int, Any], None]  # (step, params)
    save: Callable[[int, TrainState], None]
    log: Callable[[int, dict[str, float]], None]


def check_finite(stage: str, step: int, terms: Mapping[str, Any]) -> None:
    """Raises InputError, which names stage, step and terms, if a number of a step is not finite."""
    wrong = [f"{term} is {float(x):g}" for term, x in terms.items() if not np.isfinite(x)]
    if wrong:
        raise InputError(
            f"{stage}, step {step}: {', '.join(wrong)}; the last checkpoint before it stays, and the "
            f"same command resumes from there; if it stops here again, lower config.{stage}."
            "learning_rate, in a new --workdir"
        )


class _Log:
    """The terms of steps on their way from the devices to the log.

    A step's terms are read once the next is dispatched: the host is one step ahead, and never waits.
    """

    def __init__(self, stage: ConfigDict, name: str, log: Callable[[int, dict[str, float]], None]):
        self.stage, self.name, self.log = stage, name, log
        self.started, self.step, self.window = time.monotonic(), 0, list[Terms]()

    def add(self, step: int, terms: Terms) -> None:
        """Takes a dispatched step's terms; checks the step before, and logs if it was time to."""
        self.check()
        if self.window and self.step % self.stage.log_every == 0:
            self.write()
        self.step = step
        self.window.append(terms)

    def check(self) -> None:
        """Waits for the last step; raises InputError if one of its terms is not finite."""
        if self.window:
            check_finite(self.name, self.step, jax.device_get(self.window[-1]))

    def write(self) -> None:
        """Logs the means of the terms since the last log."""
        means = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(self.window))
        # Only now have the steps been computed; before, they had been dispatched.
        now = time.monotonic()
        rate = len(self.window) * self.stage.batch / (now - self.started)
        self.log(self.step, {**means, "lists_per_second": rate})
        self.started, self.window = now, []


# size: nine parameters, all given by name in the one call.
def train(
    state: TrainState,
    *,
    step_fn: Callable,
    batches: Callable[[int], Iterator],
    dropout_key: Array,
    total_steps: int,
    stage: ConfigDict,
    hooks: Hooks,
    name: str,
    stop: int | None = None,
) -> TrainState:
    """Runs from the step of `state` to `total_steps`: evaluate, save, draw a batch, step.

    With `stop`, it saves there and returns; another call goes on from that state. Before anything is
    saved, the terms of all steps are checked: one that is not finite raises InputError. It saves at
    least every `SAVED_AFTER` seconds, and, of one process, before KeyboardInterrupt leaves it; several
    save and raise `stopping.Terminated` when one has received SIGTERM.

    Args:
      step_fn: from `make_step`.
      batches: `batches(first_step)` gives the device batches from that step on.
      stage: the stage's settings (`log_every`, `evaluate_every`, `save_every`, `batch`).
      name: of the stage; shown on the progress bar.
    """
    first, stop = int(state.step), total_steps if stop is None else stop
    if first >= stop:
        return state
    log, stream, done, saved = _Log(stage, name, hooks.log), batches(first), first, time.monotonic()
    with tqdm.tqdm(total=total_steps, initial=first, desc=name, unit="step", smoothing=0.1) as bar:
        try:
            for step in range(first, stop):
                if step % stage.evaluate_every == 0:
                    log.check()
                    pause = time.monotonic()
                    hooks.evaluate(step, state.params)
                    log.started += time.monotonic() - pause
                if step > first and (step % stage.save_every == 0 or _overdue(step, saved)):
                    log.check()
                    hooks.save(step, state)
                    saved = time.monotonic()
                batch = next(stream)
                with stopping.held():
                    # The state before is gone as soon as the step begins.
                    state, terms = step_fn(state, batch, dropout_key)
                    done = step + 1
                log.add(done, terms)
                if jax.default_backend() == "cpu":
                    # A step that is dispatched ahead has its memory beside that of the one at work,
                    # and the CPU's caches have both: a fifth of the time.
                    log.check()
                bar.update()
                if hosts.stop_asked(done):
                    log.check()
                    hooks.save(done, state)
                    raise stopping.Terminated
            log.check()
            log.write()
            if stop == total_steps:
                hooks.evaluate(stop, state.params)
            hooks.save(stop, state)
        except KeyboardInterrupt:
            # Several processes save together or not at all, and of Ctrl-C only one of them knows.
            if jax.process_count() == 1:
                log.check()
                hooks.save(done, state)
            raise
    return state


def _overdue(step: int, saved: float) -> bool:
    """Says whether a state was saved too long ago; several processes ask the first now and then."""
    if jax.process_count() > 1 and step % ASKED_EVERY:
        return False
    return hosts.from_first(lambda: time.monotonic() - saved > SAVED_AFTER)
