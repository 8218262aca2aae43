"""Released models: what their folders say of them.

Reads plain Hugging Face folders (`config.json`, tensors, tokenizer), those of sentence-transformers
(pooling, normalisation, prompts, similarity, longest input) and of its CrossEncoder. Settings that are
not understood are errors, and settings left unused become notes.
"""

import dataclasses
import pathlib
from typing import NamedTuple

from rqv2_jax.errors import InputError
from rqv2_jax.models import sbert
from rqv2_jax.models.files import find_folder, tensor_files
from rqv2_jax.models.hf_config import read_architecture


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

    A name stands for a model for all encoders, or for a folder with query/, passage/ and reranker/, as
    `rqv2_jax.export --format huggingface` writes it. An empty `reranker` stands for `weights`.

    Raises:
      InputError: as `find_folder` and `read`.
    """
    query, passage = _subfolder(weights, "query"), _subfolder(weights, "passage")
    towers = [read(find_folder(name)) for name in dict.fromkeys((query, passage))]
    setting = "reranker.weights" if reranker else "weights"
    scorer = read(find_folder(_subfolder(reranker or weights, "reranker"), setting))
    return Sources(towers[0], towers[-1], scorer)


def _subfolder(weights: str, name: str) -> str:
    folder = pathlib.Path(weights)
    return str(folder / name) if (folder / "query").is_dir() else weights


def read(folder: pathlib.Path) -> Released:
    """Returns what a model folder says of its model.

    A folder without `modules.json` has cls pooling and dot products, as RocketQAv2.

    Raises:
      InputError: a file is missing or cannot be read, or says something that is not understood.
    """
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
            "query_prompt": prompts["query"],
            "passage_prompt": prompts["passage"],
            "passage_format": own.get("passage_format", "title_text"),
        }
    settings["head"] = described.head(hf)
    settings["lower"] = bool(described.transformer["do_lower_case"])
    layers, notes = hf["num_hidden_layers"], tuple(described.notes)
    return Released(encoder, longest, layers, longest_from, **settings, notes=notes)
