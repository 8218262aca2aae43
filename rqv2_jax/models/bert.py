"""The BERT encoder (Devlin et al. 2019), the only module that imports Linen.

Layers are scanned, so every layer weight carries a leading layer axis `L` and compile time does not
grow with depth. All dense work is done on the tokens of all blocks at once; only attention sees rows.

Shape suffixes: R rows of a block, T tokens of a row, S sequences of a row, N tokens of all blocks,
A queries (the tokens that attend), D hidden size, E projections side by side, F intermediate size.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from rqv2_jax.models import attention, products, ragged_attention
from rqv2_jax.models.attention import Blocks
from rqv2_jax.models.dropout import survive

# Nested by module; the leaves are arrays.
Params = dict[str, Any]

# The name, for rematerialisation, of dense products with their biases.
KEPT = "dense"

# A layer keeps for its gradient everything, the outputs of its dense products and attention kernel, or
# its input alone; the rest is computed again.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT, ragged_attention.KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def gelu(x: Array) -> Array:
    """Returns x times the normal distribution's share below x, as BERT has it."""
    if x.dtype != jnp.float32:
        # In bfloat16 the sum 1 + erf loses all but three digits.
        return nn.gelu(x, approximate=False)
    # JAX's own goes by erfc, which takes a CPU three times as long as erf.
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder; field meanings are those of a Hugging Face `config.json`.

    `remat` is one of `REMAT`, `attention` comes from `attention.implementation`, `unrolled` says
    whether the layer loop is unrolled, and `half_products`, which training alone may set, whether
    matrix products are `products.rounded`.
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
    attention: str
    unrolled: bool
    half_products: bool = False

    @property
    def head_size(self) -> int:
        """Returns the number of columns of one head."""
        return self.hidden_size // self.num_heads

    def multiply(self, x: Array, y: Array) -> Array:
        """Returns the matrix product of x [..., N, K] and y [..., K, M], or [K, M]."""
        return products.rounded(x, y) if self.half_products else x @ y


class Dropout(nn.Module):
    """Zeroes a share `rate` of the values and scales the others up."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.deterministic or self.rate == 0:
            return x
        return drop(x, self.rate, self.make_rng("dropout"))


def drop(x: Array, rate: float, key: Array) -> Array:
    """Zeroes a share `rate` of the values and scales the others up."""
    start, factor = jax.random.bits(key, (2,), jnp.uint32)
    index = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    # In bfloat16 1 - rate would be rounded, and every value scaled up by too much or too little.
    scaled = (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype)
    return jnp.where(survive(index, start, factor, rate), scaled, 0)


class Embeddings(nn.Module):
    """Sum of word, position and type embeddings, then layer norm and dropout: [N] -> [N, D]."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, tokens_N: Array, types_N: Array, positions_N: Array, *, deterministic: bool
    ) -> Array:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)

        def embed(count: int, name: str) -> nn.Embed:
            return nn.Embed(count, c.hidden_size, embedding_init=init, name=name)

        x_NxD = (
            embed(c.vocab_size, "word")(tokens_N)
            + embed(c.max_positions, "position")(positions_N)
            + embed(c.type_vocab_size, "type")(types_N)
        )
        x_NxD = nn.LayerNorm(epsilon=c.layer_norm_eps, name="norm")(x_NxD)
        return Dropout(c.dropout, deterministic)(x_NxD).astype(c.dtype)


