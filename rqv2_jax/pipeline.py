"""The recipe: prepare, retriever, retrieve, reranker, mine, joint, evaluate.

Each stage reads and writes named artifacts of the workdir. A finished stage is skipped and an
unfinished one resumes, so running the same command again is always right.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
from functools import partial

import jax
import ml_collections
import numpy as np
import tensorflow as tf
import tqdm

from rqv2_jax import artifacts, metrics, train, weights
from rqv2_jax import config as config_lib
from rqv2_jax import models as models_lib
from rqv2_jax import sharding as sharding_lib
from rqv2_jax.checkpoint import Checkpoints, restore_best
from rqv2_jax.data import collection, denoise, docstrings, joint_tsv, tokens
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data.batches import ListBatches
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.errors import InputError
from rqv2_jax.retrieval import encode, index, rerank
from rqv2_jax.retrieval.stream import Forward, make_forward

STATES = ("zero_shot", "retriever", "reranker", "joint")
MINED_AT_ONCE = 1024
DEV_METRIC = "RR@10"


@dataclasses.dataclass(frozen=True)
class Run:
    """A config made concrete: where it works, the models' static half, how they read tokens."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    weights: pathlib.Path
    models: models_lib.Models
    tokenizer: tokens.Tokenizer
    inputs: Inputs
    sharding: sharding_lib.Sharding
    forward: Forward

    def initial(self, model: str):
        """The params of one model before any training, on the devices."""
        encoder = weights.load_encoder(self.weights, self.models.config)
        if model == "retriever":
            return self.sharding.put_params(models_lib.init_retriever(encoder))
        key = jax.random.key(self.config.seed)
        return self.sharding.put_params(models_lib.init_reranker(encoder, self.models.config, key))

    def trained_by(self, state: str, model: str) -> str:
        """The stage whose params a model has in a state; "zero_shot" for none.

        Raises:
          InputError: the re-ranker is not trained in that state.
        """
        if state == "joint":
            return "joint"
        if model == "reranker":
            if state != "reranker":
                raise InputError(f"state {state!r} has no re-ranker; choose 'reranker' or 'joint'")
            return "reranker"
        warmed_up = state != "zero_shot" and self.config.retriever.epochs > 0
        return "retriever" if warmed_up else "zero_shot"

    def params(self, state: str, model: str):
        """The params of one model in a state of the run.

        Raises:
          InputError: the stage that trains it has not been run.
        """
        stage = self.trained_by(state, model)
        initial = self.initial(model)
        if stage == "zero_shot":
            return initial
        return restore_best(self.workdir / stage, model, initial)


def open_run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Run:
    """Checks the config, the weights' config and tokenizer, and the devices.

    Raises:
      InputError: one of them cannot be used.
    """
    config_lib.check(config)
    folder = weights.find_folder(config.model.weights)
    bert_config = weights.read_config(
        folder,
        num_layers=config.model.num_layers,
        dropout=config.model.dropout,
        dtype=config.model.dtype,
    )
    longest = max(config.data.query_length, config.data.passage_length, config.data.pair_length)
    if longest > bert_config.max_positions:
        raise InputError(
            f"config.data asks for inputs of {longest} tokens, but {folder / 'config.json'} has "
            f"{bert_config.max_positions} positions; lower query_length, passage_length, pair_length"
        )
    tokenizer = tokens.load_tokenizer(folder, bert_config.vocab_size)
    models = models_lib.Models(bert_config, config.model.pooling)
    inputs = Inputs(
        cls=tokenizer.cls,
        sep=tokenizer.sep,
        titles=config.data.titles,
        passage_format=config.model.passage_format,
        query_length=config.data.query_length,
        passage_length=config.data.passage_length,
        pair_length=config.data.pair_length,
    )
    sharding = sharding_lib.make(config.mesh.data, config.mesh.fsdp)
    return Run(
        config=config,
        workdir=workdir,
        weights=folder,
        models=models,
        tokenizer=tokenizer,
        inputs=inputs,
        sharding=sharding,
        forward=make_forward(models, inputs, sharding, config.evaluate.batch_tokens),
    )


