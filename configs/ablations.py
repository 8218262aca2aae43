"""The paper's ablations at a size that two CPU cores carry, on the embedded data or a BEIR folder.

Aims at: the differences between the rows, not the best scores; every row trains on as many lists.
Command:
  launch/ablations.sh docstrings
  launch/ablations.sh FOLDER
Time and scores: 4 to 6 minutes a row and seed on docstrings, 10 to 14 on a BEIR folder; the README's
tables, docs/ablations.md.
"""

from rqv2_jax import config as config_lib


def get_config(preset: str = "docstrings"):
    """Presets: docstrings or beir."""
    config = config_lib.default()
    config_lib.two_cores(config)
    config.data.dataset = preset
    if preset == "beir":
        # Passages of an encyclopedia or a manual lose what answers the query when cut at 48 tokens.
        config.data.update({"passage_length": 96, "pair_length": 112})
    # Half of the lists are denoised, so that leaving these out is a change to be seen. Of so weak a
    # re-ranker's low probabilities the lowest are those of easy negatives, hence the higher threshold.
    config.mine.update({"queries": 1600, "scored_queries": 1600, "negative_below": 0.5})
    # So short a warm-up leaves the re-ranker much to learn in joint training, where it needs a higher
    # rate than the retriever, which comes trained: dynamic distillation differs from static then.
    config.reranker.epochs = 0.2
    config.joint.update({"denoised_share": 0.5, "epochs": 0.5, "reranker_rate": 5.0})
    config.joint.update({"evaluate_every": 25, "save_every": 25})
    # The retriever is cheap to measure on all queries, the re-ranker is not.
    config.evaluate.rerank_queries = 500
    return config
