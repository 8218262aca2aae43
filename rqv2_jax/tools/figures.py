"""Figures of what a run, a set of ablations or a benchmark has recorded, as PNG files."""

import json
import pathlib
import re
from typing import Any

from rqv2_jax.errors import InputError


def curves(stage: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """Returns (step, value) of every scalar in a stage's TensorBoard events, by name, steps in order.

    Steps that an interrupted run had to take again count once, with what was recorded last.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    scalars: dict[str, dict[int, float]] = {}
    for path in sorted(stage.glob("events.out.tfevents.*")):
        # Ends before a last record that is cut short, where a run was killed or is still writing.
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                scalar = float(make_ndarray(value.tensor))
                scalars.setdefault(value.tag, {})[event.step] = scalar
    return {name: sorted(values.items()) for name, values in scalars.items()}


def draw_training(workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Draws joint training in three panels: dev scores, entropies, loss terms, over the steps."""
    values = curves(workdir / "joint")
    if not values:
        raise InputError(
            f"{workdir}: has no events of joint training; run rqv2_jax.main on it first"
        )
    panels: dict[str, list[str]] = {
        "RR@10 on dev": [name for name in values if name.startswith("dev/")],
        "entropy over a list, in nats": [name for name in values if name.endswith("_entropy")],
        "loss": [name for name in ("loss", "kl", "supervised", "in_batch") if name in values],
    }
    figure, axes = _figure(len(panels))
    for axis, (title, names) in zip(axes, panels.items()):
        for name in sorted(names, reverse=True):
            label = name.removeprefix("dev/").removesuffix(" RR@10").removesuffix("_entropy")
            marker = "o" if name.startswith("dev/") else ""
            label = label.replace("reranker", "re-ranker")
            axis.plot(*zip(*values[name]), marker=marker, label=label)
        axis.set(title=title, xlabel="step of joint training")
        axis.legend()
    axes[1].set_ylim(bottom=0)
    _save(figure, path)


def draw_list_sizes(folder: pathlib.Path, table: pathlib.Path, path: pathlib.Path) -> None:
    """Draws RR@10 on test of both models against the size of the joint lists (paper, Figure 4).

    `table` is one that rqv2_jax.ablations wrote in `folder`. Bars reach one standard deviation over
    seeds either way.
    """
    summary, config = (_read(file) for file in (table, folder / "warm" / "config.json"))
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


def _read(file: pathlib.Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as e:
        raise InputError(
            f"{file}: not as rqv2_jax.ablations wrote it ({e}); give its command again"
        ) from e


def draw_scaling(lines: list[dict], path: pathlib.Path) -> None:
    """Draws what rqv2_jax.bench scaling measured: seconds against size, beside linear growth."""
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


def _save(figure: Any, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(path)


def draw(folder: pathlib.Path) -> None:
    """Draws what a workdir, or the folder of a set of ablations, has recorded, into its `report/`.

    Raises InputError if it has no events of joint training, or a damaged table of ablations.
    """
    trained = folder
    if (folder / "warm").is_dir():
        # Written when all rows have been run, or those that were asked for.
        tables = [folder / "ablations.json", folder / "ablations.some.json"]
        tables = [p for p in tables if p.is_file() and '"list size ' in p.read_text()]
        if tables:
            newest = max(tables, key=lambda p: p.stat().st_mtime_ns)
            draw_list_sizes(folder, newest, folder / "report" / "list_sizes.png")
        trained = folder / "rows" / "full.0"
    draw_training(trained, folder / "report" / "joint_training.png")
