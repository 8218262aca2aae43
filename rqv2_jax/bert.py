"""The BERT encoder (Devlin et al. 2019), the only room that imports Linen.

Layers are scanned, so every layer weight carries a leading layer axis `L` and compile time does not
grow with depth. All dense work is done on the tokens of all blocks at once; only attention sees rows.
Rows may hold several sequences: attention stays inside a sequence number.

Shape suffixes: R rows of a block, T tokens of a row, S sequences of a row, N tokens of all blocks,
A tokens that ask, D hidden size, F intermediate size, H heads, K head size, L layers.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rqv2_jax.data.packing import Block

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

    `remat` is one of `REMAT`; `unrolled` says whether the loop over layers is. `attention` is "plain",
    or an implementation of `jax.nn.dot_product_attention`, which does not drop out its weights.
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


class Dropout(nn.Module):
    """Zeroes a share `rate` of the values and scales the others up."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        if self.deterministic or self.rate == 0:
            return x
        return drop(x, self.rate, self.make_rng("dropout"))


def drop(x, rate: float, key):
    """Zeroes a share `rate` of the values and scales the others up.

    Whether a value is kept is a hash of its place: its number, made another by two words of the key,
    goes through MurmurHash3's finaliser. Unlike JAX's generators it is a few operations that XLA fuses
    into what follows, where on a CPU the generators take most of a training step.
    """
    start, factor = jax.random.bits(key, (2,), jnp.uint32)
    h = (jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) + start) * (factor | 1)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    # In bfloat16 1 - rate itself would be rounded, and every value scaled up by too much or too little.
    scaled = (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype)
    return jnp.where((h ^ (h >> 16)) >= jnp.uint32(rate * 2**32), scaled, 0)


class Embeddings(nn.Module):
    """Sum of word, position and type embeddings, then layer norm and dropout: [N] -> [N, D]."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens_N, types_N, positions_N, *, deterministic: bool):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)

        def embed(count, name):
            return nn.Embed(count, c.hidden_size, embedding_init=init, name=name)

        x_NxD = (
            embed(c.vocab_size, "word")(tokens_N)
            + embed(c.max_positions, "position")(positions_N)
            + embed(c.type_vocab_size, "type")(types_N)
        )
        x_NxD = nn.LayerNorm(epsilon=c.layer_norm_eps, name="norm")(x_NxD)
        return Dropout(c.dropout, deterministic)(x_NxD).astype(c.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _exp(x, dtype):
    """exp of float32, handed on in `dtype`: the gradient keeps no float32 copy of its own."""
    return jnp.exp(x).astype(dtype)


@_exp.defjvp
def _exp_jvp(dtype, primals, tangents):
    y = _exp(*primals, dtype)
    return y, y * tangents[0].astype(dtype)


class Projections(nn.Module):
    """Queries [A, D] of the asking tokens, keys and values [N, D] of all, from one weight."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_NxD, asking_AxD):
        c = self.config
        size = c.hidden_size
        init = nn.initializers.normal(c.initializer_range)
        kernel_DxE = self.param("kernel", init, (size, 3 * size)).astype(c.dtype)
        bias_E = self.param("bias", nn.initializers.zeros, (3 * size,)).astype(c.dtype)
        if asking_AxD is x_NxD:
            qkv_NxE = x_NxD @ kernel_DxE + bias_E
            return jnp.split(qkv_NxE, 3, axis=1)
        q_AxD = asking_AxD @ kernel_DxE[:, :size] + bias_E[:size]
        kv_NxE = x_NxD @ kernel_DxE[:, size:] + bias_E[size:]
        return q_AxD, *jnp.split(kv_NxE, 2, axis=1)