def open_workdir(workdir: pathlib.Path) -> Run:
    """The run a workdir was made by.

    Raises:
      InputError: the folder is no workdir.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir}: is no workdir (no config.json); run rqv2_jax.main first")
    return open_run(config_lib.loads(path.read_text()), workdir)


def claim(run: Run):
    """Writes config.json and environment.json; a workdir belongs to one config.

    Raises:
      InputError: the workdir was made by another config.
    """
    path = run.workdir / "config.json"
    if path.is_file():
        changed = config_lib.differences(config_lib.loads(path.read_text()), run.config)
        # The mesh changes where numbers are computed, not which.
        changed = [line for line in changed if not line.startswith("mesh.")]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise InputError(
                f"{path}: this workdir was made by another config ({'; '.join(changed[:3])}{more}); "
                "give another --workdir, or the config it was made by"
            )
    elif run.workdir.is_dir() and any(run.workdir.iterdir()):
        raise InputError(f"{run.workdir}: holds other files; give a new or empty --workdir")
    artifacts.write_text(path, config_lib.dumps(run.config))
    packages = (
        "jax",
        "flax",
        "optax",
        "orbax-checkpoint",
        "tensorflow-cpu",
        "scann",
        "transformers",
    )
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    environment = {
        "python": platform.python_version(),
        "packages": {name: installed.get(name, "not installed") for name in packages},
        "devices": [str(d) for d in jax.devices()],
        "machine": platform.platform(),
        "commit": commit.stdout.strip() or "unknown",
    }
    text = json.dumps(environment, indent=1) + "\n"
    artifacts.write_text(run.workdir / "environment.json", text)


def main(config: ml_collections.ConfigDict, workdir: pathlib.Path):
    """Runs every stage that is not finished.

    Raises:
      InputError: config, data, weights or workdir cannot be used; nothing is lost.
    """
    run = open_run(config, workdir)
    claim(run)
    report = finish(run, *warm_up(run))
    _say(render(report))
    _say(
        f"results: {workdir / 'results.json'}   run files: {workdir / 'runs'}\n"
        f"next:    python -m rqv2_jax.evaluate --workdir {workdir} --split dev --index exact\n"
        f"         tensorboard --logdir {workdir}"
    )


def warm_up(run: Run) -> tuple[tokens.Store, dict[str, lists_lib.Candidates]]:
    """All stages before joint training: the token store and the candidates of the joint lists."""
    config = run.config
    _say("prepare: tokenise the collection")
    store = prepare(run)
    if config.retriever.epochs > 0:
        _say("retriever: warm-up with in-batch negatives")
        train_retriever(run, store)
    _say("retrieve: candidates of the training and dev queries")
    candidates = retrieve(run, store)
    _say("reranker: warm-up on lists of retrieved negatives")
    train_reranker(run, store, candidates)
    if not config.joint.lists:
        _say("mine: the re-ranker scores the candidates")
        candidates = mine(run, store, candidates)
    return store, candidates


def finish(run: Run, store: tokens.Store, candidates: dict, indexes=("exact", "scann")) -> dict:
    """Joint training and the evaluation of every state on test; returns what results.json holds."""
    _say("joint: dynamic listwise distillation")
    train_joint(run, store, candidates)
    _say("evaluate: every model state on the test queries")
    report = evaluate(run, store, "test", indexes)
    artifacts.write_text(run.workdir / "results.json", json.dumps(report, indent=1) + "\n")
    return report


def branch(run: Run, warm: Run):
    """Makes a claimed workdir stand where another one stood before joint training.

    What that one made until then, and its evaluation of the states before, are linked, not copied.
    """
    warm_folder = warm.workdir
    for pattern in (
        *("data", "retriever", "reranker", "vectors/zero_shot", "vectors/retriever"),
        *("lists/*.retrieved.npz", "lists/*.scores", "eval/test.zero_shot.*.npz"),
        *("eval/test.retriever.*.npz", "eval/test.reranker.*.npz"),
    ):
        for path in warm_folder.glob(pattern):
            link = run.workdir / path.relative_to(warm_folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                # Relative, so that the folder of both may be moved.
                link.symlink_to(os.path.relpath(path.resolve(), link.parent.resolve()))


def _say(text: str):
    tqdm.tqdm.write(text)


def open_collection(run: Run) -> collection.Collection:
    """The texts and labels the config names; the embedded ones are extracted into `data/tfds`."""
    data = run.config.data
    if data.dataset == "docstrings":
        return docstrings.docstrings(run.workdir / "data" / "tfds", preset=data.preset)
    return collection.beir(
        pathlib.Path(data.path), train_qrels=data.train_qrels, eval_qrels=data.eval_qrels
    )


def prepare(run: Run) -> tokens.Store:
    """The collection as a token store in `data/`."""
    texts = open_collection(run)
    missing = {"train", "dev", "test"} - set(texts.splits)
    if missing:
        raise InputError(
            f"{texts.name}: has no qrels for {', '.join(sorted(missing))}; training needs train, "
            "dev and test"
        )
    folder = run.workdir / "data" / "tokens"
    tokens.prepare(texts, run.tokenizer, folder)
    store = tokens.open_store(folder)
    counts = ", ".join(f"{len(q.ids)} {split}" for split, q in store.splits.items())
    _say(f"  {len(store.passage_ids)} passages; queries: {counts}")
    return store


def _corpus_vectors(run: Run, store: tokens.Store, state: str) -> list[np.ndarray]:
    """The corpus by the retriever of a state, in `vectors/<stage that trained it>`."""
    stage = run.trained_by(state, "retriever")
    return encode.corpus(
        run.forward,
        run.params(state, "retriever")["passage"],
        store,
        run.workdir / "vectors" / stage,
        f"{stage} {store.fingerprint}",
    )


def _subset(count: int, most: int, seed: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, drawn at random, in random order."""
    return np.random.default_rng(seed).permutation(count)[:most]


