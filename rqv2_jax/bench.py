"""Measures speed on this machine: one JSON line for each benchmark, all figures from one run.

joint   steps of joint training, on lists of random passages
encode  passages to vectors and pairs to scores, tokenising included
mine    candidates: encode passages and queries, search, score the first of each
input   the batches of joint training alone
index   exact search and ScaNN, on clustered random vectors
scaling time of a joint step by size and number of lists, of encoding by passages; --plot draws it
all     all of them but scaling

--vs torch does the same work in turn with transformers, sentence-transformers and faiss, and gives
ratios (pip install -r requirements-bench.txt).

Examples:
  python -m rqv2_jax.bench joint --config configs/docstrings.py --vs torch
  python -m rqv2_jax.bench all --config configs/docstrings.py --lengths msmarco --json bench.jsonl
"""

import json
import pathlib
import tempfile

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

BENCHMARKS = ("joint", "encode", "mine", "input", "index")

_LENGTHS = flags.DEFINE_enum(
    "lengths", "data", ["data", "msmarco"], "Texts of the config's data, or as long as MS MARCO's."
)
_VERSUS = flags.DEFINE_enum("vs", None, ["torch"], "What to compare with, in turn.")
flags.DEFINE_string("json", None, "File that the lines are added to.")
flags.DEFINE_string("plot", None, "PNG file for the figure of scaling.")
_STEPS = flags.DEFINE_integer(
    "steps", 10, "Steps of joint and input that are timed, at least.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "Times that encode and mine do their work.", lower_bound=1
)
_PASSAGES = flags.DEFINE_integer("passages", 2048, "Passages to read.", lower_bound=256)
_VECTORS = flags.DEFINE_integer("vectors", 1_000_000, "Vectors of index.", lower_bound=1000)
_QUERIES = flags.DEFINE_integer("queries", 2048, "Queries of index.", lower_bound=1)


def main(benchmark: str = ""):
    """Runs one benchmark, or all, and prints what it measured."""
    if benchmark not in (*BENCHMARKS, "scaling", "all"):
        raise InputError(
            f"no benchmark {benchmark!r}; choose one of {', '.join(BENCHMARKS)}, scaling, all"
        )
    to, plot = program.file_to_write("json"), program.file_to_write("plot")

    from rqv2_jax import benchmarks
    from rqv2_jax.report import draw_scaling
    from rqv2_jax.workdir import open_run

    config, versus = flags.FLAGS.config, _VERSUS.value is not None
    chosen = BENCHMARKS if benchmark == "all" else (benchmark,)
    sizes = {"batch": config.joint.batch, "list_size": config.joint.list_size}

    def report(found):
        line = json.dumps(found)
        print(line, flush=True)
        if to is not None:
            with to.open("a") as file:
                file.write(line + "\n")

    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, pathlib.Path(folder) / "workdir")
        # As the model folders have it, where the config leaves it open.
        config = run.config
        layers = {"layers": config.model.num_layers}
        if config.model.reranker.num_layers != config.model.num_layers:
            layers["reranker_layers"] = config.model.reranker.num_layers
        model = layers | {"dtype": config.model.dtype}
        step_seconds = None
        if set(chosen) - {"index"}:
            texts = benchmarks.read(run, _LENGTHS.value, _PASSAGES.value, _PASSAGES.value // 4)
        if "joint" in chosen:
            found = benchmarks.joint(run, texts, _STEPS.value, versus)
            step_seconds = found["step_seconds"]
            dropout = {"dropout": config.model.dropout, "lengths": _LENGTHS.value}
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
        if "scaling" in chosen:
            lines = benchmarks.scaling(run, texts, _STEPS.value)
            for line in lines:
                report(model | {"lengths": _LENGTHS.value} | line)
            if plot is not None:
                draw_scaling(lines, plot)
        if "index" in chosen:
            width = run.models.retriever.hidden_size
            scann = config.evaluate.scann
            for found in benchmarks.search(
                _VECTORS.value, width, _QUERIES.value, 50, scann, versus
            ):
                report(found)


if __name__ == "__main__":
    program.define_config()
    program.run(main, __doc__, required=("config",), arguments=1)
