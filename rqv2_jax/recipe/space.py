"""The disk and the memory that are free, compared with what `needs` counts.

A run is refused at its start if it certainly cannot fit, and a part before it begins if the disk has
less room than it takes at most. With `Run.force` these are warnings.
"""

import os
import pathlib
from collections.abc import Callable

import jax
import tqdm

from rqv2_jax import hosts
from rqv2_jax.data import tokens
from rqv2_jax.errors import DAMAGE, InputError
from rqv2_jax.recipe import memory, needs
from rqv2_jax.recipe.needs import CHECKPOINTS, MODELS, Sizes
from rqv2_jax.recipe.run import Run
from rqv2_jax.room import GIB, free_disk, host_memory

SAMPLED_IDS = 1000
# Of a file of passages, this many bytes are read to estimate how many passages it has.
SAMPLED_BYTES = 2**20
# The file of passages, one a line, by data.dataset.
CORPUS = {"beir": "corpus.jsonl", "msmarco": "collection.tsv", "dpr": "psgs_w100.tsv"}


def sizes_of(store: tokens.Store) -> Sizes:
    """Returns the sizes of the texts in a token store, the length of ids from a sample."""
    asked = {split: queries.texts for split, queries in store.splits.items()}
    count = sum(map(len, asked.values()))
    query_ids = [key for queries in store.splits.values() for key in queries.ids[:SAMPLED_IDS]]
    step = max(len(store.passage_ids) // SAMPLED_IDS, 1)
    passage_ids = [store.passage_ids[row] for row in range(0, len(store.passage_ids), step)]

    def mean(ids: list[str]) -> float:
        return sum(len(key.encode()) for key in ids) / max(len(ids), 1)

    held = int(store.texts.offsets[-1]) + int(store.titles.offsets[-1])
    return Sizes(
        passages=len(store.texts),
        tokens=held / max(len(store.texts), 1),
        queries={split: len(texts) for split, texts in asked.items()},
        query_tokens=sum(int(texts.offsets[-1]) for texts in asked.values()) / max(count, 1),
        labels={split: each.qrels_3xN.shape[1] for split, each in store.splits.items()},
        passage_id=mean(passage_ids),
        query_id=mean(query_ids),
    )


def _known_sizes(run: Run) -> Sizes:
    """Returns the sizes of the workdir's token store, or else what the file of passages tells.

    Of passages that may be half as many as the first lines of the file suggest; of queries none.
    """
    folder = run.workdir / "data" / "tokens"
    try:
        return sizes_of(tokens.read_store(folder))
    except DAMAGE:
        pass
    data, passages = run.config.data, 0
    name = CORPUS.get("beir" if data.dataset.startswith("beir") else data.dataset)
    if name and (file := pathlib.Path(data.path) / name).is_file() and data.path:
        with file.open("rb") as opened:
            lines = opened.read(SAMPLED_BYTES).count(b"\n")
        size = file.stat().st_size
        passages = lines * size // min(size, SAMPLED_BYTES) // 2 if size else 0
    return Sizes(passages, 0.0, {}, 0.0, {})


def this_host() -> memory.Host:
    """Returns this machine as a host of a run."""
    total, _ = host_memory()
    return memory.Host(jax.default_backend() == "cpu", jax.local_device_count(), memory=total)


def check_run(run: Run, store: tokens.Store | None = None) -> None:
    """Raises InputError if what is left of the run certainly does not fit on the disk or in memory.

    Before there is a token store, only a part of its needs is known. Writes nothing.
    """

    def short() -> list[str]:
        sizes = _known_sizes(run) if store is None else sizes_of(store)
        disk = [
            part._replace(least=max(part.least - sum(_held(run.workdir, part)), 0))
            for part in needs.disk(run.config, run.models, sizes)
        ]
        held = [
            part
            for part in memory.parts_of(run.config, run.models, sizes, this_host())
            if not any(any(run.workdir.glob(pattern)) for pattern in part.places)
        ]
        lines = [
            needs.short_of_disk(disk, free_disk(run.workdir), "least"),
            memory.short_of_memory(held, host_memory()[1], "least"),
        ]
        return [line for line in lines if line]

    if lines := hosts.from_first(short):
        _refuse(run, f"{run.workdir}: {'; and '.join(lines)}")


def _held(workdir: pathlib.Path, part: needs.Part) -> list[int]:
    """Returns the sizes of the files of a part that are there, links of another workdir's included."""
    return [
        os.stat(os.path.join(folder, name)).st_size
        for place in part.places
        for folder, _, names in os.walk(workdir / place, followlinks=True)
        for name in names
        if os.path.isfile(os.path.join(folder, name))
    ]


def check_stage(run: Run, name: str) -> None:
    """Raises InputError if the disk has too little free space for a training stage's checkpoints."""
    size = sum(needs.of_params(run.models, model) for model in MODELS[name])
    folder = run.workdir / name

    def left() -> int:
        held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return CHECKPOINTS * size - held

    _check(run, folder, left)


def check_vectors(run: Run, store: tokens.Store, states: tuple[str, ...]) -> None:
    """Raises InputError if the disk has too little free space for the vectors of retrievers.

    They are those of these states' retrievers that have not been begun.
    """
    folder = run.workdir / "vectors"
    size, dtype = run.models.retriever.hidden_size, run.config.encode.dtype
    each = needs.of_vectors(len(store.passage_ids), size, dtype)

    stages = {run.kept_by(state=state, model="retriever") for state in states}
    _check(run, folder, lambda: each * sum(not (folder / stage).exists() for stage in stages))


def _check(run: Run, folder: pathlib.Path, left: Callable[[], int]) -> None:
    def short() -> list[float]:
        needed, free = left(), free_disk(folder.parent)
        return [needed / GIB, free / GIB] if needed > free else []

    if found := hosts.from_first(short):
        _refuse(
            run,
            f"{folder}: will hold {found[0]:.2f} GiB more, and its disk has {found[1]:.2f} GiB free; "
            "free some of it, then give the same command again",
        )


def _refuse(run: Run, line: str) -> None:
    """Raises InputError, or prints a warning if the run goes on whatever is too small."""
    if not run.force:
        raise InputError(f"{line}; --force goes on all the same")
    tqdm.tqdm.write(f"warning: {line}")
