"""Runs that are killed at random moments, each followed by the same command, until they end.

RQV2_STORM="SIGKILLs SIGTERMs" sets their numbers (20 10), and RQV2_STORM_SEED when they come (0).
"""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_run import ROOT, tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax import stopping
from rqv2_jax.recipe.claim import open_workdir

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path, bert_folder):
    """`start(workdir)` starts a run of the whole recipe."""
    config, file = tiny_config(write_beir(tmp_path / "data"), bert_folder), tmp_path / "config.py"
    file.write_text(
        "from rqv2_jax import config\n"
        f"def get_config():\n    return config.loads({config_lib.dumps(config)!r})\n"
    )

    def process(workdir):
        command = [*(sys.executable, "-m", "rqv2_jax.main"), f"--config={file}"]
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return process


def result(workdir):
    """All that a run hands on: its results, its run files and both models' params."""
    files = [workdir / "results.json", *sorted((workdir / "runs").glob("*.trec"))]
    run = open_workdir(workdir)
    params = [run.params(state="joint", model=model) for model in ("retriever", "reranker")]
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return {file.name: file.read_text() for file in files}, leaves


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert len(found[1]) == len(expected[1])
    for leaf, whole in zip(found[1], expected[1]):
        np.testing.assert_array_equal(leaf, whole)


def test_killed_at_random_moments_runs_end_with_the_same_results(start, tmp_path):
    kills, terms = map(int, os.environ.get("RQV2_STORM", "20 10").split())
    rng = random.Random(int(os.environ.get("RQV2_STORM_SEED", "0")))
    coming = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    rng.shuffle(coming)
    began = time.monotonic()
    with start(tmp_path / "whole") as process:
        assert process.wait() == 0, process.stderr.read()[-3000:]
    took, expected = time.monotonic() - began, result(tmp_path / "whole")
    runs, interrupted = 0, 0
    while True:
        workdir = tmp_path / f"run{runs}"
        with start(workdir) as process:
            try:
                # Python takes a third of the time to import what is needed.
                process.wait(rng.uniform(0.3 * took, took) if coming else None)
            except subprocess.TimeoutExpired:
                number = coming.pop()
                process.send_signal(number)
                status = process.wait()
                # It may have ended by itself meanwhile, or not yet have begun to listen.
                ends = {signal.SIGKILL: (-9,), signal.SIGTERM: (stopping.AGAIN, -15)}[number]
                assert status in (0, *ends), process.stderr.read()[-3000:]
                interrupted += status != 0
            else:
                assert process.returncode == 0, process.stderr.read()[-3000:]
        if process.returncode == 0:
            assert_same(result(workdir), expected)
            runs += 1
            if not coming:
                break
    print(f"{interrupted} of {kills + terms} signals interrupted {runs} runs")
    assert interrupted > (kills + terms) / 2
