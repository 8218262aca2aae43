"""Params from the tensors of Hugging Face BERT or ERNIE folders.

Strict: every tensor is used once or belongs to a head that an encoder has no use for, every param comes
from the files, every shape is what `config.json` promises, and every number is finite. Otherwise all
functions raise InputError.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator

import numpy as np
from safetensors import SafetensorError, safe_open

from rqv2_jax.errors import InputError
from rqv2_jax.models import bert
from rqv2_jax.models.files import tensor_files
from rqv2_jax.models.sbert import Head

# An encoder returns hidden states, so it has no use for a pooler or a head.
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


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[safe_open]:
    """Opens a safetensors file; raises InputError if it cannot be read."""
    try:
        with safe_open(path, framework="flax") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a readable safetensors file ({e}); copy it again") from e


class _Tensors:
    """The tensors of a folder by name, without the prefix `bert.` or `ernie.`, in float32."""

    def __init__(self, folder: pathlib.Path):
        self.files: dict[str, pathlib.Path] = {}  # by name
        self.arrays: dict[str, np.ndarray] = {}
        paths = tensor_files(folder)
        self.folder = paths[0] if len(paths) == 1 else folder
        for path in paths:
            with _opened(path) as f:
                for name in f.keys():  # noqa: SIM118
                    self._add(path, name, np.asarray(f.get_tensor(name)))

    def _add(self, path: pathlib.Path, name: str, tensor: np.ndarray) -> None:
        plain = _plain(name)
        if plain in self.files:
            raise InputError(
                f"{path}: tensor {plain!r} is there twice, with and without a prefix, by its old name "
                "or in two files; give the files of one model"
            )
        if tensor.dtype.kind not in "iub":
            tensor = tensor.astype(np.float32)
            if not np.isfinite(tensor).all():
                raise InputError(
                    f"{path}: tensor {plain!r} holds NaN or infinite values; copy it again"
                )
        self.files[plain], self.arrays[plain] = path, tensor

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Removes a tensor of this shape and returns it."""
        if name not in self.arrays:
            raise InputError(
                f"{self.folder}: tensor {name!r} is missing; is this file of another model?"
            )
        tensor = self.arrays.pop(name)
        if tensor.shape != shape:
            raise InputError(
                f"{self.files[name]}: tensor {name!r} has shape {list(tensor.shape)}, but config.json "
                f"promises {list(shape)}; use the config.json that belongs to it"
            )
        return tensor


def _plain(name: str) -> str:
    """Returns a tensor's present-day name, without the model's prefix."""
    name = re.sub(r"^(bert|ernie)\.", "", name)
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def unused(folder: pathlib.Path, head: Head | None) -> list[str]:
    """Returns the names of a folder's tensors that neither the encoder nor the head `head` reads."""
    read = {"linear": ("classifier",), "pooler": ("classifier", "pooler")}
    kept = read[head.form] if head is not None and head.folder == folder else ()
    names = []
    for path in tensor_files(folder):
        with _opened(path) as f:
            names += [_plain(name) for name in f.keys()]  # noqa: SIM118
    return sorted(n for n in names if UNWANTED.fullmatch(n) and not n.startswith(kept))


def load_encoder(folder: pathlib.Path, config: bert.BertConfig) -> bert.Params:
    """Returns encoder params in the layout of `bert.Encoder`: float32 numpy, layers on axis 0."""
    tensors = _Tensors(folder)
    take = tensors.take
    d, f = config.hidden_size, config.intermediate_size
    widths = {"intermediate": (d, f), "output": (f, d)}

    rows = {
        "word": config.vocab_size,
        "position": config.max_positions,
        "type": config.type_vocab_size,
    }
    embeddings: dict = {}
    for (module, leaf), name in EMBEDDINGS.items():
        shape = (rows[module], d) if module in rows else (d,)
        embeddings.setdefault(module, {})[leaf] = take(name, shape)
    if TASK_EMBEDDING in tensors.arrays:
        # ERNIE 2.0 adds a task embedding to every token; fine-tuning always uses that of task 0.
        task = take(TASK_EMBEDDING, (len(tensors.arrays[TASK_EMBEDDING]), d))
        embeddings["type"]["embedding"] += task[0]

    layers: dict = {}
    for (module, leaf), names in LAYERS.items():
        d_in, d_out = widths.get(module, (d, d))
        shape = (d_out, d_in) if leaf == "kernel" else (d_out,)
        per_layer = [
            np.concatenate([take(name.format(layer), shape) for name in names]).T
            for layer in range(config.num_layers)
        ]
        layers.setdefault(module, {})[leaf] = np.stack(per_layer)

    layer_of = re.compile(r"encoder\.layer\.(\d+)\..*")
    for name in tensors.arrays:
        layer = layer_of.fullmatch(name)
        if not UNWANTED.fullmatch(name) and not (layer and int(layer[1]) >= config.num_layers):
            raise InputError(
                f"{tensors.files[name]}: tensor {name!r} belongs to no part of a BERT encoder; "
                "only BERT and ERNIE folders can be used"
            )
    return {"embeddings": embeddings, "layers": layers}


def load_head(head: Head, size: int) -> bert.Params:
    """Returns the params of a re-ranker's score over states of `size`, as in `scoring`."""
    tensors = _Tensors(head.folder)
    params: dict = {
        "kernel": tensors.take(f"{head.prefix}.weight", (1, size))[0],
        "bias": tensors.take(f"{head.prefix}.bias", (1,))[0],
    }
    if head.form == "pooler":
        kernel = tensors.take("pooler.dense.weight", (size, size)).T
        params["pooler"] = {"kernel": kernel, "bias": tensors.take("pooler.dense.bias", (size,))}
    return params
