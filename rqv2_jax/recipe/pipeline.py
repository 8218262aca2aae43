"""The recipe: prepare, retriever, retrieve, reranker, mine, joint, evaluate.

Each stage reads and writes named artifacts of the workdir. A finished stage is skipped and an
unfinished one resumes, so running the same command again is always right. Shape suffixes: N labelled
pairs or passages, L lists, Q queries, K passages of a query.
"""

import dataclasses
import json
import pathlib
import shlex
import shutil

import ml_collections
import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import own_texts, tokenise, tokens
from rqv2_jax.data.readers import joint_tsv
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import budget, evaluation, mining, rankings, results, space, teacher
from rqv2_jax.recipe import candidates as candidates_lib
from rqv2_jax.recipe.claim import claim
from rqv2_jax.recipe.opening import in_training
from rqv2_jax.recipe.run import STATES, Run, open_run
from rqv2_jax.recipe.stage import Dev, train_stage
from rqv2_jax.recipe.texts import open_collection, open_store
from rqv2_jax.recipe.workdir import alone, begun, finished
from rqv2_jax.training import train
from rqv2_jax.training.checkpoint import best_values


def main(config: ml_collections.ConfigDict, workdir: pathlib.Path, *, force: bool = False) -> None:
    """Runs every stage that is not finished; raises InputError, with nothing lost, if it cannot.

    With `force` it goes on where disk or memory look too small.
    """
    run = dataclasses.replace(open_run(config, workdir), force=force)
    # Before the workdir belongs to a config that would have to be changed.
    space.check_run(run)
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


def warm_up(run: Run) -> tuple[tokens.Store, candidates_lib.Candidates]:
    """Runs all stages before joint training; returns the token store and the candidates."""
    config = run.config
    tqdm.tqdm.write("prepare: tokenise the collection")
    with budget.timed(run, "prepare"):
        store = prepare(run)
    space.check_run(run, store)
    if config.budget:
        with budget.timed(run, "measuring"):
            budget.use(run, store)
    if config.joint.lists and not begun(run.workdir / "joint"):
        # A file that cannot be used is better known before training than after it.
        mining.read_lists(run)
    if config.reranker.epochs > 0:
        teacher.check(run)
    if config.mine.candidates:
        candidates_lib.read_given(run, store, candidates_lib.drawn_queries(run, store))
    if config.retriever.epochs > 0:
        tqdm.tqdm.write("retriever: warm-up with in-batch negatives")
        with budget.timed(run, "retriever"):
            train_retriever(run, store)
    tqdm.tqdm.write("retrieve: candidates of the training and dev queries")
    if "retriever" in config.mine.sources and not config.mine.candidates:
        space.check_vectors(run, store, ("retriever",))
    with budget.timed(run, "retrieve"):
        candidates = mining.retrieve(run, store)
    if config.reranker.epochs > 0:
        tqdm.tqdm.write("reranker: warm-up on lists of retrieved negatives")
        with budget.timed(run, "reranker"):
            train_reranker(run, store, candidates)
    if not config.joint.lists:
        tqdm.tqdm.write("mine: the re-ranker scores the candidates")
        with budget.timed(run, "mine"):
            candidates = mining.mine(run, store, candidates)
    return store, candidates


def finish(
    run: Run, store: tokens.Store, candidates: candidates_lib.Candidates, indexes: tuple[str, ...]
) -> dict:
    """Trains jointly and evaluates every state on test; returns what results.json holds."""
    tqdm.tqdm.write("joint: dynamic listwise distillation")
    with budget.timed(run, "joint"):
        train_joint(run, store, candidates)
    budget.report(run)
    tqdm.tqdm.write("evaluate: every model state on the test queries")
    space.check_vectors(run, store, STATES)
    with budget.timed(run, "evaluate"):
        report = evaluation.evaluate(run, store, "test", indexes)
    artifacts.write_text(run.workdir / "results.json", json.dumps(report, indent=1) + "\n")
    return report


def prepare(run: Run) -> tokens.Store:
    """Makes the token store in `data/`; raises InputError if it cannot give what training needs."""
    folder = run.workdir / "data" / "tokens"

    def make():
        texts = open_collection(run.config.data, run.workdir / "data" / "tfds")
        missing = {"train", "dev", "test"} - set(texts.splits)
        if missing:
            raise InputError(
                f"{texts.name}: has no qrels for {', '.join(sorted(missing))}; training needs "
                "train, dev and test"
            )
        tokenise.prepare(texts, run.tokenizer, folder)

    hosts.from_first(make)
    store = open_store(run)
    evaluation.check_metrics(run.config.evaluate, store.splits["test"])
    counts = ", ".join(f"{len(q.ids)} {split}" for split, q in store.splits.items())
    tqdm.tqdm.write(f"  {len(store.passage_ids)} passages; queries: {counts}")
    for name, inputs in (
        ("search", run.inputs),
        ("training", in_training(run.inputs, run.config.data)),
    ):
        cut = results.cut_by(inputs, store)
        shares = (f"{setting} {getattr(inputs, setting)}: {cut[setting]:.1%}" for setting in cut)
        tqdm.tqdm.write(f"  tokens cut off in {name}: {', '.join(shares)}")
    for line in (*tokens.remarks(folder), *own_texts.remarks(store)):
        tqdm.tqdm.write(f"  {line}")
    empty_N = store.empty(run.config.data.titles)
    if len(empty_N):
        first = store.passage_ids[empty_N[0]]
        tqdm.tqdm.write(f"  {len(empty_N):,} passages have no text; kept, empty (first: {first})")
    return store


