"""The lists that the re-ranker's warm-up and joint training are made of: drawn, read, and exported.

Shape suffixes: Q queries, N candidates of a query, L lists, P passages of a list, U unlabelled
candidates.
"""

import pathlib
from collections.abc import Callable

import ml_collections
import numpy as np
import tqdm

from rqv2_jax import hosts
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import tokens
from rqv2_jax.data.readers import joint_tsv
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import mining
from rqv2_jax.recipe.run import Run


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
    candidates: mining.Candidates,
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
            own_2xN=store.splits["train"].own_2xN,
            list_size=settings.list_size,
            denoised_share=share,
            probability=probability,
            negative_below=config.mine.negative_below,
            positive_above=config.mine.positive_above,
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
    """Reads the joint lists of the file the config names, with a token store of their own in `lists/`.

    Raises:
      InputError: the file cannot be used.
    """
    settings = run.config.joint
    texts, given = joint_tsv.read(pathlib.Path(settings.lists), settings.list_size)
    folder = run.workdir / "lists" / "given"
    hosts.from_first(lambda: tokens.prepare(texts, run.tokenizer, folder))
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


def export_lists(run: Run, path: pathlib.Path) -> None:
    """Writes the lists of joint training, as they were drawn, as a joint TSV file.

    Training deals them to batches by length.

    Raises:
      InputError: there are no candidates yet, or they are not the lists' only source.
    """
    for setting in ("lists", "refresh_every"):
        if run.config.joint[setting]:
            raise InputError(
                f"{run.workdir}: config.joint.{setting} is {run.config.joint[setting]!r}, so its lists "
                "were not all drawn from mined candidates; export those of another run"
            )
    store, candidates, texts = mining.mined(run)
    joint_tsv.write(path, draw_lists(run.config, store, candidates, "joint"), texts)
