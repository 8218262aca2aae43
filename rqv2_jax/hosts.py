"""Runs on several hosts: the only module that knows of processes, one of which runs on each host.

All run the same program and take the same decisions, so that every computation on the mesh is
started by all. They share one workdir, on a file system that all see, into which only the first
process writes, but for a corpus's vectors and for checkpoints, of which each writes its own part. A
process looks for a file only once it is known to be there: a network file system may remember for a
while that it was not.

If a process raises, the others end within seconds and repeat its line; if one is lost, JAX ends them
within minutes. The same command resumes.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np

# JAX's one private name here: it lets processes wait for hours, collectives give up after a while.
from jax._src import distributed
from jax.experimental import multihost_utils

from rqv2_jax.errors import InputError, one_line

# Where a process that has failed says so, and the seconds after which the others look there again.
FAILED, LOOKED_EVERY = "rqv2_jax/failed", 1.0
FOREVER_MS = 30 * 24 * 3600 * 1000

_numbers = itertools.count()
_following = threading.Lock()


def start() -> None:
    """Joins the other processes; must come before anything that looks at devices.

    TPU slices and Slurm tell JAX all it needs. Elsewhere it stands in the environment variables
    JAX_COORDINATOR_ADDRESS (`host:port` of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    (from 0). All processes but the first print nothing but errors from here on. Raises InputError if
    there are no such variables, or the others cannot be reached.
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


@contextlib.contextmanager
def joined(distributed: bool) -> Iterator[None]:
    """Joins the other processes, if asked to; an exception that leaves the block ends them all."""
    if distributed:
        start()
    try:
        if jax.process_count() > 1:
            threading.Thread(target=_watch, daemon=True).start()
        yield
    except Exception as e:
        if jax.process_count() > 1:
            _tell(e)
        raise


def _watch() -> None:
    """Ends this process, wherever it waits, once another has failed."""
    while True:
        time.sleep(LOOKED_EVERY)
        failed = _failed()
        if failed:
            _follow(*failed)


def _failed() -> tuple[int, str] | None:
    """Returns which process has failed first, and its line; None if none has said so."""
    try:
        number, line = json.loads(_coordination().key_value_try_get(FAILED))
    except Exception:
        # There is no such key. If the first process is lost, JAX ends this one.
        return None
    return number, line


def _follow(number: int, line: str) -> None:
    """Ends this process because another has failed; returns if it is that one."""
    if number == jax.process_index():
        return
    # What waits for the one that failed may raise too, in the main thread.
    with _following:
        who = "the first process" if number == 0 else f"process {number}"
        print(f"error: {who} has failed: {line}", file=sys.stderr)
        if first():
            # JAX aborts the others, with pages of traces, if this one is gone before them.
            time.sleep(5 * LOOKED_EVERY)
        _exit()


def _tell(error: Exception) -> None:
    """Says to the other processes that this one has failed, and lets them end before it does."""
    if failed := _failed():
        _follow(*failed)
    # JAX would wait for the others at its end.
    atexit.register(_exit)
    try:
        _coordination().key_value_set(FAILED, json.dumps([jax.process_index(), one_line(error)]))
    except Exception:
        # Another was first.
        return
    time.sleep(3 * LOOKED_EVERY)


def _exit() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _coordination():
    """Returns the client of JAX's coordination service."""
    return distributed.global_state.client


def first() -> bool:
    """Says whether this process is the one that writes."""
    return jax.process_index() == 0


def from_first(compute: Callable[[], Any]) -> Any:
    """Returns what `compute()` returns in the first process, which alone calls it; the others wait.

    The result must be one that JSON holds. Calls must not be nested. If `compute` raises in the first
    process, the others raise InputError.
    """
    if jax.process_count() == 1:
        return compute()
    client, key = _coordination(), f"rqv2_jax/{next(_numbers)}"
    if not first():
        said = json.loads(client.blocking_key_value_get(key, FOREVER_MS))
        if not said:
            raise InputError("the first process has failed; what it printed says why")
        return said[0]
    said = []
    try:
        said.append(compute())
        return said[0]
    finally:
        client.key_value_set(key, json.dumps(said))


def check_same(what: str, *arrays: np.ndarray) -> None:
    """Raises InputError unless these arrays, which every process has made, are the first one's."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    if from_first(lambda: digest) != digest:
        raise InputError(
            f"{what} of this process differ from those of the first; give all hosts the same packages, "
            "weights and data"
        )


def stop_asked(step: int) -> bool:
    """Says, alike in all processes, whether one of several has received SIGTERM before this step.

    JAX has taken over that signal where there are several processes.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def barrier() -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        _coordination().wait_at_barrier(f"rqv2_jax/{next(_numbers)}", FOREVER_MS)


def count() -> int:
    """Returns the number of processes."""
    return jax.process_count()


def span(total: int) -> range:
    """Returns which of `total` numbers this process takes: a range, after those of lower processes."""
    number, processes = jax.process_index(), jax.process_count()
    return range(number * total // processes, (number + 1) * total // processes)


def gather(own: np.ndarray) -> list[np.ndarray]:
    """Returns the arrays of all processes, which have one shape, in the processes' order."""
    if jax.process_count() == 1:
        return [own]
    barrier()
    return list(multihost_utils.process_allgather(own))


def whole(tree: Any) -> Any:
    """Returns arrays in NumPy whose parts may lie on the devices of several processes."""

    def joined(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    barrier()
    return jax.tree.map(joined, tree)
