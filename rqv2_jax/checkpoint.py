"""Checkpoints of a training stage; the only room that imports orbax.

A stage's folder holds `last/<step>` (the whole training state, to resume from) and
`best/<step>/<model>` (the params that did best on dev, with `score`: their metric and its value).
On several hosts all processes call all functions, and orbax writes each one's share.
"""

import json
import pathlib

import jax
import orbax.checkpoint as ocp

from rqv2_jax import hosts
from rqv2_jax.errors import InputError


def _abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


class Checkpoints:
    """The checkpoints of one stage. `save` returns while writing goes on; `close` waits for it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self._last = ocp.CheckpointManager(self.folder / "last", options=options)
        self._best = ocp.CheckpointManager(self.folder / "best", options=options)

    def restore_last(self, state):
        """The last saved state in the shapes and shardings of `state`; `state` itself if none was.

        Raises:
          InputError: the checkpoint cannot be read or has other shapes.
        """
        step = hosts.from_first(self._last.latest_step)
        if step is None:
            return state
        try:
            return self._last.restore(step, args=ocp.args.StandardRestore(_abstract(state)))
        except (ValueError, OSError, KeyError) as e:
            raise InputError(
                f"{self.folder / 'last' / str(step)}: cannot be restored ({_one_line(e)}); delete "
                f"{self.folder} to train this stage again"
            ) from e

    def save_last(self, step: int, state):
        """Saves the state of `step`, then drops the one before."""
        if step != self._last.latest_step():
            self._last.save(step, args=ocp.args.StandardSave(state))

    def save_best(self, step: int, params, metric: str, score: float):
        """Saves params (keyed by model) in place of the best so far, if they score higher.

        A step that is measured again, by a run that resumes, keeps what it saved.
        """

        def is_better():
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
        """The dev score of the best params."""
        step = self._best.latest_step()
        if step is None:
            return None
        return json.loads((self.folder / "best" / str(step) / "score" / "metadata").read_text())[
            "score"
        ]

    def close(self):
        """Waits for what is still being written."""
        self._last.close()
        self._best.close()


def best_step(folder: pathlib.Path) -> int:
    """The step of a stage's best params.

    Raises:
      InputError: the stage has none.
    """
    steps = hosts.from_first(
        lambda: sorted(int(p.name) for p in (folder / "best").glob("*") if p.name.isdigit())
    )
    if not steps:
        raise InputError(f"{folder}: holds no checkpoint; run rqv2_jax.main on this workdir first")
    return steps[-1]


def restore_best(folder: pathlib.Path, model: str, params):
    """The best params of one model of a stage, in the shapes and shardings of `params`.

    Raises:
      InputError: the stage has none, or they have other shapes.
    """
    path = folder.resolve() / "best" / str(best_step(folder)) / model
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, _abstract(params))
    except (ValueError, OSError, KeyError) as e:
        raise InputError(
            f"{path}: cannot be restored ({_one_line(e)}); delete {folder} to train it again"
        ) from e


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