def _retrieve(run: Run, store: tokens.Store, folder: pathlib.Path, rows, tower, shards):
    """The top passages of some training and dev queries, by split.

    `rows` are their row numbers by split; `tower()` and `shards()` give the params of the query tower
    and the passages' vectors.
    """

    def candidates(split, depth):
        rows_Q, queries = rows[split], store.splits[split]

        def compute():
            vectors_QxD = encode.queries(run.forward, tower(), queries.texts, rows_Q)
            passages_QxN, scores_QxN = index.exact(vectors_QxD, shards(), depth)
            return {"query_rows": rows_Q, "passages": passages_QxN, "scores": scores_QxN}

        found = artifacts.cached(folder / f"{split}.retrieved.npz", store.fingerprint, compute)
        return lists_lib.Candidates(
            found["query_rows"],
            found["passages"],
            found["scores"],
            np.full(found["scores"].shape, np.nan, np.float32),
        )

    return {
        "train": candidates("train", run.config.mine.depth),
        "dev": candidates("dev", run.config.dev.depth),
    }


def _score(run: Run, store: tokens.Store, candidates: dict, folder: pathlib.Path, reranker):
    """The candidates with scores of the re-ranker, whose params `reranker()` gives.

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
            parts.append(artifacts.cached(path, store.fingerprint, compute)["scores"])
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
    """The warmed-up retriever's top passages for the training and dev queries, in `lists/`."""
    most = {"train": run.config.mine.queries, "dev": run.config.dev.queries}
    return _retrieve(
        run,
        store,
        run.workdir / "lists",
        {s: _subset(len(store.splits[s].ids), n, run.config.seed) for s, n in most.items()},
        lambda: run.params("retriever", "retriever")["query"],
        lambda: _corpus_vectors(run, store, "retriever"),
    )


def mine(run: Run, store: tokens.Store, candidates: dict) -> dict[str, lists_lib.Candidates]:
    """The candidates with the warmed-up re-ranker's scores, in `lists/`."""
    folder = run.workdir / "lists"
    return _score(run, store, candidates, folder, lambda: run.params("reranker", "reranker"))


def refresh(
    run: Run, store: tokens.Store, candidates: dict, step: int, params
) -> dict[str, lists_lib.Candidates]:
    """New candidates of the same queries by both models as they are at a step, in `lists/`."""
    folder = run.workdir / "lists" / f"joint.{step:07}"

    def shards():
        source = f"joint {step} {store.fingerprint}"
        tower = params["retriever"]["passage"]
        return encode.corpus(run.forward, tower, store, run.workdir / "vectors/refreshed", source)

    rows = {split: found.query_rows_Q for split, found in candidates.items()}
    found = _retrieve(run, store, folder, rows, lambda: params["retriever"]["query"], shards)
    found = _score(run, store, found, folder, lambda: params["reranker"])
    # From here on a run that resumes reads these, whatever its params have become.
    (folder / "complete").touch()
    return found


