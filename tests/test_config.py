"""The check of a config, its way through JSON, and the differences between two."""

import importlib.util
import json
import math
import pathlib

import ml_collections
import pytest
import Stemmer

from rqv2_jax import config as config_lib
from rqv2_jax import config_check
from rqv2_jax.errors import InputError
from rqv2_jax.models import losses, released
from rqv2_jax.recipe import opening


def read_config_file(name):
    """`get_config` of a file in configs/."""
    path = pathlib.Path(__file__).parent.parent / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"configs_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def usable(**changes):
    """The defaults with a data path; `changes` are keyed by dotted name."""
    config = config_lib.default()
    config.data.path = "folder"
    return changed(config, changes)


def changed(config, changes):
    """Sets, or with "drop" removes, whatever the types: the check has to see it."""
    values = config.to_dict()
    for key, value in changes.items():
        *groups, last = key.split(".")
        group = values
        for name in groups:
            group = group.setdefault(name, {})
        if value == "drop":
            del group[last]
        else:
            group[last] = value
    return ml_collections.ConfigDict(values)


def message(**changes):
    with pytest.raises(InputError) as raised:
        config_check.check(usable(**changes))
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_defaults_pass_once_they_have_a_path():
    config_check.check(usable())
    with pytest.raises(InputError, match=r"config\.data\.path"):
        config_check.check(config_lib.default())
    config_check.check(usable(**{"data.dataset": "docstrings", "data.path": ""}))


def test_check_does_not_change_the_config():
    config = usable(**{"joint.learning_rate": 1})
    before = config.to_dict()
    config_check.check(config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "key", ["learning_rate", "joint.dropout", "model.wieghts", "joint.loss.margin", "new.group.key"]
)
def test_unknown_key(key):
    text = message(**{key: 1})
    assert text.startswith(f"config.{key}: no such setting")


@pytest.mark.parametrize("key", ["seed", "model.weights", "joint.loss.temperature", "data.titles"])
def test_missing_key(key):
    assert message(**{key: "drop"}).startswith(f"config.{key}: missing")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("joint.batch", 8.0, "int"),
        ("joint.batch", "8", "int"),
        ("joint.batch", True, "int"),
        ("joint.batch", None, "int"),
        ("joint.learning_rate", "1e-5", "float"),
        ("joint.learning_rate", True, "float"),
        ("data.titles", 1, "bool"),
        ("data.titles", "no", "bool"),
        ("data.path", 3, "str"),
        ("model.pooling", None, "str"),
        ("evaluate.metrics", "RR@10", "tuple"),
    ],
)
def test_wrong_type(key, value, wanted):
    text = message(**{key: value})
    assert text.startswith(f"config.{key} is {value!r}")
    assert text.endswith(wanted)


@pytest.mark.parametrize("key", ["joint.learning_rate", "model.dropout", "optimizer.clip_norm"])
def test_int_is_a_float(key):
    config_check.check(usable(**{key: 1 if key != "model.dropout" else 0}))


@pytest.mark.parametrize("key", sorted(config_check.CHOICES))
def test_bad_choice(key):
    text = message(**{key: "neither"})
    assert text.startswith(f"config.{key} is 'neither'")
    for choice in config_check.CHOICES[key]:
        assert repr(choice) in text
        config_check.check(usable(**{key: choice}))


def test_choices_of_the_loss_are_those_the_loss_knows():
    assert config_check.CHOICES["joint.loss.kl_direction"] == losses.KL_DIRECTIONS
    assert config_check.CHOICES["joint.loss.kl_reduction"] == losses.KL_REDUCTIONS
    assert config_check.CHOICES["joint.loss.reranker_loss"] == losses.RERANKER_LOSSES
    assert config_check.CHOICES["reranker.loss"] == losses.RERANKER_LOSSES
    assert ("", *Stemmer.algorithms()) == config_check.STEMMERS


