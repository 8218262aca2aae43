"""The attention kernel against dense attention, interpreted on the CPU; that it compiles for a GPU."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rqv2_jax.data import packing
from rqv2_jax.errors import InputError
from rqv2_jax.models import attention, ragged_attention

LENGTHS = (7, 80, 3, 100, 1, 33)
TOKENS, HEADS, SIZE, LONGEST = 256, 2, 16, 128
WIDTH = HEADS * SIZE
SEED_2 = np.array([3, 5], np.uint32)


def sequence_numbers():
    numbers = np.full(TOKENS, -1)
    numbers[: sum(LENGTHS)] = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    return numbers


def first_tokens():
    """The first token of each sequence, and padding for the slots without one."""
    first = np.cumsum([0, *LENGTHS])
    return np.append(first[:-1], np.full(16 - len(LENGTHS), first[-1]))


def projections(first_only=False, seed=0):
    qkv = np.random.default_rng(seed).normal(size=(TOKENS, 3 * WIDTH)).astype(np.float32)
    return (qkv[first_tokens(), :WIDTH], qkv[:, WIDTH:]) if first_only else (qkv,)


def spans(first_only=False):
    numbers = sequence_numbers()
    start_N, end_N = ragged_attention.token_spans(numbers)
    asking = first_tokens() if first_only else np.arange(TOKENS)
    real_A = jnp.array(numbers >= 0)[asking]
    return ragged_attention.spans(start_N[asking], end_N[asking], real_A, TOKENS)


def kept(rate, first_only=False):
    """Which weights survive dropout [H, A, N], from the hash that the module states."""
    numbers = sequence_numbers()
    begins_N = np.append(True, numbers[1:] != numbers[:-1])
    start_N = np.maximum.accumulate(np.where(begins_N, np.arange(TOKENS), 0))
    asking = first_tokens() if first_only else np.arange(TOKENS)
    count = len(asking)
    query = (np.arange(HEADS)[:, None] * count + np.arange(count)).astype(np.uint32)
    place = (np.arange(TOKENS)[None] - start_N[asking][:, None]).astype(np.uint32)
    h = query[:, :, None] * np.uint32(LONGEST) + place[None]
    h = (h + SEED_2[0]) * (SEED_2[1] | np.uint32(1))
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return (h ^ (h >> np.uint32(16))) >= np.uint32(rate * 2**32)


def dense(parts, rate, first_only=False):
    """All queries against all keys, others' masked out."""
    q, k, v = (
        jnp.split(parts[0], 3, 1) if len(parts) == 1 else (parts[0], *jnp.split(parts[1], 2, 1))
    )
    q, k, v = (x.reshape(len(x), HEADS, SIZE) for x in (q, k, v))
    numbers = sequence_numbers()
    asking = numbers[first_tokens()] if first_only else numbers
    seen = (asking[:, None] == numbers[None]) & (asking[:, None] >= 0)
    logits = jnp.einsum("ahk,nhk->han", q, k) * SIZE**-0.5
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e9), axis=-1) * seen
    if rate:
        weights = jnp.where(kept(rate, first_only), weights / (1 - rate), 0)
    return jnp.einsum("han,nhk->ahk", weights, v).reshape(len(q), WIDTH)


