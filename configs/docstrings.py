"""The embedded data: documentation of the installed Python packages, from all-MiniLM-L6-v2.

Aims at: showing a retriever and a re-ranker learn from each other on real text on two CPU cores: the
recipe of configs/beir.py in a third of its time. More makes better models: --config.budget=30.
Command:
  python -m rqv2_jax.main --config configs/docstrings.py --workdir workdir/docstrings
Time: 11 minutes of training (config.budget) and about 7 of evaluation. Scores: docs/results.md.
"""

from rqv2_jax import config as config_lib


def get_config(preset: str = "core"):
    """Returns the config of presets joined by commas: core or full, paper or official_code (loss)."""
    config = config_lib.default()
    config_lib.two_cores(config)
    config.data.dataset = "docstrings"
    config.budget = 11.0
    config.dev.depth = 5
    config.evaluate.update({"rerank_queries": 100, "rerank_depth": 10})
    for name in preset.split(","):
        if name in config_lib.LOSSES:
            config.joint.loss.update(config_lib.LOSSES[name])
        else:
            config.data.preset = name
    return config
