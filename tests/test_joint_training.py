"""The joint stage of a run: what it starts from, refreshed candidates, the lists it is given."""

import os
import re
import shutil

import jax
import numpy as np
import pytest
import tqdm
from tiny_run import _leaves, last_joint_params, run_program

from rqv2_jax import config as config_lib
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError
from rqv2_jax.models.scoring import tower
from rqv2_jax.recipe import mining, pipeline
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.recipe.run import open_run
from rqv2_jax.recipe.stage import Dev
from rqv2_jax.recipe.workdir import branch
from rqv2_jax.retrieval import encode
from rqv2_jax.tools import figures
from rqv2_jax.training import train
from rqv2_jax.training.checkpoint import Checkpoints, best_steps, best_values, restore_best


def test_joint_training_changes_both_models_and_starts_from_the_warm_ones(finished):
    config, workdir = finished
    run = open_workdir(workdir)
    last = last_joint_params(run)
    for model, joint in last.items():
        warm = run.params(state="reranker", model=model)
        leaves = zip(*(map(np.asarray, _leaves(tree)) for tree in (warm, joint)))
        moved = [float(np.abs(a - b).max()) for a, b in leaves]
        assert max(moved) > 0
        # Adam moves a weight by at most about the learning rate in a step.
        steps = 6
        assert max(moved) < 2 * steps * config.joint.learning_rate
    assert run.trained_by(state="reranker", model="retriever") == "retriever"


@pytest.fixture(scope="module")
def joint_again(finished, tmp_path_factory):
    """`train_joint(**settings)` trains jointly with other settings from the same warm models.

    With `stop`, a pattern of a printed line, it stops there and starts again.
    """
    config, workdir = finished
    store = tokens.open_store(workdir / "data" / "tokens")

    def train_joint(*, stop=None, **settings):
        changed = config_lib.loads(config_lib.dumps(config))
        changed.joint.update(settings)
        folder = tmp_path_factory.mktemp("joint")
        for kept in ("retriever", "reranker", "vectors", "lists"):
            shutil.copytree(workdir / kept, folder / kept)
        run = open_run(changed, folder)
        candidates = mining.mine(run, store, mining.retrieve(run, store))
        printed = []
        with pytest.MonkeyPatch.context() as patch:
            say = tqdm.tqdm.write

            def listen(text):
                first = stop and not any(re.match(stop, line) for line in printed)
                printed.append(text)
                if first and re.match(stop, text):
                    raise InterruptedError
                say(text)

            patch.setattr(tqdm.tqdm, "write", listen)
            if stop:
                with pytest.raises(InterruptedError):
                    pipeline.train_joint(run, store, candidates)
                # Nothing goes on being written or deleted once an interrupted run is out.
                kept = [path.name for path in (folder / "joint" / "last").iterdir()]
                assert 1 <= len(kept) <= 2
                assert all(name.isdigit() for name in kept)
            pipeline.train_joint(run, store, candidates)
        return last_joint_params(run), folder, printed

    return train_joint


def test_refreshed_lists_come_from_the_models_as_they_are(joint_again):
    params, folder, printed = joint_again(refresh_every=2)
    assert [line for line in printed if "refresh" in line] == [
        f"  refresh: candidates by the models of step {step}" for step in (2, 4)
    ]
    found = {}
    for name in ("", "joint.0000002/", "joint.0000004/"):
        with np.load(folder / "lists" / f"{name}train.retrieved.npz") as file:
            found[name] = dict(file)
    assert len({arrays["scores"].tobytes() for arrays in found.values()}) == 3
    (warm_Q, *_) = (arrays["query_rows"] for arrays in found.values())
    assert all((arrays["query_rows"] == warm_Q).all() for arrays in found.values())
    with np.load(folder / "lists" / "joint.0000004" / "train.scores" / "00000.npz") as file:
        assert file["scores"].shape == found[""]["passages"].shape
    # The last line of training counts steps through all segments.
    assert any(line.startswith("  joint 6/6") for line in printed)
    # The new candidates are what is trained on: nothing else sets this run apart from one without.
    kept, _, _ = joint_again()
    pairs = zip(_leaves(params), _leaves(kept))
    assert not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_candidates_that_cannot_be_made_again_are_missed(finished, joint_again, monkeypatch):
    config, _ = finished
    _, folder, _ = joint_again(refresh_every=3)
    steps = sorted((folder / "joint" / "last").glob("[0-9]*"))
    assert [p.name for p in steps] == ["6"]
    # As if it had been stopped at the last step but one, and the candidates were damaged since.
    os.truncate(folder / "lists" / "joint.0000003" / "train.retrieved.npz", 100)
    (folder / "joint" / "finished.txt").unlink()
    restore = Checkpoints.restore_last

    def earlier(self, state):
        state = restore(self, state)
        return state._replace(step=state.step - 1)

    monkeypatch.setattr(Checkpoints, "restore_last", earlier)
    changed = config_lib.loads(config_lib.dumps(config))
    changed.joint.refresh_every = 3
    run = open_run(changed, folder)
    store = tokens.open_store(finished[1] / "data" / "tokens")
    candidates = mining.mine(run, store, mining.retrieve(run, store))
    with pytest.raises(InputError, match=r"joint\.0000003: the candidates of step 3 are gone"):
        pipeline.train_joint(run, store, candidates)


