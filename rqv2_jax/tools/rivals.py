"""The rivals of rqv2_jax.bench: the same work as people write it in PyTorch, and faiss.

torch, sentence_transformers and faiss (requirements-bench.txt, requirements-torch.txt) are imported
when they are asked for.

Shape suffixes: N sequences or passages, T tokens, D vector size, B lists, P passages of a list,
Q queries, K depth.
"""

import pathlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rqv2_jax.data.packing import Ragged
from rqv2_jax.models import products
from rqv2_jax.recipe.run import Run
from rqv2_jax.tools import machines

# Sequences of a batch, of which the rival's fastest is taken on a GPU.
GPU_BATCHES = (64, 256, 1024)
# Passages that exact search scores at once.
EXACT_PART = 2**17


def device() -> str:
    """Returns where PyTorch computes: "cuda" if JAX uses a GPU, else "cpu"."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


class Joint:
    """A step of joint training with transformers' BertModel and PyTorch's fused attention.

    The same weights, lists and loss; batches padded to their longest sequence, each query encoded
    once, gradients clipped, AdamW. With automatic mixed precision where ours multiplies in bfloat16.
    `sequences` are the inputs of each step, by kind.
    """

    def __init__(self, run: Run, sequences: list[dict[str, Ragged]], *, compiled: bool):
        import torch

        self.torch, self.settings, self.models = torch, run.config.joint, run.models
        self.sequences, self.device = sequences, device()
        model = run.config.model
        rounded = products.half(model.products, jax.default_backend())
        self.half = model.dtype == "bfloat16" or rounded
        torch.manual_seed(0)
        initial = run.initial("reranker")
        head, types = initial["head"], initial["encoder"]["embeddings"]["type"]["embedding"]
        towers = [self._encoder(source.folder, model) for source in run.sources[:2]]
        if model.towers == "shared":
            towers[1] = towers[0]
        towers.append(self._encoder(run.sources.reranker.folder, model.reranker))
        with torch.no_grad():
            towers[2].embeddings.token_type_embeddings.weight.copy_(torch.tensor(np.array(types)))
        pooled = run.models.head == "pooler"
        pooler = [self._linear(head["pooler"]), torch.nn.Tanh()] if pooled else []
        dropout = torch.nn.Dropout(model.reranker.dropout)
        self.head = torch.nn.Sequential(*pooler, dropout, self._linear(head))
        rate, optimizer = self.settings.learning_rate, run.config.optimizer
        reranker_rate = rate * self.settings.reranker_rate
        groups = [
            {
                "params": [
                    param for module in dict.fromkeys(modules) for param in module.parameters()
                ],
                "lr": rate,
            }
            for modules, rate in ((towers[:2], rate), ([towers[2], self.head], reranker_rate))
        ]
        self.params = [param for group in groups for param in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=optimizer.weight_decay, fused=self.device == "cuda"
        )
        self.clip_norm = optimizer.clip_norm
        if compiled:
            towers = [torch.compile(tower) for tower in towers]
        self.query, self.passage, self.reranker = towers

    def _encoder(self, folder: pathlib.Path, settings: ConfigDict) -> Any:
        import transformers

        model = transformers.BertModel.from_pretrained(
            folder,
            local_files_only=True,
            add_pooling_layer=False,
            attn_implementation="sdpa",
            num_hidden_layers=settings.num_layers,
            hidden_dropout_prob=settings.dropout,
            attention_probs_dropout_prob=settings.dropout,
        )
        return model.train().to(self.device)

    def _linear(self, params: dict[str, jax.Array]) -> Any:
        """Returns a linear layer by `kernel` [D, D] and `bias` [D], or [D] and a number."""
        kernel = np.array(params["kernel"])
        kernel = kernel.reshape(len(kernel), -1)
        layer = self.torch.nn.Linear(*kernel.shape)
        with self.torch.no_grad():
            layer.weight.copy_(self.torch.tensor(kernel.T))
            layer.bias.copy_(self.torch.tensor(np.array(params["bias"]).reshape(-1)))
        return layer.to(self.device)

    def prepare(self, step: int) -> dict[str, list]:
        """Returns tokens, types and mask [N, T] of each kind on the device, padded to its longest."""
        padded = {}
        for kind, ragged in self.sequences[step].items():
            lengths_N = ragged.lengths_N
            mask_NxT = np.arange(lengths_N.max()) < lengths_N[:, None]
            tokens_NxT, types_NxT = np.zeros((2, *mask_NxT.shape), np.int64)
            tokens_NxT[mask_NxT], types_NxT[mask_NxT] = ragged.tokens, ragged.types
            arrays = (tokens_NxT, types_NxT, mask_NxT)
            padded[kind] = [self.torch.tensor(array, device=self.device) for array in arrays]
        return padded

    def _states(self, model: Any, padded: list) -> Any:
        """Returns the hidden states [N, T, D] of padded sequences."""
        tokens_NxT, types_NxT, mask_NxT = padded
        return model(
            input_ids=tokens_NxT, token_type_ids=types_NxT, attention_mask=mask_NxT.long()
        ).last_hidden_state

    def _pooled(self, model: Any, padded: list, pooling: str) -> Any:
        """Returns the first state or the mean [N, D] of padded sequences."""
        states_NxTxD = self._states(model, padded).float()
        if pooling == "cls":
            return states_NxTxD[:, 0]
        weights_NxTx1 = padded[-1][..., None].float()
        return (states_NxTxD * weights_NxTx1).sum(1) / weights_NxTx1.sum(1)

    def _vectors(self, model: Any, padded: list) -> Any:
        vectors_NxD = self._pooled(model, padded, self.models.pooling)
        if self.models.similarity == "cosine":
            return self.torch.nn.functional.normalize(vectors_NxD)
        return vectors_NxD

    def step(self, padded: dict) -> float:
        """Takes one step on a batch whose positives come first; returns its loss."""
        with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.half):
            queries_BxD = self.models.scale * self._vectors(self.query, padded["queries"])
            passages_BxPxD = self._vectors(self.passage, padded["passages"]).reshape(
                len(queries_BxD), -1, queries_BxD.shape[1]
            )
            pooled_NxD = self._pooled(self.reranker, padded["pairs"], self.models.reranker_pooling)
            scores_BxP = self.head(pooled_NxD).float().reshape(passages_BxPxD.shape[:2])
        total = self._loss((queries_BxD[:, None] * passages_BxPxD).sum(-1), scores_BxP)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.torch.nn.utils.clip_grad_norm_(self.params, self.clip_norm)
        self.optimizer.step()
        return total.item()

    def _loss(self, retriever_BxP: Any, reranker_BxP: Any) -> Any:
        functional, loss = self.torch.nn.functional, self.settings.loss
        student_BxP = (retriever_BxP / loss.temperature).log_softmax(-1)
        teacher_BxP = (reranker_BxP / loss.temperature).log_softmax(-1)
        if not loss.teacher_gradient:
            teacher_BxP = teacher_BxP.detach()
        pair = (student_BxP, teacher_BxP)
        if loss.kl_direction == "retriever_to_reranker":
            pair = pair[::-1]
        lists, size = reranker_BxP.shape
        over = {"sum": 1, "mean_per_list": lists, "mean_per_candidate": lists * size}
        kl = functional.kl_div(*pair, log_target=True, reduction="sum") / over[loss.kl_reduction]
        first_B = self.torch.zeros(lists, dtype=self.torch.long, device=self.device)
        return self.settings.kl_weight * kl + functional.cross_entropy(reranker_BxP, first_B)


class SentenceTransformers:
    """Encoding and re-ranking by sentence-transformers from the same weights, in the same precision."""

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
        modules = [encoder, pooling, *normalize]
        self.encoder = SentenceTransformer(modules=modules, device=device())
        self.scorer = CrossEncoder(
            str(run.sources.reranker.folder),
            num_labels=1,
            max_length=data.pair_length,
            device=device(),
            config_kwargs={"num_hidden_layers": model.reranker.num_layers},
        )
        self.batches: dict[str, dict[str, Any]] = {"encode": {}, "rerank": {}}
        if run.config.model.dtype == "bfloat16":
            self.encoder.bfloat16()
            self.scorer.model.bfloat16()

    def tune(self, passages: list[str], pairs: list[tuple[str, str]]) -> None:
        """Chooses the batch sizes by which some passages and pairs are done soonest."""
        for name, work in (("encode", passages), ("rerank", pairs)):
            seconds = []
            for size in GPU_BATCHES:
                self.batches[name] = {"batch_size": size}
                seconds += machines.seconds(partial(getattr(self, name), work), 2)[-1:]
            self.batches[name] = {"batch_size": GPU_BATCHES[int(np.argmin(seconds))]}

    def encode(self, passages: list[str]) -> np.ndarray:
        """Returns the vectors [N, D] of some passages."""
        return self.encoder.encode(passages, **self.batches["encode"])

    def rerank(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Returns the scores [N] of some pairs."""
        return self.scorer.predict(pairs, **self.batches["rerank"])

    def mine(
        self, queries: list[str], passages: list[str], depth: int, scored_depth: int
    ) -> np.ndarray:
        """Returns the rows [Q, K] of each query's best passages, the first of which are scored too."""
        from sentence_transformers.util import dot_score, semantic_search

        queries_QxD, passages_NxD = (
            self.encoder.encode(texts, convert_to_tensor=True, **self.batches["encode"])
            for texts in (queries, passages)
        )
        hits = semantic_search(queries_QxD, passages_NxD, top_k=depth, score_function=dot_score)
        rows_QxK = np.array([[hit["corpus_id"] for hit in of_query] for of_query in hits])
        first = zip(queries, rows_QxK[:, :scored_depth])
        self.scorer.predict([(query, passages[row]) for query, rows in first for row in rows])
        return rows_QxK