def _qrels_of(queries: tokens.Queries, rows_Q: np.ndarray):
    """Labels of some queries, given in ascending order; query rows count through these alone."""
    query_N, passage_N, relevance_N = queries.qrels_3xN
    chosen_N = np.isin(query_N, rows_Q)
    return np.searchsorted(rows_Q, query_N[chosen_N]), passage_N[chosen_N], relevance_N[chosen_N]


class Dev:
    """Measures both models on dev queries during training, on a fixed pool of passages.

    The retriever ranks a pool: the positives of the dev queries, their candidates if there are any,
    and random passages up to `config.dev.pool`. The re-ranker re-ranks each query's candidates.
    """

    def __init__(self, run: Run, store: tokens.Store, candidates: lists_lib.Candidates | None):
        self.run, self.store, self.candidates = run, store, candidates
        self.queries = store.splits["dev"]
        if candidates is None:
            rows_Q = _subset(len(self.queries.ids), run.config.dev.queries, run.config.seed)
        else:
            rows_Q = candidates.query_rows_Q
        self.rows_Q = np.sort(rows_Q)
        self.qrels = _qrels_of(self.queries, self.rows_Q)
        pool = self.qrels[1][self.qrels[2] > 0]
        if candidates is not None:
            pool = np.append(pool, candidates.passages_QxN.reshape(-1))
        pool = np.unique(pool)
        others = np.setdiff1d(np.arange(len(store.passage_ids)), pool)
        others = np.random.default_rng(run.config.seed).permutation(others)
        fill = max(run.config.dev.pool - len(pool), 0)
        self.pool_N = np.sort(np.append(pool, others[:fill]))

    def _score(self, passages_QxK, scores_QxK) -> float:
        values = metrics.evaluate(
            passages_QxK, scores_QxK, self.store.passage_ids, self.qrels, [DEV_METRIC]
        )
        return float(values[DEV_METRIC].mean())

    def retriever(self, params) -> float:
        """RR@10 of the retriever over the pool."""
        forward = self.run.forward
        passages_NxD = encode.passages(forward, params["passage"], self.store, self.pool_N)
        queries_QxD = encode.queries(forward, params["query"], self.queries.texts, self.rows_Q)
        rows_QxK, scores_QxK = index.exact(queries_QxD, [passages_NxD], 10)
        return self._score(self.pool_N[rows_QxK], scores_QxK)

    def reranker(self, params) -> float:
        """RR@10 of the re-ranker over each query's candidates."""
        order_Q = np.argsort(self.candidates.query_rows_Q)
        passages_QxK = self.candidates.passages_QxN[order_Q]
        scores_QxK = rerank.scores(
            self.run.forward, params, self.store, self.queries.texts, self.rows_Q, passages_QxK
        )
        return self._score(passages_QxK, scores_QxK)


