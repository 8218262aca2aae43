"""The disk that a run needs, counted from its config, its models and the sizes of its texts.

Pure functions, in bytes, for a run into an empty workdir. A part has the `least` that it takes whatever
the data hold, and the `most`. Not counted: texts that are fetched or extracted, the token store of
`joint.lists`, what XLA compiles (tens of MB in `.compiled`), TensorBoard's events. With `config.budget`
the counts of the config are the most. `memory` does the same for the host's memory.
"""

from typing import NamedTuple

import ml_collections
import numpy as np

from rqv2_jax.data.lists import training_lists
from rqv2_jax.models.bert import BertConfig
from rqv2_jax.models.scoring import TOWERS, Models
from rqv2_jax.retrieval import index
from rqv2_jax.room import GIB

OFFSET = np.dtype(np.int64)
# A passage's row number and its score, in candidates and rankings.
HIT = 8 + 4

# The models that each stage trains.
MODELS = {
    "retriever": ("retriever",),
    "reranker": ("reranker",),
    "joint": ("retriever", "reranker"),
}
# Copies of a model's params: a state to resume from has two moments beside them, and there are three
# while the oldest makes room; the best params are there twice meanwhile. When a stage has ended, one
# state and the best params are left.
CHECKPOINTS, CHECKPOINTS_LEFT = 3 * 3 + 2, 3 + 1
# Orbax compresses: params that were trained to .92 or more of their size. Moments of words that never
# occurred are 0 and take nothing.
COMPRESSED = 0.9
# Bytes of an id where texts are not known yet.
ASSUMED_ID = 10.0


class Sizes(NamedTuple):
    """The sizes of a collection; numbers of queries and labels by split."""

    passages: int
    tokens: float  # of a passage, its title's included, in the mean
    queries: dict[str, int]
    query_tokens: float
    labels: dict[str, int]
    passage_id: float = ASSUMED_ID  # bytes, in the mean
    query_id: float = ASSUMED_ID


class Part(NamedTuple):
    """A part of what is needed, and what lowers it.

    `places` are its folders in the workdir. Of a part of memory they are patterns of files there that
    say that it is over; one without any is held to the end.
    """

    name: str
    least: float
    most: float
    lowered_by: str
    places: tuple[str, ...] = ()


def of_vectors(passages: int, size: int, dtype: str) -> int:
    """Returns the bytes of a retriever's vectors of `size` values."""
    return passages * size * np.dtype(dtype).itemsize


def of_params(models: Models, model: str) -> int:
    """Returns the bytes of a model's params, "retriever" or "reranker", without a re-ranker's head.

    Embeddings of tokens, positions and types and their normalisation; by layer four projections of
    attention, two of the feed-forward network, and two normalisations; all in float32.
    """
    shape: BertConfig = getattr(models, model)
    size, inner = shape.hidden_size, shape.intermediate_size
    embedded = (shape.vocab_size + shape.max_positions + shape.type_vocab_size + 2) * size
    layer = 4 * (size + 1) * size + (2 * size + 1) * inner + size + 4 * size
    towers = len(TOWERS[models.towers]) if model == "retriever" else 1
    return 4 * towers * (embedded + shape.num_layers * layer)


def disk(config: ml_collections.ConfigDict, models: Models, sizes: Sizes) -> list[Part]:
    """Returns the parts of the workdir, in the order in which they are written."""
    count, size = sizes.passages, models.retriever.hidden_size
    vectors = of_vectors(count, size, config.encode.dtype)
    states = len(retrievers(config))
    refreshed = refreshes(config, sizes) > 0
    released = sizes.passages <= config.evaluate.released.most_passages
    # Joint training may keep its start, whose vectors are there.
    parts = [
        _token_store(config, models, sizes),
        Part(
            "vectors",
            (states - 1) * vectors,
            (states + refreshed + released) * vectors,
            "config.encode.dtype=float16, a smaller retriever (config.model.weights), fewer passages",
            ("vectors",),
        ),
        _candidates(config, sizes),
        _checkpoints(config, models),
        _rankings(config, sizes),
        _run_files(config, sizes),
    ]
    if "scann" in config.evaluate.indexes:
        lowered_by = "config.evaluate.indexes=('exact',)"
        single = of_vectors(count, size, "float32")
        least, most = (states - 1) * single, states * single * index.KEPT
        parts.append(Part("ScaNN's indexes", least, most, lowered_by, ("index",)))
    return parts


