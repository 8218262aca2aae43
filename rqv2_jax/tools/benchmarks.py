"""What rqv2_jax.bench measures of this package: figures from one run on this machine.

Shape suffixes: N sequences, L lists, P passages of a list, Q queries, K depth, D vector size.
"""

import itertools
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from rqv2_jax import config as config_lib
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import packing, tokens
from rqv2_jax.data.batches import KINDS, ListBatches
from rqv2_jax.errors import InputError
from rqv2_jax.models import bert, random_model
from rqv2_jax.recipe.run import Run, open_run
from rqv2_jax.recipe.stage import stage_batches
from rqv2_jax.recipe.texts import open_collection
from rqv2_jax.retrieval import encode, index, rerank, stream
from rqv2_jax.tools import hlo, planning, rivals
from rqv2_jax.training import stages, train

# Steps in a row that are timed before it is the rival's turn.
TURN = 3

# Dimensions in which the vectors of the index benchmark differ.
INTRINSIC = 24
# At which indexes are compared with each other.
RECALLS = (0.9, 0.95, 0.99)

# Share of its peak that a chip is taken to reach in training.
UTILISATION = 0.4


class Texts(NamedTuple):
    """Passages (title, text) and queries, and the same as tokens."""

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

        def made_up(kind, count):
            lengths_N = planning.msmarco_lengths(rng, kind, count)
            lengths_N = lengths_N if lengths == "msmarco" else np.full(count, longest[kind])
            # Two tokens are special ones.
            return [" ".join(rng.choice(random_model.WORDS, length - 2)) for length in lengths_N]

        found = [("", text) for text in made_up("passages", passages)]
        asked = made_up("queries", queries)
    else:
        with tempfile.TemporaryDirectory() as folder:
            collection = open_collection(run.config.data, pathlib.Path(folder))
            found = [(p.title, p.text) for p in itertools.islice(collection.passages(), passages)]
            asked = [q.text for q in itertools.islice(collection.queries("train"), queries)]
    started = time.perf_counter()
    titles, bodies, questions = (run.tokenizer.texts(texts) for texts in (*zip(*found), asked))
    seconds = time.perf_counter() - started
    split = tokens.Queries(questions, asked, np.zeros((3, 0), np.int64))
    ids = [str(i) for i in range(len(found))]
    store = tokens.Store(titles, bodies, ids, {"train": split}, "")
    return Texts(found, asked, store, seconds)


def _lists(texts: Texts, count: int, size: int) -> lists_lib.Lists:
    """Lists of random passages."""
    if size > len(texts.passages):
        raise InputError(
            f"config.joint.list_size is {size}, but there are {len(texts.passages)} passages; raise "
            "--passages or lower it"
        )
    rng = np.random.default_rng(1)
    passages_LxP = np.stack(
        [rng.choice(len(texts.passages), size, replace=False) for _ in range(count)]
    )
    provenance_LxP = np.full(passages_LxP.shape, lists_lib.Provenance.UNDENOISED_NEGATIVE)
    provenance_LxP[:, 0] = lists_lib.Provenance.LABELLED_POSITIVE
    return lists_lib.Lists(np.arange(count) % len(texts.queries), passages_LxP, provenance_LxP)


def joint_batches(run: Run, texts: Texts, steps: int) -> ListBatches:
    """Returns the batches of so many joint steps, of lists of random passages."""
    joint, stage = run.config.joint, stages.make_stage(run.config, run.models, "joint")
    lists = _lists(texts, steps * joint.batch, joint.list_size)
    return stage_batches(run, texts.store, "joint", stage, lists)


def peak(dtype: str) -> float:
    """Returns operations a second of matrix products of one device, best of 5.

    Of 2,048 x 2,048 on a CPU; of 8,192 x 8,192, several in a row, where one small one would take less
    time than to start it. The factors are random: some chips are faster on constant ones.
    """
    size, times = (2048, 1) if jax.default_backend() == "cpu" else (8192, 8)
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: (x @ y) * size**-0.5, x))
    return times * 2 * size**3 / min(_seconds(lambda: product(x).block_until_ready(), 6)[1:])


