"""Model folders written for other systems: transformers, SentenceTransformer and CrossEncoder."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from rqv2_jax.data.tokenise import TOKENIZER_FILES
from rqv2_jax.models import sbert
from rqv2_jax.models.bert import BertConfig, Params
from rqv2_jax.models.files import TENSORS
from rqv2_jax.models.released import KEYS
from rqv2_jax.models.weights import EMBEDDINGS, LAYERS


def save_encoder(
    folder: pathlib.Path,
    source: pathlib.Path,
    config: BertConfig,
    params: Params,
    head: Params | None = None,
) -> None:
    """Writes a folder that transformers opens: an encoder and the tokenizer of `source`.

    `head` are the params of a re-ranker's score. With a pooler, the folder is a sequence classifier
    with one label; without, the vector goes to `2_Dense`, where CrossEncoder reads it.
    """
    folder.mkdir(parents=True)
    head = head or {}
    classifier = "pooler" in head
    # `weights` adds ERNIE's task embedding to that of the types, so the folder is a BERT's.
    described = {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification" if classifier else "BertModel"],
        **{key: getattr(config, field) for key, (field, _) in KEYS.items()},
    }
    prefix = ""
    if classifier:
        prefix = "bert."
        described |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        # The key of today, and the one that sentence-transformers before 4 reads.
        described["sentence_transformers"] = {"activation_fn": sbert.IDENTITY}
        described["sbert_ce_default_activation_function"] = sbert.IDENTITY
    _write(folder / "config.json", described)
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
    if classifier:
        tensors["bert.pooler.dense.weight"] = np.asarray(head["pooler"]["kernel"]).T
        tensors["bert.pooler.dense.bias"] = np.asarray(head["pooler"]["bias"])
        tensors |= _vector(head, "classifier")
    _save(folder, tensors)
    if head and not classifier:
        (folder / "2_Dense").mkdir()
        _save(folder / "2_Dense", _vector(head, "linear"))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _vector(head: Params, prefix: str) -> dict[str, np.ndarray]:
    kernel_D, bias = np.asarray(head["kernel"]), np.asarray(head["bias"])
    return {f"{prefix}.weight": kernel_D[None], f"{prefix}.bias": bias[None]}


def _save(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def describe_retriever(folder: pathlib.Path, size: int, model: ConfigDict, length: int) -> None:
    """Adds the files by which sentence-transformers opens a tower.

    Its vectors have `size` columns, its inputs at most `length` tokens; `model` is the resolved one.
    """
    names = ["Transformer", "Pooling"] + ["Normalize"] * (model.similarity == "cosine")
    prompts = {"query": model.query_prompt, "document": model.passage_prompt}
    settings = {
        "model_type": "SentenceTransformer",
        "similarity_fn_name": model.similarity,
        "prompts": {k: "" if p == sbert.NO_PROMPT else p for k, p in prompts.items()},
        "default_prompt_name": None,
        sbert.OWN_KEY: {"passage_format": model.passage_format},
    }
    _describe(folder, names, length, settings)
    _write(folder / "1_Pooling" / "config.json", _pooling(size, model.pooling))


def _pooling(size: int, pooling: str) -> dict[str, Any]:
    """Returns what 1_Pooling/config.json holds of states with `size` columns."""
    return {
        "word_embedding_dimension": size,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
    }


def describe_reranker(
    folder: pathlib.Path, size: int, head: str, pooling: str, length: int
) -> None:
    """Adds the files by which CrossEncoder opens a re-ranker and gives its logits.

    Its states have `size` columns, its inputs at most `length` tokens; `head` and `pooling`
    are those of `scoring.Models`.
    """
    settings = {"model_type": "CrossEncoder", "activation_fn": sbert.IDENTITY, "prompts": {}}
    names = ["Transformer"] + ["Pooling", "Dense"] * (head == "linear")
    _describe(folder, names, length, settings)
    if head == "linear":
        _write(folder / "1_Pooling" / "config.json", _pooling(size, pooling))
        dense: dict[str, Any] = {"in_features": size, "out_features": 1, "bias": True}
        dense |= {"activation_function": sbert.IDENTITY, "module_input_name": "sentence_embedding"}
        _write(folder / "2_Dense" / "config.json", {**dense, "module_output_name": "scores"})


def _describe(
    folder: pathlib.Path, names: list[str], length: int, settings: dict[str, Any]
) -> None:
    """Writes the files that name the modules and their settings."""
    module = "sentence_transformers.models."
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": module + name}
        for i, name in enumerate(names)
    ]
    task, output, name = "feature-extraction", "last_hidden_state", "token_embeddings"
    if names == ["Transformer"]:
        task, output, name = "sequence-classification", "logits", "scores"
    transformer = {
        "max_seq_length": length,
        "do_lower_case": False,
        "transformer_task": task,
        "modality_config": {"text": {"method": "forward", "method_output_name": output}},
        "module_output_name": name,
    }
    _write(folder / sbert.MODULES, modules)
    _write(folder / sbert.TRANSFORMER, transformer)
    _write(folder / sbert.SETTINGS, settings)


def _write(path: pathlib.Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
