"""What rqv2_jax.bench compares with: the same work as people write it in PyTorch, and faiss.

Imports torch, sentence_transformers and faiss (requirements-bench.txt) when it is asked for them.
"""

import time
from collections.abc import Callable

import numpy as np

from rqv2_jax.data.packing import Ragged
from rqv2_jax.workdir import Run


class Joint:
    """A step of joint training with transformers' BertModel and its default attention, all cores.

    The same weights, lists and loss; batches padded to their longest sequence, each query encoded
    once, gradients clipped, AdamW.
    """

    def __init__(self, run: Run, head: dict):
        import torch
        import transformers

        self.torch, self.settings, self.models = torch, run.config.joint, run.models
        torch.manual_seed(0)

        def load(source, own):
            rate = own.dropout
            return transformers.BertModel.from_pretrained(
                source.folder,
                local_files_only=True,
                add_pooling_layer=False,
                num_hidden_layers=own.num_layers,
                hidden_dropout_prob=rate,
                attention_probs_dropout_prob=rate,
            ).train()

        model = run.config.model
        self.query, self.passage = (load(source, model) for source in run.sources[:2])
        self.reranker = load(run.sources.reranker, model.reranker)
        self.pooler = None
        if run.models.head == "pooler":
            self.pooler = torch.nn.Linear(*head["pooler"]["kernel"].shape)
            with torch.no_grad():
                self.pooler.weight.copy_(torch.tensor(np.array(head["pooler"]["kernel"]).T))
                self.pooler.bias.copy_(torch.tensor(np.array(head["pooler"]["bias"])))
        self.head = torch.nn.Linear(len(head["kernel"]), 1)
        with torch.no_grad():
            self.head.weight[0] = torch.tensor(np.asarray(head["kernel"]))
            self.head.bias[0] = float(head["bias"])
        self.dropout = torch.nn.Dropout(model.reranker.dropout)
        retriever, reranker = (
            [p for module in modules for p in module.parameters()]
            for modules in (
                (self.query, self.passage),
                (self.reranker, *([] if self.pooler is None else [self.pooler]), self.head),
            )
        )
        self.params = retriever + reranker
        rate = self.settings.learning_rate
        self.optimizer = torch.optim.AdamW(
            [
                {"params": retriever, "lr": rate},
                {"params": reranker, "lr": rate * self.settings.reranker_rate},
            ],
            weight_decay=run.config.optimizer.weight_decay,
        )
        self.clip_norm = run.config.optimizer.clip_norm

    def _states(self, model, ragged: Ragged):
        """Hidden states [N, T, D] and the mask [N, T] of sequences padded to the longest."""
        torch, lengths_N = self.torch, ragged.lengths_N
        mask_NxT = np.arange(lengths_N.max()) < lengths_N[:, None]
        tokens_NxT, types_NxT = np.zeros((2, *mask_NxT.shape), np.int64)
        tokens_NxT[mask_NxT], types_NxT[mask_NxT] = ragged.tokens, ragged.types
        mask_NxT = torch.tensor(mask_NxT)
        states = model(
            input_ids=torch.tensor(tokens_NxT),
            token_type_ids=torch.tensor(types_NxT),
            attention_mask=mask_NxT.long(),
        ).last_hidden_state
        return states, mask_NxT

    def _vectors(self, model, ragged: Ragged):
        vectors_NxD = self._pooled(model, ragged)
        if self.models.similarity == "cosine":
            return self.torch.nn.functional.normalize(vectors_NxD)
        return vectors_NxD

    def _scores(self, ragged: Ragged):
        first_NxD = self._states(self.reranker, ragged)[0][:, 0]
        if self.pooler is not None:
            first_NxD = self.pooler(first_NxD).tanh()
        return self.head(self.dropout(first_NxD))

    def _pooled(self, model, ragged: Ragged):
        states_NxTxD, mask_NxT = self._states(model, ragged)
        if self.models.pooling == "cls":
            return states_NxTxD[:, 0]
        weights_NxTx1 = mask_NxT[..., None].float()
        return (states_NxTxD * weights_NxTx1).sum(1) / weights_NxTx1.sum(1)

    def step(self, sequences: dict[str, Ragged]) -> float:
        """One update on a batch whose positives come first; returns its loss."""
        functional, loss = self.torch.nn.functional, self.settings.loss
        queries_BxD = self.models.scale * self._vectors(self.query, sequences["queries"])
        passages_BxPxD = self._vectors(self.passage, sequences["passages"]).reshape(
            len(queries_BxD), -1, queries_BxD.shape[1]
        )
        scores_BxP = self._scores(sequences["pairs"]).reshape(passages_BxPxD.shape[:2])
        student_BxP = (queries_BxD[:, None] * passages_BxPxD).sum(-1) / loss.temperature
        student_BxP = student_BxP.log_softmax(-1)
        teacher_BxP = (scores_BxP / loss.temperature).log_softmax(-1)
        if not loss.teacher_gradient:
            teacher_BxP = teacher_BxP.detach()
        pair = (student_BxP, teacher_BxP)
        if loss.kl_direction == "retriever_to_reranker":
            pair = pair[::-1]
        kl = functional.kl_div(*pair, log_target=True, reduction="sum")
        lists, size = scores_BxP.shape
        kl = (
            kl
            / {"sum": 1, "mean_per_list": lists, "mean_per_candidate": lists * size}[
                loss.kl_reduction
            ]
        )
        total = self.settings.kl_weight * kl + functional.cross_entropy(
            scores_BxP, self.torch.zeros(lists, dtype=self.torch.long)
        )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.torch.nn.utils.clip_grad_norm_(self.params, self.clip_norm)
        self.optimizer.step()
        return total.item()


