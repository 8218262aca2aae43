"""A run: a config made concrete, and the workdir that belongs to it."""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import uuid

import jax
import ml_collections
import tqdm

from rqv2_jax import artifacts, config_check, hosts, optional
from rqv2_jax import config as config_lib
from rqv2_jax.data import collection, own_texts, tokens
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.readers import tables, tevatron
from rqv2_jax.errors import DAMAGE, InputError, readable
from rqv2_jax.models import released, weights
from rqv2_jax.models import scoring as models_lib
from rqv2_jax.recipe import opening
from rqv2_jax.retrieval.stream import Forward, make_forward
from rqv2_jax.training import sharding as sharding_lib
from rqv2_jax.training.checkpoint import best_step, restore_best

# Settings that change where numbers are computed, and when, but not which, unless it be what dropout
# draws; and those of evaluation, whose files say what they were made by.
FREE = ("mesh.", "model.remat:", "reranker.accumulate:", "joint.accumulate:", "evaluate.")
# Where the models' folders are; free too, if they hold what they held, as SOURCES says.
PLACES = ("model.weights:", "model.reranker.weights:")
# Attention that "auto" stands for, which goes by the device.
DEVICES = ("plain", "ragged")
SOURCES = "sources.txt"

# In a stage's folder: what it is trained on, and a name of its own; and that it has come to its end.
BEGUN, FINISHED = "begun.txt", "finished.txt"


@dataclasses.dataclass(frozen=True)
class Run:
    """A config made concrete: where it works, the models' static half, how they read tokens.

    `config` says in full what the given one left to the model folders, which `sources` describe.
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    sources: released.Sources
    models: models_lib.Models
    tokenizer: tokens.Tokenizer
    inputs: Inputs
    sharding: sharding_lib.Sharding
    forward: Forward

    def initial(self, model: str):
        """The params of one model before any training, on the devices."""
        query, passage, reranker = (source.folder for source in self.sources)
        if model == "retriever":
            encoder = weights.load_encoder(query, self.models.retriever)
            if passage == query:
                other = jax.tree.map(lambda x: x.copy(), encoder)
            else:
                other = weights.load_encoder(passage, self.models.retriever)
            return self.sharding.put_params({"query": encoder, "passage": other})
        config, head = self.models.reranker, self.sources.reranker.head
        encoder = weights.load_encoder(reranker, config)
        if head is not None:
            params = {"encoder": encoder, "head": weights.load_head(head, config.hidden_size)}
        else:
            params = models_lib.init_reranker(encoder, config, jax.random.key(self.config.seed))
        return self.sharding.put_params(params)

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
            return "reranker" if self.config.reranker.epochs > 0 else "zero_shot"
        warmed_up = state != "zero_shot" and self.config.retriever.epochs > 0
        return "retriever" if warmed_up else "zero_shot"

    @functools.cached_property
    def weights_hash(self) -> str:
        """Hash of the weight files that all models start from."""
        folders = [source.folder for source in self.sources]
        head = self.sources.reranker.head
        if head is not None and head.folder not in folders:
            folders.append(head.folder)
        files = [file for folder in folders for file in released.tensor_files(folder)]
        return collection.content_hash(files)

    def origin(self, state: str, model: str) -> str:
        """Names the params of one model in a state: stage, step and the name of its training.

        Another training of the stage, or another step that is best by now, has another name.

        Raises:
          InputError: the stage that trains it has not been run.
        """
        stage = self.trained_by(state, model)
        if stage == "zero_shot":
            return f"zero_shot {self.weights_hash}"
        folder = self.workdir / stage
        return f"{stage} {best_step(folder)} {' '.join(begun(folder))}"

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
    """Checks the config, the weights' config and tokenizer, and the devices; prints what it overrides.

    Unless JAX has been given a folder for what it compiles, that becomes `.compiled` beside the
    workdir, so that a program compiled once starts at once ever after.

    Raises:
      InputError: one of them cannot be used.
    """
    run, notes = _open_run(config, workdir)
    if hosts.first():
        for note in notes:
            tqdm.tqdm.write(f"model: {note}")
    return run


def _open_run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[Run, list[str]]:
    (config, sources, models, notes), tokenizer, inputs = opening.open_inputs(config)
    if jax.config.jax_compilation_cache_dir is None:
        compiled = workdir.resolve().parent / ".compiled"
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    # A rolled loop stacks all activations kept for the gradient; copying them costs a CPU a quarter of
    # the step, a GPU an eighth and a TPU next to nothing.
    models = models.reshaped(unrolled=jax.default_backend() != "tpu")
    sharding = sharding_lib.make(config.mesh.data, config.mesh.fsdp)
    run = Run(
        config=config,
        workdir=workdir,
        sources=sources,
        models=models,
        tokenizer=tokenizer,
        inputs=inputs,
        sharding=sharding,
        forward=make_forward(
            models,
            inputs,
            sharding,
            batch_tokens=config.evaluate.batch_tokens,
            max_blocks=config.packing.blocks,
        ),
    )
    return run, notes


def as_released(run: Run) -> Run:
    """Returns the run with its starting retriever as the model folder has it."""
    config = config_lib.loads(config_lib.dumps(run.config))
    config.data.update({"query_length": 0, "passage_length": 0, "pair_length": 0})
    left_open = ("pooling", "similarity", "query_prompt", "passage_prompt", "passage_format")
    config.model.update(dict.fromkeys(left_open, "") | {"num_layers": 0, "scale": 0.0})
    return _open_run(config, run.workdir)[0]


def open_workdir(workdir: pathlib.Path, *, data: str = "", weights: str = "") -> Run:
    """The run a workdir was made by, on the devices there are; says so if a stage is not finished.

    Args:
      data, weights: new places of what has moved since, of the same content.

    Raises:
      InputError: the folder is no workdir, or the weights are not those it was made from.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir}: is no workdir (no config.json); run rqv2_jax.main first")
    config, earlier = _read_config(path)
    config_check.check(config)
    asked, devices = config.mesh.data * config.mesh.fsdp, jax.device_count()
    if asked > devices or (jax.process_count() > 1 and asked != devices):
        config.mesh.update({"data": devices, "fsdp": 1})
    if jax.default_backend() != "gpu":
        # Without dropout all give the same scores.
        config.model.attention = "plain"
    if data:
        config.data.path = data
    if weights:
        if config.model.reranker.weights == config.model.weights:
            config.model.reranker.weights = weights
        config.model.weights = weights
    for setting, name in (
        ("weights", config.model.weights),
        ("reranker.weights", config.model.reranker.weights),
    ):
        try:
            released.find_folder(name)
        except InputError as e:
            raise InputError(
                f"{path}: config.model.{setting} is {name!r}, which is not there; if it has moved, "
                "give its new place as --weights DIR, or run rqv2_jax.main once more with "
                f"--config.model.{setting}=DIR"
            ) from e
    try:
        run, _ = _open_run(config, workdir)
    except InputError as e:
        if earlier:
            raise _of_another_version(path, f"cannot be opened ({e})") from e
        raise
    _check_head(run, earlier, path)
    if weights:
        _same_sources(run)
    for stage in ("retriever", "reranker", "joint"):
        folder = workdir / stage
        if begun(folder) and not finished(folder):
            tqdm.tqdm.write(f"{folder}: is not finished; its models are the best until now")
    return run


