"""What the benchmarks share: texts to read, and comparisons with rivals and with the peak.

Shape suffixes: N sequences.
"""

import itertools
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from rqv2_jax.data import tokens
from rqv2_jax.models import random_model
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.texts import open_collection
from rqv2_jax.tools import machines, workload


class Texts(NamedTuple):
    """Passages (title, text) and queries, and their tokens."""

    passages: list[tuple[str, str]]
    queries: list[str]
    store: tokens.Store
    tokenised_in: float  # seconds


def read(run: Run, lengths: str, passages: int, queries: int) -> Texts:
    """Returns the first texts of the config's collection; or made up ones.

    Args:
      lengths: "data", "msmarco" (as long as MS MARCO's) or "full" (all that the config admits).
    """
    if lengths != "data":
        rng, data = np.random.default_rng(0), run.config.data
        longest = {"passages": data.passage_length, "queries": data.query_length}

        def made_up(kind: str, count: int) -> list[str]:
            lengths_N = workload.msmarco_lengths(rng, kind, count)
            lengths_N = lengths_N if lengths == "msmarco" else np.full(count, longest[kind])
            # Two tokens are special ones.
            return [" ".join(rng.choice(random_model.WORDS, length - 2)) for length in lengths_N]

        read_passages = [("", text) for text in made_up("passages", passages)]
        read_queries = made_up("queries", queries)
    else:
        with tempfile.TemporaryDirectory() as folder:
            collection = open_collection(run.config.data, pathlib.Path(folder))
            first = itertools.islice(collection.passages(), passages)
            read_passages = [(passage.title, passage.text) for passage in first]
            first = itertools.islice(collection.queries("train"), queries)
            read_queries = [query.text for query in first]
    started = time.perf_counter()
    titles, bodies, questions = (
        run.tokenizer.texts(texts) for texts in (*zip(*read_passages), read_queries)
    )
    taken = time.perf_counter() - started
    split = tokens.Queries(questions, read_queries, np.zeros((3, 0), np.int64))
    ids = [str(i) for i in range(len(read_passages))]
    store = tokens.Store(titles, bodies, ids, {"train": split}, "")
    return Texts(read_passages, read_queries, store, taken)


def peak_memory() -> float:
    """Returns the most GiB that the device has held if it counts them, else this whole process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats["peak_bytes_in_use"] / machines.GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / machines.GIB


def shares_of_peak(run: Run, rate: float) -> dict:
    """Returns model FLOPs a second over the measured peak, and over the maker's if that is known."""
    best, chip = machines.peak(run.config.model.dtype), machines.chip(jax.devices()[0])
    rate /= run.sharding.shards
    shares = {"peak_gflop_per_second": best / 1e9, "share_of_peak": rate / best}
    if chip is not None and run.config.model.dtype == "bfloat16":
        shares["share_of_makers_peak"] = rate / machines.GPUS[chip][1]
    return shares


def in_turn(
    ours: Callable, theirs: Callable | None, rounds: int
) -> tuple[list[float], list[float]]:
    """Returns the seconds of every round of ours, and of theirs if there is one.

    Ours has had a round to compile in; theirs gets one to find its memory.
    """
    our_seconds, their_seconds = [], []
    if theirs is not None:
        theirs()
    for _ in range(rounds):
        our_seconds += machines.seconds(ours, 1)
        if theirs is not None:
            their_seconds += machines.seconds(theirs, 1)
    return our_seconds, their_seconds


def against(name: str, what: str, theirs: list[float], ours: list[float]) -> dict:
    """Returns the median of a rival's seconds, and how many times ours it is."""
    median = float(np.median(theirs))
    return {f"{name}_{what}": median, f"{name}_ratio": median / float(np.median(ours))}
