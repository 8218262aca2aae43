"""Checkpoints of a training stage; the only module that imports orbax.

A stage's folder holds `last/<step>` (the whole training state, to resume from; while it trains, the
one before too) and, each model apart, `best/<model>/<step>` (the `params` that did best on dev, and
`score`: the metric and its value for each dev query). Beside each folder of steps a file
`<name>.sums.json` has the checksum of every file, as neither orbax nor its files tell a flipped bit.
On several hosts all processes call all functions, and orbax writes the share of each.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
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
        self._last = self._open("last", 2)
        self._best: dict[str, ocp.CheckpointManager] = {}

    def _open(self, kind: str, kept: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=kept)
        return ocp.CheckpointManager(self.folder / kind, options=options)

    def restore_last(self, shapes: Callable[[], Tree]) -> Tree | None:
        """Returns the last saved state, placed as `shapes()` says; None if there is none.

        If it is damaged, a line says so, it is deleted, and the one before is restored. If that is
        damaged too, all of the stage's checkpoints are deleted. Raises InputError if it has other
        shapes.
        """
        steps = hosts.from_first(lambda: sorted(self._last.all_steps(), reverse=True))
        if not steps:
            return None
        wanted = shapes()
        for step in steps:
            path = self.folder / "last" / str(step)
            try:
                _check_sums(path)
                return self._last.restore(step, args=ocp.args.StandardRestore(_abstract(wanted)))
            except Exception as e:
                # Orbax and tensorstore have no exception of their own for damaged files.
                if self._has_other_shapes(step, wanted):
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
        for model in hosts.from_first(lambda: _models(self.folder)):
            manager = self._best_of(model)
            for saved in manager.all_steps():
                manager.delete(saved)
        return None

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

    def _best_of(self, model: str) -> ocp.CheckpointManager:
        if model not in self._best:
            self._best[model] = self._open(f"best/{model}", 1)
        return self._best[model]

    def save_best(
        self, step: int, params: Tree, metric: str, values: Mapping[str, np.ndarray]
    ) -> None:
        """Saves each model's params in place of its best so far, if they do better on dev.

        `values` are the metric's for the dev queries, by model; `params` is keyed by model too. A step
        that is evaluated again, by a run that resumes, is not saved again.
        """

        def better() -> list[str]:
            return [model for model in params if self._is_better(model, step, values[model])]

        for model in hosts.from_first(better):
            manager, score = self._best_of(model), {"metric": metric, "step": step}
            manager.save(
                step,
                args=ocp.args.Composite(
                    score=ocp.args.JsonSave(score | {"values": values[model].tolist()}),
                    params=ocp.args.StandardSave(params[model]),
                ),
                force=True,
            )
            manager.wait_until_finished()
            _record_sums(self.folder / "best" / model)

    def _is_better(self, model: str, step: int, values_Q: np.ndarray) -> bool:
        best = self.best(model)
        if best is None:
            return True
        if step in self._best_of(model).all_steps():
            return False
        return does_better(values_Q, best[1], start=best[0] == 0)

    def best(self, model: str) -> tuple[int, np.ndarray] | None:
        """Returns step and dev values [Q] of a model's best; None if it has none that can be read."""
        step = self._best_of(model).latest_step()
        values_Q = None if step is None else _values(self.folder, model, step)
        return None if values_Q is None else (step, values_Q)

    def close(self) -> None:
        """Waits for checkpoints that are still being written."""
        self._seal_last()
        for manager in (self._last, *self._best.values()):
            manager.close()


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


def does_better(values_Q: np.ndarray, best_Q: np.ndarray, *, start: bool) -> bool:
    """Says whether a step with these dev values is to be kept in place of the best so far.

    Its mean must be higher. If the best is the stage's start, it must only not be lower by more than a
    standard error of their difference: what dev cannot tell apart, training has more often improved.
    """
    difference_Q = values_Q - best_Q
    mean, error = difference_Q.mean(), difference_Q.std() / math.sqrt(len(difference_Q))
    return bool(mean > (-error if start else 0))


def _values(folder: pathlib.Path, model: str, step: int) -> np.ndarray | None:
    path = folder / "best" / model / str(step) / "score" / "metadata"
    return readable(path, lambda: np.array(json.loads(path.read_text())["values"]))


def best_values(folder: pathlib.Path, model: str) -> np.ndarray | None:
    """Returns the dev values [Q] of a model's best params in a stage; None if they cannot be read."""
    step = best_step(folder, model)

    def read() -> list[float] | None:
        values_Q = _values(folder, model, step)
        return None if values_Q is None else values_Q.tolist()

    found = hosts.from_first(read)
    return None if found is None else np.array(found)


def _models(folder: pathlib.Path) -> list[str]:
    """Returns the models of which a stage has kept params."""
    return sorted(path.name for path in (folder / "best").glob("*") if path.is_dir())


def best_steps(folder: pathlib.Path) -> dict[str, int]:
    """Returns the step of each model's best params in a stage."""

    def find() -> dict[str, int]:
        steps = {
            model: [int(p.name) for p in (folder / "best" / model).glob("*") if p.name.isdigit()]
            for model in _models(folder)
        }
        return {model: max(found) for model, found in steps.items() if found}

    return hosts.from_first(find)


def best_step(folder: pathlib.Path, model: str) -> int:
    """Returns the step of a model's best params in a stage; raises InputError if it has none."""
    steps = best_steps(folder)
    if model not in steps:
        raise InputError(
            f"{folder}: holds no checkpoint of the {model}; run rqv2_jax.main on this workdir first, "
            f"or delete {folder} to train this stage again"
        )
    return steps[model]


def restore_best(folder: pathlib.Path, model: str, params: Tree) -> Tree:
    """Returns a model's best params of a stage, shaped and placed as `params`; else InputError."""
    path = folder.resolve() / "best" / model / str(best_step(folder, model))
    try:
        _check_sums(path)
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path / "params", _abstract(params))
    except Exception as e:
        # Orbax and tensorstore have no exception of their own for damaged files.
        raise InputError(
            f"{path}: cannot be restored ({one_line(e)}); delete {folder} to train it again"
        ) from e
