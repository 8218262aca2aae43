"""The paper's ablations at a size that two CPU cores carry, on the embedded data or a BEIR folder.

Aims at: the differences between the rows, not the best scores; every row trains on as many lists.
Command:
  launch/ablations.sh docstrings
  launch/ablations.sh FOLDER
Time and scores: 2 to 3 minutes a row and seed, after a warm-up of ten minutes; the README's
tables, docs/ablations.md.
"""

from rqv2_jax import config as config_lib


def get_config(preset: str = "docstrings"):
    """Presets: docstrings or beir."""
    config = config_lib.default()
    config_lib.two_cores(config)
    config.data.dataset = preset
    if preset == "beir":
        config.data.update({"passage_length": 64, "pair_length": 80})
    # Half as deep, a run takes half as long. Cut there the weights are a poor retriever, so that it has
    # to be warmed up.
    config.model.num_layers = 3
    config.retriever.update(
        {"batch": 64, "learning_rate": 1e-4, "warmup_steps": 10, "schedule": "linear"}
        | {"log_every": 20, "save_every": 50}
    )
    # As many lists of any data, up to four of each labelled positive.
    for stage, most in (("retriever", 7168), ("reranker", 800), ("joint", 640)):
        config[stage].update({"epochs": 4.0, "most_lists": most})
    # Most queries of joint training are new to the re-ranker, which so has something left to learn from
    # their labels: dynamic distillation differs from static then. It takes a higher rate than the
    # retriever's.
    config.mine.queries = 2400
    config.joint.update({"reranker_rate": 5.0, "evaluate_every": 20})
    # Half of the lists are denoised, those of the scored queries, so that leaving these out is a change
    # to be seen. Of so weak a re-ranker's low probabilities the lowest are those of easy negatives,
    # hence the higher threshold.
    config.mine.update({"scored_queries": 1200, "negative_below": 0.5})
    config.joint.denoised_share = 1.0
    # Runs are short; saving their optimizer takes longer than half of them would.
    config.joint.save_every = 1000
    # The retriever is cheap to measure on all queries, the re-ranker is not.
    config.evaluate.rerank_queries = 300
    return config
