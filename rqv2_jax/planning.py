"""A run's steps compiled for devices that are not there, and what follows for the whole run.

Every input has its full length, so figures are upper bounds: batches of real texts are shorter.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rqv2_jax import bert, hlo, train
from rqv2_jax import config as config_lib
from rqv2_jax import models as models_lib
from rqv2_jax import sharding as sharding_lib
from rqv2_jax import weights as weights_lib
from rqv2_jax.data import batches as batches_lib
from rqv2_jax.data.packing import WIDTH_MULTIPLE, Block, Packed
from rqv2_jax.errors import InputError
from rqv2_jax.workdir import read_shape

GIB = 2**30

# Of one chip, as its maker states them: bytes of main memory, bfloat16 operations a second, bytes a
# second of main memory and of the links to other chips.
CHIPS = {
    "v4": (32 * GIB, 275e12, 1228e9, 300e9),
    "v5e": (16 * GIB, 197e12, 819e9, 200e9),
    "v5p": (95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": (32 * GIB, 918e12, 1640e9, 448e9),
}
USABLE = 0.98  # of a chip's memory; the rest is the runtime's

# Devlin et al. 2019, and ERNIE 2.0 base: what is planned where the weights are not there yet.
BASE = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_heads": 12,
    "intermediate_size": 3072,
    "max_positions": 512,
    "type_vocab_size": 4,
    "layer_norm_eps": 1e-12,
    "activation": "gelu",
    "initializer_range": 0.02,
}

# Passages and training queries of the published data.
PUBLISHED = {"msmarco": (8_841_823, 502_939), "dpr": (21_015_324, 58_880)}

TOKENS_A_CHIP = 2**15  # of one forward pass, to start with


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for; rates are per device and second, `memory` in bytes."""

    topology: str
    devices: list
    memory: float
    flops: float
    bandwidth: float
    links: float


class Step(NamedTuple):
    """One compiled step on one device.

    `memory` and `gradients` in bytes, `tokens` and `formula` (FLOPs): each per device.
    """

    name: str
    remat: str
    accumulate: int
    memory: int
    tokens: int
    items: int  # lists or sequences of one step, over all devices
    formula: float
    gradients: int
    cost: hlo.Cost
    compile_seconds: float

    def seconds(self, machine: Machine) -> float:
        """No step can be faster: products at their peak or memory at its peak, then the links."""
        busy = max(self.cost.flops / machine.flops, self.cost.bytes / machine.bandwidth)
        return busy + sum(self.cost.collective_bytes.values()) / machine.links


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compiled steps by name, and the settings under which they fit."""

    steps: dict[str, Step]
    overlay: dict[str, object]
    hidden_size: int


def machine(topology: str) -> Machine:
    """The devices of a topology such as `v5e:4x8` or `cpu:8`.

    Raises:
      InputError: the name or the shape is not known, or libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit():
        count = int(shape)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        flops, bandwidth = _measure()
        each = (x / count for x in (memory, flops, bandwidth, bandwidth))
        return Machine(topology, jax.devices()[:count], *each)
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise InputError(
            f"--topology is {topology!r}; write one of {', '.join(CHIPS)} with a shape, as v5e:4x8 or "
            "v4:2x2x2, or cpu:N"
        )
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                "--topology: libtpu is not installed; pip install -r requirements-tpu.txt"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--topology {topology}: libtpu does not know it ({reason})") from None
    memory, *rates = CHIPS[kind]
    return Machine(topology, found.devices, USABLE * memory, *rates)


def _measure() -> tuple[float, float]:
    """This machine's matrix products (FLOPs) and copies (bytes) a second, best of a few."""
    matrix = jnp.ones((2048, 2048))
    large = np.ones(2**26, np.float32)
    multiply = jax.jit(lambda x: x @ x)

    def best(fn):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            fn()
            times.append(time.perf_counter() - start)
        return min(times)

    flops = 2 * 2048**3 / best(lambda: multiply(matrix).block_until_ready())
    return flops, 2 * large.nbytes / best(lambda: np.copyto(np.empty_like(large), large))


def forward_flops(config: bert.BertConfig, rows: int, width: int) -> float:
    """Of the matrix products of a plain encoder over `rows` sequences of `width` tokens.

    By layer and token 8 D^2 for attention's projections, 4 D T for attention, 4 D F for the
    feed-forward network.
    """
    d, f = config.hidden_size, config.intermediate_size
    return config.num_layers * rows * width * (8.0 * d**2 + 4.0 * width * d + 4.0 * d * f)


