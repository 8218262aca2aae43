"""The values that settings may have, and the check of what the user made of them."""

import math
from typing import Any

from ml_collections import ConfigDict

from rqv2_jax import config as config_lib
from rqv2_jax.errors import InputError
from rqv2_jax.models import losses, products, scoring
from rqv2_jax.ranking import metrics

STAGES = ("retriever", "reranker", "joint")
# Data that are fetched from their publishers where data.path is empty.
_BEIR = ("beir_msmarco", "beir_nfcorpus", "beir_hotpotqa", "beir_fiqa", "beir_fever")
FETCHED = ("msmarco", *_BEIR)
# The stemmers of PyStemmer; "" for none.
STEMMERS = (
    *("", "arabic", "armenian", "basque", "catalan", "czech", "danish", "dutch", "dutch_porter"),
    *("english", "esperanto", "estonian", "finnish", "french", "german", "greek", "hindi"),
    *("hungarian", "indonesian", "irish", "italian", "lithuanian", "nepali", "norwegian"),
    *("persian", "polish", "porter", "portuguese", "romanian", "russian", "serbian", "sesotho"),
    *("spanish", "swedish", "tamil", "turkish", "yiddish"),
)
# The values of settings that have few; "" leaves the choice to the model folder.
CHOICES = {
    "data.dataset": ("docstrings", "beir", "msmarco", "rocketqa", "dpr", "tevatron", *_BEIR),
    "data.preset": ("core", "full"),
    "data.ignore_identical_ids": ("auto", "always", "never"),
    "model.pooling": ("", "cls", "mean"),
    "model.reranker.pooling": ("", "cls", "mean"),
    "model.similarity": ("", "dot", "cosine"),
    "model.towers": ("", *scoring.TOWERS),
    "model.passage_format": ("", "title_sep_text", "title_text"),
    "model.dtype": ("float32", "bfloat16"),
    "model.products": products.CHOICES,
    "encode.dtype": ("float32", "float16", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "plain", "ragged", "xla", "cudnn"),
    "optimizer.clip": ("together", "apart"),
    **{f"{stage}.schedule": ("constant", "linear") for stage in STAGES},
    **{f"{stage}.keep": ("best", "last") for stage in STAGES},
    "evaluate.bm25.stemmer": STEMMERS,
    "reranker.loss": losses.RERANKER_LOSSES,
    "mine.probability": ("calibrated", "sigmoid"),
    "mine.calibrate": ("raw", "query_mean"),
    "joint.loss.kl_direction": losses.KL_DIRECTIONS,
    "joint.loss.kl_reduction": losses.KL_REDUCTIONS,
    "joint.loss.reranker_loss": losses.RERANKER_LOSSES,
}

# The least tokens that an input may have, special tokens included.
SHORTEST = {"query": 3, "passage": 8, "pair": 11}

# Smallest and largest value of a number; every other number must be positive.
RANGES = {
    "seed": (0, 2**31 - 1),
    "budget": (0.0, 1e6),
    **{f"data.{kind}_length": (0, 2**16) for kind in ("query", "passage", "pair")},
    **{f"data.train_{kind}_length": (0, 2**16) for kind in ("passage", "pair")},
    "model.num_layers": (0, 10**4),
    "model.scale": (0.0, 1e6),
    "model.dropout": (0.0, 0.99),
    "model.reranker.num_layers": (0, 10**4),
    "model.reranker.dropout": (-1.0, 0.99),
    "optimizer.weight_decay": (0.0, 1.0),
    "retriever.epochs": (0.0, 1e6),
    "reranker.epochs": (0.0, 1e6),
    **{f"{stage}.warmup_steps": (0, 10**9) for stage in STAGES},
    "reranker.list_size": (2, 10**6),
    "reranker.teacher_weight": (0.0, 1e6),
    **{f"{stage}.accumulate": (0, 10**6) for stage in STAGES},
    "dev.hard": (0, 10**6),
    "joint.list_size": (2, 10**6),
    "joint.denoised_share": (0.0, 1.0),
    "joint.refresh_every": (0, 10**9),
    "joint.kl_weight": (0.0, 1e6),
    "joint.in_batch_weight": (0.0, 1e6),
    "mine.margin": (0.0, 1.0),
    "mine.relevant_share": (0.001, 0.999),
    "mine.negative_below": (0.0, 1.0),
    "mine.positive_above": (0.0, 1.0),
    "evaluate.scann.memory": (0.0, 1e6),
    "evaluate.bm25.most_passages": (0, 10**9),
    "evaluate.released.most_passages": (0, 10**9),
    "evaluate.bm25.k1": (0.0, 100.0),
    "evaluate.bm25.b": (0.0, 1.0),
}


