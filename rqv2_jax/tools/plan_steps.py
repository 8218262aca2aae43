"""One step of a run, compiled ahead of time for devices that are not there, or counted.

Shape suffixes: S parts of a batch, B lists of a part, L lists, N sequences of a list or a step.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rqv2_jax.data import batches as batches_lib
from rqv2_jax.data import packing
from rqv2_jax.errors import InputError
from rqv2_jax.models import bert, random_model
from rqv2_jax.models.scoring import TOWERS, Models, init_reranker, tower
from rqv2_jax.retrieval import stream
from rqv2_jax.room import GIB
from rqv2_jax.tools import hlo, workload
from rqv2_jax.tools.machines import Machine
from rqv2_jax.tools.workload import Lengths
from rqv2_jax.training import stages, train
from rqv2_jax.training.sharding import Sharding

TOKENS_A_CHIP = 2**15  # of one forward pass, to start with
# Bytes of one device, cost, seconds of compiling.
Compiled = tuple[int, hlo.Cost, float]


class Step(NamedTuple):
    """One step, compiled or counted; all but `items` is per device, sizes in bytes."""

    name: str
    remat: str
    accumulate: int
    tokens: int  # those computed
    items: int  # lists or sequences of one step, over all devices
    formula: float  # FLOPs of a plain encoder on the real tokens alone
    gradients: int
    memory: int
    cost: hlo.Cost
    compile_seconds: float

    def seconds(self, machine: Machine) -> float:
        """Returns the least time: products at their peak or memory at its peak, then the links."""
        busy = max(self.cost.flops / machine.flops, self.cost.bytes / machine.bandwidth)
        return busy + sum(self.cost.collective_bytes.values()) / machine.links


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile or count for, as a mesh; `report` gets a line for each try."""

    machine: Machine
    mesh: Sharding
    report: Callable[[str], None]

    def compile(self, fn: Any, arguments: tuple, what: str) -> Compiled | None:
        """Compiles a jitted function; returns None if the memory is too small."""
        start = time.monotonic()
        try:
            compiled = fn.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            wanted = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(error))
            needs = f"needs {wanted[1]} of {wanted[2]}" if wanted else "needs more memory"
            self.report(f"{what}: {needs}, does not fit")
            return None
        seconds, memory = time.monotonic() - start, program_memory(compiled)
        fits = memory <= self.machine.memory
        verdict = "fits" if fits else "does not fit"
        self.report(f"{what}: {memory / GIB:.2f} GiB, {verdict} ({seconds:.0f} s)")
        return (memory, hlo.cost(compiled.as_text() or ""), seconds) if fits else None

    def count(self, least: float, formula: float, trained: dict, what: str) -> Compiled:
        """Counts a step of `least` bytes or more; it reads and writes `trained` with Adam's moments."""
        size = _bytes(trained)
        cost = hlo.Cost(flops=formula, bytes=7.0 * size)
        if self.mesh.shards > 1 and trained:
            cost.collectives["all-reduce"] = 1
            cost.collective_bytes["all-reduce"] = size
        self.report(f"{what}: {least / GIB:.2f} GiB or more, counted, not compiled")
        return int(least), cost, 0.0


def train_step(
    config: ConfigDict, models: Models, name: str, drawn: Lengths, target: Target
) -> Step | None:
    """Compiles or counts the step of a training stage; returns None if it does not fit."""
    settings, stage, mesh = config[name], stages.make_stage(config, models, name), target.mesh
    slots_SxB = batches_lib.slots(settings.batch, mesh.shards, stage.accumulate)
    kinds = [kind for model in stage.models for kind in batches_lib.READS[model]]
    shapes: dict[str, tuple[packing.Shape, ...]] = {}
    formula = 0.0
    for kind in kinds:
        lengths_BxN = batches_lib.by_part(drawn[kind], settings.batch, slots_SxB)
        if models.flat:
            tokens = int(lengths_BxN.sum(axis=1).max())
            shapes[kind] = (packing.plan_flat(tokens, lengths_BxN.shape[1]),)
        else:
            longest_N = np.sort(lengths_BxN, axis=1).max(axis=0)
            shapes[kind] = packing.plan(longest_N, config.packing.blocks)
        flops = workload.training_flops(config, models, name, kind, drawn[kind])
        formula += flops / (len(drawn[kind]) / settings.batch) / mesh.shards
    params = abstract_params(models, stage.models, mesh)
    parts, remat = stage.accumulate, models.retriever.remat
    what = f"{name}, rematerialised: {remat}, in {parts} part{'s' * (parts > 1)}"
    least = _least_bytes(models, shapes, params, mesh)
    if least > target.machine.memory:
        target.report(f"{what}: needs {least / GIB:.1f} GiB or more, not compiled")
        return None
    if target.machine.counted:
        compiled: Compiled | None = target.count(least, formula, params, what)
    else:
        counts = {kind: drawn[kind].shape[1] for kind in kinds}
        batch = _abstract_batch(stage, slots_SxB, shapes, counts, mesh)
        optimizer = train.make_optimizer(config.optimizer, settings, 1000, stage.rates)
        step, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
        state, key = _sharded(((step, params, jax.eval_shape(optimizer.init, params)), key), mesh)
        step_fn = train.make_step(stage.loss_fn, optimizer, mesh, by_part=stage.by_part)
        compiled = target.compile(step_fn, (train.TrainState(*state), batch, key), what)
    if compiled is None:
        return None
    tokens = sum(map(packing.size, shapes.values())) * parts
    gradients = _bytes(params)
    return Step(name, remat, parts, tokens, settings.batch, formula, gradients, *compiled)


