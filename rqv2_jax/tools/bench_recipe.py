"""The recipe as a whole against sentence-transformers: the same start, minutes and machine, in turn."""

import itertools
import json
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from rqv2_jax.data import tokens
from rqv2_jax.ranking import trec
from rqv2_jax.recipe import budget, compare, pipeline
from rqv2_jax.recipe.run import open_run
from rqv2_jax.recipe.texts import open_store
from rqv2_jax.tools import rival_recipe

OURS = {"retriever": "test.joint.retriever.exact", "reranker": "test.joint.reranker.exact"}
FLOORS = {"bm25": "test.bm25.bm25.bm25", "released": "test.released.retriever.exact"}


def recipe(config: ConfigDict, folder: pathlib.Path, minutes: float, rival: bool) -> Iterator[dict]:
    """Yields a line for each system and each comparison of two; all files stay in the folder.

    Ours trains with `config.budget` = minutes in `ours/`; with `rival`, sentence-transformers then
    trains as long from the same folders, and its run files go to `rival/`. A comparison is on the test
    queries that both systems rank: a - b, with its 95% interval and the p-value of a paired test.
    """
    config.budget = minutes
    workdir = folder / "ours"
    pipeline.main(config, workdir)
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    took = budget.spent(workdir)
    line = {"benchmark": "recipe", "minutes": minutes}
    yield line | {"system": "rqv2_jax", "seconds": sum(took.values()), "parts": took, "rows": rows}
    runs = {f"ours.{model}": workdir / "runs" / f"{name}.trec" for model, name in OURS.items()}
    runs |= {name: workdir / "runs" / f"{file}.trec" for name, file in FLOORS.items()}
    if rival:
        run = open_run(config, workdir, quiet=True)
        store = open_store(run)
        other = rival_recipe.Recipe(run, store, minutes)
        other.train()
        (folder / "rival").mkdir(exist_ok=True)
        reranked = set(trec.read_run(runs["ours.reranker"]))
        other.write(folder / "rival", reranked, run.config.evaluate.rerank_depth)
        yield line | {"system": "sentence-transformers", **other.report}
        runs |= {f"rival.{model}": folder / "rival" / f"{model}.trec" for model in OURS}
    yield from _comparisons(config, folder, runs)


def _comparisons(
    config: ConfigDict, folder: pathlib.Path, runs: dict[str, pathlib.Path]
) -> Iterator[dict]:
    """Yields a line for each pair of systems that is worth a test, of those that there are."""
    runs = {name: path for name, path in runs.items() if path.is_file()}
    store = tokens.open_store(folder / "ours" / "data" / "tokens")
    ranked = {name: trec.read_run(path).keys() for name, path in runs.items()}
    trained = [name for name in runs if name.startswith(("ours", "rival"))]
    others = [name for name in runs if not name.startswith("ours")]
    qrels, queries, settings = folder / "qrels.trec", store.splits["test"], config.evaluate
    for a, b in itertools.product(trained, others):
        if a == b:
            continue
        both, labels = ranked[a] & ranked[b], zip(*queries.qrels_3xN.tolist())
        qrels.write_text(
            "".join(
                f"{queries.ids[q]} 0 {store.passage_ids[p]} {relevance}\n"
                for q, p, relevance in labels
                if queries.ids[q] in both
            )
        )
        rows, count, _ = compare.compare(
            *(runs[a], runs[b], qrels),
            names=settings.metrics,
            min_relevance=settings.min_relevance,
            permutations=settings.permutations,
            seed=config.seed,
        )
        yield {"benchmark": "recipe", "a": a, "b": b, "queries": count, "metrics": rows}
