"""What the parts of a run need of the disk, and that it is asked for before they begin."""

import collections
import shutil

import jax
import pytest

from rqv2_jax import config as config_lib
from rqv2_jax import room
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import needs, pipeline, space
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.training import train

Usage = collections.namedtuple("Usage", "total used free")


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def files(folder):
    """The files, but for that of the lock."""
    return sorted(path for path in folder.rglob("*") if path.name != ".lock")


def test_a_finished_run_holds_no_more_than_was_asked_for(finished):
    run = open_workdir(finished[1])
    store = tokens.open_store(finished[1] / "data" / "tokens")
    for model in ("retriever", "reranker"):
        made = sum(x.nbytes for x in jax.tree.leaves(run.initial(model)))
        # The re-ranker's head is not counted.
        assert made * 0.99 < needs.of_params(run.models, model) <= made
    joint = sum(needs.of_params(run.models, model) for model in ("retriever", "reranker"))
    params = {model: run.initial(model) for model in ("retriever", "reranker")}
    optimizer = train.make_optimizer(run.config.optimizer, run.config.joint, 6, {})
    state = jax.tree.leaves(train.state_shapes(params, optimizer, run.sharding))
    # A state has the params and two moments; orbax compresses it and the best params on disk.
    assert 3 * joint < sum(x.size * x.dtype.itemsize for x in state) < 3.01 * joint
    assert size(finished[1] / "joint") < (3 + 2) * joint < needs.CHECKPOINTS * joint
    arrays = size(finished[1] / "vectors" / "joint")
    assert needs.of_vectors(len(store.passage_ids), 32, "float32") <= arrays < 2**16
    assert needs.of_vectors(7, 32, "float16") == needs.of_vectors(7, 32, "bfloat16") == 7 * 32 * 2


@pytest.mark.parametrize("part", ["retriever", "joint", "vectors"])
def test_a_full_disk_is_told_of_before_a_part_begins(finished, tmp_path, monkeypatch, part):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    for folder in {"retriever", "vectors", "reranker", "joint", "lists", part}:
        if part == "retriever" or folder == part:
            shutil.rmtree(tmp_path / "w" / folder)
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(room.shutil, "disk_usage", lambda _: Usage(9, 9 - 1, 1))
        # As if something else had filled the disk since the start.
        patch.setattr(space, "check_run", lambda *_: None)
        with pytest.raises(
            InputError, match=rf"w/{part}: will hold 0\.\d\d GiB more, and its disk"
        ):
            pipeline.main(config_lib.loads(config_lib.dumps(config)), tmp_path / "w")
    assert files(tmp_path) == before
    pipeline.main(config, tmp_path / "w")
    assert (tmp_path / "w/results.json").read_text() == (workdir / "results.json").read_text()


def test_what_is_there_needs_no_more_room(finished, monkeypatch):
    config, workdir = finished
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(9, 9, 0))
    pipeline.main(config, workdir)