def make(config: ml_collections.ConfigDict, machine: Machine, report: Callable) -> Plan:
    """Compiles every step of a run; `report` gets a line for each try.

    Raises:
      InputError: the config cannot be used, or a step fits in no way.
    """
    config = config_lib.loads(config_lib.dumps(config))
    # No data is read here.
    config.data.path = config.data.path or "DIR"
    config_lib.check(config)
    fsdp = config.mesh.fsdp
    if len(machine.devices) % fsdp:
        raise InputError(
            f"config.mesh.fsdp is {fsdp}, which does not divide {len(machine.devices)} devices"
        )
    config.mesh.data = len(machine.devices) // fsdp
    mesh = sharding_lib.over(machine.devices, config.mesh.data, fsdp)
    shape = _shape(config, machine, report)
    overlay: dict[str, object] = {"mesh.data": config.mesh.data, "mesh.fsdp": fsdp}
    remats, steps = list(bert.REMAT), {}
    for name in ("joint", "reranker", "retriever"):
        if name == "retriever" and config.retriever.epochs == 0:
            continue
        steps[name] = step = _fitting(config, shape, mesh, name, remats, machine, report)
        remats = [step.remat]
        if name != "retriever":
            overlay |= {"model.remat": step.remat, f"{name}.accumulate": step.accumulate}
    for name in ("encode", "re-rank"):
        steps[name] = _forward_step(config, shape, mesh, name, machine, report)
    tokens = min(steps[name].tokens for name in ("encode", "re-rank"))
    overlay["evaluate.batch_tokens"] = tokens * len(machine.devices)
    return Plan(steps, overlay, shape.hidden_size)


def _shape(config, machine, report) -> bert.BertConfig:
    model = config.model
    try:
        shape = read_shape(config, weights_lib.find(model.weights).query)
    except InputError as error:
        report(f"planned with the shape of BERT base, because {error}")
        how = {
            name: model[name] for name in ("num_layers", "dropout", "dtype", "remat", "attention")
        }
        shape = bert.BertConfig(**BASE, **how, unrolled=False)
    return dataclasses.replace(shape, unrolled=machine.devices[0].platform == "cpu")