class SentenceTransformers:
    """Encoding and re-ranking by sentence-transformers with its own defaults, from the same weights."""

    def __init__(self, run: Run):
        from sentence_transformers import CrossEncoder, SentenceTransformer
        from sentence_transformers.models import Normalize, Pooling, Transformer

        data, model = run.config.data, run.config.model
        encoder = Transformer(
            str(run.sources.passage.folder),
            max_seq_length=data.passage_length,
            config_kwargs={"num_hidden_layers": model.num_layers},
        )
        pooling = Pooling(run.models.retriever.hidden_size, pooling_mode=run.models.pooling)
        normalize = [Normalize()] * (run.models.similarity == "cosine")
        self.encoder = SentenceTransformer(modules=[encoder, pooling, *normalize], device="cpu")
        self.scorer = CrossEncoder(
            str(run.sources.reranker.folder),
            num_labels=1,
            max_length=data.pair_length,
            device="cpu",
            config_kwargs={"num_hidden_layers": model.reranker.num_layers},
        )

    def encode(self, passages: list[str]) -> np.ndarray:
        """The vectors of some passages."""
        return self.encoder.encode(passages)

    def rerank(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """The scores of some pairs."""
        return self.scorer.predict(pairs)

    def mine(
        self, queries: list[str], passages: list[str], depth: int, scored_depth: int
    ) -> np.ndarray:
        """The rows [Q, K] of each query's best passages; the first are scored too."""
        from sentence_transformers.util import dot_score, semantic_search

        vectors = [
            self.encoder.encode(texts, convert_to_tensor=True) for texts in (queries, passages)
        ]
        found = semantic_search(*vectors, top_k=depth, score_function=dot_score)
        rows_QxK = np.array([[hit["corpus_id"] for hit in hits] for hits in found])
        self.scorer.predict(
            [
                (query, passages[row])
                for query, rows in zip(queries, rows_QxK[:, :scored_depth])
                for row in rows
            ]
        )
        return rows_QxK


def faiss_indexes(
    passages_NxD: np.ndarray, queries_QxD: np.ndarray, depth: int
) -> list[tuple[str, float, dict[str, Callable]]]:
    """(name, seconds it took to build, {setting: search}) of faiss's indexes for the inner product."""
    import faiss

    count, size = passages_NxD.shape
    leaves = round(count**0.5)
    graph = faiss.IndexHNSWFlat(size, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 80
    kinds = [("faiss HNSW", graph, graph.hnsw, "efSearch", (64, 128, 256, 512))]
    # As ScaNN does: what the codes find is scored exactly. Codes of 4 bits are searched as ScaNN's are.
    for name, codes in (("IVF-PQ", f"PQ{size // 4}"), ("IVF-PQ 4 bits", f"PQ{size // 2}x4fs")):
        factory = f"IVF{leaves},{codes},RFlat"
        refined = faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
        refined.k_factor = 4
        cells = faiss.extract_index_ivf(refined.base_index)
        kinds.append((f"faiss {name}", refined, cells, "nprobe", (8, 32, 64, 128)))
    found = []
    for name, index, owner, what, values in kinds:
        started = time.perf_counter()
        if not index.is_trained:
            index.train(passages_NxD[: 64 * leaves])
        index.add(passages_NxD)
        built = time.perf_counter() - started

        def search(value, index=index, owner=owner, what=what):
            setattr(owner, what, value)
            return index.search(queries_QxD, depth)[1]

        searches = {f"{what} {value}": lambda v=value, s=search: s(v) for value in values}
        found.append((name, built, searches))
    return found
