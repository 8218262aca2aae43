"""What a workdir holds, and which configs, processes and devices may work in it."""

import contextlib
import errno
import fcntl
import json
import shutil
import subprocess
import sys

import jax
import pytest
from tiny_run import ROOT, run_program

from rqv2_jax import config as config_lib
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import pipeline
from rqv2_jax.recipe.claim import claim, open_workdir
from rqv2_jax.recipe.run import open_run
from rqv2_jax.recipe.workdir import LOCK, alone
from rqv2_jax.training.checkpoint import best_steps


def test_a_machine_without_git_trains(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    claim(open_run(finished[0], tmp_path / "w"))
    environment = json.loads((tmp_path / "w" / "environment.json").read_text())
    assert environment["commit"] == "unknown"


def test_every_stage_leaves_tensorboard_events_and_a_best_checkpoint(finished):
    _, workdir = finished
    for stage in ("retriever", "reranker", "joint"):
        assert list((workdir / stage).glob("events.out.tfevents.*"))
        trained = {stage} if stage != "joint" else {"retriever", "reranker"}
        assert best_steps(workdir / stage).keys() == trained
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__


def test_settings_may_change_until_they_have_been_used(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    changed = config_lib.loads(config_lib.dumps(config))
    changed.evaluate.update({"metrics": ("RR@5",), "rerank_depth": 3})
    claim(open_run(changed, tmp_path / "w"))
    assert json.loads((tmp_path / "w" / "config.json").read_text())["evaluate"]["rerank_depth"] == 3
    changed.joint.list_size = 3
    with pytest.raises(InputError, match=r"joint\.list_size: 4 -> 3"):
        claim(open_run(changed, tmp_path / "w"))
    shutil.rmtree(tmp_path / "w" / "joint")
    claim(open_run(changed, tmp_path / "w"))
    changed.model.attention = "xla"
    # Which drops out no attention weights.
    with pytest.raises(InputError, match=r"model\.attention: 'plain' -> 'xla'"):
        claim(open_run(changed, tmp_path / "w"))
    # What "auto" stands for on a GPU and elsewhere: a run may go on on the other.
    changed.model.attention = "plain"
    elsewhere = open_run(changed, tmp_path / "w")
    for attention in ("ragged", "plain"):
        elsewhere.config.model.attention = attention
        claim(elsewhere)
    changed.mine.depth = 7
    with pytest.raises(InputError, match=r"mine\.depth: 8 -> 7"):
        claim(open_run(changed, tmp_path / "w"))


def test_workdir_of_another_config_is_refused_and_left_alone(finished):
    config, workdir = finished
    changed = config_lib.loads(config_lib.dumps(config))
    changed.joint.learning_rate = 0.5
    before = (workdir / "config.json").read_text()
    with pytest.raises(
        InputError,
        match=r"config\.json.*joint\.learning_rate: 0\.001 -> 0\.5.*or delete .*/joint to",
    ):
        pipeline.main(changed, workdir)
    assert (workdir / "config.json").read_text() == before
    changed.mine.depth = 7
    with pytest.raises(InputError, match=r"mine\.depth: 8 -> 7\); .* it was made by$"):
        pipeline.main(changed, workdir)


@contextlib.contextmanager
def held(workdir, *, reads):
    """A process that works in a workdir until it is killed."""
    hold = (
        "import pathlib, sys; from rqv2_jax.recipe.workdir import LOCK, alone\n"
        f"with alone(pathlib.Path(sys.argv[1]), reads={reads}):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", hold, str(workdir)]
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_several_processes_read_one_workdir_and_none_works_in_it(finished, tmp_path):
    config, workdir = finished
    with held(workdir, reads=True):
        with pytest.raises(InputError, match=r"works in it \(one that reads\); wait until"):
            pipeline.main(config, workdir)
        for program, arguments in (
            ("search", ("river",)),
            ("export", ("--format=huggingface", f"--to={tmp_path / 'models'}")),
        ):
            ended = run_program(f"rqv2_jax.{program}", f"--workdir={workdir}", *arguments)
            assert ended.returncode == 0, ended.stderr


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone(tmp_path / "w"):
        pass
    assert (
        "w: cannot be locked ([Errno 37] No locks available); run nothing"
        in capsys.readouterr().out
    )


def test_two_processes_do_not_work_in_one_workdir(finished, tmp_path):
    config, workdir = finished
    with held(workdir, reads=False) as other:
        owner = rf"another process works in it \({other.pid} on \S+ since [-\d]{{10}} \d\d:\d\d\)"
        with pytest.raises(InputError, match=owner):
            pipeline.main(config, workdir)
        for program, arguments in (
            ("evaluate", ()),
            ("search", ("a question",)),
            ("check", ()),
            ("export", ("--format=joint-tsv", f"--to={tmp_path / 'lists.tsv'}")),
        ):
            ended = run_program(f"rqv2_jax.{program}", f"--workdir={workdir}", *arguments)
            assert ended.returncode == 1
            assert "another process works in it" in ended.stderr
        # A process that is killed lets go of it.
        other.kill()
        other.wait()
        with alone(workdir):
            pass
    assert (workdir / LOCK).read_text() == ""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: cannot be made .* give another one"):
        pipeline.main(config, tmp_path / "file")


def test_a_workdir_opens_on_other_devices_than_it_was_made_on(finished, tmp_path, capsys):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    larger = config_lib.loads(config_lib.dumps(config))
    larger.mesh.update({"data": 32, "fsdp": 4})
    larger.model.attention = "cudnn"
    path = tmp_path / "w" / "config.json"
    path.write_text(config_lib.dumps(larger))
    run = open_workdir(tmp_path / "w")
    assert run.sharding.shards == len(jax.devices()) == 8
    assert run.models.retriever.attention == "plain"
    assert "not finished" not in capsys.readouterr().out
    (tmp_path / "w" / "joint" / "finished.txt").unlink()
    open_workdir(tmp_path / "w")
    assert "w/joint: is not finished; its models are the best so far" in capsys.readouterr().out
    path.write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not as rqv2_jax\.main wrote it"):
        open_workdir(tmp_path / "w")


def test_folder_with_other_files_is_not_taken_for_a_workdir(tmp_path, finished):
    config, _ = finished
    # A process that was killed at once left it.
    (tmp_path / "config.json.partial").write_text("{")
    claim(open_run(config, tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="other files"):
        pipeline.main(config, tmp_path)


def test_what_is_compiled_is_kept_beside_the_workdir(finished, tmp_path):
    config, _ = finished
    setting = "jax_compilation_cache_dir"
    before = jax.config.jax_compilation_cache_dir
    try:
        for given, expected in ((None, tmp_path / ".compiled"), ("/of/mine", "/of/mine")):
            jax.config.update(setting, given)
            open_run(config, tmp_path / "workdir")
            assert jax.config.jax_compilation_cache_dir == str(expected)
    finally:
        jax.config.update(setting, before)
