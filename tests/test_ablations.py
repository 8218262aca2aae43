import json
import math
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import ROOT, run_program, tiny_config, write_beir

from rqv2_jax import config, config_check
from rqv2_jax.errors import InputError
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.tools import ablation_study, figures


def test_every_row_changes_one_thing_of_full():
    full = config.default()
    config.two_cores(full)
    full.data.path = "x"
    # As configs come from the command line.
    full.lock()
    found = ablation_study.rows(full)
    assert found["full"] == {}
    # The config's own preset is full itself.
    assert "preset official_code" not in found
    assert set(found["preset paper"]) == {f"joint.loss.{key}" for key in config.LOSSES["paper"]}
    assert found["teacher gradient on"] == {"joint.loss.teacher_gradient": True}
    # Labels without a teacher.
    alone = found["in-batch negatives alone"]
    assert alone == {"joint.in_batch_weight": 1.0, "joint.kl_weight": 0.0}
    assert found["without in-batch negatives"] == {"joint.in_batch_weight": 0.0}
    assert {name for name in found if name.startswith("list size")} == {
        "list size 2",
        "list size 8",
    }
    more = ablation_study.rows(full, [4, 16, 32])
    assert {name: more[name] for name in more if name.startswith("list size")} == {
        "list size 16": {"joint.list_size": 16},
        "list size 32": {"joint.list_size": 32},
    }
    for name, change in found.items():
        changed = config.loads(config.dumps(full))
        values = {k: 7 if v == ablation_study.REFRESHED else v for k, v in change.items()}
        changed.update_from_flattened_dict(values)
        config_check.check(changed)
        assert bool(config.differences(full, changed)) == (name != "full"), name
    full.joint.loss.update(config.LOSSES["paper"])
    found = ablation_study.rows(full)
    assert "preset paper" not in found
    assert "teacher gradient off" in found
    full.joint.in_batch_weight = 0.0
    assert ablation_study.rows(full)["in-batch negatives"] == {"joint.in_batch_weight": 1.0}


def measured(values):
    """`values[row]` [seeds, queries] of both models and metrics; each state before has its own."""
    queries = next(iter(values.values())).shape[1]
    states = {"zero_shot.retriever": 0.25, "retriever.retriever": 0.375, "reranker.reranker": 0.5}
    warm = {
        f"{state}.exact.{metric}": np.full(queries, value)
        for state, value in states.items()
        for metric in ("RR@10", "Success@50")
    }
    return [
        {
            "row": row,
            "seed": seed,
            "kept_step": {"retriever": 10 * seed, "reranker": 5 * seed},
            "values": warm
            | {
                f"joint.{model}.{candidates}.{metric}": values[row][seed]
                for model, candidates, metric in ablation_study.MEASURES
            },
        }
        for row in values
        for seed in range(len(values[row]))
    ]


def test_summary_by_hand():
    full = np.array([[1.0] * 8 + [0.0] * 8, [1.0] * 10 + [0.0] * 6])
    values = {"full": full, "better": np.ones_like(full), "same": full[::-1].copy()}
    found = ablation_study.summarise(measured(values), permutations=999)
    assert len(found) == 4 * 4
    rows = {(r["row"], r["model"], r["metric"]): r for r in found if r["candidates"] == "exact"}
    assert len(rows) == 4 * 3
    assert ("full", "reranker", "Success@50") not in rows
    row = rows["full", "retriever", "RR@10"]
    assert (row["mean"], row["seeds"], row["queries"]) == (9 / 16, 2, 16)
    assert row["spread"] == pytest.approx(np.std([8 / 16, 10 / 16], ddof=1))
    assert "p_value" not in row
    better = rows["better", "retriever", "RR@10"]
    assert better["difference"] == pytest.approx(7 / 16)
    assert better["spread"] == 0
    # Eight queries differ, all one way: 2 of 2^8 sign patterns are as extreme; three comparisons.
    assert better["p_value"] == pytest.approx(3 * 2 / 2**8)
    assert better["low"] > 0
    # Over the seeds +.5 and +.375: mean .4375 = 7 standard errors of .0625, one degree of freedom.
    assert better["seeds_p_value"] == pytest.approx(1 - 2 / math.pi * math.atan(7))
    same = rows["same", "retriever", "RR@10"]
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0, 0, 0, 1)
    assert rows["warm start", "reranker", "RR@10"]["difference"] == pytest.approx(-1 / 16)
    assert rows["warm start", "retriever", "Success@50"]["mean"] == 0.375
    table = ablation_study.render(found)
    assert better["differences"] == [8 / 16, 6 / 16]
    assert better["kept_steps"] == [0, 10]
    assert "| better | 0, 10 | 1.0000 | 0.0000 | +0.4375 |" in table
    assert table.count("+0.5000, +0.3750 | 0.0903 |") == 4
    assert table.count("16 test queries") == 4
    (alone,) = (r for r in found if r["candidates"] != "exact" and r["row"] == "warm start")
    assert (alone["model"], alone["mean"]) == ("reranker", 0.5)


