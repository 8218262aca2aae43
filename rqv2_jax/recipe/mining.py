"""Candidates by both models, and the lists of training drawn from them.

Shape suffixes: Q queries, N candidates of a query, D vector size, L lists, P passages of a list,
U unlabelled candidates.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts
from rqv2_jax.data import calibration, collection, drawing, tokenise, tokens
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data.readers import joint_tsv
from rqv2_jax.errors import InputError
from rqv2_jax.recipe.candidates import Candidates, Finder, drawn_queries
from rqv2_jax.recipe.rankings import source_of
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.texts import open_store, texts_of
from rqv2_jax.retrieval import rerank

MINED_AT_ONCE = 1024
# Of lists that are not denoised.
UNDENOISED = drawing.Denoising(0.0, (1.0, 0.0), 0.0, 1.0)


def score(finder: Finder, candidates: Candidates, reranker: Callable[[], dict]) -> Candidates:
    """Returns the candidates with the scores that `config` wants; all others keep NaN."""
    config, reranker = finder.run.config, functools.cache(reranker)
    if config.joint.denoised_share == 0:
        return candidates

    def scored(split: str, queries: int, depth: int) -> lists_lib.Candidates:
        first, texts = candidates[split].first(queries, depth), finder.store.splits[split].texts
        parts = []
        for start in range(0, len(first.query_rows_Q), MINED_AT_ONCE):
            part = slice(start, start + MINED_AT_ONCE)
            pairs = finder.store, texts, first.query_rows_Q[part], first.passages_QxN[part]
            path = finder.folder / f"{split}.scores" / f"{start // MINED_AT_ONCE:05}.npz"

            def compute(pairs: tuple = pairs) -> dict[str, np.ndarray]:
                scores_QxN = rerank.scores(finder.run.forward, reranker(), *pairs)
                return {"scores": np.where(pairs[-1] >= 0, scores_QxN, np.float32(np.nan))}

            parts.append(artifacts.cached(path, finder.source, compute)["scores"])
        reranker_QxN = candidates[split].reranker_QxN.copy()
        reranker_QxN[:queries, :depth] = np.concatenate(parts)
        return dataclasses.replace(candidates[split], reranker_QxN=reranker_QxN)

    most = {
        "train": (config.mine.scored_queries, config.mine.scored_depth),
        "dev": (config.dev.queries, config.dev.depth),
    }
    return {split: scored(split, *most[split]) for split in candidates}


def retrieve(run: Run, store: tokens.Store) -> Candidates:
    """Returns passages found for training and dev queries by `config.mine`, kept in `lists/`.

    The retriever is the warmed-up one.
    """
    warm = {"state": "retriever", "model": "retriever"}
    vectors = run.workdir / "vectors" / run.trained_by(**warm)
    finder = Finder(run, store, run.workdir / "lists", source_of(run, store, "retriever"))
    rows = drawn_queries(run, store)
    return finder.find(rows, vectors, functools.partial(run.params, **warm))


def mine(run: Run, store: tokens.Store, candidates: Candidates) -> Candidates:
    """Returns the candidates with the warmed-up re-ranker's scores, kept in `lists/`."""
    finder = Finder(run, store, run.workdir / "lists", f"{warmed_up(run)} {store.fingerprint}")
    return score(finder, candidates, lambda: run.params(state="reranker", model="reranker"))


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

    finder = Finder(run, store, folder, f"joint {step} {store.fingerprint}")
    rows = {split: each.query_rows_Q for split, each in candidates.items()}
    vectors = run.workdir / "vectors" / "refreshed"
    new = finder.find(rows, vectors, lambda: model("retriever"))
    return score(finder, new, lambda: model("reranker"))


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
    scored_QxN = ~np.isnan(dev.reranker_QxN)
    return dev.reranker_QxN[scored_QxN], _known_positive(store, "dev", dev)[scored_QxN]


def comparable(
    config: ml_collections.ConfigDict, store: tokens.Store, candidates: Candidates
) -> tuple[Candidates, tuple[float, float]]:
    """Returns candidates with scores that mean the same for every query, as `config.mine` asks.

    And slope and offset, by which `calibration.relevance` makes them probabilities.
    """
    mine = config.mine
    if mine.probability == "sigmoid":
        return candidates, (1.0, 0.0)
    if mine.calibrate == "query_mean":
        # The mean depends on the depth, so that it is the same for all.
        depth = min(config.dev.depth, mine.scored_depth)
        candidates = {split: each.centred(depth) for split, each in candidates.items()}
    judged = labelled_scores(store, candidates["dev"])
    return candidates, calibration.calibrate(*judged, mine.relevant_share)


def draw_lists(
    config: ml_collections.ConfigDict,
    store: tokens.Store,
    candidates: Candidates,
    stage: str,
    *,
    number: int = 0,
    step: int = 0,
) -> lists_lib.Lists:
    """Draws lists of the re-ranker's warm-up or of joint training, as `drawing.draw` orders them.

    All of the stage's, or `number` of them for the steps from `step` on. Joint training begins with
    queries that the warm-up has not read: of those it has, a re-ranker knows the labels by heart, and
    teaches no more than these.
    """
    queries, train, share = store.splits["train"], candidates["train"], 0.0
    never_2xN = np.concatenate([queries.own_2xN, _twins(config, store, train)], axis=1)
    read_L, probability = np.zeros(0, int), (1.0, 0.0)
    if stage == "joint":
        share = config.joint.denoised_share
        one_pass = int(np.isin(queries.positives()[0], train.query_rows_Q).sum())
        # A warm-up of a whole pass has read all queries, which leaves the order as it is.
        partial = 0 < lists_lib.training_lists(config.reranker, one_pass) < one_pass
        if partial and not step:
            read_L = _draw(config, store, train, never_2xN, "reranker").query_rows_L
    if share > 0:
        candidates, probability = comparable(config, store, candidates)
        train = candidates["train"]
    trusted = config.mine.negative_below, config.mine.positive_above
    lists = _draw(
        *(config, store, train, never_2xN, stage),
        denoising=drawing.Denoising(share, probability, *trusted),
        read_L=read_L,
        part=(number, step),
    )
    _print_kinds(lists)
    if share > 0:
        _warn_of_missing(config.mine, store, train, probability, lists)
    return lists


