"""The embedded data: documentation of the installed Python packages, from all-MiniLM-L6-v2.

Aims at: showing a retriever and a re-ranker learn from each other on real text on two CPU cores.
Command:
  python -m rqv2_jax.main --config configs/docstrings.py:quick --workdir workdir/docstrings
Time: of `quick`, a third of the recipe of configs/beir.py, about 17 minutes of training and 8 of
evaluation; without it, all of that recipe: 30 minutes of training (config.budget) and 15 of evaluation.
Scores: docs/results.md.
"""

from rqv2_jax import config as config_lib


def get_config(preset: str = "core"):
    """Returns the config of presets joined by commas.

    core or full (passages), quick (little training), paper or official_code (loss).
    """
    config = config_lib.default()
    config_lib.two_cores(config)
    config.data.dataset = "docstrings"
    for name in preset.split(","):
        if name in config_lib.LOSSES:
            config.joint.loss.update(config_lib.LOSSES[name])
        elif name == "quick":
            # Counts in place of a budget, so that every machine trains the same and none measures its
            # speed.
            config.budget = 0.0
            for stage, lists in {"retriever": 1280, "reranker": 480, "joint": 256}.items():
                config[stage].most_lists = lists
            config.mine.queries = 800
            config.dev.update({"depth": 5, "pool": 500})
            config.evaluate.update({"rerank_queries": 100, "rerank_depth": 10})
        else:
            config.data.preset = name
    return config
