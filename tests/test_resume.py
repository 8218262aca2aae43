"""What is done again, and what is not, when a command is repeated, stopped or given other settings."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import ROOT, tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax import stopping
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import trec
from rqv2_jax.recipe import evaluation, pipeline
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.recipe.run import open_run
from rqv2_jax.training.checkpoint import Checkpoints


def test_second_run_of_the_same_command_does_nothing_and_keeps_the_results(finished):
    config, workdir = finished
    before = (workdir / "results.json").read_text()
    checkpoint = workdir / "joint" / "last"
    stamps = {p: p.stat().st_mtime_ns for p in checkpoint.rglob("*") if p.is_file()}
    pipeline.main(config, workdir)
    assert (workdir / "results.json").read_text() == before
    assert stamps == {p: p.stat().st_mtime_ns for p in checkpoint.rglob("*") if p.is_file()}


def test_what_a_stage_trained_again_replaces_is_found_again(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "reranker")
    # Joint training began from the re-ranker that was.
    with pytest.raises(
        InputError, match=r"joint: was trained on other lists, or from other models"
    ):
        pipeline.main(config, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "joint")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "w").rglob("*.np[yz]")}
    pipeline.main(config, tmp_path / "w")
    anew = {
        str(p.relative_to(tmp_path / "w"))
        for p, stamp in stamps.items()
        if p.stat().st_mtime_ns != stamp
    }
    assert any(name.startswith("vectors/joint/") for name in anew)
    assert {"eval/test.joint.exact.npz", "eval/test.joint.reranked.joint.exact.npz"} <= anew
    assert "eval/test.reranker.reranked.retriever.exact.npz" in anew
    assert "eval/test.zero_shot.exact.npz" not in anew
    assert not any(name.startswith(("vectors/retriever/", "vectors/zero_shot/")) for name in anew)


@pytest.mark.parametrize(
    ("changes", "found_again"),
    [
        ({"scann.leaves_per_sqrt": 2.0}, {"scann"}),
        ({"retrieve_depth": 5}, {"exact", "scann", "reranked.joint.scann", "reranked.bm25"}),
        ({"rerank_depth": 3}, {"reranked.joint.scann", "reranked.bm25"}),
        ({"bm25.k1": 0.01, "bm25.b": 0.0}, {"reranked.bm25"}),
        ({"permutations": 100}, set()),
    ],
)
def test_what_other_settings_change_is_found_again(finished, tmp_path, changes, found_again):
    config, workdir = finished

    def evaluate(settings, folder):
        run = open_run(settings, folder)
        store = tokens.open_store(folder / "data" / "tokens")
        evaluation.evaluate(run, store, "test", ("scann",), states=("joint",))
        return {
            path.name: path.read_text() for path in (folder / "runs").glob("test.joint.*.scann.*")
        }

    shutil.copytree(workdir, tmp_path / "w")
    evaluate(config, tmp_path / "w")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "w" / "eval").glob("test.joint.*.npz")}
    changed = config_lib.loads(config_lib.dumps(config))
    changed.evaluate.update_from_flattened_dict(changes)
    found = evaluate(changed, tmp_path / "w")
    anew = {p.name for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    assert anew == {f"test.joint.{name}.npz" for name in found_again}
    # As in a workdir in which nothing had been found before.
    shutil.copytree(workdir, tmp_path / "fresh", ignore=shutil.ignore_patterns("test.joint.*"))
    assert found == evaluate(changed, tmp_path / "fresh")
    assert len(found) == 2


def test_killed_before_its_word_that_it_was_the_end_a_stage_has_no_more_to_do(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    (tmp_path / "w" / "joint" / "finished.txt").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "w" / "joint").glob("*/[0-9]*")}
    pipeline.main(config, tmp_path / "w")
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "w" / "joint").glob("*/[0-9]*")}
    assert (tmp_path / "w" / "joint" / "finished.txt").is_file()


def test_what_better_params_replace_is_found_again(finished, tmp_path):
    """A stage may be evaluated before its end; what was found by then is not taken for the end's."""
    workdir = tmp_path / "w"
    shutil.copytree(finished[1], workdir)
    run, store = open_workdir(workdir), tokens.open_store(workdir / "data" / "tokens")
    # Where joint training began, and what its models found at last.
    before = {
        "joint.retriever.exact": "retriever.retriever.exact",
        "joint.retriever.scann": "retriever.retriever.scann",
        "joint.reranker.exact": "reranker.reranker.exact",
    }

    def evaluated():
        evaluation.evaluate(run, store, "test", ("exact", "scann"))
        return {
            name: trec.read_run(workdir / "runs" / f"test.{name}.trec")
            for name in (*before.keys(), *before.values())
        }

    whole = evaluated()
    shutil.copytree(workdir / "joint" / "best", tmp_path / "kept")
    shutil.rmtree(workdir / "joint" / "best")
    warm = {model: run.params(state="reranker", model=model) for model in ("retriever", "reranker")}
    ones = dict.fromkeys(warm, np.ones(8))
    with contextlib.closing(Checkpoints(workdir / "joint")) as checkpoints:
        checkpoints.save_best(99, warm, "dev RR@10", ones)
    earlier = evaluated()
    for joint, warmed_up in before.items():
        assert earlier[joint] == whole[warmed_up] != whole[joint]
    shutil.rmtree(workdir / "joint" / "best")
    (tmp_path / "kept").rename(workdir / "joint" / "best")
    assert evaluated() == whole


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_results(tmp_path, bert_folder, finished):
    config = tiny_config(write_beir(tmp_path / "data"), bert_folder)
    config_file = tmp_path / "config.py"
    config_file.write_text(
        "from rqv2_jax import config\n"
        f"def get_config():\n    return config.loads({config_lib.dumps(config)!r})\n"
    )
    workdir = tmp_path / "workdir"
    command = [
        *(sys.executable, "-u", "-m", "rqv2_jax.main"),
        *(f"--config={config_file}", f"--workdir={workdir}"),
    ]
    points = [
        r"^prepare",
        r"^  retriever 4/",
        r"^retrieve:",
        r"^  reranker 4/",
        r"^mine:",
        r"^  joint 2/",
        r"^  joint 4/",
        r"^evaluate:",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # What is terminated saves the step it is at, so that a later line of its stage may never come.
    terminated = (r"^  retriever 4/", r"^  reranker 4/", r"^  joint 4/", r"^evaluate:")
    for point in points:
        number, status = signal.SIGKILL, -signal.SIGKILL
        if point in terminated:
            number, status = signal.SIGTERM, stopping.AGAIN
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        seen = False
        for line in process.stdout:
            if re.match(point, line):
                seen = True
                time.sleep(0.2)
                process.send_signal(number)
                break
        assert seen, f"never reached {point}"
        assert process.wait() == status
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    killed = json.loads((workdir / "results.json").read_text())
    whole = json.loads((finished[1] / "results.json").read_text())
    assert killed == whole