def test_a_start_is_measured_only_if_it_is_not_known(finished):
    run, store = open_workdir(finished[1]), tokens.open_store(finished[1] / "data" / "tokens")
    name = "dev/reranker RR@10"
    # A new re-ranker has nothing to be measured.
    assert [step for step, _ in figures.curves(finished[1] / "reranker")[name]] == [3, 6]
    known_Q = best_values(finished[1] / "reranker", "reranker")
    curve = figures.curves(finished[1] / "joint")[name]
    assert [step for step, _ in curve] == [0, 3, 6]
    assert curve[0][1] == pytest.approx(known_Q.mean())
    dev = Dev(run.config, run.forward, store, mining.retrieve(run, store)["dev"])
    params = {"reranker": run.params(state="reranker", model="reranker")}
    np.testing.assert_array_equal(dev.values(params)["reranker"], known_Q)


def test_a_stage_that_resumes_makes_no_second_state(joint_again, monkeypatch):
    """Beside the one it restores, another's memory may not be there."""
    made, make = [], train.init_state
    monkeypatch.setattr(train, "init_state", lambda *args: made.append(1) or make(*args))
    whole, _, _ = joint_again()
    again, _, _ = joint_again(stop=r"  joint 4/6 ")
    assert len(made) == 2
    for a, b in zip(_leaves(whole), _leaves(again)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("stop", [r"  joint 2/6 ", r"  refresh: .* step 3", r"  joint 6/6 .*loss"])
def test_refreshing_resumes_with_the_same_models(joint_again, stop):
    whole, _, _ = joint_again(refresh_every=3)
    again, _, _ = joint_again(refresh_every=3, stop=stop)
    for a, b in zip(_leaves(whole), _leaves(again)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_static_distillation_leaves_the_reranker_alone(finished, joint_again):
    params, _, _ = joint_again(train_reranker=False)
    warm = open_workdir(finished[1])
    for model, same in (("reranker", True), ("retriever", False)):
        pairs = zip(_leaves(params[model]), _leaves(warm.params(state="reranker", model=model)))
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs) == same


@pytest.mark.parametrize("step", [0, 2])
def test_candidates_are_scored_by_the_query_tower_and_the_passage_tower(
    finished, joint_again, monkeypatch, step
):
    """In mining, in a refresh and on dev: swapped towers give other scores than these."""
    refreshed = []
    refresh = mining.refresh

    def listen(run, store, candidates, step, params):
        refreshed.append((step, jax.tree.map(np.asarray, params["retriever"])))
        return refresh(run, store, candidates, step, params)

    monkeypatch.setattr(mining, "refresh", listen)
    run, store = open_workdir(finished[1]), tokens.open_store(finished[1] / "data" / "tokens")
    if step == 0:
        folder, params = finished[1] / "lists", run.params(state="retriever", model="retriever")
    else:
        folder = joint_again(refresh_every=2)[1] / "lists" / f"joint.{step:07}"
        params = dict(refreshed)[step]
    with np.load(folder / "dev.retrieved.npz") as file:
        found = dict(file)
    queries_QxD = encode.queries(
        run.forward, tower(params, "query"), store.splits["dev"].texts, found["query_rows"]
    )
    everything = np.arange(len(store.passage_ids))
    passages_NxD = encode.passages(run.forward, tower(params, "passage"), store, everything)
    scores_QxN = np.take_along_axis(queries_QxD @ passages_NxD.T, found["passages"], axis=1)
    np.testing.assert_allclose(found["scores"], scores_QxN, rtol=1e-4, atol=1e-4)
    swapped = {"query": params["passage"], "passage": params["query"]}
    dev = Dev(run.config, run.forward, store, mining.retrieve(run, store)["dev"])
    order_Q = np.argsort(found["query_rows"])
    pool_QxN = queries_QxD[order_Q] @ passages_NxD[dev.pool_N].T
    reciprocal = []
    for row, scores_N in zip(dev.rows_Q, pool_QxN):
        # Query dev row i asks for passage 32 + i.
        at = dev.pool_N.tolist().index(store.passage_ids.index(f"p{32 + row}"))
        rank = 1 + (scores_N > scores_N[at]).sum()
        reciprocal.append(1 / rank if rank <= 10 else 0)
    np.testing.assert_allclose(dev.retriever(params), reciprocal)
    assert dev.retriever(swapped).mean() != dev.retriever(params).mean()


def test_exported_lists_can_be_trained_on(finished, joint_again, tmp_path):
    config, workdir = finished
    path = tmp_path / "lists.tsv.gz"
    ended = run_program(
        "rqv2_jax.export", f"--workdir={workdir}", "--format=joint-tsv", f"--to={path}"
    )
    assert ended.returncode == 0, ended.stderr
    run = open_workdir(workdir)
    store = tokens.open_store(workdir / "data" / "tokens")
    candidates = mining.mine(run, store, mining.retrieve(run, store))
    drawn = mining.draw_lists(run.config, store, candidates, "joint")
    _, folder, printed = joint_again(lists=str(path), epochs=1.0)
    assert any(line.startswith(f"  {len(drawn.query_rows_L)} lists of 4: ") for line in printed)
    given = tokens.open_store(folder / "lists" / "given")
    changed = config_lib.loads(config_lib.dumps(config))
    changed.joint.update({"lists": str(path), "epochs": 1.0})
    _, read = mining.read_lists(open_run(changed, folder))

    def words(lists, store):
        texts = store.splits["train"].texts
        return sorted(
            (
                tuple(texts.tokens[texts.offsets[query] : texts.offsets[query + 1]]),
                *(
                    tuple(store.texts.tokens[store.texts.offsets[p] : store.texts.offsets[p + 1]])
                    for p in passages
                ),
            )
            for query, passages in zip(lists.query_rows_L, lists.passages_LxP)
        )

    assert words(read, given) == words(drawn, store)


def test_given_lists_that_contradict_each_other_are_mended(finished, tmp_path, capsys):
    path = tmp_path / "lists.tsv"
    lists = [("a", "river", "stone"), ("a", "stone", "river"), ("b", "river", "engine")]
    path.write_text("".join(f"{q}\t\t{p}\t1\n{q}\t\t{n}\t0\n" for q, p, n in lists))
    changed = config_lib.loads(config_lib.dumps(finished[0]))
    changed.joint.update({"lists": str(path), "list_size": 2, "epochs": 1.0})
    _, found = mining.read_lists(open_run(changed, tmp_path / "w"))
    said = capsys.readouterr().out
    assert "2 of the file's negatives are positives of other lists of their query" in said
    assert "3 lists of 2: 3 labelled_positive, 2 random_fill, 1 given_negative" in said
    # The only passage of the file that is no positive of "a".
    (engine,) = found.passages_LxP[found.provenance_LxP == lists_lib.Provenance.GIVEN_NEGATIVE]
    filled = found.passages_LxP[found.provenance_LxP == lists_lib.Provenance.RANDOM_FILL]
    np.testing.assert_array_equal(filled, [engine, engine])


def test_given_negatives_with_a_positives_tokens_are_replaced(finished, tmp_path):
    path = tmp_path / "lists.tsv"
    # The same tokens: split between title and text, or in capitals.
    lists = [("a", "\triver stone", n) for n in ("river\tstone", "\tRIVER Stone")]
    lists.append(("b", "\tforest", "\tsignal"))
    path.write_text("".join(f"{q}\t{p}\t1\n{q}\t{n}\t0\n" for q, p, n in lists))
    changed = config_lib.loads(config_lib.dumps(finished[0]))
    changed.joint.update({"lists": str(path), "list_size": 2, "epochs": 1.0})
    store, found = mining.read_lists(open_run(changed, tmp_path / "w"))
    kinds = lists_lib.Provenance
    texts = {row: len(store.texts.row(row)) + len(store.titles.row(row)) for row in range(5)}
    for query, (_, negative), (_, kind) in zip(
        found.query_rows_L, found.passages_LxP, found.provenance_LxP
    ):
        assert kind == (kinds.RANDOM_FILL if query == 0 else kinds.GIVEN_NEGATIVE)
        assert texts[int(negative)] == 1, "one word: of the other query's"


def test_given_lists_are_read_before_any_training(finished, tmp_path):
    path = tmp_path / "lists.tsv"
    path.write_text("a\t\triver\t1\na\t\tstone\t0\na\t\tstone\t1\na\t\triver\t0\n")
    changed = config_lib.loads(config_lib.dumps(finished[0]))
    changed.joint.update({"lists": str(path), "list_size": 2})
    with pytest.raises(InputError, match=r"lists\.tsv: has too few passages to stand in for"):
        pipeline.main(changed, tmp_path / "w")
    changed.joint.list_size = 3
    with pytest.raises(InputError, match=r"lists\.tsv:.*set config\.joint\.list_size"):
        pipeline.main(changed, tmp_path / "w")
    assert not (tmp_path / "w" / "retriever").exists()


@pytest.mark.slow
def test_the_retriever_learns_from_the_reranker_alone(tmp_path):
    """On real text: without KL the retriever stays at its start; with it, it rises on dev.

    Weight decay, which knows no loss, is off.
    """
    config = config_lib.default()
    config_lib.two_cores(config)
    config.budget = config.retriever.epochs = config.joint.in_batch_weight = 0.0
    config.data.update({"dataset": "docstrings", "passage_length": 48, "pair_length": 64})
    config.data.update({"train_passage_length": 0, "train_pair_length": 0})
    config.model.num_layers = 3
    config.optimizer.weight_decay = 0.0
    config.mine.update({"queries": 800, "depth": 16})
    config.reranker.most_lists = 160
    config.joint.update({"epochs": 1.0, "denoised_share": 0.0, "evaluate_every": 100})
    config.joint.reranker_rate = 3.0
    config.dev.update({"queries": 200, "depth": 5, "pool": 500})
    warm = open_run(config, tmp_path / "warm")
    store, candidates = pipeline.warm_up(warm)
    scores = {}
    for weight, lists in ((0.0, 48), (1.0, 320)):
        config.joint.update({"kl_weight": weight, "most_lists": lists})
        run = open_run(config, tmp_path / f"kl {weight}")
        branch(run.workdir, warm.workdir)
        pipeline.train_joint(run, store, candidates)
        curves = figures.curves(run.workdir / "joint")
        scores[weight] = [score for _, score in curves["dev/retriever RR@10"]]
    assert scores[0.0][-1] == scores[0.0][0]
    assert scores[1.0][-1] > scores[1.0][0] + 0.02


def test_a_stage_that_dev_finds_no_better_keeps_its_start_and_says_so(joint_again):
    _, folder, printed = joint_again(learning_rate=1e-12, keep="best")
    assert best_steps(folder / "joint") == {"retriever": 0, "reranker": 0}
    kept = "kept the start, as dev finds later steps worse by RR@10"
    assert f"  reranker: {kept}; retriever: {kept}" in printed


def test_a_stage_may_keep_its_last_params(joint_again):
    last, folder, printed = joint_again(learning_rate=1e-12, keep="last")
    assert best_steps(folder / "joint") == {"retriever": 6, "reranker": 6}
    assert "  kept the last params, of step 6, whatever dev says" in printed
    for model, params in last.items():
        kept = restore_best(folder / "joint", model, params)
        jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_in_batch_negatives_can_be_trained_in_parts(joint_again, finished):
    last, folder, _ = joint_again(in_batch_weight=1.0, accumulate=2)
    curves = figures.curves(folder / "joint")
    assert curves["in_batch"][-1][1] > 0
    warm = open_workdir(finished[1]).params(state="reranker", model="retriever")
    for side in ("query", "passage"):
        leaves = zip(*(map(np.asarray, _leaves(tree[side])) for tree in (warm, last["retriever"])))
        assert max(float(np.abs(a - b).max()) for a, b in leaves) > 0
