"""The data doctor, and the report of what denoising keeps and drops.

With --config: reads everything the config will use, passages, queries, labels and lists, and prints
what is wrong with it, how long the inputs are, and a verdict. Trains nothing; the exit status is 1 if
the data are not usable.

With --workdir: is the re-ranker to be believed, and where? Prints score histograms, counts by threshold
and some candidates that were not trusted as negatives; writes the counts to eval/denoise.json. With
fuller labels than those trained on, in a qrels folder beside them, also how often denoising is right.
Data or weights that have moved since are given as --data, --weights, --reranker_weights.

Examples:
  python -m rqv2_jax.check --config configs/beir.py --config.data.path=FOLDER
  python -m rqv2_jax.check --workdir workdir/medquad --labels qrels_full
"""

import json
import pathlib
import sys
import tempfile
import textwrap

from absl import flags

from rqv2_jax import program


def main():
    """Prints one report or the other."""
    from rqv2_jax.errors import InputError

    given = flags.FLAGS
    if given.config is None:
        return _denoising(pathlib.Path(given.workdir), given.labels, given.samples)
    for name in ("labels", "samples", "data", "weights", "reranker_weights"):
        if given[name].present:
            raise InputError(f"--{name} goes with --workdir; leave it out")
    return _data(given.config)


def _data(config):
    from rqv2_jax.recipe import opening, texts
    from rqv2_jax.tools import doctor

    opened, tokenizer, inputs = opening.open_inputs(config)
    for note in opened.notes:
        print(f"model: {note}")
    with tempfile.TemporaryDirectory() as folder:
        report = doctor.examine(
            opened.config,
            lambda: texts.open_collection(config.data, pathlib.Path(folder)),
            tokenizer,
            inputs,
        )
    print(doctor.render(report))
    sys.exit(0 if report.usable() else 1)


def _denoising(workdir: pathlib.Path, labels: str, samples: int):
    from rqv2_jax import artifacts
    from rqv2_jax.data import denoise
    from rqv2_jax.recipe.claim import open_workdir
    from rqv2_jax.recipe.workdir import alone
    from rqv2_jax.tools import denoising

    run = open_workdir(workdir, **program.places())
    with alone(workdir):
        report, shown = denoising.denoise_report(run, labels, samples)
        path = run.workdir / "eval" / "denoise.json"
        artifacts.write_text(path, json.dumps({**report, "samples": shown}, indent=1) + "\n")
    print(denoise.render(report))
    for sample in shown:
        print(f"\nprobability {sample['probability']:.3f}")
        for name in ("query", "labelled", "candidate"):
            text = textwrap.shorten(sample[name], 400)
            print(
                textwrap.fill(
                    text, 100, initial_indent=f"  {name:>9}: ", subsequent_indent=" " * 13
                )
            )


if __name__ == "__main__":
    program.define_config("Config whose data are examined.")
    flags.DEFINE_string("workdir", None, "A workdir whose candidates have been scored.")
    program.define_places()
    flags.DEFINE_string(
        "labels", "", "With --workdir: folder with fuller train.tsv, beside the qrels."
    )
    flags.DEFINE_integer(
        "samples", 5, "With --workdir: untrusted candidates to print.", lower_bound=0
    )
    program.run(main, __doc__, one_of=("config", "workdir"))
