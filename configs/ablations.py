"""The paper's ablations at a size for two CPU cores, on the embedded data or a BEIR folder.

Aims at: the differences between the rows, not the best scores; every row trains on as many lists.
Command:
  launch/ablations.sh docstrings
  launch/ablations.sh FOLDER
  PRESET=shallow launch/ablations.sh FOLDER
Time: not measured since texts are 128 tokens long; at 48 to 96, docs/lab.md, a row and seed took 4 to
14 minutes.
"""

from rqv2_jax import config as config_lib


def get_config(preset: str = "docstrings"):
    """Returns the config of a preset: docstrings or beir, also `,shallow`: half the layers."""
    config = config_lib.default()
    config_lib.two_cores(config)
    dataset, *more = preset.split(",")
    config.data.dataset = dataset
    # Every row has the same number of lists, and reads as many tokens in search as in training.
    config.budget = 0.0
    config.data.update({"passage_length": 128, "pair_length": 160})
    config.retriever.most_lists = 3200
    # Dynamic distillation differs from static while the re-ranker still learns in joint training.
    config.reranker.most_lists = 800
    config.joint.update({"most_lists": 800, "evaluate_every": 25, "save_every": 25})
    # So that a model is clipped alike whether the other trains or not.
    config.optimizer.clip = "apart"
    # Half of the queries have denoised lists, from the same depth as the others', so that a row
    # without them differs in denoising alone. A weak re-ranker gives its lowest probabilities to easy
    # negatives; a higher threshold lets harder ones in.
    config.mine.update({"queries": 1600, "depth": 32, "negative_below": 0.5})
    config.mine.update({"scored_queries": 800, "scored_depth": 32, "calibrate": "query_mean"})
    config.joint.denoised_share = 1.0
    # The retriever is cheap to measure on all queries, the re-ranker is not.
    config.evaluate.rerank_queries = 300
    # Rows are compared with each other.
    config.evaluate.bm25.most_passages = config.evaluate.released.most_passages = 0
    if more == ["shallow"]:
        _shallow(config)
    elif more:
        raise ValueError(
            f"no preset {preset!r}; choose of docstrings, beir, and shallow behind one"
        )
    return config


def _shallow(config):
    config.model.num_layers = 3
    config.data.update({"passage_length": 64, "pair_length": 80})
    config.data.update({"train_passage_length": 0, "train_pair_length": 0})
    # With half the layers the weights are a poor retriever, which needs a longer warm-up.
    config.retriever.update({"most_lists": 7168, "learning_rate": 1e-4, "log_every": 20})
    # Most queries of joint training are new to the re-ranker.
    config.mine.update({"queries": 2400, "scored_queries": 1200})
    # Runs are short: saving the optimizer would take longer than repeating half a run.
    config.joint.update({"most_lists": 640, "evaluate_every": 20, "save_every": 1000})
