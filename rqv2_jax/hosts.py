"""Runs on several hosts, one process on each; the only module that knows of processes.

All processes run the same program and take the same decisions, so every computation on the mesh is
started by all. They share one workdir on a network file system, and only the first process writes
to it. The others look for a file only after the first has told them that it exists, because a network
file system may for a while report a new file as missing.

If a process is lost, JAX ends the others within minutes; the same command resumes.
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Lets processes wait for hours, as while the first one tokenises. JAX has no public API for that, and
# its collectives time out.
from jax._src import distributed
from jax.experimental import multihost_utils

from rqv2_jax.errors import InputError

FOREVER_MS = 30 * 24 * 3600 * 1000

_numbers = itertools.count()


def start() -> None:
    """Joins the other processes; must be called before anything that looks at devices.

    TPU slices and Slurm tell JAX all it needs. Elsewhere the environment variables
    JAX_COORDINATOR_ADDRESS (`host:port` of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    (from 0) must be set. From here on only the first process prints; the others report errors alone.

    Raises:
      InputError: these variables are missing, or the other processes cannot be reached.
    """
    try:
        count, number = (
            int(os.environ[name]) if name in os.environ else None
            for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        jax.distributed.initialize(num_processes=count, process_id=number)
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"--distributed: {e}; where JAX finds no TPU slice and no Slurm, set "
            "JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID in every process"
        ) from e
    if not first():
        # tqdm reads it when it is imported.
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def first() -> bool:
    """Says whether this process is the one that writes."""
    return jax.process_index() == 0


def from_first(compute: Callable[[], Any]) -> Any:
    """Calls `compute()` in the first process alone and returns its result in all.

    The result must be JSON. Calls must not be nested.

    Raises:
      InputError: `compute` failed in the first process, where its own error is raised.
    """
    if jax.process_count() == 1:
        return compute()
    client, key = distributed.global_state.client, f"rqv2_jax/{next(_numbers)}"
    if not first():
        answer = json.loads(client.blocking_key_value_get(key, FOREVER_MS))
        if not answer:
            raise InputError("the first process has failed; what it printed says why")
        return answer[0]
    answer = []
    try:
        answer.append(compute())
        return answer[0]
    finally:
        client.key_value_set(key, json.dumps(answer))


def check_same(what: str, *arrays: np.ndarray) -> None:
    """Raises InputError unless this process has made the same arrays as the first."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    if from_first(lambda: digest) != digest:
        raise InputError(
            f"{what} of this process differ from those of the first; give all hosts the same packages, "
            "weights and data"
        )


def barrier() -> None:
    """Waits until all processes have called it."""
    if jax.process_count() > 1:
        distributed.global_state.client.wait_at_barrier(f"rqv2_jax/{next(_numbers)}", FOREVER_MS)


def share(count: int) -> range:
    """Returns this process's share of `count` numbers; shares are equal, so some may be too high."""
    processes = jax.process_count()
    return range(jax.process_index(), -(-count // processes) * processes, processes)


def join(results: list[np.ndarray]) -> np.ndarray:
    """Returns the results of all processes for their `share`, stacked in the order of the numbers."""
    local = np.stack(results)
    if jax.process_count() == 1:
        return local
    barrier()
    return multihost_utils.process_allgather(local).swapaxes(0, 1).reshape(-1, *local.shape[1:])
