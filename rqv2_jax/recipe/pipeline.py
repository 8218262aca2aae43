"""The recipe: prepare, retriever, retrieve, reranker, mine, joint, evaluate.

Each stage reads and writes named artifacts of the workdir. A finished stage is skipped and an
unfinished one resumes, so running the same command again is always right.
"""

import contextlib
import json
import pathlib
import shlex
import shutil

import jax
import ml_collections
import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts, optional
from rqv2_jax.data import collection, denoise, own_texts, tokens
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data.batches import ListBatches
from rqv2_jax.data.readers import joint_tsv
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import evaluation, mining, results
from rqv2_jax.recipe.evaluation import DEV_METRIC
from rqv2_jax.recipe.workdir import (
    Run,
    alone,
    begin,
    begun,
    claim,
    finish_stage,
    finished,
    open_collection,
    open_run,
    open_store,
    texts_of,
)
from rqv2_jax.training import stages, train
from rqv2_jax.training.checkpoint import Checkpoints, best_step


def main(config: ml_collections.ConfigDict, workdir: pathlib.Path):
    """Runs every stage that is not finished.

    Raises:
      InputError: config, data, weights or workdir cannot be used; nothing is lost.
    """
    run = open_run(config, workdir)
    with alone(workdir):
        claim(run)
        report = finish(run, *warm_up(run), config.evaluate.indexes)
    tqdm.tqdm.write(results.render(report))
    typed = shlex.quote(str(workdir))
    tqdm.tqdm.write(
        f"results: {workdir / 'results.json'}   run files: {workdir / 'runs'}\n"
        f'next:    python -m rqv2_jax.search --workdir {typed} "a question"\n'
        f"         python -m rqv2_jax.evaluate --workdir {typed} --split dev --index exact\n"
        f"         tensorboard --logdir {typed}"
    )


def warm_up(run: Run) -> tuple[tokens.Store, dict[str, lists_lib.Candidates]]:
    """All stages before joint training: the token store and the candidates of the joint lists."""
    config = run.config
    tqdm.tqdm.write("prepare: tokenise the collection")
    store = prepare(run)
    if config.joint.lists and not begun(run.workdir / "joint"):
        # A file that cannot be used is better known before training than after it.
        mining.read_lists(run)
    if config.retriever.epochs > 0:
        tqdm.tqdm.write("retriever: warm-up with in-batch negatives")
        train_retriever(run, store)
    tqdm.tqdm.write("retrieve: candidates of the training and dev queries")
    candidates = mining.retrieve(run, store)
    if config.reranker.epochs > 0:
        tqdm.tqdm.write("reranker: warm-up on lists of retrieved negatives")
        train_reranker(run, store, candidates)
    if not config.joint.lists:
        tqdm.tqdm.write("mine: the re-ranker scores the candidates")
        candidates = mining.mine(run, store, candidates)
    return store, candidates


def finish(run: Run, store: tokens.Store, candidates: dict, indexes: tuple[str, ...]) -> dict:
    """Joint training and the evaluation of every state on test; returns what results.json holds."""
    tqdm.tqdm.write("joint: dynamic listwise distillation")
    train_joint(run, store, candidates)
    tqdm.tqdm.write("evaluate: every model state on the test queries")
    report = evaluation.evaluate(run, store, "test", indexes)
    artifacts.write_text(run.workdir / "results.json", json.dumps(report, indent=1) + "\n")
    return report


def prepare(run: Run) -> tokens.Store:
    """The collection as a token store in `data/`.

    Raises:
      InputError: it cannot be used, or its test labels cannot give the metrics that are wanted.
    """
    folder = run.workdir / "data" / "tokens"

    def make():
        texts = open_collection(run.config.data, run.workdir / "data" / "tfds")
        missing = {"train", "dev", "test"} - set(texts.splits)
        if missing:
            raise InputError(
                f"{texts.name}: has no qrels for {', '.join(sorted(missing))}; training needs "
                "train, dev and test"
            )
        tokens.prepare(texts, run.tokenizer, folder)

    hosts.from_first(make)
    store = open_store(run)
    evaluation.check_metrics(run, store, "test")
    counts = ", ".join(f"{len(q.ids)} {split}" for split, q in store.splits.items())
    tqdm.tqdm.write(f"  {len(store.passage_ids)} passages; queries: {counts}")
    for line in (*tokens.remarks(folder), *own_texts.remarks(store)):
        tqdm.tqdm.write(f"  {line}")
    empty_N = store.empty(run.config.data.titles)
    if len(empty_N):
        first = store.passage_ids[empty_N[0]]
        tqdm.tqdm.write(f"  {len(empty_N):,} passages have no text; kept, empty (first: {first})")
    return store


def stage_batches(
    run: Run, store: tokens.Store, name: str, stage: stages.Stage, lists: lists_lib.Lists
) -> ListBatches:
    """The batches that a training stage makes of its lists."""
    shards = run.sharding.shards
    return ListBatches(
        store,
        store.splits["train"],
        run.inputs,
        lists,
        batch=run.config[name].batch,
        models=stage.models,
        in_batch=stage.in_batch,
        shards=shards,
        accumulate=stage.accumulate,
        own=run.sharding.own_parts(shards * stage.accumulate),
        max_blocks=run.config.packing.blocks,
        flat=run.models.flat,
    )


