"""Both models against transformers' hidden states: pooling, padding, layout, head, dropout."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from shapes import models_of, read_shape

from rqv2_jax.data import packing
from rqv2_jax.models import scoring as models
from rqv2_jax.models import weights

# Neither sorted by length nor alone in its block, so that order and offsets matter.
LENGTHS = (7, 12, 4, 9, 3)
SHAPES = (packing.Shape(2, 8), packing.Shape(3, 16))
RATE = 0.25
KEY = jax.random.key(0, impl="rbg")


def ragged(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths)
    tokens = rng.integers(5, 60, lengths.sum()).astype(np.int32)
    return packing.Ragged(tokens, tokens % 2, lengths)


@pytest.fixture(scope="module")
def tiny(make_bert):
    folder, model = make_bert(num_hidden_layers=1)
    config = read_shape(folder, 1, dropout=RATE)
    sequences = ragged()
    starts = np.cumsum(LENGTHS)[:-1]
    states = []
    for tokens, types in zip(*(np.split(x, starts) for x in sequences[:2])):
        with torch.no_grad():
            found = model(torch.tensor(tokens)[None], token_type_ids=torch.tensor(types)[None])
        states.append(found.last_hidden_state[0].numpy())
    return config, weights.load_encoder(folder, config), states


@partial(jax.jit, static_argnums=0)
def run(model, params, packed, key=None):
    """The vectors and the re-ranker's scores of the same encoder, compiled at once."""
    vectors_NxD = model.vectors(params["encoder"], packed, key)
    return vectors_NxD, model.reranker_scores(params, packed, key)


