"""Model folders with random weights, for measuring speed where no weights lie on disk."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rqv2_jax.data.packing import Block
from rqv2_jax.models import bert, exported
from rqv2_jax.models.released import KEYS

# BERT base (Devlin et al. 2019), with the four types of ERNIE 2.0 base.
BASE: dict[str, Any] = {
    field: default for field, default in KEYS.values() if field not in ("num_layers", "dropout")
}
BASE["type_vocab_size"] = 4
# The shapes by name, with their number of layers: those of BERT base, of all-MiniLM-L6-v2 and of the
# smallest BERT of Turc et al. 2019.
SHAPES = {
    "bert-base": (BASE, 12),
    "minilm": (BASE | {"hidden_size": 384, "intermediate_size": 1536, "type_vocab_size": 2}, 6),
    "bert-tiny": (BASE | {"hidden_size": 128, "num_heads": 2, "intermediate_size": 512}, 2),
}

# Each is one token, in the vocabularies made here and in BERT's.
WORDS = [str(number) for number in (*range(10, 100), *range(1900, 2015))]


def params_like(config: bert.BertConfig) -> bert.Params:
    """Returns an encoder's params as `jax.ShapeDtypeStruct`s."""
    blocks = (Block(*[jnp.zeros((1, 128), jnp.int32)] * 5),)
    init = functools.partial(bert.Encoder(config).init, deterministic=True)
    return jax.eval_shape(init, jax.random.key(0), blocks)["params"]


def write(name: str, folder: pathlib.Path) -> None:
    """Writes a model folder of one of `SHAPES`: random weights, and a tokenizer that knows `WORDS`."""
    # Slow to import.
    import transformers

    shape, layers = SHAPES[name]
    config = bert.BertConfig(
        **shape,
        num_layers=layers,
        dropout=0.1,
        dtype="float32",
        remat="none",
        attention="plain",
        unrolled=False,
    )
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        if kind in ("bias", "scale"):
            return np.full(leaf.shape, float(kind == "scale"), np.float32)
        # Larger than BERT's initial weights, so that texts change their scores without training.
        return rng.standard_normal(leaf.shape, np.float32) * leaf.shape[-2] ** -0.5

    params = jax.tree_util.tree_map_with_path(draw, params_like(config))
    exported.save_encoder(folder, folder, config, params)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokens += [f"[unused{i}]" for i in range(config.vocab_size - len(tokens))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
