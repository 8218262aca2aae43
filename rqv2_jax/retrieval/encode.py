"""Passages and queries to vectors; a corpus goes to resumable shards on disk.

Vectors of a corpus lie there in float32 or half of that; what reads them computes in float32. Several
hosts encode and write a share of the shards each.

Shape suffixes: N sequences, n sequences of a shard on disk, D vector size.
"""

import contextlib
import functools
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts
from rqv2_jax.data.tokens import Store, Texts
from rqv2_jax.errors import InputError, readable
from rqv2_jax.models.bert import Params
from rqv2_jax.retrieval.stream import Forward, Layout

PASSAGES_PER_SHARD = 2**15

_passage_bar = functools.partial(tqdm.tqdm, desc="encode passages", unit=" passages")


def queries(forward: Forward, tower: Params, texts: Texts, rows_N: np.ndarray) -> np.ndarray:
    """Returns the vectors [N, D] of some queries, by the query tower's params."""
    lengths_N = forward.inputs.query_lengths(texts, np.arange(len(texts)))
    with tqdm.tqdm(desc="encode queries", total=len(rows_N), unit=" queries") as bar:
        return forward.run(
            forward.vectors,
            tower,
            lengths_N=lengths_N[rows_N],
            layout=forward.layout(lengths_N, forward.inputs.query_length),
            build=lambda part: forward.inputs.queries(texts, rows_N[part]),
            bar=bar,
        )


def passages(
    forward: Forward, tower: Params, store: Store, rows_N: np.ndarray, bar: tqdm.tqdm | None = None
) -> np.ndarray:
    """Returns the vectors [N, D] of some passages; progress goes to `bar`, if given, or a new one."""
    new = _passage_bar(total=len(rows_N)) if bar is None else contextlib.nullcontext(bar)
    with new as shown:
        return forward.run(
            forward.vectors,
            tower,
            lengths_N=forward.inputs.passage_lengths(store, rows_N),
            layout=layout(forward, store),
            build=lambda part: forward.inputs.passages(store, rows_N[part]),
            bar=shown,
        )


def layout(forward: Forward, store: Store) -> Layout:
    """Plans for passages as long as the corpus's, so that every part of it takes the same shapes."""
    usual_N = forward.inputs.passage_lengths(store, store.sample())
    return forward.layout(usual_N, forward.inputs.passage_length)


def corpus(
    forward: Forward, tower: Params, store: Store, folder: pathlib.Path, source: str, dtype: str
) -> list[np.ndarray]:
    """Returns the vectors of all passages: memory-mapped `<folder>/<number>.npy`, [n, D] `dtype` each.

    Shards that can be read are kept, so an interrupted run goes on where it stopped; shards made from
    another `source` (the params' origin and the token store) or in another `dtype` are deleted.
    Raises InputError for a number that is too large for the dtype.
    """
    manifest = folder / "manifest.json"
    wanted = {"source": source, "per_shard": PASSAGES_PER_SHARD, "dtype": dtype}
    rows_N = np.arange(len(store.texts))
    parts = np.split(rows_N, range(PASSAGES_PER_SHARD, len(rows_N), PASSAGES_PER_SHARD))
    paths = [folder / f"{number:05}.npy" for number in range(len(parts))]

    def load(number: int) -> np.ndarray:
        return _load(paths[number], len(parts[number]), dtype)

    def find_missing() -> list[int]:
        made_from = None
        if manifest.is_file():
            # There was one dtype before manifests named it.
            made_from = readable(
                manifest, lambda: {"dtype": "float32"} | json.loads(manifest.read_text())
            )
        if made_from != wanted:
            if folder.is_symlink():
                # It belongs to the workdir that this one was started from.
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            artifacts.replace_text(manifest, json.dumps(wanted))
        return [
            number
            for number, path in enumerate(paths)
            if not path.is_file() or readable(path, functools.partial(load, number)) is None
        ]

    missing = hosts.from_first(find_missing)
    own = [missing[place] for place in hosts.span(len(missing))]
    if missing and hosts.count() > 1:
        forward, tower = forward.own, forward.own.sharding.put_params(hosts.whole(tower))
    others = sum(len(parts[number]) for number in {*missing} - {*own})
    with _passage_bar(total=len(rows_N) - others) as bar:
        bar.update(len(rows_N) - sum(len(parts[number]) for number in missing))
        for number in own:
            vectors_nxD = _rounded(passages(forward, tower, store, parts[number], bar), dtype)
            artifacts.replace(paths[number], functools.partial(np.save, arr=vectors_nxD))
    # Nobody looks for a file before it is there.
    hosts.barrier()
    return [load(number) for number in range(len(paths))]


def made_from(folder: pathlib.Path) -> str:
    """Returns the `source` that `corpus` has begun to fill a folder from, "" if there is none."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return ""
    return readable(manifest, lambda: json.loads(manifest.read_text())["source"]) or ""


def _load(path: pathlib.Path, count: int, dtype: str) -> np.ndarray:
    """Returns a shard's vectors, memory-mapped; ValueError unless there are `count` in the dtype."""
    vectors_nxD = np.load(path, mmap_mode="r")
    if vectors_nxD.dtype == np.dtype("V2"):
        # NumPy's files do not name bfloat16.
        vectors_nxD = vectors_nxD.view(ml_dtypes.bfloat16)
    if vectors_nxD.ndim != 2 or len(vectors_nxD) != count or vectors_nxD.dtype != dtype:
        raise ValueError(f"{vectors_nxD.dtype} of shape {vectors_nxD.shape} for {count} passages")
    return vectors_nxD


def _rounded(vectors_nxD: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the vectors in a dtype; raises InputError if a number is too large for it."""
    with np.errstate(over="ignore"):
        rounded_nxD = vectors_nxD.astype(dtype)
    if np.isinf(rounded_nxD).any() and not np.isinf(vectors_nxD).any():
        raise InputError(
            f"config.encode.dtype is {dtype}, which cannot hold a vector's largest number, "
            f"{np.abs(vectors_nxD).max():.3g}; run in a new workdir with --config.encode.dtype=float32"
        )
    return rounded_nxD