def attend(parts, rate, first_only=False):
    return ragged_attention.attend(parts, spans(first_only), SEED_2, HEADS, rate, LONGEST)


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_value_and_gradient_are_those_of_dense_attention(rate, first_only):
    """Dropout's masks included, made again by each of the three kernels."""
    parts = projections(first_only)
    direction = np.random.default_rng(1).normal(size=(len(parts[0]), WIDTH))

    def value_and_gradient(fn):
        @jax.jit
        def run(parts):
            value, pull_back = jax.vjp(lambda p: fn(p, rate, first_only), parts)
            return value, *pull_back(direction.astype(np.float32))

        return jax.tree.leaves(run(parts))

    for ours, theirs in zip(value_and_gradient(attend), value_and_gradient(dense), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_dropout_zeroes_its_share_of_weights():
    for rate in (0.1, 0.5):
        share = kept(rate).mean()
        assert share == pytest.approx(
            1 - rate, abs=5 * (rate * (1 - rate) / kept(rate).size) ** 0.5
        )


def test_padding_reads_nothing():
    found = np.asarray(jax.jit(lambda p: attend(p, 0.1))(projections()))
    assert not found[sequence_numbers() < 0].any()
    assert found[sequence_numbers() >= 0].all()


@pytest.mark.parametrize("count", [64, 128])
def test_sequences_that_fill_whole_tiles(count):
    """Where sequences end at the edges of tiles, and no padding is left."""
    numbers = np.repeat(np.arange(TOKENS // count), count)
    start_N, end_N = ragged_attention.token_spans(numbers)
    own = ragged_attention.spans(start_N, end_N, numbers >= 0, TOKENS)
    keys_2xG, queries_2xC = np.asarray(own.keys_2xG), np.asarray(own.queries_2xC)
    assert (np.diff(keys_2xG, axis=0) * ragged_attention.KEYS == count).all()
    assert (np.diff(queries_2xC, axis=0) * ragged_attention.QUERIES == count).all()


def test_auto_goes_by_device_and_sizes_of_heads():
    assert attention.implementation("auto", "gpu", (64, 32)) == "ragged"
    assert attention.implementation("auto", "cpu", (64, 32)) == "plain"
    assert attention.implementation("auto", "tpu", (64, 64)) == "plain"
    for sizes in ((26, 64), (64, 48), (8, 64)):
        assert attention.implementation("auto", "gpu", sizes) == "plain"
        with pytest.raises(InputError, match="heads must have 16, 32, 64"):
            attention.implementation("ragged", "gpu", sizes)
    assert attention.implementation("cudnn", "cpu", (26,)) == "cudnn"


def views_of(name, lengths):
    """One row each, or a flat row, and the tokens' sequences."""
    if name == "ragged":
        shapes = [packing.plan_flat(sum(lengths), len(lengths))]
    else:
        shapes = [packing.Shape(len(lengths), 16)]
    tokens = np.zeros(sum(lengths), np.int32)
    packed = packing.pack(packing.Ragged(tokens, tokens, np.array(lengths)), shapes)
    numbers_N = np.concatenate([block.sequence_RxT.reshape(-1) for block in packed.blocks])
    return attention.views(name, packed.blocks), numbers_N


@pytest.mark.parametrize("name", ["plain", "xla", "ragged"])
def test_a_changed_sequence_moves_no_other(name):
    """By every implementation that a CPU has: not one bit of what other sequences read."""
    views, numbers_N = views_of(name, (7, 16, 4, 9))
    qkv = np.random.default_rng(0).normal(size=(len(numbers_N), 3 * WIDTH)).astype(np.float32)

    @jax.jit
    def read(qkv):
        if name == "ragged":
            return ragged_attention.attend((qkv,), views, SEED_2, HEADS, 0.0, LONGEST)
        return attention.by_rows(name, (qkv,), views, HEADS, lambda x: x)

    before = np.asarray(read(qkv))
    for number in range(4):
        changed = np.where((numbers_N == number)[:, None], 3 * qkv + 1, qkv)
        after = np.asarray(read(changed))
        others = (numbers_N >= 0) & (numbers_N != number)
        np.testing.assert_array_equal(after[others], before[others])
        assert (after[numbers_N == number] != before[numbers_N == number]).any()


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_lower_for_a_gpu(dtype, first_only):
    """Forward and both gradients become Triton kernels, without a GPU at hand."""
    own = spans(first_only)

    def loss(parts):
        out = ragged_attention.attend(parts, own, SEED_2, HEADS, 0.1, LONGEST)
        return out.astype(jnp.float32).sum()

    parts = tuple(x.astype(dtype) for x in map(jnp.asarray, projections(first_only)))
    context = contextlib.nullcontext()
    if hasattr(jax.sharding, "AbstractDevice"):
        # From JAX 0.11 on the lowering asks for which GPU.
        device = jax.sharding.AbstractDevice(
            device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
        )
        with contextlib.suppress(TypeError):
            mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
            context = jax.sharding.use_abstract_mesh(mesh)
    with context:
        traced = jax.jit(jax.value_and_grad(loss)).trace(parts)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 3
