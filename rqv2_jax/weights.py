"""Hugging Face BERT or ERNIE folders (`config.json`, `model.safetensors`, tokenizer) <-> params.

Strict: every tensor of the file is used once or is one of the heads this package has no use for, every
param of the encoder comes from the file, and every shape is what `config.json` promises.
"""

import importlib.util
import json
import pathlib
import re
import shutil
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rqv2_jax import bert
from rqv2_jax.data.tokens import TOKENIZER_FILES
from rqv2_jax.errors import InputError

FILE = "model.safetensors"

# A dense retriever reads the raw hidden state, so pooler and pre-training heads are not wanted.
UNWANTED = re.compile(r"(pooler|cls|classifier|lm_head|ernie_cls)\..*|embeddings\.position_ids")

# Ours -> theirs. "{}" is the layer number; several names are joined along the last axis.
EMBEDDINGS = {
    ("word", "embedding"): "embeddings.word_embeddings.weight",
    ("position", "embedding"): "embeddings.position_embeddings.weight",
    ("type", "embedding"): "embeddings.token_type_embeddings.weight",
    ("norm", "scale"): "embeddings.LayerNorm.weight",
    ("norm", "bias"): "embeddings.LayerNorm.bias",
}
TASK_EMBEDDING = "embeddings.task_type_embeddings.weight"
LAYER = "encoder.layer.{}."
ATTENTION = LAYER + "attention."
LAYERS = {
    ("qkv", "kernel"): tuple(ATTENTION + f"self.{x}.weight" for x in ("query", "key", "value")),
    ("qkv", "bias"): tuple(ATTENTION + f"self.{x}.bias" for x in ("query", "key", "value")),
    ("attention_output", "kernel"): (ATTENTION + "output.dense.weight",),
    ("attention_output", "bias"): (ATTENTION + "output.dense.bias",),
    ("norm_1", "scale"): (ATTENTION + "output.LayerNorm.weight",),
    ("norm_1", "bias"): (ATTENTION + "output.LayerNorm.bias",),
    ("intermediate", "kernel"): (LAYER + "intermediate.dense.weight",),
    ("intermediate", "bias"): (LAYER + "intermediate.dense.bias",),
    ("output", "kernel"): (LAYER + "output.dense.weight",),
    ("output", "bias"): (LAYER + "output.dense.bias",),
    ("norm_2", "scale"): (LAYER + "output.LayerNorm.weight",),
    ("norm_2", "bias"): (LAYER + "output.LayerNorm.bias",),
}


class Sources(NamedTuple):
    """The folders that the encoders start from; `head`: whether the re-ranker's has a score too."""

    query: pathlib.Path
    passage: pathlib.Path
    reranker: pathlib.Path
    head: bool


def find(weights: str) -> Sources:
    """What `weights` names: a model for all encoders, or a folder with query/, passage/ and reranker/.

    `rqv2_jax.export --format huggingface` writes the latter.

    Raises:
      InputError: as `find_folder`.
    """
    folder = pathlib.Path(weights)
    if (folder / "query").is_dir():
        towers = (find_folder(str(folder / name)) for name in ("query", "passage", "reranker"))
        return Sources(*towers, head=True)
    found = find_folder(weights)
    return Sources(found, found, found, head=False)


def find_folder(weights: str) -> pathlib.Path:
    """The model folder `weights` names: a path, or an installed package that carries `model/`.

    Raises:
      InputError: neither exists, or a file is missing from the folder.
    """
    folder = pathlib.Path(weights)
    if not folder.is_dir():
        spec = importlib.util.find_spec(weights) if weights.isidentifier() else None
        if spec is None or spec.origin is None:
            raise InputError(
                f"config.model.weights: {weights!r} is neither a folder nor an installed package; "
                "give a Hugging Face BERT folder with config.json, model.safetensors and tokenizer"
            )
        folder = pathlib.Path(spec.origin).parent / "model"
    for name in ("config.json", FILE):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name}: missing; save the model with transformers' "
                "save_pretrained(folder, safe_serialization=True)"
            )
    return folder


