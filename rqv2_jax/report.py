"""Draws what a run or a set of ablations has recorded, as PNG files in its folder `report/`.

From a workdir: both models' scores on dev, the entropies of their distributions and the terms of the
loss during joint training. From a folder of rqv2_jax.ablations also RR@10 against list size.

Example:
  python -m rqv2_jax.report --workdir workdir/docstrings
"""

import pathlib

from absl import flags

from rqv2_jax import program

flags.DEFINE_string("workdir", None, "A workdir, or the folder of rqv2_jax.ablations.")


def main() -> None:
    """Draws whatever the folder has, and prints the files' names."""
    from rqv2_jax.tools import figures

    figures.draw(pathlib.Path(flags.FLAGS.workdir))


if __name__ == "__main__":
    program.run(main, __doc__, required=("workdir",))