class Projections(nn.Module):
    """Queries, keys and values from one weight: ([N, 3 D],), or ([A, D], [N, 2 D]) for A queries."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_NxD: Array, query_AxD: Array) -> tuple[Array, ...]:
        c = self.config
        size = c.hidden_size
        init = nn.initializers.normal(c.initializer_range)
        kernel_DxE = self.param("kernel", init, (size, 3 * size)).astype(c.dtype)
        bias_E = self.param("bias", nn.initializers.zeros, (3 * size,)).astype(c.dtype)
        if query_AxD is x_NxD:
            return (checkpoint_name(c.multiply(x_NxD, kernel_DxE) + bias_E, KEPT),)
        q_AxD = c.multiply(query_AxD, kernel_DxE[:, :size]) + bias_E[:size]
        kv_NxE = c.multiply(x_NxD, kernel_DxE[:, size:]) + bias_E[size:]
        return checkpoint_name(q_AxD, KEPT), checkpoint_name(kv_NxE, KEPT)


class Layer(nn.Module):
    """One post-norm transformer layer: [N, D] -> [N, D]; softmax and norms in float32.

    With `query_AxD`, only those tokens are queries and outputs: [A, D]. `views` are from
    `attention.views`, for the same queries.
    """

    config: BertConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self, x_NxD: Array, views: Any, query_AxD: Array | None = None
    ) -> tuple[Array, None]:
        c = self.config
        query_AxD = x_NxD if query_AxD is None else query_AxD

        def dense(x: Array, features: int, name: str) -> Array:
            init = nn.initializers.normal(c.initializer_range)
            how: dict[str, Any] = {"dot_general": lambda x, y, *_, **__: c.multiply(x, y)}
            layer = nn.Dense(features, dtype=c.dtype, kernel_init=init, name=name, **how)
            return checkpoint_name(layer(x), KEPT)

        def add_norm(x: Array, y: Array, name: str) -> Array:
            norm = nn.LayerNorm(epsilon=c.layer_norm_eps, name=name)
            return norm((x + self._dropout(y)).astype(jnp.float32)).astype(c.dtype)

        y_AxD = self._attend(Projections(c, name="qkv")(x_NxD, query_AxD), views)
        x_AxD = add_norm(query_AxD, dense(y_AxD, c.hidden_size, "attention_output"), "norm_1")

        y_AxF = ACTIVATIONS[c.activation](dense(x_AxD, c.intermediate_size, "intermediate"))
        return add_norm(x_AxD, dense(y_AxF, c.hidden_size, "output"), "norm_2"), None

    def _dropout(self, x: Array) -> Array:
        return Dropout(self.config.dropout, self.deterministic)(x)

    def _attend(self, projections: tuple[Array, ...], views: Any) -> Array:
        c = self.config
        if c.attention != "ragged":
            return attention.by_rows(c.attention, projections, views, c.num_heads, self._dropout)
        rate = 0.0 if self.deterministic else c.dropout
        seed_2 = jnp.zeros(2, jnp.uint32)
        if rate:
            seed_2 = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        return ragged_attention.attend(
            projections, views, seed_2, c.num_heads, rate, c.max_positions
        )


class Encoder(nn.Module):
    """BERT: blocks of token numbers to the last layer's hidden states [N, D] in `config.dtype`.

    A token attends only to tokens of its own sequence, as `packing.Block.sequence_RxT` numbers them.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, blocks: Blocks, *, deterministic: bool) -> Array:
        c = self.config
        flat = (
            jnp.concatenate([x.reshape(-1) for x in part]) for part in zip(*(b[:3] for b in blocks))
        )
        x_NxD = Embeddings(c, name="embeddings")(*flat, deterministic=deterministic)
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
        x_NxD, _ = layers(c, deterministic, name="layers")(
            x_NxD, attention.views(c.attention, blocks)
        )
        return x_NxD


def _remat(policy: str, *, in_loop: bool) -> type[Layer]:
    """Returns `Layer` under one of the policies of `REMAT`."""
    if policy == "none":
        return Layer
    # Outside a loop XLA would see that a value is computed twice, and keep it.
    return nn.remat(Layer, policy=REMAT[policy], prevent_cse=not in_loop)


def states(config: BertConfig, params: Params, blocks: Blocks, key: Array | None) -> Array:
    """Returns the last layer's hidden states of all tokens [N, D]; without `key` nothing is dropped."""
    rngs = {} if key is None else {"dropout": key}
    encoder: Any = Encoder(config)
    return encoder.apply({"params": params}, blocks, deterministic=key is None, rngs=rngs)


def by_block(x_NxD: Array, blocks: Blocks) -> list[Array]:
    """Splits the states of all tokens into those of each block [R, T, D]."""
    ends = np.cumsum([block.sequence_RxT.size for block in blocks])[:-1]
    parts = zip(jnp.split(x_NxD, ends), blocks)
    return [part.reshape(*block.sequence_RxT.shape, -1) for part, block in parts]


def first_states(config: BertConfig, params: Params, blocks: Blocks, key: Array | None) -> Array:
    """Returns the last layer's hidden state of each sequence's first token, as `states` does.

    [R * S of all blocks, D], in the order of the blocks' `first_RxS`. The last layer computes its
    queries, attention and feed-forward for those tokens alone.
    """
    lower = dataclasses.replace(config, num_layers=config.num_layers - 1)
    lower_params = {**params, "layers": jax.tree.map(lambda x: x[:-1], params["layers"])}
    last_params = jax.tree.map(lambda x: x[-1], params["layers"])
    x_NxD = states(lower, lower_params, blocks, key)
    first = []
    for block, part_RxTxD in zip(blocks, by_block(x_NxD, blocks)):
        first_RxSxD = jnp.take_along_axis(part_RxTxD, block.first_RxS[..., None], axis=1)
        first.append(first_RxSxD.reshape(-1, config.hidden_size))
    views = attention.views(config.attention, blocks, first_only=True)
    # Not the key of the layers below, so that this layer's masks differ from theirs.
    rngs = {} if key is None else {"dropout": jax.random.fold_in(key, config.num_layers)}
    x_AxD, _ = _remat(config.remat, in_loop=False)(config, key is None).apply(
        {"params": last_params}, x_NxD, views, jnp.concatenate(first), rngs=rngs
    )
    return x_AxD
