"""Measures speed on this machine: one JSON line for each benchmark, all figures from one run.

joint   steps of joint training, on lists of random passages
encode  passages to vectors and pairs to scores, tokenising included
mine    candidates: encode passages and queries, search, score the first of each
input   the batches of joint training alone
exact   exact search over clustered random vectors
index   exact search and ScaNN, on the same
agree   scores and gradients on this device against the CPU's
profile the operations of a joint step that take longest
scaling time of a joint step by size and number of lists, of encoding by passages; --plot draws it
all     all of them but the last three

--vs torch does the same work in turn with transformers, sentence-transformers, torch and faiss, and
gives ratios (pip install -r requirements-bench.txt); on a GPU the joint step also with torch.compile.
--shape takes a model of that shape with random weights, so that none needs to lie on disk.

Examples:
  python -m rqv2_jax.bench joint --config configs/docstrings.py --vs torch
  python -m rqv2_jax.bench all --config configs/docstrings.py --lengths msmarco --json bench.jsonl
  python -m rqv2_jax.bench joint --config configs/msmarco.py --shape bert-base --lengths msmarco
"""

import json
import pathlib
import tempfile

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

BENCHMARKS = ("joint", "encode", "mine", "input", "exact", "index")

_LENGTHS = flags.DEFINE_enum(
    *("lengths", "data", ["data", "msmarco", "full"]),
    "Texts of the config's data; or made up ones, as long as MS MARCO's or as the config admits.",
)
_SHAPE = flags.DEFINE_enum(
    "shape", None, ["bert-base", "minilm", "bert-tiny"], "Shape of a model with random weights."
)
_VERSUS = flags.DEFINE_enum("vs", None, ["torch"], "What to compare with, in turn.")
flags.DEFINE_string("json", None, "File that the lines are added to.")
flags.DEFINE_string("plot", None, "PNG file for the figure of scaling.")
_STEPS = flags.DEFINE_integer(
    "steps", 10, "Steps of joint and input that are timed, at least.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "Times that encode, mine and exact do their work.", lower_bound=1
)
_PASSAGES = flags.DEFINE_integer("passages", 2048, "Passages to read.", lower_bound=256)
_VECTORS = flags.DEFINE_integer(
    "vectors", 1_000_000, "Vectors of exact and index.", lower_bound=1000
)
_QUERIES = flags.DEFINE_integer("queries", 2048, "Queries of exact and index.", lower_bound=1)


def main(benchmark: str = ""):
    """Runs one benchmark, or all, and prints what it measured."""
    known = (*BENCHMARKS, "agree", "profile", "scaling", "all")
    if benchmark not in known:
        raise InputError(f"no benchmark {benchmark!r}; choose one of {', '.join(known)}")
    to, plot = program.file_to_write("json"), program.file_to_write("plot")

    from rqv2_jax.models import random_model
    from rqv2_jax.recipe.run import open_run
    from rqv2_jax.report import draw_scaling
    from rqv2_jax.tools import accelerator_checks, benchmarks

    config, versus = flags.FLAGS.config, _VERSUS.value is not None
    chosen = BENCHMARKS if benchmark == "all" else (benchmark,)
    if _SHAPE.value is not None:
        _, config.model.num_layers = random_model.SHAPES[_SHAPE.value]
    sizes = {"batch": config.joint.batch, "list_size": config.joint.list_size}

    def report(found):
        line = json.dumps(found)
        print(line, flush=True)
        if to is not None:
            with to.open("a") as file:
                file.write(line + "\n")

    with tempfile.TemporaryDirectory() as folder:
        if _SHAPE.value is not None:
            config.model.weights = str(pathlib.Path(folder) / _SHAPE.value)
            random_model.write(_SHAPE.value, pathlib.Path(config.model.weights))
        run = open_run(config, pathlib.Path(folder) / "workdir")
        # As the model folders have it, where the config leaves it open.
        config = run.config
        layers = {"layers": config.model.num_layers}
        if config.model.reranker.num_layers != config.model.num_layers:
            layers["reranker_layers"] = config.model.reranker.num_layers
        model = layers | {"dtype": config.model.dtype}
        step_seconds = None
        if set(chosen) - {"exact", "index"}:
            texts = benchmarks.read(run, _LENGTHS.value, _PASSAGES.value, _PASSAGES.value // 4)
        if "joint" in chosen:
            dropout = {"dropout": config.model.dropout, "lengths": _LENGTHS.value}
            for found in benchmarks.joint(run, texts, _STEPS.value, versus):
                step_seconds = found["step_seconds"]
                report({"benchmark": "joint"} | model | dropout | sizes | found)
        if "encode" in chosen:
            for found in benchmarks.encode_and_rerank(run, texts, _ROUNDS.value, versus):
                report(model | {"lengths": _LENGTHS.value} | found)
        if "mine" in chosen:
            found = benchmarks.mine(run, texts, _ROUNDS.value, versus)
            report(model | {"lengths": _LENGTHS.value} | found)
        if "input" in chosen:
            found = benchmarks.inputs(run, texts, _STEPS.value, step_seconds)
            report({"benchmark": "input", "lengths": _LENGTHS.value} | sizes | found)
        if "agree" in chosen:
            for found in accelerator_checks.agreement(run, texts):
                report(found)
        if "profile" in chosen:
            report(sizes | accelerator_checks.profile(run, texts, _STEPS.value))
        if "scaling" in chosen:
            lines = benchmarks.scaling(run, texts, _STEPS.value)
            for line in lines:
                report(model | {"lengths": _LENGTHS.value} | line)
            if plot is not None:
                draw_scaling(lines, plot)
        width = run.models.retriever.hidden_size
        if "exact" in chosen:
            counts = _VECTORS.value, width, _QUERIES.value
            report(benchmarks.exact(*counts, 100, _ROUNDS.value, versus))
        if "index" in chosen:
            scann = config.evaluate.scann
            for found in benchmarks.search(
                _VECTORS.value, width, _QUERIES.value, 50, scann, versus
            ):
                report(found)


if __name__ == "__main__":
    program.define_config()
    program.run(main, __doc__, required=("config",), arguments=1)
