"""Search by inner product: exact in tiles, and approximate with ScaNN (Guo et al. 2020).

Shape suffixes: Q queries, N passages of a tile, D vector size, K depth.
"""

import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rqv2_jax import artifacts, hosts, optional
from rqv2_jax.errors import readable

QUERIES_PER_TILE = 256
PASSAGES_PER_TILE = 2**15

# Passages that ScaNN's leaves are trained on, at most.
SAMPLED = 250_000

Ranked = tuple[np.ndarray, np.ndarray]  # rows and scores


def _merge(
    queries_QxD: jax.Array, tile_NxD: jax.Array, first: int, count: int, best: tuple
) -> tuple[jax.Array, jax.Array]:
    """Returns the best K of a tile's first `count` passages and of the best so far: scores and rows."""
    best_QxK, rows_QxK = best
    # Accelerators would round the factors to fewer bits.
    scores_QxN = jnp.matmul(queries_QxD, tile_NxD.T, precision="highest")
    numbers_N = jnp.arange(len(tile_NxD))
    scores_QxN = jnp.where(numbers_N < count, scores_QxN, -jnp.inf)
    depth = best_QxK.shape[1]
    top, numbers = jax.lax.top_k(scores_QxN, min(depth, len(tile_NxD)))
    best_QxK, chosen = jax.lax.top_k(jnp.concatenate([best_QxK, top], axis=1), depth)
    all_rows = jnp.concatenate([rows_QxK, numbers + first], axis=1)
    return best_QxK, jnp.take_along_axis(all_rows, chosen, axis=1)


@functools.cache
def _on_devices(devices: tuple[jax.Device, ...]) -> tuple[Callable, NamedSharding, NamedSharding]:
    """Returns `_merge` with queries split over devices, and the shardings of queries and passages."""
    mesh = Mesh(np.array(devices), ("queries",))
    split, everywhere = PartitionSpec("queries"), PartitionSpec()
    merge = jax.shard_map(
        _merge,
        mesh=mesh,
        in_specs=(split, everywhere, everywhere, everywhere, split),
        out_specs=(split, split),
        check_vma=False,
    )
    shardings = NamedSharding(mesh, split), NamedSharding(mesh, everywhere)
    return jax.jit(merge, donate_argnums=4), *shardings


