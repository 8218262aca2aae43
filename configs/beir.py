"""Any folder in BEIR layout, from all-MiniLM-L6-v2, sized for two CPU cores.

Aims at: a retriever and a re-ranker for your own collection.
Command:
  python -m rqv2_jax.main --config configs/beir.py --workdir DIR --config.data.path=FOLDER
The folder holds corpus.jsonl, queries.jsonl (or queries.<split>.jsonl) and qrels/{train,dev,test}.tsv,
each gzipped or not; without dev.tsv some training queries are held out. The labels to train on and to
measure by may lie in folders of their own:
  --config.data.train_qrels=qrels_sparse --config.data.eval_qrels=qrels_full
Time: 30 minutes of training (config.budget), whatever the collection's size, and evaluation: the corpus
is encoded three times, by some 35 passages of 250 tokens a second. Scores: docs/results.md.
"""

from rqv2_jax import config as config_lib


def get_config(preset: str = "official_code"):
    """Returns the config of a preset: paper or official_code (the loss)."""
    config = config_lib.default()
    config_lib.two_cores(config)
    config.data.dataset = "beir"
    if preset not in config_lib.LOSSES:
        raise ValueError(f"no preset {preset!r}; choose one of {', '.join(config_lib.LOSSES)}")
    config.joint.loss.update(config_lib.LOSSES[preset])
    return config
