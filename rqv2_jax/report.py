"""Draws what a run or a set of ablations has recorded, as PNG files in its folder `report/`.

From a workdir: both models' scores on dev, the entropies of their distributions and the terms of the
loss during joint training. From a folder of rqv2_jax.ablations also RR@10 against list size.

Example:
  python -m rqv2_jax.report --workdir workdir/docstrings
"""

import json
import pathlib
import re

from absl import flags

from rqv2_jax import optional, program
from rqv2_jax.errors import InputError


def curves(stage: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar in a stage's TensorBoard events, by name, in order of steps.

    Steps that an interrupted run had to take again count once, with what was recorded last.
    """
    tf = optional.tensorflow("reading TensorBoard's events")
    found: dict[str, dict[int, float]] = {}

    def records(path):
        try:
            yield from tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
        except tf.errors.DataLossError:
            # The last record of a run that was killed, or is still writing.
            return

    for path in sorted(stage.glob("events.out.tfevents.*")):
        for record in records(path):
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                scalar = float(tf.make_ndarray(value.tensor))
                found.setdefault(value.tag, {})[event.step] = scalar
    return {name: sorted(values.items()) for name, values in found.items()}


def draw_training(workdir: pathlib.Path, path: pathlib.Path):
    """Joint training in three panels: dev scores, entropies, loss terms, over the steps.

    Raises:
      InputError: there are no events of joint training.
    """
    found = curves(workdir / "joint")
    if not found:
        raise InputError(
            f"{workdir}: has no events of joint training; run rqv2_jax.main on it first"
        )
    panels = {
        "RR@10 on dev": [name for name in found if name.startswith("dev/")],
        "entropy over a list, in nats": [name for name in found if name.endswith("_entropy")],
        "loss": [name for name in ("loss", "kl", "supervised", "in_batch") if name in found],
    }
    figure, axes = _figure(len(panels))
    for axis, (title, names) in zip(axes, panels.items()):
        for name in sorted(names, reverse=True):
            label = name.removeprefix("dev/").removesuffix(" RR@10").removesuffix("_entropy")
            marker = "o" if name.startswith("dev/") else ""
            axis.plot(
                *zip(*found[name]), marker=marker, label=label.replace("reranker", "re-ranker")
            )
        axis.set(title=title, xlabel="step of joint training")
        axis.legend()
    axes[1].set_ylim(bottom=0)
    _save(figure, path)


def draw_list_sizes(folder: pathlib.Path, source: pathlib.Path, path: pathlib.Path):
    """RR@10 on test of both models against the size of the joint lists (paper, Figure 4).

    `source` is a summary that rqv2_jax.ablations wrote in `folder`. Bars reach one standard deviation
    over seeds either way.
    """
    summary, config = (_read(file) for file in (source, folder / "warm" / "config.json"))
    figure, axes = _figure(2)
    for axis, model in zip(axes, ("retriever", "reranker")):
        points = []
        for row in summary:
            size = re.fullmatch(r"list size (\d+)", row["row"])
            if (row["model"], row["candidates"], row["metric"]) != (model, "exact", "RR@10"):
                continue
            if row["row"] == "warm start":
                axis.axhline(row["mean"], color="grey", linestyle=":", label="warm start")
            elif size or row["row"] == "full":
                number = int(size[1]) if size else config["joint"]["list_size"]
                points.append((number, row["mean"], row["spread"] or 0.0))
        sizes, means, spreads = zip(*sorted(points))
        axis.errorbar(sizes, means, yerr=spreads, marker="o", capsize=4, label="joint training")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set(title=model.replace("reranker", "re-ranker"), xlabel="passages in a list")
        axis.set_ylabel("RR@10 on test")
        axis.legend()
    _save(figure, path)


def _read(file: pathlib.Path):
    try:
        return json.loads(file.read_text())
    except ValueError as e:
        raise InputError(
            f"{file}: not as rqv2_jax.ablations wrote it ({e}); give its command again"
        ) from e


def draw_scaling(lines: list[dict], path: pathlib.Path):
    """What rqv2_jax.bench scaling measured: seconds against size, with the line through the origin."""
    kinds = list(dict.fromkeys(line["what"] for line in lines))
    figure, axes = _figure(len(kinds))
    for axis, kind in zip(axes, kinds):
        counts, seconds = zip(*[(x["count"], x["seconds"]) for x in lines if x["what"] == kind])
        axis.plot(counts, seconds, marker="o", label="measured")
        slope = seconds[-1] / counts[-1]
        axis.plot((0, counts[-1]), (0, slope * counts[-1]), ":", color="grey", label="linear")
        axis.set(xlabel=kind, ylabel="seconds")
        axis.legend()
    _save(figure, path)


def _figure(panels: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _save(figure, path: pathlib.Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(path)


def main():
    """Draws whatever the folder has."""
    folder = pathlib.Path(flags.FLAGS.workdir)
    if (folder / "warm").is_dir():
        # Written when all rows have been run, or those that were asked for.
        sources = [folder / "ablations.json", folder / "ablations.some.json"]
        sources = [p for p in sources if p.is_file() and '"list size ' in p.read_text()]
        if sources:
            newest = max(sources, key=lambda p: p.stat().st_mtime_ns)
            draw_list_sizes(folder, newest, folder / "report" / "list_sizes.png")
        draw_training(folder / "rows" / "full.0", folder / "report" / "joint_training.png")
    else:
        draw_training(folder, folder / "report" / "joint_training.png")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A workdir, or the folder of rqv2_jax.ablations.")
    program.run(main, __doc__, required=("workdir",))