def train_retriever(run: Run, store: tokens.Store) -> None:
    """Warms up the retriever: each labelled positive once an epoch, in-batch negatives."""
    positives_2xN = store.splits["train"].positives()

    def draw(epoch: int) -> lists_lib.Lists:
        rng = np.random.default_rng([run.config.seed, epoch])
        queries_L, passages_L = positives_2xN[:, rng.permutation(positives_2xN.shape[1])]
        provenance_Lx1 = np.full((len(queries_L), 1), lists_lib.Provenance.LABELLED_POSITIVE)
        return lists_lib.Lists(queries_L, passages_L[:, None], provenance_Lx1)

    lists = mining.epochs_of_lists(draw, run.config.retriever)

    def start() -> dict:
        return {"retriever": run.initial("retriever")}

    hard_QxK = None
    if run.config.dev.hard and not finished(run.workdir / "retriever"):
        hard_QxK = _found_by_start(run, store)
    dev = Dev(run.config, run.forward, store, None, hard_QxK)
    train_stage(run, store, "retriever", start, run.weights_hash, lists, dev)


def _found_by_start(run: Run, store: tokens.Store) -> np.ndarray:
    """Returns the passages [Q, K] that the starting retriever finds for the dev queries."""
    settings, queries = run.config.dev, store.splits["dev"]
    rows_Q = lists_lib.subset(len(queries.ids), settings.queries, run.config.seed)
    how = {"state": "zero_shot", "index_name": "exact"}
    return rankings.retrieve(run, store, queries, rows_Q, **how)[0][:, : settings.hard]


def train_reranker(run: Run, store: tokens.Store, candidates: candidates_lib.Candidates) -> None:
    """Warms up the re-ranker on undenoised lists, and on the scores of its teacher if it has one."""

    def start() -> dict:
        return {"reranker": run.initial("reranker")}

    lists = mining.draw_lists(run.config, store, candidates, "reranker")
    lists = teacher.taught(run, store, lists)
    new = {"reranker": None} if run.new_reranker else {}
    dev = Dev(run.config, run.forward, store, candidates["dev"], start=new)
    train_stage(run, store, "reranker", start, run.weights_hash, lists, dev)


def train_joint(run: Run, store: tokens.Store, candidates: candidates_lib.Candidates) -> None:
    """Trains both warmed-up models jointly on hybrid lists."""

    def redraw(step: int, state: train.TrainState, number: int) -> lists_lib.Lists:
        tqdm.tqdm.write(f"  refresh: candidates by the models of step {step}")
        params = state.params if int(state.step) == step else None
        refreshed = mining.refresh(run, store, candidates, step, params)
        part = {"number": number, "step": step}
        return mining.draw_lists(run.config, store, refreshed, "joint", **part)

    if not finished(run.workdir / "joint"):
        hosts.from_first(lambda: _forget_refreshed(run.workdir))
    if run.config.joint.lists:
        source, lists = mining.read_lists(run)
    else:
        source, lists = store, mining.draw_lists(run.config, store, candidates, "joint")

    def start() -> dict:
        return {m: run.params(state="reranker", model=m) for m in ("retriever", "reranker")}

    origin, start_values = mining.warmed_up(run), {}
    if run.config.reranker.epochs > 0:
        # Its warm-up has measured it on the same candidates.
        values_Q = best_values(run.workdir / "reranker", "reranker")
        start_values = {} if values_Q is None else {"reranker": values_Q}
    dev = Dev(run.config, run.forward, store, candidates["dev"], start=start_values)
    refreshing = run.config.joint.refresh_every > 0
    train_stage(run, source, "joint", start, origin, lists, dev, redraw if refreshing else None)


def _forget_refreshed(workdir: pathlib.Path):
    """Deletes what an earlier joint training left whose checkpoints have been deleted."""
    if not any((workdir / "joint" / "last").glob("[0-9]*")):
        for folder in [*workdir.glob("lists/joint.*"), workdir / "vectors/refreshed"]:
            shutil.rmtree(folder, ignore_errors=True)


def export_lists(run: Run, path: pathlib.Path) -> None:
    """Writes the lists of joint training, as they were drawn, as a joint TSV file.

    Training deals them to batches by length. Raises InputError unless all were drawn from candidates.
    """
    for setting in ("lists", "refresh_every"):
        if run.config.joint[setting]:
            raise InputError(
                f"{run.workdir}: config.joint.{setting} is {run.config.joint[setting]!r}, so its lists "
                "were not all drawn from mined candidates; export those of another run"
            )
    store, candidates, texts = mining.mined(run)
    joint_tsv.write(path, mining.draw_lists(run.config, store, candidates, "joint"), texts)
