"""The two models: params and packed tokens in, vectors or scores out.

Retriever (dual encoder, paper eq. 1): `s_de(q, p) = E_Q(q) . E_P(p)`, two towers. Re-ranker (cross
encoder): one encoder over the pair, one logit from its first token.

Params are plain dicts: `{"query": encoder, "passage": encoder}` for the retriever and
`{"encoder": encoder, "head": {"kernel": [D], "bias": []}}` for the re-ranker, whose head has a
`"pooler": {"kernel": [D, D], "bias": [D]}` too if it is BERT's sequence classifier.

Shape suffixes: N sequences, D hidden size, B lists, P passages of a list.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rqv2_jax.data.packing import Block, Packed
from rqv2_jax.models import bert

# Vectors shorter than this are not made longer.
SHORTEST = 1e-12


@dataclasses.dataclass(frozen=True)
class Models:
    """The static half of both models.

    `retriever` and `reranker` are their encoders' shapes; `pooling` is "cls" or "mean". With similarity
    "cosine" vectors have length 1, with "dot" that of the pooled states. The retriever's scores are
    multiplied by `scale` in training alone. `head` is "linear" or "pooler" (BERT's dense layer and tanh
    before the linear one).
    """

    retriever: bert.BertConfig
    reranker: bert.BertConfig
    pooling: str
    similarity: str
    scale: float
    head: str

    @property
    def flat(self) -> bool:
        """Whether the models read sequences end to end in one row, in place of a row for each."""
        return self.retriever.attention == "ragged"

    def reshaped(self, **changes) -> "Models":
        """Returns the models with fields of both encoders' configs changed."""
        encoders = {"retriever": self.retriever, "reranker": self.reranker}
        changed = {k: dataclasses.replace(config, **changes) for k, config in encoders.items()}
        return dataclasses.replace(self, **changed)

    def vectors(self, params, packed: Packed, key=None):
        """Returns one tower's vectors [N, D] in float32, not scaled.

        Args:
          key: of dropout; None switches it off.
        """
        vectors_NxD = self._pooled(params, packed, key)
        if self.similarity == "dot":
            return vectors_NxD
        squares_Nx1 = jnp.sum(vectors_NxD**2, axis=1, keepdims=True)
        return vectors_NxD * jax.lax.rsqrt(jnp.maximum(squares_Nx1, SHORTEST**2))

    def _pooled(self, params, packed: Packed, key):
        if self.pooling == "cls":
            return _first_states(self.retriever, params, packed, key)
        states = bert.Encoder(self.retriever).apply(
            {"params": params},
            packed.blocks,
            deterministic=key is None,
            rngs={} if key is None else {"dropout": key},
        )
        states = states.astype(jnp.float32)
        if packed.blocks[0].first_RxS.shape[1] > 1:
            return _flat_means(packed, states)
        parts = zip(packed.blocks, bert.by_block(states, packed.blocks))
        return jnp.concatenate([_means(*part) for part in parts])[packed.slot_N]

    def reranker_scores(self, params, packed: Packed, key=None):
        """Returns the re-ranker's logit for every pair [N], in float32."""
        config, head = self.reranker, params["head"]
        first_NxD = _first_states(config, params["encoder"], packed, key)
        if self.head == "pooler":
            pooler = head["pooler"]
            first_NxD = jnp.tanh(first_NxD @ pooler["kernel"] + pooler["bias"])
        if key is not None and config.dropout > 0:
            # No layer has this number, so the head's mask is independent of the encoder's.
            head_key = jax.random.fold_in(key, config.num_layers + 1)
            first_NxD = bert.drop(first_NxD, config.dropout, head_key)
        return first_NxD @ head["kernel"] + head["bias"]


def _first_states(config: bert.BertConfig, params, packed: Packed, key):
    """The hidden state of every sequence's first token [N, D] in float32."""
    states = bert.first_states(config, params, packed.blocks, key)
    return states[packed.slot_N].astype(jnp.float32)


def _means(block: Block, states_RxTxD):
    """The mean state of each sequence [R * S, D] of a block."""
    number_RxS = jnp.take_along_axis(block.sequence_RxT, block.first_RxS, axis=1)
    own_RxSxT = (number_RxS[:, :, None] == block.sequence_RxT[:, None]).astype(jnp.float32)
    # TPUs round the factors of a product to bfloat16 unless told otherwise.
    sums_RxSxD = jnp.einsum("rst,rtd->rsd", own_RxSxT, states_RxTxD, precision="highest")
    return (sums_RxSxD / own_RxSxT.sum(-1, keepdims=True)).reshape(-1, states_RxTxD.shape[-1])


def _flat_means(packed: Packed, states_TxD):
    """Returns the mean state of each sequence [N, D] of a flat row."""
    count, sequence_T = len(packed.slot_N), packed.blocks[0].sequence_RxT[0]
    # Padding's number is out of range, and dropped.
    total = functools.partial(jax.ops.segment_sum, segment_ids=sequence_T, num_segments=count)
    lengths_N = total(jnp.ones(len(sequence_T)))
    return total(states_TxD) / jnp.maximum(lengths_N, 1)[:, None]


def retriever_scores(query_BxD, passage_BPxD):
    """Scores of each list's own passages [B, P]; list b owns passages b*P to (b+1)*P - 1."""
    return jnp.einsum(
        "bd,bpd->bp", query_BxD, passage_BPxD.reshape(len(query_BxD), -1, query_BxD.shape[-1])
    )


def init_reranker(encoder: dict, config: bert.BertConfig, key) -> dict:
    """Returns the encoder with a new linear head: normal with BERT's deviation, bias 0."""
    kernel_D = jax.random.normal(key, (config.hidden_size,)) * config.initializer_range
    return {"encoder": encoder, "head": {"kernel": kernel_D, "bias": jnp.zeros(())}}