def _train_stage(
    run: Run,
    store: tokens.Store,
    name: str,
    params,
    lists: lists_lib.Lists,
    loss_fn,
    dev: Dev,
    *,
    in_batch: bool = False,
    frozen: tuple[str, ...] = (),
    refresh_every: int = 0,
    redraw=None,
):
    """Runs one training stage to its end, from its last checkpoint if there is one.

    Every `refresh_every` steps (0: never), `redraw(step, state, number)` gives that many lists, of
    which the steps from `step` on are made; `state` may be a later one, of a run that resumes.
    """
    stage = run.config[name]

    def make_batches(lists):
        return ListBatches(
            store,
            store.splits["train"],
            run.inputs,
            lists,
            batch=stage.batch,
            models=tuple(params),
            in_batch=in_batch,
            shards=run.sharding.shards,
            max_blocks=run.config.packing.blocks,
        )

    batches = make_batches(lists)
    steps = batches.steps
    folder = run.workdir / name
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder)))
        if checkpoints.last_step() == steps:
            _say("  done")
            return
        optimizer = train.make_optimizer(run.config.optimizer, stage, steps, frozen)
        state = checkpoints.restore_last(train.init_state(params, optimizer, run.sharding))
        events = tf.summary.create_file_writer(str(folder))
        stack.callback(events.close)

        def write(step, terms):
            with events.as_default(step):
                for key, value in terms.items():
                    tf.summary.scalar(key, value)
            events.flush()
            shown = "  ".join(f"{key} {value:.4g}" for key, value in terms.items())
            _say(f"  {name} {step}/{steps}  {shown}")

        def evaluate(step, params):
            scores = {model: getattr(dev, model)(tree) for model, tree in params.items()}
            write(step, {f"dev/{model} {DEV_METRIC}": score for model, score in scores.items()})
            mean = sum(scores.values()) / len(scores)
            checkpoints.save_best(step, params, f"dev {DEV_METRIC}, mean of models", mean)

        step_fn = train.make_step(loss_fn, optimizer, run.sharding)
        every = refresh_every or steps
        for first in range(int(state.step) // every * every, steps, every):
            stop = min(first + every, steps)
            if first > 0:
                number = (stop - first) * stage.batch
                batches = make_batches(redraw(first, state, number))
            state = train.train(
                state,
                step_fn=step_fn,
                batches=lambda step, b=batches, first=first: map(
                    run.sharding.put_batch, b.stream(step - first)
                ),
                dropout_key=jax.random.key(run.config.seed, impl="rbg"),
                total_steps=steps,
                stop=stop,
                stage=stage,
                hooks=train.Hooks(evaluate, checkpoints.save_last, write),
                name=name,
            )


def _epochs_of_lists(draw, *, epochs: float = 0.0, number: int = 0) -> lists_lib.Lists:
    """So many passes, or so many lists, one epoch's draw after the other; `draw(epoch)` gives one."""
    first = draw(0)
    wanted = number or round(epochs * len(first.query_rows_L))
    parts, count = [first], len(first.query_rows_L)
    while count < wanted:
        parts.append(draw(len(parts)))
        count += len(parts[-1].query_rows_L)
    joined = (
        np.concatenate([getattr(part, field.name) for part in parts])[:wanted]
        for field in dataclasses.fields(lists_lib.Lists)
    )
    return lists_lib.Lists(*joined)


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
        _epochs_of_lists(draw, epochs=run.config.retriever.epochs),
        partial(train.retriever_loss, run.models),
        Dev(run, store, None),
        in_batch=True,
    )


def fit_probability(store: tokens.Store, dev: lists_lib.Candidates) -> tuple[float, float]:
    """Slope and offset from the re-ranker's score to the probability of relevance, by dev labels."""
    positives_2xN = store.splits["dev"].positives()
    relevant_QxN = lists_lib.known_positive(
        positives_2xN, dev.query_rows_Q, dev.passages_QxN, len(store.passage_ids)
    )
    return lists_lib.fit_probability(dev.reranker_QxN.reshape(-1), relevant_QxN.reshape(-1))


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
    store, texts = tokens.open_store(run.workdir / "data" / "tokens"), open_collection(run)
    if store.fingerprint != f"{texts.fingerprint}-{run.tokenizer.fingerprint}":
        raise InputError(
            f"{run.workdir}: the texts of {texts.name} have changed since this workdir was made; "
            "bring the old ones back, or run in a new workdir"
        )
    return store, mine(run, store, retrieve(run, store)), texts


