"""Released models: what their folders say of them.

Reads plain Hugging Face folders (`config.json` of a BERT or ERNIE, tensors, tokenizer), those of
sentence-transformers (pooling, normalisation, prompts, similarity, longest input) and of its
CrossEncoder. What is missing, damaged or not understood raises InputError, and settings left unused
become notes.
"""

import dataclasses
import pathlib
import re
from typing import Any, NamedTuple

from rqv2_jax.errors import InputError
from rqv2_jax.models import bert, sbert
from rqv2_jax.models.files import find_folder, read_json, tensor_files

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


@dataclasses.dataclass(frozen=True)
class Released:
    """The settings of a released model; by default those of RocketQAv2's, an encoder and nothing else.

    `folder` holds config.json, tensors and tokenizer; `pooling` and `similarity` may be names that are
    not understood. `longest` is the most tokens of an input, and `longest_from` names the file and its
    setting that say so. `lower` says that texts are lower-cased
    before the tokenizer reads them. `head` is None if there is no score, or a line that says why the
    score that is there cannot be used. `notes` name what is left unused.
    """

    folder: pathlib.Path
    longest: int
    num_layers: int
    longest_from: str = ""
    pooling: str = "cls"
    similarity: str = "dot"
    towers: str = "separate"
    query_prompt: str = ""
    passage_prompt: str = ""
    passage_format: str = "title_sep_text"
    lower: bool = False
    head: sbert.Head | str | None = None
    notes: tuple[str, ...] = ()


class Sources(NamedTuple):
    """The models that the three encoders start from."""

    query: Released
    passage: Released
    reranker: Released


def find(weights: str, reranker: str) -> Sources:
    """Reads the folders that `config.model.weights` and `config.model.reranker.weights` name.

    A name stands for a model for all encoders, or for a folder with retriever/ or query/ and passage/,
    and with reranker/, as `rqv2_jax.export --format huggingface` writes it. An empty `reranker` stands
    for `weights`.
    """
    query, passage = _subfolder(weights, "query"), _subfolder(weights, "passage")
    towers = [read(find_folder(name)) for name in dict.fromkeys((query, passage))]
    setting = "reranker.weights" if reranker else "weights"
    scorer = read(find_folder(_subfolder(reranker or weights, "reranker"), setting))
    return Sources(towers[0], towers[-1], scorer)


def _subfolder(weights: str, name: str) -> str:
    folder = pathlib.Path(weights)
    if (folder / "query").is_dir():
        return str(folder / name)
    if (folder / "retriever").is_dir():
        return str(folder / ("reranker" if name == "reranker" else "retriever"))
    return weights


def read(folder: pathlib.Path) -> Released:
    """Returns what a model folder says; without `modules.json`, cls pooling and dot products."""
    described = sbert.Description(folder)
    encoder = described.encoder
    if not (encoder / "config.json").is_file():
        raise InputError(f"{encoder / 'config.json'}: missing; copy the model's own config.json")
    tensor_files(encoder)
    hf, settings = read_architecture(encoder), {}
    longest, longest_from = described.longest(hf["max_position_embeddings"])
    if described.is_retriever:
        pooling, include_prompt = described.pooling()
        prompts = described.prompts()
        if not include_prompt and any(prompts.values()):
            raise InputError(
                f"{folder}: its pooling leaves out the prompt (include_prompt is false), which is not "
                "understood; use another model"
            )
        own = described.settings.get(sbert.OWN_KEY, {})
        settings = {
            "pooling": pooling,
            "similarity": described.similarity(),
            "towers": "shared",
            "query_prompt": prompts["query"],
            "passage_prompt": prompts["passage"],
            "passage_format": own.get("passage_format", "title_text"),
        }
    settings["head"] = described.head(hf)
    settings["lower"] = bool(described.transformer["do_lower_case"])
    layers, notes = hf["num_hidden_layers"], tuple(described.notes)
    return Released(encoder, longest, layers, longest_from, **settings, notes=notes)


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