def with_head(encoder, kernel=1.0, bias=0.7):
    kernel_D = kernel * np.cos(np.arange(32)).astype(np.float32)
    return {"encoder": encoder, "head": {"kernel": kernel_D, "bias": np.float32(bias)}}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_and_scores(tiny, pooling):
    """The retriever pools as it is told; the re-ranker's head always reads the first state."""
    config, encoder, states = tiny
    params = with_head(encoder)
    packed = packing.pack(ragged(), SHAPES)
    vectors, scores = run(models_of(config, pooling), params, packed)
    pool = {"cls": lambda s: s[0], "mean": lambda s: s.mean(0)}[pooling]
    assert vectors.dtype == scores.dtype == jnp.float32
    np.testing.assert_allclose(vectors, [pool(s) for s in states], rtol=0, atol=1e-5)
    expected = [state[0] @ params["head"]["kernel"] + 0.7 for state in states]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["plain", "ragged"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_flat_row_gives_the_same_vectors_and_scores(tiny, pooling, attention):
    config, encoder, _ = tiny
    params = with_head(encoder)
    plain = models_of(config, pooling)
    other = models_of(dataclasses.replace(config, attention=attention), pooling)
    flat = packing.pack(ragged(), [packing.plan_flat(sum(LENGTHS), len(LENGTHS))])
    assert flat.blocks[0].tokens_RxT.shape == (1, 128)
    expected = run(plain, params, packing.pack(ragged(), SHAPES))
    for ours, theirs in zip(run(other, params, flat), expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_does_not_leak(tiny, pooling):
    config, encoder, _ = tiny
    packed = packing.pack(ragged(), SHAPES)
    dirty = tuple(
        packing.Block(
            *(
                np.where(block.sequence_RxT < 0, garbage, array)
                for array, garbage in zip(block[:3], (50, 1, 33))
            ),
            *block[3:],
        )
        for block in packed.blocks
    )
    model, params = models_of(config, pooling), with_head(encoder)
    for clean, found in zip(
        run(model, params, packed), run(model, params, packed._replace(blocks=dirty))
    ):
        np.testing.assert_array_equal(found, clean)


def test_retriever_scores_are_those_of_each_lists_own_passages():
    query_BxD = np.array([[1.0, 10.0], [100.0, 1000.0]])
    passage_BPxD = np.arange(12.0).reshape(6, 2)
    expected = [[q @ p for p in own] for q, own in zip(query_BxD, passage_BPxD.reshape(2, 3, 2))]
    np.testing.assert_array_equal(models.retriever_scores(query_BxD, passage_BPxD), expected)
    assert models.retriever_scores(query_BxD, passage_BPxD)[1, 0] == 100 * 6 + 1000 * 7


def test_half_precision_gives_float32_vectors_and_scores(tiny):
    config, encoder, states = tiny
    half = models_of(dataclasses.replace(config, dtype="bfloat16"), "mean")
    vectors, scores = run(half, with_head(encoder), packing.pack(ragged(), SHAPES))
    assert vectors.dtype == scores.dtype == jnp.float32
    # A mean taken in bfloat16 would have 8 bits.
    assert np.any(vectors != vectors.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(vectors, [s.mean(0) for s in states], rtol=0, atol=0.03)


def constant(encoder):
    """The encoder with all hidden states 1, whatever is read and dropped."""
    norm = encoder["layers"]["norm_2"]
    ones = {"scale": np.zeros_like(norm["scale"]), "bias": np.ones_like(norm["bias"])}
    return {**encoder, "layers": {**encoder["layers"], "norm_2": ones}}


def test_head_dropout(tiny):
    """A score is the number of kept values, each scaled up; without a key all are kept."""
    config, encoder, _ = tiny
    model = models_of(config, "mean")
    head = {"kernel": np.ones(32, np.float32), "bias": np.float32(0)}
    params = {"encoder": constant(encoder), "head": head}
    packed = packing.pack(ragged(), SHAPES)
    np.testing.assert_array_equal(run(model, params, packed)[1], 32)
    keys = jax.random.split(KEY, 100)
    kept = (1 - RATE) * np.array([run(model, params, packed, key)[1] for key in keys])
    np.testing.assert_allclose(kept, kept.round(), atol=1e-4)
    values = kept.size * 32
    assert kept.sum() / values == pytest.approx(
        1 - RATE, abs=5 * (RATE * (1 - RATE) / values) ** 0.5
    )
    # As many different counts as independent masks give.
    assert kept.std() == pytest.approx((32 * RATE * (1 - RATE)) ** 0.5, rel=0.2)


def test_dropout_masks_differ_between_blocks_and_keys(tiny):
    config, encoder, _ = tiny
    count = len(LENGTHS)
    tokens = np.tile(np.arange(5, 9, dtype=np.int32), count)
    same = packing.Ragged(tokens, tokens * 0, np.full(count, 4))
    packed = packing.pack(same, SHAPES)
    model, params = models_of(config, "mean"), with_head(encoder)
    plain, _ = run(model, params, packed)
    np.testing.assert_allclose(plain, plain[:1].repeat(count, 0), atol=1e-5)
    noisy, _ = run(model, params, packed, KEY)
    np.testing.assert_array_equal(noisy, run(model, params, packed, KEY)[0])
    other, _ = run(model, params, packed, jax.random.split(KEY)[0])
    everything = np.concatenate([noisy, other])
    apart = np.abs(everything[:, None] - everything).max(-1) + np.eye(2 * count)
    assert apart.min() > 0.01


def test_head_starts_at_berts_deviation_and_bias_0(tiny):
    config, encoder, _ = tiny
    wide = dataclasses.replace(config, hidden_size=10_000, initializer_range=0.05)
    params = models.init_reranker(encoder, wide, jax.random.key(3))
    assert params["encoder"] is encoder
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    assert kernel.shape == (10_000,)
    assert bias.shape == ()
    assert bias == 0
    assert kernel.std() == pytest.approx(0.05, rel=0.05)
    assert abs(kernel.mean()) < 0.005
    other = models.init_reranker(encoder, wide, jax.random.key(4))["head"]["kernel"]
    assert np.abs(kernel - other).max() > 0.05
