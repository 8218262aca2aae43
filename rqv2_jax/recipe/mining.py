"""Candidates by both models, and the lists of training drawn from them."""

import dataclasses
import functools
import pathlib

import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import own_texts, tokenise, tokens
from rqv2_jax.data.readers import joint_tsv
from rqv2_jax.errors import InputError
from rqv2_jax.recipe.workdir import Run
from rqv2_jax.retrieval import encode, index, rerank

MINED_AT_ONCE = 1024


def corpus_vectors(run: Run, store: tokens.Store, state: str) -> list[np.ndarray]:
    """The corpus by the retriever of a state, in `vectors/<stage that trained it>`."""
    stage = run.trained_by(state, "retriever")
    return encode.corpus(
        run.forward,
        run.params(state, "retriever")["passage"],
        store,
        run.workdir / "vectors" / stage,
        f"{run.origin(state, 'retriever')} {store.fingerprint}",
    )


def _retrieve(
    run: Run, store: tokens.Store, folder: pathlib.Path, source: str, rows, tower, shards
):
    """The top passages of some queries, by split, as `source` names them.

    `rows` are their row numbers by split; `tower()` and `shards()` give the params of the query tower
    and the passages' vectors.
    """

    def candidates(split, depth):
        rows_Q, queries = rows[split], store.splits[split]

        def compute():
            vectors_QxD = encode.queries(run.forward, tower(), queries.texts, rows_Q)
            own_Q = own_texts.of_rows(queries, rows_Q)
            found = index.exact(vectors_QxD, shards(), own_texts.deeper(depth, own_Q))
            passages_QxN, scores_QxN = own_texts.without(*found, own_Q)
            return {"query_rows": rows_Q, "passages": passages_QxN, "scores": scores_QxN}

        found = artifacts.cached(folder / f"{split}.retrieved.npz", source, compute)
        return lists_lib.Candidates(
            found["query_rows"],
            found["passages"],
            found["scores"],
            np.full(found["scores"].shape, np.nan, np.float32),
        )

    depths = {"train": run.config.mine.depth, "dev": run.config.dev.depth}
    return {split: candidates(split, depths[split]) for split in rows}


def _score(
    run: Run, store: tokens.Store, candidates: dict, folder: pathlib.Path, source: str, reranker
):
    """The candidates with scores, as `source` names them, of the re-ranker `reranker()` gives.

    Those of `config.mine` and all of the dev queries get one, the others keep NaN; none does unless
    joint lists are to be denoised.
    """
    params = None

    def scored(split, candidates, queries, depth):
        found = candidates.first(queries, depth)
        texts = store.splits[split].texts
        parts = []
        for first in range(0, len(found.query_rows_Q), MINED_AT_ONCE):
            rows_Q = found.query_rows_Q[first : first + MINED_AT_ONCE]
            passages_QxN = found.passages_QxN[first : first + MINED_AT_ONCE]

            def compute(rows_Q=rows_Q, passages_QxN=passages_QxN):
                nonlocal params
                params = reranker() if params is None else params
                scores = rerank.scores(run.forward, params, store, texts, rows_Q, passages_QxN)
                return {"scores": scores}

            path = folder / f"{split}.scores" / f"{first // MINED_AT_ONCE:05}.npz"
            parts.append(artifacts.cached(path, source, compute)["scores"])
        reranker_QxN = candidates.reranker_QxN.copy()
        reranker_QxN[:queries, :depth] = np.concatenate(parts)
        return dataclasses.replace(candidates, reranker_QxN=reranker_QxN)

    if run.config.joint.denoised_share == 0:
        return candidates
    most = {
        "train": (run.config.mine.scored_queries, run.config.mine.scored_depth),
        "dev": (run.config.dev.queries, run.config.dev.depth),
    }
    return {split: scored(split, found, *most[split]) for split, found in candidates.items()}


def retrieve(run: Run, store: tokens.Store) -> dict[str, lists_lib.Candidates]:
    """The warmed-up retriever's top passages for the training and dev queries, in `lists/`.

    For dev queries alone where no lists are drawn from the others.
    """
    most = {"dev": run.config.dev.queries}
    if run.config.reranker.epochs > 0 or not run.config.joint.lists:
        most = {"train": run.config.mine.queries, **most}
    return _retrieve(
        run,
        store,
        run.workdir / "lists",
        f"{run.origin('retriever', 'retriever')} {store.fingerprint}",
        {
            s: lists_lib.subset(len(store.splits[s].ids), n, run.config.seed)
            for s, n in most.items()
        },
        lambda: run.params("retriever", "retriever")["query"],
        lambda: corpus_vectors(run, store, "retriever"),
    )


def mine(run: Run, store: tokens.Store, candidates: dict) -> dict[str, lists_lib.Candidates]:
    """The candidates with the warmed-up re-ranker's scores, in `lists/`."""
    origins = (run.origin("reranker", model) for model in ("retriever", "reranker"))
    source = f"{' '.join(origins)} {store.fingerprint}"
    folder = run.workdir / "lists"
    scorer = functools.partial(run.params, "reranker", "reranker")
    return _score(run, store, candidates, folder, source, scorer)


