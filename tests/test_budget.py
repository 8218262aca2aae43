"""The counts that follow from a time budget, and what a run does with them."""

import itertools
import json
import shutil

import numpy as np
import pytest
from tiny_run import _leaves, tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import budget, mining, pipeline
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.recipe.run import open_run

QUERIES, POSITIVES = 8000, 12000
STAGES = ("retriever", "reranker", "joint")


def settings(minutes, **changes):
    config = config_lib.default()
    for stage, batch in zip(STAGES, (32, 8, 16)):
        config[stage].update({"batch": batch, "epochs": 2.0})
    config.update_from_flattened_dict({"budget": float(minutes), **changes})
    return config


def costs(speed=1.0):
    each = {
        "once": {"measuring": 60, "retrieve": 150, "mine": 20, **dict.fromkeys(STAGES, 20)},
        "step": {"retriever": 2.0, "reranker": 1.0, "joint": 4.0},
        "start": {"retriever": 12, "reranker": 0, "joint": 12},
        "dev": {"retriever": 12, "reranker": 20, "joint": 32},
    }
    scaled = {key: {k: v / speed for k, v in values.items()} for key, values in each.items()}
    return budget.Costs(pair=0.02 / speed, **scaled)


def plan(minutes, speed=1.0, **changes):
    return budget.plan(settings(minutes, **changes), costs(speed), QUERIES, POSITIVES)


def wanted(counts):
    """What grows with time; how deep candidates are scored may give way to more queries."""
    pairs = counts["mine.scored_queries"] * counts["mine.scored_depth"]
    grown = [counts[f"{stage}.most_lists"] for stage in STAGES]
    return np.array([*grown, counts["mine.queries"], counts["mine.scored_queries"], pairs])


@pytest.mark.parametrize(
    "plans",
    [
        [plan(minutes) for minutes in np.geomspace(1, 3000, 120)],
        [plan(30, speed) for speed in np.geomspace(0.1, 100, 120)],
    ],
)
def test_more_time_and_more_speed_never_give_less(plans):
    for less, more in itertools.pairwise(plans):
        assert (wanted(less["counts"]) <= wanted(more["counts"])).all(), (less, more)
    assert (wanted(plans[0]["counts"]) < wanted(plans[-1]["counts"])).all()


@pytest.mark.parametrize("minutes", [12, 20, 30, 60, 240, 2000])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"joint.refresh_every": 40},
        {"joint.denoised_share": 0.0},
        {"dev.queries": 100, "mine.queries": 900},
    ],
)
def test_expected_times_stay_within_the_budget(minutes, changes):
    made = plan(minutes, **changes)
    if changes.get("joint.refresh_every"):
        # The corpus is encoded each time.
        steps = made["counts"]["joint.most_lists"] // 16
        assert made["expected"]["joint"] > steps * 4 + steps // 40 * 150
    most = (1 - budget.RESERVE) * 60 * minutes
    assert sum(made["expected"].values()) <= most + 1e-6
    if 20 <= minutes <= 60:
        assert sum(made["expected"].values()) > 0.85 * most
    assert made["enough"] == 0


def test_stages_share_what_encoding_compiling_and_scoring_leave():
    made, once = plan(60), costs().once
    left = (1 - budget.RESERVE) * 3600 - sum(once.values())
    scoring = made["expected"]["mine"] - once["mine"]
    assert 0.9 * budget.SCORING * left < scoring <= budget.SCORING * left
    for name, share in budget.SHARES.items():
        given = share * (1 - budget.SCORING) * left
        assert given * 0.95 < made["expected"][name] - once[name] <= given


def test_what_a_stage_does_not_need_goes_to_the_others():
    without, with_few = plan(60), plan(60, **{"retriever.epochs": 0.1})
    assert with_few["counts"]["retriever.most_lists"] == 1200 // 32 * 32
    for stage in ("reranker", "joint"):
        key = f"{stage}.most_lists"
        assert with_few["counts"][key] > without["counts"][key]


