"""Passages and queries to vectors; a corpus goes to resumable shards on disk.

Shape suffixes: N sequences, D vector size.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import tqdm

from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.packing import Ragged
from rqv2_jax.data.tokens import Store
from rqv2_jax.models import Models
from rqv2_jax.retrieval import stream
from rqv2_jax.sharding import Sharding

PASSAGES_PER_SHARD = 2**15


def vectors(
    models: Models,
    tower,
    sharding: Sharding,
    batch_tokens: int,
    lengths_N: np.ndarray,
    build: Callable[[np.ndarray], Ragged],
    name: str,
) -> np.ndarray:
    """One tower's vectors [N, D] of sequences of some lengths, which `build` makes from numbers."""
    with tqdm.tqdm(desc=f"encode {name}", total=len(lengths_N), unit=f" {name}") as bar:
        return stream.run(
            sharding.per_shard(models.vectors),
            tower,
            sharding,
            lengths_N=lengths_N,
            widths=stream.row_widths(lengths_N),
            build=build,
            batch_tokens=batch_tokens,
            bar=bar,
        )


def corpus(
    models: Models,
    tower,
    store: Store,
    inputs: Inputs,
    sharding: Sharding,
    batch_tokens: int,
    folder: pathlib.Path,
    source: str,
) -> list[np.ndarray]:
    """The vectors of all passages, as memory-mapped shards `<folder>/<number>.npy` of [n, D] float32.

    Shards that exist are kept, so an interrupted run goes on where it stopped; shards made from
    another `source` (the params' origin and the token store) are thrown away.
    """
    manifest = folder / "manifest.json"
    wanted = json.dumps({"source": source, "per_shard": PASSAGES_PER_SHARD})
    if not (manifest.is_file() and manifest.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        manifest.write_text(wanted)
    rows_N = np.arange(len(store.texts))
    lengths_N = inputs.passage_lengths(store, rows_N)
    widths = stream.row_widths(lengths_N)
    fn = sharding.per_shard(models.vectors)
    paths = []
    with tqdm.tqdm(desc="encode passages", total=len(rows_N), unit=" passages") as bar:
        for number, first in enumerate(range(0, len(rows_N), PASSAGES_PER_SHARD)):
            part_N = rows_N[first : first + PASSAGES_PER_SHARD]
            path = folder / f"{number:05}.npy"
            paths.append(path)
            if path.is_file():
                bar.update(len(part_N))
                continue
            vectors_nxD = stream.run(
                fn,
                tower,
                sharding,
                lengths_N=lengths_N[part_N],
                widths=widths,
                build=lambda i, part_N=part_N: inputs.passages(store, part_N[i]),
                batch_tokens=batch_tokens,
                bar=bar,
            )
            partial = path.with_suffix(".partial.npy")
            np.save(partial, vectors_nxD)
            os.replace(partial, path)
    return [np.load(path, mmap_mode="r") for path in paths]