def forward_step(
    config: ConfigDict, models: Models, name: str, drawn: Lengths, target: Target
) -> Step:
    """Compiles or counts the step "encode" or "re-rank", of as many tokens at once as fit."""
    mesh = target.mesh
    if name == "encode":
        fn, kind, longest = models.vectors, "passages", config.data.passage_length
        params = abstract_params(models, ("retriever",), mesh)["retriever"]
        params = tower(params, "passage")
    else:
        fn, kind, longest = models.reranker_scores, "pairs", config.data.pair_length
        params = abstract_params(models, ("reranker",), mesh)["reranker"]
    encoder, usual_N = workload.encoder(models, kind), drawn[kind].reshape(-1)
    limit = TOKENS_A_CHIP
    while limit >= longest:
        shapes = stream.plan(usual_N, longest, limit, config.packing.blocks).usual
        rows, tokens = sum(block.rows for block in shapes), packing.size(shapes)
        what = f"{name}, {rows} rows of {tokens} tokens together a device"
        formula = rows * workload.forward_flops(encoder, usual_N) / len(usual_N)
        if target.machine.counted:
            least = _bytes(params) + _itemsize(encoder) * tokens * _layer_values(encoder)
            compiled: Compiled | None = target.count(least, formula, {}, what)
        else:
            inputs = params, _packed(mesh.shards, shapes, rows, mesh.batch)
            compiled = target.compile(mesh.per_shard(fn), inputs, what)
        if compiled is not None:
            return Step(name, "", 1, tokens, rows * mesh.shards, formula, 0, *compiled)
        limit //= 2
    raise InputError(
        f"{name}: no row of {longest} tokens fits on {target.machine.topology}; take larger chips"
    )


def abstract_params(models: Models, names: tuple[str, ...], mesh: Sharding) -> dict[str, Any]:
    """Returns the sharded shapes of the params of "retriever", "reranker" or both."""
    made = {}
    if "retriever" in names:
        encoder = random_model.params_like(models.retriever)
        made["retriever"] = dict.fromkeys(TOWERS[models.towers], encoder)
    if "reranker" in names:
        shape = models.reranker
        made["reranker"] = jax.eval_shape(
            lambda encoder, key: init_reranker(encoder, shape, key),
            *(random_model.params_like(shape), jax.random.key(0)),
        )
        if models.head == "pooler":
            size = shape.hidden_size
            kernel, bias = (jax.ShapeDtypeStruct(x, jnp.float32) for x in ((size, size), (size,)))
            made["reranker"]["head"]["pooler"] = {"kernel": kernel, "bias": bias}
    return _sharded(made, mesh)


def _sharded(tree: Any, mesh: Sharding) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, mesh.of_params(tree)
    )


def _abstract_batch(
    stage: stages.Stage, slots_SxB: np.ndarray, shapes: dict, counts: dict, mesh: Sharding
) -> dict[str, Any]:
    """Returns a stage's batch without values; a list has `counts` sequences of each kind."""
    parts, lists = slots_SxB.shape
    batch = {
        kind: _packed(parts, shapes[kind], lists * counts[kind], mesh.batch) for kind in shapes
    }
    labels = {"positive": stage.list_size, "where": stage.list_size}
    if stage.in_batch:
        every = slots_SxB.size * stage.list_size
        labels |= {"in_batch_positive": every, "in_batch_where": every}
    return batch | {
        label: jax.ShapeDtypeStruct((parts, lists, count), bool, sharding=mesh.batch)
        for label, count in labels.items()
    }


def _packed(
    parts: int, shapes: tuple[packing.Shape, ...], sequences: int, sharding: Any
) -> packing.Packed:
    """Returns inputs without values: in each of `parts`, `sequences` in rows of these shapes."""

    def numbers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((parts, *shape), jnp.int32, sharding=sharding)

    tokens = [numbers(shape.rows, shape.width) for shape in shapes]
    first = [numbers(shape.rows, shape.slots) for shape in shapes]
    blocks = tuple(packing.Block(x, x, x, x, slots) for x, slots in zip(tokens, first))
    return packing.Packed(blocks, numbers(sequences))


def _itemsize(encoder: bert.BertConfig) -> int:
    return jnp.dtype(encoder.dtype).itemsize


def _layer_values(encoder: bert.BertConfig) -> int:
    """Returns how many values a layer's functions keep for a token, besides attention's weights."""
    return 24 * encoder.hidden_size + 7 * encoder.intermediate_size


def _least_bytes(models: Models, shapes: dict, params: dict, mesh: Sharding) -> float:
    """Estimates the fewest bytes a training step can need: state, gradients, kept activations."""
    size, kept, busiest = _bytes(params), 0.0, 0.0
    for kind, blocks in shapes.items():
        encoder = workload.encoder(models, kind)
        d, f, width = encoder.hidden_size, encoder.intermediate_size, _itemsize(encoder)
        tokens = packing.size(blocks)
        layer = tokens * _layer_values(encoder)
        if encoder.attention != "ragged":
            layer += 12 * encoder.num_heads * sum(block.rows * block.width**2 for block in blocks)
        values = {"none": layer, "dots": tokens * (6 * d + f), "full": tokens * d}[encoder.remat]
        kept += width * encoder.num_layers * values
        busiest = max(busiest, width * layer)
    if models.retriever.remat != "none":
        # One layer at a time is computed again, and then keeps all.
        kept += busiest
    # Weights and both of Adam's moments, split over fsdp; whole weights' gradients.
    return 3.0 * size / mesh.mesh.shape["fsdp"] + size + kept


def _bytes(tree: Any) -> int:
    """Returns the bytes of float32 arrays."""
    return 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def program_memory(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes of a device that a program needs: arguments, results, all between, code."""
    stats: Any = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