def test_equal_differences_over_seeds_give_no_p_value():
    """A t-test would make much of what rounding makes of them."""
    hits = [627, 595, 576]
    full = np.array([[1.0] * n + [0.0] * (679 - n) for n in hits])
    worse = np.array([[1.0] * (n - 6) + [0.0] * (679 - n + 6) for n in hits])
    found = ablation_study.summarise(measured({"full": full, "worse": worse}), permutations=99)
    (row,) = (
        r
        for r in found
        if (r["row"], r["metric"], r["model"]) == ("worse", "Success@50", "retriever")
    )
    assert len(set(row["differences"])) > 1
    assert row["differences"] == pytest.approx([-6 / 679] * 3)
    assert "seeds_p_value" not in row


def test_a_table_of_more_seeds_stays_until_a_run_has_caught_up(tmp_path):
    path = tmp_path / "ablations.json"
    seeds = [
        [m for m in measured({"full": np.eye(3, 8)}) if m["seed"] <= seed] for seed in range(3)
    ]
    seen = []

    def write(done):
        ablation_study.write(measure(done), path.with_suffix(""), seeds=done, permutations=99)

    def measure(done):
        for some in seeds[:done]:
            yield some
            # After the warm start's row that of `full`.
            seen.append(json.loads(path.read_text())[1]["seeds"])

    write(3)
    assert seen == [1, 2, 3]
    write(3)
    assert seen[3:] == [3, 3, 3]
    # What is asked for is what is there at the end.
    write(2)
    assert seen[6:] == [3, 2]
    # A damaged one is made again.
    path.write_text(path.read_text()[:100])
    write(2)
    assert seen[8:] == [1, 2]
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match=r"ablations\.json: not as rqv2_jax\.ablations wrote it"):
        figures.draw_list_sizes(tmp_path, path, tmp_path / "list_sizes.png")


@pytest.fixture(scope="module")
def ablated(tmp_path_factory, bert_folder):
    folder = tmp_path_factory.mktemp("ablations")
    settings = tiny_config(write_beir(folder / "data"), bert_folder)
    # Not all queries, so that another draw of them would show.
    settings.mine.queries = 24
    only = [ablation_study.AS_TAUGHT, "without denoised lists", "refreshed candidates"]
    *_, found = ablation_study.run_all(settings, folder / "w", 2, only)
    return settings, folder / "w", only, found


def test_rows_start_from_one_warm_start_and_keep_their_change(ablated):
    _, folder, only, measured = ablated
    assert [(m["row"], m["seed"]) for m in measured] == [
        (name, seed) for seed in (0, 1) for name in ("full", *only)
    ]
    for name in ("full", *only):
        workdir = folder / "rows" / f"{name.replace(' ', '_')}.1"
        warm = "teachers/1/joint" if name == ablation_study.AS_TAUGHT else "warm/reranker"
        assert (workdir / "reranker").resolve() == (folder / warm).resolve()
        changed = json.loads((workdir / "config.json").read_text())
        assert changed["seed"] == 1
        undenoised = name == "without denoised lists"
        assert changed["joint"]["denoised_share"] == (0 if undenoised else 0.5)
        refreshed = name == "refreshed candidates"
        assert changed["joint"]["refresh_every"] == (2 if refreshed else 0)
        (scored,) = (workdir / "eval").glob("test.reranker.reranked.[rz]*.exact.npz")
        assert scored.is_symlink() == (name != ablation_study.AS_TAUGHT)
    by_row = {(m["row"], m["seed"]): m["values"] for m in measured}
    key = "joint.reranker.exact.RR@10"
    assert all(values[key].shape == (8,) for values in by_row.values())
    assert not (folder / "warm" / "joint").exists()
    assert not list((folder / "warm" / "lists").glob("joint.*"))


