"""Model folders as released: what they say of the model.

Reads plain Hugging Face folders (`config.json`, tensors, tokenizer), those of sentence-transformers
(`modules.json` and the files it names: pooling, normalisation, prompts, similarity, longest input) and
of its CrossEncoder. What is not understood is an error, and what is left unused becomes a note.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
import shlex
from typing import Any, NamedTuple

from rqv2_jax.errors import InputError
from rqv2_jax.models import bert

FILE = "model.safetensors"
# Names the files of a model that is saved in several.
INDEX = f"{FILE}.index.json"
PICKLE = "pytorch_model.bin"

# Those of transformers' BertConfig, for what a `config.json` leaves out.
DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
}

# The older keys of 1_Pooling/config.json.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# Of sentence_bert_config.json: those that are read, and those that follow from the modules.
TRANSFORMER_KEYS = {"max_seq_length", "do_lower_case"}
TRANSFORMER_KEYS |= {"transformer_task", "modality_config", "module_output_name"}

IDENTITY = "torch.nn.modules.linear.Identity"
# For each side, the prompts of `config_sentence_transformers.json` that it takes, the first there is.
PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}
# Our own key in that file, for what sentence-transformers has no name for.
OWN_KEY = "rqv2_jax"


class Head(NamedTuple):
    """Where the score of a re-ranker lies, and its form.

    `form`: "linear" (the first token's state times a vector) or "pooler" (BERT's pooler, a dense layer
    and tanh, before that). `prefix` names the tensors of the vector in the tensor files of `folder`.
    """

    form: str
    folder: pathlib.Path
    prefix: str


@dataclasses.dataclass(frozen=True)
class Released:
    """What a model folder says.

    `folder` holds config.json, tensors and tokenizer; `pooling` and `similarity` may be names that are
    not understood. `longest` is the most tokens of an input. `lower` says that texts are lower-cased
    before the tokenizer reads them. `head` is None if there is no score, or a line that says why the
    score that is there cannot be used. `notes` tell what is left unused.
    """

    folder: pathlib.Path
    pooling: str
    similarity: str
    query_prompt: str
    passage_prompt: str
    passage_format: str
    longest: int
    num_layers: int
    lower: bool
    head: Head | str | None
    notes: tuple[str, ...]


class Sources(NamedTuple):
    """What the three encoders start from."""

    query: Released
    passage: Released
    reranker: Released


def find(weights: str, reranker: str) -> Sources:
    """Reads the folders that `config.model.weights` and `config.model.reranker.weights` name.

    A name stands for a model for all encoders, or for a folder with query/, passage/ and reranker/, as
    `rqv2_jax.export --format huggingface` writes it. An empty `reranker` stands for `weights`.

    Raises:
      InputError: as `find_folder` and `read`.
    """
    query, passage = _inside(weights, "query"), _inside(weights, "passage")
    towers = [read(find_folder(name, "weights")) for name in dict.fromkeys((query, passage))]
    own = reranker or weights
    setting = "reranker.weights" if reranker else "weights"
    scorer = read(find_folder(_inside(own, "reranker"), setting))
    return Sources(towers[0], towers[-1], scorer)


def _inside(weights: str, name: str) -> str:
    folder = pathlib.Path(weights)
    return str(folder / name) if (folder / "query").is_dir() else weights


def find_folder(weights: str, setting: str = "weights") -> pathlib.Path:
    """Returns the model folder `weights` names: a path, or an installed package that carries `model/`.

    Raises:
      InputError: neither exists.
    """
    folder = pathlib.Path(weights)
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec(weights) if weights.isidentifier() else None
    if spec is None or spec.origin is None:
        raise InputError(
            f"config.model.{setting}: {weights!r} is neither a folder nor an installed package; "
            "give a Hugging Face BERT folder with config.json, model.safetensors and tokenizer"
        )
    return pathlib.Path(spec.origin).parent / "model"


def tensor_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the safetensors files of a model: one, or the shards that an index names.

    Raises:
      InputError: there are none, or a shard is missing.
    """
    if (folder / FILE).is_file():
        return [folder / FILE]
    index = folder / INDEX
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{index}: has no weight_map; copy the model's own index again")
        files = [folder / str(name) for name in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                raise InputError(
                    f"{file}: missing, though {INDEX} names it; copy it beside the others"
                )
        return files
    if (folder / PICKLE).is_file():
        # In a shell as it stands, whatever the folder is called.
        script = (
            "import sys, torch, safetensors.torch as s; w = torch.load(sys.argv[1], "
            "weights_only=True); s.save_file({k: v.clone().contiguous() for k, v in w.items()}, "
            "sys.argv[2])"
        )
        quoted = [shlex.quote(str(folder / name)) for name in (PICKLE, FILE)]
        raise InputError(
            f"{folder / PICKLE}: pickled weights are never loaded; convert them, where torch is "
            f'installed, by: python -c "{script}" {" ".join(quoted)}'
        )
    raise InputError(
        f"{folder / FILE}: missing; save the model with transformers' "
        "save_pretrained(folder, safe_serialization=True)"
    )


def read_json(path: pathlib.Path, kind: type = dict) -> Any:
    """Returns the object, or list, that a file of a model holds.

    Raises:
      InputError: it holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not JSON ({e.msg}); restore the model's file") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 ({e}); restore the model's file") from e
    if not isinstance(found, kind):
        name = "object" if kind is dict else "list"
        raise InputError(f"{path}: holds no JSON {name}; restore the model's file")
    return found


def _optional(path: pathlib.Path, **kinds) -> dict:
    """Returns the object in a file, {} without one, as `_checked`."""
    return _checked(path, read_json(path), **kinds) if path.is_file() else {}


def _checked(path: pathlib.Path, found: dict, **kinds) -> dict:
    """Returns what a file holds; raises InputError if one of the settings is not of its kind."""
    for key, kind in kinds.items():
        value = found.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise InputError(f"{path}: {key} is {value!r}; restore the model's file")
    return found


def read(folder: pathlib.Path) -> Released:
    """Returns what a model folder says of its model.

    A folder without `modules.json` has cls pooling and dot products, as RocketQAv2.

    Raises:
      InputError: a file is missing or cannot be read, or says something that is not understood.
    """
    modules = _Modules(folder)
    encoder = modules.encoder
    if not (encoder / "config.json").is_file():
        raise InputError(f"{encoder / 'config.json'}: missing; copy the model's own config.json")
    tensor_files(encoder)
    hf = _architecture(encoder)
    longest = modules.longest(hf["max_position_embeddings"])
    found = plain(encoder, num_layers=hf["num_hidden_layers"], longest=longest)
    if modules.is_retriever:
        pooling, include_prompt = modules.pooling()
        prompts = modules.prompts()
        if not include_prompt and any(prompts.values()):
            raise InputError(
                f"{folder}: its pooling leaves out the prompt (include_prompt is false), which is not "
                "understood; use another model"
            )
        found = dataclasses.replace(
            found,
            pooling=pooling,
            similarity=modules.similarity(),
            query_prompt=prompts["query"],
            passage_prompt=prompts["passage"],
            passage_format=modules.settings.get(OWN_KEY, {}).get("passage_format", "title_text"),
        )
    head = modules.head(hf)
    lower = bool(modules.transformer["do_lower_case"])
    return dataclasses.replace(found, head=head, lower=lower, notes=tuple(modules.notes))


def plain(folder: pathlib.Path, *, num_layers: int, longest: int) -> Released:
    """Returns what a folder says that holds an encoder and nothing else, read as RocketQAv2's are."""
    return Released(
        folder=folder,
        pooling="cls",
        similarity="dot",
        query_prompt="",
        passage_prompt="",
        passage_format="title_sep_text",
        longest=longest,
        num_layers=num_layers,
        lower=False,
        head=None,
        notes=(),
    )


class _Modules:
    """The files of sentence-transformers in a folder; there may be none."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.notes = folder, []
        path = folder / "modules.json"
        self.there = path.is_file()
        self.settings = _optional(folder / "config_sentence_transformers.json", **{OWN_KEY: dict})
        listed = read_json(path, list) if self.there else []
        self.modules = []
        for module in listed:
            if not isinstance(module, dict) or not isinstance(module.get("path"), str):
                raise InputError(
                    f"{path}: a module has no type or no path; restore the model's file"
                )
            self.modules.append(
                (str(module.get("type")).rsplit(".", 1)[-1], folder / module["path"])
            )
        kinds = [kind for kind, _ in self.modules]
        kind = self.settings.get("model_type", "SentenceTransformer")
        if kind not in ("SentenceTransformer", "CrossEncoder"):
            raise InputError(
                f"{folder / 'config_sentence_transformers.json'}: model_type {kind!r} is not "
                "understood; use a SentenceTransformer or a CrossEncoder"
            )
        self.is_reranker = self.there and kind == "CrossEncoder"
        self.is_retriever = self.there and not self.is_reranker
        known = [["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]]
        if self.is_reranker:
            known = [["Transformer"], ["Transformer", "Pooling", "Dense"]]
        if self.there and kinds not in known:
            strange = next((kind for kind in kinds if kind not in known[-1]), " + ".join(kinds))
            raise InputError(
                f"{path}: module {strange} is not understood; use a model made of "
                f"{' or '.join(' + '.join(each) for each in known)}"
            )
        self.kinds = kinds
        self.encoder = self.modules[0][1] if self.there else folder
        path = self.encoder / "sentence_bert_config.json"
        said = _optional(path, max_seq_length=int)
        self.transformer = {"max_seq_length": None, "do_lower_case": False, **said}
        if unused := sorted(said.keys() - TRANSFORMER_KEYS):
            self.notes.append(f"{path}: settings left unused: {', '.join(unused)}")

    def pooling(self) -> tuple[str, bool]:
        """Returns how states are pooled, and whether the prompt's count too."""
        path = self.modules[1][1] / "config.json"
        if not path.is_file():
            raise InputError(f"{path}: missing, though modules.json names it; copy the whole model")
        found = _checked(path, read_json(path), pooling_mode=(str, list))
        modes = found.get("pooling_mode", [n for k, n in POOLING_FLAGS.items() if found.get(k)])
        modes = [modes] if isinstance(modes, str) else modes
        # sentence-transformers takes the mean where nothing is said.
        return " + ".join(map(str, modes or ["mean"])), bool(found.get("include_prompt", True))

    def similarity(self) -> str:
        """Returns "dot" or "cosine", or another name if the folder says so."""
        said = self.settings.get("similarity_fn_name")
        if "Normalize" in self.kinds:
            return "cosine" if said in (None, "cosine", "dot") else str(said)
        if said in (None, "cosine"):
            self.notes.append(
                f"{self.folder}: has no Normalize module and compares by cosine, so vectors are "
                "normalised here and not by SentenceTransformer.encode"
            )
            return "cosine"
        return str(said)

    def prompts(self) -> dict[str, str]:
        """Returns the prompt of queries and that of passages.

        Each is the side's own, or the default one unless that belongs to the other side.
        """
        path = self.folder / "config_sentence_transformers.json"
        given = self.settings.get("prompts") or {}
        if not isinstance(given, dict) or not all(isinstance(x, str) for x in given.values()):
            raise InputError(f"{path}: prompts are not texts by name; restore the model's file")
        default = self.settings.get("default_prompt_name")
        if default is not None and default not in given:
            raise InputError(f"{path}: its default prompt {default!r} is not among its prompts")
        used, found = set(), {}
        for side, names in PROMPTS.items():
            name = next((name for name in names if name in given), None)
            others = {name for other in PROMPTS if other != side for name in PROMPTS[other]}
            if name is None and default not in others:
                name = default
            used.add(name)
            found[side] = "" if name is None else given[name]
        unused = [name for name, text in given.items() if text and name not in used]
        if unused:
            self.notes.append(f"{path}: prompts left unused: {', '.join(unused)}")
        return found

    def longest(self, positions: int) -> int:
        """Returns the most tokens of an input that the model was made for."""
        said = self.transformer["max_seq_length"]
        if said is None:
            # Tokenizers without a limit name a huge number.
            path = self.encoder / "tokenizer_config.json"
            tokenizer = _optional(path, model_max_length=(int, float))
            said = tokenizer.get("model_max_length") or positions
        return int(min(said, positions))

    def head(self, hf: dict) -> Head | str | None:
        """Returns the score of a re-ranker, None if there is none, a line if it cannot be used."""
        path = self.encoder / "config.json"
        if self.is_reranker and self.settings.get("default_prompt_name"):
            path = self.folder / "config_sentence_transformers.json"
            return f"{path}: a re-ranker's default prompt is not understood"
        if self.is_reranker and self.kinds[1:]:
            return self._dense_head()
        if self.is_retriever:
            return None
        architecture = hf["architecture"]
        # transformers gives a classifier two labels where nothing is said.
        labels = hf.get("num_labels") or len(hf.get("id2label") or ("no", "yes"))
        if architecture.endswith("ForSequenceClassification"):
            form = "pooler"
        elif architecture.endswith("ForTokenClassification"):
            form = "linear"
        elif architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining")):
            return None
        else:
            return f"{path}: {architecture} has a head that is not understood"
        if labels != 1:
            return f"{path}: {architecture} has {labels} labels, and a re-ranker has one"
        self._note_activation(hf)
        return Head(form, self.encoder, "classifier")

    def _note_activation(self, hf: dict):
        said = (hf.get("sentence_transformers") or {}).get("activation_fn")
        said = self.settings.get("activation_fn") or said
        said = said or hf.get("sbert_ce_default_activation_function")
        if said and not str(said).endswith("Identity"):
            self.notes.append(
                f"{self.folder}: its activation {str(said).rsplit('.', 1)[-1]} is left out; scores are "
                "the logits before it"
            )

    def _dense_head(self) -> Head | str:
        pooling, _ = self.pooling()
        folder = self.modules[2][1]
        path = folder / "config.json"
        found = {"use_residual": False, "module_output_name": "", **_optional(path)}
        wanted = {"out_features": 1, "bias": True, "use_residual": False}
        wanted |= {"module_input_name": "sentence_embedding", "module_output_name": "scores"}
        for key, value in wanted.items():
            if found.get(key) != value:
                return f"{path}: {key} is {found.get(key)!r}, and a re-ranker's is {value!r}"
        if not str(found.get("activation_function")).endswith("Identity"):
            return f"{path}: activation_function is not Identity, which alone is understood"
        if pooling != "cls":
            return (
                f"{self.folder}: its score reads {pooling} pooling, a re-ranker's the first token"
            )
        self._note_activation({})
        return Head("linear", folder, "linear")


def _architecture(folder: pathlib.Path) -> dict:
    """Returns `config.json`, what it leaves out filled in, with `architecture`, the first it names.

    Raises:
      InputError: not a BERT or an ERNIE.
    """
    path = folder / "config.json"
    hf = read_json(path)
    named = _checked(path, hf, architectures=list).get("architectures") or [""]
    for key, default in DEFAULTS.items():
        value = hf.get(key, default)
        wanted = int | float if isinstance(default, float) else type(default)
        sound = isinstance(value, wanted) and not isinstance(value, bool)
        if not sound or (wanted is int and value < 1):
            raise InputError(f"{path}: {key} is {value!r}; restore the model's own config.json")
    kind = hf.get("model_type")
    if kind is None:
        kind = next(
            (k for k in ("bert", "ernie") if re.match(f"{k}(Model|For)", named[0], re.I)), None
        )
    if kind not in ("bert", "ernie"):
        raise InputError(f"{path}: model_type is {kind!r}; only 'bert' and 'ernie' are understood")
    if hf.get("position_embedding_type") not in (None, "absolute"):
        raise InputError(f"{path}: position_embedding_type must be 'absolute'")
    if hf.get("is_decoder"):
        raise InputError(f"{path}: is_decoder is true; only encoders are understood")
    # Without a name, what CrossEncoder would take it for cannot be told from a plain encoder.
    return {**DEFAULTS, **hf, "architecture": named[0] or "BertModel"}


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
    """Returns `config.json` as a `BertConfig`, cut to the first `num_layers` layers.

    Raises:
      InputError: no JSON, another architecture, or more layers than there are.
    """
    path = folder / "config.json"
    hf = _architecture(folder)
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