def read_config(
    folder: pathlib.Path,
    *,
    num_layers: int,
    dropout: float,
    dtype: str,
    remat: str,
    attention: str,
    unrolled: bool,
) -> bert.BertConfig:
    """`config.json` as a `BertConfig`, cut to the first `num_layers` layers.

    Raises:
      InputError: no JSON, another architecture, a missing field, or more layers than there are.
    """
    path = folder / "config.json"
    try:
        hf = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not JSON ({e.msg}); restore the model's file") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 ({e}); restore the model's file") from e
    if not isinstance(hf, dict):
        raise InputError(f"{path}: holds no JSON object; restore the model's file")
    if hf.get("model_type") not in ("bert", "ernie"):
        raise InputError(
            f"{path}: model_type is {hf.get('model_type')!r}; only 'bert' and 'ernie' are understood"
        )
    if hf.get("position_embedding_type") not in (None, "absolute"):
        raise InputError(f"{path}: position_embedding_type must be 'absolute'")
    try:
        config = bert.BertConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            num_layers=num_layers,
            num_heads=hf["num_attention_heads"],
            intermediate_size=hf["intermediate_size"],
            max_positions=hf["max_position_embeddings"],
            type_vocab_size=hf["type_vocab_size"],
            layer_norm_eps=hf["layer_norm_eps"],
            activation=hf["hidden_act"],
            dropout=dropout,
            initializer_range=hf["initializer_range"],
            dtype=dtype,
            remat=remat,
            attention=attention,
            unrolled=unrolled,
        )
        available = hf["num_hidden_layers"]
    except KeyError as e:
        raise InputError(f"{path}: has no key {e}; restore the model's own config.json") from e
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
            f"config.model.num_layers is {num_layers}, but {path} has {available} layers; "
            f"give 1 to {available}"
        )
    return config


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors under their names without the `bert.` or `ernie.` prefix."""
    try:
        with safe_open(path, framework="flax") as f:
            tensors = {name: np.asarray(f.get_tensor(name)) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a readable safetensors file ({e}); copy it again") from e
    named = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(bert|ernie)\.", "", name)
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name in named:
            raise InputError(
                f"{path}: tensor {name!r} is there twice, with and without a prefix or by its old "
                "name; give the file of one model"
            )
        named[name] = tensor
    return named


def load_encoder(folder: pathlib.Path, config: bert.BertConfig) -> dict:
    """Encoder params in the layout of `bert.Encoder`: float32 numpy, layers stacked on axis 0.

    Raises:
      InputError: a tensor is missing, misshapen, not finite, or one nobody asked for.
    """
    path = folder / FILE
    tensors = _read_tensors(path)
    d, f = config.hidden_size, config.intermediate_size
    widths = {"intermediate": (d, f), "output": (f, d)}

    def take(name, shape):
        if name not in tensors:
            raise InputError(f"{path}: tensor {name!r} is missing; is this file of another model?")
        tensor = tensors.pop(name).astype(np.float32)
        if tensor.shape != shape:
            raise InputError(
                f"{path}: tensor {name!r} has shape {list(tensor.shape)}, but config.json "
                f"promises {list(shape)}; use the config.json that belongs to it"
            )
        if not np.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name!r} holds NaN or infinite values; copy it again")
        return tensor

    rows = {
        "word": config.vocab_size,
        "position": config.max_positions,
        "type": config.type_vocab_size,
    }
    embeddings: dict = {}
    for (module, leaf), name in EMBEDDINGS.items():
        shape = (rows[module], d) if module in rows else (d,)
        embeddings.setdefault(module, {})[leaf] = take(name, shape)
    if TASK_EMBEDDING in tensors:
        # ERNIE 2.0 adds a task embedding to every token; fine-tuning always uses task 0.
        task = take(TASK_EMBEDDING, (len(tensors[TASK_EMBEDDING]), d))
        embeddings["type"]["embedding"] += task[0]

    layers: dict = {}
    for (module, leaf), names in LAYERS.items():
        d_in, d_out = widths.get(module, (d, d))

        def one(name, layer, leaf=leaf, d_in=d_in, d_out=d_out):
            name = name.format(layer)
            return take(name, (d_out, d_in)).T if leaf == "kernel" else take(name, (d_out,))

        layers.setdefault(module, {})[leaf] = np.stack(
            [
                np.concatenate([one(name, layer) for name in names], axis=-1)
                for layer in range(config.num_layers)
            ]
        )

    layer_of = re.compile(r"encoder\.layer\.(\d+)\..*")
    for name in tensors:
        layer = layer_of.fullmatch(name)
        if not UNWANTED.fullmatch(name) and not (layer and int(layer[1]) >= config.num_layers):
            raise InputError(
                f"{path}: tensor {name!r} belongs to no part of a BERT encoder; "
                "only BERT and ERNIE folders can be used"
            )
    return {"embeddings": embeddings, "layers": layers}


def load_head(folder: pathlib.Path, config: bert.BertConfig) -> dict:
    """`{"kernel": [D], "bias": []}` of a token classifier with one label, as `save_encoder` wrote it.

    Raises:
      InputError: the folder has no such head.
    """
    path = folder / FILE
    tensors = _read_tensors(path)
    shapes = {"kernel": (1, config.hidden_size), "bias": (1,)}
    names = {"kernel": "classifier.weight", "bias": "classifier.bias"}
    head = {}
    for leaf, name in names.items():
        if name not in tensors or tensors[name].shape != shapes[leaf]:
            raise InputError(
                f"{path}: has no {name!r} of shape {list(shapes[leaf])}; a re-ranker is a "
                "BertForTokenClassification with one label, as rqv2_jax.export writes it"
            )
        head[leaf] = tensors[name].astype(np.float32)[0]
    return head


def save_encoder(
    folder: pathlib.Path, source: pathlib.Path, config: bert.BertConfig, params: dict, head=None
):
    """Writes a folder that transformers opens: an encoder with the tokenizer of the one it began as.

    Args:
      folder: made here.
      source: the folder the encoder's weights were first read from.
      params: in the layout of `bert.Encoder`.
      head: `{"kernel": [D], "bias": []}` of a score from the first token, saved as a token
        classifier with one label: its first token's logit is the score.
    """
    folder.mkdir(parents=True)
    # An embedding of ERNIE's tasks is part of the types' since it was read, so this is a BERT.
    described = {
        "model_type": "bert",
        "architectures": ["BertModel" if head is None else "BertForTokenClassification"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "initializer_range": config.initializer_range,
        **({} if head is None else {"num_labels": 1, "id2label": {"0": "score"}}),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    prefix = "" if head is None else "bert."
    tensors = {
        prefix + name: np.asarray(params["embeddings"][module][leaf])
        for (module, leaf), name in EMBEDDINGS.items()
    }
    for (module, leaf), names in LAYERS.items():
        stacked = np.asarray(params["layers"][module][leaf])
        for layer in range(config.num_layers):
            parts = np.split(stacked[layer], len(names), axis=-1)
            for name, part in zip(names, parts):
                tensors[prefix + name.format(layer)] = part.T if leaf == "kernel" else part
    if head is not None:
        tensors["classifier.weight"] = np.asarray(head["kernel"])[None]
        tensors["classifier.bias"] = np.asarray(head["bias"])[None]
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def describe_pooling(folder: pathlib.Path, config: bert.BertConfig, pooling: str, length: int):
    """Adds the files by which sentence-transformers opens a tower, with dot products as similarity.

    Args:
      pooling: cls or mean.
      length: most tokens of an input.
    """
    module = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{module}Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{module}Pooling"},
    ]
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
        },
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "dot"},
    }
    (folder / "1_Pooling").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
