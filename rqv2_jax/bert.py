"""The BERT encoder (Devlin et al. 2019), the only room that imports Linen.

Layers are scanned, so every layer weight carries a leading layer axis `L` and compile time does not
grow with depth. Rows may hold several sequences: attention stays inside a sequence number.

Shape suffixes: R rows, T tokens of a row, N = R * T, D hidden size,
F intermediate size, H heads, K head size, L layers.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

# What a layer keeps for its gradient: everything, what its dense products gave, or its input alone;
# the rest is computed again.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Finite: -inf gives NaN gradients in a softmax row that is masked throughout.
MASKED = -1e9

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder; field meanings are those of a Hugging Face `config.json`.

    `remat` is one of `REMAT`; `unrolled` says whether the loop over layers is.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int
    layer_norm_eps: float
    activation: str
    dropout: float
    initializer_range: float
    dtype: str
    remat: str
    unrolled: bool


class Dropout(nn.Module):
    """Zeroes a share `rate` of the values, rounded to 1/65536, and scales the others up."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        if self.deterministic or self.rate == 0:
            return x
        # 16 random bits decide a value: half the cost of the 32 that a uniform float takes.
        dropped = round(self.rate * 2**16)
        bits = jax.random.bits(self.make_rng("dropout"), x.shape, jnp.uint16)
        return jnp.where(bits >= dropped, x * (2**16 / (2**16 - dropped)), 0)


class Embeddings(nn.Module):
    """Sum of word, position and type embeddings, then layer norm and dropout: [R, T] -> [R, T, D]."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens_RxT, types_RxT, positions_RxT, *, deterministic: bool):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)

        def embed(count, name):
            return nn.Embed(count, c.hidden_size, embedding_init=init, name=name)

        x_RxTxD = (
            embed(c.vocab_size, "word")(tokens_RxT)
            + embed(c.max_positions, "position")(positions_RxT)
            + embed(c.type_vocab_size, "type")(types_RxT)
        )
        x_RxTxD = nn.LayerNorm(epsilon=c.layer_norm_eps, name="norm")(x_RxTxD)
        x_RxTxD = Dropout(c.dropout, deterministic)(x_RxTxD)
        return x_RxTxD.astype(c.dtype)


class Layer(nn.Module):
    """One post-norm transformer layer: [R * T, D] -> [R * T, D]; softmax and norms in float32.

    With `first_only` [R * T, D] -> [R, D]: only the first token of each row asks and goes on.
    """

    config: BertConfig
    deterministic: bool
    first_only: bool = False

    @nn.compact
    def __call__(self, x_NxD, bias_Rx1xTxT):
        c = self.config
        rows, _, _, length = bias_Rx1xTxT.shape
        head_size = c.hidden_size // c.num_heads

        def dense(features, name):
            init = nn.initializers.normal(c.initializer_range)
            return nn.Dense(features, dtype=c.dtype, kernel_init=init, name=name)

        def dropout(x):
            return Dropout(c.dropout, self.deterministic)(x)

        def add_norm(x, y, name):
            norm = nn.LayerNorm(epsilon=c.layer_norm_eps, name=name)
            return norm((x + dropout(y)).astype(jnp.float32)).astype(c.dtype)

        qkv_RxTx3xHxK = dense(3 * c.hidden_size, "qkv")(x_NxD).reshape(
            rows, length, 3, c.num_heads, head_size
        )
        # Heads in front of tokens and keys already transposed: plain batched products, which XLA's
        # CPU backend runs faster than any other order of the axes.
        asking = 1 if self.first_only else length
        x_NxD = x_NxD.reshape(rows, length, -1)[:, :asking].reshape(rows * asking, -1)
        q_RxHxTxK = qkv_RxTx3xHxK[:, :asking, 0].transpose(0, 2, 1, 3) * head_size**-0.5
        k_RxHxKxT = qkv_RxTx3xHxK[:, :, 1].transpose(0, 2, 3, 1)
        v_RxHxTxK = qkv_RxTx3xHxK[:, :, 2].transpose(0, 2, 1, 3)
        logits_RxHxTxT = jnp.matmul(q_RxHxTxK, k_RxHxKxT).astype(jnp.float32)
        logits_RxHxTxT = logits_RxHxTxT + bias_Rx1xTxT[:, :, :asking]
        weights_RxHxTxT = dropout(jax.nn.softmax(logits_RxHxTxT)).astype(c.dtype)
        y_RxHxTxK = jnp.matmul(weights_RxHxTxT, v_RxHxTxK)
        y_NxD = y_RxHxTxK.transpose(0, 2, 1, 3).reshape(x_NxD.shape)
        x_NxD = add_norm(x_NxD, dense(c.hidden_size, "attention_output")(y_NxD), "norm_1")

        y_NxF = ACTIVATIONS[c.activation](dense(c.intermediate_size, "intermediate")(x_NxD))
        x_NxD = add_norm(x_NxD, dense(c.hidden_size, "output")(y_NxF), "norm_2")
        return x_NxD, None


class Encoder(nn.Module):
    """Token numbers [R, T] to the last layer's hidden states [R * T, D] in `config.dtype`.

    `sequence_RxT` numbers the sequence every token belongs to; a token attends to the tokens of its
    own sequence only. `positions_RxT` restarts at 0 in every sequence.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, tokens_RxT, types_RxT, positions_RxT, sequence_RxT, *, deterministic: bool):
        c = self.config
        x_RxTxD = Embeddings(c, name="embeddings")(
            tokens_RxT, types_RxT, positions_RxT, deterministic=deterministic
        )
        # One product over all tokens is faster than one over rows of tokens.
        x_NxD = x_RxTxD.reshape(-1, c.hidden_size)
        if c.num_layers == 0:
            return x_NxD
        layers = nn.scan(
            _remat(c.remat, in_loop=not c.unrolled),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            unroll=c.num_layers if c.unrolled else 1,
        )
        x_NxD, _ = layers(c, deterministic, name="layers")(x_NxD, _bias(sequence_RxT))
        return x_NxD


