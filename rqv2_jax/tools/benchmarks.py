"""The benchmarks of rqv2_jax.bench: each yields lines of figures from one run on this machine.

Among them are the comparison of a device's numbers with the CPU's and the profile of its time.

Shape suffixes: Q queries, N passages or tokens.
"""

import collections
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rqv2_jax import config as config_lib
from rqv2_jax.models import ragged_attention, random_model
from rqv2_jax.models.scoring import tower
from rqv2_jax.recipe.run import Run, open_run
from rqv2_jax.retrieval import encode, rerank, stream
from rqv2_jax.tools import bench_joint, bench_retrieval, machines, workload
from rqv2_jax.tools.workload import Texts
from rqv2_jax.training import sharding, stages

LISTED = 10  # operations of a profile


class Options(NamedTuple):
    """The flags of rqv2_jax.bench, by their names."""

    lengths: str
    shape: str | None
    vs: str | None
    steps: int
    rounds: int
    passages: int
    vectors: int
    queries: int


def measure(config: ConfigDict, chosen: tuple[str, ...], options: Options) -> Iterator[dict]:
    """Yields the lines of the chosen benchmarks, with what they were measured on."""
    with tempfile.TemporaryDirectory() as folder:
        if options.shape is not None:
            _, config.model.num_layers = random_model.SHAPES[options.shape]
            config.model.weights = str(pathlib.Path(folder) / options.shape)
            random_model.write(options.shape, pathlib.Path(config.model.weights))
        run = open_run(config, pathlib.Path(folder) / "workdir")
        if set(chosen) - {"exact", "index"}:
            # A fourth as many queries as passages.
            sizes = options.passages, options.passages // 4
            yield from _read(run, workload.read(run, options.lengths, *sizes), chosen, options)
        width, settings = run.models.retriever.hidden_size, run.config.evaluate.scann
        size, versus = (options.vectors, width, options.queries), options.vs is not None
        if "exact" in chosen:
            yield bench_retrieval.exact(*size, 100, options.rounds, versus)
        if "index" in chosen:
            yield from bench_retrieval.search(*size, 50, settings, versus)


def _read(run: Run, texts: Texts, chosen: tuple[str, ...], options: Options) -> Iterator[dict]:
    """Yields the lines of the benchmarks that read texts."""
    # With what the model folders say where the config as given leaves it open.
    settings, joint = run.config.model, run.config.joint
    model = {"layers": settings.num_layers}
    if settings.reranker.num_layers != settings.num_layers:
        model["reranker_layers"] = settings.reranker.num_layers
    model["dtype"] = settings.dtype
    sizes = {"batch": joint.batch, "list_size": joint.list_size}
    lengths, steps, step_seconds = {"lengths": options.lengths}, options.steps, None
    versus = options.vs is not None
    if "joint" in chosen:
        for line in bench_joint.joint(run, texts, steps, versus):
            step_seconds = line["step_seconds"]
            dropout = {"dropout": settings.dropout}
            yield {"benchmark": "joint"} | model | dropout | lengths | sizes | line
    if "encode" in chosen:
        for line in bench_retrieval.encode_and_rerank(run, texts, options.rounds, versus):
            yield model | lengths | line
    if "mine" in chosen:
        yield model | lengths | bench_retrieval.mine(run, texts, options.rounds, versus)
    if "input" in chosen:
        line = bench_joint.inputs(run, texts, steps, step_seconds)
        yield {"benchmark": "input"} | lengths | sizes | line
    if "agree" in chosen:
        yield from _agreement(run, texts)
    if "profile" in chosen:
        yield sizes | _profile(run, texts, steps)
    if "scaling" in chosen:
        for line in _scaling(run, texts, steps):
            yield model | lengths | line


def _scaling(run: Run, texts: Texts, steps: int) -> Iterator[dict]:
    """Yields a joint step's time by size and number of lists, encoding's by passages."""
    common = {"benchmark": "scaling"}
    work = [("list size", size, (2, size)) for size in (8, 16, 32, 64, 128)]
    work += [("lists", batch, (batch, 8)) for batch in (2, 4, 8, 16, 32)]
    for what, count, (batch, size) in work:
        config = config_lib.loads(config_lib.dumps(run.config))
        config.joint.update({"batch": batch, "list_size": size})
        resized = open_run(config, run.workdir)
        (line,) = bench_joint.joint(resized, texts, steps, versus=False)
        rate = {"real_tokens_per_second": line["real_tokens_per_second"]}
        yield common | {"what": what, "count": count, "seconds": line["step_seconds"]} | rate
    encoder = tower(run.initial("retriever"), "passage")
    for part in (8, 4, 2, 1):
        rows_N = np.arange(len(texts.passages) // part)
        read = float(run.inputs.passage_lengths(texts.store, rows_N).sum())
        encoding = partial(encode.passages, run.forward, encoder, texts.store, rows_N)
        seconds = machines.seconds(encoding, 2)[-1]
        line = {"what": "encoded passages", "count": len(rows_N), "seconds": seconds}
        yield common | line | {"real_tokens_per_second": read / seconds}


def _elsewhere(run: Run, device: jax.Device, **changed: Any) -> Run:
    """Returns the run on one device, without dropout and with other settings of its encoder."""
    models = run.models.reshaped(dropout=0.0, **changed)
    mesh = sharding.over([device], 1, 1)
    how = {"batch_tokens": run.forward.batch_tokens, "max_blocks": run.forward.max_blocks}
    forward = stream.make_forward(models, run.inputs, mesh, **how)
    return dataclasses.replace(run, models=models, sharding=mesh, forward=forward)


def _scores_and_gradients(run: Run, texts: Texts) -> dict[str, np.ndarray]:
    """Returns query vectors, re-ranker scores and the joint loss's gradient, as flat arrays."""
    stage = stages.make_stage(run.config, run.models, "joint")
    params = {model: run.initial(model) for model in stage.models}
    batch = run.sharding.put_batch(bench_joint.joint_batches(run, texts, 1).make(0))
    value_and_grad = run.sharding.value_and_grad(stage.loss_fn, by_part=stage.by_part)
    (loss, _), grads = jax.jit(value_and_grad)(params, batch, jax.random.key(0))
    queries, rows_Q = texts.store.splits["train"].texts, np.arange(32)
    pairs = queries, rows_Q, rows_Q[:, None]
    return {
        "loss": np.array(loss),
        "vectors": encode.queries(
            run.forward, tower(params["retriever"], "query"), queries, rows_Q
        ),
        "scores": rerank.scores(run.forward, params["reranker"], texts.store, *pairs),
        "gradient": np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)]),
    }


