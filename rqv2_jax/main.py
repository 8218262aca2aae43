"""Trains a retriever and a re-ranker jointly, and evaluates every step on the way.

On several hosts (a TPU slice, GPU nodes) start the same command with --distributed on each. Workdir,
data and weights lie on a file system that all hosts see; the mesh must take all their devices.

Examples:
  python -m rqv2_jax.main --config configs/docstrings.py:quick --workdir workdir/docstrings
  python -m rqv2_jax.main --config configs/nq.py --workdir /shared/nq --distributed \\
      --config.mesh.data=32
"""

import pathlib

from absl import flags

from rqv2_jax import program

_CONFIG = program.define_config()
flags.DEFINE_string("workdir", None, "Folder of everything this run writes.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the processes of the other hosts.")
_FORCE = program.define_force()


def main() -> None:
    """Runs the pipeline in the workdir, on all hosts."""
    # TensorFlow and JAX take seconds to import; a wrong flag should not.
    from rqv2_jax import hosts

    with hosts.joined(_DISTRIBUTED.value):
        from rqv2_jax.recipe import pipeline
        from rqv2_jax.tools import report_page

        workdir = pathlib.Path(flags.FLAGS.workdir)
        pipeline.main(_CONFIG.value, workdir, force=_FORCE.value)
        print(report_page.write_at_end(workdir))


if __name__ == "__main__":
    program.run(main, __doc__, required=("config", "workdir"))