def _remat(policy: str, *, in_loop: bool):
    """`Layer` under one of the policies of `REMAT`."""
    if policy == "none":
        return Layer
    # Outside a loop XLA would find what is computed twice, and keep it.
    return nn.remat(Layer, policy=REMAT[policy], prevent_cse=not in_loop)


def _bias(sequence_RxT):
    """What keeps attention inside a sequence, [R, 1, T, T]."""
    same_RxTxT = sequence_RxT[:, :, None] == sequence_RxT[:, None, :]
    return jnp.where(same_RxTxT, 0.0, MASKED)[:, None]


def first_states(
    config: BertConfig, params, tokens_RxT, types_RxT, positions_RxT, sequence_RxT, key
):
    """The last layer's hidden state of each row's first token [R, D], as `Encoder` gives it.

    The last layer computes its attention and feed-forward for those tokens alone. `key` is that of
    dropout; None switches it off.
    """
    lower = dataclasses.replace(config, num_layers=config.num_layers - 1)
    lower_params = {**params, "layers": jax.tree.map(lambda x: x[:-1], params["layers"])}
    last_params = jax.tree.map(lambda x: x[-1], params["layers"])
    off = key is None
    x_NxD = Encoder(lower).apply(
        {"params": lower_params},
        *(tokens_RxT, types_RxT, positions_RxT, sequence_RxT),
        deterministic=off,
        rngs={} if off else {"dropout": key},
    )
    x_RxD, _ = _remat(config.remat, in_loop=False)(config, off, first_only=True).apply(
        {"params": last_params},
        *(x_NxD, _bias(sequence_RxT)),
        # Another key than that of the layers below, so that its masks are its own.
        rngs={} if off else {"dropout": jax.random.fold_in(key, config.num_layers)},
    )
    return x_RxD