def _tiles(shards: list[np.ndarray], tile: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields every tile's first row, number of passages, and vectors [tile, D], filled with zeros."""
    row = 0
    for shard in shards:
        for first in range(0, len(shard), tile):
            vectors = shard[first : first + tile]
            count = len(vectors)
            if count < tile:
                vectors = np.pad(vectors, ((0, tile - count), (0, 0)))
            yield row, count, vectors
            row += count


def exact(queries_QxD: np.ndarray, shards: list[np.ndarray], depth: int) -> Ranked:
    """Returns the `depth` passages with the largest dot products, best first; all if there are fewer.

    Works tile by tile, so no array of queries times passages ever exists. Every passage is read once,
    while the queries stay on the devices, split over all of this host. Several hosts share the
    queries, and all get the results of all. `shards` are the passages' vectors [n, D], in row order.

    Returns:
      (rows [Q, K] int64, scores [Q, K] float32).
    """
    total = sum(map(len, shards))
    depth = min(depth, total)
    devices = tuple(jax.local_devices())
    merge, split, everywhere = _on_devices(devices)
    together = QUERIES_PER_TILE * len(devices)
    queries, best = [], []
    for number in hosts.share(-(-len(queries_QxD) // together)):
        part = queries_QxD[number * together :][:together]
        part = np.pad(part, ((0, together - len(part)), (0, 0)))
        queries.append(jax.device_put(part, split))
        lowest = np.full((together, depth), -np.inf, np.float32)
        best.append(jax.device_put((lowest, np.zeros(lowest.shape, np.int32)), split))
    with tqdm.tqdm(desc="exact search", total=total, unit=" passages") as bar:
        for row, count, vectors in _tiles(shards, min(PASSAGES_PER_TILE, total)):
            tile = jax.device_put(vectors, everywhere)
            # Waits for the tile before, so that at most two lie on the devices.
            jax.block_until_ready(best)
            best = [merge(part, tile, row, count, top) for part, top in zip(queries, best)]
            bar.update(count)
        parts = [[np.asarray(x) for x in kind] for kind in zip(*best)]
    scores_QxK, rows_QxK = (hosts.join(x).reshape(-1, depth)[: len(queries_QxD)] for x in parts)
    return rows_QxK.astype(np.int64), scores_QxK


def build_scann(
    shards: list[np.ndarray], settings: ConfigDict, depth: int, folder: pathlib.Path, source: str
) -> Any:
    """Returns a ScaNN searcher over the vectors, saved in `folder` and loaded from there next time.

    As ScaNN's guide advises, of a small collection (`settings.brute_force_below` passages) all passages
    are scored. A larger one has `leaves_per_sqrt * sqrt(passages)` leaves, of which at least
    `searched_share` is searched, and enough to see `seen` times the depth; `reorder` times the depth
    is then scored exactly.

    The folder may be moved. It is built again if it was built from another `source` or by other
    settings, or does not load.
    """
    scann_ops_pybind = optional.load("scann", "an index by ScaNN").scann_ops_pybind

    total = sum(map(len, shards))
    depth = min(depth, total)
    leaves = max(1, min(round(settings.leaves_per_sqrt * total**0.5), total))
    searched = max(settings.searched_share * leaves, settings.seen * depth * leaves / total)
    searched = min(math.ceil(searched), leaves)
    reorder = min(round(settings.reorder * depth), total)
    manifest = folder / "rqv2_jax.json"
    brute_force = total < settings.brute_force_below
    wanted = json.dumps([source, brute_force, leaves, searched, reorder, depth])

    def load() -> Any:
        return scann_ops_pybind.load_searcher(str(folder), assets_backcompat_shim=False)

    if manifest.is_file() and manifest.read_bytes() == wanted.encode():
        searcher = readable(folder, load)
        if searcher is not None:
            return searcher
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    builder = scann_ops_pybind.builder(np.concatenate(shards), depth, "dot_product")
    if brute_force:
        builder = builder.score_brute_force()
    else:
        builder = (
            builder.tree(leaves, searched, training_sample_size=min(total, SAMPLED))
            .score_ah(2, anisotropic_quantization_threshold=0.2)
            .reorder(reorder)
        )
    # With file names, not paths relative to the folder that the program was started in.
    builder.build().serialize(str(folder), relative_path=True)
    del builder
    # A searcher as built holds the vectors twice, a loaded one once.
    searcher = load()
    # Comes last, because it says that the folder is complete.
    artifacts.replace_text(manifest, wanted)
    return searcher


def scann_search(
    searcher: Any, queries_QxD: np.ndarray, depth: int, leaves: int | None = None
) -> Ranked:
    """Does what `exact` does, in `leaves` leaves if given; row -1 and score -inf for none."""
    rows_QxK, scores_QxK = searcher.search_batched_parallel(
        queries_QxD, final_num_neighbors=depth, leaves_to_search=leaves
    )
    rows_QxK = np.asarray(rows_QxK).astype(np.int64)
    missing_QxK = ~np.isfinite(scores_QxK)
    return np.where(missing_QxK, -1, rows_QxK), np.where(missing_QxK, -np.inf, scores_QxK)


def recall(rows_QxK: np.ndarray, exact_QxK: np.ndarray) -> float:
    """Returns the share of exact results that are among the approximate ones, mean over queries."""
    hits = [len(np.intersect1d(a, b)) for a, b in zip(rows_QxK, exact_QxK)]
    return float(np.mean(hits) / exact_QxK.shape[1])