def _train_stage(
    run: Run,
    store: tokens.Store,
    name: str,
    params,
    origin: str,
    lists: lists_lib.Lists,
    dev: evaluation.Dev,
    *,
    refresh_every: int = 0,
    redraw=None,
):
    """Runs one training stage to its end, from its last checkpoint if there is one.

    `origin` names `params`, which with the lists say whether a checkpoint is this training's.
    Every `refresh_every` steps (0: never), `redraw(step, state, number)` gives that many lists, of
    which the steps from `step` on are made; `state` may be a later one, of a run that resumes.
    """
    settings, stage = run.config[name], stages.make_stage(run.config, run.models, name)

    def make_batches(lists):
        hosts.check_same(f"the lists of stage {name}", lists.query_rows_L, lists.passages_LxP)
        return stage_batches(run, store, name, stage, lists)

    folder, steps = run.workdir / name, len(lists.query_rows_L) // settings.batch
    trained_on = f"{origin} {store.fingerprint}"
    trained_on = artifacts.digest(trained_on, lists.query_rows_L, lists.passages_LxP)
    done = finished(folder)
    batches = None if done else make_batches(lists)
    begin(folder, trained_on)
    if done:
        tqdm.tqdm.write(f"  done; best on dev at step {best_step(folder)} of {steps}")
        return
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder)))
        optimizer = train.make_optimizer(run.config.optimizer, settings, steps, stage.rates)
        state = checkpoints.restore_last(train.init_state(params, optimizer, run.sharding))
        tf = optional.tensorflow("writing TensorBoard's events")
        events = (
            tf.summary.create_file_writer(str(folder))
            if hosts.first()
            else tf.summary.create_noop_writer()
        )
        stack.callback(events.close)

        def write(step, terms):
            with events.as_default(step):
                for key, value in terms.items():
                    tf.summary.scalar(key, value)
            events.flush()
            shown = "  ".join(f"{key} {value:.4g}" for key, value in terms.items())
            tqdm.tqdm.write(f"  {name} {step}/{steps}  {shown}")

        def evaluate(step, params):
            scores = {model: getattr(dev, model)(tree) for model, tree in params.items()}
            terms = {f"dev/{model} {DEV_METRIC}": score for model, score in scores.items()}
            train.check_finite(name, step, terms)
            write(step, terms)
            mean = sum(scores.values()) / len(scores)
            checkpoints.save_best(step, params, f"dev {DEV_METRIC}, mean of models", mean)

        step_fn = train.make_step(stage.loss_fn, optimizer, run.sharding)
        every = refresh_every or steps
        # A process may have been killed between its last checkpoint and its word that this is the end.
        start = int(state.step) // every * every if int(state.step) < steps else steps
        for first in range(start, steps, every):
            stop = min(first + every, steps)
            if first > 0:
                number = (stop - first) * settings.batch
                batches = make_batches(redraw(first, state, number))
            state = train.train(
                state,
                step_fn=step_fn,
                batches=lambda step, b=batches, first=first: map(
                    run.sharding.put_batch, b.stream(step - first)
                ),
                dropout_key=jax.random.key(run.config.seed),
                total_steps=steps,
                stop=stop,
                stage=settings,
                hooks=train.Hooks(evaluate, checkpoints.save_last, write),
                name=name,
            )
    finish_stage(folder)
    tqdm.tqdm.write(f"  best on dev at step {best_step(folder)} of {steps}")


def train_retriever(run: Run, store: tokens.Store):
    """Warm-up of the retriever: each labelled positive once an epoch, in-batch negatives."""
    positives_2xN = store.splits["train"].positives()

    def draw(epoch):
        rng = np.random.default_rng([run.config.seed, epoch])
        queries_L, passages_L = positives_2xN[:, rng.permutation(positives_2xN.shape[1])]
        provenance_Lx1 = np.full((len(queries_L), 1), lists_lib.Provenance.LABELLED_POSITIVE)
        return lists_lib.Lists(queries_L, passages_L[:, None], provenance_Lx1)

    _train_stage(
        run,
        store,
        "retriever",
        {"retriever": run.initial("retriever")},
        run.weights_hash,
        mining.epochs_of_lists(draw, run.config.retriever),
        evaluation.Dev(run, store, None),
    )


def train_reranker(run: Run, store: tokens.Store, candidates: dict):
    """Warm-up of the re-ranker on undenoised lists."""
    _train_stage(
        run,
        store,
        "reranker",
        {"reranker": run.initial("reranker")},
        run.weights_hash,
        mining.draw_lists(run, store, candidates, "reranker"),
        evaluation.Dev(run, store, candidates["dev"]),
    )


