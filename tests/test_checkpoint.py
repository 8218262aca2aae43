"""Checkpoints: there and back on any mesh, the best beside the last, and clear refusals."""

import gc
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import refused

from rqv2_jax.training import sharding as sharding_lib
from rqv2_jax.training import train
from rqv2_jax.training.checkpoint import Checkpoints, best_steps, does_better, restore_best


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "retriever": {
            "query": {"kernel": rng.normal(size=(8, 4)).astype(np.float32)},
            "passage": {"kernel": rng.normal(size=(8, 4)).astype(np.float32)},
        },
        "reranker": {
            "head": {"bias": np.array(rng.normal(), np.float32), "odd": np.float32([1, 2, seed])}
        },
    }


def state_on(data, fsdp, seed=0, step=0):
    """A training state whose every number comes from the seed."""
    sharding = sharding_lib.make(data, fsdp)
    state = train.init_state(params(seed), optax.adam(0.1), sharding)
    rng = np.random.default_rng(seed)
    opt_state = jax.tree.map(
        lambda x: jax.device_put(jnp.asarray(rng.integers(0, 99, x.shape), x.dtype), x.sharding),
        state.opt_state,
    )
    step = jax.device_put(jnp.int32(step), state.step.sharding)
    return train.TrainState(step, state.params, opt_state)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(other)):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


def saved(folder, *states):
    checkpoints = Checkpoints(folder)
    for state in states:
        checkpoints.save_last(int(state.step), state)
    checkpoints.close()


def keep(checkpoints, step, params, **scores):
    """Saves as best what has these dev scores, of every model or of "retriever" and "reranker"."""
    values = {model: np.full(4, scores.get(model, scores.get("all"))) for model in params}
    checkpoints.save_best(step, params, "RR@10", values)


def best_score(checkpoints, model="reranker"):
    best = checkpoints.best(model)
    return best and best[1].mean()


@pytest.mark.parametrize("mesh", [(2, 2), (1, 1), (1, 4)], ids="{0[0]}x{0[1]}".format)
def test_state_comes_back_on_any_mesh(tmp_path, mesh):
    state = state_on(2, 2, seed=1, step=7)
    saved(tmp_path / "joint", state)
    target = state_on(*mesh, seed=2)
    checkpoints = Checkpoints(tmp_path / "joint")
    restored = checkpoints.restore_last(lambda: target)
    checkpoints.close()
    assert_same(restored, state)
    for leaf, place in zip(jax.tree.leaves(restored), jax.tree.leaves(target)):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)


def test_no_checkpoint_is_no_state(tmp_path):
    checkpoints = Checkpoints(tmp_path / "joint")
    assert best_score(checkpoints) is None
    assert checkpoints.restore_last(lambda: pytest.fail("there is none")) is None
    checkpoints.close()


def test_the_last_two_states_are_kept_and_one_of_a_stage_that_has_ended(tmp_path):
    saved(tmp_path, *(state_on(1, 1, seed=step, step=step) for step in (3, 6, 9)))
    assert {path.name for path in (tmp_path / "last").iterdir()} == {"6", "9"}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.finish()
    checkpoints.close()
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["9"]
    checkpoints = Checkpoints(tmp_path)
    assert_same(checkpoints.restore_last(lambda: state_on(1, 1)), state_on(1, 1, seed=9, step=9))
    # A resumed run saves on from there, and saving the same step once more does no harm.
    checkpoints.save_last(9, state_on(1, 1, step=9))
    checkpoints.save_last(12, state_on(1, 1, seed=12, step=12))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert_same(checkpoints.restore_last(lambda: state_on(1, 1)), state_on(1, 1, seed=12, step=12))
    checkpoints.close()


def test_saving_goes_on_while_the_donated_state_is_overwritten(tmp_path):
    """`save_last` returns early; the steps after it must not change what is written."""
    sharding = sharding_lib.make(2, 1)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = sharding.put_params({"w": np.zeros((512, 1024), np.float32), "step": np.int32(0)})
    checkpoints = Checkpoints(tmp_path)
    for number in range(40):
        if number == 20:
            checkpoints.save_last(number, state)
        state = step(state)
    jax.block_until_ready(state)
    target = sharding.put_params({"w": np.ones((512, 1024), np.float32), "step": np.int32(1)})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore_last(lambda: target)
    checkpoints.close()
    assert int(restored["step"]) == 20
    np.testing.assert_array_equal(restored["w"], 20)


