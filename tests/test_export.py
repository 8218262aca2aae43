"""What leaves a workdir: models, lists, and the report of its denoised lists."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
import yaml
from tiny_run import _leaves, run_program

from rqv2_jax import config as config_lib
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import pipeline
from rqv2_jax.recipe import scorer as score
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.recipe.run import open_run
from rqv2_jax.tools import outputs


def test_denoise_report_of_a_workdir(finished):
    config, workdir = finished
    data = pathlib.Path(config.data.path)
    (data / "fuller").mkdir(exist_ok=True)
    for split in ("train", "dev", "test"):
        text = (data / "qrels" / f"{split}.tsv").read_text()
        if split == "train":
            text += "".join(f"q{i}\tp{(i + 7) % 48}\t1\n" for i in range(32))
        (data / "fuller" / f"{split}.tsv").write_text(text)
    ended = run_program("rqv2_jax.check", f"--workdir={workdir}", "--labels=fuller", "--samples=3")
    assert ended.returncode == 0, ended.stderr
    assert "32 queries with scored candidates" in ended.stdout
    report = json.loads((workdir / "eval" / "denoise.json").read_text())
    assert report["labelled"] + report["unlabelled"] == 32 * config.mine.depth
    assert 0 < report["hidden"] <= 32
    corpus = {f"{p['title']}: {p['text']}" for p in map(json.loads, (data / "corpus.jsonl").open())}
    for sample in report["samples"]:
        assert {sample["labelled"], sample["candidate"]} <= corpus
        assert sample["labelled"] != sample["candidate"]
        # A query is five words of its labelled passage.
        assert set(sample["query"].split()) <= set(sample["labelled"].split())
        assert sample["probability"] >= config.mine.negative_below
    ended = run_program("rqv2_jax.check", f"--workdir={workdir}", "--labels=nowhere")
    assert ended.returncode == 1
    assert "nowhere: no such qrels folder" in ended.stderr


def tell_of_the_run(folder, workdir):
    """Checks the model cards: their head, table, verdict and code."""
    report = json.loads((workdir / "results.json").read_text())
    for name in ("query", "passage", "reranker"):
        card = (folder / name / "README.md").read_text()
        _, head, text = card.split("---\n", 2)
        assert set(yaml.safe_load(head)) == {"library_name", "pipeline_tag", "tags"}
        model = "reranker" if name == "reranker" else "retriever"
        shown = [line.split(" | ") for line in text.splitlines() if line.startswith("| BM25 | ")]
        (bm25,) = [row for row in report["rows"] if row["model"] == "bm25"]
        assert [cell.strip(" |") for cell in shown[0][2:]] == [
            f"{value:.3f}" for value in list(bm25["metrics"].values())[: len(shown[0]) - 2]
        ]
        told = [line[2:] for line in text.splitlines() if line.startswith(f"- joint {model} ")]
        assert told == [x for x in report["verdict"] if x.startswith(f"joint {model} ")]
        assert f"commit {json.loads((workdir / 'environment.json').read_text())['commit']}" in text
        code = text.split("```python\n")[1].split("```")[0]
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.strip()


def test_exported_models_score_in_sentence_transformers_as_here(finished, tmp_path):
    config, workdir = finished
    folder = tmp_path / "models"
    arguments = [f"--workdir={workdir}", "--format=huggingface", f"--to={folder}"]
    ended = run_program("rqv2_jax.export", *arguments)
    assert ended.returncode == 0, ended.stderr
    query, title, text = "river stone engine", "copper letter", "market signal forest bridge river"
    retriever_1, reranker_1 = score.open_scorer(str(workdir), "joint")(query, [(title, text)])

    def read(name, model, *texts):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        loaded, report = model.from_pretrained(folder / name, output_loading_info=True)
        # BertModel has a pooler, which no score reads.
        assert {key.split(".")[0] for key in report["missing_keys"]} <= {"pooler"}
        assert not report["unexpected_keys"]
        with torch.no_grad():
            return loaded.eval()(**tokenizer(*texts, return_tensors="pt"))

    vectors = [
        # A title and its text are two texts to this model (title_sep_text).
        read(tower, transformers.BertModel, *texts).last_hidden_state.mean(dim=1)[0]
        for tower, texts in (("query", (query,)), ("passage", (title, text)))
    ]
    assert float(vectors[0] @ vectors[1]) == pytest.approx(float(retriever_1[0]), rel=1e-4)
    # With the activation that the export names, none.
    scorer = sentence_transformers.CrossEncoder(str(folder / "reranker"), device="cpu")
    (logit,) = scorer.predict([(query, f"{title} {text}")])
    assert float(logit) == pytest.approx(float(reranker_1[0]), rel=1e-3, abs=1e-4)
    # As it was trained: with mean pooling and dot products.
    tower = sentence_transformers.SentenceTransformer(str(folder / "query"), device="cpu")
    assert (tower.max_seq_length, tower.similarity_fn_name) == (16, "dot")
    np.testing.assert_allclose(tower.encode(query), vectors[0], rtol=0, atol=1e-5)
    # The towers were trained apart, and the folder is not written over.
    towers = [(folder / name / "model.safetensors").read_bytes() for name in ("query", "passage")]
    assert towers[0] != towers[1]
    ended = run_program("rqv2_jax.export", *arguments)
    assert ended.returncode == 1
    assert "models: exists; name a folder that does not" in ended.stderr
    assert open_workdir(workdir).config.model.passage_format == "title_sep_text"

    tell_of_the_run(folder, workdir)

    # They are a warm start as well: nothing is left to warm up.
    warm = config_lib.loads(config_lib.dumps(config))
    warm.model.weights = str(folder)
    warm.retriever.epochs = warm.reranker.epochs = 0.0
    run = open_run(warm, tmp_path / "warm")
    for model in ("retriever", "reranker"):
        found, trained = (
            r.params(state=state, model=model)
            for r, state in ((run, "reranker"), (open_workdir(workdir), "joint"))
        )
        assert jax.tree.structure(found) == jax.tree.structure(trained)
        for ours, theirs in zip(_leaves(found), _leaves(trained)):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    described = json.loads((folder / "passage" / "config.json").read_text())
    described["layer_norm_eps"] *= 2
    (folder / "passage" / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"passage/config\.json: describes another encoder"):
        open_run(warm, tmp_path / "warm")
    warm.model.weights = config.model.weights
    with pytest.raises(InputError, match="has no trained re-ranker; give"):
        open_run(warm, tmp_path / "warm")


def test_report_and_export_need_what_they_read(finished, tmp_path):
    config, workdir = finished

    def refused(action, message, **settings):
        changed = config_lib.loads(config_lib.dumps(config))
        changed.joint.update(settings)
        with pytest.raises(InputError, match=message) as e:
            action(open_run(changed, tmp_path / "w"))
        assert "\n" not in str(e.value)

    def report(run):
        outputs.denoise_report(run, "", 1)

    def export(run):
        pipeline.export_lists(run, tmp_path / "lists.tsv")

    shutil.copytree(workdir, tmp_path / "w")
    refused(export, "refresh_every is 3", refresh_every=3)
    refused(export, r"joint\.lists is 'x'", lists="x")
    refused(report, "denoised_share is 0", denoised_share=0.0)
    manifest = tmp_path / "w" / "data" / "tokens" / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(before.replace('"source": "', '"source": "0'))
    for action in (report, export):
        refused(action, "the texts of data have changed since this workdir was made")
    manifest.write_text(before)
    shutil.rmtree(tmp_path / "w" / "lists" / "dev.scores")
    for action in (report, export):
        refused(action, "holds no candidates yet; run")
    # Undenoised lists need no scores.
    changed = config_lib.loads(config_lib.dumps(config))
    changed.joint.denoised_share = 0.0
    export(open_run(changed, tmp_path / "w"))
    assert len((tmp_path / "lists.tsv").read_text().splitlines()) == 4 * round(1.5 * 32)
    ended = run_program(
        "rqv2_jax.export", f"--workdir={workdir}", "--format=joint-tsv", "--to=/nowhere/lists.tsv"
    )
    assert ended.returncode == 1
    assert "error: --to /nowhere/lists.tsv" in ended.stderr


@pytest.mark.slow
def test_given_lists_train_given_models(finished, tmp_path):
    """Neither a warm-up nor mining is left to do, so no training query is searched for."""
    config, workdir = finished
    for form, name in (("huggingface", "models"), ("joint-tsv", "lists.tsv")):
        arguments = [f"--workdir={workdir}", f"--format={form}", f"--to={tmp_path / name}"]
        ended = run_program("rqv2_jax.export", *arguments)
        assert ended.returncode == 0, ended.stderr
    given = config_lib.loads(config_lib.dumps(config))
    given.model.weights = str(tmp_path / "models")
    given.retriever.epochs = given.reranker.epochs = 0.0
    given.joint.update({"lists": str(tmp_path / "lists.tsv"), "epochs": 1.0})
    pipeline.main(given, tmp_path / "workdir")
    assert (tmp_path / "workdir" / "lists" / "dev.retrieved.npz").is_file()
    assert not (tmp_path / "workdir" / "lists" / "train.retrieved.npz").exists()
    found, given_models = (
        next(
            row["metrics"]
            for row in json.loads((folder / "results.json").read_text())["rows"]
            if (row["state"], row["model"], row["index"]) == (state, "reranker", "exact")
        )
        for folder, state in ((tmp_path / "workdir", "reranker"), (workdir, "joint"))
    )
    assert found == given_models
    trained = list((tmp_path / "workdir" / "joint" / "last").glob("[0-9]*"))
    assert trained
    assert all(int(path.name) > 0 for path in trained)
