"""A run whose re-ranker is another model than its retriever, and workdirs of before that could be."""

import json
import shutil

import jax
import numpy as np
import pytest
import sentence_transformers
from tiny_run import run_program, tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import mining, pipeline
from rqv2_jax.recipe import scorer as score
from rqv2_jax.recipe.claim import claim, open_workdir
from rqv2_jax.recipe.run import open_run
from rqv2_jax.training.checkpoint import best_steps


@pytest.fixture(scope="module")
def teacher(make_bert):
    """A cross-encoder that is wider and deeper than the retriever, with another tokenizer."""
    settings = {"hidden_size": 48, "num_hidden_layers": 2, "num_labels": 1}
    folder, _ = make_bert(11, "BertForSequenceClassification", **settings)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    words = [word for word in vocab if not word.startswith("[")]
    vocab.update(zip(words, [vocab[word] for word in reversed(words)]))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def taught(tmp_path_factory, bert_folder, teacher):
    """A workdir whose retriever compares by cosine and learns from the teacher as it came."""
    folder = tmp_path_factory.mktemp("two models")
    config = tiny_config(write_beir(folder / "data"), bert_folder)
    config.model.similarity = "cosine"
    # The retriever has the first of two layers, its teacher has both.
    config.model.reranker.update({"weights": str(teacher), "num_layers": 2})
    config.retriever.epochs = config.reranker.epochs = 0.0
    config.joint.most_lists = 24
    config.evaluate.indexes = ("exact",)
    # As random a teacher is never certain.
    config.mine.update({"negative_below": 0.5, "positive_above": 0.9})
    pipeline.main(config, folder / "workdir")
    return config, folder / "workdir"


def test_the_workdir_says_what_the_folders_said(taught, teacher):
    config, workdir = taught
    said = json.loads((workdir / "config.json").read_text())["model"]
    assert said["reranker"] == {
        "weights": str(teacher),
        "num_layers": 2,
        "dropout": 0.1,
        "pooling": "cls",
    }
    assert (said["pooling"], said["similarity"], said["scale"]) == ("mean", "cosine", 20.0)
    assert (said["query_prompt"], said["passage_format"]) == ("none", "title_sep_text")
    # The same command goes on with it.
    claim(open_run(config, workdir))


def test_each_text_is_tokenised_once_by_each_tokenizer(taught):
    store = tokens.open_store(taught[1] / "data" / "tokens")
    run = open_workdir(taught[1])
    for texts in (store.titles, store.texts, store.splits["test"].texts):
        assert len(texts.pairs) == len(texts)
        # Of as many tokens, by other numbers.
        np.testing.assert_array_equal(texts.pairs.offsets, texts.offsets)
        assert (texts.pairs.tokens != texts.tokens).any()
    retriever, reranker = run.tokenizer.fingerprint.split("+")
    assert retriever != reranker
    assert store.fingerprint.endswith(f"-{run.tokenizer.fingerprint}")