def exact_search(passages_NxD: np.ndarray, queries_QxD: np.ndarray, depth: int) -> Callable:
    """Returns a search by torch's product and topk, of passages that are sent a part at a time."""
    import torch

    passages, queries = torch.from_numpy(passages_NxD), torch.from_numpy(queries_QxD)

    def search() -> np.ndarray:
        asked = queries.to(device())
        best, rows = asked[:, :0], torch.zeros((len(asked), 0), dtype=torch.long, device=device())
        for first in range(0, len(passages), EXACT_PART):
            scores = asked @ passages[first : first + EXACT_PART].to(device()).T
            top, numbers = scores.topk(min(depth, scores.shape[1]))
            best, chosen = torch.cat([best, top], 1).topk(depth)
            rows = torch.cat([rows, numbers + first], 1).gather(1, chosen)
        return rows.cpu().numpy()

    return search


def faiss_indexes(
    passages_NxD: np.ndarray, queries_QxD: np.ndarray, depth: int
) -> list[tuple[str, float, dict[str, Callable]]]:
    """Builds faiss's indexes for the inner product: (name, seconds of building, {setting: search})."""
    import faiss

    count, size = passages_NxD.shape
    leaves = round(count**0.5)
    graph = faiss.IndexHNSWFlat(size, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 80
    kinds: list[tuple] = [("faiss HNSW", graph, graph.hnsw, "efSearch", (64, 128, 256, 512))]
    # As in ScaNN, hits by the codes are scored exactly. Codes of 4 bits are searched as ScaNN's are.
    for name, codes in (("IVF-PQ", f"PQ{size // 4}"), ("IVF-PQ 4 bits", f"PQ{size // 2}x4fs")):
        factory = f"IVF{leaves},{codes},RFlat"
        refined: Any = faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
        refined.k_factor = 4
        cells = faiss.extract_index_ivf(refined.base_index)
        kinds.append((f"faiss {name}", refined, cells, "nprobe", (8, 32, 64, 128)))
    indexes: list[tuple[str, float, dict[str, Callable]]] = []
    for name, index, owner, what, values in kinds:
        started = time.perf_counter()
        if not index.is_trained:
            index.train(passages_NxD[: 64 * leaves])
        index.add(passages_NxD)
        built = time.perf_counter() - started
        search = partial(_faiss_search, index, owner, what, queries_QxD, depth)
        indexes.append(
            (name, built, {f"{what} {value}": partial(search, value) for value in values})
        )
    return indexes


def _faiss_search(
    index: Any, owner: Any, what: str, queries_QxD: np.ndarray, depth: int, value: int
) -> np.ndarray:
    setattr(owner, what, value)
    return index.search(queries_QxD, depth)[1]
