"""A run's steps compiled for devices that are not there, and what follows for the whole run.

Shape suffixes: S parts of a batch, B lists of a part, L lists, P passages of a list, N sequences.
"""

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rqv2_jax import config as config_lib
from rqv2_jax import config_check
from rqv2_jax.data import batches as batches_lib
from rqv2_jax.data import packing
from rqv2_jax.data.lists import training_lists
from rqv2_jax.errors import InputError
from rqv2_jax.models import attention, bert, random_model, released
from rqv2_jax.models import scoring as models_lib
from rqv2_jax.recipe import opening
from rqv2_jax.retrieval import stream
from rqv2_jax.tools import hlo
from rqv2_jax.training import sharding as sharding_lib
from rqv2_jax.training import train

GIB = 2**30

# Of one chip, as its maker states them: bytes of main memory, bfloat16 operations a second, bytes a
# second of main memory and of the links to other chips.
CHIPS = {
    "v4": (32 * GIB, 275e12, 1228e9, 300e9),
    "v5e": (16 * GIB, 197e12, 819e9, 200e9),
    "v5p": (95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": (32 * GIB, 918e12, 1640e9, 448e9),
}
GPUS = {
    "h100": (80e9, 989e12, 3350e9, 900e9),
    "h200": (141e9, 989e12, 4800e9, 900e9),
    "a100": (80e9, 312e12, 2039e9, 600e9),
    "l4": (24e9, 121e12, 300e9, 64e9),
}
USABLE = 0.98  # of a chip's memory; the rest is the runtime's

# Memory ScaNN takes, measured with 400,000 and 1,000,000 vectors of 384 dimensions: times the vectors.
SCANN_BUILT, SCANN_KEPT = 4.3, 1.1
# Memory that lists take while they are drawn, in bytes of each candidate, measured with 2,000 queries
# of 1,000: four arrays of candidates, and what `lists.draw` makes of them.
DRAWN = 74

# Passages and training queries of the published data.
PUBLISHED = {"msmarco": (8_841_823, 502_939), "dpr": (21_015_324, 58_880)}

TOKENS_A_CHIP = 2**15  # of one forward pass, to start with

# Tokens, special ones included, log-normal: median, deviation, least, most. Passages have their
# titles, and a mean of 79.
MSMARCO = {"queries": (9, 0.35, 4, 32), "passages": (76, 0.36, 16, 128)}
DRAWN_STEPS = 64  # whose lists' lengths are drawn


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for; rates are per device and second, `memory` in bytes.

    For GPUs that are not there nothing can be compiled: `counted` steps are those of the formulas.
    """

    topology: str
    devices: list
    memory: float
    flops: float
    bandwidth: float
    links: float
    counted: bool = False


class Step(NamedTuple):
    """One step on one device, compiled or counted.

    `memory` and `gradients` in bytes, `tokens` that are computed, `formula` (FLOPs of a plain encoder
    on the real tokens alone): each per device.
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
    passage_length: int


def chip(device: jax.Device) -> str | None:
    """Returns which of `GPUS` a device is, None if it is none."""
    names = re.split(r"[\s-]+", device.device_kind.lower())
    return next((name for name in names if name in GPUS), None)


def machine(topology: str) -> Machine:
    """The devices of a topology such as `v5e:4x8`, `h100:8` or `cpu:8`.

    Raises:
      InputError: the name or the shape is not known, or libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    number = re.fullmatch(r"[1-9]\d*", shape)
    if kind in GPUS and number:
        memory, *rates = GPUS[kind]
        # The host's devices stand for them, so that arrays can be laid out.
        return Machine(topology, jax.devices()[: int(shape)], USABLE * memory, *rates, counted=True)
    if kind == "cpu" and number:
        count = int(shape)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        flops, bandwidth = _measure()
        each = (x / count for x in (memory, flops, bandwidth, bandwidth))
        return Machine(topology, jax.devices()[:count], *each)
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise InputError(
            f"--topology is {topology!r}; write one of {', '.join(CHIPS)} with a shape, as v5e:4x8 or "
            f"v4:2x2x2; or one of {', '.join(GPUS)}, cpu with a number, as h100:8"
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


def training_flops(config, models: models_lib.Models, stage: str, kind: str, lengths) -> float:
    """Of a stage's step over sequences of one kind: forward, and twice as much for the gradient.

    In static distillation the re-ranker has none.
    """
    taught = stage != "joint" or kind != "pairs" or config.joint.train_reranker
    return (3 if taught else 1) * float(forward_flops(_encoder(models, kind), 1, lengths).sum())


def _encoder(models: models_lib.Models, kind: str) -> bert.BertConfig:
    """The encoder that reads a kind of input."""
    return models.reranker if kind == "pairs" else models.retriever


def msmarco_lengths(rng: np.random.Generator, kind: str, shape) -> np.ndarray:
    """Lengths like those of MS MARCO's "queries" or "passages"."""
    median, deviation, least, most = MSMARCO[kind]
    return np.clip(rng.lognormal(np.log(median), deviation, shape), least, most).astype(int)


def _drawn(config, lengths: str, batch: int, size: int) -> dict[str, np.ndarray]:
    """By kind of input, the lengths of the sequences of some batches' lists [L, 1 or P]."""
    if lengths == "full":
        return _lengths(config.data, lengths, batch, size)
    found = _lengths(config.data, lengths, DRAWN_STEPS * batch, size)
    order_L = batches_lib.balance(list(found.values()), batch)
    return {kind: found[kind][order_L] for kind in found}


def _lengths(data, lengths: str, lists: int, size: int) -> dict[str, np.ndarray]:
    """As `_drawn`, of lists in any order."""
    counts = {"queries": 1, "passages": size, "pairs": size}
    most = dict(zip(counts, (data.query_length, data.passage_length, data.pair_length)))
    if lengths == "full":
        return {kind: np.full((lists, counts[kind]), most[kind]) for kind in most}
    rng = np.random.default_rng(0)
    found = {kind: msmarco_lengths(rng, kind, (lists, counts[kind])) for kind in MSMARCO}
    # Both begin with [CLS], a pair does so once.
    found["pairs"] = found["queries"] + found["passages"] - 1
    return {kind: found[kind].clip(max=most[kind]) for kind in most}


def make(
    config: ml_collections.ConfigDict, machine: Machine, lengths: str, report: Callable
) -> Plan:
    """Compiles or counts every step of a run; `report` gets a line for each try.

    `lengths` of the inputs are "full", the most that the config admits, or "msmarco", like those of
    MS MARCO's texts; then the least times hold for the tokens that are really computed.

    Raises:
      InputError: the config cannot be used, or a step fits in no way.
    """
    config = config_lib.loads(config_lib.dumps(config))
    # No data is read here.
    config.data.path = config.data.path or "DIR"
    config_check.check(config)
    fsdp = config.mesh.fsdp
    if len(machine.devices) % fsdp:
        raise InputError(
            f"config.mesh.fsdp is {fsdp}, which does not divide {len(machine.devices)} devices"
        )
    config.mesh.data = len(machine.devices) // fsdp
    mesh = sharding_lib.over(machine.devices, config.mesh.data, fsdp)
    config, models = _models(config, machine, report)
    overlay: dict[str, object] = {"mesh.data": config.mesh.data, "mesh.fsdp": fsdp}
    sizes = {"joint": config.joint.list_size, "reranker": config.reranker.list_size}
    if config.retriever.epochs > 0:
        sizes["retriever"] = 1
    drawn = {
        name: _drawn(config, lengths, config[name].batch, size) for name, size in sizes.items()
    }
    steps = _training_steps(config, models, mesh, drawn, machine, report)
    for name in ("joint", "reranker"):
        overlay |= {"model.remat": steps[name].remat, f"{name}.accumulate": steps[name].accumulate}
    for name in ("encode", "re-rank"):
        steps[name] = _forward_step(config, models, mesh, name, drawn["joint"], machine, report)
    tokens = min(steps[name].tokens for name in ("encode", "re-rank"))
    overlay["evaluate.batch_tokens"] = tokens
    return Plan(steps, overlay, models.retriever.hidden_size, config.data.passage_length)


def _models(config, machine, report) -> tuple[ml_collections.ConfigDict, models_lib.Models]:
    """The resolved config and the models' shapes; those of BERT base where the weights are missing."""
    asked = config.model.attention
    try:
        opened = opening.open_models(config)
        config, models = opened.config, opened.models
    except InputError as error:
        report(f"planned with the shape of BERT base, because {error}")
        base_shape, base_layers = random_model.SHAPES["bert-base"]
        base = released.plain(
            pathlib.Path("BERT base"), num_layers=base_layers, longest=base_shape["max_positions"]
        )
        config, _ = opening.resolve(config, released.Sources(base, base, base))
        model = config.model
        if model.attention == "auto":
            model.attention = "plain"
        how = {name: model[name] for name in ("dtype", "remat", "attention")}
        shapes = {
            name: bert.BertConfig(
                **base_shape, **how, num_layers=own.num_layers, dropout=own.dropout, unrolled=False
            )
            for name, own in (("retriever", model), ("reranker", model.reranker))
        }
        models = models_lib.Models(
            **shapes,
            pooling=model.pooling,
            similarity=model.similarity,
            scale=model.scale,
            head="linear",
        )
    if asked == "auto" and machine.counted:
        sizes = models.retriever.head_size, models.reranker.head_size
        models = models.reshaped(attention=attention.implementation(asked, "gpu", sizes))
    return config, models.reshaped(unrolled=machine.devices[0].platform == "cpu")


def _training_steps(config, models, mesh, drawn, machine, report) -> dict[str, Step]:
    """Returns the steps of all stages, under the first policy by which all of them fit.

    Raises:
      InputError: there is none.
    """
    remats = list(bert.REMAT)
    while remats:
        steps, left = {}, remats
        for name in drawn:
            step = _fitting(config, models, mesh, name, drawn[name], left, machine, report)
            if step is None:
                break
            steps[name], left = step, [step.remat]
        else:
            return steps
        # The policy that the first stages took keeps too much for this one.
        remats = remats[remats.index(left[0]) + 1 :] if steps else []
    raise InputError(
        f"config.{name}: its step fits in no way on {machine.topology}; lower its batch or list_size, "
        "raise config.mesh.fsdp, or take more chips"
    )


def _fitting(config, models, mesh, name, drawn, remats, machine, report) -> Step | None:
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
            step = _train_step(
                own, models.reshaped(remat=remat), mesh, name, drawn, machine, report
            )
            if step is not None:
                return step
    return None


def _packed(
    parts: int, shapes: tuple[packing.Shape, ...], sequences: int, sharding
) -> packing.Packed:
    """Abstract inputs, so many sequences in rows of these shapes in each of `parts`."""

    def numbers(*shape):
        return jax.ShapeDtypeStruct((parts, *shape), jnp.int32, sharding=sharding)

    blocks = tuple(
        packing.Block(*[numbers(shape.rows, shape.width)] * 4, numbers(shape.rows, shape.slots))
        for shape in shapes
    )
    return packing.Packed(blocks, numbers(sequences))


def _params(models: models_lib.Models, mesh: sharding_lib.Sharding, names: tuple[str, ...]):
    """Abstract params of some models, sharded."""
    made = {}
    if "retriever" in names:
        encoder = random_model.params_like(models.retriever)
        made["retriever"] = {"query": encoder, "passage": encoder}
    if "reranker" in names:
        shape = models.reranker
        made["reranker"] = jax.eval_shape(
            lambda encoder, key: models_lib.init_reranker(encoder, shape, key),
            *(random_model.params_like(shape), jax.random.key(0)),
        )
        if models.head == "pooler":
            size = shape.hidden_size
            kernel, bias = (jax.ShapeDtypeStruct(x, jnp.float32) for x in ((size, size), (size,)))
            made["reranker"]["head"]["pooler"] = {"kernel": kernel, "bias": bias}
    return _sharded(made, mesh)


def _sharded(tree, mesh):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, mesh.of_params(tree)
    )


