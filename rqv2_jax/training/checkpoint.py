"""Checkpoints of a training stage; the only module that imports orbax.

A stage's folder holds `last/<step>` (the whole training state, to resume from; while it trains, the
one before too) and `best/<step>/<model>` (the params that did best on dev, with `score`: their metric
and its value). Beside them `last.sums.json` and `best.sums.json` have the checksum of every file, as
neither orbax nor its files tell a flipped bit.
On several hosts all processes call all functions, and orbax writes the share of each.
"""

import json
import pathlib

import jax
import orbax.checkpoint as ocp
import tqdm

from rqv2_jax import artifacts, hosts
from rqv2_jax.errors import InputError, one_line, readable
from rqv2_jax.training.sharding import Tree


def _abstract(tree: Tree) -> Tree:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


class Checkpoints:
    """The checkpoints of one stage. `save_last` returns while it is written; `close` waits for that."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        self._last, self._best = self._open("last", 2), self._open("best", 1)

    def _open(self, kind: str, kept: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=kept)
        return ocp.CheckpointManager(self.folder / kind, options=options)

    def restore_last(self, state: Tree) -> Tree:
        """Returns the last saved state in the shapes and shardings of `state`, or else `state` itself.

        If it is damaged, a line says so, it is deleted, and the one before is restored. If that is
        damaged too, all of the stage's checkpoints are deleted. Raises InputError if it has other
        shapes.
        """
        steps = hosts.from_first(lambda: sorted(self._last.all_steps(), reverse=True))
        for step in steps:
            path = self.folder / "last" / str(step)
            try:
                _check_sums(path)
                return self._last.restore(step, args=ocp.args.StandardRestore(_abstract(state)))
            except Exception as e:
                # Orbax and tensorstore have no exception of their own for damaged files.
                if self._has_other_shapes(step, state):
                    raise InputError(
                        f"{path}: cannot be restored ({one_line(e)}); delete {self.folder} to train "
                        "this stage again"
                    ) from e
                instead = (
                    "this stage is trained again" if step == steps[-1] else "the one before is"
                )
                tqdm.tqdm.write(f"{path}: cannot be read ({one_line(e)}); {instead}")
            self._last.delete(step)
            # Orbax remembers of the newest what items a checkpoint has.
            self._last.close()
            self._last = self._open("last", 2)
        for saved in self._best.all_steps():
            self._best.delete(saved)
        return state

    def _has_other_shapes(self, step: int, state: Tree) -> bool:
        """Says whether a checkpoint can be read and is of another state."""
        try:
            saved = jax.tree.leaves(self._last.item_metadata(step))
            shapes = [x.shape for x in jax.tree.leaves(state)]
            # A checkpoint that has lost its list of arrays has none.
            return bool(saved) and [x.shape for x in saved] != shapes
        except Exception:
            return False

    def save_last(self, step: int, state: Tree) -> None:
        """Saves the state of `step`, and keeps the one before."""
        if step != self._last.latest_step():
            self._seal_last()
            self._last.save(step, args=ocp.args.StandardSave(state))

    def _seal_last(self) -> None:
        """Waits for the state that is being written, and records its checksums."""
        self._last.wait_until_finished()
        _record_sums(self.folder / "last")

    def finish(self) -> None:
        """Deletes all states but the last, of a stage that has ended."""
        self._seal_last()
        for step in sorted(self._last.all_steps())[:-1]:
            self._last.delete(step)

    def save_best(self, step: int, params: Tree, metric: str, score: float) -> None:
        """Saves params (keyed by model) in place of the best so far, if they score higher.

        A step that is evaluated again, by a run that resumes, is not saved again.
        """

        def is_better() -> bool:
            best = self.best_score()
            return best is None or (score > best and step not in self._best.all_steps())

        if not hosts.from_first(is_better):
            return
        self._best.wait_until_finished()
        self._best.save(
            step,
            args=ocp.args.Composite(
                score=ocp.args.JsonSave({"metric": metric, "score": score}),
                **{model: ocp.args.StandardSave(tree) for model, tree in params.items()},
            ),
            force=True,
        )
        self._best.wait_until_finished()
        _record_sums(self.folder / "best")

    def best_score(self) -> float | None:
        """Returns the dev score of the best params; None if there are none, or none can be read."""
        step = self._best.latest_step()
        if step is None:
            return None
        path = self.folder / "best" / str(step) / "score" / "metadata"
        return readable(path, lambda: json.loads(path.read_text())["score"])

    def close(self) -> None:
        """Waits for checkpoints that are still being written."""
        self._seal_last()
        self._last.close()
        self._best.close()


def _read_sums(folder: pathlib.Path) -> dict[str, dict[str, int]]:
    """Returns the checksums of files by the step of their checkpoint; made again if damaged."""
    path = folder.with_name(f"{folder.name}.sums.json")
    if not path.is_file():
        return {}
    known = readable(path, lambda: json.loads(path.read_text()))
    return _write_sums(folder, {}) if known is None else known


def _write_sums(
    folder: pathlib.Path, known: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Writes and returns the checksums of a folder's checkpoints, of which some are known."""
    steps = [path for path in folder.glob("*") if path.name.isdigit()]
    sums = {path.name: known.get(path.name) or artifacts.checksums(path) for path in steps}
    artifacts.replace_text(folder.with_name(f"{folder.name}.sums.json"), json.dumps(sums) + "\n")
    return sums


def _record_sums(folder: pathlib.Path) -> None:
    """Keeps the checksums of the checkpoints in a folder, which are complete."""

    def record() -> None:
        _write_sums(folder, _read_sums(folder))

    hosts.from_first(record)


def _check_sums(path: pathlib.Path) -> None:
    """Raises ValueError if a file of a checkpoint is not as it was written, as far as that is known."""

    def changed() -> str:
        known = _read_sums(path.parent).get(path.name)
        found = artifacts.checksums(path) if known else known
        return "" if found == known else _first_difference(known or {}, found or {})

    if name := hosts.from_first(changed):
        raise ValueError(f"{name} is not as it was written")


def _first_difference(known: dict[str, int], found: dict[str, int]) -> str:
    return min(name for name in known | found if known.get(name) != found.get(name))


def best_step(folder: pathlib.Path) -> int:
    """Returns the step of a stage's best params; raises InputError if it has none."""
    steps = hosts.from_first(
        lambda: sorted(int(p.name) for p in (folder / "best").glob("*") if p.name.isdigit())
    )
    if not steps:
        raise InputError(f"{folder}: holds no checkpoint; run rqv2_jax.main on this workdir first")
    return steps[-1]


def restore_best(folder: pathlib.Path, model: str, params: Tree) -> Tree:
    """Returns a model's best params of a stage, shaped and placed as `params`; else InputError."""
    path = folder.resolve() / "best" / str(best_step(folder)) / model
    try:
        _check_sums(path.parent)
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, _abstract(params))
    except Exception as e:
        # Orbax and tensorstore have no exception of their own for damaged files.
        raise InputError(
            f"{path}: cannot be restored ({one_line(e)}); delete {folder} to train it again"
        ) from e
