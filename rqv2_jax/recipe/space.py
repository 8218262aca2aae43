"""The disk space of a run's parts, asked for before each of them begins.

The figures are what a part writes at most, in bytes. `rqv2_jax.plan` prints those of the whole run.
"""

import math
import pathlib
import shutil

import jax

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


def of_vectors(passages: int, size: int) -> int:
    """Returns the bytes of a retriever's vectors, float32."""
    return 4 * passages * size


def of_params(run: Run, model: str) -> int:
    """Returns the bytes of a model's params, "retriever" or "reranker"."""
    encoder = random_model.params_like(getattr(run.models, model))
    towers = len(TOWERS[run.models.towers]) if model == "retriever" else 1
    return towers * sum(4 * math.prod(x.shape) for x in jax.tree.leaves(encoder))


def check(run: Run, store: tokens.Store, part: str, *, retrievers: int = 1) -> None:
    """Raises InputError if the workdir's disk has less free space than a part of the run writes.

    `part` is a training stage, or "vectors" of so many retrievers. What is there of it already counts
    as written.
    """
    folder = run.workdir / part
    if part == "vectors":
        size = run.models.retriever.hidden_size
        needed = retrievers * of_vectors(len(store.passage_ids), size)
    else:
        models = ("retriever", "reranker") if part == "joint" else (part,)
        needed = CHECKPOINTS * sum(of_params(run, model) for model in models)

    def short() -> tuple[float, float] | None:
        there, free = _size(folder), shutil.disk_usage(run.workdir).free
        return None if needed - there <= free else ((needed - there) / GIB, free / GIB)

    if found := hosts.from_first(short):
        raise InputError(
            f"{folder}: will hold {found[0]:.2f} GiB more, and its disk has {found[1]:.2f} GiB free; "
            "free some of it, then give the same command again"
        )


def _size(folder: pathlib.Path) -> int:
    """Returns the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
