"""Candidates by both models, and the lists of training drawn from them.

Shape suffixes: Q queries, N candidates of a query, D vector size, L lists, P passages of a list,
U unlabelled candidates.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts
from rqv2_jax.data import collection, own_texts, tokenise, tokens
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data.readers import joint_tsv
from rqv2_jax.errors import InputError
from rqv2_jax.recipe.rankings import source_of
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.texts import open_store, texts_of
from rqv2_jax.retrieval import encode, index, rerank

MINED_AT_ONCE = 1024

# By split, "train" and "dev".
Candidates = dict[str, lists_lib.Candidates]


@dataclasses.dataclass(frozen=True)
class _Mine:
    """Candidates in a folder of a run, with the name of the models and the corpus they come from."""

    run: Run
    store: tokens.Store
    folder: pathlib.Path
    source: str

    def retrieve(
        self, rows: dict[str, np.ndarray], vectors: pathlib.Path, retriever: Callable[[], dict]
    ) -> Candidates:
        """Returns top passages by the params `retriever()`; `vectors` is the corpus's folder."""
        config, forward = self.run.config, self.run.forward

        def candidates(split: str, depth: int) -> lists_lib.Candidates:
            rows_Q, queries = rows[split], self.store.splits[split]

            def compute():
                towers, own_Q = retriever(), own_texts.of_rows(queries, rows_Q)
                vectors_QxD = encode.queries(forward, towers["query"], queries.texts, rows_Q)
                passages = towers["passage"], self.store, vectors, self.source
                shards = encode.corpus(forward, *passages)
                ranking = index.exact(vectors_QxD, shards, own_texts.deeper(depth, own_Q))
                passages_QxN, scores_QxN = own_texts.without(*ranking, own_Q)
                return {"query_rows": rows_Q, "passages": passages_QxN, "scores": scores_QxN}

            path = self.folder / f"{split}.retrieved.npz"
            kept = artifacts.cached(path, self.source, compute)
            unseen_QxN = np.full(kept["scores"].shape, np.nan, np.float32)
            ranking = kept["query_rows"], kept["passages"], kept["scores"]
            return lists_lib.Candidates(*ranking, unseen_QxN)

        depths = {"train": config.mine.depth, "dev": config.dev.depth}
        return {split: candidates(split, depths[split]) for split in rows}

    def score(self, candidates: Candidates, reranker: Callable[[], dict]) -> Candidates:
        """Returns the candidates with the scores that `config` wants; all others keep NaN."""
        config, reranker = self.run.config, functools.cache(reranker)
        if config.joint.denoised_share == 0:
            return candidates

        def scored(split: str, queries: int, depth: int) -> lists_lib.Candidates:
            first, texts = candidates[split].first(queries, depth), self.store.splits[split].texts
            parts = []
            for start in range(0, len(first.query_rows_Q), MINED_AT_ONCE):
                part = slice(start, start + MINED_AT_ONCE)
                pairs = self.store, texts, first.query_rows_Q[part], first.passages_QxN[part]
                path = self.folder / f"{split}.scores" / f"{start // MINED_AT_ONCE:05}.npz"

                def compute(pairs: tuple = pairs) -> dict[str, np.ndarray]:
                    return {"scores": rerank.scores(self.run.forward, reranker(), *pairs)}

                parts.append(artifacts.cached(path, self.source, compute)["scores"])
            reranker_QxN = candidates[split].reranker_QxN.copy()
            reranker_QxN[:queries, :depth] = np.concatenate(parts)
            return dataclasses.replace(candidates[split], reranker_QxN=reranker_QxN)

        most = {
            "train": (config.mine.scored_queries, config.mine.scored_depth),
            "dev": (config.dev.queries, config.dev.depth),
        }
        return {split: scored(split, *most[split]) for split in candidates}


