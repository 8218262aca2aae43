"""Writes what a run has made in the formats of other systems.

joint-tsv: the hybrid lists of joint training, as the authors' release reads them (query, title, para,
label); the same file can be trained on with --config.joint.lists=FILE --config.joint.epochs=1.

Example:
  python -m rqv2_jax.export --workdir workdir/docstrings --format joint-tsv --to lists.tsv
"""

import pathlib

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "A workdir whose candidates have been scored.")
_FORMAT = flags.DEFINE_enum("format", None, ["joint-tsv"], "What to write.")
_TO = flags.DEFINE_string("to", None, "The file to write; gzipped if it ends in .gz.")


def main():
    """Writes the file."""
    from rqv2_jax import pipeline
    from rqv2_jax.workdir import open_workdir

    path = pathlib.Path(_TO.value)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--to {path}: no file of this name can be written; name one in a folder")
    pipeline.export_lists(open_workdir(pathlib.Path(_WORKDIR.value)), path)
    print(f"lists: {path}")


if __name__ == "__main__":
    program.run(main, __doc__, required=("workdir", "format", "to"))
