"""The files by which sentence-transformers describes a model, as it reads and writes them."""

import pathlib
from typing import Any, NamedTuple

from rqv2_jax.errors import InputError
from rqv2_jax.models.files import read_json

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
POOLING = "1_Pooling"

# The chains of modules that are understood, by the kind of model.
CHAINS = {
    "SentenceTransformer": [["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]],
    "CrossEncoder": [["Transformer"], ["Transformer", "Pooling", "Dense"]],
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

# Keys of TRANSFORMER: two that are read, and three that follow from the modules.
TRANSFORMER_KEYS = {"max_seq_length", "do_lower_case"}
TRANSFORMER_KEYS |= {"transformer_task", "modality_config", "module_output_name"}

IDENTITY = "torch.nn.modules.linear.Identity"
# The names in SETTINGS of each side's prompt; the first that is there counts.
PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}
# In a config, stands for an empty prompt; an empty setting stands for the model's own prompt.
NO_PROMPT = "none"
# Our own key in SETTINGS, for what sentence-transformers has no name for.
OWN_KEY = "rqv2_jax"


class Head(NamedTuple):
    """Where the score of a re-ranker lies, and its form.

    `form`: "linear" (a state times a vector) or "pooler" (BERT's pooler, a dense layer and tanh, before
    that). `prefix` names the tensors of the vector in the tensor files of `folder`. The state is the
    first token's, or with `pooling` "mean" the mean of all.
    """

    form: str
    folder: pathlib.Path
    prefix: str
    pooling: str = "cls"


class Description:
    """The sentence-transformers files of a model folder, which may have none of them.

    `notes` collects what is left unused; files that are not understood raise InputError.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.notes = folder, []
        self.settings_path = folder / SETTINGS
        self.settings = read_json(self.settings_path, optional=True, **{OWN_KEY: dict})
        has_modules = (folder / MODULES).is_file()
        self.modules = self._read_modules() if has_modules else []
        self.kinds = [kind for kind, _ in self.modules]
        model_type = self.settings.get("model_type", "SentenceTransformer")
        if model_type not in CHAINS:
            raise InputError(
                f"{self.settings_path}: model_type {model_type!r} is not understood; use a "
                "SentenceTransformer or a CrossEncoder"
            )
        chains = CHAINS[model_type]
        if self.kinds == ["Transformer"] and not self.settings_path.is_file():
            raise InputError(
                f"{self.settings_path}: missing, though {MODULES} lists a CrossEncoder's Transformer "
                "alone; copy the whole model"
            )
        if has_modules and self.kinds not in chains:
            unknown = (kind for kind in self.kinds if kind not in chains[-1])
            strange = next(unknown, " + ".join(self.kinds))
            raise InputError(
                f"{folder / MODULES}: module {strange} is not understood; use a model made of "
                f"{' or '.join(' + '.join(chain) for chain in chains)}"
            )
        self.is_reranker = has_modules and model_type == "CrossEncoder"
        self.is_retriever = has_modules and not self.is_reranker
        self.encoder = self.modules[0][1] if has_modules else folder
        strays = [name for name in (POOLING, SETTINGS) if (folder / name).exists()]
        if strays and not has_modules:
            self.notes.append(
                f"{folder}: has {' and '.join(strays)} but no {MODULES}, so it is read as a plain "
                "Hugging Face folder (cls pooling, dot product)"
            )
        path = self.encoder / TRANSFORMER
        said = read_json(path, optional=True, max_seq_length=int)
        self.transformer = {"max_seq_length": None, "do_lower_case": False, **said}
        if unused := sorted(said.keys() - TRANSFORMER_KEYS):
            self.notes.append(f"{path}: settings left unused: {', '.join(unused)}")

    def _read_modules(self) -> list[tuple[str, pathlib.Path]]:
        """Returns the kind and the folder of each module."""
        path, modules = self.folder / MODULES, []
        for module in read_json(path, list):
            if not isinstance(module, dict) or not isinstance(module.get("path"), str):
                raise InputError(
                    f"{path}: a module has no type or no path; restore the model's file"
                )
            kind = str(module.get("type")).rsplit(".", 1)[-1]
            modules.append((kind, self.folder / module["path"]))
        return modules

    def pooling(self) -> tuple[str, bool]:
        """Returns how states are pooled, and whether the prompt's tokens are pooled too."""
        path = self.modules[1][1] / "config.json"
        if not path.is_file():
            raise InputError(f"{path}: missing, though modules.json names it; copy the whole model")
        said = read_json(path, pooling_mode=(str, list))
        modes = said.get("pooling_mode", [n for k, n in POOLING_FLAGS.items() if said.get(k)])
        modes = [modes] if isinstance(modes, str) else modes
        # sentence-transformers takes the mean where nothing is said.
        return " + ".join(map(str, modes or ["mean"])), bool(said.get("include_prompt", True))

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
        """Returns each side's prompt: its own, or the default one unless that is the other's."""
        path = self.settings_path
        given = self.settings.get("prompts") or {}
        if not isinstance(given, dict) or not all(isinstance(x, str) for x in given.values()):
            raise InputError(f"{path}: prompts are not texts by name; restore the model's file")
        default = self.settings.get("default_prompt_name")
        if default is not None and default not in given:
            raise InputError(f"{path}: its default prompt {default!r} is not among its prompts")
        used, prompts = set(), {}
        for side, names in PROMPTS.items():
            name = next((name for name in names if name in given), None)
            others = {name for other in PROMPTS if other != side for name in PROMPTS[other]}
            if name is None and default not in others:
                name = default
            used.add(name)
            prompts[side] = "" if name is None else given[name]
        unused = [name for name, text in given.items() if text and name not in used]
        if unused:
            self.notes.append(f"{path}: prompts left unused: {', '.join(unused)}")
        return prompts

    def longest(self, positions: int) -> tuple[int, str]:
        """Returns the most tokens of an input that the model was made for, and the setting's place."""
        name, setting = TRANSFORMER, "max_seq_length"
        said = self.transformer[setting]
        if said is None:
            # Tokenizers without a limit name a huge number.
            name, setting = "tokenizer_config.json", "model_max_length"
            path = self.encoder / name
            said = read_json(path, optional=True, model_max_length=(int, float)).get(setting)
        if said is None or said >= positions:
            name, setting, said = "config.json", "max_position_embeddings", positions
        return int(said), f"{self.encoder / name}: {setting}"

    def head(self, hf: dict[str, Any]) -> Head | str | None:
        """Returns the score of a re-ranker, None if there is none, a line if it cannot be used."""
        path = self.encoder / "config.json"
        if self.is_reranker and self.settings.get("default_prompt_name"):
            return f"{self.settings_path}: a re-ranker's default prompt is not understood"
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

    def _note_activation(self, hf: dict[str, Any]) -> None:
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
        said = {"use_residual": False, "module_output_name": ""}
        said |= read_json(path, optional=True)
        wanted: dict[str, Any] = {"out_features": 1, "bias": True, "use_residual": False}
        wanted |= {"module_input_name": "sentence_embedding", "module_output_name": "scores"}
        for key, value in wanted.items():
            if said.get(key) != value:
                return f"{path}: {key} is {said.get(key)!r}, and a re-ranker's is {value!r}"
        if not str(said.get("activation_function")).endswith("Identity"):
            return f"{path}: activation_function is not Identity, which alone is understood"
        if pooling not in ("cls", "mean"):
            return f"{self.folder}: its score reads {pooling} pooling, which is not understood"
        self._note_activation({})
        return Head("linear", folder, "linear", pooling)
