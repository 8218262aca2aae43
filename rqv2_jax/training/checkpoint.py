"""Checkpoints of a training stage; the only module that imports orbax.

A stage's folder holds `last/<step>` (the whole training state, to resume from) and
`best/<step>/<model>` (the params that did best on dev, with `score`: their metric and its value).
On several hosts all processes call all functions, and orbax writes the share of each.
"""

import json
import pathlib

import jax
import orbax.checkpoint as ocp
import tqdm

from rqv2_jax import hosts
from rqv2_jax.errors import InputError, one_line, readable
from rqv2_jax.training.sharding import Tree


def _abstract(tree: Tree) -> Tree:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


class Checkpoints:
    """The checkpoints of one stage. `save_last` returns while it is written; `close` waits for that."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self._last = ocp.CheckpointManager(self.folder / "last", options=options)
        self._best = ocp.CheckpointManager(self.folder / "best", options=options)

    def restore_last(self, state: Tree) -> Tree:
        """Returns the last saved state in the shapes and shardings of `state`, or else `state` itself.

        If it is damaged, a line says so, and all of the stage's checkpoints are deleted. Raises
        InputError if it has other shapes.
        """
        step = hosts.from_first(self._last.latest_step)
        if step is None:
            return state
        path = self.folder / "last" / str(step)
        try:
            return self._last.restore(step, args=ocp.args.StandardRestore(_abstract(state)))
        except Exception as e:
            # Orbax and tensorstore have no exception of their own for damaged files.
            if self._has_other_shapes(step, state):
                raise InputError(
                    f"{path}: cannot be restored ({one_line(e)}); delete {self.folder} to train this "
                    "stage again"
                ) from e
            tqdm.tqdm.write(f"{path}: cannot be read ({one_line(e)}); this stage is trained again")
        for manager in (self._last, self._best):
            for saved in manager.all_steps():
                manager.delete(saved)
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
        """Saves the state of `step`, then deletes the one before."""
        if step != self._last.latest_step():
            self._last.save(step, args=ocp.args.StandardSave(state))

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

    def best_score(self) -> float | None:
        """Returns the dev score of the best params; None if there are none, or none can be read."""
        step = self._best.latest_step()
        if step is None:
            return None
        path = self.folder / "best" / str(step) / "score" / "metadata"
        return readable(path, lambda: json.loads(path.read_text())["score"])

    def close(self) -> None:
        """Waits for checkpoints that are still being written."""
        self._last.close()
        self._best.close()


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
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, _abstract(params))
    except Exception as e:
        # Orbax and tensorstore have no exception of their own for damaged files.
        raise InputError(
            f"{path}: cannot be restored ({one_line(e)}); delete {folder} to train it again"
        ) from e