def test_no_stage_takes_more_than_its_settings():
    counts = plan(10000, **{"mine.queries": 1000, "joint.most_lists": 500})["counts"]
    assert counts["retriever.most_lists"] == 2 * POSITIVES
    assert counts["reranker.most_lists"] == 2 * 1000 * POSITIVES // QUERIES
    assert counts["joint.most_lists"] == 500 // 16 * 16
    assert counts["mine.queries"] == 1000
    assert counts["mine.scored_depth"] == 50


def test_dev_is_measured_a_handful_of_times_and_rates_rise_for_a_tenth():
    for minutes in (20, 60, 500):
        counts = plan(minutes)["counts"]
        for stage, batch in zip(STAGES, (32, 8, 16)):
            steps = counts[f"{stage}.most_lists"] // batch
            measured = len(range(0, steps, counts[f"{stage}.evaluate_every"])) + 1
            assert 2 <= measured <= 5
            assert counts[f"{stage}.warmup_steps"] == steps // 10
    assert measured == 5


def test_too_small_a_budget_gives_the_least_and_says_what_would_do():
    made = plan(7)
    assert made["enough"] == 9
    assert plan(9)["enough"] == 0
    slow = costs()
    slow.once["retrieve"] = 1200
    short = budget.plan(settings(59), slow, QUERIES, POSITIVES)
    assert short["enough"] == 60
    assert budget.plan(settings(60), slow, QUERIES, POSITIVES)["enough"] == 0
    # BM25 needs no vectors of the corpus.
    both = {"mine.sources": ("retriever", "bm25")}
    found = budget.plan(settings(59, **both), slow, QUERIES, POSITIVES)
    assert (found["sources"], found["enough"], found["expected"]["retrieve"]) == (["bm25"], 0, 0.0)
    fast = budget.plan(settings(59, **both), costs(), QUERIES, POSITIVES)
    assert fast["sources"] == ["retriever", "bm25"]
    assert (wanted(found["counts"]) > 0.95 * wanted(fast["counts"])).all()
    assert short["sources"] == ["retriever"]
    for each in (made, short):
        assert [each["counts"][f"{stage}.most_lists"] for stage in STAGES] == [32, 8, 16]


def best(workdir):
    run = open_workdir(workdir)
    return [_leaves(run.params(state="joint", model=model)) for model in ("retriever", "reranker")]


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory, bert_folder):
    """(config, workdir) of a run with a budget of a minute, as a machine of a given speed has it."""
    folder = tmp_path_factory.mktemp("budget")
    config = tiny_config(write_beir(folder / "data"), bert_folder)
    config.update_from_flattened_dict({"budget": 1.0} | {f"{s}.epochs": 4.0 for s in STAGES})
    config.evaluate.update({"indexes": ("exact",), "permutations": 100})

    def measured(run, store, measure=budget.measure):
        found = measure(run, store)
        assert set(found.once) == {"measuring", "retrieve", "mine", *STAGES}
        assert set(found.step) == set(found.start) == set(found.dev) == set(STAGES)
        # A new re-ranker is not measured before its warm-up, nor again after it.
        assert found.start["reranker"] == 0 < found.start["joint"] < found.dev["joint"]
        assert all(seconds > 0 for seconds in (found.pair, *found.step.values()))
        # The retriever's is the joint step's share of inputs and tokens, the others are measured.
        assert found.step["retriever"] < found.step["joint"]
        assert found.step["joint"] > found.step["reranker"] * 0.9
        compiling = [found.once[stage] for stage in STAGES]
        assert compiling[0] == pytest.approx(compiling[2] * 2 / 3, rel=0.01)
        assert found.once["measuring"] > compiling[1] + compiling[2]
        once = {"measuring": 2, "retrieve": 1, "mine": 1, **dict.fromkeys(STAGES, 1)}
        step = {"retriever": 0.4, "reranker": 4.0, "joint": 5.0}
        return budget.Costs(once, 0.05, step, *[dict.fromkeys(STAGES, 0.5)] * 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "measure", measured)
        pipeline.main(config, folder / "w")
    return config, folder / "w"