def _fitting(config, shape, mesh, name, remats, machine, report) -> Step:
    """The cheapest way in which a training step fits: keep all, fewer lists at once, compute again."""
    lists = -(-config[name].batch // mesh.shards)
    for remat in remats:
        for accumulate in range(1, 2 if name == "retriever" else lists + 1):
            own = config_lib.loads(config_lib.dumps(config))
            if name != "retriever":
                own[name].accumulate = accumulate
            wasteful = -(-config[name].batch // (mesh.shards * accumulate)) * accumulate > lists
            if config[name].batch % accumulate or wasteful:
                continue
            if name == "joint" and config.joint.in_batch_weight and accumulate > 1:
                continue
            own_shape = dataclasses.replace(shape, remat=remat)
            step = _train_step(own, own_shape, mesh, name, machine, report)
            if step is not None:
                return step
    raise InputError(
        f"config.{name}: its step fits in no way on {machine.topology}; lower its batch or list_size, "
        "raise config.mesh.fsdp, or take more chips"
    )


def _packed(parts: int, rows: int, width: int, sharding) -> Packed:
    """Abstract inputs of `rows` sequences of `width` tokens in each of `parts`."""
    tokens = jax.ShapeDtypeStruct((parts, rows, width), jnp.int32, sharding=sharding)
    first = jax.ShapeDtypeStruct((parts, rows, 1), jnp.int32, sharding=sharding)
    slot = jax.ShapeDtypeStruct((parts, rows), jnp.int32, sharding=sharding)
    return Packed((Block(tokens, tokens, tokens, tokens, first),), slot)


def _params(shape: bert.BertConfig, mesh: sharding_lib.Sharding, names: tuple[str, ...]):
    """Abstract params of some models, sharded."""

    def init(key):
        blocks = (Block(*[jnp.zeros((1, 8), jnp.int32)] * 5),)
        encoder = bert.Encoder(shape).init(key, blocks, deterministic=True)["params"]
        made = {
            "retriever": lambda: {"query": encoder, "passage": encoder},
            "reranker": lambda: models_lib.init_reranker(encoder, shape, key),
        }
        return {name: made[name]() for name in names}

    return _sharded(jax.eval_shape(init, jax.random.key(0)), mesh)


def _sharded(tree, mesh):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, mesh.of_params(tree)
    )


def _train_step(config, shape, mesh, name, machine, report) -> Step | None:
    """The step of a training stage compiled; None if it does not fit."""
    models = models_lib.Models(shape, config.model.pooling)
    settings, stage = config[name], train.make_stage(config, models, name)
    slots_SxB = batches_lib.slots(settings.batch, mesh.shards, stage.accumulate)
    parts, lists = slots_SxB.shape
    sequences = {}
    if "retriever" in stage.models:
        sequences["queries"] = (lists, config.data.query_length)
        sequences["passages"] = (lists * stage.list_size, config.data.passage_length)
    if "reranker" in stage.models:
        sequences["pairs"] = (lists * stage.list_size, config.data.pair_length)
    batch = {kind: _packed(parts, *size, mesh.batch) for kind, size in sequences.items()}
    labels = {"positive": stage.list_size, "where": stage.list_size}
    if stage.in_batch:
        every = slots_SxB.size * stage.list_size
        labels |= {"in_batch_positive": every, "in_batch_where": every}
    batch |= {
        label: jax.ShapeDtypeStruct((parts, lists, count), bool, sharding=mesh.batch)
        for label, count in labels.items()
    }
    optimizer = train.make_optimizer(config.optimizer, settings, 1000, stage.frozen)
    params = _params(shape, mesh, stage.models)
    zero = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, params)
    state = train.TrainState(*_sharded((zero, params, opt_state), mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = _sharded(key, mesh)
    step_fn = train.make_step(stage.loss_fn, optimizer, mesh)
    kept, tokens = stage.accumulate, sum(rows * width for rows, width in sequences.values())
    formula = 3 * kept * sum(forward_flops(shape, *x) for x in sequences.values())
    what = f"{name}, rematerialised: {shape.remat}, in {kept} part{'s' * (kept > 1)}"
    least = _least_bytes(shape, sequences.values(), params, mesh)
    if least > machine.memory:
        report(f"{what}: needs {least / GIB:.1f} GiB or more, not compiled")
        return None
    compiled = _compile(step_fn, (state, batch, key), what, machine, report)
    if compiled is None:
        return None
    return Step(
        name,
        shape.remat,
        kept,
        compiled[0],
        tokens * kept,
        settings.batch,
        formula,
        sum(4 * math.prod(x.shape) for x in jax.tree.leaves(params)),
        *compiled[1:],
    )


def _least_bytes(shape, sequences, params, mesh) -> float:
    """About the fewest bytes a training step can need: state, gradients, kept activations."""
    d, f = shape.hidden_size, shape.intermediate_size
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    kept, busiest, width = 0.0, 0.0, jnp.dtype(shape.dtype).itemsize
    for rows, length in sequences:
        # Every elementwise function of a layer keeps something, much of it in float32.
        layer = 24 * d + 7 * f + 12 * shape.num_heads * length
        values = {"none": layer, "dots": 6 * d + f, "full": d}[shape.remat]
        kept += width * rows * length * shape.num_layers * values
        busiest = max(busiest, width * rows * length * layer)
    if shape.remat != "none":
        # One layer at a time is computed again, and then keeps all.
        kept += busiest
    # Weights and both of Adam's moments, split over fsdp; whole weights' gradients.
    return 12.0 * size / mesh.mesh.shape["fsdp"] + 4.0 * size + kept


def _forward_step(config, shape, mesh, name, machine, report) -> Step:
    """Encoding or re-ranking of as many tokens at once as fit."""
    models = models_lib.Models(shape, config.model.pooling)
    if name == "encode":
        fn, longest = models.vectors, config.data.passage_length
        params = _params(shape, mesh, ("retriever",))["retriever"]["passage"]
    else:
        fn, longest = models.reranker_scores, config.data.pair_length
        params = _params(shape, mesh, ("reranker",))["reranker"]
    width = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    rows = max(TOKENS_A_CHIP // width, 1)
    while rows:
        what = f"{name}, {rows} rows of {width} tokens a device"
        inputs = params, _packed(mesh.shards, rows, width, mesh.batch)
        compiled = _compile(mesh.per_shard(fn), inputs, what, machine, report)
        if compiled is not None:
            memory, *rest = compiled
            formula = forward_flops(shape, rows, width)
            items = rows * mesh.shards
            return Step(name, "", 1, memory, rows * width, items, formula, 0, *rest)
        rows //= 2
    raise InputError(
        f"{name}: no row of {width} tokens fits on {machine.topology}; take larger chips"
    )


def _compile(fn, arguments, what, machine, report) -> tuple[int, hlo.Cost, float] | None:
    """(bytes a device, cost, seconds); None if the memory is too small."""
    start = time.monotonic()
    try:
        compiled = fn.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(error))
        needs = f"needs {wanted[1]} of {wanted[2]}" if wanted else "needs more memory"
        report(f"{what}: {needs}, does not fit")
        return None
    seconds = time.monotonic() - start
    stats = compiled.memory_analysis()
    memory = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    fits = memory <= machine.memory
    report(
        f"{what}: {memory / GIB:.2f} GiB, {'fits' if fits else 'does not fit'} ({seconds:.0f} s)"
    )
    return (memory, hlo.cost(compiled.as_text()), seconds) if fits else None


def render(plan: Plan, machine: Machine) -> str:
    """The steps as a table in Markdown, per device."""
    lines = [
        f"\n{machine.topology}: {len(machine.devices)} devices with {machine.memory / GIB:.1f} GiB and "
        f"{machine.flops / 1e12:.3g} TFLOP/s each; every input at its full length",
        "",
        "| step | rematerialised | parts | memory, GiB | TFLOP, model | compiled / model "
        "| collectives | reduced / gradients | no faster than, s | compiled in, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for step in plan.steps.values():
        collectives = ", ".join(f"{n} {kind}" for kind, n in sorted(step.cost.collectives.items()))
        sums = sum(step.cost.collective_bytes[kind] for kind in ("all-reduce", "reduce-scatter"))
        reduced = f"{sums / step.gradients:.2f}" if step.gradients else ""
        lines.append(
            f"| {step.name} | {step.remat} | {step.accumulate} | {step.memory / GIB:.2f} "
            f"| {step.formula / 1e12:.3g} | {step.cost.flops / step.formula:.2f} | {collectives} "
            f"| {reduced} | {step.seconds(machine):.3g} | {step.compile_seconds:.0f} |"
        )
    return "\n".join(lines)


def sizes(config: ml_collections.ConfigDict, queries: int | None, passages: int | None):
    """Training queries and passages: those given, else those of the published data the config names.

    Raises:
      InputError: they are neither given nor known.
    """
    known = PUBLISHED.get(config.data.dataset, (None, None))
    passages, queries = passages or known[0], queries or known[1]
    if queries is None or passages is None:
        raise InputError(
            f"{config.data.dataset}: how large it is is not known; give --queries and --passages"
        )
    return queries, passages


def render_run(
    config: ml_collections.ConfigDict, plan: Plan, machine: Machine, queries: int, passages: int
) -> str:
    """Least time of every stage, and disk and memory, as tables in Markdown.

    Args:
      queries, passages: how many there are to train on and to search.
    """
    mined = min(queries, config.mine.queries)
    scored = min(mined, config.mine.scored_queries) if config.joint.denoised_share else 0
    trained = {"retriever": queries, "reranker": mined, "joint": mined}
    work = [
        (name, round(config[name].epochs * trained[name] / config[name].batch), "steps", name)
        for name in ("retriever", "reranker", "joint")
        if name in plan.steps
    ]
    warmed_up = 1 + ("retriever" in plan.steps)
    pairs = scored * config.mine.scored_depth
    for what, items, step in (
        ("encode all passages, once for each retriever", (warmed_up + 1) * passages, "encode"),
        ("score candidates", pairs, "re-rank"),
    ):
        work.append((what, -(-items // plan.steps[step].items), "batches", step))
    lines = ["", "| stage | work | no faster than, hours |", "|---|---|---|"]
    total = 0.0
    for what, count, unit, step in work:
        hours = count * plan.steps[step].seconds(machine) / 3600
        total += hours
        lines.append(f"| {what} | {count:,} {unit} | {hours:.2f} |")
    lines.append(
        f"| all of it, {queries:,} training queries, {passages:,} passages | | {total:.2f} |"
    )
    vectors = passages * plan.hidden_size * 4
    stored = {
        "token store, disk, at most": passages * config.data.passage_length * 2 + passages * 16,
        "vectors, disk, each retriever": vectors,
        "ScaNN's index, memory": vectors * 1.25,
        "candidates, disk": mined * config.mine.depth * 16,
    }
    lines += ["", "| what | GiB |", "|---|---|"]
    lines += [f"| {what} | {size / GIB:.1f} |" for what, size in stored.items()]
    return "\n".join(lines)
