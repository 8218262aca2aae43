"""Reports what denoising keeps and drops in a workdir: is the re-ranker to be believed, and where?

Prints score histograms, counts by threshold and some candidates that were not trusted as negatives;
writes the counts to eval/denoise.json. With fuller labels than those trained on, in a qrels folder
beside them, also how often denoising is right.

Example:
  python -m rqv2_jax.check --workdir workdir/medquad --labels qrels_full
"""

import json
import pathlib
import textwrap

from absl import flags

from rqv2_jax import program

_WORKDIR = flags.DEFINE_string("workdir", None, "A workdir whose candidates have been scored.")
_LABELS = flags.DEFINE_string("labels", "", "Folder with fuller train.tsv, beside the qrels.")
_SAMPLES = flags.DEFINE_integer("samples", 5, "Untrusted candidates to print.", lower_bound=0)


def main():
    """Prints the report."""
    from rqv2_jax import artifacts, pipeline
    from rqv2_jax.data import denoise
    from rqv2_jax.workdir import open_workdir

    run = open_workdir(pathlib.Path(_WORKDIR.value))
    report, samples = pipeline.denoise_report(run, _LABELS.value, _SAMPLES.value)
    print(denoise.render(report))
    for sample in samples:
        print(f"\nprobability {sample['probability']:.3f}")
        for name in ("query", "labelled", "candidate"):
            text = textwrap.shorten(sample[name], 400)
            print(
                textwrap.fill(
                    text, 100, initial_indent=f"  {name:>9}: ", subsequent_indent=" " * 13
                )
            )
    path = run.workdir / "eval" / "denoise.json"
    artifacts.write_text(path, json.dumps({**report, "samples": samples}, indent=1) + "\n")


if __name__ == "__main__":
    program.run(main, __doc__, required=("workdir",))