def _moved(run: Run, line: str) -> bool:
    """Says whether a changed setting is the place alone of data, their content being the same."""
    manifest = run.workdir / "data" / "tokens" / "manifest.json"
    if not line.startswith("data.path:") or not manifest.is_file():
        return False
    made_from = readable(manifest, lambda: json.loads(manifest.read_text())["source"])
    # A store that is made again tells by its own fingerprint what was trained on it.
    texts = open_collection(run.config.data, run.workdir / "data" / "tfds")
    return made_from in (None, texts.fingerprint)


def _read_config(path: pathlib.Path) -> tuple[ml_collections.ConfigDict, bool]:
    """Reads a workdir's config, and says whether it is of commit 8355232 or before.

    What was not yet a setting then has the value that held.

    Raises:
      InputError: it is not what rqv2_jax.main wrote, or a version wrote it that this one cannot follow.
    """
    try:
        config = config_lib.loads(path.read_text())
        added, wrong = config_lib.complete(config)
    except (ValueError, AttributeError, TypeError) as e:
        raise InputError(
            f"{path}: not as rqv2_jax.main wrote it ({e}); give the command of rqv2_jax.main again"
        ) from e
    if wrong:
        raise _of_another_version(path, wrong[0])
    return config, bool(added)


def _of_another_version(path: pathlib.Path, why: str) -> InputError:
    try:
        made_by = json.loads((path.parent / "environment.json").read_text())["commit"]
    except (OSError, ValueError, KeyError):
        made_by = "unknown"
    return InputError(
        f"{path}: {why}, so another version of rqv2_jax made it, commit {made_by}; open it with that "
        "one, or run in a new workdir"
    )