def test_best_gives_way_only_to_a_higher_score(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, score, best in (
        (0, 0.3, 0),
        (10, 0.3, 0),
        (20, 0.2, 0),
        (30, 0.4, 30),
        (40, 0.39, 30),
    ):
        keep(checkpoints, step, params(step), all=score)
        assert best_steps(tmp_path) == {"retriever": best, "reranker": best}
        assert len([*(tmp_path / "best/retriever").glob("[0-9]*")]) == 1
        assert best_score(checkpoints) == {0: 0.3, 30: 0.4}[best]
        for model in ("retriever", "reranker"):
            assert_same(restore_best(tmp_path, model, params(99)[model]), params(best)[model])
    checkpoints.close()


def test_each_model_keeps_its_own_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    keep(checkpoints, 0, params(0), retriever=0.3, reranker=0.3)
    keep(checkpoints, 10, params(10), retriever=0.2, reranker=0.4)
    keep(checkpoints, 20, params(20), retriever=0.35, reranker=0.39)
    checkpoints.close()
    assert best_steps(tmp_path) == {"retriever": 20, "reranker": 10}
    for model, step in best_steps(tmp_path).items():
        assert_same(restore_best(tmp_path, model, params(99)[model]), params(step)[model])
    # One that is damaged does not harm the other.
    flip(tmp_path / "best/retriever/20")
    refused(lambda: restore_best(tmp_path, "retriever", params()["retriever"]), "as it was written")
    head = params()["reranker"]
    assert_same(restore_best(tmp_path, "reranker", head), params(10)["reranker"])


def test_a_start_gives_way_unless_dev_tells_that_training_did_harm():
    """The difference's standard error is 1/16: deviation 1/4 over 16 queries."""
    start_Q = np.full(16, 0.5)
    swing_Q = np.array([0.25, -0.25] * 8)
    for mean, start, better in (
        (0.01, True, True),
        (0.0, True, True),
        (-0.06, True, True),
        (-0.07, True, False),
        (0.01, False, True),
        (0.0, False, False),
        (-0.01, False, False),
    ):
        assert does_better(start_Q + swing_Q + mean, start_Q, start=start) is better
    # One that changes nothing stays.
    assert not does_better(start_Q, start_Q, start=True)


def test_best_score_survives_the_manager(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    keep(checkpoints, 10, params(10), all=0.5)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert best_score(checkpoints) == 0.5
    keep(checkpoints, 20, params(20), all=0.45)
    assert best_score(checkpoints) == 0.5
    # A run resumed on other devices may do better at a step before that of the best so far.
    keep(checkpoints, 5, params(5), all=0.6)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert best_score(checkpoints) == 0.6
    checkpoints.close()
    head = params(99)["reranker"]
    assert_same(restore_best(tmp_path, "reranker", head), params(5)["reranker"])
    written = json.loads((tmp_path / "best/reranker/5/score/metadata").read_text())
    assert written == {"metric": "RR@10", "step": 5, "values": [0.6] * 4}


def test_a_step_measured_again_after_an_interruption_keeps_what_it_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    keep(checkpoints, 3, params(3), all=0.5)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    keep(checkpoints, 3, params(4), all=0.6)
    keep(checkpoints, 6, params(6), all=0.7)
    keep(checkpoints, 6, params(7), all=0.8)
    assert best_score(checkpoints) == 0.7
    checkpoints.close()
    head = params(99)["reranker"]
    assert_same(restore_best(tmp_path, "reranker", head), params(6)["reranker"])


def test_best_of_one_model_comes_back_on_any_mesh(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    keep(checkpoints, 4, sharding_lib.make(2, 2).put_params(params(4)), all=0.5)
    checkpoints.close()
    target = sharding_lib.make(1, 4).put_params(params(0)["retriever"])
    restored = restore_best(tmp_path, "retriever", target)
    assert_same(restored, params(4)["retriever"])
    for leaf, place in zip(jax.tree.leaves(restored), jax.tree.leaves(target)):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)


def test_best_that_is_not_there(tmp_path):
    refused(lambda: restore_best(tmp_path / "joint", "retriever", params()), tmp_path / "joint")
    assert not (tmp_path / "joint").exists()
    saved(tmp_path / "joint", state_on(1, 1, step=3))
    refused(lambda: restore_best(tmp_path / "joint", "retriever", params()), tmp_path / "joint")
    checkpoints = Checkpoints(tmp_path / "joint")
    only = {"retriever": params()["retriever"]}
    keep(checkpoints, 4, only, all=0.5)
    checkpoints.close()
    head = params()["reranker"]
    nothing = "holds no checkpoint of the reranker"
    refused(lambda: restore_best(tmp_path / "joint", "reranker", head), nothing)


@pytest.fixture
def _collect():
    yield
    gc.collect()


def given_up(test):
    """Marks a test after which orbax leaves reads behind that it has given up."""
    ignore = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return ignore(pytest.mark.usefixtures("_collect")(test))


def other_shapes(tree):
    """The ways in which a checkpoint of another model differs."""
    kernel = tree["retriever"]["query"]["kernel"]

    def with_query(query):
        return {**tree, "retriever": {**tree["retriever"], "query": query}}

    return {
        "wider": with_query({"kernel": np.zeros((8, 6), np.float32)}),
        "narrower": with_query({"kernel": np.zeros((8, 2), np.float32)}),
        "flat": with_query({"kernel": np.zeros(32, np.float32)}),
        "leaf more": with_query({"kernel": kernel, "bias": np.zeros(4, np.float32)}),
        "leaf less": with_query({}),
    }


@given_up
@pytest.mark.parametrize("case", other_shapes(params()))
def test_other_shapes(tmp_path, case):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_last(3, sharding_lib.make(1, 1).put_params(params()))
    keep(checkpoints, 3, params(), all=0.5)
    other = sharding_lib.make(1, 1).put_params(other_shapes(params())[case])
    refused(lambda: checkpoints.restore_last(lambda: other), tmp_path / "last/3", "delete")
    checkpoints.close()
    refused(
        lambda: restore_best(tmp_path, "retriever", other["retriever"]),
        tmp_path / "best/retriever/3",
        "delete",
    )


@given_up
def test_files_that_cannot_be_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    keep(checkpoints, 3, params(), all=0.5)
    checkpoints.close()
    saved(tmp_path, state_on(1, 1, step=3))
    for path in [*(tmp_path / "last/3").rglob("*"), *(tmp_path / "best/retriever/3").rglob("*")]:
        if path.is_file():
            path.write_bytes(b"\x00")
    refused(lambda: restore_best(tmp_path, "retriever", params()["retriever"]), "best/retriever/3")


@given_up
@pytest.mark.parametrize("damage", ["all", "empty", "cut", "missing"])
def test_a_last_state_that_cannot_be_read_starts_the_stage_again(tmp_path, damage, capsys):
    checkpoints = Checkpoints(tmp_path)
    keep(checkpoints, 3, params(), all=0.5)
    checkpoints.close()
    saved(tmp_path, state_on(1, 1, step=3))
    files = [path for path in (tmp_path / "last/3").rglob("*") if path.is_file()]
    for path in files if damage == "all" else [max(files, key=lambda p: p.stat().st_size)]:
        content = path.read_bytes()
        path.write_bytes({"all": b"\x00", "cut": content[: len(content) // 2]}.get(damage, b""))
        if damage == "missing":
            path.unlink()
    checkpoints = Checkpoints(tmp_path)
    capsys.readouterr()
    assert checkpoints.restore_last(lambda: state_on(1, 1, seed=5)) is None
    assert re.search(
        r"last/3: cannot be read .*; this stage is trained again", capsys.readouterr().out
    )
    assert best_score(checkpoints) is None
    # Steps from the start are saved again, however far the damaged one was.
    keep(checkpoints, 0, params(), all=0.1)
    checkpoints.save_last(2, state_on(1, 1, seed=2, step=2))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert_same(checkpoints.restore_last(lambda: state_on(1, 1)), state_on(1, 1, seed=2, step=2))
    assert best_score(checkpoints) == 0.1
    checkpoints.close()


def flip(folder):
    """Flips a bit in the middle of the largest file of a checkpoint, where its arrays are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@given_up
@pytest.mark.parametrize("damage", [flip, lose])
def test_the_state_before_stands_in_for_a_damaged_one(tmp_path, damage, capsys):
    saved(tmp_path, *(state_on(1, 1, seed=step, step=step) for step in (3, 6)))
    damage(tmp_path / "last/6")
    capsys.readouterr()
    checkpoints = Checkpoints(tmp_path)
    assert_same(checkpoints.restore_last(lambda: state_on(1, 1)), state_on(1, 1, seed=3, step=3))
    assert re.search(r"last/6: cannot be read \(.*\); the one before is", capsys.readouterr().out)
    # Training comes to the same step again.
    checkpoints.save_last(6, state_on(1, 1, seed=6, step=6))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert_same(checkpoints.restore_last(lambda: state_on(1, 1)), state_on(1, 1, seed=6, step=6))
    checkpoints.close()


def test_a_flipped_bit_of_the_best_params_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    keep(checkpoints, 3, params(), all=0.5)
    checkpoints.close()
    flip(tmp_path / "best/retriever/3")
    refused(
        lambda: restore_best(tmp_path, "retriever", params()["retriever"]),
        "best/retriever/3",
        "is not as it was written",
    )


@given_up
def test_states_whose_checksums_are_lost_are_taken_as_they_are(tmp_path, capsys):
    saved(tmp_path, *(state_on(1, 1, seed=step, step=step) for step in (3, 6)))
    (tmp_path / "last.sums.json").write_text("{")
    checkpoints = Checkpoints(tmp_path)
    assert_same(checkpoints.restore_last(lambda: state_on(1, 1)), state_on(1, 1, seed=6, step=6))
    checkpoints.close()


def test_a_torn_score_counts_as_none(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    keep(checkpoints, 3, params(), all=0.5)
    (tmp_path / "best/reranker/3/score/metadata").write_text('{"metric": "RR')
    assert best_score(checkpoints) is None
    assert "score/metadata: cannot be read" in capsys.readouterr().out
    keep(checkpoints, 6, params(), all=0.2)
    assert best_score(checkpoints) == 0.2
    checkpoints.close()