@pytest.mark.parametrize("key", sorted(config_check.RANGES))
def test_range(key):
    low, high = config_check.RANGES[key]
    apart = {"mine.negative_below": 0.0, "mine.positive_above": 1.0}
    for inside in (low, high):
        config_check.check(usable(**{**apart, key: inside}))
    step = 1 if isinstance(low, int) else 0.01
    for outside in (low - step, high + step):
        assert message(**{key: outside}).startswith(f"config.{key} is {outside}")


@pytest.mark.parametrize(
    "key",
    ["joint.batch", "mesh.data", "packing.blocks", "joint.log_every", "dev.pool"],
)
@pytest.mark.parametrize("value", [0, -1])
def test_other_numbers_are_above_0(key, value):
    assert message(**{key: value}).startswith(f"config.{key} is {value}")


@pytest.mark.parametrize("key", ["joint.learning_rate", "model.dropout", "joint.loss.temperature"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
def test_numbers_that_are_none(key, value):
    assert message(**{key: value}).startswith(f"config.{key} is {value}")


@pytest.mark.parametrize("stage", ["retriever", "reranker", "joint"])
def test_a_stage_may_have_one_step(stage):
    config_check.check(usable(**{f"{stage}.batch": 7, f"{stage}.most_lists": 7}))
    found = message(**{f"{stage}.batch": 7, f"{stage}.most_lists": 6})
    assert found.startswith(f"config.{stage}.most_lists is below config.{stage}.batch")


def test_given_lists_cannot_be_refreshed():
    config_check.check(usable(**{"joint.lists": "lists.tsv"}))
    assert "refresh_every" in message(**{"joint.lists": "lists.tsv", "joint.refresh_every": 5})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data.pair_length": 10}, "config.data.pair_length is 10; it must be 11 or more, or 0"),
        ({"data.query_length": 2}, "config.data.query_length is 2; it must be 3 or more, or 0"),
        ({"data.passage_length": 7}, "config.data.passage_length is 7; it must be 8 or more"),
    ],
)
def test_lengths(changes, named):
    assert message(**changes).startswith(named)
    config_check.check(usable(**{"data.query_length": 3, "data.pair_length": 11}))
    config_check.check(usable(**{"data.passage_length": 8}))


def test_metrics_are_known_before_anything_runs():
    assert "config.evaluate.metrics is empty" in message(**{"evaluate.metrics": ()})
    found = message(**{"evaluate.metrics": ("RR@10", "MRR@10")})
    assert found.startswith("config.evaluate.metrics: unknown metric 'MRR@10'")
    assert "unknown metric '10'" in message(**{"evaluate.metrics": (10,)})
    config_check.check(usable(**{"evaluate.metrics": ("RR(rel=2)@10",)}))


@pytest.mark.parametrize("indexes", [(), ("faiss",), ("exact", "exact"), (1,)])
def test_indexes_are_those_there_are(indexes):
    assert "give ('exact', 'scann') or one" in message(**{"evaluate.indexes": indexes})
    config_check.check(usable(**{"evaluate.indexes": ("scann",)}))


@pytest.mark.parametrize("sources", [(), ("web",), ("bm25", "bm25"), (1,)])
def test_sources_of_candidates_are_those_there_are(sources):
    assert "give ('retriever', 'bm25') or one" in message(**{"mine.sources": sources})
    config_check.check(usable(**{"mine.sources": ("bm25",)}))


def test_a_margin_needs_the_retrievers_candidates():
    margin = {"mine.margin": 0.05}
    config_check.check(usable(**margin, **{"mine.sources": ("bm25", "retriever")}))
    for others in ({"mine.sources": ("bm25",)}, {"mine.candidates": "run.trec"}):
        assert "config.mine.margin is one of the retriever's" in message(**margin, **others)


def test_configs_of_before_mine_and_train_as_they_did():
    config = usable()
    then = {
        "mine.sources": ("retriever",),
        "mine.candidates": "",
        "mine.margin": 0.0,
        "mine.probability": "calibrated",
        "mine.calibrate": "raw",
        "mine.relevant_share": 0.2,
        "reranker.loss": "listwise",
    }
    for key in then:
        group, name = key.split(".")
        del config[group][name]
    added, wrong = config_lib.complete(config)
    assert ({*added}, wrong) == ({*then}, [])
    config_check.check(config)
    assert {key: config_lib.flat(config)[key] for key in then} == then


