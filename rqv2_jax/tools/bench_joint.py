"""The speed of joint training: its steps, beside a rival's, and its batches.

Shape suffixes: L lists, P passages of a list, N sequences.
"""

import collections
import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from ml_collections import ConfigDict

from rqv2_jax import config as config_lib
from rqv2_jax.data import packing
from rqv2_jax.data.batches import KINDS, ListBatches
from rqv2_jax.data.lists import Lists, Provenance
from rqv2_jax.errors import InputError
from rqv2_jax.models import random_model
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.stage import stage_batches
from rqv2_jax.room import GIB
from rqv2_jax.tools import hlo, machines, plan_steps, rivals, workload
from rqv2_jax.tools.workload import Texts
from rqv2_jax.training import stages, train

# Steps in a row that are timed before it is the rival's turn.
TURN = 3
# Share of its peak that a chip is taken to reach in training.
UTILISATION = 0.4


def joint_batches(run: Run, texts: Texts, steps: int) -> ListBatches:
    """Returns the batches of so many joint steps, of lists of random passages."""
    joint, stage = run.config.joint, stages.make_stage(run.config, run.models, "joint")
    count, size, passages = steps * joint.batch, joint.list_size, len(texts.passages)
    if size > passages:
        raise InputError(
            f"config.joint.list_size is {size}, but there are {passages} passages; raise --passages or "
            "lower it"
        )
    rng = np.random.default_rng(1)
    passages_LxP = np.stack([rng.choice(passages, size, replace=False) for _ in range(count)])
    provenance_LxP = np.full(passages_LxP.shape, Provenance.UNDENOISED_NEGATIVE)
    provenance_LxP[:, 0] = Provenance.LABELLED_POSITIVE
    lists = Lists(np.arange(count) % len(texts.queries), passages_LxP, provenance_LxP)
    return stage_batches(run, texts.store, "joint", stage, lists)


