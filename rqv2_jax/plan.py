"""Plans a run before anything is rented: will it fit, how fast can it be, what will it store?

Compiles the run's own training, encoding and re-ranking steps ahead of time for a TPU slice that is not
there (pip install -r requirements-tpu.txt) or for CPU devices; for GPUs, as h100:8, they are counted.
Every input has its full length, so that any texts fit; --lengths msmarco counts what is computed of
texts as long as MS MARCO's. Of the ways to make training fit it tries the cheapest first. --overlay
writes what it chose as a flag file. What cannot fit in the hosts' memory, or on the disk of the folder
--disk, is an error, with --force a warning.

Examples:
  python -m rqv2_jax.plan --config configs/nq.py --topology v5e:4x8 --overlay v5e.flags
  python -m rqv2_jax.main --config configs/nq.py --workdir DIR --flagfile v5e.flags
"""

import os
import pathlib

from absl import flags

from rqv2_jax import program, room

_CONFIG = program.define_config()
flags.DEFINE_string(
    "topology", None, "v4, v5e, v5p or v6e with a shape; h100, h200, a100, l4 or cpu with a number."
)
flags.DEFINE_string("overlay", None, "File for the chosen settings, for --flagfile.")
_LENGTHS = flags.DEFINE_enum(
    "lengths", "full", ["full", "msmarco"], "The longest that are admitted, or MS MARCO's."
)
_QUERIES = flags.DEFINE_integer("queries", None, "Training queries; known for published data.")
_PASSAGES = flags.DEFINE_integer("passages", None, "Passages; known for published data.")
_DISK = flags.DEFINE_string(
    "disk", None, "A folder on the disk of the workdir; not compared if not given."
)
_FORCE = program.define_force()


def main() -> None:
    """Prints the plan."""
    overlay = program.file_to_write("overlay")
    config, topology, lengths = _CONFIG.value, flags.FLAGS.topology, _LENGTHS.value
    shape = topology.partition(":")[2]
    if shape.isdecimal():
        # Read when jax is first imported.
        count = f"--xla_force_host_platform_device_count={shape}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    # An installed libtpu would look for the metadata server of a cloud that this is not.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-8"
    from rqv2_jax.errors import InputError
    from rqv2_jax.tools import machines, planning

    # Before anything is compiled.
    planning.sizes(config, _QUERIES.value, _PASSAGES.value)
    free = None if _DISK.value is None else room.free_disk(pathlib.Path(_DISK.value))
    machine = machines.machine(topology)
    plan = planning.make(config, machine, lengths, report=print)
    print(planning.render(plan, machine, lengths))
    sizes = planning.sizes(plan.config, _QUERIES.value, _PASSAGES.value, lengths)
    text, faults = planning.render_run(plan.config, plan, machine, sizes, free)
    print(text)
    for line in faults.values() if _FORCE.value else ():
        print(f"\nwarning: {line}")
    if faults and not _FORCE.value:
        raise InputError(f"{'; and '.join(faults.values())}; --force goes on all the same")
    if overlay is not None:
        lines = [f"--config.{key}={value}" for key, value in plan.overlay.items()]
        overlay.write_text("\n".join(lines) + "\n")
        print(f"\nsettings: {overlay}")


if __name__ == "__main__":
    program.run(main, __doc__, required=("config", "topology"))