def refresh(
    run: Run, store: tokens.Store, candidates: dict, step: int, params
) -> dict[str, lists_lib.Candidates]:
    """New candidates of the same queries by both models as they are at a step, in `lists/`.

    A run that resumes at a later step, and has no `params` of this one (None), reads them there.

    Raises:
      InputError: then they are not there, or damaged.
    """
    folder, source = run.workdir / "lists" / f"joint.{step:07}", f"joint {step} {store.fingerprint}"

    def model(name):
        if params is None:
            raise InputError(
                f"{folder}: the candidates of step {step} are gone, the models have changed; delete "
                f"{run.workdir / 'joint'} to train this stage again"
            )
        return params[name]

    def shards():
        tower = model("retriever")["passage"]
        return encode.corpus(run.forward, tower, store, run.workdir / "vectors/refreshed", source)

    rows = {split: found.query_rows_Q for split, found in candidates.items()}
    found = _retrieve(run, store, folder, source, rows, lambda: model("retriever")["query"], shards)
    return _score(run, store, found, folder, source, lambda: model("reranker"))


def labelled_scores(store: tokens.Store, dev: lists_lib.Candidates):
    """The re-ranker's scores of all dev candidates [N], and which of these are labelled relevant."""
    positives_2xN = store.splits["dev"].positives()
    relevant_QxN = lists_lib.known_positive(
        positives_2xN, dev.query_rows_Q, dev.passages_QxN, len(store.passage_ids)
    )
    return dev.reranker_QxN.reshape(-1), relevant_QxN.reshape(-1)


def draw_lists(
    run: Run, store: tokens.Store, candidates: dict, stage: str, *, number: int = 0, step: int = 0
) -> lists_lib.Lists:
    """Lists of the re-ranker's warm-up or of joint training, as `lists.draw` orders them.

    All of the stage's, or `number` of them for the steps from `step` on.
    """
    settings, thresholds = run.config[stage], run.config.mine
    share = settings.denoised_share if stage == "joint" else 0.0
    probability = (1.0, 0.0)
    if share > 0:
        probability = lists_lib.calibrate(*labelled_scores(store, candidates["dev"]))

    def draw(epoch):
        return lists_lib.draw(
            candidates["train"],
            store.splits["train"].positives(),
            store.splits["train"].own_2xN,
            list_size=settings.list_size,
            denoising=lists_lib.Denoising(
                share, probability, thresholds.negative_below, thresholds.positive_above
            ),
            num_passages=len(store.passage_ids),
            # The two stages draw apart, and so do all refreshes.
            seed=2 * run.config.seed + (stage == "joint"),
            epoch=(step << 20) + epoch,
        )

    lists = _counted(epochs_of_lists(draw, settings, number=number))
    if share > 0:
        _say_what_is_missing(run, store, candidates["train"], probability, lists)
    return lists


def _say_what_is_missing(run: Run, store: tokens.Store, candidates, probability, lists):
    """Prints which kind of denoised passage no candidate was certain enough for."""
    known_QxN = lists_lib.known_positive(
        store.splits["train"].positives(),
        candidates.query_rows_Q,
        candidates.passages_QxN,
        len(store.passage_ids),
    )
    scored_QxN = ~np.isnan(candidates.reranker_QxN)
    p_U = lists_lib.relevance(candidates.reranker_QxN[scored_QxN & ~known_QxN], probability)
    for kind, name, extreme in (
        (lists_lib.Provenance.DENOISED_NEGATIVE, "negative_below", np.min),
        (lists_lib.Provenance.DENOISED_POSITIVE, "positive_above", np.max),
    ):
        if len(p_U) and not (lists.provenance_LxP == kind).any():
            tqdm.tqdm.write(
                f"  no {kind.name.lower()}: unlabelled candidates' probabilities of relevance reach "
                f"{extreme(p_U):.3f}, config.mine.{name} is {run.config.mine[name]}"
            )


def read_lists(run: Run) -> tuple[tokens.Store, lists_lib.Lists]:
    """The joint lists of the file the config names, with a token store of their own in `lists/`.

    Raises:
      InputError: the file cannot be used.
    """
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

    def draw(epoch):
        rng = np.random.default_rng([run.config.seed, epoch])
        return given.take(rng.permutation(len(given.query_rows_L)))

    return store, _counted(epochs_of_lists(draw, settings))


def _counted(lists: lists_lib.Lists) -> lists_lib.Lists:
    kinds = np.bincount(lists.provenance_LxP.reshape(-1), minlength=len(lists_lib.Provenance))
    counts = ", ".join(f"{n} {k.name.lower()}" for k, n in zip(lists_lib.Provenance, kinds) if n)
    tqdm.tqdm.write(f"  {len(lists.query_rows_L)} lists of {lists.passages_LxP.shape[1]}: {counts}")
    return lists


def epochs_of_lists(draw, stage, *, number: int = 0) -> lists_lib.Lists:
    """A stage's lists, or so many, one epoch's draw after the other; `draw(epoch)` gives one."""
    first = draw(0)
    wanted = number or lists_lib.training_lists(stage, len(first.query_rows_L))
    parts, count = [first], len(first.query_rows_L)
    while count < wanted:
        parts.append(draw(len(parts)))
        count += len(parts[-1].query_rows_L)
    joined = (
        np.concatenate([getattr(part, field.name) for part in parts])[:wanted]
        for field in dataclasses.fields(lists_lib.Lists)
    )
    return lists_lib.Lists(*joined)
