"""Runs of the recipe as a whole, and the states of its models."""

import json
import pathlib

import numpy as np
import pytest
from tiny_run import _leaves, run_program

from rqv2_jax import config as config_lib
from rqv2_jax.errors import InputError
from rqv2_jax.models import weights
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.recipe.run import open_run


def test_unwarmed_retriever_is_the_starting_model(tmp_path, finished, bert_folder):
    config, _ = finished
    skipped = config_lib.loads(config_lib.dumps(config))
    skipped.retriever.epochs = 0.0
    run = open_run(skipped, tmp_path / "w")
    assert run.trained_by(state="joint", model="retriever") == "joint"
    assert run.trained_by(state="retriever", model="retriever") == "zero_shot"
    encoder = weights.load_encoder(pathlib.Path(bert_folder), run.models.retriever)
    params = run.params(state="retriever", model="retriever")
    for tower in ("query", "passage"):
        for ours, theirs in zip(_leaves(params[tower]), _leaves(encoder)):
            np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_reranker_of_an_untrained_state_is_refused(finished):
    run = open_workdir(finished[1])
    with pytest.raises(InputError, match="zero_shot"):
        run.params(state="zero_shot", model="reranker")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("nq", {"Success@5", "Success@20", "Success@100"}),
        ("msmarco", {"RR@10", "Success@50", "R@1000", "nDCG@10"}),
    ],
)
def test_tiny_presets_run_the_whole_recipe(tmp_path, name, metrics):
    workdir = tmp_path / "workdir"
    ended = run_program("rqv2_jax.main", f"--config=configs/{name}.py:tiny", f"--workdir={workdir}")
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    exact = [(row["state"], row["model"]) for row in rows if row["index"] == "exact"]
    assert exact == [
        *(("released", "retriever"), ("zero_shot", "retriever"), ("retriever", "retriever")),
        *(("reranker", "reranker"), ("joint", "retriever"), ("joint", "reranker")),
    ]
    for row in rows:
        assert set(row["metrics"]) == metrics
        assert row["queries"] == 60
