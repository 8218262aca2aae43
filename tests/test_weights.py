"""Hugging Face folders to params: complete, strict, and with one clear line for what is wrong."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from shapes import read_shape

from rqv2_jax.data.packing import Block
from rqv2_jax.data.tokenise import TOKENIZER_FILES
from rqv2_jax.models import bert, exported, weights

QUERY = "encoder.layer.0.attention.self.query.weight"
NORM = "encoder.layer.1.output.LayerNorm"
WORDS = "embeddings.word_embeddings.weight"


def load(folder, num_layers=2):
    config = read_shape(folder, num_layers)
    return weights.load_encoder(folder, config)


@pytest.fixture(scope="module")
def folder(make_bert):
    return make_bert()[0]


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder to spoil: `copy.tensors(change)` and `copy.config(**changes)`."""

    class Copy:
        path = tmp_path / "model"
        weights = path / "model.safetensors"

        def tensors(self, change):
            tensors = load_file(self.weights)
            change(tensors)
            save_file({k: v.contiguous() for k, v in tensors.items()}, self.weights)

        def config(self, **changes):
            config = {**json.loads((self.path / "config.json").read_text()), **changes}
            config = {key: value for key, value in config.items() if value != "drop"}
            (self.path / "config.json").write_text(json.dumps(config))

    shutil.copytree(folder, Copy.path)
    return Copy()


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(other)):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, expected)


def test_params_are_those_the_encoder_asks_for(folder):
    config = read_shape(folder, 2)
    ids = jnp.zeros((1, 8), jnp.int32)
    asked = jax.eval_shape(
        lambda key: bert.Encoder(config).init(key, (Block(*[ids] * 5),), deterministic=True),
        jax.random.key(0),
    )["params"]
    shape_of = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)  # noqa: E731
    assert shape_of(load(folder)) == shape_of(asked)


def test_every_wanted_number_of_the_file_is_used_once(copy):
    """Every tensor gets numbers of its own; together they are the params, none left out or doubled."""
    expected = []

    def number(tensors):
        start = 0
        for name, tensor in tensors.items():
            values = torch.arange(start, start + tensor.numel()).reshape(tensor.shape)
            start += tensor.numel()
            tensors[name] = values.float()
            if not name.startswith("pooler."):
                expected.append(values.reshape(-1).numpy())
        assert start < 2**24

    copy.tensors(number)
    leaves = jax.tree.leaves(load(copy.path))
    found = np.concatenate([leaf.reshape(-1) for leaf in leaves])
    np.testing.assert_array_equal(np.sort(found), np.sort(np.concatenate(expected)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(copy, dtype):
    halves = {}

    def halve(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        halves.update(tensors)

    copy.tensors(halve)
    params = load(copy.path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        params["embeddings"]["word"]["embedding"], halves[WORDS].float().numpy()
    )
    np.testing.assert_array_equal(
        params["layers"]["qkv"]["kernel"][0, :, :32], halves[QUERY].float().numpy().T
    )


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining", "ErnieForMaskedLM"])
def test_prefixes_and_heads_of_pretraining(make_bert, name):
    found, model = make_bert(3, name)
    prefix = name[: name.index("For")].lower()
    assert any(key.startswith(f"{prefix}.") for key in load_file(found / "model.safetensors"))
    params = load(found)
    word = getattr(model, prefix).embeddings.word_embeddings.weight
    np.testing.assert_array_equal(params["embeddings"]["word"]["embedding"], word.detach())


def test_old_names(copy, folder):
    def rename(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors["bert." + old.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)

    copy.tensors(rename)
    assert_same(load(copy.path), load(folder))


def test_pooler_and_position_ids_are_not_wanted(copy, folder):
    def change(tensors):
        tensors["embeddings.position_ids"] = torch.arange(192)[None]
        tensors["cls.predictions.bias"] = torch.zeros(7)
        del tensors["pooler.dense.weight"], tensors["pooler.dense.bias"]

    copy.tensors(change)
    assert_same(load(copy.path), load(folder))


def test_cut_layers_come_from_the_same_file(folder):
    cut = load(folder, num_layers=1)
    whole = load(folder)
    assert_same(cut, {**whole, "layers": jax.tree.map(lambda x: x[:1], whole["layers"])})


def test_ernie_adds_its_task_embedding(make_bert):
    """As in ERNIE 2.0, whose fine-tuning uses task 0; the hidden states say so."""
    settings = {"use_task_id": True, "task_type_vocab_size": 3, "num_hidden_layers": 1}
    found, model = make_bert(4, "ErnieModel", **settings)
    config = read_shape(found, 1, dropout=0.0)
    params = weights.load_encoder(found, config)
    rng = np.random.default_rng(0)
    tokens, types = rng.integers(5, config.vocab_size, (1, 9)), np.array([[0] * 4 + [1] * 5])
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), token_type_ids=torch.tensor(types))[0][0]
    block = Block(tokens, types, np.arange(9)[None], types * 0, np.zeros((1, 1), int))
    ours = bert.Encoder(config).apply({"params": params}, (block,), deterministic=True)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    task = load_file(found / "model.safetensors")["embeddings.task_type_embeddings.weight"]
    assert task.abs().min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BertModel", "ErnieModel"])
def test_base_models_give_the_hidden_states_of_transformers(make_bert, name):
    """At real size, ERNIE 2.0's key names and task embedding included; value and gradient."""
    settings = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12}
    settings |= {"num_attention_heads": 12, "intermediate_size": 3072}
    settings |= {"max_position_embeddings": 512, "type_vocab_size": 2}
    if name == "ErnieModel":
        settings |= {"use_task_id": True, "task_type_vocab_size": 3, "type_vocab_size": 4}
    found, model = make_bert(5, name, **settings)
    config = read_shape(found, 12, dropout=0.0, unrolled=False)
    params = weights.load_encoder(found, config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, config.vocab_size, (2, 48))
    types = np.repeat([0, 1], 24)[None].repeat(2, 0)
    theirs = model(torch.tensor(tokens), token_type_ids=torch.tensor(types))[0].flatten(0, 1)
    direction = rng.normal(size=theirs.shape).astype(np.float32)
    (theirs * torch.tensor(direction)).sum().backward()

    def encode(params):
        positions = np.arange(48)[None].repeat(2, 0)
        sequence = np.arange(2)[:, None].repeat(48, 1)
        block = Block(tokens, types, positions, sequence, np.zeros((2, 1), int))
        states = bert.Encoder(config).apply({"params": params}, (block,), deterministic=True)
        return jnp.vdot(states, direction), states

    (_, ours), grads = jax.jit(jax.value_and_grad(encode, has_aux=True))(params)
    np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-4)
    for layer in (0, 11):
        expected = model.encoder.layer[layer].intermediate.dense.weight.grad.T.numpy()
        found_grad = grads["layers"]["intermediate"]["kernel"][layer]
        np.testing.assert_allclose(found_grad, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", [QUERY, WORDS, NORM + ".bias", "embeddings.LayerNorm.weight"])
def test_missing_tensor(copy, name):
    copy.tensors(lambda tensors: tensors.pop(name))
    refused(lambda: load(copy.path), copy.weights, repr(name), "missing")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (QUERY, [32, 31]),
        (WORDS, [99, 32]),
        (NORM + ".weight", [1]),
        ("encoder.layer.1.intermediate.dense.weight", [32, 64]),
    ],
)
def test_misshapen_tensor(copy, name, shape):
    copy.tensors(lambda tensors: tensors.update({name: torch.zeros(shape)}))
    refused(lambda: load(copy.path), copy.weights, repr(name), shape)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.0.attention.self.query.lora_A",
        "embeddings.extra.weight",
        "decoder.weight",
        "poolers",
    ],
)
def test_unexpected_tensor(copy, name):
    def add(tensors):
        tensors[name] = torch.zeros(3)

    copy.tensors(add)
    refused(lambda: load(copy.path), copy.weights, repr(name))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(copy, value):
    def spoil(tensors):
        tensors[QUERY][3, 4] = value

    copy.tensors(spoil)
    refused(lambda: load(copy.path), copy.weights, repr(QUERY), "NaN")


