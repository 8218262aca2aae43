"""The two models: from params and packed tokens to vectors or scores.

Retriever (dual encoder, paper eq. 1): `s_de(q, p) = E_Q(q) . E_P(p)`, two towers, or one for both
sides. Re-ranker (cross encoder): one encoder over the pair, one logit from its first token, or from the
mean of all.

Params are plain dicts: `{"query": encoder, "passage": encoder}` for the retriever, or
`{"both": encoder}`, and `{"encoder": encoder, "head": {"kernel": [D], "bias": []}}` for the re-ranker,
whose head has a `"pooler": {"kernel": [D, D], "bias": [D]}` too if it is BERT's sequence classifier.

Shape suffixes: N sequences, R rows of a block, T tokens of a row, S sequences of a row, D hidden size,
B lists, P passages of a list.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rqv2_jax.data.packing import Block, Packed
from rqv2_jax.models import bert
from rqv2_jax.models.bert import BertConfig, Params

# Shorter vectors are not lengthened to 1.
SHORTEST = 1e-12

# What `config.model.towers` says, and the encoders of a retriever's params.
TOWERS = {"separate": ("query", "passage"), "shared": ("both",)}


def tower(params: Params, side: str) -> Params:
    """Returns the encoder that a retriever reads one side with, "query" or "passage"."""
    return params["both"] if "both" in params else params[side]


@dataclasses.dataclass(frozen=True)
class Models:
    """The shapes and settings of both models, without their params.

    `towers` is a key of `TOWERS`. `pooling`, the retriever's, and `reranker_pooling` are "cls" or
    "mean". With similarity "cosine" vectors are divided by their length; with "dot" they stay as
    pooled. In training alone the retriever's scores are multiplied by `scale`. `head` is "linear", or
    "pooler" with BERT's dense layer and tanh before the linear one.
    """

    retriever: BertConfig
    reranker: BertConfig
    towers: str
    pooling: str
    similarity: str
    scale: float
    head: str
    reranker_pooling: str

    @property
    def flat(self) -> bool:
        """Says whether the models read sequences end to end in one row, not each in its own row."""
        return self.retriever.attention == "ragged"

    def reshaped(self, **changes: Any) -> "Models":
        """Returns the models with some fields of both encoders' configs changed."""
        retriever = dataclasses.replace(self.retriever, **changes)
        reranker = dataclasses.replace(self.reranker, **changes)
        return dataclasses.replace(self, retriever=retriever, reranker=reranker)

    def vectors(self, params: Params, packed: Packed, key: Array | None = None) -> Array:
        """Returns one tower's vectors [N, D] in float32, not scaled; `key` is that of dropout."""
        vectors_NxD = _pooled(self.retriever, self.pooling, params, packed, key)
        if self.similarity == "dot":
            return vectors_NxD
        squares_Nx1 = jnp.sum(vectors_NxD**2, axis=1, keepdims=True)
        return vectors_NxD * jax.lax.rsqrt(jnp.maximum(squares_Nx1, SHORTEST**2))

    def reranker_scores(self, params: Params, packed: Packed, key: Array | None = None) -> Array:
        """Returns the re-ranker's logit for every pair [N], in float32."""
        config, head = self.reranker, params["head"]
        pooled_NxD = _pooled(config, self.reranker_pooling, params["encoder"], packed, key)
        if self.head == "pooler":
            pooler = head["pooler"]
            pooled_NxD = jnp.tanh(pooled_NxD @ pooler["kernel"] + pooler["bias"])
        if key is not None and config.dropout > 0:
            # No layer has this number, so the head's mask differs from all of the encoder's.
            head_key = jax.random.fold_in(key, config.num_layers + 1)
            pooled_NxD = bert.drop(pooled_NxD, config.dropout, head_key)
        return pooled_NxD @ head["kernel"] + head["bias"]


def _pooled(
    config: BertConfig, pooling: str, params: Params, packed: Packed, key: Array | None
) -> Array:
    """Returns the first token's hidden state of every sequence, or the mean, [N, D] in float32."""
    if pooling == "cls":
        states = bert.first_states(config, params, packed.blocks, key)
        return states[packed.slot_N].astype(jnp.float32)
    states = bert.states(config, params, packed.blocks, key).astype(jnp.float32)
    if packed.blocks[0].first_RxS.shape[1] > 1:
        return _flat_means(packed, states)
    parts = zip(packed.blocks, bert.by_block(states, packed.blocks))
    return jnp.concatenate([_means(*part) for part in parts])[packed.slot_N]


def _means(block: Block, states_RxTxD: Array) -> Array:
    """Returns the mean state of each sequence [R * S, D] of a block."""
    number_RxS = jnp.take_along_axis(block.sequence_RxT, block.first_RxS, axis=1)
    own_RxSxT = (number_RxS[:, :, None] == block.sequence_RxT[:, None]).astype(jnp.float32)
    # TPUs round the factors of a product to bfloat16 unless told otherwise.
    sums_RxSxD = jnp.einsum("rst,rtd->rsd", own_RxSxT, states_RxTxD, precision="highest")
    return (sums_RxSxD / own_RxSxT.sum(-1, keepdims=True)).reshape(-1, states_RxTxD.shape[-1])


def _flat_means(packed: Packed, states_TxD: Array) -> Array:
    """Returns the mean state of each sequence [N, D] of a flat row."""
    count, sequence_T = len(packed.slot_N), packed.blocks[0].sequence_RxT[0]
    # Padding's number is out of range, so it is left out.
    total = functools.partial(jax.ops.segment_sum, segment_ids=sequence_T, num_segments=count)
    lengths_N = total(jnp.ones(len(sequence_T)))
    return total(states_TxD) / jnp.maximum(lengths_N, 1)[:, None]


def retriever_scores(query_BxD: Array, passage_BPxD: Array) -> Array:
    """Scores each query with its list's passages [B, P]: those from b*P to (b+1)*P - 1 for list b."""
    return jnp.einsum(
        "bd,bpd->bp", query_BxD, passage_BPxD.reshape(len(query_BxD), -1, query_BxD.shape[-1])
    )


def init_reranker(
    encoder: Params, config: BertConfig, key: Array, *, one_type: bool = False
) -> Params:
    """Adds a new linear head to an encoder: normal with BERT's standard deviation, bias 0.

    With `one_type` the second token type, a passage's, begins as a copy of the first, a query's.
    """
    if one_type:
        embeddings = encoder["embeddings"]
        types_2xD = jnp.asarray(embeddings["type"]["embedding"])
        types = {"embedding": types_2xD.at[1].set(types_2xD[0])}
        encoder = {**encoder, "embeddings": {**embeddings, "type": types}}
    kernel_D = jax.random.normal(key, (config.hidden_size,)) * config.initializer_range
    return {"encoder": encoder, "head": {"kernel": kernel_D, "bias": jnp.zeros(())}}
