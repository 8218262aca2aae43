"""Evaluates every model state of a workdir: retrieves, re-ranks, writes run files and metrics.

Example:
  python -m rqv2_jax.evaluate --workdir workdir/docstrings --split dev --index exact
"""

import pathlib

from absl import flags

from rqv2_jax import program

_WORKDIR = flags.DEFINE_string("workdir", None, "A workdir that rqv2_jax.main has finished.")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "dev", "test"], "Which queries.")
_INDEX = flags.DEFINE_enum("index", "exact", ["exact", "scann"], "How passages are searched.")


def main():
    """Prints the table of the split."""
    from rqv2_jax import pipeline
    from rqv2_jax.data import tokens

    run = pipeline.open_workdir(pathlib.Path(_WORKDIR.value))
    store = tokens.open_store(run.workdir / "data" / "tokens")
    print(pipeline.render(pipeline.evaluate(run, store, _SPLIT.value, (_INDEX.value,))))


if __name__ == "__main__":
    program.run(main, __doc__, required=("workdir",))