def test_tensors_of_two_models_in_one_file(copy):
    def double(tensors):
        tensors["bert." + QUERY] = tensors[QUERY] + 1

    copy.tensors(double)
    refused(lambda: load(copy.path), copy.weights, QUERY)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x10" + bytes(7) + b"{}", "truncated"])
def test_no_safetensors_file(copy, content):
    if content == "truncated":
        content = copy.weights.read_bytes()[:-100]
    copy.weights.write_bytes(content)
    refused(lambda: load(copy.path), copy.weights)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "roberta"}, "'roberta'"),
        ({"model_type": "drop", "architectures": ["RobertaModel"]}, "None"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"hidden_act": "silu"}, "'silu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"num_hidden_layers": 1}, "num_layers is 2"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
    ],
)
def test_config_that_cannot_be_used(copy, changes, named):
    copy.config(**changes)
    refused(lambda: load(copy.path), copy.path / "config.json", named)


@pytest.mark.parametrize("num_layers", [0, 3])
def test_more_layers_than_there_are(folder, num_layers):
    refused(lambda: load(folder, num_layers), folder / "config.json", f"num_layers is {num_layers}")


@pytest.mark.parametrize("content", [b'{"model_type":\n', b"[]", b"\xff\xfe"])
def test_config_that_is_no_json_object(copy, content):
    (copy.path / "config.json").write_bytes(content)
    refused(lambda: load(copy.path), copy.path / "config.json")


def test_config_of_another_model(copy):
    copy.config(hidden_size=64)
    refused(lambda: load(copy.path), copy.weights, WORDS)


def test_written_encoders_are_read_back(folder, tmp_path):
    config = read_shape(folder, 1)
    params = weights.load_encoder(folder, config)
    exported.save_encoder(tmp_path / "query", folder, config, params)
    assert read_shape(tmp_path / "query", 1) == config
    again = weights.load_encoder(tmp_path / "query", config)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    there = {path.name for path in folder.iterdir()} & set(TOKENIZER_FILES)
    assert there
    for name in there:
        assert (tmp_path / "query" / name).read_bytes() == (folder / name).read_bytes()