def _take_turns(
    takers: dict[str, "Joint | rivals.Joint"], total: int, turn: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Returns the seconds and the losses of each taker's steps, `turn` in a row by turns.

    Batches are made before the clock starts, as training makes them ahead. The first step of a turn is
    not counted: it takes back memory that the other has had in between, which can cost as much as the
    step itself. The very first step compiles; its seconds are returned apart.
    """
    seconds, losses = collections.defaultdict(list), collections.defaultdict(list)
    first_seconds: dict[str, float] = {}
    with tqdm.tqdm(desc="joint", total=total * len(takers), unit="step") as bar:
        for first in range(0, total, turn):
            for name, taker in takers.items():
                made = [taker.prepare(step) for step in range(first, first + turn)]
                for number, batch in enumerate(made):
                    started = time.perf_counter()
                    losses[name].append(taker.step(batch))
                    taken = time.perf_counter() - started
                    if number:
                        seconds[name].append(taken)
                    first_seconds.setdefault(name, taken)
                    bar.update()
    return seconds, losses, first_seconds


class Joint:
    """Our step of joint training, compiled before anything is timed, and the state it has reached."""

    def __init__(self, run: Run, config: ConfigDict, batches: ListBatches, steps: int):
        self.run, self.batches = run, batches
        self.stage = stages.make_stage(config, run.models, "joint")
        self.optimizer = train.make_optimizer(
            config.optimizer, config.joint, steps, self.stage.rates
        )
        self.key = jax.random.key(config.seed)
        self.restart()
        step_fn: Any = train.make_step(
            self.stage.loss_fn, self.optimizer, run.sharding, by_part=self.stage.by_part
        )
        example = run.sharding.put_batch(batches.make(0))
        started = time.perf_counter()
        self.compiled = step_fn.lower(self.state, example, self.key).compile()
        self.compile_seconds = time.perf_counter() - started

    def restart(self) -> None:
        """Goes back to the state before the first step."""
        self.state = None  # two states would need twice the memory
        initial = {model: self.run.initial(model) for model in self.stage.models}
        self.state = train.init_state(initial, self.optimizer, self.run.sharding)

    def prepare(self, step: int) -> Any:
        """Returns the batch of a step, on the devices."""
        return jax.block_until_ready(self.run.sharding.put_batch(self.batches.make(step)))

    def step(self, batch: Any) -> float:
        """Takes one step; returns its loss."""
        self.state, terms = self.compiled(self.state, batch, self.key)
        return float(terms["loss"])


def joint(run: Run, texts: Texts, steps: int, versus: bool) -> Iterator[dict]:
    """Measures steps of joint training on lists of random passages, at a constant learning rate.

    Yields one result, or one for each rival, which takes the same steps, some in a row by turns. Raises
    InputError if there are too few passages or the rival cannot train as the config says.
    """
    config = config_lib.loads(config_lib.dumps(run.config))
    settings = config.joint
    alike = settings.train_reranker and settings.loss.reranker_loss == "listwise"
    if versus and (settings.in_batch_weight or not alike):
        raise InputError(
            "--vs torch: the rival trains both models, listwise and without in-batch negatives; leave "
            "config.joint.{in_batch_weight,train_reranker,loss.reranker_loss} as they are"
        )
    settings.update({"schedule": "constant", "warmup_steps": 0})
    # Alone, ours is never interrupted.
    turn = 1 + (min(TURN, steps) if versus else steps)
    total = turn * -(-steps // (turn - 1))
    batches = joint_batches(run, texts, total)
    sequences = [{kind: batches.ragged(kind, step) for kind in KINDS} for step in range(total)]
    ours = Joint(run, config, batches, total)
    # XLA's text hides what GPUs and the kernel for them compute.
    compiled_flop = None
    if jax.default_backend() != "gpu" and not run.models.flat:
        compiled_flop = run.sharding.shards * hlo.cost(ours.compiled.as_text() or "").flops
    names = ("torch", "torch_compiled") if rivals.device() == "cuda" else ("torch",)
    for name in names if versus else ("",):
        takers: dict[str, Joint | rivals.Joint] = {"ours": ours}
        if name:
            takers[name] = rivals.Joint(run, sequences, compiled=name == "torch_compiled")
        ours.restart()
        taken, losses, first_seconds = _take_turns(takers, total, turn)
        line = _work_of_a_step(run, batches, sequences, float(np.median(taken["ours"])))
        model_flop = line["model_gflop"] * 1e9
        line |= {
            "step_seconds_slowest": max(taken["ours"]),
            "compile_seconds": ours.compile_seconds,
            "step_memory_gib": plan_steps.program_memory(ours.compiled) / GIB,
            "peak_memory_gib": machines.peak_memory(),
            "compiled_over_model_flop": compiled_flop and compiled_flop / model_flop,
            "losses": losses["ours"],
        }
        if name:
            line |= {"rival": name}
            line |= machines.against(name, "step_seconds", taken[name], taken["ours"])
            line |= {f"{name}_first_step_seconds": first_seconds[name]}
            line |= {f"{name}_losses": losses[name]}
        yield line


def _work_of_a_step(
    run: Run, batches: ListBatches, sequences: list[dict[str, packing.Ragged]], seconds: float
) -> dict:
    """Returns what a step computes and how fast that is, the mean over all steps."""
    settings, steps = run.config.joint, len(sequences)
    ragged = [x for each in sequences for x in each.values()]
    real = sum(len(x.tokens) for x in ragged) / steps
    padded = sum(len(x.lengths_N) * x.lengths_N.max() for x in ragged) / steps
    flops = sum(
        workload.training_flops(run.config, run.models, "joint", kind, x.lengths_N)
        for each in sequences
        for kind, x in each.items()
    )
    flops /= steps
    shards = len(batches.slots_SxB)
    computed = shards * sum(map(packing.size, batches.shapes.values()))
    return {
        "step_seconds": seconds,
        "lists_per_second": settings.batch / seconds,
        "pairs_per_second": settings.batch * settings.list_size / seconds,
        "real_tokens": real,
        "real_tokens_per_second": real / seconds,
        "computed_over_real_tokens": computed / real,
        "padded_over_real_tokens": padded / real,
        "model_gflop": flops / 1e9,
        **machines.shares_of_peak(run.config.model.dtype, flops / seconds / run.sharding.shards),
        "parts": shards // run.sharding.shards,
    }


def inputs(run: Run, texts: Texts, steps: int, step_seconds: float | None) -> dict:
    """Measures the making of joint batches alone, as the training loop gets them."""
    batches = joint_batches(run, texts, steps + 2)
    stream = batches.stream(0)
    next(stream)
    started = time.perf_counter()
    for _ in range(steps):
        next(stream)
    rate = steps * run.config.joint.batch / (time.perf_counter() - started)
    base: dict[str, Any] = random_model.BASE | {"num_layers": 12}
    encoder = dataclasses.replace(run.models.retriever, **base)
    # A query, 128 passages and as many pairs, at their full lengths.
    lengths_N = np.repeat((32, 128, 160), (1, 128, 128))
    flops = 3 * workload.forward_flops(encoder, lengths_N)
    wanted = 32 * UTILISATION * machines.CHIPS["v5e"][1] / flops
    cores = len(os.sched_getaffinity(0))
    line = {
        "lists_per_second": rate,
        "cores": cores,
        "lists_per_second_of_a_v5e_32_at_paper_scale": wanted,
        "cores_to_feed_it": wanted * 128 / (rate * run.config.joint.list_size / cores),
    }
    if step_seconds is not None:
        line["times_what_the_step_takes"] = rate * step_seconds / run.config.joint.batch
    return line