def test_every_row_takes_as_many_steps(ablated):
    _, folder, _, _ = ablated
    steps = {
        row.name: figures.curves(row / "joint")["dev/retriever RR@10"][-1][0]
        for row in (folder / "rows").iterdir()
    }
    steps["teacher"] = figures.curves(folder / "teachers" / "0" / "joint")["kl"][-1][0]
    assert len(steps) == 9
    assert len(set(steps.values())) == 1, steps
    # Of a finished row the optimizer is not kept.
    assert not list(folder.glob("*/*/joint/last"))


def test_a_static_teacher_that_is_trained_alike_has_seen_as_many_labels_as_a_dynamic_one(ablated):
    settings, folder, _, _ = ablated
    config_of = {
        name: json.loads((folder / name / "config.json").read_text())["joint"]
        for name in ("teachers/0", f"rows/{ablation_study.AS_TAUGHT.replace(' ', '_')}.0")
    }
    (taught, static), full = config_of.values(), json.loads(json.dumps(settings.joint.to_dict()))
    assert taught == full | {"kl_weight": 0.0, "keep": "last"}
    assert static == full | {"train_reranker": False}
    # The teacher has learnt, and the row leaves it as it is.
    name = ablation_study.AS_TAUGHT.replace(" ", "_")
    run = open_workdir(folder / "rows" / f"{name}.0")
    warm = open_workdir(folder / "warm").params(state="reranker", model="reranker")
    teacher, after = (run.params(state=s, model="reranker") for s in ("reranker", "joint"))
    heads = [np.asarray(params["head"]["kernel"]) for params in (warm, teacher, after)]
    np.testing.assert_array_equal(heads[1], heads[2])
    assert np.abs(heads[0] - heads[1]).max() > 1e-4


def test_refreshed_candidates_are_those_of_the_same_queries(ablated):
    _, folder, _, _ = ablated
    with np.load(folder / "warm" / "lists" / "train.retrieved.npz") as file:
        rows_Q = file["query_rows"]
    for seed in (0, 1):
        workdir = folder / "rows" / f"refreshed_candidates.{seed}"
        with np.load(workdir / "lists" / "joint.0000002" / "train.retrieved.npz") as file:
            np.testing.assert_array_equal(file["query_rows"], rows_Q)


def test_finished_rows_are_not_run_again(ablated):
    settings, folder, only, measured = ablated
    checkpoints = {p: p.stat().st_mtime_ns for p in folder.rglob("joint/best/*/*")}
    assert len(checkpoints) == 2 * 10
    *_, again = ablation_study.run_all(settings, folder, 2, only)
    assert checkpoints == {p: p.stat().st_mtime_ns for p in folder.rglob("joint/best/*/*")}
    assert not list(folder.glob("rows/*/joint/last"))
    for one, other in zip(measured, again):
        for key, values in one["values"].items():
            np.testing.assert_array_equal(values, other["values"][key])


@pytest.mark.slow
def test_killed_in_a_row_the_same_command_goes_on(ablated, tmp_path):
    settings, _, only, measured = ablated
    code = f"from rqv2_jax import config\nget_config = lambda: config.loads({config.dumps(settings)!r})"
    (tmp_path / "settings.py").write_text(code)
    workdir = tmp_path / "w"
    command = (
        *("rqv2_jax.ablations", f"--config={tmp_path / 'settings.py'}", f"--workdir={workdir}"),
        *("--seeds=1", f"--rows={','.join(only)}"),
    )
    midway = workdir / "rows" / "refreshed_candidates.0" / "lists" / "joint.0000002" / "dev.scores"
    with subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT) as process:
        while not midway.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert not (workdir / "ablations.some.json").exists()
    (done,) = (workdir / "rows" / "full.0" / "joint" / "best" / "reranker").glob("[0-9]*")
    before = done.stat().st_mtime_ns
    ended = run_program(*command)
    assert ended.returncode == 0, ended.stderr
    assert done.stat().st_mtime_ns == before
    summary = ablation_study.summarise(
        [m for m in measured if m["seed"] == 0], permutations=settings.evaluate.permutations
    )
    assert json.loads((workdir / "ablations.some.json").read_text()) == summary
    table = (workdir / "ablations.some.md").read_text()
    assert table == ablation_study.render(summary)
    assert table in ended.stdout


