"""The two models: params and packed tokens in, vectors or scores out.

Retriever (dual encoder, paper eq. 1): `s_de(q, p) = E_Q(q) . E_P(p)`, two towers. Re-ranker (cross
encoder): one encoder over the pair, one logit from its first token.

Params are plain dicts: `{"query": encoder, "passage": encoder}` for the retriever and
`{"encoder": encoder, "head": {"kernel": [D], "bias": []}}` for the re-ranker.

Shape suffixes: N sequences, D hidden size, B lists, P passages of a list.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rqv2_jax import bert
from rqv2_jax.data.packing import Packed


@dataclasses.dataclass(frozen=True)
class Models:
    """The static half of both models: encoder shape and how the retriever pools (cls or mean)."""

    config: bert.BertConfig
    pooling: str

    def _states(self, params, packed: Packed, key):
        """Hidden states of all blocks end to end [tokens, D]; `key` None switches dropout off."""
        encoder = bert.Encoder(self.config)
        states = []
        for i, block in enumerate(packed.blocks):
            rngs = {} if key is None else {"dropout": jax.random.fold_in(key, i)}
            states.append(
                encoder.apply({"params": params}, *block, deterministic=key is None, rngs=rngs)
            )
        return jnp.concatenate(states)

    def _first_states(self, params, packed: Packed, key):
        """Hidden state of every sequence's first token [N, D]."""
        shapes = [block.tokens_RxT.shape for block in packed.blocks]
        if sum(rows for rows, _ in shapes) != len(packed.first_N):
            # Rows are shared by several sequences.
            return self._states(params, packed, key)[packed.first_N]
        states = [
            bert.first_states(
                self.config, params, *block, None if key is None else jax.random.fold_in(key, i)
            )
            for i, block in enumerate(packed.blocks)
        ]
        widths = np.repeat([width for _, width in shapes], [rows for rows, _ in shapes])
        row_of_token = np.repeat(np.arange(len(widths)), widths)
        return jnp.concatenate(states)[jnp.asarray(row_of_token)[packed.first_N]]

    def vectors(self, params, packed: Packed, key=None):
        """One tower's vectors [N, D] in float32, neither normalised nor scaled."""
        if self.pooling == "cls":
            return self._first_states(params, packed, key).astype(jnp.float32)
        states = self._states(params, packed, key).astype(jnp.float32)
        sequence = jnp.concatenate([block.sequence_RxT.reshape(-1) for block in packed.blocks])
        count = len(packed.first_N)
        # Padding carries the number N: one row more than asked for, thrown away.
        sums = jax.ops.segment_sum(states, sequence, num_segments=count + 1)[:count]
        tokens = jax.ops.segment_sum(jnp.ones_like(sequence), sequence, num_segments=count + 1)
        return sums / tokens[:count, None]

    def reranker_scores(self, params, packed: Packed, key=None):
        """The re-ranker's logit for every pair [N], in float32."""
        first_NxD = self._first_states(params["encoder"], packed, key).astype(jnp.float32)
        if key is not None and self.config.dropout > 0:
            keep = 1.0 - self.config.dropout
            # No block has this number, so the head's mask is independent of the encoder's.
            head_key = jax.random.fold_in(key, len(packed.blocks))
            kept = jax.random.bernoulli(head_key, keep, first_NxD.shape)
            first_NxD = jnp.where(kept, first_NxD / keep, 0.0)
        return first_NxD @ params["head"]["kernel"] + params["head"]["bias"]


def retriever_scores(query_BxD, passage_BPxD):
    """Scores of each list's own passages [B, P]; list b owns passages b*P to (b+1)*P - 1."""
    return jnp.einsum(
        "bd,bpd->bp", query_BxD, passage_BPxD.reshape(len(query_BxD), -1, query_BxD.shape[-1])
    )


def init_reranker(encoder: dict, config: bert.BertConfig, key) -> dict:
    """The encoder with a new scoring head, normal with BERT's deviation; the bias starts at 0."""
    kernel_D = jax.random.normal(key, (config.hidden_size,)) * config.initializer_range
    return {"encoder": encoder, "head": {"kernel": kernel_D, "bias": jnp.zeros(())}}