def retrieve(run: Run, store: tokens.Store) -> Candidates:
    """Returns the warmed-up retriever's top passages for training and dev queries, kept in `lists/`.

    Dev queries only, if no training lists are drawn from the others.
    """
    most = {"dev": run.config.dev.queries}
    if run.config.reranker.epochs > 0 or not run.config.joint.lists:
        most = {"train": run.config.mine.queries, **most}
    rows = {
        split: lists_lib.subset(len(store.splits[split].ids), count, run.config.seed)
        for split, count in most.items()
    }
    warm = {"state": "retriever", "model": "retriever"}
    vectors = run.workdir / "vectors" / run.trained_by(**warm)
    kept = _Mine(run, store, run.workdir / "lists", source_of(run, store, "retriever"))
    return kept.retrieve(rows, vectors, functools.partial(run.params, **warm))


def mine(run: Run, store: tokens.Store, candidates: Candidates) -> Candidates:
    """Returns the candidates with the warmed-up re-ranker's scores, kept in `lists/`."""
    kept = _Mine(run, store, run.workdir / "lists", f"{warmed_up(run)} {store.fingerprint}")
    return kept.score(candidates, lambda: run.params(state="reranker", model="reranker"))


def warmed_up(run: Run) -> str:
    """Names the params of both warmed-up models."""
    models = ("retriever", "reranker")
    return " ".join(run.origin(state="reranker", model=model) for model in models)


def mined(run: Run) -> tuple[tokens.Store, Candidates, collection.Collection]:
    """Opens a workdir's token store, candidates and texts; InputError if mining has not ended."""
    lists, share = run.workdir / "lists", run.config.joint.denoised_share
    if not (lists / ("dev.scores" if share > 0 else "dev.retrieved.npz")).exists():
        raise InputError(
            f"{lists}: holds no candidates yet; run rqv2_jax.main up to joint training"
        )
    store = open_store(run)
    texts = texts_of(run, store.fingerprint)
    return store, mine(run, store, retrieve(run, store)), texts


def refresh(
    run: Run, store: tokens.Store, candidates: Candidates, step: int, params: dict | None
) -> Candidates:
    """Returns new candidates of the same queries by both models as they are at a step.

    They are kept in `lists/`. A run that resumes at a later step has no `params` of this one (None),
    and reads its candidates there; raises InputError if they are gone or damaged.
    """
    folder = run.workdir / "lists" / f"joint.{step:07}"

    def model(name: str) -> dict[str, Any]:
        if params is None:
            raise InputError(
                f"{folder}: the candidates of step {step} are gone, the models have changed; delete "
                f"{run.workdir / 'joint'} to train this stage again"
            )
        return params[name]

    kept = _Mine(run, store, folder, f"joint {step} {store.fingerprint}")
    rows = {split: each.query_rows_Q for split, each in candidates.items()}
    vectors = run.workdir / "vectors" / "refreshed"
    new = kept.retrieve(rows, vectors, lambda: model("retriever"))
    return kept.score(new, lambda: model("reranker"))


def _known_positive(
    store: tokens.Store, split: str, candidates: lists_lib.Candidates
) -> np.ndarray:
    """Says which candidates are labelled relevant for their query [Q, N]."""
    return lists_lib.known_positive(
        store.splits[split].positives(),
        candidates.query_rows_Q,
        candidates.passages_QxN,
        len(store.passage_ids),
    )


