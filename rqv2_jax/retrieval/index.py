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

from rqv2_jax import artifacts, hosts, optional, room
from rqv2_jax.errors import readable

QUERIES_PER_TILE = 256
PASSAGES_PER_TILE = 2**15

# Passages that ScaNN's leaves are trained on, at most.
SAMPLED = 250_000

# Memory of ScaNN over that of the vectors in float32, at most, while an index is built and when it is
# loaded; measured with 400,000 and 1,000,000 of 384 dimensions.
BUILT, KEPT = 4.6, 1.1
# Share of the machine's memory in which an index is built, unless the settings say how much.
MEMORY = 0.5
# Says that ScaNN's folder is complete, and what it was made from.
MANIFEST = "rqv2_jax.json"

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
    """Yields the first row, number of passages, and vectors [tile, D], filled with zeros, of tiles.

    They are those that this host searches; of the others nothing is read.
    """
    starts = np.cumsum([0, *map(len, shards)])
    places = [
        (number, first)
        for number, shard in enumerate(shards)
        for first in range(0, len(shard), tile)
    ]
    for number, first in (places[place] for place in hosts.span(len(places))):
        vectors = shards[number][first : first + tile]
        count = len(vectors)
        if count < tile:
            vectors = np.pad(vectors, ((0, tile - count), (0, 0)))
        yield int(starts[number]) + first, count, vectors


def _best(rankings: list[Ranked], depth: int) -> Ranked:
    """Returns the best of rankings of the same queries over parts of the passages, in rows' order.

    Each is best first. Of equal scores an earlier part's comes first; NaN comes before all.
    """
    if len(rankings) == 1:
        return rankings[0]
    rows_QxM, scores_QxM = (np.concatenate(each, axis=1) for each in zip(*rankings))
    falling_QxM = -np.where(np.isnan(scores_QxM), np.inf, scores_QxM)
    order_QxK = np.argsort(falling_QxM, axis=1, kind="stable")[:, :depth]
    taken = (np.take_along_axis(each, order_QxK, axis=1) for each in (rows_QxM, scores_QxM))
    rows_QxK, scores_QxK = taken
    return rows_QxK, scores_QxK


def exact(queries_QxD: np.ndarray, shards: list[np.ndarray], depth: int) -> Ranked:
    """Returns the `depth` passages with the largest dot products, best first; all if there are fewer.

    Works tile by tile, so no array of queries times passages ever exists. Every passage is read once,
    while the queries stay on the devices, split over all of this host. Several hosts share the
    passages, of which each reads its own part, and all get the best of all. `shards` are the passages'
    vectors [n, D], in row order, of any floating dtype; scores are computed in float32.

    Returns:
      (rows [Q, K] int64, scores [Q, K] float32).
    """
    total = sum(map(len, shards))
    depth = min(depth, total)
    devices = tuple(jax.local_devices())
    merge, split, everywhere = _on_devices(devices)
    together = QUERIES_PER_TILE * len(devices)
    tile_size = min(PASSAGES_PER_TILE, -(-total // hosts.count()))
    queries, best = [], []
    for first in range(0, len(queries_QxD), together):
        part = queries_QxD[first : first + together]
        part = np.pad(part, ((0, together - len(part)), (0, 0)))
        queries.append(jax.device_put(part, split))
        lowest = np.full((together, depth), -np.inf, np.float32)
        best.append(jax.device_put((lowest, np.zeros(lowest.shape, np.int32)), split))
    with tqdm.tqdm(desc="exact search", total=-(-total // hosts.count()), unit=" passages") as bar:
        for row, count, vectors in _tiles(shards, tile_size):
            tile = jax.device_put(vectors, everywhere).astype(jnp.float32)
            # Waits for the tile before, so that at most two lie on the devices.
            jax.block_until_ready(best)
            best = [merge(part, tile, row, count, top) for part, top in zip(queries, best)]
            bar.update(count)
        found = [tuple(np.asarray(x) for x in top) for top in best]
    # By parts of the queries, so that the results of many hosts take little memory.
    merged = [
        _best(list(zip(hosts.gather(rows), hosts.gather(scores))), depth) for scores, rows in found
    ]
    rows_QxK, scores_QxK = (np.concatenate(each)[: len(queries_QxD)] for each in zip(*merged))
    return rows_QxK.astype(np.int64), scores_QxK


def open_scann(
    shards: list[np.ndarray], settings: ConfigDict, depth: int, folder: pathlib.Path, source: str
) -> Callable[[np.ndarray], Ranked]:
    """Returns a search that gives about what `exact` gives, by an index of ScaNN in `folder`.

    It is made as `build_scann` says. Where that would not fit into the memory, parts of the passages
    have an index each, in a folder in `folder`; they are built or loaded, searched and put down one
    after the other whenever queries come, and the best of all are returned. Row -1 and score -inf stand
    for none.
    """
    total = sum(map(len, shards))
    count = scann_parts(total, shards[0].shape[1], settings.memory)
    if count == 1:
        whole = build_scann(shards, settings, depth, folder, source)
        return lambda queries_QxD: scann_search(whole, queries_QxD, depth)
    if (folder / MANIFEST).exists():
        # It has one index over all passages.
        shutil.rmtree(folder)
    for part in folder.glob("[0-9]*"):
        if int(part.name) >= count:
            shutil.rmtree(part)

    def search(queries_QxD: np.ndarray) -> Ranked:
        found = []
        for number in range(count):
            rows = range(number * total // count, (number + 1) * total // count)
            named = folder / f"{number:04}", f"{source} {rows}"
            searcher = build_scann(_taken(shards, rows), settings, depth, *named)
            rows_QxK, scores_QxK = scann_search(searcher, queries_QxD, depth)
            # Before the next is loaded.
            del searcher
            found.append((np.where(rows_QxK < 0, -1, rows_QxK + rows.start), scores_QxK))
        return _best(found, min(depth, total))

    return search


def scann_parts(total: int, size: int, memory: float) -> int:
    """Returns into how many parts the passages must be split for ScaNN's index of each to fit.

    Building an index over n vectors of size D takes at most 4 n D * `BUILT` bytes: the vectors in
    float32 (4 n D), ScaNN's copies of them, hashed codes (n D / 4) and the leaves' centres (4 D for
    each of about sqrt(n)). An index that is loaded takes 4 n D * `KEPT`. `memory` is in GiB; 0 is half
    of the machine's, or of its container's.
    """
    budget = memory * room.GIB or MEMORY * room.host_memory()[0]
    return max(1, min(math.ceil(4 * total * size * BUILT / budget), total))


def scann_described(settings: ConfigDict, total: int, size: int) -> str:
    """Names how ScaNN searches `total` vectors: the settings, and the parts if there are several."""
    described = {key: value for key, value in settings.items() if key != "memory"}
    parts = scann_parts(total, size, settings.memory)
    return json.dumps(described | ({"parts": parts} if parts > 1 else {}), sort_keys=True)


def _taken(shards: list[np.ndarray], rows: range) -> list[np.ndarray]:
    """Returns the rows of a range, as views of the shards that have some of them."""
    taken, start = [], 0
    for shard in shards:
        part = shard[max(rows.start - start, 0) : max(rows.stop - start, 0)]
        taken += [part] if len(part) else []
        start += len(shard)
    return taken


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
    manifest = folder / MANIFEST
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
    vectors = np.concatenate(shards, dtype=np.float32)
    builder = scann_ops_pybind.builder(vectors, depth, "dot_product")
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
    del builder, vectors
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
