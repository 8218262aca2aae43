"""The benchmarks of rqv2_jax.bench: each yields lines of figures from one run on this machine."""

import pathlib
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rqv2_jax import config as config_lib
from rqv2_jax.models import random_model
from rqv2_jax.recipe.run import Run, open_run
from rqv2_jax.retrieval import encode
from rqv2_jax.tools import accelerator_checks, bench_common, bench_joint, bench_retrieval, machines
from rqv2_jax.tools.bench_common import Texts


class Options(NamedTuple):
    """The flags of rqv2_jax.bench, by their names."""

    lengths: str
    shape: str | None
    vs: str | None
    steps: int
    rounds: int
    passages: int
    vectors: int
    queries: int


def measure(config: ConfigDict, chosen: tuple[str, ...], options: Options) -> Iterator[dict]:
    """Yields the lines of the chosen benchmarks, with what they were measured on.

    Raises:
      InputError: the config cannot be used, or not for what is compared.
    """
    with tempfile.TemporaryDirectory() as folder:
        if options.shape is not None:
            _, config.model.num_layers = random_model.SHAPES[options.shape]
            config.model.weights = str(pathlib.Path(folder) / options.shape)
            random_model.write(options.shape, pathlib.Path(config.model.weights))
        run = open_run(config, pathlib.Path(folder) / "workdir")
        if set(chosen) - {"exact", "index"}:
            # A fourth as many queries as passages.
            sizes = options.passages, options.passages // 4
            yield from _read(run, bench_common.read(run, options.lengths, *sizes), chosen, options)
        width, settings = run.models.retriever.hidden_size, run.config.evaluate.scann
        size, versus = (options.vectors, width, options.queries), options.vs is not None
        if "exact" in chosen:
            yield bench_retrieval.exact(*size, 100, options.rounds, versus)
        if "index" in chosen:
            yield from bench_retrieval.search(*size, 50, settings, versus)


def _read(run: Run, texts: Texts, chosen: tuple[str, ...], options: Options) -> Iterator[dict]:
    """Yields the lines of the benchmarks that read texts."""
    # With what the model folders say where the config as given leaves it open.
    settings, joint = run.config.model, run.config.joint
    model = {"layers": settings.num_layers}
    if settings.reranker.num_layers != settings.num_layers:
        model["reranker_layers"] = settings.reranker.num_layers
    model["dtype"] = settings.dtype
    sizes = {"batch": joint.batch, "list_size": joint.list_size}
    lengths, steps, step_seconds = {"lengths": options.lengths}, options.steps, None
    versus = options.vs is not None
    if "joint" in chosen:
        for line in bench_joint.joint(run, texts, steps, versus):
            step_seconds = line["step_seconds"]
            dropout = {"dropout": settings.dropout}
            yield {"benchmark": "joint"} | model | dropout | lengths | sizes | line
    if "encode" in chosen:
        for line in bench_retrieval.encode_and_rerank(run, texts, options.rounds, versus):
            yield model | lengths | line
    if "mine" in chosen:
        yield model | lengths | bench_retrieval.mine(run, texts, options.rounds, versus)
    if "input" in chosen:
        line = bench_joint.inputs(run, texts, steps, step_seconds)
        yield {"benchmark": "input"} | lengths | sizes | line
    if "agree" in chosen:
        yield from accelerator_checks.agreement(run, texts)
    if "profile" in chosen:
        yield sizes | accelerator_checks.profile(run, texts, steps)
    if "scaling" in chosen:
        for line in _scaling(run, texts, steps):
            yield model | lengths | line


def _scaling(run: Run, texts: Texts, steps: int) -> Iterator[dict]:
    """Yields a joint step's time by size and number of lists, encoding's by passages."""
    common = {"benchmark": "scaling"}
    work = [("list size", size, (2, size)) for size in (8, 16, 32, 64, 128)]
    work += [("lists", batch, (batch, 8)) for batch in (2, 4, 8, 16, 32)]
    for what, count, (batch, size) in work:
        config = config_lib.loads(config_lib.dumps(run.config))
        config.joint.update({"batch": batch, "list_size": size})
        resized = open_run(config, run.workdir)
        (line,) = bench_joint.joint(resized, texts, steps, versus=False)
        rate = {"real_tokens_per_second": line["real_tokens_per_second"]}
        yield common | {"what": what, "count": count, "seconds": line["step_seconds"]} | rate
    tower = run.initial("retriever")["passage"]
    for part in (8, 4, 2, 1):
        rows_N = np.arange(len(texts.passages) // part)
        read = float(run.inputs.passage_lengths(texts.store, rows_N).sum())
        work = partial(encode.passages, run.forward, tower, texts.store, rows_N)
        seconds = machines.seconds(work, 2)[-1]
        line = {"what": "encoded passages", "count": len(rows_N), "seconds": seconds}
        yield common | line | {"real_tokens_per_second": read / seconds}
