"""Evaluates every model state of a workdir, or compares two run files.

The first form retrieves, re-ranks, writes run files and metrics. The second takes any two TREC run
files and qrels (TREC, MS MARCO or BEIR) and prints differences, 95% intervals and paired p-values.

Examples:
  python -m rqv2_jax.evaluate --workdir workdir/docstrings --split dev --index exact
  python -m rqv2_jax.evaluate --compare A.trec B.trec --qrels qrels/test.tsv
"""

import pathlib

from absl import flags

from rqv2_jax import program

_WORKDIR = flags.DEFINE_string("workdir", None, "A workdir that rqv2_jax.main has finished.")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "dev", "test"], "Which queries.")
_INDEX = flags.DEFINE_enum("index", "exact", ["exact", "scann"], "How passages are searched.")
_COMPARE = flags.DEFINE_bool("compare", False, "Compare the two run files given as arguments.")
_QRELS = flags.DEFINE_string("qrels", None, "With --compare: file of relevance labels.")


def main(*files: str):
    """Prints the table of the split, or of the comparison."""
    from rqv2_jax.errors import InputError

    if not _COMPARE.value:
        if files:
            raise InputError(f"unexpected argument {files[0]!r}; --help shows an example")
        if _WORKDIR.value is None:
            raise InputError("--workdir is missing; --help shows an example")
        return _evaluate(pathlib.Path(_WORKDIR.value))
    if len(files) != 2 or _QRELS.value is None:
        raise InputError("--compare takes two run files and --qrels FILE; --help shows an example")
    return _compare(*files)


def _evaluate(workdir: pathlib.Path):
    from rqv2_jax import evaluation
    from rqv2_jax.data import tokens
    from rqv2_jax.workdir import open_workdir

    run = open_workdir(workdir)
    store = tokens.open_store(run.workdir / "data" / "tokens")
    print(evaluation.render(evaluation.evaluate(run, store, _SPLIT.value, (_INDEX.value,))))


def _compare(a: str, b: str):
    from rqv2_jax import compare
    from rqv2_jax import config as config_lib

    defaults = config_lib.default()
    rows, queries = compare.compare(
        pathlib.Path(a),
        pathlib.Path(b),
        pathlib.Path(_QRELS.value),
        names=defaults.evaluate.metrics,
        permutations=defaults.evaluate.permutations,
        seed=defaults.seed,
    )
    print(compare.render(rows, queries, a, b))


if __name__ == "__main__":
    program.run(main, __doc__, arguments=2)