def retrievers(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the states that search all passages with vectors of their own."""
    return ["zero_shot", *["retriever"] * (config.retriever.epochs > 0), "joint"]


def _token_store(config: ml_collections.ConfigDict, models: Models, sizes: Sizes) -> Part:
    """Counts tokens of 2 bytes (4 of a large vocabulary), ids, and where each of all these begins.

    So are the lines of a corpus, in two files at most, unless it is gzipped. A label has three numbers.
    The re-ranker's tokens are there too if it has another tokenizer, which it may have if it has other
    weights.
    """

    def texts(count: float, tokens: float, fields: int, vocabulary: int) -> float:
        width = 2 if vocabulary <= 2**16 else 4
        return count * tokens * width + fields * (count + 1) * OFFSET.itemsize

    def all_texts(vocabulary: int) -> float:
        queries = sum(texts(n, sizes.query_tokens, 1, vocabulary) for n in sizes.queries.values())
        return texts(sizes.passages, sizes.tokens, 2, vocabulary) + queries

    # An id stands in quotes on a line of its own.
    ids = sizes.passages * (sizes.passage_id + 3 + OFFSET.itemsize)
    ids += sum(sizes.queries.values()) * (sizes.query_id + 3 + OFFSET.itemsize)
    least = all_texts(models.retriever.vocab_size) + ids + 3 * 8 * sum(sizes.labels.values())
    two = config.model.reranker.weights not in ("", config.model.weights)
    lines = 2 * (sizes.passages + 1) * OFFSET.itemsize
    most = least + two * all_texts(models.reranker.vocab_size) + lines
    return Part("token store", least, most, "fewer passages", ("data/tokens",))


def mined(config: ml_collections.ConfigDict, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Returns by split the queries that get candidates, and how many each."""
    most = {"dev": (config.dev.queries, config.dev.depth)}
    if config.reranker.epochs > 0 or not config.joint.lists:
        most["train"] = config.mine.queries, config.mine.depth
    return {
        split: (min(sizes.queries.get(split, 0), queries), min(depth, sizes.passages))
        for split, (queries, depth) in most.items()
    }


def count_lists(config: ml_collections.ConfigDict, sizes: Sizes, stage: str) -> int:
    """Returns how many lists a stage trains on, one of each label in a pass."""
    queries, labels = sizes.queries.get("train", 0), sizes.labels.get("train", 0)
    if queries and stage != "retriever":
        labels = round(labels * min(queries, config.mine.queries) / queries)
    return training_lists(config[stage], labels)


def refreshes(config: ml_collections.ConfigDict, sizes: Sizes) -> int:
    """Returns how often joint training mines candidates anew."""
    joint = config.joint
    if not joint.refresh_every:
        return 0
    return max(count_lists(config, sizes, "joint") // joint.batch - 1, 0) // joint.refresh_every


def _candidates(config: ml_collections.ConfigDict, sizes: Sizes) -> Part:
    """Counts a row number and a score for each candidate, and row numbers of queries and BM25's.

    And a score of the re-ranker's for each that is denoised; all but BM25's again for every refresh.
    """
    asked, mine = mined(config, sizes), config.mine
    found = sum(queries * (8 + depth * HIT) for queries, depth in asked.values())
    scored = 0
    if config.joint.denoised_share > 0 and not config.joint.lists:
        most = {"train": (mine.scored_queries, mine.scored_depth)}
        for split, (queries, depth) in asked.items():
            limit = most.get(split, (queries, depth))
            scored += 4 * min(queries, limit[0]) * min(depth, limit[1])
    by_bm25 = 0
    if "bm25" in mine.sources and not mine.candidates:
        deepest = max(depth for _, depth in asked.values())
        by_bm25 = sum(8 * queries * deepest for queries, _ in asked.values())
    most_bytes = (1 + refreshes(config, sizes)) * (found + scored) + by_bm25
    # A budget may take fewer of the training queries.
    least = 0 if config.budget else found
    lowered_by = "config.mine.queries or config.mine.depth"
    return Part("candidates", least, most_bytes, lowered_by, ("lists",))


def _checkpoints(config: ml_collections.ConfigDict, models: Models) -> Part:
    """Counts what every stage leaves, and what the largest has beside that while it trains."""
    size = {model: of_params(models, model) for model in MODELS["joint"]}
    stages = {
        stage: sum(size[model] for model in trained)
        for stage, trained in MODELS.items()
        if config[stage].epochs > 0
    }
    left = CHECKPOINTS_LEFT * sum(stages.values())
    meanwhile = (CHECKPOINTS - CHECKPOINTS_LEFT) * max(stages.values())
    return Part(
        "checkpoints",
        2 * COMPRESSED * sum(stages.values()),
        left + meanwhile,
        "smaller models (config.model.num_layers, config.model.towers=shared)",
        tuple(stages),
    )


def measured(config: ml_collections.ConfigDict, sizes: Sizes) -> tuple[int, int, int]:
    """Returns how many test queries are measured and re-ranked, and how many hits each has."""
    settings = config.evaluate
    queries = min(sizes.queries.get("test", 0), settings.queries)
    depth = min(settings.retrieve_depth, sizes.passages)
    return queries, min(queries, settings.rerank_queries), depth


def floors(config: ml_collections.ConfigDict, sizes: Sizes) -> dict[str, bool]:
    """Says which floors are not too large to be measured."""
    names = ("bm25", "released")
    return {name: sizes.passages <= config.evaluate[name].most_passages for name in names}


def _rankings(config: ml_collections.ConfigDict, sizes: Sizes) -> Part:
    """Counts the test queries' hits by exact search, by ScaNN and of both floors; scores of pairs."""
    queries, reranked, depth = measured(config, sizes)
    states, small = len(retrievers(config)), floors(config, sizes)
    kinds = len({"exact", *config.evaluate.indexes})
    # Both re-ranked states, on candidates of their own and of BM25.
    pairs = 4 * 4 * reranked * min(depth, config.evaluate.rerank_depth)
    each = queries * depth * HIT
    values = 8 * queries * len(config.evaluate.metrics) * (kinds * states + sum(small.values()) + 4)
    most = (kinds * states + sum(small.values())) * each + pairs + values
    lowered_by = "config.evaluate.retrieve_depth or config.evaluate.queries"
    return Part("rankings of the test queries", (states - 1) * each, most, lowered_by, ("eval",))


def _run_files(config: ml_collections.ConfigDict, sizes: Sizes) -> Part:
    """Counts a line `query Q0 passage rank score tag` for every hit of every row of the table."""
    queries, reranked, depth = measured(config, sizes)
    states, small = retrievers(config), floors(config, sizes)
    line = (
        sizes.query_id + sizes.passage_id + len("  Q0 ") + len(f" {depth} ") + len("-0.123456789")
    )

    def lines(count: int, state: str, model: str) -> float:
        return count * depth * (line + len(f" rqv2_jax.{state}.{model}\n"))

    by_retrievers = sum(lines(queries, state, "retriever") for state in states)
    by_rerankers = sum(lines(reranked, state, "reranker") for state in ("reranker", "joint"))
    by_floors = small["bm25"] * lines(queries, "bm25", "bm25")
    by_floors += small["released"] * lines(queries, "released", "retriever")
    most = len(config.evaluate.indexes) * by_retrievers + by_floors
    most += (1 + small["bm25"]) * by_rerankers
    # Ranks and scores may have fewer digits.
    least = 0.7 * (by_retrievers + by_rerankers)
    lowered_by = "config.evaluate.retrieve_depth or config.evaluate.queries"
    return Part("run files", least, most, lowered_by, ("runs",))


def short_of_disk(parts: list[Part], free: float, figure: str) -> str:
    """Returns a line that says by what the disk is too small, with the mend; "" if it is not."""
    needed = sum(getattr(part, figure) for part in parts)
    if needed <= free:
        return ""
    largest = max(parts, key=lambda part: getattr(part, figure))
    return (
        f"the run writes {needed / GIB:.2f} GiB, and the disk has {free / GIB:.2f} GiB free; free some "
        f"of it, or lower the {getattr(largest, figure) / GIB:.2f} GiB of {largest.name}: "
        f"{largest.lowered_by}"
    )


def render(what: str, parts: list[Part]) -> list[str]:
    """Returns the most that each part takes as the lines of a table in Markdown."""
    lines = ["", f"| {what} | GiB, at most |", "|---|---|"]
    return lines + [f"| {part.name} | {part.most / GIB:.2f} |" for part in parts]
