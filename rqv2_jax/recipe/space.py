"""The disk space of a run's parts, asked for before each of them begins.

The figures are what a part writes at most, in bytes. `rqv2_jax.plan` prints those of the whole run.
"""

import math
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np

from rqv2_jax import hosts
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError
from rqv2_jax.models import random_model
from rqv2_jax.models.scoring import TOWERS
from rqv2_jax.recipe.run import Run

GIB = 2**30
# Copies of a model's params: a state to resume from has two moments beside them, and there are three
# while the oldest makes room; the best params are there twice meanwhile.
CHECKPOINTS = 3 * 3 + 2


def of_vectors(passages: int, size: int, dtype: str) -> int:
    """Returns the bytes of a retriever's vectors."""
    return np.dtype(dtype).itemsize * passages * size


def of_params(run: Run, model: str) -> int:
    """Returns the bytes of a model's params, "retriever" or "reranker"."""
    encoder = random_model.params_like(getattr(run.models, model))
    towers = len(TOWERS[run.models.towers]) if model == "retriever" else 1
    return towers * sum(4 * math.prod(x.shape) for x in jax.tree.leaves(encoder))


def check_stage(run: Run, name: str) -> None:
    """Raises InputError if the disk has too little free space for a training stage's checkpoints."""
    models = ("retriever", "reranker") if name == "joint" else (name,)
    needed, folder = (
        CHECKPOINTS * sum(of_params(run, model) for model in models),
        run.workdir / name,
    )

    def left() -> int:
        return needed - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    _check(folder, left)


def check_vectors(run: Run, store: tokens.Store, states: tuple[str, ...]) -> None:
    """Raises InputError if the disk has too little free space for the vectors of retrievers.

    They are those of these states' retrievers that have not been begun.
    """
    folder = run.workdir / "vectors"
    size, dtype = run.models.retriever.hidden_size, run.config.encode.dtype
    each = of_vectors(len(store.passage_ids), size, dtype)
    stages = {run.kept_by(state=state, model="retriever") for state in states}
    _check(folder, lambda: each * sum(not (folder / stage).exists() for stage in stages))


def _check(folder: pathlib.Path, left: Callable[[], int]) -> None:
    def short() -> list[float]:
        needed, free = left(), shutil.disk_usage(folder.parent).free
        return [needed / GIB, free / GIB] if needed > free else []

    if found := hosts.from_first(short):
        raise InputError(
            f"{folder}: will hold {found[0]:.2f} GiB more, and its disk has {found[1]:.2f} GiB free; "
            "free some of it, then give the same command again"
        )