def test_both_learn_and_open_in_sentence_transformers(taught, tmp_path):
    """The pooler learns too; cosines are not scaled where anybody reads them."""
    config, workdir = taught
    run = open_workdir(workdir)
    trained, start = run.params(state="joint", model="reranker"), run.initial("reranker")
    assert jax.tree.structure(trained) == jax.tree.structure(start)
    if best_steps(workdir / "joint")["reranker"] > 0:
        changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), trained, start)
        assert changed["head"]["pooler"]["kernel"]
    query, title, text = "river stone engine", "copper letter", "market signal forest bridge"
    scorer = score.open_scorer(str(workdir), "joint")
    retriever_1, reranker_1 = scorer(query, [(title, text)])
    assert -1 <= float(retriever_1[0]) <= 1
    assert [scores.shape for scores in scorer(query, [])] == [(0,), (0,)]
    for none, empty in zip(scorer(query, [(None, text)]), scorer(query, [("", text)])):
        np.testing.assert_array_equal(none, empty)
    for line in (workdir / "runs" / "test.joint.retriever.exact.trec").read_text().splitlines():
        assert -1.001 <= float(line.split()[4]) <= 1.001
    to = tmp_path / "models"
    arguments = f"--workdir={workdir}", "--format=huggingface", f"--to={to}"
    ended = run_program("rqv2_jax.export", *arguments)
    assert ended.returncode == 0, ended.stderr
    ranker = sentence_transformers.CrossEncoder(str(to / "reranker"), device="cpu")
    (logit,) = ranker.predict([(query, f"{title} {text}")])
    assert float(logit) == pytest.approx(float(reranker_1[0]), abs=1e-4)
    tower = sentence_transformers.SentenceTransformer(str(to / "query"), device="cpu")
    assert float(np.linalg.norm(tower.encode(query))) == pytest.approx(1, abs=1e-5)
    # What was exported has both tokenizers, and starts another run.
    warm = config_lib.loads(config_lib.dumps(config))
    warm.model.weights, warm.model.reranker.weights = str(to), ""
    again = open_run(warm, tmp_path / "warm")
    assert again.models == run.models
    assert again.tokenizer.pairs is not None
    for ours, theirs in zip(*(jax.tree.leaves(r) for r in (again.initial("reranker"), trained))):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_cross_encoder_may_teach_and_learn_nothing(taught, tmp_path):
    """Of another folder, without a warm-up, in static distillation."""
    config, workdir = taught
    static = config_lib.loads(config_lib.dumps(config))
    static.joint.update({"train_reranker": False, "keep": "last"})
    for kept in ("data", "vectors", "lists"):
        shutil.copytree(workdir / kept, tmp_path / kept)
    run = open_run(static, tmp_path)
    store = tokens.open_store(tmp_path / "data" / "tokens")
    candidates = mining.mine(run, store, mining.retrieve(run, store))
    pipeline.train_joint(run, store, candidates)
    moved = {
        model: jax.tree.map(
            lambda a, b: bool((np.asarray(a) != b).any()),
            run.params(state="joint", model=model),
            run.initial(model),
        )
        for model in ("retriever", "reranker")
    }
    assert not any(jax.tree.leaves(moved["reranker"]))
    for tower in ("query", "passage"):
        assert any(jax.tree.leaves(moved["retriever"][tower]["layers"]))


NEW = ("similarity", "scale", "query_prompt", "passage_prompt", "reranker")


def old_config(run, **changes):
    """A workdir's config as commit 8355232 wrote it."""
    config = run.config.to_dict()
    config["model"] = {k: v for k, v in config["model"].items() if k not in NEW} | changes
    for group, key in (
        *(("data", "train_passage_length"), ("data", "train_pair_length"), ("optimizer", "clip")),
        *(("dev", "metric"), ("dev", "hard"), ("retriever", "accumulate")),
        *((stage, "keep") for stage in ("retriever", "reranker", "joint")),
    ):
        del config[group][key]
    return json.dumps(config)


@pytest.fixture
def old(tmp_path, bert_folder, teacher):
    """`old(**changes of config.model)`: a workdir of commit 8355232, of which nothing is trained."""

    def make(**changes):
        config = tiny_config(write_beir(tmp_path / "data"), bert_folder)
        workdir = tmp_path / "w"
        run = open_run(config, workdir)
        workdir.mkdir()
        (workdir / "config.json").write_text(old_config(run, **changes))
        (workdir / "environment.json").write_text(json.dumps({"commit": "8355232"}))
        return config, workdir

    return make