def test_unknown_rows_are_refused_before_anything_runs(tmp_path, ablated):
    with pytest.raises(InputError, match="no row 'statik'"):
        next(ablation_study.run_all(ablated[0], tmp_path / "w", 1, ["statik"]))
    fewer = config.loads(config.dumps(ablated[0]))
    fewer.evaluate.metrics = ("RR@10",)
    with pytest.raises(InputError, match="the table needs Success@50"):
        next(ablation_study.run_all(fewer, tmp_path / "w", 1, None))
    given = config.loads(config.dumps(ablated[0]))
    given.joint.lists = "lists.tsv"
    with pytest.raises(InputError, match=r"joint\.lists"):
        next(ablation_study.run_all(given, tmp_path / "w", 1, None))
    graded = config.loads(config.dumps(ablated[0]))
    graded.evaluate.min_relevance = 2
    with pytest.raises(InputError, match=r"evaluate\.min_relevance: the table counts relevance 1"):
        next(ablation_study.run_all(graded, tmp_path / "w", 1, None))
    # What one row alone cannot take is said before the others have run.
    with pytest.raises(InputError, match=r"row 'list size 1': .*leave it out by --rows"):
        next(ablation_study.run_all(ablated[0], tmp_path / "w", 1, None, [1]))
    assert not (tmp_path / "w").exists()


def test_ablations_may_be_moved(ablated, tmp_path):
    _, folder, _, _ = ablated
    shutil.copytree(folder, tmp_path / "moved", symlinks=True)
    link = tmp_path / "moved" / "rows" / "full.0" / "reranker"
    assert link.is_symlink()
    assert link.resolve() == (tmp_path / "moved" / "warm" / "reranker").resolve()


def test_events_of_a_killed_run_are_read_up_to_the_break(ablated, tmp_path):
    _, folder, _, _ = ablated
    (path,) = (folder / "rows" / "full.0" / "joint").glob("events.out.tfevents.*")
    (tmp_path / path.name).write_bytes(path.read_bytes()[:-7])
    whole, broken = figures.curves(path.parent), figures.curves(tmp_path)
    last = "dev/retriever RR@10"
    assert broken[last] in (whole[last], whole[last][:-1])
    assert broken["kl"] == whole["kl"]


def test_figures_show_what_was_recorded(ablated, tmp_path):
    _, folder, _, _ = ablated
    workdir = folder / "rows" / "full.0"
    found = figures.curves(workdir / "joint")
    last = found["dev/retriever RR@10"][-1][0]
    assert last > 3
    assert [step for step, _ in found["dev/retriever RR@10"]] == [*range(0, last, 3), last]
    assert [step for step, _ in found["kl"]] == [*range(2, last, 2), last]
    assert all(0 <= value <= np.log(4) + 1e-6 for _, value in found["reranker_entropy"])
    ended = run_program("rqv2_jax.report", f"--workdir={workdir}")
    assert ended.returncode == 0, ended.stderr
    assert "joint stage: loss" in (workdir / "report.html").read_text()
    summary = ablation_study.summarise(
        measured({"full": np.ones((2, 8)), "list size 8": np.eye(8)[:2]}), permutations=99
    )
    (folder / "ablations.json").write_text(json.dumps(summary))
    ended = run_program("rqv2_jax.report", f"--workdir={folder}")
    assert ended.returncode == 0, ended.stderr
    for name in ("list_sizes.png", "joint_training.png"):
        assert (folder / "report" / name).read_bytes().startswith(b"\x89PNG")
    ended = run_program("rqv2_jax.report", f"--workdir={folder}", f"--against={workdir}")
    assert "is a folder of ablations" in ended.stderr
    assert ended.returncode == 1
    with pytest.raises(InputError, match="no events of joint training"):
        figures.draw_training(folder / "warm", tmp_path / "none.png")


@pytest.mark.parametrize("newer", ["ablations", "ablations.some"])
def test_list_sizes_are_drawn_from_the_newer_table(newer, tmp_path, monkeypatch):
    (tmp_path / "warm").mkdir()
    for name in ("ablations", "ablations.some"):
        path = tmp_path / f"{name}.json"
        path.write_text('[{"row": "list size 8"}]')
        seconds = 1e9 + (name == newer)
        os.utime(path, (seconds, seconds))
    drawn = []
    monkeypatch.setattr(figures, "draw_list_sizes", lambda folder, table, path: drawn.append(table))
    monkeypatch.setattr(figures, "draw_training", lambda *_: None)
    figures.draw(tmp_path)
    assert drawn == [tmp_path / f"{newer}.json"]
