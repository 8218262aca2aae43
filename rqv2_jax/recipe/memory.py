"""The memory of a host that a run needs, counted from its config, its models and its texts' sizes.

Pure functions, in bytes, for the host that needs most: that of the first process. Some parts are held
to the end, the others follow one another. Tokens and vectors are read through a memory map and not
counted. Arrays are counted, all else is estimated or measured, as the constants say.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import ml_collections

from rqv2_jax.data import lists
from rqv2_jax.models.scoring import Models
from rqv2_jax.recipe import needs
from rqv2_jax.recipe.needs import Part, Sizes
from rqv2_jax.retrieval import index
from rqv2_jax.room import GIB

# Bytes of memory while lists are drawn: of each candidate, its passage and three scores, one of which
# is made meanwhile; of each candidate of the queries that are looked at together; and of each passage
# of a list, with the copies that are made of it, as measured.
DRAWN, DRAWN_LEAST = 20, 16
LOOKED_AT, LISTED = 54, 20
# Estimates. Bytes of memory for Python, JAX and TensorFlow; for a passage's id in a dictionary while it
# is tokenised, beside its characters; for a passage's numbers in arrays over all passages (where its
# id starts, its row, the rows that dev's pool is drawn from).
PROGRAM, PROGRAM_LEAST = 1.0 * GIB, 0.3 * GIB
KEYED, KEYED_LEAST = 300, 130
ROWS, ROWS_LEAST = 48, 8
# For a hit of a ranking while it is searched, sorted and measured; for an id of a query.
RANKED, QUERY_KEYED = 64, 57
# For a word of the texts in the index of BM25: 32 bytes were measured, beside the vocabulary. Words are
# no more than tokens; texts of rare words have several tokens a word.
BM25_WORD, BM25_LEAST = 40, 8
WORDS_LEAST = 0.3
# Copies of the params of a stage on a CPU: state (3), gradients, updates, a state being saved (3).
# Elsewhere only the last is in the host's memory.
TRAINED_ON_CPU, TRAINED_LEAST, SAVED = 8, 4, 3


class Host(NamedTuple):
    """The host that runs the first process: whether its devices are its CPU, and how many they are.

    `step` is what a training step needs on all of them, as planned; 0 if it is not known. `memory` is
    all that the host has; infinite if that is not known.
    """

    cpu: bool
    devices: int
    step: float = 0.0
    memory: float = math.inf


def parts_of(
    config: ml_collections.ConfigDict, models: Models, sizes: Sizes, host: Host
) -> list[Part]:
    """Returns the parts of a host's memory: those held to the end, then those that follow them."""
    passages, ids = sizes.passages, sum(sizes.queries.values()) * (sizes.query_id + QUERY_KEYED)
    key, few = passages * sizes.passage_id, "fewer passages"
    parts = [
        Part("the program", PROGRAM_LEAST, PROGRAM, ""),
        Part("ids and row numbers", ROWS_LEAST * passages, ROWS * passages + ids, few),
        Part(
            "tokenising",
            KEYED_LEAST * passages + key,
            KEYED * passages + key,
            few,
            ("data/tokens/manifest.json",),
        ),
        _training(config, models, sizes, host),
    ]
    queries, depth = needs.mined(config, sizes).get("train", (0, 0))
    cells = queries * depth
    least, lowered_by = (0 if config.budget else DRAWN_LEAST * cells), "config.mine.depth"
    over = ("joint/finished.txt",)
    # One epoch's lists are drawn at a time.
    together = LOOKED_AT * min(queries, lists.AT_ONCE) * depth
    most = DRAWN * cells + together + LISTED * queries * config.joint.list_size
    parts.append(Part("candidates while lists are drawn", least, most, lowered_by, over))
    return [*parts, *_searching(config, models, sizes, host)]