def check(config: ConfigDict) -> None:
    """Raises InputError unless the config has the keys of `config.default()`, with usable values."""
    known, given = config_lib.flat(config_lib.default()), config_lib.flat(config)
    for key in given:
        if key not in known:
            raise InputError(f"config.{key}: no such setting; rqv2_jax/config.py lists them all")
    for key, default in known.items():
        if key not in given:
            raise InputError(f"config.{key}: missing; start the config from config.default()")
        _check_value(key, given[key], default)
    _check_stages(given)
    _check_mining(given)
    _check_evaluation(given)
    _check_joint(given)
    trained = {f"train_{kind}": SHORTEST[kind] for kind in ("passage", "pair")}
    for kind, least in (SHORTEST | trained).items():
        length = given[f"data.{kind}_length"]
        if 0 < length < least:
            other = f"data.{kind.removeprefix('train_')}_length"
            zero = "the longest that the model was made for" if kind in SHORTEST else other
            raise InputError(
                f"config.data.{kind}_length is {length}; it must be {least} or more, or 0 for {zero}"
            )


def _check_value(key: str, value: Any, default: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float) and number:
        value = float(value)
    if type(value) is not type(default):
        raise InputError(f"config.{key} is {value!r}; it must be of type {type(default).__name__}")
    if key in CHOICES and value not in CHOICES[key]:
        raise InputError(f"config.{key} is {value!r}; choose one of {CHOICES[key]}")
    if key in RANGES:
        low, high = RANGES[key]
        if not low <= value <= high:
            raise InputError(f"config.{key} is {value}; it must lie in [{low}, {high}]")
    elif number and not 0 < value < math.inf:
        raise InputError(f"config.{key} is {value}; it must be above 0 and finite")


def _check_stages(given: dict[str, Any]) -> None:
    if given["data.dataset"] not in ("docstrings", *FETCHED) and not given["data.path"]:
        raise InputError(
            "config.data.path is empty; give the folder of the data as --config.data.path=DIR, or a "
            f"data.dataset that is fetched ({', '.join(FETCHED)})"
        )
    for stage in STAGES:
        if given[f"{stage}.most_lists"] < given[f"{stage}.batch"]:
            raise InputError(
                f"config.{stage}.most_lists is below config.{stage}.batch, so there would be no step; "
                "raise it, or lower the batch"
            )


def _check_mining(given: dict[str, Any]) -> None:
    if given["mine.negative_below"] > given["mine.positive_above"]:
        raise InputError(
            "config.mine.negative_below is above config.mine.positive_above, so a passage could be "
            "both; lower it"
        )
    _check_names("mine.sources", given["mine.sources"], config_lib.SOURCES)
    if given["mine.margin"] and (
        "retriever" not in given["mine.sources"] or given["mine.candidates"]
    ):
        raise InputError(
            "config.mine.margin is one of the retriever's scores, but others find the candidates; set "
            "it to 0, or name the retriever in config.mine.sources"
        )


def _check_names(key: str, names: tuple, known: tuple[str, str]) -> None:
    """Raises InputError unless a setting names one or both of two things."""
    if not names or len({*names}) < len(names) or not {*names} <= {*known}:
        raise InputError(f"config.{key} is {names}; give {known} or one of the two, as {known[:1]}")


def _check_evaluation(given: dict[str, Any]) -> None:
    _check_names("evaluate.indexes", given["evaluate.indexes"], config_lib.INDEXES)
    if not given["evaluate.metrics"]:
        raise InputError("config.evaluate.metrics is empty; name one or more, as ('RR@10',)")
    named = [("evaluate.metrics", name) for name in given["evaluate.metrics"]]
    for key, name in (*named, ("dev.metric", given["dev.metric"])):
        try:
            metrics.parse_metric(str(name))
        except InputError as e:
            raise InputError(f"config.{key}: {e}") from e


def _check_joint(given: dict[str, Any]) -> None:
    if given["joint.lists"] and given["joint.refresh_every"]:
        raise InputError(
            "config.joint.lists gives the lists, so none can be refreshed; set refresh_every to 0"
        )
