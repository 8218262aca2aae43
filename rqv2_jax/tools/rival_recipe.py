"""What sentence-transformers makes of the same data in the same time: a retriever and a cross-encoder.

Half of the time goes to the retriever by MultipleNegativesRankingLoss, half to mining with it and a
cross-encoder trained listwise on what was found. Of each half a share goes to trying rates on dev. A
model that dev finds worse than its start is not kept. sentence_transformers and torch
(requirements-bench.txt, requirements-torch.txt) are imported when they are asked for.

Shape suffixes: N passages, Q queries, K passages of a query, D vector size, B lists, P passages of a
list.
"""

import copy
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import tokens
from rqv2_jax.ranking import metrics, trec
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.stage import Dev
from rqv2_jax.recipe.texts import texts_of
from rqv2_jax.tools import rivals

# Learning rates, tried in turn, and the share of a model's time in which all of them are.
RETRIEVER_RATES, RERANKER_RATES = (2e-5, 5e-5, 1e-4), (5e-5, 1e-4, 2e-4)
TRYING = 0.3
SCALE, BATCH, WARM_STEPS = 20.0, 32, 10
LISTS, LIST_SIZE, MINED, MINED_QUERIES = 8, 4, 30, 2000
# Tokens of a passage in training, at most; search reads all that the model takes.
TRAINED_LENGTH = 128