def _error(array: np.ndarray, exact: np.ndarray) -> float:
    """Returns the distance of two arrays over the length of the second."""
    array, exact = np.asarray(array, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(array - exact) / np.linalg.norm(exact))


def _agreement(run: Run, texts: Texts) -> list[dict]:
    """Compares scores and gradients with the CPU's in float32 at full precision, by plain attention."""
    cpu, device = jax.local_devices(backend="cpu")[0], jax.devices()[0]
    own = run.models.retriever.attention
    with jax.default_matmul_precision("highest"):
        plain = {"dtype": "float32", "attention": "plain", "remat": "none"}
        exact = _scores_and_gradients(_elsewhere(run, cpu, **plain), texts)
        lines = []
        for dtype, attention in (("float32", own), ("bfloat16", own), ("bfloat16", "plain")):
            how = {"dtype": dtype, "attention": attention}
            ours = _scores_and_gradients(_elsewhere(run, device, **how), texts)
            errors = {f"{name}_error": _error(ours[name], exact[name]) for name in exact}
            lines.append({"benchmark": "agree", "device": device.device_kind} | how | errors)
    return [*lines, *(_kernel_agreement(cpu, device, dtype) for dtype in ("float32", "bfloat16"))]


def _kernel_agreement(cpu: jax.Device, device: jax.Device, dtype: str) -> dict:
    """Compares the attention kernel, dropout included, with its interpretation on the CPU."""
    sequence_N = np.repeat((0, 1, 2, 3, 4, -1), (100, 3, 160, 77, 20, 24))
    count, heads, size = len(sequence_N), 4, 64
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=(count, 3 * heads * size)).astype(np.float32)
    back = rng.normal(size=(count, heads * size)).astype(np.float32) * (sequence_N >= 0)[:, None]

    @jax.jit
    def value_and_gradient(qkv: jax.Array, sequence_N: jax.Array) -> tuple[jax.Array, ...]:
        spans = ragged_attention.spans(
            *ragged_attention.token_spans(sequence_N), sequence_N >= 0, count
        )
        seed_2 = jnp.array([1, 2], jnp.uint32)

        def attend(qkv: jax.Array) -> jax.Array:
            return ragged_attention.attend((qkv,), spans, seed_2, heads, 0.1, 512)

        value, pull_back = jax.vjp(attend, qkv.astype(dtype))
        return value, *pull_back(back.astype(dtype))

    there, here = (value_and_gradient(*jax.device_put((qkv, sequence_N), d)) for d in (device, cpu))
    again = value_and_gradient(*jax.device_put((qkv, sequence_N), device))
    value, gradient = map(_error, there, here)
    return {
        "benchmark": "agree",
        "what": "attention kernel with dropout",
        "dtype": dtype,
        "value_error": value,
        "gradient_error": gradient,
        "repeats_bit_by_bit": all(map(np.array_equal, there, again)),
    }


def _profile(run: Run, texts: Texts, steps: int) -> dict:
    """Returns a joint step's longest operations: their milliseconds over all streams of a device."""
    batches = bench_joint.joint_batches(run, texts, steps)
    joint = bench_joint.Joint(run, run.config, batches, steps)
    batch = joint.prepare(0)
    joint.step(batch)
    jax.block_until_ready(joint.state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            joint.step(batch)
            jax.block_until_ready(joint.state)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    kind = "/device:" if jax.default_backend() != "cpu" else "/host:CPU"
    times: dict[str, list[float]] = collections.defaultdict(list)
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith(kind) and (kind == "/host:CPU" or "Stream" in line.name):
                for event in line.events:
                    times[event.name].append(event.duration_ns / 1e6)
    operations = [
        {"operation": name, "milliseconds": sum(taken), "times": len(taken)}
        for name, taken in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]
    total = sum(map(sum, times.values()))
    return {"benchmark": "profile", "milliseconds": total, "longest": operations[:LISTED]}
