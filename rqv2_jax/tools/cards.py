"""Model cards: the README.md of an exported model, as the Hugging Face hub shows it."""

import json
import pathlib

from rqv2_jax.errors import DAMAGE
from rqv2_jax.recipe.run import Run
from rqv2_jax.training.checkpoint import best_step

# By model: the hub's name of its task, and tags.
TASKS = {
    "retriever": ("sentence-similarity", ["sentence-transformers", "dense-retrieval"]),
    "reranker": ("text-ranking", ["sentence-transformers", "cross-encoder", "reranker"]),
}
TOWERS = """
queries = SentenceTransformer("query").encode_query(["a question"])
passages = SentenceTransformer("passage").encode_document(["a passage"])
print(queries @ passages.T)
"""
# By folder: what the model is, and three lines that use it.
KINDS = {
    "retriever": (
        "A dense retriever: the similarity of a query's vector and a passage's is their relevance.",
        """
model = SentenceTransformer("retriever")
queries, passages = model.encode_query(["a question"]), model.encode_document(["a passage"])
print(model.similarity(queries, passages))
""",
    ),
    "query": (
        "The tower of a dense retriever that reads queries; the tower beside it reads passages.",
        TOWERS,
    ),
    "passage": (
        "The tower of a dense retriever that reads passages; the tower beside it reads queries.",
        TOWERS,
    ),
    "reranker": (
        "A re-ranker: it reads a query and a passage together; its logits order a query's passages.",
        """
model = CrossEncoder("reranker")
print(model.predict([("a question", "a passage")]))
print(model.rank("a question", ["a passage", "another passage"]))
""",
    ),
}


def write_card(run: Run, state: str, folder: pathlib.Path) -> None:
    """Adds README.md to the exported folder of one model in a state; its name says which it is."""
    what, code = KINDS[folder.name]
    model = "reranker" if folder.name == "reranker" else "retriever"
    task, tags = TASKS[model]
    head = {"library_name": tags[0], "pipeline_tag": task, "tags": [*tags, "rqv2_jax"]}
    # A line of YAML may hold JSON.
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    reader = "CrossEncoder" if model == "reranker" else "SentenceTransformer"
    title = f"{folder.name.capitalize()} trained on {_data(run)}"
    parts = [
        "\n".join(["---", *lines, "---"]),
        f"# {title}",
        f"{what} It was trained {_how(state, model)}, from `{_start(run, model)}`.",
        f"```python\nfrom sentence_transformers import {reader}\n\n{code.strip()}\n```",
        f"## Results\n\n{_results(run, state, model)}",
        f"## Training\n\n{_training(run, state, model)}",
        "## Licence\n\nThe licences of the model that training started from and of the texts it was "
        "trained on hold for this model too; its export knows neither. Name them here before you "
        "publish it.",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def _data(run: Run) -> str:
    data = run.config.data
    return pathlib.Path(data.path).name if data.path else data.dataset


def _start(run: Run, model: str) -> str:
    folders = {"retriever": run.sources.query.folder, "reranker": run.sources.reranker.folder}
    name = folders[model].name
    # A package of weights holds them in a folder of this name.
    return folders[model].parent.name if name == "model" else name


def _how(state: str, model: str) -> str:
    if state == "joint":
        other = "retriever" if model == "reranker" else "re-ranker"
        return f"jointly with a {other} (RocketQAv2, Ren et al., EMNLP 2021) by rqv2_jax"
    return "by rqv2_jax, and not yet jointly with the other model"


def _results(run: Run, state: str, model: str) -> str:
    """Returns the rows of `results.json` that tell of a model and its floors, and its verdict."""
    try:
        report = json.loads((run.workdir / "results.json").read_text())
        rows = [row for row in report["rows"] if _tells(row, state, model)]
        names = list(rows[0]["metrics"])
        lines = [f"| | queries | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
        for row in rows:
            # Of what was searched with all queries, all are told of unless re-ranked rows stand beside.
            shown = row.get("all_queries", row) if model == "retriever" else row
            values = " | ".join(f"{shown['metrics'][name]:.3f}" for name in names)
            lines.append(f"| {_row_name(row)} | {shown['queries']} | {values} |")
        split, titles = rows[0]["split"], "with" if report["titles"] else "without"
        model_name = f"{state} {model}"
        verdict = [f"- {line}" for line in report["verdict"] if line.startswith(model_name)]
    except (FileNotFoundError, IndexError, *DAMAGE):
        return "Not evaluated."
    lines += ["", f"On the {split} queries of {_data(run)}; passages {titles} titles."]
    if verdict:
        lines += ["p by a paired randomisation test:", "", *verdict]
    return "\n".join(lines)


def _tells(row: dict, state: str, model: str) -> bool:
    if row["model"] == "bm25" or row["state"] == "released":
        return True
    if row["index"] == "scann":
        # Exact search finds at least as much.
        return False
    # A re-ranker is told of beside the retriever whose passages it orders.
    return row["state"] == state and (row["model"] == model or model == "reranker")


def _row_name(row: dict) -> str:
    if row["model"] == "bm25":
        return "BM25"
    if row["state"] == "released":
        return "retriever as released"
    what = f"{row['state']} {row['model']}".replace("reranker", "re-ranker")
    return f"{what} on BM25" if row["index"] == "bm25" else what


def _training(run: Run, state: str, model: str) -> str:
    """Returns what a model was trained by, as a list."""
    config = run.config
    stages = [model] * (config[model].epochs > 0) + ["joint"] * (state == "joint")
    lines = []
    for stage in stages:
        step, settings = best_step(run.workdir / stage, model), config[stage]
        of = "" if stage == "retriever" else f" of {settings.list_size} passages"
        rate = settings.learning_rate
        if stage == "joint" and model == "reranker":
            rate *= settings.reranker_rate if settings.train_reranker else 0
        lines.append(
            f"- stage {stage}: {step * settings.batch} lists{of}, batch {settings.batch}, learning "
            f"rate {rate:g}"
        )
    if state == "joint":
        loss = config.joint.loss
        lines.append(
            f"- joint loss: KL weight {config.joint.kl_weight:g} ({loss.kl_direction}), "
            f"{loss.reranker_loss} loss of the re-ranker, in-batch negatives with weight "
            f"{config.joint.in_batch_weight:g}, share of denoised lists "
            f"{config.joint.denoised_share:g}"
        )
    if model == "reranker":
        lines.append(f"- a pair is at most {config.data.pair_length} tokens")
    else:
        lengths = config.data.query_length, config.data.passage_length
        lines.append("- a query is at most {} tokens, a passage {}".format(*lengths))
    made = json.loads((run.workdir / "environment.json").read_text())
    packages = ", ".join(f"{name} {made['packages'][name]}" for name in ("jax", "flax", "optax"))
    lines.append(f"- seed {config.seed}; commit {made['commit'] or 'unknown'}; {packages}")
    return "\n".join(lines)
