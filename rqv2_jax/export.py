"""Writes what a run has made in the formats of other systems.

huggingface: a folder with retriever/ and reranker/. The retriever opens with SentenceTransformer, which
knows its pooling, prompts and similarity, and with transformers' BertModel; one with separate towers
(config.model.towers) is query/ and passage/. The re-ranker opens with CrossEncoder, whose scores are
its logits; a pair is a query and a passage's title and text joined by a space.

joint-tsv: the hybrid lists of joint training, as the authors' release reads them (query, title, para,
label); the same file can be trained on with --config.joint.lists=FILE --config.joint.epochs=1 and
--config.joint.list_size as this run has it.

Data or weights that have moved since are given as --data, --weights.

Examples:
  python -m rqv2_jax.export --workdir workdir/docstrings --format huggingface --to models
  python -m rqv2_jax.export --workdir workdir/docstrings --format joint-tsv --to lists.tsv
"""

import pathlib

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

program.define_workdir()
_FORMAT = flags.DEFINE_enum("format", None, ["huggingface", "joint-tsv"], "What to write.")
flags.DEFINE_string("to", None, "The folder or file; a file is gzipped if it ends in .gz.")
_STATE = flags.DEFINE_enum(
    "state", "joint", ["reranker", "joint"], "huggingface: both models warmed up, or joint."
)


def main() -> None:
    """Writes the folder or file, and prints its name."""
    from rqv2_jax.recipe import pipeline
    from rqv2_jax.tools import outputs

    path = pathlib.Path(flags.FLAGS.to)
    if _FORMAT.value == "huggingface" and path.exists():
        raise InputError(f"--to {path}: exists; name a folder that does not")
    program.file_to_write("to")
    with program.opened(reads=lambda _: _FORMAT.value == "huggingface") as run:
        if _FORMAT.value == "huggingface":
            print(outputs.write_models(run, _STATE.value, path))
        else:
            pipeline.export_lists(run, path)
            print(f"lists: {path}")


if __name__ == "__main__":
    program.run(main, __doc__, required=("workdir", "format", "to"))