def test_configs_of_before_have_vectors_in_float32_and_the_machines_memory():
    config = usable()
    config.encode.dtype, config.evaluate.scann.memory = "bfloat16", 7.0
    config_check.check(config)
    del config["encode"], config.evaluate.scann["memory"]
    assert config_lib.complete(config) == (["encode.dtype", "evaluate.scann.memory"], [])
    assert (config.encode.dtype, config.evaluate.scann.memory) == ("float32", 0.0)
    assert "choose one of ('float32', 'float16', 'bfloat16')" in message(**{"encode.dtype": "int8"})


def test_thresholds_do_not_cross():
    crossed = {"mine.negative_below": 0.6, "mine.positive_above": 0.5}
    assert "mine.negative_below is above config.mine.positive_above" in message(**crossed)
    config_check.check(usable(**{**crossed, "mine.negative_below": 0.5}))


def test_presets_have_the_settings_of_the_loss():
    default = config_lib.default()
    assert default.joint.loss.to_dict() == config_lib.LOSSES["paper"]
    for preset in config_lib.LOSSES.values():
        config_check.check(usable(**{f"joint.loss.{key}": value for key, value in preset.items()}))
    assert config_lib.LOSSES["paper"] == {
        "kl_direction": "retriever_to_reranker",
        "kl_reduction": "sum",
        "teacher_gradient": True,
        "temperature": 1.0,
        "reranker_loss": "listwise",
    }
    assert config_lib.LOSSES["official_code"] == {
        "kl_direction": "reranker_to_retriever",
        "kl_reduction": "mean_per_candidate",
        "teacher_gradient": False,
        "temperature": 1.0,
        "reranker_loss": "listwise",
    }


def test_size_for_two_cores_is_a_usable_config():
    config = usable()
    config_lib.two_cores(config)
    config_check.check(config)
    assert config_lib.differences(usable(), config)


def test_defaults_are_made_anew():
    config_lib.default().joint.loss.kl_direction = "reranker_to_retriever"
    assert config_lib.default().joint.loss.kl_direction == "retriever_to_reranker"
    assert config_lib.LOSSES["paper"]["kl_direction"] == "retriever_to_reranker"


def test_there_and_back_through_json():
    config = usable(
        **{"joint.learning_rate": 1 / 3, "data.path": 'ä "folder"', "data.titles": False}
    )
    text = config_lib.dumps(config)
    assert text.endswith("}\n")
    back = config_lib.loads(text)
    assert config_lib.differences(config, back) == []
    assert isinstance(back.evaluate.metrics, tuple)
    assert back.to_dict() == config.to_dict()
    assert config_lib.dumps(back) == text
    config_check.check(back)
    assert json.loads(text)["joint"]["learning_rate"] == 1 / 3


def test_differences():
    a = usable()
    b = usable(**{"joint.loss.temperature": 2.0, "seed": 7})
    assert config_lib.differences(a, usable()) == []
    assert config_lib.differences(a, b) == ["joint.loss.temperature: 1.0 -> 2.0", "seed: 0 -> 7"]
    assert config_lib.differences(b, a) == ["joint.loss.temperature: 2.0 -> 1.0", "seed: 7 -> 0"]
    shorter = usable(**{"evaluate.metrics": ("RR@10",)})
    assert [d.split(":")[0] for d in config_lib.differences(a, shorter)] == ["evaluate.metrics"]


def test_differences_see_settings_that_only_one_has():
    a = usable()
    b = usable(**{"joint.epochs": "drop", "joint.passes": 2.0})
    assert config_lib.differences(a, b) == [
        "joint.epochs: 2.0 -> None",
        "joint.passes: None -> 2.0",
    ]