def _check_head(run: Run, earlier: bool, path: pathlib.Path):
    """Raises InputError if a workdir of before poolers were read would get a re-ranker with one."""
    if earlier and run.models.head == "pooler":
        folder = run.sources.reranker.folder
        raise _of_another_version(path, f"its re-ranker left out the head of {folder}")


@contextlib.contextmanager
def alone(workdir: pathlib.Path):
    """Keeps every other process from working in a workdir, which is made if it is not there.

    A process that ends, however it does, lets go of it. File systems without locks keep nobody out.

    Raises:
      InputError: another process works in it, or it cannot be made.
    """

    def hold():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"--workdir {workdir}: cannot be made ({e}); give another one") from e
        folder = os.open(workdir, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(folder)
            raise InputError(
                f"--workdir {workdir}: another process works in it; wait until that has ended, or give "
                "another one"
            ) from e
        except OSError:
            pass
        return folder

    held = hosts.from_first(hold)
    try:
        yield
    finally:
        if hosts.first():
            os.close(held)


def claim(run: Run):
    """Writes config.json and environment.json; a workdir belongs to one config.

    Settings of evaluation may change, and until joint training has begun those of `joint`. So may the
    places of data and of model folders, while these hold the same.

    Raises:
      InputError: the workdir was made by another config.
    """
    path = run.workdir / "config.json"
    # What a process that was killed at once leaves of it.
    partial = f"{path.name}.partial"

    def check():
        if path.is_file():
            made_by, earlier = run.config, False
            if readable(path, lambda: json.loads(path.read_text())) is not None:
                made_by, earlier = _read_config(path)
            _check_head(run, earlier, path)
            changed = config_lib.differences(made_by, run.config)
            joint = run.workdir / "joint"
            free = FREE if (joint / BEGUN).is_file() else (*FREE, "joint.")
            if _same_sources(run):
                free += PLACES
            changed = [line for line in changed if not line.startswith(free)]
            changed = [line for line in changed if not _moved(run, line)]
            # By devices; both drop out weights.
            either = [f"model.attention: {a!r} -> {b!r}" for a, b in (DEVICES, DEVICES[::-1])]
            changed = [line for line in changed if line not in either]
            if changed:
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                mend = "give another --workdir, or the config it was made by"
                if all(line.startswith(("data.path:", *PLACES)) for line in changed):
                    mend = "the files there are not those it was made from; give a copy of these"
                if all(line.startswith("joint.") for line in changed):
                    mend += f"; or delete {joint} to train that stage again"
                raise InputError(
                    f"{path}: this workdir was made by another config ({'; '.join(changed[:3])}"
                    f"{more}); {mend}"
                )
        elif run.workdir.is_dir() and {p.name for p in run.workdir.iterdir()} - {partial}:
            raise InputError(f"{run.workdir}: holds other files; give a new or empty --workdir")

    hosts.from_first(check)
    artifacts.write_text(path, config_lib.dumps(run.config))
    artifacts.write_text(run.workdir / SOURCES, _sources(run))
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
    environment = {
        "python": platform.python_version(),
        "packages": {name: installed.get(name, "not installed") for name in packages},
        "devices": [str(d) for d in jax.devices()],
        "machine": platform.platform(),
        "commit": _commit() or "unknown",
    }
    text = json.dumps(environment, indent=1) + "\n"
    artifacts.write_text(run.workdir / "environment.json", text)


def _sources(run: Run) -> str:
    """Names the content of the model folders: tensors and tokenizers."""
    return f"{run.weights_hash} {run.tokenizer.fingerprint}\n"


def _same_sources(run: Run) -> bool:
    """Says whether the workdir was made from what the model folders hold.

    Raises:
      InputError: it was made from something else.
    """
    path = run.workdir / SOURCES

    def read():
        text = path.read_text()
        if len(text.split()) != 2 or not text.endswith("\n"):
            raise ValueError("it is cut short")
        return text

    made_from = readable(path, read) if path.is_file() else None
    if made_from is None:
        return False
    if made_from != _sources(run):
        folders = ", ".join(dict.fromkeys(str(source.folder) for source in run.sources))
        raise InputError(
            f"{path}: this workdir was made from other weights or tokenizers than those in {folders}; "
            "bring the old ones back, or give another --workdir"
        )
    return True


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        # A machine without git.
        return ""
    return found.stdout.strip()


def begun(folder: pathlib.Path) -> list[str]:
    """What a stage's folder says it is trained on, and its name; nothing if it has not begun."""
    path = folder / BEGUN
    return hosts.from_first(lambda: path.read_text().split() if path.is_file() else [])


def finished(folder: pathlib.Path) -> bool:
    """Has a stage come to its end?"""
    return hosts.from_first((folder / FINISHED).is_file)


def finish_stage(folder: pathlib.Path):
    """Says of a stage that it has come to its end."""
    artifacts.write_text(folder / FINISHED, "")


def begin(folder: pathlib.Path, trained_on: str):
    """Lets a stage begin, or go on with what it began with.

    Raises:
      InputError: it has begun with something else.
    """
    found = begun(folder)
    if not found:
        artifacts.write_text(folder / BEGUN, f"{trained_on} {uuid.uuid4().hex}\n")
    elif found[0] != trained_on:
        raise InputError(
            f"{folder}: was trained on other lists, or from other models, than there are now; delete "
            "it to train this stage again"
        )


def branch(run: Run, warm: Run):
    """Makes a claimed workdir stand where another one stood before joint training.

    What that one made until then, and its evaluation of the states before, are linked, not copied.
    """
    warm_folder = warm.workdir
    for pattern in (
        *("data", "retriever", "reranker", "vectors/zero_shot", "vectors/retriever"),
        *("lists/*.retrieved.npz", "lists/*.scores", "eval/test.zero_shot.*.npz"),
        *("eval/test.retriever.*.npz", "eval/test.reranker.*.npz", "vectors/released"),
        *("eval/test.released.npz", "eval/test.bm25.npz"),
    ):
        for path in warm_folder.glob(pattern):
            link = run.workdir / path.relative_to(warm_folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                # Relative, so that the folder of both may be moved.
                link.symlink_to(os.path.relpath(path.resolve(), link.parent.resolve()))


def open_collection(data: ml_collections.ConfigDict, folder: pathlib.Path) -> collection.Collection:
    """The texts and labels that `config.data` names; the embedded ones are extracted into a folder."""
    if data.dataset != "docstrings" and not data.path:
        return _prepared("readers.builders").fetched(data.dataset)
    match data.dataset.split("_")[0]:
        case "docstrings":
            docstrings = _prepared("docstrings").docstrings
            return artifacts.kept(folder, lambda: docstrings(folder, preset=data.preset))
        case "beir":
            return collection.beir(
                pathlib.Path(data.path), train_qrels=data.train_qrels, eval_qrels=data.eval_qrels
            )
        case "msmarco":
            return tables.msmarco(data.path)
        case "rocketqa":
            return tables.rocketqa(data.path)
        case "dpr":
            return optional.load("rqv2_jax.data.readers.dpr", "data in DPR's layout").dpr(data.path)
        case "tevatron":
            return tevatron.tevatron(data.path)


def _prepared(module: str):
    """Returns one of the modules that keep texts as tensorflow-datasets."""
    return optional.load(f"rqv2_jax.data.{module}", "data that is not read from a folder")


def open_store(run: Run) -> tokens.Store:
    """The token store of a workdir, made again if it is damaged; queries' own texts are marked in it.

    Raises:
      InputError: there is none; or it is damaged, and its texts have changed or are gone.
    """
    folder = run.workdir / "data" / "tokens"

    def mend():
        if folder.is_dir() and readable(folder, lambda: tokens.read_store(folder)) is None:
            try:
                made_from = tokens.read_fingerprint(folder)
            except DAMAGE:
                made_from = ""
            tokens.prepare(_texts(run, made_from), run.tokenizer, folder)

    hosts.from_first(mend)
    return own_texts.marked(tokens.open_store(folder), run.config.data.ignore_identical_ids)


def texts_of(run: Run, store: tokens.Store) -> collection.Collection:
    """The texts and labels that the workdir's token store was made from.

    Raises:
      InputError: they have changed since.
    """
    return _texts(run, store.fingerprint)


def _texts(run: Run, fingerprint: str) -> collection.Collection:
    """The run's texts and labels, which must have this fingerprint in a token store ("": any)."""
    path = run.config.data.path
    embedded = run.config.data.dataset == "docstrings"
    if path and not embedded and not pathlib.Path(path).exists():
        raise InputError(
            f"{path}: the texts of {run.workdir} are not there any more; give their new place as "
            "--data DIR"
        )
    texts = open_collection(run.config.data, run.workdir / "data" / "tfds")
    if fingerprint not in ("", f"{texts.fingerprint}-{run.tokenizer.fingerprint}"):
        raise InputError(
            f"{run.workdir}: the texts of {texts.name} have changed since this workdir was made; "
            "bring the old ones back, or run in a new workdir"
        )
    return texts
