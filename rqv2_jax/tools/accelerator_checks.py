"""Comparison of a device's numbers with the CPU's, and a profile of its time.

Shape suffixes: Q queries, N keys or tokens, H heads, K size of a head.
"""

import collections
import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from rqv2_jax.models import ragged_attention
from rqv2_jax.recipe.run import Run
from rqv2_jax.retrieval import encode, rerank, stream
from rqv2_jax.tools.bench_common import Texts
from rqv2_jax.tools.bench_joint import Joint, joint_batches
from rqv2_jax.training import sharding, stages

LISTED = 10  # operations of a profile


def _elsewhere(run: Run, device: jax.Device, **changed) -> Run:
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
    batch = run.sharding.put_batch(joint_batches(run, texts, 1).make(0))
    value_and_grad = jax.jit(run.sharding.value_and_grad(stage.loss_fn))
    (loss, _), grads = value_and_grad(params, batch, jax.random.key(0))
    queries, rows_Q = texts.store.splits["train"].texts, np.arange(32)
    pairs = queries, rows_Q, rows_Q[:, None]
    return {
        "loss": np.array(loss),
        "vectors": encode.queries(run.forward, params["retriever"]["query"], queries, rows_Q),
        "scores": rerank.scores(run.forward, params["reranker"], texts.store, *pairs),
        "gradient": np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)]),
    }


def _error(array: np.ndarray, exact: np.ndarray) -> float:
    """Returns the distance of two arrays over the length of the second."""
    array, exact = np.asarray(array, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(array - exact) / np.linalg.norm(exact))


def agreement(run: Run, texts: Texts) -> list[dict]:
    """Compares the device with the CPU: scores and gradients, in float32 and bfloat16, relative errors.

    float32 products at their full precision; the CPU by plain attention.
    """
    cpu, device = jax.local_devices(backend="cpu")[0], jax.devices()[0]
    configured = run.models.retriever.attention
    with jax.default_matmul_precision("highest"):
        plain = {"dtype": "float32", "attention": "plain", "remat": "none"}
        exact = _scores_and_gradients(_elsewhere(run, cpu, **plain), texts)
        lines = []
        kinds = (("float32", configured), ("bfloat16", configured), ("bfloat16", "plain"))
        for dtype, attention in kinds:
            how = {"dtype": dtype, "attention": attention}
            ours = _scores_and_gradients(_elsewhere(run, device, **how), texts)
            errors = {f"{name}_error": _error(ours[name], exact[name]) for name in exact}
            lines.append({"benchmark": "agree", "device": device.device_kind} | how | errors)
    return [*lines, *(_kernel_agreement(cpu, device, dtype) for dtype in ("float32", "bfloat16"))]


def _kernel_agreement(cpu: jax.Device, device: jax.Device, dtype: str) -> dict:
    """Compares the attention kernel, dropout included, with its interpretation on the CPU."""
    lengths, count, heads, size = (100, 3, 160, 77, 20), 384, 4, 64
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    sequence_N = np.full(count, -1)
    sequence_N[: len(numbers)] = numbers
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
    errors = (_error(a, b) for a, b in zip(there, here))
    same = all(np.array_equal(a, b) for a, b in zip(there, again))
    line = {"benchmark": "agree", "what": "attention kernel with dropout", "dtype": dtype}
    line |= zip(("value_error", "gradient_error"), errors)
    return line | {"repeats_bit_by_bit": same}


def profile(run: Run, texts: Texts, steps: int) -> dict:
    """Traces one of a number of joint steps; returns the operations that take longest.

    Their milliseconds are sums over a step, of all streams of a device.
    """
    joint = Joint(run, run.config, joint_batches(run, texts, steps), steps)
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
    total, counts = collections.Counter(), collections.Counter()
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith(kind) and (kind == "/host:CPU" or "Stream" in line.name):
                for event in line.events:
                    total[event.name] += event.duration_ns / 1e6
                    counts[event.name] += 1
    longest = [
        {"operation": name, "milliseconds": taken, "times": counts[name]}
        for name, taken in total.most_common(LISTED)
    ]
    return {"benchmark": "profile", "milliseconds": sum(total.values()), "longest": longest}