def test_a_run_with_its_counts_written_by_hand_has_the_same_params(budgeted, tmp_path):
    config, workdir = budgeted
    counts = json.loads((workdir / "budget.json").read_text())["counts"]
    assert [counts[f"{stage}.most_lists"] for stage in STAGES] == [128, 32, 16]
    assert counts["mine.queries"] == 32
    assert counts["retriever.warmup_steps"] == 1
    by_hand = config_lib.loads(config_lib.dumps(config))
    by_hand.update_from_flattened_dict({"budget": 0.0, **counts})
    pipeline.main(by_hand, tmp_path / "w")
    assert not (tmp_path / "w" / "budget.json").exists()
    for ours, theirs in zip(best(workdir), best(tmp_path / "w")):
        for a, b in zip(ours, theirs):
            np.testing.assert_array_equal(a, b)


def test_a_run_that_resumes_takes_the_counts_of_its_workdir(
    budgeted, tmp_path, monkeypatch, capsys
):
    config, workdir = budgeted
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "joint")
    path = tmp_path / "w" / "budget.json"
    made = json.loads(path.read_text())
    # As a machine that was slow would have made it.
    made["counts"]["joint.most_lists"] = 16
    path.write_text(json.dumps(made))
    monkeypatch.setattr(budget, "measure", None)
    pipeline.main(config, tmp_path / "w")
    steps = [path.name for path in (tmp_path / "w" / "joint" / "last").glob("[0-9]*")]
    assert max(map(int, steps)) == 2
    printed = capsys.readouterr().out
    assert "joint: 16 lists in 2 steps" in printed
    assert "of 1 minutes: measuring" in printed
    assert config_lib.loads((tmp_path / "w" / "config.json").read_text()).joint.most_lists == 10**9


def test_an_opened_workdir_draws_the_lists_that_were_trained_on(budgeted, tmp_path):
    _, workdir = budgeted
    counts = json.loads((workdir / "budget.json").read_text())["counts"]
    run = open_workdir(workdir)
    assert {key: config_lib.flat(run.config)[key] for key in counts} == counts
    store, candidates, _ = mining.mined(run)
    lists = mining.draw_lists(run.config, store, candidates, "joint")
    assert len(lists.query_rows_L) == counts["joint.most_lists"]
    pipeline.export_lists(run, tmp_path / "lists.tsv")
    rows = (tmp_path / "lists.tsv").read_text().splitlines()
    assert len(rows) == 4 * counts["joint.most_lists"]


@pytest.mark.parametrize("damage", ["gone", "{", '{"counts": {}}', "another budget"])
def test_counts_that_training_began_by_cannot_be_made_again(budgeted, tmp_path, damage):
    config, workdir = budgeted
    shutil.copytree(workdir, tmp_path / "w")
    path = tmp_path / "w" / "budget.json"
    if damage == "another budget":
        path.write_text(json.dumps({**json.loads(path.read_text()), "minutes": 3.0}))
    elif damage == "gone":
        path.unlink()
    else:
        path.write_text(damage)
    for open_again in (lambda: pipeline.main(config, tmp_path / "w"), lambda: best(tmp_path / "w")):
        with pytest.raises(InputError, match=r"budget\.json: cannot be read .*bring it back"):
            open_again()


def test_counts_are_made_again_while_nothing_has_begun(budgeted, tmp_path, capsys, monkeypatch):
    config, workdir = budgeted
    run = open_run(config, tmp_path / "w")
    for name in ("config.json", "data"):
        copy = shutil.copytree if (workdir / name).is_dir() else shutil.copy
        (tmp_path / "w").mkdir(exist_ok=True)
        copy(workdir / name, tmp_path / "w" / name)
    (tmp_path / "w" / "budget.json").write_text("{")
    monkeypatch.setattr(budget, "measure", lambda run, store: costs(1e6))
    budget.use(run, pipeline.prepare(run))
    assert "it is made again" in capsys.readouterr().out
    made = json.loads((tmp_path / "w" / "budget.json").read_text())["counts"]
    assert run.config.joint.most_lists == made["joint.most_lists"] > 0


def test_a_workdir_from_before_there_were_budgets_has_none():
    config = config_lib.default()
    del config["budget"]
    assert config_lib.complete(config) == (["budget"], [])
    assert config.budget == 0