def export_lists(run: Run, path: pathlib.Path):
    """Writes the lists of joint training, in the order of training, as a joint TSV file.

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
    joint_tsv.write(path, draw_lists(run, store, candidates, "joint"), texts)


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
    if labels and data.dataset != "beir":
        raise InputError(f"--labels: {data.dataset} has no other labels; leave the flag out")
    store, candidates, texts = _mined(run)
    training, probability = candidates["train"], fit_probability(store, candidates["dev"])
    queries = store.splits["train"]
    positives_2xN = queries.positives()
    fuller_2xN = None
    if labels:
        fuller = collection.beir(
            pathlib.Path(data.path), train_qrels=labels, eval_qrels=data.eval_qrels
        )
        query_rows, passage_rows = (
            dict(zip(ids, range(len(ids)))) for ids in (queries.ids, store.passage_ids)
        )
        trained_on = (label for label in fuller.qrels("train") if label.query_id in query_rows)
        query_N, passage_N, relevance_N = collection.check_qrels(
            trained_on, query_rows, passage_rows
        )
        fuller_2xN = np.stack([query_N, passage_N])[:, relevance_N > 0]
    below, above = run.config.mine.negative_below, run.config.mine.positive_above
    known = (training, positives_2xN, probability, len(store.passage_ids))
    report = denoise.table(*known, chosen=(below, above), fuller_2xN=fuller_2xN)
    shown = denoise.rejected(*known, negative_below=below, count=samples, seed=run.config.seed)
    labelled = {query: passage for query, passage in positives_2xN.T[::-1].tolist()}
    wanted = {row for query, passage, _ in shown for row in (passage, labelled[query])}
    passages = {
        row: f"{p.title}: {p.text}" if p.title else p.text
        for row, p in enumerate(texts.passages())
        if row in wanted
    }
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


def draw_lists(
    run: Run, store: tokens.Store, candidates: dict, stage: str, *, number: int = 0, step: int = 0
) -> lists_lib.Lists:
    """Lists of the re-ranker's warm-up or of joint training, in the order of training.

    All of the stage's, or `number` of them for the steps from `step` on.
    """
    settings = run.config[stage]
    share = settings.denoised_share if stage == "joint" else 0.0
    probability = fit_probability(store, candidates["dev"]) if share > 0 else (1.0, 0.0)

    def draw(epoch):
        return lists_lib.draw(
            candidates["train"],
            store.splits["train"].positives(),
            list_size=settings.list_size,
            denoised_share=share,
            probability=probability,
            negative_below=run.config.mine.negative_below,
            positive_above=run.config.mine.positive_above,
            num_passages=len(store.passage_ids),
            # The two stages draw apart, and so do all refreshes.
            seed=2 * run.config.seed + (stage == "joint"),
            epoch=(step << 20) + epoch,
        )

    return _counted(_epochs_of_lists(draw, epochs=settings.epochs, number=number))


def _counted(lists: lists_lib.Lists) -> lists_lib.Lists:
    kinds = np.bincount(lists.provenance_LxP.reshape(-1), minlength=len(lists_lib.Provenance))
    counts = ", ".join(f"{n} {k.name.lower()}" for k, n in zip(lists_lib.Provenance, kinds) if n)
    _say(f"  {len(lists.query_rows_L)} lists of {lists.passages_LxP.shape[1]}: {counts}")
    return lists


def read_lists(run: Run) -> tuple[tokens.Store, lists_lib.Lists]:
    """The joint lists of the file the config names, with a token store of their own in `lists/`.

    Raises:
      InputError: the file cannot be used.
    """
    settings = run.config.joint
    texts, given = joint_tsv.read(pathlib.Path(settings.lists), settings.list_size)
    folder = run.workdir / "lists" / "given"
    tokens.prepare(texts, run.tokenizer, folder)

    def draw(epoch):
        rng = np.random.default_rng([run.config.seed, epoch])
        order_L = rng.permutation(len(given.query_rows_L))
        return lists_lib.Lists(
            given.query_rows_L[order_L], given.passages_LxP[order_L], given.provenance_LxP[order_L]
        )

    return tokens.open_store(folder), _counted(_epochs_of_lists(draw, epochs=settings.epochs))


def train_reranker(run: Run, store: tokens.Store, candidates: dict):
    """Warm-up of the re-ranker on undenoised lists."""
    _train_stage(
        run,
        store,
        "reranker",
        {"reranker": run.initial("reranker")},
        draw_lists(run, store, candidates, "reranker"),
        partial(train.reranker_loss, run.models),
        Dev(run, store, candidates["dev"]),
    )


def train_joint(run: Run, store: tokens.Store, candidates: dict):
    """Joint training of both warmed-up models on hybrid lists."""
    settings = run.config.joint

    if not any((run.workdir / "joint" / "last").glob("[0-9]*")):
        # What an earlier training left, of which the checkpoints have been deleted.
        for folder in [*run.workdir.glob("lists/joint.*"), run.workdir / "vectors/refreshed"]:
            shutil.rmtree(folder, ignore_errors=True)

    def redraw(step, state, number):
        _say(f"  refresh: candidates by the models of step {step}")
        complete = run.workdir / "lists" / f"joint.{step:07}" / "complete"
        if int(state.step) > step and not complete.is_file():
            raise InputError(
                f"{complete.parent}: the candidates of step {step} are gone, the models have changed; "
                f"delete {run.workdir / 'joint'} to train this stage again"
            )
        found = refresh(run, store, candidates, step, state.params)
        return draw_lists(run, store, found, "joint", number=number, step=step)

    if settings.lists:
        source, lists = read_lists(run)
    else:
        source, lists = store, draw_lists(run, store, candidates, "joint")
    _train_stage(
        run,
        source,
        "joint",
        {
            "retriever": run.params("retriever", "retriever"),
            "reranker": run.params("reranker", "reranker"),
        },
        lists,
        partial(train.joint_loss, run.models, settings.to_dict()),
        Dev(run, store, candidates["dev"]),
        in_batch=settings.in_batch_weight > 0,
        frozen=() if settings.train_reranker else ("reranker",),
        refresh_every=settings.refresh_every,
        redraw=redraw,
    )


def evaluate(
    run: Run, store: tokens.Store, split: str, indexes: tuple[str, ...], states=STATES
) -> dict:
    """Retrieval and re-ranking of model states on a split, as `results.json` describes it.

    Retrieves with exact search and, if asked for, with ScaNN; the re-ranker re-ranks what its own
    state's retriever found by the first of `indexes`. Writes `runs/*.trec`, `eval/<split>.json` and,
    as `<state>.<model>.<index>.<metric>`, the values of all queries in `eval/<split>.per_query.npz`.

    Raises:
      InputError: the split is not there, or a stage has not been run.
    """
    if split not in store.splits:
        raise InputError(f"--split {split}: the data has only {', '.join(store.splits)}")
    settings, queries = run.config.evaluate, store.splits[split]
    # The same queries for every seed, so that runs can be compared by query.
    rows_Q = np.sort(_subset(len(queries.ids), settings.queries, 0))
    query_ids, qrels = [queries.ids[row] for row in rows_Q], _qrels_of(queries, rows_Q)
    rows, per_query = [], {}
    (run.workdir / "runs").mkdir(exist_ok=True)

    def add(state, model, name, passages_QxK, scores_QxK, **extra):
        metrics.write_trec_run(
            run.workdir / "runs" / f"{split}.{state}.{model}.{name}.trec",
            query_ids,
            store.passage_ids,
            passages_QxK,
            scores_QxK,
            f"rqv2_jax.{state}.{model}",
        )
        values = metrics.evaluate(
            passages_QxK, scores_QxK, store.passage_ids, qrels, settings.metrics
        )
        per_query[state, model, name] = values
        row = {"state": state, "model": model, "split": split, "index": name}
        means = {metric: float(value.mean()) for metric, value in values.items()}
        rows.append({**row, "queries": len(rows_Q), "metrics": means, **extra})

    for state in states:
        if state == "retriever" and run.config.retriever.epochs == 0:
            continue
        retrieved = {}
        for name in indexes:
            found, extra = _search(run, store, split, rows_Q, state, name)
            retrieved[name] = found["passages"], found["scores"]
            # The re-ranker's warm-up leaves the retriever as it was.
            if state != "reranker":
                add(state, "retriever", name, *retrieved[name], **extra)
        if state in ("reranker", "joint"):
            passages_QxK, scores_QxK = retrieved[indexes[0]]
            top_QxK = passages_QxK[:, : settings.rerank_depth]

            def compute(state=state, top_QxK=top_QxK):
                params = run.params(state, "reranker")
                return {
                    "scores": rerank.scores(
                        run.forward, params, store, queries.texts, rows_Q, top_QxK
                    )
                }

            path = run.workdir / "eval" / f"{split}.{state}.reranked.{indexes[0]}.npz"
            source = f"{store.fingerprint} {settings.queries} {settings.rerank_depth}"
            top = artifacts.cached(path, source, compute)["scores"]
            add(state, "reranker", indexes[0], passages_QxK, rerank.merge(top, scores_QxK))

    first = indexes[0]
    start = "zero_shot" if run.config.retriever.epochs == 0 else "retriever"
    pairs = [
        (("joint", "retriever"), ("zero_shot", "retriever")),
        (("joint", "retriever"), (start, "retriever")),
        (("joint", "reranker"), ("reranker", "reranker")),
        (("joint", "reranker"), ("joint", "retriever")),
    ]
    significance = []
    for a, b in dict.fromkeys(pairs):
        if not {(*a, first), (*b, first)} <= set(per_query):
            continue
        values = [per_query[(*x, first)][DEV_METRIC] for x in (a, b)]
        difference, p_value = metrics.paired_test(
            *values, permutations=settings.permutations, seed=run.config.seed
        )
        names = {"a": " ".join(a), "b": " ".join(b), "metric": DEV_METRIC}
        significance.append({**names, "difference": difference, "p_value": p_value})
    report = {"rows": rows, "significance": significance}
    folder = run.workdir / "eval"
    arrays = {
        f"{'.'.join(key)}.{m}": v for key, found in per_query.items() for m, v in found.items()
    }
    artifacts.write_arrays(folder / f"{split}.per_query.npz", arrays)
    artifacts.write_text(folder / f"{split}.json", json.dumps(report, indent=1) + "\n")
    return report


def _search(run: Run, store: tokens.Store, split: str, rows_Q: np.ndarray, state: str, name: str):
    """What the retriever of a state finds for queries of a split, and what to say of the index."""
    settings, queries = run.config.evaluate, store.splits[split]
    stage = run.trained_by(state, "retriever")
    source = f"{store.fingerprint} {settings.queries} {settings.retrieve_depth}"

    def vectors():
        tower = run.params(state, "retriever")["query"]
        return encode.queries(run.forward, tower, queries.texts, rows_Q)

    def ranked(passages_QxK, scores_QxK):
        # By the tie rule, so that the re-ranker's cut does not depend on the order of the corpus.
        passages_QxK, scores_QxK = metrics.sort_run(passages_QxK, scores_QxK, store.passage_ids)
        return {"passages": passages_QxK, "scores": scores_QxK}

    def exact():
        shards = _corpus_vectors(run, store, state)
        return ranked(*index.exact(vectors(), shards, settings.retrieve_depth))

    folder = run.workdir / "eval"
    found = artifacts.cached(folder / f"{split}.{stage}.exact.npz", source, exact)
    if name == "exact":
        return found, {}

    def scann():
        shards = _corpus_vectors(run, store, state)
        searcher = index.build_scann(
            shards, settings.scann, settings.retrieve_depth, run.workdir / "index" / stage, source
        )
        return ranked(*index.scann_search(searcher, vectors(), settings.retrieve_depth))

    approximate = artifacts.cached(folder / f"{split}.{stage}.scann.npz", source, scann)
    recalls = {
        f"recall@{depth} against exact": index.recall(
            approximate["passages"][:, :depth], found["passages"][:, :depth]
        )
        for depth in (10, 100)
    }
    return approximate, recalls


def render(report: dict) -> str:
    """The report as a table for people."""
    names = list(report["rows"][0]["metrics"])
    head = f"{'state':10} {'model':10} {'index':6} " + " ".join(f"{n:>11}" for n in names)
    lines = [head, "-" * len(head)]
    for row in report["rows"]:
        cells = " ".join(f"{row['metrics'][n]:11.4f}" for n in names)
        recalls = [f"{k} {v:.3f}" for k, v in row.items() if k.startswith("recall@")]
        note = f"  {', '.join(recalls)}" if recalls else ""
        lines.append(f"{row['state']:10} {row['model']:10} {row['index']:6} {cells}{note}")
    queries = report["rows"][0]["queries"]
    lines.append(f"{queries} {report['rows'][0]['split']} queries")
    lines += [
        f"{s['metric']}: {s['a']} - {s['b']} = {s['difference']:+.4f} (p = {s['p_value']:.4f})"
        for s in report["significance"]
    ]
    return "\n".join(lines)