def _seconds(work: Callable, times: int) -> list[float]:
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return found


def _memory() -> float:
    """GiB: the most this process, rivals included, or if it counts its own, a device, has held."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats["peak_bytes_in_use"] / planning.GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / planning.GIB


def _compiled_over_model(run: Run, compiled, formula: float) -> float | None:
    """None on GPUs and for their kernel, whose products the compiled text does not tell."""
    if jax.default_backend() == "gpu" or run.models.flat:
        return None
    return run.sharding.shards * hlo.cost(compiled.as_text()).flops / formula


class _Taker(NamedTuple):
    """One way to take steps: makes a step's batch on the device; takes the step, returns the loss."""

    prepare: Callable
    take: Callable


def _take_turns(takers: dict[str, _Taker], total: int, turn: int):
    """Returns the seconds and the losses of each taker's steps, `turn` in a row by turns.

    Batches are made before the clock starts, as training makes them ahead. The first step of a turn is
    not counted: memory that went to another in between has to be got back, which can cost as much as
    the step itself; the very first compiles, and comes back apart.
    """
    seconds, losses = ({name: [] for name in takers} for _ in range(2))
    first_seconds = {}
    with tqdm.tqdm(desc="joint", total=total * len(takers), unit="step") as bar:
        for first in range(0, total, turn):
            for name, taker in takers.items():
                made = [taker.prepare(step) for step in range(first, first + turn)]
                for number, batch in enumerate(made):
                    started = time.perf_counter()
                    losses[name].append(taker.take(batch))
                    taken = time.perf_counter() - started
                    if number:
                        seconds[name].append(taken)
                    first_seconds.setdefault(name, taken)
                    bar.update()
    return seconds, losses, first_seconds


def compiled_joint(run: Run, config, batches: ListBatches, steps: int):
    """Returns the compiled joint step, what makes its first state, and the seconds of compiling."""
    stage = stages.make_stage(config, run.models, "joint")
    optimizer = train.make_optimizer(config.optimizer, config.joint, steps, stage.rates)

    def first_state():
        initial = {model: run.initial(model) for model in stage.models}
        return train.init_state(initial, optimizer, run.sharding)

    step_fn = train.make_step(stage.loss_fn, optimizer, run.sharding)
    example = run.sharding.put_batch(batches.make(0))
    started = time.perf_counter()
    compiled = step_fn.lower(first_state(), example, jax.random.key(config.seed)).compile()
    return compiled, first_state, time.perf_counter() - started