@pytest.mark.parametrize("dataset", ["docstrings", "beir"])
@pytest.mark.parametrize("shallow", [False, True])
def test_presets_of_the_ablations(dataset, shallow):
    config = read_config_file("ablations")(dataset + ",shallow" * shallow)
    config.data.path = "folder"
    config_check.check(config)
    assert config.data.dataset == dataset
    # Without a number, all that the weights have.
    assert config.model.num_layers == (3 if shallow else 0)
    # A cut encoder is no retriever before it is warmed up, which takes longer.
    assert (config.retriever.most_lists > 3200) == shallow
    scored = config.mine.scored_queries / config.mine.queries
    assert config.joint.denoised_share * scored == 0.5
    assert config.mine.scored_depth == config.mine.depth
    with pytest.raises(ValueError, match="no preset 'beir,deep'"):
        read_config_file("ablations")("beir,deep")


@pytest.mark.parametrize("name", ["nq", "msmarco"])
@pytest.mark.parametrize("preset", ["full", "tiny", "warmstart", "rocketqa,official_code"])
def test_presets_of_the_published_data_can_be_used(name, preset):
    config = read_config_file(name)(preset)
    if preset != "tiny":
        assert config.data.path == ""
        config.data.path = "folder"
    config_check.check(config)
    chosen = "official_code" if "official_code" in preset else "paper"
    assert config.joint.loss.to_dict() == config_lib.LOSSES[chosen]
    if "rocketqa" in preset:
        assert config.data.dataset == "rocketqa"
    assert (
        (config.reranker.epochs == 0) == (config.retriever.epochs == 0) == (preset == "warmstart")
    )


@pytest.mark.parametrize(
    ("name", "list_size", "joint_epochs", "retriever_epochs"),
    [("nq", 32, 3.0, 30.0), ("msmarco", 128, 2.0, 40.0)],
)
def test_full_is_the_papers_recipe(name, list_size, joint_epochs, retriever_epochs):
    """Section 4.1 of the paper, as far as it says."""
    config = read_config_file(name)("full")
    joint, retriever, data = config.joint, config.retriever, config.data
    assert (joint.list_size, joint.epochs, joint.batch) == (list_size, joint_epochs, 96)
    assert (joint.learning_rate, joint.schedule, joint.warmup_steps) == (1e-5, "constant", 0)
    assert (joint.kl_weight, joint.in_batch_weight, joint.denoised_share) == (1.0, 0.0, 0.5)
    assert joint.train_reranker
    assert (retriever.learning_rate, retriever.batch) == (3e-5, 4096)
    assert retriever.epochs == retriever_epochs
    assert (config.reranker.learning_rate, config.reranker.epochs) == (1e-5, 2.0)
    assert (data.query_length, data.passage_length, data.pair_length) == (32, 128, 160)
    assert config.model.dropout == 0.1
    # A folder with an encoder alone, as ERNIE's, is read as the paper reads it.
    ernie = released.Released(pathlib.Path("ernie"), num_layers=12, longest=512)
    resolved, notes = opening.resolve(config, released.Sources(ernie, ernie, ernie))
    model = resolved.model
    assert (model.num_layers, model.pooling, model.similarity) == (12, "cls", "dot")
    assert (model.scale, model.passage_format, model.query_prompt) == (1, "title_sep_text", "none")
    assert (model.reranker.num_layers, model.reranker.dropout) == (12, 0.1)
    # The paper's inputs are shorter than the longest that it could read.
    assert [note.split()[0] for note in notes] == [
        *("config.data.query_length", "config.data.passage_length", "config.data.pair_length"),
    ]
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.01, 1.0)
    assert (config.mine.negative_below, config.mine.positive_above) == (0.1, 0.9)
    # Denoised lists and others take their negatives from the same candidates.
    assert config.mine.depth == config.mine.scored_depth >= list_size - 1


@pytest.mark.parametrize("name", ["nq", "msmarco"])
def test_a_preset_that_is_none_is_refused(name):
    with pytest.raises(
        ValueError, match="no preset 'huge'; choose of full, tiny, warmstart, paper"
    ):
        read_config_file(name)("huge")
