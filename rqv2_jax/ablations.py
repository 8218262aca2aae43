"""Runs the paper's ablations of joint training from one shared warm start, over several seeds.

Rows: the paper's Table 4 (static distillation, a pointwise re-ranker, no denoised lists), both presets
of the loss, the teacher's gradient, list sizes (Figure 4), and what goes beyond the paper. Each row
changes `full`, the config as given, in one place; in-batch negatives come without the KL term, too.
The table compares both models, and the re-ranker also on the candidates of the warm start. Finished
rows are kept, so the same command resumes.
Writes ablations.json and ablations.md into the workdir (with --rows, ablations.some.json and .md), anew
after every seed; rqv2_jax.report draws the figures.

Example:
  python -m rqv2_jax.ablations --config configs/ablations.py --workdir workdir/ablations --seeds 3
"""

import pathlib

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

_CONFIG = program.define_config()
flags.DEFINE_string("workdir", None, "Folder of everything these runs write.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of joint training, from 0.", lower_bound=1)
_ROWS = flags.DEFINE_list("rows", None, "Only these rows and full; all if not given.")
_SIZES = flags.DEFINE_list(
    "list_sizes", None, "Sizes of the rows for Figure 4; half and twice that of full if not given."
)


def main() -> None:
    """Runs what is not finished, writes the table after every seed and prints it at the end."""
    from rqv2_jax.recipe.workdir import alone
    from rqv2_jax.tools import ablation_study

    config, workdir, seeds = _CONFIG.value, pathlib.Path(flags.FLAGS.workdir), _SEEDS.value
    try:
        sizes = None if _SIZES.value is None else [int(size) for size in _SIZES.value]
    except ValueError as e:
        raise InputError(f"--list_sizes: {e}; give whole numbers, as 2,8,16") from e
    path = workdir / ("ablations" if _ROWS.value is None else "ablations.some")
    with alone(workdir):
        measured = ablation_study.run_all(config, workdir, seeds, _ROWS.value, sizes)
        permutations = config.evaluate.permutations
        print(ablation_study.write(measured, path, seeds=seeds, permutations=permutations))


if __name__ == "__main__":
    program.run(main, __doc__, required=("config", "workdir"))