def joint(run: Run, texts: Texts, steps: int, versus: bool) -> Iterator[dict]:
    """Measures steps of joint training on lists of random passages, at a constant learning rate.

    Yields one result, or one for each rival, which takes the same steps, some in a row by turns.
    """
    config = config_lib.loads(config_lib.dumps(run.config))
    settings = config.joint
    alike = settings.train_reranker and settings.loss.reranker_loss == "listwise"
    if versus and (settings.in_batch_weight or not alike):
        raise InputError(
            "--vs torch: the rival trains both models, listwise and without in-batch negatives; leave "
            "config.joint.{in_batch_weight,train_reranker,loss.reranker_loss} as they are"
        )
    settings.update({"schedule": "constant", "warmup_steps": 0})
    # Alone, ours is never interrupted.
    turn = 1 + (min(TURN, steps) if versus else steps)
    total = turn * -(-steps // (turn - 1))
    batches = joint_batches(run, texts, total)
    sequences = [{kind: batches.ragged(kind, step) for kind in KINDS} for step in range(total)]
    compiled, first_state, compile_seconds = compiled_joint(run, config, batches, total)
    key, state = jax.random.key(config.seed), None

    def prepare(step):
        return jax.block_until_ready(run.sharding.put_batch(batches.make(step)))

    def ours(batch):
        nonlocal state
        state, terms = compiled(state, batch, key)
        return float(terms["loss"])

    others = rivals.joint(run, run.initial("reranker")["head"]) if versus else {}
    for name, make in others.items() if versus else [(None, None)]:
        takers = {"ours": _Taker(prepare, ours)}
        if name is not None:
            rival = make()
            takers[name] = _Taker(lambda step, r=rival: r.prepare(sequences[step]), rival.step)
        state = first_state()
        taken, losses, first_seconds = _take_turns(takers, total, turn)
        found = _work_of_a_step(run, config, batches, sequences, float(np.median(taken["ours"])))
        model_flop = found["model_gflop"] * 1e9
        found |= {
            "step_seconds_slowest": max(taken["ours"]),
            "compile_seconds": compile_seconds,
            "step_memory_gib": planning.program_memory(compiled) / planning.GIB,
            "peak_memory_gib": _memory(),
            "compiled_over_model_flop": _compiled_over_model(run, compiled, model_flop),
            "losses": losses["ours"],
        }
        if name is not None:
            found |= {"rival": name} | _against(name, "step_seconds", taken[name], taken["ours"])
            found |= {f"{name}_first_step_seconds": first_seconds[name]}
            found |= {f"{name}_losses": losses[name]}
        yield found


def _work_of_a_step(run: Run, config, batches: ListBatches, sequences, seconds: float) -> dict:
    """Returns what a step computes and how fast that is, the mean over all steps."""
    settings, steps = config.joint, len(sequences)
    ragged = [x for each in sequences for x in each.values()]
    real = sum(len(x.tokens) for x in ragged) / steps
    padded = sum(len(x.lengths_N) * x.lengths_N.max() for x in ragged) / steps
    flops = sum(
        planning.training_flops(config, run.models, "joint", kind, x.lengths_N)
        for each in sequences
        for kind, x in each.items()
    )
    flops /= steps
    shards = len(batches.slots_SxB)
    computed = shards * sum(map(packing.size, batches.shapes.values()))
    return {
        "step_seconds": seconds,
        "lists_per_second": settings.batch / seconds,
        "pairs_per_second": settings.batch * settings.list_size / seconds,
        "real_tokens": real,
        "real_tokens_per_second": real / seconds,
        "computed_over_real_tokens": computed / real,
        "padded_over_real_tokens": padded / real,
        "model_gflop": flops / 1e9,
        **_shares_of_peak(run, flops / seconds),
        "parts": shards // run.sharding.shards,
    }


def _shares_of_peak(run: Run, rate: float) -> dict:
    """Returns model FLOPs a second over the measured peak, and over the maker's if that is known."""
    best, chip = peak(run.config.model.dtype), planning.chip(jax.devices()[0])
    rate /= run.sharding.shards
    found = {"peak_gflop_per_second": best / 1e9, "share_of_peak": rate / best}
    if chip is not None and run.config.model.dtype == "bfloat16":
        found["share_of_makers_peak"] = rate / planning.GPUS[chip][1]
    return found


def _in_turn(ours: Callable, theirs: Callable | None, rounds: int):
    """Returns the seconds of every round of ours, and of theirs if there is one.

    Ours has had a round to compile in; theirs gets one to find its memory.
    """
    own, other = [], []
    if theirs is not None:
        theirs()
    for _ in range(rounds):
        own += _seconds(ours, 1)
        if theirs is not None:
            other += _seconds(theirs, 1)
    return own, other


def _against(name: str, what: str, theirs: list[float], ours: list[float]) -> dict:
    """Returns the seconds that `name` takes, and how many times ours they are."""
    seconds = float(np.median(theirs))
    return {f"{name}_{what}": seconds, f"{name}_ratio": seconds / float(np.median(ours))}


def encode_and_rerank(run: Run, texts: Texts, rounds: int, versus: bool) -> list[dict]:
    """Passages to vectors, and pairs to scores; tokenising is part of either."""
    count = len(texts.passages)
    towers, scorer = run.initial("retriever"), run.initial("reranker")
    forward, store, asking = run.forward, texts.store, texts.store.splits["train"].texts
    rows_N = np.arange(count)
    query_rows_N = rows_N % len(texts.queries)

    def encode_all():
        encode.passages(forward, towers["passage"], store, rows_N)

    def score_all():
        rerank.scores(forward, scorer, store, asking, query_rows_N, rows_N[:, None])

    passages = [_joined(passage) for passage in texts.passages]
    pairs = [(texts.queries[row], passage) for row, passage in zip(query_rows_N, passages)]
    rival = rivals.SentenceTransformers(run) if versus else None
    if versus and rivals.device() == "cuda":
        rival.tune(passages, pairs)
    found = []
    for name, ours, lengths_N, layout, theirs in (
        (
            "encode",
            encode_all,
            run.inputs.passage_lengths(store, rows_N),
            encode.layout(forward, store),
            lambda: rival.encode(passages),
        ),
        (
            "re-rank",
            score_all,
            run.inputs.pair_lengths(store, asking, query_rows_N, rows_N),
            rerank.layout(forward, store, asking),
            lambda: rival.rerank(pairs),
        ),
    ):
        first_seconds = _seconds(ours, 1)[0]
        own, other = _in_turn(ours, theirs if versus else None, rounds)
        own = [texts.tokenised_in + seconds for seconds in own]
        seconds = float(np.median(own))
        encoder = run.models.retriever if name == "encode" else run.models.reranker
        flops = planning.forward_flops(encoder, 1, lengths_N)
        computed = sum(
            len(numbers_SxR) * packing.size(shapes)
            for numbers_SxR, shapes in stream.schedule(lengths_N, layout, run.sharding.shards)
        )
        result = {
            "benchmark": name,
            "sequences": count,
            "sequences_per_second": count / seconds,
            "tokenising_share": texts.tokenised_in / seconds,
            "real_tokens_per_second": float(lengths_N.sum()) / seconds,
            "computed_over_real_tokens": computed / float(lengths_N.sum()),
            "model_gflop_per_second": float(flops.sum()) / seconds / 1e9,
            **_shares_of_peak(run, float(flops.sum()) / seconds),
            "first_round_seconds": first_seconds,
            "peak_memory_gib": _memory(),
        }
        if rival is not None:
            result |= _against("sentence_transformers", "seconds", other, own)
        found.append(result)
    return found


def _joined(passage: tuple[str, str]) -> str:
    return " ".join(part for part in passage if part)


def mine(run: Run, texts: Texts, rounds: int, versus: bool) -> dict:
    """Candidates from texts: tokenise, encode passages and queries, search, score the first of each."""
    towers, scorer = run.initial("retriever"), run.initial("reranker")
    asking, forward, settings = texts.store.splits["train"].texts, run.forward, run.config.mine
    query_rows_Q = np.arange(len(texts.queries))
    found_QxK = theirs_QxK = None

    def ours():
        nonlocal found_QxK
        passages_NxD = encode.passages(
            forward, towers["passage"], texts.store, np.arange(len(texts.passages))
        )
        queries_QxD = encode.queries(forward, towers["query"], asking, query_rows_Q)
        found_QxK, _ = index.exact(queries_QxD, [passages_NxD], settings.depth)
        first_QxK = found_QxK[:, : settings.scored_depth]
        rerank.scores(forward, scorer, texts.store, asking, query_rows_Q, first_QxK)

    def theirs():
        nonlocal theirs_QxK
        theirs_QxK = rival.mine(texts.queries, passages, settings.depth, settings.scored_depth)

    rival = rivals.SentenceTransformers(run) if versus else None
    passages = [_joined(passage) for passage in texts.passages]
    _seconds(ours, 1)
    own, other = _in_turn(ours, theirs if versus else None, rounds)
    own = [texts.tokenised_in + seconds for seconds in own]
    result = {
        "benchmark": "mine",
        "passages": len(passages),
        "queries": len(texts.queries),
        "scored_pairs": len(texts.queries) * min(settings.scored_depth, len(passages)),
        "seconds": float(np.median(own)),
        "peak_memory_gib": _memory(),
    }
    if rival is not None:
        result |= _against("sentence_transformers", "seconds", other, own)
        result["candidates_in_common"] = index.recall(found_QxK, theirs_QxK)
    return result


def inputs(run: Run, texts: Texts, steps: int, step_seconds: float | None) -> dict:
    """Batches alone, as the training loop gets them."""
    batches = joint_batches(run, texts, steps + 2)
    stream = batches.stream(0)
    next(stream)
    started = time.perf_counter()
    for _ in range(steps):
        next(stream)
    rate = steps * run.config.joint.batch / (time.perf_counter() - started)
    base = bert.BertConfig(
        **random_model.BASE,
        num_layers=12,
        dropout=0.1,
        dtype="bfloat16",
        remat="none",
        attention="plain",
        unrolled=False,
    )
    # A query, 128 passages and as many pairs, at their full lengths.
    sizes = ((1, 32), (128, 128), (128, 160))
    flops = 3 * sum(planning.forward_flops(base, *size) for size in sizes)
    wanted = 32 * UTILISATION * planning.CHIPS["v5e"][1] / flops
    cores = len(os.sched_getaffinity(0))
    found = {
        "lists_per_second": rate,
        "cores": cores,
        "lists_per_second_of_a_v5e_32_at_paper_scale": wanted,
        "cores_to_feed_it": wanted * 128 / (rate * run.config.joint.list_size / cores),
    }
    if step_seconds is not None:
        found["times_what_the_step_takes"] = rate * step_seconds / run.config.joint.batch
    return found


def _clustered(vectors: int, queries: int, size: int):
    """Returns random passage and query vectors [N, D] and [Q, D], drawn alike.

    A vector comes from one of overlapping clusters of about 200 in `INTRINSIC` dimensions, which is
    turned into the space of all, where every coordinate gets noise of its own.
    """
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(vectors // 200, 1), INTRINSIC)).astype(np.float32)
    turn = (rng.normal(size=(INTRINSIC, size)) / INTRINSIC**0.5).astype(np.float32)
    found_NxD = np.empty((vectors + queries, size), np.float32)
    for first in range(0, len(found_NxD), 2**16):
        part = found_NxD[first : first + 2**16]
        place = centres[rng.integers(0, len(centres), len(part))]
        place += 0.7 * rng.standard_normal(place.shape, np.float32)
        part[:] = place @ turn + 0.2 * rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return np.split(found_NxD, [vectors])


def exact(vectors: int, size: int, queries: int, depth: int, rounds: int, versus: bool) -> dict:
    """Exact search over random vectors in this host's memory, against torch's product and topk."""
    passages_NxD, queries_QxD = _clustered(vectors, queries, size)

    def ours():
        return index.exact(queries_QxD, [passages_NxD], depth)[0]

    rows_QxK = ours()
    found = {"benchmark": "exact", "vectors": vectors, "dimensions": size, "depth": depth}
    theirs = rivals.exact_search(passages_NxD, queries_QxD, depth) if versus else None
    own, other = _in_turn(ours, theirs, rounds)
    seconds = float(np.median(own))
    bytes_read = passages_NxD.nbytes
    found |= {"queries": queries, "seconds": seconds, "gb_per_second": bytes_read / seconds / 1e9}
    if versus:
        found |= _against("torch", "seconds", other, own)
        found["found_in_common"] = index.recall(theirs(), rows_QxK)
    return found


def search(vectors: int, size: int, queries: int, depth: int, settings, versus: bool) -> list[dict]:
    """Exact search, ScaNN and rivals on random vectors, the queries drawn as the passages are."""
    passages_NxD, queries_QxD = _clustered(vectors, queries, size)
    index.exact(queries_QxD, [passages_NxD[: index.PASSAGES_PER_TILE]], depth)
    started = time.perf_counter()
    exact_QxK, _ = index.exact(queries_QxD, [passages_NxD], depth)
    exact_rate = queries / (time.perf_counter() - started)
    common = {"benchmark": "index", "vectors": vectors, "dimensions": size, "depth": depth}
    found = [common | {"index": "exact", "queries_per_second": exact_rate}]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        searcher = index.build_scann([passages_NxD], settings, depth, pathlib.Path(folder), "")
        built = time.perf_counter() - started

    def approximate(leaves):
        return index.scann_search(searcher, queries_QxD, depth, leaves)[0]

    searches = {"as configured": lambda: approximate(None)}
    if vectors >= settings.brute_force_below:
        searches |= {f"{n} leaves": lambda n=n: approximate(n) for n in (8, 32, 64, 128)}
    candidates = [("ScaNN", built, searches)]
    if versus:
        candidates += rivals.faiss_indexes(passages_NxD, queries_QxD, depth)
    for name, built, searches in candidates:
        for setting, search in searches.items():
            search()
            started = time.perf_counter()
            rows_QxK = search()
            rate = queries / (time.perf_counter() - started)
            found.append(
                common
                | {"index": name, "setting": setting, "build_seconds": built}
                | {f"recall@{depth}": index.recall(rows_QxK, exact_QxK)}
                | {"queries_per_second": rate, "ratio_to_exact": rate / exact_rate}
            )
    return found + [common | {"recall": least} | _fastest(found, depth, least) for least in RECALLS]


def _fastest(found: list[dict], depth: int, least: float) -> dict:
    """By index, the most queries a second of the settings with this recall; None if there are none."""
    rates: dict = {line["index"]: None for line in found if line["index"] != "exact"}
    for line in found:
        if line.get(f"recall@{depth}", 0.0) >= least:
            rates[line["index"]] = max(rates[line["index"]] or 0.0, line["queries_per_second"])
    return {"queries_per_second_by_index": rates}


def scaling(run: Run, texts: Texts, steps: int) -> list[dict]:
    """How a joint step grows with the list's size and the number of lists, encoding with passages."""

    def step_seconds(batch, size):
        config = config_lib.loads(config_lib.dumps(run.config))
        config.joint.update({"batch": batch, "list_size": size})
        (found,) = joint(open_run(config, run.workdir), texts, steps, versus=False)
        return found["step_seconds"], found["real_tokens_per_second"]

    work = [("list size", size, (2, size)) for size in (8, 16, 32, 64, 128)]
    work += [("lists", batch, (batch, 8)) for batch in (2, 4, 8, 16, 32)]
    found = []
    for what, count, sizes in work:
        seconds, rate = step_seconds(*sizes)
        line = {"benchmark": "scaling", "what": what, "count": count, "seconds": seconds}
        found.append(line | {"real_tokens_per_second": rate})
    tower = run.initial("retriever")["passage"]
    for part in (8, 4, 2, 1):
        rows_N = np.arange(len(texts.passages) // part)
        lengths_N = run.inputs.passage_lengths(texts.store, rows_N)
        seconds = _seconds(lambda r=rows_N: encode.passages(run.forward, tower, texts.store, r), 2)
        line = {"benchmark": "scaling", "what": "encoded passages", "count": len(rows_N)}
        rate = float(lengths_N.sum()) / seconds[-1]
        found.append(line | {"seconds": seconds[-1], "real_tokens_per_second": rate})
    return found
