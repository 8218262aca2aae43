"""The folder of a run: one process at a time works in it, and its stages leave marks of their state."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import socket
import time
import uuid
from collections.abc import Iterator

import tqdm

from rqv2_jax import artifacts, hosts
from rqv2_jax.errors import InputError

# Files in a stage's folder: what it is trained on, with a name of its own; and that it has ended.
BEGUN, FINISHED = "begun.txt", "finished.txt"
# The file that a process has locked that works in the workdir.
LOCK = ".lock"
# What a workdir makes before joint training, and its evaluation of the states before.
WARM = (
    *("data", "budget.json", "retriever", "reranker", "vectors/zero_shot", "vectors/retriever"),
    *("lists/*.retrieved.npz", "lists/*.scores", "eval/test.zero_shot.*.npz"),
    *("eval/test.retriever.*.npz", "eval/test.reranker.*.npz", "vectors/released"),
    *("eval/test.released.npz", "eval/test.bm25.npz"),
)


@contextlib.contextmanager
def alone(workdir: pathlib.Path, *, reads: bool = False) -> Iterator[None]:
    """Keeps every other process from working in a workdir, which is made if it is not there.

    One that only `reads` lets others read. The lock ends with its process, however that ends; its file
    names the process. Raises InputError if another process works in the workdir, or it cannot be
    written.
    """
    lock = hosts.from_first(lambda: _lock(workdir, reads))
    try:
        yield
    finally:
        if hosts.first() and lock is not None:
            if not reads:
                os.ftruncate(lock, 0)
            os.close(lock)


def _lock(workdir: pathlib.Path, reads: bool) -> int | None:
    """Returns the open file, locked until it is closed; None for a reader of what nobody can write."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Network file systems lock only files that are open for writing.
        lock = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        if reads and workdir.is_dir():
            return None
        raise InputError(f"--workdir {workdir}: cannot be made ({e}); give another one") from e
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if reads else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as e:
        owner = os.pread(lock, 200, 0).decode(errors="replace").strip()
        os.close(lock)
        raise InputError(
            f"--workdir {workdir}: another process works in it ({owner or 'one that reads'}); wait "
            "until that has ended, or give another one"
        ) from e
    except OSError as e:
        tqdm.tqdm.write(f"{workdir}: cannot be locked ({e}); run nothing else in it meanwhile")
    os.ftruncate(lock, 0)
    if not reads:
        since = time.strftime("%Y-%m-%d %H:%M")
        os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
    return lock


def begun(folder: pathlib.Path) -> list[str]:
    """Returns the digest of what a stage is trained on, and its name; nothing if it has not begun.

    Nor if the mark is damaged, as a power failure may leave it.
    """
    path = folder / BEGUN

    def read() -> list[str]:
        words = path.read_text(errors="replace").split() if path.is_file() else []
        return words if len(words) == 2 else []

    return hosts.from_first(read)


def begin(folder: pathlib.Path, trained_on: str) -> None:
    """Marks a stage as begun; raises InputError if it has begun with something else."""
    mark = begun(folder)
    if not mark:
        hosts.from_first(lambda: _forget(folder))
        artifacts.write_text(folder / BEGUN, f"{trained_on} {uuid.uuid4().hex}\n")
    elif mark[0] != trained_on:
        raise InputError(
            f"{folder}: was trained on other lists, or from other models, than there are now; delete "
            "it to train this stage again"
        )


def _forget(folder: pathlib.Path) -> None:
    """Deletes the checkpoints of a stage whose mark is damaged: nobody knows what they come from."""
    if (folder / BEGUN).exists():
        tqdm.tqdm.write(f"{folder / BEGUN}: cannot be read; this stage is trained again")
        shutil.rmtree(folder)


def finished(folder: pathlib.Path) -> bool:
    """Says whether a stage is marked as finished."""
    return hosts.from_first((folder / FINISHED).is_file)


def finish_stage(folder: pathlib.Path) -> None:
    """Marks a stage as finished."""
    artifacts.write_text(folder / FINISHED, "")


def replace_stage(folder: pathlib.Path, other: pathlib.Path) -> None:
    """Puts a link to another stage's folder in the place of one that `branch` has linked."""
    folder.unlink(missing_ok=True)
    folder.symlink_to(os.path.relpath(other.resolve(), folder.parent.resolve()))


def branch(workdir: pathlib.Path, other: pathlib.Path, patterns: tuple[str, ...] = WARM) -> None:
    """Links into a workdir what another one made before joint training, or by other patterns."""
    for pattern in patterns:
        for path in other.glob(pattern):
            link = workdir / path.relative_to(other)
            link.parent.mkdir(parents=True, exist_ok=True)
            # What the workdir has made again in a link's place stays.
            if not os.path.lexists(link):
                # Relative, so that the folder of both may be moved.
                link.symlink_to(os.path.relpath(path.resolve(), link.parent.resolve()))