def train_joint(run: Run, store: tokens.Store, candidates: dict):
    """Joint training of both warmed-up models on hybrid lists."""
    settings = run.config.joint

    def forget():
        if not any((run.workdir / "joint" / "last").glob("[0-9]*")):
            # What an earlier training left, of which the checkpoints have been deleted.
            for folder in [*run.workdir.glob("lists/joint.*"), run.workdir / "vectors/refreshed"]:
                shutil.rmtree(folder, ignore_errors=True)

    if not finished(run.workdir / "joint"):
        hosts.from_first(forget)

    def redraw(step, state, number):
        tqdm.tqdm.write(f"  refresh: candidates by the models of step {step}")
        params = state.params if int(state.step) == step else None
        found = mining.refresh(run, store, candidates, step, params)
        return mining.draw_lists(run, store, found, "joint", number=number, step=step)

    if settings.lists:
        source, lists = mining.read_lists(run)
    else:
        source, lists = store, mining.draw_lists(run, store, candidates, "joint")
    _train_stage(
        run,
        source,
        "joint",
        {
            "retriever": run.params("retriever", "retriever"),
            "reranker": run.params("reranker", "reranker"),
        },
        " ".join(run.origin("reranker", model) for model in ("retriever", "reranker")),
        lists,
        evaluation.Dev(run, store, candidates["dev"]),
        refresh_every=settings.refresh_every,
        redraw=redraw,
    )


def _mined(run: Run) -> tuple[tokens.Store, dict, collection.Collection]:
    """The token store, the candidates and the texts of a workdir that has finished mining.

    Raises:
      InputError: it has not, or the texts have changed since.
    """
    lists, share = run.workdir / "lists", run.config.joint.denoised_share
    if not (lists / ("dev.scores" if share > 0 else "dev.retrieved.npz")).exists():
        raise InputError(
            f"{lists}: holds no candidates yet; run rqv2_jax.main up to joint training"
        )
    store = open_store(run)
    texts = texts_of(run, store)
    return store, mining.mine(run, store, mining.retrieve(run, store)), texts


def export_lists(run: Run, path: pathlib.Path):
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
    store, candidates, texts = _mined(run)
    joint_tsv.write(path, mining.draw_lists(run, store, candidates, "joint"), texts)


def denoise_report(run: Run, labels: str, samples: int) -> tuple[dict, list[dict]]:
    """What denoising does with the scored candidates of a workdir, and some untrusted ones as text.

    Args:
      labels: qrels folder with more complete training labels, or "" where there are none; labels of
        queries that were not trained on are left out.

    Raises:
      InputError: the candidates have not been scored, or there are no such labels.
    """
    data = run.config.data
    if run.config.joint.denoised_share == 0:
        raise InputError(
            f"{run.workdir}: config.joint.denoised_share is 0, so no candidate has a score; run with "
            "a share above 0"
        )
    if run.config.joint.lists:
        raise InputError(
            f"{run.workdir}: config.joint.lists is {run.config.joint.lists!r}, so no candidates were "
            "scored for it; run without it"
        )
    if labels and data.dataset != "beir":
        raise InputError(f"--labels: {data.dataset} has no other labels; leave the flag out")
    store, candidates, texts = _mined(run)
    training, dev = candidates["train"], mining.labelled_scores(store, candidates["dev"])
    probability = lists_lib.calibrate(*dev)
    queries = store.splits["train"]
    positives_2xN = queries.positives()
    fuller_2xN = None
    if labels:
        # All of the file: which queries were held out depends on the labels.
        folder = pathlib.Path(data.path) / labels
        if not folder.is_dir():
            raise InputError(f"{folder}: no such qrels folder; add it or name another one")
        fuller = collection.labels(collection.required(folder, "qrels", "train.tsv"))
        query_rows, passage_rows = (
            dict(zip(ids, range(len(ids)))) for ids in (queries.ids, store.passage_ids)
        )
        trained_on = (label for label in fuller if label.query_id in query_rows)
        left = collection.Left()
        query_N, passage_N, relevance_N = collection.check_qrels(
            trained_on, query_rows, passage_rows, left
        )
        for line in left.lines():
            tqdm.tqdm.write(f"{labels}: {line}")
        fuller_2xN = np.stack([query_N, passage_N])[:, relevance_N > 0]
    below, above = run.config.mine.negative_below, run.config.mine.positive_above
    known = (training, positives_2xN, probability, len(store.passage_ids))
    report = denoise.table(*known, chosen=(below, above), fuller_2xN=fuller_2xN)
    report["dev"] = {"candidates": len(dev[1]), "labelled": int(dev[1].sum())}
    shown = denoise.rejected(*known, negative_below=below, count=samples, seed=run.config.seed)
    labelled = {query: passage for query, passage in positives_2xN.T[::-1].tolist()}
    wanted = {row for query, passage, _ in shown for row in (passage, labelled[query])}
    passages = texts.shown(wanted)
    asked = {query for query, _, _ in shown}
    asked = {row: q.text for row, q in enumerate(texts.queries("train")) if row in asked}
    return report, [
        {
            "query": asked[query],
            "labelled": passages[labelled[query]],
            "candidate": passages[passage],
            "probability": p,
        }
        for query, passage, p in shown
    ]
