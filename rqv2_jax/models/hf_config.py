"""The `config.json` of a BERT or ERNIE as a `BertConfig`; any other raises `InputError`."""

import pathlib
import re
from typing import Any

from rqv2_jax.errors import InputError
from rqv2_jax.models import bert
from rqv2_jax.models.files import read_json

# Keys of `config.json`: the field of `BertConfig`, and the default in transformers' BertConfig.
KEYS = {
    "vocab_size": ("vocab_size", 30522),
    "hidden_size": ("hidden_size", 768),
    "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 12),
    "intermediate_size": ("intermediate_size", 3072),
    "max_position_embeddings": ("max_positions", 512),
    "type_vocab_size": ("type_vocab_size", 2),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "hidden_act": ("activation", "gelu"),
    "hidden_dropout_prob": ("dropout", 0.1),
    "attention_probs_dropout_prob": ("dropout", 0.1),
    "initializer_range": ("initializer_range", 0.02),
}
DEFAULTS = {key: default for key, (_, default) in KEYS.items()}


def read_architecture(folder: pathlib.Path) -> dict[str, Any]:
    """Returns `config.json`, defaults filled in, and the first `architecture` that it names."""
    path = folder / "config.json"
    hf = read_json(path, architectures=list)
    named = hf.get("architectures") or [""]
    for key, default in DEFAULTS.items():
        value = hf.get(key, default)
        wanted = int | float if isinstance(default, float) else type(default)
        sound = isinstance(value, wanted) and not isinstance(value, bool)
        if not sound or (wanted is int and value < 1):
            raise InputError(f"{path}: {key} is {value!r}; restore the model's own config.json")
    kind = hf.get("model_type")
    if kind is None and (match := re.match("(bert|ernie)(Model|For)", named[0], re.I)):
        kind = match[1].lower()
    if kind not in ("bert", "ernie"):
        raise InputError(f"{path}: model_type is {kind!r}; only 'bert' and 'ernie' are understood")
    if hf.get("position_embedding_type") not in (None, "absolute"):
        raise InputError(f"{path}: position_embedding_type must be 'absolute'")
    if hf.get("is_decoder"):
        raise InputError(f"{path}: is_decoder is true; only encoders are understood")
    # Without a name it counts as a plain encoder, though CrossEncoder might take it for a re-ranker.
    return {**DEFAULTS, **hf, "architecture": named[0] or "BertModel"}


def read_config(folder: pathlib.Path, *, num_layers: int, **chosen: Any) -> bert.BertConfig:
    """Returns `config.json` as a `BertConfig`, cut to the first `num_layers` layers.

    `chosen` are `dropout`, `dtype`, `remat`, `attention` and `unrolled`, which it does not say.
    """
    path = folder / "config.json"
    hf = read_architecture(folder)
    shape = {field: hf[key] for key, (field, _) in KEYS.items()}
    config = bert.BertConfig(**{**shape, **chosen, "num_layers": num_layers})
    available = hf["num_hidden_layers"]
    if config.hidden_size % config.num_heads:
        raise InputError(
            f"{path}: hidden_size {config.hidden_size} cannot be split over num_attention_heads "
            f"{config.num_heads}; restore the model's own config.json"
        )
    if config.activation not in bert.ACTIVATIONS:
        raise InputError(
            f"{path}: hidden_act {config.activation!r} is not one of {sorted(bert.ACTIVATIONS)}"
        )
    if not 1 <= num_layers <= available:
        raise InputError(
            f"num_layers is {num_layers}, but {path} has {available} layers; give 1 to {available}"
        )
    return config
