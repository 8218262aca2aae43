"""The BERT encoder (Devlin et al. 2019), the only room that imports Linen.

Layers are scanned, so every layer weight carries a leading layer axis `L` and compile time does not
grow with depth. Rows may hold several sequences: attention stays inside a sequence number.

Shape suffixes: R rows, T tokens of a row, D hidden size, H heads, K head size, L layers.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    """The shape of an encoder; field meanings are those of a Hugging Face `config.json`."""

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
        x_RxTxD = nn.Dropout(c.dropout, deterministic=deterministic)(x_RxTxD)
        return x_RxTxD.astype(c.dtype)


class Layer(nn.Module):
    """One post-norm transformer layer: [R, T, D] -> [R, T, D]; softmax and norms in float32."""

    config: BertConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_RxTxD, bias_Rx1xTxT):
        c = self.config
        rows, length, _ = x_RxTxD.shape
        head_size = c.hidden_size // c.num_heads

        def dense(features, name):
            init = nn.initializers.normal(c.initializer_range)
            return nn.Dense(features, dtype=c.dtype, kernel_init=init, name=name)

        def dropout(x):
            return nn.Dropout(c.dropout, deterministic=self.deterministic)(x)

        def add_norm(x, y, name):
            norm = nn.LayerNorm(epsilon=c.layer_norm_eps, name=name)
            return norm((x + dropout(y)).astype(jnp.float32)).astype(c.dtype)

        qkv_RxTx3xHxK = dense(3 * c.hidden_size, "qkv")(x_RxTxD).reshape(
            rows, length, 3, c.num_heads, head_size
        )
        q, k, v = (qkv_RxTx3xHxK[:, :, i] for i in range(3))
        logits_RxHxTxT = jnp.einsum("rqhk,rshk->rhqs", q * head_size**-0.5, k)
        weights_RxHxTxT = jax.nn.softmax(logits_RxHxTxT.astype(jnp.float32) + bias_Rx1xTxT)
        weights_RxHxTxT = dropout(weights_RxHxTxT).astype(c.dtype)
        y_RxTxD = jnp.einsum("rhqs,rshk->rqhk", weights_RxHxTxT, v).reshape(rows, length, -1)
        x_RxTxD = add_norm(x_RxTxD, dense(c.hidden_size, "attention_output")(y_RxTxD), "norm_1")

        y_RxTxF = ACTIVATIONS[c.activation](dense(c.intermediate_size, "intermediate")(x_RxTxD))
        x_RxTxD = add_norm(x_RxTxD, dense(c.hidden_size, "output")(y_RxTxF), "norm_2")
        return x_RxTxD, None


class Encoder(nn.Module):
    """Token numbers [R, T] to the last layer's hidden states [R, T, D] in `config.dtype`.

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
        same_RxTxT = sequence_RxT[:, :, None] == sequence_RxT[:, None, :]
        bias_Rx1xTxT = jnp.where(same_RxTxT, 0.0, MASKED)[:, None]
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )
        x_RxTxD, _ = layers(c, deterministic, name="layers")(x_RxTxD, bias_Rx1xTxT)
        return x_RxTxD