def _draw(
    config: ml_collections.ConfigDict,
    store: tokens.Store,
    train: lists_lib.Candidates,
    never_2xN: np.ndarray,
    stage: str,
    *,
    denoising: drawing.Denoising = UNDENOISED,
    read_L: Sequence[int] | np.ndarray = (),
    part: tuple[int, int] = (0, 0),
) -> lists_lib.Lists:
    """Draws lists as `draw_lists` says, in each epoch those of the queries in `read_L` last.

    `never_2xN` are pairs that are no negatives beside the labelled ones, `part` is (number, step).
    """
    settings, (number, step) = config[stage], part

    def draw(epoch: int) -> lists_lib.Lists:
        drawn = drawing.draw(
            train,
            store.splits["train"].positives(),
            never_2xN,
            list_size=settings.list_size,
            denoising=denoising,
            num_passages=len(store.passage_ids),
            # The two stages draw apart, and so do all refreshes.
            seed=2 * config.seed + (stage == "joint"),
            epoch=(step << 20) + epoch,
        )
        return drawn.take(np.argsort(np.isin(drawn.query_rows_L, read_L), kind="stable"))

    return epochs_of_lists(draw, settings, number=number)


def _twins(
    config: ml_collections.ConfigDict, store: tokens.Store, candidates: lists_lib.Candidates
) -> np.ndarray:
    """Returns candidates with the text of a positive under another id, as `lists.same_text` does."""
    positives_2xN = store.splits["train"].positives()
    # Row -1, padding, marks the last entry.
    looked_at_N = np.zeros(len(store.texts) + 1, bool)
    looked_at_N[positives_2xN[1]] = True
    looked_at_N[candidates.passages_QxN] = True
    text_N = store.same_text(np.flatnonzero(looked_at_N[:-1]), config.data.titles)
    rows = candidates.query_rows_Q, candidates.passages_QxN
    twins_2xN = lists_lib.same_text(positives_2xN, *rows, text_N)
    if count := twins_2xN.shape[1]:
        tqdm.tqdm.write(
            f"  {count:,} candidates have the text of a positive of their query under another id, so "
            "they are no negatives"
        )
    return twins_2xN


def _warn_of_missing(
    mine: ml_collections.ConfigDict,
    store: tokens.Store,
    train: lists_lib.Candidates,
    probability: tuple[float, float],
    lists: lists_lib.Lists,
) -> None:
    """Prints which kind of denoised passage no unlabelled candidate was certain enough for."""
    for kind, name, extreme in (
        (lists_lib.Provenance.DENOISED_NEGATIVE, "negative_below", np.min),
        (lists_lib.Provenance.DENOISED_POSITIVE, "positive_above", np.max),
    ):
        if (lists.provenance_LxP == kind).any():
            continue
        reached = []
        for part in lists_lib.parts(len(train.query_rows_Q)):
            some = train.take(part)
            unlabelled_QxN = ~np.isnan(some.reranker_QxN) & ~_known_positive(store, "train", some)
            p_U = calibration.relevance(some.reranker_QxN[unlabelled_QxN], probability)
            reached += [extreme(p_U)] if len(p_U) else []
        if reached:
            tqdm.tqdm.write(
                f"  no {kind.name.lower()}: unlabelled candidates' probabilities of relevance reach "
                f"{extreme(reached):.3f}, config.mine.{name} is {mine[name]}"
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
        text_N = store.same_text(given.passages_LxP, run.config.data.titles)
        given = drawing.without_known_positives(given, text_N, seed=run.config.seed)
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

    lists = epochs_of_lists(draw, settings)
    _print_kinds(lists)
    return store, lists


def _print_kinds(lists: lists_lib.Lists) -> None:
    """Prints how many passages of each kind lists hold."""
    kinds = np.bincount(lists.provenance_LxP.reshape(-1), minlength=len(lists_lib.Provenance))
    counts = ", ".join(f"{n} {k.name.lower()}" for k, n in zip(lists_lib.Provenance, kinds) if n)
    tqdm.tqdm.write(f"  {len(lists.query_rows_L)} lists of {lists.passages_LxP.shape[1]}: {counts}")


def epochs_of_lists(
    draw: Callable[[int], lists_lib.Lists], stage: ml_collections.ConfigDict, *, number: int = 0
) -> lists_lib.Lists:
    """Returns a stage's lists, or `number` of them: `draw(epoch)` of one epoch after the other."""
    parts = [draw(0)]
    wanted = number or lists_lib.training_lists(stage, len(parts[0].query_rows_L))
    while sum(len(part.query_rows_L) for part in parts) < wanted:
        parts.append(draw(len(parts)))
    fields = zip(*((x.query_rows_L, x.passages_LxP, x.provenance_LxP) for x in parts))
    return lists_lib.Lists(*(np.concatenate(arrays)[:wanted] for arrays in fields))
