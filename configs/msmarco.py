"""RocketQAv2 on MS MARCO passage ranking (Ren et al. 2021): lists of 128, 8.8 million passages.

Aims at (dev.small, 6,980 queries, called test here): retriever RR@10 .388, Success@50 .862, R@1000
.981; re-ranker over its top 50 RR@10 .419 (paper, Tables 2 and 3). Not run yet: needs the data and an
accelerator.
Data: a folder with MS MARCO's collection.tsv, queries.{train,dev.small}.tsv and
qrels.{train,dev.small}.tsv, each gzipped or not. The paper's passages have titles, which MS MARCO left
out: RocketQA's para.title.txt in the same folder adds them, config.data.titles=False ignores them.
With preset rocketqa, RocketQA's corpus/marco.
Candidates: the first 200, for denoised and undenoised lists alike, so that these differ in denoising
and not in depth. The paper leaves the depth open; 1,000 would be 500 million pairs to score.
Weights: a Hugging Face folder of ERNIE 2.0 base (the paper's) or of BERT base, both uncased.
Command:
  python -m rqv2_jax.main --config configs/msmarco.py --workdir DIR --config.data.path=FOLDER \
    --config.model.weights=FOLDER --flagfile=FLAGS
where FLAGS is what rqv2_jax.plan wrote for the machine (--topology v5e:4x8 --overlay FLAGS).
Time: not measured. Lists of 128 are at the edge of the memory of v5e:4x8, 32 chips
(docs/accelerators.md).
"""

import pathlib

from rqv2_jax import config as config_lib

FIXTURES = pathlib.Path(__file__).parent.parent / "tests" / "fixtures"


def get_config(preset: str = "full"):
    """Returns the config of presets, joined by commas.

    full, tiny (all of the recipe on invented passages, for a CPU) or warmstart (from a retriever and a
    re-ranker in config.model.weights); msmarco or rocketqa (the data's layout); paper or
    official_code (the loss).
    """
    config = config_lib.default()
    config_lib.paper(config)
    config.data.dataset = "msmarco"
    config.retriever.epochs = 40.0
    config.joint.update({"epochs": 2.0, "list_size": 128})
    config.mine.update({"depth": 200, "scored_depth": 200})
    config.evaluate.update(
        {"retrieve_depth": 1000, "rerank_depth": 50}
        | {"metrics": ("RR@10", "Success@50", "R@1000", "nDCG@10")}
    )
    for name in preset.split(","):
        if name in ("msmarco", "rocketqa"):
            config.data.dataset = name
        else:
            config_lib.apply_preset(config, name)
        if name == "tiny":
            config.data.path = str(FIXTURES / "msmarco")
    return config
