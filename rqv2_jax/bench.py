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
recipe  the whole recipe in --minutes of training; what it makes stays in --workdir
all     all of them but the last four

--vs torch does the same work in turn with transformers, sentence-transformers, torch and faiss, and
gives ratios (requirements-bench.txt says how to install them); on a GPU the joint step also with
torch.compile.
recipe has a rival of its own, --vs sentence-transformers, which gets the same minutes afterwards.
--shape takes a model of that shape with random weights, so that none needs to lie on disk.

Examples:
  python -m rqv2_jax.bench joint --config configs/docstrings.py --vs torch
  python -m rqv2_jax.bench all --config configs/docstrings.py --lengths msmarco --json bench.jsonl
  python -m rqv2_jax.bench recipe --config configs/docstrings.py --minutes 30 \\
      --vs sentence-transformers --workdir workdir/rivals
  python -m rqv2_jax.bench joint --config configs/msmarco.py --shape bert-base --lengths msmarco
"""

import json
import pathlib

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

BENCHMARKS = ("joint", "encode", "mine", "input", "exact", "index")

_CONFIG = program.define_config()
flags.DEFINE_enum(
    *("lengths", "data", ["data", "msmarco", "full"]),
    "Texts of the config's data; or made up ones, as long as MS MARCO's or as the config admits.",
)
flags.DEFINE_enum(
    "shape", None, ["bert-base", "minilm", "bert-tiny"], "Shape of a model with random weights."
)
flags.DEFINE_enum("vs", None, ["torch", "sentence-transformers"], "What to compare with, in turn.")
flags.DEFINE_float("minutes", 30.0, "Minutes of training of recipe.", 0.1)
flags.DEFINE_string("workdir", None, "Folder of what recipe makes; the same command resumes ours.")
flags.DEFINE_string("json", None, "File that the lines are added to.")
flags.DEFINE_string("plot", None, "PNG file for the figure of scaling.")
flags.DEFINE_integer("steps", 10, "Timed steps of joint and input, at least.", 1)
flags.DEFINE_integer("rounds", 3, "Times that encode, mine and exact do their work.", 1)
flags.DEFINE_integer("passages", 2048, "Passages to read.", 256)
flags.DEFINE_integer("vectors", 1_000_000, "Vectors of exact and index.", 1000)
flags.DEFINE_integer("queries", 2048, "Queries of exact and index.", 1)


def main(benchmark: str = "") -> None:
    """Runs one benchmark, or all, and prints what it measured."""
    known = (*BENCHMARKS, "agree", "profile", "scaling", "recipe", "all")
    if benchmark not in known:
        raise InputError(f"no benchmark {benchmark!r}; choose one of {', '.join(known)}")
    if (benchmark == "recipe") != (flags.FLAGS.workdir is not None):
        raise InputError("--workdir: give it with recipe, and with no other benchmark")
    if flags.FLAGS.vs and (flags.FLAGS.vs == "torch") == (benchmark == "recipe"):
        raise InputError("--vs: recipe has the rival sentence-transformers, all others torch")
    to, plot = program.file_to_write("json"), program.file_to_write("plot")

    from rqv2_jax.tools import bench_recipe, benchmarks, figures

    names = benchmarks.Options._fields
    options = benchmarks.Options(**{name: getattr(flags.FLAGS, name) for name in names})
    chosen, lines = BENCHMARKS if benchmark == "all" else (benchmark,), []
    measured = benchmarks.measure(_CONFIG.value, chosen, options)
    if benchmark == "recipe":
        folder = pathlib.Path(flags.FLAGS.workdir)
        versus = options.vs is not None
        measured = bench_recipe.recipe(_CONFIG.value, folder, flags.FLAGS.minutes, versus)
    for line in measured:
        lines.append(line)
        text = json.dumps(line)
        print(text, flush=True)
        if to is not None:
            with to.open("a") as file:
                file.write(text + "\n")
    if benchmark == "scaling" and plot is not None:
        figures.draw_scaling(lines, plot)


if __name__ == "__main__":
    program.run(main, __doc__, required=("config",), arguments=1)