class Layer(nn.Module):
    """One post-norm transformer layer: [N, D] -> [N, D]; softmax and norms in float32.

    If only some tokens `asking_AxD` ask and go on, [A, D] -> [A, D]. A block's rows, what each token
    may see and how many ask are told by its bias: [R, 1, asking tokens of a row, T].
    """

    config: BertConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_NxD, biases: tuple[jax.Array, ...], asking_AxD=None):
        c = self.config
        asking_AxD = x_NxD if asking_AxD is None else asking_AxD

        def dense(features, name):
            init = nn.initializers.normal(c.initializer_range)
            return nn.Dense(features, dtype=c.dtype, kernel_init=init, name=name)

        def dropout(x):
            return Dropout(c.dropout, self.deterministic)(x)

        def add_norm(x, y, name):
            norm = nn.LayerNorm(epsilon=c.layer_norm_eps, name=name)
            return norm((x + dropout(y)).astype(jnp.float32)).astype(c.dtype)

        def attend(q_AxD, k_NxD, v_NxD, bias_Rx1xAxT):
            rows, _, asking, length = bias_Rx1xAxT.shape
            heads, size = c.num_heads, c.hidden_size // c.num_heads
            # First tokens alone are little work, and cuDNN takes no odd number of them.
            if c.attention != "plain" and asking == length:
                q_RxAxHxK = q_AxD.reshape(rows, asking, heads, size)
                k_RxTxHxK, v_RxTxHxK = (
                    x.reshape(rows, length, heads, size) for x in (k_NxD, v_NxD)
                )
                y_RxAxHxK = jax.nn.dot_product_attention(
                    *(q_RxAxHxK, k_RxTxHxK, v_RxTxHxK),
                    bias=bias_Rx1xAxT.astype(c.dtype),
                    implementation=c.attention,
                )
                return y_RxAxHxK.reshape(rows * asking, c.hidden_size)
            # Heads in front of tokens and keys already transposed: plain batched products, which
            # XLA's CPU backend runs faster than any other order of the axes.
            q_RxHxAxK = q_AxD.reshape(rows, asking, heads, size).transpose(0, 2, 1, 3) * size**-0.5
            k_RxHxKxT = k_NxD.reshape(rows, length, heads, size).transpose(0, 2, 3, 1)
            v_RxHxTxK = v_NxD.reshape(rows, length, heads, size).transpose(0, 2, 1, 3)
            logits_RxHxAxT = jnp.matmul(q_RxHxAxK, k_RxHxKxT).astype(jnp.float32) + bias_Rx1xAxT
            # Softmax, divided by its sum behind the product with the values: so the largest arrays
            # of a layer are written in `dtype` and once.
            top_RxHxAx1 = jax.lax.stop_gradient(logits_RxHxAxT.max(axis=-1, keepdims=True))
            e_RxHxAxT = _exp(logits_RxHxAxT - top_RxHxAx1, c.dtype)
            sum_RxHxAx1 = e_RxHxAxT.astype(jnp.float32).sum(axis=-1, keepdims=True)
            y_RxHxAxK = jnp.matmul(dropout(e_RxHxAxT), v_RxHxTxK).astype(jnp.float32)
            y_RxHxAxK = (y_RxHxAxK / sum_RxHxAx1).astype(c.dtype)
            return y_RxHxAxK.transpose(0, 2, 1, 3).reshape(rows * asking, c.hidden_size)

        q_AxD, k_NxD, v_NxD = Projections(c, name="qkv")(x_NxD, asking_AxD)
        shapes = [bias.shape for bias in biases]
        asking_ends = np.cumsum([rows * asking for rows, _, asking, _ in shapes])[:-1]
        ends = np.cumsum([rows * length for rows, _, _, length in shapes])[:-1]
        keys_and_values = (jnp.split(x, ends) for x in (k_NxD, v_NxD))
        parts = zip(jnp.split(q_AxD, asking_ends), *keys_and_values, biases)
        y_AxD = jnp.concatenate([attend(*part) for part in parts])
        x_AxD = add_norm(asking_AxD, dense(c.hidden_size, "attention_output")(y_AxD), "norm_1")

        y_AxF = ACTIVATIONS[c.activation](dense(c.intermediate_size, "intermediate")(x_AxD))
        return add_norm(x_AxD, dense(c.hidden_size, "output")(y_AxF), "norm_2"), None


class Encoder(nn.Module):
    """Blocks of token numbers to the last layer's hidden states [N, D] in `config.dtype`.

    A token attends to the tokens of its own sequence only, which `packing.Block.sequence_RxT` numbers.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, blocks: tuple[Block, ...], *, deterministic: bool):
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
            x_NxD, tuple(_bias(block, block.sequence_RxT) for block in blocks)
        )
        return x_NxD


def _remat(policy: str, *, in_loop: bool):
    """`Layer` under one of the policies of `REMAT`."""
    if policy == "none":
        return Layer
    # Outside a loop XLA would find what is computed twice, and keep it.
    return nn.remat(Layer, policy=REMAT[policy], prevent_cse=not in_loop)


def _bias(block: Block, asking_RxA):
    """What keeps attention inside a sequence [R, 1, A, T], by the number of each asking token's."""
    same_RxAxT = asking_RxA[:, :, None] == block.sequence_RxT[:, None, :]
    return jnp.where(same_RxAxT, 0.0, MASKED)[:, None]


def by_block(x_NxD, blocks: tuple[Block, ...]) -> list[jax.Array]:
    """The states [R, T, D] of each block out of those of all, as `Encoder` gives them."""
    ends = np.cumsum([block.sequence_RxT.size for block in blocks])[:-1]
    parts = zip(jnp.split(x_NxD, ends), blocks)
    return [part.reshape(*block.sequence_RxT.shape, -1) for part, block in parts]


def first_states(config: BertConfig, params, blocks: tuple[Block, ...], key):
    """The last layer's hidden state of each sequence's first token, as `Encoder` gives it.

    [R * S of all blocks, D], in the order of the blocks' `first_RxS`. The last layer computes its
    queries, attention and feed-forward for those tokens alone. `key` is that of dropout; None switches
    it off.
    """
    lower = dataclasses.replace(config, num_layers=config.num_layers - 1)
    lower_params = {**params, "layers": jax.tree.map(lambda x: x[:-1], params["layers"])}
    last_params = jax.tree.map(lambda x: x[-1], params["layers"])
    off = key is None
    x_NxD = Encoder(lower).apply(
        {"params": lower_params},
        blocks,
        deterministic=off,
        rngs={} if off else {"dropout": key},
    )
    first, biases = [], []
    for block, part_RxTxD in zip(blocks, by_block(x_NxD, blocks)):
        found = jnp.take_along_axis(part_RxTxD, block.first_RxS[..., None], axis=1)
        first.append(found.reshape(-1, config.hidden_size))
        biases.append(
            _bias(block, jnp.take_along_axis(block.sequence_RxT, block.first_RxS, axis=1))
        )
    x_AxD, _ = _remat(config.remat, in_loop=False)(config, off).apply(
        {"params": last_params},
        *(x_NxD, tuple(biases), jnp.concatenate(first)),
        # Another key than that of the layers below, so that its masks are its own.
        rngs={} if off else {"dropout": jax.random.fold_in(key, config.num_layers)},
    )
    return x_AxD
