"""Model folders as other systems open them: transformers, SentenceTransformer and CrossEncoder."""

import json
import pathlib
import shutil

import numpy as np
from safetensors.numpy import save_file

from rqv2_jax import config as config_lib
from rqv2_jax.data.tokenise import TOKENIZER_FILES
from rqv2_jax.models import bert, released
from rqv2_jax.models.weights import EMBEDDINGS, LAYERS


def save_encoder(
    folder: pathlib.Path, source: pathlib.Path, config: bert.BertConfig, params: dict, head=None
):
    """Writes a folder that transformers opens: an encoder with the tokenizer of the one it began as.

    Args:
      folder: made here.
      source: the folder the encoder's weights were first read from.
      params: in the layout of `bert.Encoder`.
      head: params of a re-ranker's score. With a pooler, the folder is a sequence classifier with one
        label; without, its vector goes to `2_Dense`, where CrossEncoder reads it.
    """
    folder.mkdir(parents=True)
    classifier = head is not None and "pooler" in head
    # An embedding of ERNIE's tasks is part of the types' since it was read, so this is a BERT.
    described = {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification" if classifier else "BertModel"],
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
    }
    prefix = ""
    if classifier:
        prefix = "bert."
        described |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        # Its name today, and the one that releases before 4 read.
        described["sentence_transformers"] = {"activation_fn": released.IDENTITY}
        described["sbert_ce_default_activation_function"] = released.IDENTITY
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
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
    if head is not None and not classifier:
        (folder / "2_Dense").mkdir()
        _save(folder / "2_Dense", _vector(head, "linear"))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _vector(head: dict, prefix: str) -> dict[str, np.ndarray]:
    kernel_D, bias = np.asarray(head["kernel"]), np.asarray(head["bias"])
    return {f"{prefix}.weight": kernel_D[None], f"{prefix}.bias": bias[None]}


def _save(folder: pathlib.Path, tensors: dict[str, np.ndarray]):
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / released.FILE, metadata={"format": "pt"})


def describe_retriever(folder: pathlib.Path, size: int, model, length: int):
    """Adds the files by which sentence-transformers opens a tower.

    Args:
      size: of the vectors.
      model: the resolved `config.model`.
      length: most tokens of an input.
    """
    names = ["Transformer", "Pooling"] + ["Normalize"] * (model.similarity == "cosine")
    prompts = {"query": model.query_prompt, "document": model.passage_prompt}
    pooling = {
        f: mode == model.pooling
        for f, mode in released.POOLING_FLAGS.items()
        if mode in ("cls", "mean")
    }
    settings = {
        "model_type": "SentenceTransformer",
        "similarity_fn_name": model.similarity,
        "prompts": {k: "" if p == config_lib.NO_PROMPT else p for k, p in prompts.items()},
        "default_prompt_name": None,
        released.OWN_KEY: {"passage_format": model.passage_format},
    }
    _describe(folder, names, length, settings)
    pooling = {"word_embedding_dimension": size, **pooling}
    _write(folder / "1_Pooling" / "config.json", pooling)


def describe_reranker(folder: pathlib.Path, size: int, head: str, length: int):
    """Adds the files by which CrossEncoder opens a re-ranker and gives its logits.

    Args:
      size: of the encoder's states.
      head: "linear" or "pooler".
      length: most tokens of an input.
    """
    settings = {"model_type": "CrossEncoder", "activation_fn": released.IDENTITY, "prompts": {}}
    names = ["Transformer"] + ["Pooling", "Dense"] * (head == "linear")
    _describe(folder, names, length, settings)
    if head == "linear":
        pooling = {"word_embedding_dimension": size, "pooling_mode_cls_token": True}
        _write(folder / "1_Pooling" / "config.json", pooling)
        dense = {"in_features": size, "out_features": 1, "bias": True}
        dense |= {
            "activation_function": released.IDENTITY,
            "module_input_name": "sentence_embedding",
        }
        _write(folder / "2_Dense" / "config.json", {**dense, "module_output_name": "scores"})


def _describe(folder, names, length, settings):
    module = "sentence_transformers.models."
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": module + name}
        for i, name in enumerate(names)
    ]
    task = "sequence-classification" if names == ["Transformer"] else "feature-extraction"
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    if names == ["Transformer"]:
        output["method_output_name"] = "logits"
    transformer = {
        "max_seq_length": length,
        "do_lower_case": False,
        "transformer_task": task,
        "modality_config": {"text": output},
        "module_output_name": "scores" if names == ["Transformer"] else "token_embeddings",
    }
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", transformer)
    _write(folder / "config_sentence_transformers.json", settings)


def _write(path: pathlib.Path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