class Recipe:
    """The rival's two models, its texts and the time that each part took, in seconds."""

    def __init__(self, run: Run, store: tokens.Store, minutes: float):
        from sentence_transformers import CrossEncoder, SentenceTransformer

        self.run, self.store, self.half = run, store, 30 * minutes
        texts = texts_of(run, store.fingerprint)
        self.passages = [f"{p.title} {p.text}".strip() for p in texts.passages()]
        self.queries = {s: [q.text for q in texts.queries(s)] for s in ("train", "dev", "test")}
        self.pairs = store.splits["train"].positives().T.tolist()
        self.rng = np.random.default_rng(run.config.seed)
        device, folder = rivals.device(), str(run.sources.query.folder)
        self.retriever = SentenceTransformer(folder, device=device)
        self.longest = self.retriever.max_seq_length or run.config.data.passage_length
        reranker = str(run.sources.reranker.folder)
        self.reranker = CrossEncoder(reranker, num_labels=1, device=device)
        self.dev = Dev(run.config, run.forward, store, None)
        self.report: dict[str, Any] = {}

    def train(self) -> None:
        """Trains both models, and mines between them."""
        started = time.monotonic()
        self._retriever(started + self.half)
        self.report["retriever_seconds"] = time.monotonic() - started
        self._reranker(started + 2 * self.half)
        self.report["seconds"] = time.monotonic() - started

    def _vectors(self, texts: list[str]) -> np.ndarray:
        return self.retriever.encode(texts, batch_size=64, convert_to_numpy=True)

    def _search(self, passages_NxD: np.ndarray, queries: list[str], depth: int) -> tuple:
        """Returns each query's best passages [Q, K] and their scores."""
        depth = min(depth, len(passages_NxD))
        scores_QxN = self._vectors(queries) @ passages_NxD.T
        rows_QxK = np.argpartition(-scores_QxN, depth - 1, axis=1)[:, :depth]
        scores_QxK = np.take_along_axis(scores_QxN, rows_QxK, 1)
        order_QxK = np.argsort(-scores_QxK, axis=1, kind="stable")
        return tuple(np.take_along_axis(x, order_QxK, 1) for x in (rows_QxK, scores_QxK))

    def _dev_score(self, rows_QxK: np.ndarray, scores_QxK: np.ndarray) -> float:
        ids, name = self.store.passage_ids, "RR@10"
        return float(
            metrics.evaluate(rows_QxK, scores_QxK, ids, self.dev.qrels, [name])[name].mean()
        )

    def _dev_queries(self) -> list[str]:
        return [self.queries["dev"][row] for row in self.dev.rows_Q]

    def _retriever(self, end: float) -> None:
        from sentence_transformers.sentence_transformer import losses

        pool_N = self.dev.pool_N

        def score() -> float:
            self.retriever.max_seq_length = self.longest
            found = self._search(
                self._vectors([self.passages[row] for row in pool_N]), self._dev_queries(), 10
            )
            return self._dev_score(pool_N[found[0]], found[1])

        loss_fn = losses.MultipleNegativesRankingLoss(self.retriever, scale=SCALE)
        batches = self._batches()

        def loss() -> Any:
            self.retriever.max_seq_length = min(TRAINED_LENGTH, self.longest)
            batch = next(batches)
            sides = (
                [self.queries["train"][query] for query, _ in batch],
                [self.passages[passage] for _, passage in batch],
            )
            features = [self.retriever.preprocess(side) for side in sides]
            return loss_fn([{k: _put(v) for k, v in side.items()} for side in features], None)

        self._fit("retriever", self.retriever, RETRIEVER_RATES, loss, score, end)
        self.retriever.max_seq_length = self.longest

    def _batches(self) -> Iterator[list]:
        """Yields batches of pairs with no query and no passage twice."""
        size = min(BATCH, len({q for q, _ in self.pairs}), len({p for _, p in self.pairs}))
        while True:
            batch, seen, got = list[tuple[int, int]](), set[tuple[str, int]](), False
            for number in self.rng.permutation(len(self.pairs)):
                query, passage = self.pairs[number]
                names = {("query", query), ("passage", passage)}
                if not names & seen:
                    batch.append((query, passage))
                    seen |= names
                if len(batch) == size:
                    yield batch
                    batch, seen, got = [], set(), True
            if not got:
                yield batch

    def _reranker(self, end: float) -> None:
        rows_Q = lists_lib.subset(len(self.queries["train"]), MINED_QUERIES, self.run.config.seed)
        self.passages_NxD = self._vectors(self.passages)
        found_QxK, _ = self._search(
            self.passages_NxD, [self.queries["train"][row] for row in rows_Q], MINED
        )
        positives: dict[int, list[int]] = {}
        for query, passage in self.pairs:
            positives.setdefault(query, []).append(passage)
        negatives = {
            query: [row for row in found if row not in positives[query]]
            for query, found in zip(rows_Q.tolist(), found_QxK.tolist())
            if query in positives
        }
        asked = [query for query, rows in negatives.items() if len(rows) >= LIST_SIZE - 1]
        candidates_QxK, _ = self._search(
            self.passages_NxD, self._dev_queries(), self.run.config.dev.depth
        )
        longest = self.reranker.max_seq_length = min(self.reranker.max_seq_length or 512, 512)

        def score() -> float:
            self.reranker.max_seq_length = longest
            return self._dev_score(
                candidates_QxK, self._rerank(self._dev_queries(), candidates_QxK)
            )

        import torch

        def loss() -> Any:
            pairs = []
            for query in self.rng.choice(asked, min(LISTS, len(asked)), replace=False).tolist():
                rows = [self.rng.choice(positives[query])]
                rows += self.rng.choice(negatives[query], LIST_SIZE - 1, replace=False).tolist()
                pairs += [(self.queries["train"][query], self.passages[row]) for row in rows]
            features = self.reranker.tokenizer(
                *map(list, zip(*pairs)),
                padding=True,
                truncation="only_second",
                max_length=min(TRAINED_LENGTH + 32, longest),
                return_tensors="pt",
            )
            features = {key: _put(value) for key, value in features.items()}
            scores_BxP = self.reranker.model(**features).logits.reshape(-1, LIST_SIZE)
            first_B = torch.zeros(len(scores_BxP), dtype=torch.long, device=scores_BxP.device)
            return torch.nn.functional.cross_entropy(scores_BxP, first_B)

        self._fit("reranker", self.reranker.model, RERANKER_RATES, loss, score, end)

    def _rerank(self, queries: list[str], rows_QxK: np.ndarray) -> np.ndarray:
        pairs = [(q, self.passages[row]) for q, rows in zip(queries, rows_QxK) for row in rows]
        scores_N = self.reranker.predict(pairs, batch_size=64, show_progress_bar=False)
        return np.asarray(scores_N, np.float32).reshape(rows_QxK.shape)

    def _fit(
        self,
        name: str,
        model: Any,
        rates: tuple[float, ...],
        loss: Callable[[], Any],
        score: Callable[[], float],
        end: float,
    ) -> None:
        """Trains a model until `end` by the rate that does best on dev after a short training."""
        start = copy.deepcopy(model.state_dict())
        began = time.monotonic()
        trying = TRYING * (end - began) / len(rates)
        before, tried, steps = score(), {}, 0
        for number, rate in enumerate(rates, start=1):
            model.load_state_dict(start)
            _train(model, rate, loss, began + (number - 0.3) * trying)
            tried[rate] = score()
        best = max(tried, key=lambda rate: tried[rate])
        measured = time.monotonic()
        score()
        # Its last measurement is part of its time.
        end -= time.monotonic() - measured
        model.load_state_dict(start)
        steps = _train(model, best, loss, end)
        after = score()
        if after < before:
            model.load_state_dict(start)
        self.report[name] = {"tried": {f"{rate:g}": dev for rate, dev in tried.items()}} | {
            "rate": best,
            "steps": steps,
            "dev_before": before,
            "dev_after": after,
        }

    def write(self, folder: pathlib.Path, reranked: set[str], depth: int) -> None:
        """Writes run files of the test queries: retriever.trec, and reranker.trec for some of them."""
        ids, config = self.store.splits["test"].ids, self.run.config.evaluate
        found = self._search(self.passages_NxD, self.queries["test"], config.retrieve_depth)
        every = self.store.passage_ids
        trec.write_run(folder / "retriever.trec", ids, every, found[0], found[1], "rival")
        rows = [row for row, name in enumerate(ids) if name in reranked]
        first_QxK = found[0][rows, :depth]
        scores_QxK = self._rerank([self.queries["test"][row] for row in rows], first_QxK)
        named = [ids[row] for row in rows]
        trec.write_run(folder / "reranker.trec", named, every, first_QxK, scores_QxK, "rival")


def _put(value: Any) -> Any:
    return value.to(rivals.device()) if hasattr(value, "to") else value


def _train(model: Any, rate: float, loss: Callable[[], Any], end: float) -> int:
    """Takes steps of AdamW until `end`, the rate falling linearly to 0; returns how many."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    began, steps = time.monotonic(), 0
    model.train()
    while (left := end - time.monotonic()) > 0:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / WARM_STEPS) * left / (end - began)
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    model.eval()
    return steps