def test_workdirs_of_before_open_with_the_values_of_then(old):
    """Dot products, no scale, no prompts, one model; whatever the folder says by now."""
    config, workdir = old()
    run = open_workdir(workdir)
    model = run.config.model
    assert (model.similarity, model.scale, model.query_prompt) == ("dot", 1.0, "none")
    assert model.reranker.to_dict() == {
        "weights": config.model.weights,
        "num_layers": 1,
        "dropout": 0.1,
        "pooling": "cls",
    }
    claim(open_run(config, workdir))
    config.model.similarity = "cosine"
    with pytest.raises(InputError, match=r"another config \(model\.scale: 1\.0 -> 20\.0"):
        claim(open_run(config, workdir))


def test_workdirs_that_cannot_be_followed_name_the_commit(old, teacher):
    config, workdir = old(weights=str(teacher), num_layers=2)
    config.model.update({"weights": str(teacher), "num_layers": 2})
    for action in (lambda: open_workdir(workdir), lambda: claim(open_run(config, workdir))):
        with pytest.raises(
            InputError, match=r"left out the head of .* commit 8355232; open it"
        ) as e:
            action()
        assert "\n" not in str(e.value)
    said = json.loads((workdir / "config.json").read_text())
    del said["joint"]["kl_weight"]
    (workdir / "config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=r"has no config\.joint\.kl_weight, .* commit 8355232"):
        open_workdir(workdir)
    (workdir / "environment.json").unlink()
    with pytest.raises(InputError, match="commit unknown"):
        open_workdir(workdir)


@pytest.mark.parametrize("width", [0, 256])
def test_workdirs_of_rows_that_sequences_shared(old, width):
    """Which there are no more; where every sequence had a row of its own, nothing has changed."""
    _, workdir = old()
    said = json.loads((workdir / "config.json").read_text())
    said["packing"]["row_width"] = width
    (workdir / "config.json").write_text(json.dumps(said))
    if width == 0:
        assert "row_width" not in open_workdir(workdir).config.packing
        return
    with pytest.raises(InputError, match=r"has config\.packing\.row_width, .* commit 8355232"):
        open_workdir(workdir)


def test_a_models_folder_may_move(old, bert_folder, make_bert, tmp_path):
    """Its place is no part of what a workdir is made by; its content is."""
    config, workdir = old()
    here = shutil.copytree(bert_folder, tmp_path / "here")
    config.model.weights = str(here)
    # A workdir of before does not say what it was made from.
    with pytest.raises(InputError, match=r"another config \(model\.reranker\.weights: "):
        claim(open_run(config, workdir))
    workdir = tmp_path / "new"
    claim(open_run(config, workdir))
    moved = here.rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match=r"weights is .*here', which is not there; if it has moved"
    ):
        open_workdir(workdir)
    config.model.weights = str(moved)
    claim(open_run(config, workdir))
    assert open_workdir(workdir).config.model.reranker.weights == str(moved)
    # That of the re-ranker alone, which has a flag of its own.
    config.model.reranker.weights = str(shutil.copytree(moved, tmp_path / "teacher"))
    claim(open_run(config, workdir))
    teacher = (tmp_path / "teacher").rename(tmp_path / "moved teacher")
    with pytest.raises(InputError, match=r"teacher', which .* as --reranker_weights DIR"):
        open_workdir(workdir)
    run = open_workdir(workdir, reranker_weights=str(teacher))
    assert (run.config.model.weights, run.sources.reranker.folder) == (str(moved), teacher)
    with pytest.raises(InputError, match="made from other weights or tokenizers than"):
        open_workdir(workdir, reranker_weights=str(make_bert(5)[0]))
    config.model.reranker.weights = ""
    other, _ = make_bert(5)
    for name in ("model.safetensors", "tokenizer_config.json"):
        before = (moved / name).read_bytes()
        if name == "tokenizer_config.json":
            (moved / name).write_text(before.decode() + " ")
        else:
            shutil.copy(other / name, moved / name)
        with pytest.raises(InputError, match="made from other weights or tokenizers than"):
            claim(open_run(config, workdir))
        (moved / name).write_bytes(before)
    claim(open_run(config, workdir))