def _train_step(config, models, mesh, name, drawn, machine, report) -> Step | None:
    """The step of a training stage compiled; None if it does not fit."""
    settings, stage = config[name], train.make_stage(config, models, name)
    slots_SxB = batches_lib.slots(settings.batch, mesh.shards, stage.accumulate)
    parts, lists = slots_SxB.shape
    shapes, formula = {}, 0.0
    for kind in (kind for model in stage.models for kind in batches_lib.READS[model]):
        lengths_LxN = drawn[kind]
        lengths_BxN = batches_lib.by_part(lengths_LxN, settings.batch, slots_SxB)
        if models.flat:
            tokens = int(lengths_BxN.sum(axis=1).max())
            shapes[kind] = (packing.plan_flat(tokens, lengths_BxN.shape[1]),)
        else:
            longest_N = np.sort(lengths_BxN, axis=1).max(axis=0)
            shapes[kind] = packing.plan(longest_N, config.packing.blocks)
        steps = len(lengths_LxN) / settings.batch
        formula += training_flops(config, models, name, kind, lengths_LxN) / steps / mesh.shards
    batch = {
        kind: _packed(parts, shapes[kind], lists * drawn[kind].shape[1], mesh.batch)
        for kind in shapes
    }
    labels = {"positive": stage.list_size, "where": stage.list_size}
    if stage.in_batch:
        every = slots_SxB.size * stage.list_size
        labels |= {"in_batch_positive": every, "in_batch_where": every}
    batch |= {
        label: jax.ShapeDtypeStruct((parts, lists, count), bool, sharding=mesh.batch)
        for label, count in labels.items()
    }
    optimizer = train.make_optimizer(config.optimizer, settings, 1000, stage.rates)
    params = _params(models, mesh, stage.models)
    zero = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, params)
    state = train.TrainState(*_sharded((zero, params, opt_state), mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = _sharded(key, mesh)
    step_fn = train.make_step(stage.loss_fn, optimizer, mesh)
    kept, tokens = stage.accumulate, sum(map(packing.size, shapes.values()))
    remat = models.retriever.remat
    what = f"{name}, rematerialised: {remat}, in {kept} part{'s' * (kept > 1)}"
    least = _least_bytes(models, shapes, params, mesh)
    if least > machine.memory:
        report(f"{what}: needs {least / GIB:.1f} GiB or more, not compiled")
        return None
    if machine.counted:
        compiled = _counted(what, least, formula, mesh, params, report)
    else:
        compiled = _compile(step_fn, (state, batch, key), what, machine, report)
    if compiled is None:
        return None
    return Step(
        name,
        remat,
        kept,
        compiled[0],
        tokens * kept,
        settings.batch,
        formula,
        _bytes(params),
        *compiled[1:],
    )


def _least_bytes(models, inputs, params, mesh) -> float:
    """About the fewest bytes a training step can need: state, gradients, kept activations."""
    size = _bytes(params)
    kept, busiest = 0.0, 0.0
    for kind, blocks in inputs.items():
        shape = _encoder(models, kind)
        d, f, width = shape.hidden_size, shape.intermediate_size, jnp.dtype(shape.dtype).itemsize
        tokens = packing.size(blocks)
        # Every elementwise function of a layer keeps something, much of it in float32.
        layer = tokens * (24 * d + 7 * f)
        if shape.attention != "ragged":
            layer += 12 * shape.num_heads * sum(block.rows * block.width**2 for block in blocks)
        values = {"none": layer, "dots": tokens * (6 * d + f), "full": tokens * d}[shape.remat]
        kept += width * shape.num_layers * values
        busiest = max(busiest, width * layer)
    if shape.remat != "none":
        # One layer at a time is computed again, and then keeps all.
        kept += busiest
    # Weights and both of Adam's moments, split over fsdp; whole weights' gradients.
    return 3.0 * size / mesh.mesh.shape["fsdp"] + size + kept


def _forward_step(config, models, mesh, name, drawn, machine, report) -> Step:
    """Encoding or re-ranking of as many tokens at once as fit."""
    if name == "encode":
        fn, kind, longest = models.vectors, "passages", config.data.passage_length
        params = _params(models, mesh, ("retriever",))["retriever"]["passage"]
    else:
        fn, kind, longest = models.reranker_scores, "pairs", config.data.pair_length
        params = _params(models, mesh, ("reranker",))["reranker"]
    usual_N = drawn[kind].reshape(-1)
    limit = TOKENS_A_CHIP
    while limit >= longest:
        shapes = stream.plan(usual_N, longest, limit, config.packing.blocks).usual
        rows, tokens = sum(block.rows for block in shapes), packing.size(shapes)
        what = f"{name}, {rows} rows of {tokens} tokens together a device"
        inputs = params, _packed(mesh.shards, shapes, rows, mesh.batch)
        formula = rows * float(forward_flops(_encoder(models, kind), 1, usual_N).mean())
        if machine.counted:
            shape = _encoder(models, kind)
            wide = 24 * shape.hidden_size + 7 * shape.intermediate_size
            least = _bytes(params) + jnp.dtype(shape.dtype).itemsize * tokens * wide
            compiled = _counted(what, least, formula, mesh, {}, report)
        else:
            compiled = _compile(mesh.per_shard(fn), inputs, what, machine, report)
        if compiled is not None:
            memory, *rest = compiled
            return Step(name, "", 1, memory, tokens, rows * mesh.shards, formula, 0, *rest)
        limit //= 2
    raise InputError(
        f"{name}: no row of {longest} tokens fits on {machine.topology}; take larger chips"
    )


def _bytes(tree) -> int:
    """Returns the bytes of float32 arrays."""
    return 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _counted(what, least, formula, mesh, trained, report) -> tuple[int, hlo.Cost, float]:
    """Returns what `_compile` does, by count: model FLOPs, and the weights' bytes in a step.

    Args:
      least: bytes that the step needs at least.
      trained: params that the step changes. It reads and writes them with Adam's two moments, and
        reduces their gradients over the devices.
    """
    size = _bytes(trained)
    cost = hlo.Cost(flops=formula, bytes=7.0 * size)
    if mesh.shards > 1 and trained:
        cost.collectives["all-reduce"] = 1
        cost.collective_bytes["all-reduce"] = size
    report(f"{what}: {least / GIB:.2f} GiB or more, counted, not compiled")
    return int(least), cost, 0.0


def program_memory(compiled) -> int:
    """Bytes of one device that a compiled program needs: arguments, results, all between, its code."""
    stats = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
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
    memory = program_memory(compiled)
    fits = memory <= machine.memory
    report(
        f"{what}: {memory / GIB:.2f} GiB, {'fits' if fits else 'does not fit'} ({seconds:.0f} s)"
    )
    return (memory, hlo.cost(compiled.as_text()), seconds) if fits else None


def render(plan: Plan, machine: Machine, lengths: str) -> str:
    """The steps as a table in Markdown, per device; `lengths` as in `make`."""
    long = {"full": "every input at its full length", "msmarco": "inputs as long as MS MARCO's"}
    lines = [
        f"\n{machine.topology}: {len(machine.devices)} devices with {machine.memory / GIB:.1f} GiB and "
        f"{machine.flops / 1e12:.3g} TFLOP/s each; {long[lengths]}",
        *["counted, as nothing can be compiled for GPUs that are not there"] * machine.counted,
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
    work = [
        (name, round(training_lists(config[name], count) / config[name].batch), "steps", name)
        for name, count in (("retriever", queries), ("reranker", mined), ("joint", mined))
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
        "token store, disk, at most": passages * plan.passage_length * 2 + passages * 16,
        "vectors, disk, each retriever": vectors,
        "candidates, disk": mined * config.mine.depth * 16,
        "candidates, memory of every host while lists are drawn": mined * config.mine.depth * DRAWN,
    }
    if "scann" in config.evaluate.indexes:
        stored["ScaNN, memory of the first host while it is built"] = vectors * SCANN_BUILT
        stored["ScaNN, memory of the first host afterwards"] = vectors * SCANN_KEPT
    lines += ["", "| what | GiB |", "|---|---|"]
    lines += [f"| {what} | {size / GIB:.1f} |" for what, size in stored.items()]
    return "\n".join(lines)
