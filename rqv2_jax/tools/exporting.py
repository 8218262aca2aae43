"""The models of a run as folders that transformers and sentence-transformers open."""

import os
import pathlib
import shutil

from rqv2_jax.models import exported
from rqv2_jax.recipe.run import Run


def write_models(run: Run, state: str, path: pathlib.Path) -> str:
    """Writes both towers and the re-ranker of a state; returns a line that says how passages are read.

    Raises:
      InputError: the state has not been reached.
    """
    models, data = run.models, run.config.data
    retriever, reranker = (
        run.params(state=state, model=model) for model in ("retriever", "reranker")
    )
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for tower, length in (("query", data.query_length), ("passage", data.passage_length)):
        source, shape = run.sources.query.folder, models.retriever
        exported.save_encoder(partial / tower, source, shape, retriever[tower])
        exported.describe_retriever(partial / tower, shape.hidden_size, run.config.model, length)
    source, shape, scorer = run.sources.reranker.folder, models.reranker, partial / "reranker"
    exported.save_encoder(scorer, source, shape, reranker["encoder"], reranker["head"])
    exported.describe_reranker(scorer, shape.hidden_size, models.head, data.pair_length)
    os.replace(partial, path)
    joined = "title and text joined by a space" if data.titles else "text"
    if data.titles and run.config.model.passage_format == "title_sep_text":
        joined = "title and text as a pair of texts"
    limit = f"at most {data.passage_length} tokens"
    return f"models: {path}   the passage tower reads {joined}, {limit}"
