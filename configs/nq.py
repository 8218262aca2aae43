"""RocketQAv2 on Natural Questions (Ren et al. 2021): lists of 32, 21 million passages.

Aims at (test, 3,610 questions, judged by answer strings): retriever Success@5 .751, Success@20 .837,
Success@100 .890 (paper, Table 2). Not run yet: needs the data and an accelerator.
Data: a folder with DPR's psgs_w100.tsv, biencoder-nq-train.json, biencoder-nq-dev.json and
nq-test.qa.csv, each gzipped or not; or, with preset rocketqa, RocketQA's corpus/nq.
Weights: a Hugging Face folder of ERNIE 2.0 base (the paper's) or of BERT base, both uncased.
Command:
  python -m rqv2_jax.main --config configs/nq.py --workdir DIR --config.data.path=FOLDER \
    --config.model.weights=FOLDER --flagfile=FLAGS
where FLAGS is what rqv2_jax.plan wrote for the machine (--topology v5e:4x8 --overlay FLAGS).
Time: on v5e:4x8, 32 chips, training, encoding and scoring take no less than .12 hours by plan; search
and evaluation come on top; not measured. By plan, too, the first host needs 258 GiB while it builds
ScaNN of the 21 million passages; --config.evaluate.indexes="('exact',)" leaves that to another machine,
as python -m rqv2_jax.evaluate --workdir DIR --index scann.
"""

import pathlib

from rqv2_jax import config as config_lib

FIXTURES = pathlib.Path(__file__).parent.parent / "tests" / "fixtures"


def get_config(preset: str = "full"):
    """Returns the config of presets, joined by commas.

    full, tiny (all of the recipe on invented passages, for a CPU) or warmstart (from a retriever and a
    re-ranker in config.model.weights); dpr or rocketqa (the data's layout); paper or
    official_code (the loss).
    """
    config = config_lib.default()
    config_lib.paper(config)
    config.data.dataset = "dpr"
    config.retriever.epochs = 30.0
    config.joint.update({"epochs": 3.0, "list_size": 32})
    config.mine.update({"depth": 100, "scored_depth": 100})
    config.evaluate.update(
        {"retrieve_depth": 100, "rerank_depth": 100}
        | {"metrics": ("Success@5", "Success@20", "Success@100")}
    )
    for name in preset.split(","):
        if name in ("dpr", "rocketqa"):
            config.data.dataset = name
        else:
            config_lib.apply_preset(config, name)
        if name == "tiny":
            config.data.path = str(FIXTURES / "nq")
    return config
