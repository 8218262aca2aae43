"""The config and the model files that a workdir belongs to: written, compared and opened again."""

import importlib.metadata
import json
import pathlib
import platform
import shlex
import subprocess
import sys

import jax
import ml_collections
import tqdm

from rqv2_jax import artifacts, config_check, hosts
from rqv2_jax import config as config_lib
from rqv2_jax.errors import InputError, readable
from rqv2_jax.models import files as model_files
from rqv2_jax.recipe import budget
from rqv2_jax.recipe.run import Run, open_run
from rqv2_jax.recipe.texts import open_collection
from rqv2_jax.recipe.workdir import BEGUN, LOCK, begun, finished

# Settings that change where and when numbers are computed, not their values (dropout masks excepted),
# and those of evaluation, whose files record what they were made by.
PARTS = tuple(f"{stage}.accumulate:" for stage in config_check.STAGES)
FREE = ("mesh.", "model.remat:", *PARTS, "evaluate.")
# Settings of evaluation that are not free where BM25 finds candidates or teaches.
BM25 = tuple(f"evaluate.bm25.{key}:" for key in ("k1", "b", "stemmer"))
# Folders of models; free too while they hold what SOURCES describes.
PLACES = ("model.weights:", "model.reranker.weights:")
# What "auto" attention becomes depends on the device; both drop out weights.
ATTENTION = ("model.attention: 'plain' -> 'ragged'", "model.attention: 'ragged' -> 'plain'")
SOURCES = "sources.txt"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "scann", "transformers")


def open_workdir(
    workdir: pathlib.Path, *, data: str = "", weights: str = "", reranker_weights: str = ""
) -> Run:
    """Opens the run that made a workdir, on the devices at hand; says which stages are not finished.

    `data`, `weights` and, if the re-ranker has others, `reranker_weights` are new places of what has
    moved. Raises InputError if the folder is no workdir, or was made from other weights.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir}: is no workdir (no config.json); run rqv2_jax.main first")
    config, earlier = _read_config(path)
    config_check.check(config)
    _adapt(config)
    if data:
        config.data.path = data
    _move(config.model, weights, reranker_weights, path)
    try:
        run = open_run(config, workdir, quiet=True)
    except InputError as e:
        if earlier:
            raise _of_another_version(path, f"cannot be opened ({e})") from e
        raise
    _check_head(run, earlier, path)
    budget.restore(run)
    if weights or reranker_weights:
        _same_sources(run)
    for stage in ("retriever", "reranker", "joint"):
        folder = workdir / stage
        if begun(folder) and not finished(folder):
            tqdm.tqdm.write(f"{folder}: is not finished; its models are the best so far")
    return run


def _adapt(config: ml_collections.ConfigDict):
    """Changes a workdir's config to the devices at hand."""
    asked, devices = config.mesh.data * config.mesh.fsdp, jax.device_count()
    if asked > devices or (jax.process_count() > 1 and asked != devices):
        config.mesh.update({"data": devices, "fsdp": 1})
    if jax.default_backend() != "gpu":
        # Without dropout all give the same scores.
        config.model.attention = "plain"


def _move(
    model: ml_collections.ConfigDict, weights: str, reranker_weights: str, path: pathlib.Path
) -> None:
    """Puts new places into `config.model`; raises InputError unless its folders are there."""
    if weights:
        if model.reranker.weights == model.weights:
            model.reranker.weights = weights
        model.weights = weights
    if reranker_weights:
        model.reranker.weights = reranker_weights
    for setting, name in (("weights", model.weights), ("reranker.weights", model.reranker.weights)):
        try:
            model_files.find_folder(name)
        except InputError as e:
            raise InputError(
                f"{path}: config.model.{setting} is {name!r}, which is not there; if it has moved, "
                f"give its new place as --{setting.replace('.', '_')} DIR, or run rqv2_jax.main once "
                f"more with --config.model.{setting}=DIR"
            ) from e


def _read_config(path: pathlib.Path) -> tuple[ml_collections.ConfigDict, bool]:
    """Reads a workdir's config, and says whether an earlier version, with less in it, wrote it."""
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
    """Returns the error for a workdir of a version that this one cannot follow; names its commit."""
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


def claim(run: Run) -> None:
    """Writes config.json, sources.txt and environment.json; a workdir belongs to one config.

    Settings of evaluation may change, and until joint training has begun those of `joint`. So may the
    places of data and of model folders, while these hold the same. Other changes raise InputError.
    """
    path = run.workdir / "config.json"
    hosts.from_first(lambda: _check_claim(run, path))
    artifacts.write_text(path, config_lib.dumps(run.config))
    artifacts.write_text(run.workdir / SOURCES, _sources(run))
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    environment = {
        "python": platform.python_version(),
        "packages": {name: installed.get(name, "not installed") for name in PACKAGES},
        "devices": [str(d) for d in jax.devices()],
        "machine": platform.platform(),
        "commit": _commit() or "unknown",
        "command": shlex.join(sys.orig_argv),
    }
    text = json.dumps(environment, indent=1) + "\n"
    artifacts.write_text(run.workdir / "environment.json", text)


def _check_claim(run: Run, path: pathlib.Path):
    """Raises InputError unless the workdir is empty or was made by the run's config."""
    if not path.is_file():
        # A process that was killed at once may have left a part of it.
        own = {f"{path.name}.partial", LOCK}
        if run.workdir.is_dir() and {p.name for p in run.workdir.iterdir()} - own:
            raise InputError(f"{run.workdir}: holds other files; give a new or empty --workdir")
        return
    made_by, earlier = run.config, False
    if readable(path, lambda: json.loads(path.read_text())) is not None:
        made_by, earlier = _read_config(path)
    _check_head(run, earlier, path)
    joint = run.workdir / "joint"
    free: tuple[str, ...] = FREE if (joint / BEGUN).is_file() else (*FREE, "joint.")
    if _same_sources(run):
        free += PLACES
    tied = BM25 if "bm25" in (*run.config.mine.sources, run.config.reranker.teacher) else ()
    changed = [
        line
        for line in config_lib.differences(made_by, run.config)
        if (line.startswith(tied) or not line.startswith(free))
        and not _moved(run, line)
        and line not in ATTENTION
    ]
    if not changed:
        return
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    mend = "give another --workdir, or the config it was made by"
    if all(line.startswith(("data.path:", *PLACES)) for line in changed):
        mend = "the files there are not those it was made from; give a copy of these"
    if all(line.startswith("joint.") for line in changed):
        mend += f"; or delete {joint} to train that stage again"
    raise InputError(
        f"{path}: this workdir was made by another config ({'; '.join(changed[:3])}{more}); {mend}"
    )


def _moved(run: Run, line: str) -> bool:
    """Says whether a difference is only the place of the data, their content being the same."""
    manifest = run.workdir / "data" / "tokens" / "manifest.json"
    if not line.startswith("data.path:") or not manifest.is_file():
        return False
    made_from = readable(manifest, lambda: json.loads(manifest.read_text())["source"])
    # A store that is made again shows by its own fingerprint what was trained on it.
    texts = open_collection(run.config.data, run.workdir / "data" / "tfds")
    return made_from in (None, texts.fingerprint)


def _sources(run: Run) -> str:
    """Names the content of the model folders: tensors and tokenizers."""
    return f"{run.weights_hash} {run.tokenizer.fingerprint}\n"


def _same_sources(run: Run) -> bool:
    """Says whether the workdir is known to be made from these models; InputError for others."""
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
    """Returns the code's git commit, "" where there is none or no git."""
    command, here = ["git", "describe", "--always", "--dirty"], pathlib.Path(__file__).parent
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
