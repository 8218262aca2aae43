"""Writes what a run, two runs or a set of ablations have recorded as something to look at.

Of a workdir, finished or not: one HTML page, which needs no other file, with the verdict in words,
tables, curves, scores of both models, queries won and lost, what denoising dropped. With --against the
same of two workdirs side by side, and their differences on the same queries. Of the folder of
rqv2_jax.ablations: PNG files of joint training and of RR@10 against list size, in its `report/`.
Data or weights that have moved since are given as --data, --weights, --reranker_weights.

Examples:
  python -m rqv2_jax.report --workdir workdir/docstrings
  python -m rqv2_jax.report --workdir workdir/new --against workdir/old --to compared.html
"""

import pathlib

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

program.define_workdir("A workdir, or the folder of rqv2_jax.ablations.")
flags.DEFINE_string("against", None, "Another workdir to compare with.")
flags.DEFINE_string("to", None, "The page; else report.html in the workdir, or compared.html.")


def main() -> None:
    """Writes the page, or draws the figures of ablations, and prints the files' names."""
    folder, against = pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.against
    to = program.file_to_write("to")
    if (folder / "warm").is_dir():
        if against or to:
            raise InputError(
                f"--workdir {folder}: is a folder of ablations, which --against and --to are not for; "
                "give one of its rows/"
            )
        from rqv2_jax.tools import figures

        figures.draw(folder)
        return

    from rqv2_jax.recipe.claim import open_workdir
    from rqv2_jax.tools import report_page

    other = open_workdir(pathlib.Path(against)) if against else None
    print(report_page.write(program.open_run(), other, to))


if __name__ == "__main__":
    program.run(main, __doc__, required=("workdir",))