def _training(config: ml_collections.ConfigDict, models: Models, sizes: Sizes, host: Host) -> Part:
    """Counts the largest stage: its lists, copies of its params, and what its step is planned to need.

    A planned step of a CPU has the state and the gradients in it.
    """
    size, name = 0.0, "training"
    least = most = 0.0
    for stage, trained in needs.MODELS.items():
        if config[stage].epochs > 0:
            size = sum(needs.of_params(models, model) for model in trained)
            width = 1 if stage == "retriever" else config[stage].list_size
            # Row numbers and provenance, joined from the lists of each epoch.
            drawn = 2 * needs.count_lists(config, sizes, stage) * width * (4 + 1)
            copies = TRAINED_ON_CPU * size if host.cpu else SAVED * size
            most = max(most, drawn + max(copies, host.cpu * (host.step + SAVED * size)))
            least = max(least, (TRAINED_LEAST * size) if host.cpu else 0.0)
    if host.cpu and not host.step:
        name += ", without activations"
    lowered_by = "config.STAGE.accumulate (more parts), smaller models (config.model.num_layers)"
    return Part(name, least, most, lowered_by, ("joint/finished.txt",))


def _searching(
    config: ml_collections.ConfigDict, models: Models, sizes: Sizes, host: Host
) -> Iterable[Part]:
    """Yields exact search and rankings, BM25, and ScaNN, whose vectors are float32 in memory."""
    queries, _, depth = needs.measured(config, sizes)
    hits = max(queries * depth, *(math.prod(each) for each in needs.mined(config, sizes).values()))
    size = models.retriever.hidden_size
    asked = 4 * size * max(queries, *(each for each, _ in needs.mined(config, sizes).values()))
    tile = min(index.PASSAGES_PER_TILE, sizes.passages)
    # Two tiles, and on a CPU the scores of a part of the queries, twice.
    block = 2 * 4 * tile * (size + host.cpu * host.devices * index.QUERIES_PER_TILE)
    lowered_by = "config.evaluate.retrieve_depth or config.evaluate.queries"
    least: float = needs.HIT * queries * depth
    most: float = RANKED * hits + 2 * asked + block
    yield Part("exact search and rankings", least, most, lowered_by, ("results.json",))
    words = sizes.passages * sizes.tokens
    least, most = BM25_LEAST * WORDS_LEAST * words, BM25_WORD * words
    if needs.floors(config, sizes)["bm25"]:
        lowered_by, over = "config.evaluate.bm25.most_passages", ("eval/test.bm25.npz",)
        yield Part("BM25", least, most, lowered_by, over)
    elif "bm25" in (*config.mine.sources, config.reranker.teacher):
        over = ("lists/train.retrieved.npz",)
        yield Part("BM25", least, most, "config.mine.sources=('retriever',)", over)
    if "scann" in config.evaluate.indexes:
        given = config.evaluate.scann.memory * GIB
        most = min(
            needs.of_vectors(sizes.passages, size, "float32") * index.BUILT,
            given or index.MEMORY * host.memory,
        )
        lowered_by = "config.evaluate.scann.memory, or config.evaluate.indexes=('exact',)"
        over = ("index/*/rqv2_jax.json",)
        yield Part("ScaNN while it is built, in parts if need be", 0, most, lowered_by, over)


def peak(parts: Iterable[Part], figure: str) -> tuple[float, Part]:
    """Returns the memory at the worst moment, and the largest part then beside the program.

    `figure` is "least" or "most".
    """
    held = [part for part in parts if not part.places]
    later = [part for part in parts if part.places]
    worst = max(later, key=lambda part: getattr(part, figure), default=held[0])
    together = [*held, *[worst] * bool(later)]
    largest = max(together[1:], key=lambda part: getattr(part, figure))
    return sum(getattr(part, figure) for part in together), largest


def short_of_memory(parts: list[Part], available: float, figure: str) -> str:
    """Returns a line that says by what the memory is too small, with the mend; "" if it is not."""
    needed, largest = peak(parts, figure)
    if needed <= available:
        return ""
    return (
        f"the run needs {needed / GIB:.2f} GiB of memory, and the host has {available / GIB:.2f} GiB; "
        f"lower the {getattr(largest, figure) / GIB:.2f} GiB of {largest.name}: {largest.lowered_by}"
    )
