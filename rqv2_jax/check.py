"""Checks the data of a config, or what the re-ranker of a workdir keeps and drops in denoising.

With --config: reads everything the config will use, passages, queries, labels and lists, and prints
what is wrong with it, how long the inputs are, the disk and memory that a run needs at most, and a
verdict. Trains nothing; the exit status is 1 if the data are not usable, or a run does not fit here,
which --force makes a warning.

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
import textwrap

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError
from rqv2_jax.room import free_disk, host_memory

_CONFIG = program.define_config("Config whose data are examined.")
program.define_workdir("A workdir whose candidates have been scored.")
_LABELS = flags.DEFINE_string(
    "labels", "", "With --workdir: folder with fuller train.tsv, beside the qrels."
)
_DISK = flags.DEFINE_string("disk", ".", "With --config: a folder on the disk of the workdir.")
_FORCE = program.define_force()
_SAMPLES = flags.DEFINE_integer("samples", 5, "With --workdir: untrusted candidates to print.", 0)


def main() -> None:
    """Prints one report or the other."""
    if _CONFIG.value is None:
        for name in ("disk", "force"):
            if flags.FLAGS[name].present:
                raise InputError(f"--{name} goes with --config; leave it out")
        _denoising()
        return
    for name in ("labels", "samples", "data", "weights", "reranker_weights"):
        if flags.FLAGS[name].present:
            raise InputError(f"--{name} goes with --workdir; leave it out")

    from rqv2_jax.recipe import space
    from rqv2_jax.tools import doctor, doctor_checks, fits

    report, opened = doctor.examine_config(_CONFIG.value)
    room = fits.Room(free_disk(pathlib.Path(_DISK.value)), host_memory()[1])
    run = opened.config, opened.models, report.sizes, space.this_host()
    text, faults = fits.compare(*run, room)
    kind = "warning" if _FORCE.value else "error"
    found = [doctor_checks.Finding(kind, where, line) for where, line in faults.items()]
    report = report._replace(findings=[*report.findings, *found])
    print(f"{text}\n\n{doctor_checks.render(report)}")
    sys.exit(0 if report.usable() else 1)


def _denoising() -> None:
    from rqv2_jax import artifacts
    from rqv2_jax.data import denoise
    from rqv2_jax.tools import outputs

    with program.opened() as run:
        report, samples = outputs.denoise_report(run, _LABELS.value, _SAMPLES.value)
        path = run.workdir / "eval" / "denoise.json"
        artifacts.write_text(path, json.dumps({**report, "samples": samples}, indent=1) + "\n")
    print(denoise.render(report))
    for sample in samples:
        print(f"\nprobability {sample['probability']:.3f}")
        for name in ("query", "labelled", "candidate"):
            text, indents = textwrap.shorten(sample[name], 400), (f"  {name:>9}: ", " " * 13)
            print(textwrap.fill(text, 100, initial_indent=indents[0], subsequent_indent=indents[1]))


if __name__ == "__main__":
    program.run(main, __doc__, one_of=("config", "workdir"))