def labelled_scores(
    store: tokens.Store, dev: lists_lib.Candidates
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the re-ranker's scores of all dev candidates [N], and which are labelled relevant."""
    relevant_QxN = _known_positive(store, "dev", dev)
    return dev.reranker_QxN.reshape(-1), relevant_QxN.reshape(-1)


def draw_lists(
    config: ml_collections.ConfigDict,
    store: tokens.Store,
    candidates: Candidates,
    stage: str,
    *,
    number: int = 0,
    step: int = 0,
) -> lists_lib.Lists:
    """Draws lists of the re-ranker's warm-up or of joint training, as `lists.draw` orders them.

    All of the stage's, or `number` of them for the steps from `step` on.
    """
    settings = config[stage]
    share = settings.denoised_share if stage == "joint" else 0.0
    probability = (1.0, 0.0)
    if share > 0:
        probability = lists_lib.calibrate(*labelled_scores(store, candidates["dev"]))

    def draw(epoch: int) -> lists_lib.Lists:
        return lists_lib.draw(
            candidates["train"],
            store.splits["train"].positives(),
            store.splits["train"].own_2xN,
            list_size=settings.list_size,
            denoising=lists_lib.Denoising(
                share, probability, config.mine.negative_below, config.mine.positive_above
            ),
            num_passages=len(store.passage_ids),
            # The two stages draw apart, and so do all refreshes.
            seed=2 * config.seed + (stage == "joint"),
            epoch=(step << 20) + epoch,
        )

    lists = _counted(epochs_of_lists(draw, settings, number=number))
    if share > 0:
        train = candidates["train"]
        unlabelled_QxN = ~np.isnan(train.reranker_QxN) & ~_known_positive(store, "train", train)
        p_U = lists_lib.relevance(train.reranker_QxN[unlabelled_QxN], probability)
        _warn_of_missing(config.mine, p_U, lists)
    return lists


def _warn_of_missing(mine: ml_collections.ConfigDict, p_U: np.ndarray, lists: lists_lib.Lists):
    """Prints which kind of denoised passage no unlabelled candidate was certain enough for."""
    for kind, name, extreme in (
        (lists_lib.Provenance.DENOISED_NEGATIVE, "negative_below", np.min),
        (lists_lib.Provenance.DENOISED_POSITIVE, "positive_above", np.max),
    ):
        if len(p_U) and not (lists.provenance_LxP == kind).any():
            tqdm.tqdm.write(
                f"  no {kind.name.lower()}: unlabelled candidates' probabilities of relevance reach "
                f"{extreme(p_U):.3f}, config.mine.{name} is {mine[name]}"
            )


def read_lists(run: Run) -> tuple[tokens.Store, lists_lib.Lists]:
    """Reads the joint lists of the config's file, with a token store of their own in `lists/`."""
    settings = run.config.joint
    texts, given = joint_tsv.read(pathlib.Path(settings.lists), settings.list_size)
    folder = run.workdir / "lists" / "given"
    hosts.from_first(lambda: tokenise.prepare(texts, run.tokenizer, folder))
    store = tokens.open_store(folder)
    for line in texts.remarks:
        tqdm.tqdm.write(f"  {settings.lists}: {line}")
    try:
        given = lists_lib.without_known_positives(
            given, num_passages=len(store.passage_ids), seed=run.config.seed
        )
    except InputError:
        raise InputError(
            f"{settings.lists}: has too few passages to stand in for negatives that are positives of "
            "other lists of their query; remove such negatives"
        ) from None
    if replaced := (given.provenance_LxP == lists_lib.Provenance.RANDOM_FILL).sum():
        tqdm.tqdm.write(
            f"  {replaced} of the file's negatives are positives of other lists of their query; random "
            "passages of the file stand in for them"
        )

    def draw(epoch: int) -> lists_lib.Lists:
        rng = np.random.default_rng([run.config.seed, epoch])
        return given.take(rng.permutation(len(given.query_rows_L)))

    return store, _counted(epochs_of_lists(draw, settings))


def _counted(lists: lists_lib.Lists) -> lists_lib.Lists:
    """Returns the lists, and prints how many passages of each kind they hold."""
    kinds = np.bincount(lists.provenance_LxP.reshape(-1), minlength=len(lists_lib.Provenance))
    counts = ", ".join(f"{n} {k.name.lower()}" for k, n in zip(lists_lib.Provenance, kinds) if n)
    tqdm.tqdm.write(f"  {len(lists.query_rows_L)} lists of {lists.passages_LxP.shape[1]}: {counts}")
    return lists


def epochs_of_lists(
    draw: Callable[[int], lists_lib.Lists], stage: ml_collections.ConfigDict, *, number: int = 0
) -> lists_lib.Lists:
    """Returns a stage's lists, or `number` of them: `draw(epoch)` of one epoch after the other."""
    parts = [draw(0)]
    wanted = number or lists_lib.training_lists(stage, len(parts[0].query_rows_L))
    while sum(len(part.query_rows_L) for part in parts) < wanted:
        parts.append(draw(len(parts)))
    fields = zip(*(vars(part).values() for part in parts))
    return lists_lib.Lists(*(np.concatenate(arrays)[:wanted] for arrays in fields))
