"""The models of a run on another collection than their own: what training has cost them there."""

import dataclasses
import pathlib

import tqdm

from rqv2_jax import config as config_lib
from rqv2_jax import config_check, hosts
from rqv2_jax.data import tokenise, tokens
from rqv2_jax.errors import InputError
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.texts import open_collection, open_store
from rqv2_jax.recipe.workdir import branch, finished

# States whose models are trained, and may have forgotten.
STATES = ("retriever", "joint")


def on(run: Run, folder: pathlib.Path, split: str) -> tuple[Run, tokens.Store]:
    """Returns the run with a folder in BEIR layout for its collection, and the token store of that.

    All that the new run writes lies in `elsewhere/` of the workdir, its models in the stages that the
    workdir holds. Raises InputError if joint training is not finished, or the folder cannot be used or
    lacks the split.
    """
    if not finished(run.workdir / "joint"):
        raise InputError(
            f"{run.workdir}: joint training is not finished; run rqv2_jax.main on this workdir first"
        )
    config = config_lib.loads(config_lib.dumps(run.config))
    config.data.update({"dataset": "beir", "path": str(folder)})
    config.data.update({"train_qrels": "", "eval_qrels": "qrels"})
    workdir = run.workdir / "elsewhere" / folder.resolve().name
    other = dataclasses.replace(run, config=config, workdir=workdir)
    texts = open_collection(config.data, workdir / "data" / "tfds")
    if split not in texts.splits:
        raise InputError(
            f"{folder}: has no qrels for {split}, only for {', '.join(texts.splits)}; choose by --split"
        )

    def make() -> None:
        branch(workdir, run.workdir, config_check.STAGES)
        tokenise.prepare(texts, run.tokenizer, workdir / "data" / "tokens")

    hosts.from_first(make)
    store = open_store(other)
    tqdm.tqdm.write(
        f"{folder}: {len(store.passage_ids):,} passages, {len(store.splits[split].ids):,} {split} "
        "queries; nothing was trained on it"
    )
    return other, store
