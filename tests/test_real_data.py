"""The whole recipe on data as people have them: holes, unknown labels, queries that are passages."""

import contextlib
import io
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from tiny_run import run_program, tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax import evaluate
from rqv2_jax.data import own_texts, tokens
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import trec
from rqv2_jax.recipe import mining, pipeline
from rqv2_jax.recipe import scorer as score
from rqv2_jax.recipe.candidates import Finder
from rqv2_jax.recipe.claim import claim, open_workdir
from rqv2_jax.recipe.run import open_run
from rqv2_jax.recipe.stage import Dev
from rqv2_jax.recipe.texts import open_store, texts_of, with_topics
from rqv2_jax.retrieval import rerank


def write_messy(folder):
    """`write_beir`'s collection without labels of dev, each query a passage, and with holes."""
    write_beir(folder)
    (folder / "qrels" / "dev.tsv").unlink()
    queries = [json.loads(line) for line in (folder / "queries.jsonl").open()]
    rows = {
        "corpus.jsonl": [
            *({"_id": q["_id"], "title": "", "text": q["text"]} for q in queries),
            {"_id": "empty", "title": "", "text": " "},
            {"_id": "titled", "title": "stone garden", "text": ""},
        ],
        "queries.jsonl": [{"_id": "mute", "text": ""}, {"_id": "asked", "text": None}],
    }
    for name, more in rows.items():
        with (folder / name).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in more)
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("q0\tnowhere\t0\nq1\tp5\t-1\nasked\tp3\t1\n")
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q40\tnowhere\t-2\n")
    return folder


@pytest.fixture(scope="module")
def messy(tmp_path_factory, bert_folder):
    """The config, the workdir of a finished run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("messy"), io.StringIO()
    config = tiny_config(write_messy(folder / "data"), bert_folder)
    config.evaluate.indexes = ("exact",)
    with contextlib.redirect_stdout(printed):
        pipeline.main(config, folder / "workdir")
    return config, folder / "workdir", printed.getvalue()


def test_what_is_left_out_is_counted_in_the_output(messy):
    _, _, printed = messy
    labels = (
        r"  2 labels that are not positive name a passage that is not there; left out \(first: "
    )
    for line in (
        r"  98 passages; queries: 29 train, 3 dev, 8 test",
        r"  dev is held out from the training queries, for there are no labels of its own",
        r"  2 queries have no text; left out \(first: mute\)",
        # Those that dev.tsv had labels for.
        r"  8 queries have no positive or answer in any split; left out \(first: q32\)",
        labels,
        r"  1 passages have no text; kept, empty \(first: empty\)",
        *(
            rf"  {n} of {n} {split} queries stand in the corpus under their own id;"
            for split, n in (("train", 29), ("dev", 3), ("test", 8))
        ),
    ):
        assert re.search(rf"^{line}", printed, re.MULTILINE), line


def ids_of(store, split, rows_Q, passages_QxN):
    asked = store.splits[split].ids
    return [
        (asked[query], store.passage_ids[passage])
        for query, passages_N in zip(rows_Q, passages_QxN)
        for passage in passages_N
    ]


def test_a_query_that_is_a_passage_is_no_candidate_and_no_negative(messy):
    _, workdir, _ = messy
    run = open_workdir(workdir)
    store = open_store(run)
    candidates = mining.retrieve(run, store)
    for split, found in candidates.items():
        assert found.passages_QxN.shape[1] == run.config[{"train": "mine"}.get(split, split)].depth
        assert all(
            query != passage
            for query, passage in ids_of(store, split, found.query_rows_Q, found.passages_QxN)
        )
    lists = mining.draw_lists(run.config, store, mining.mine(run, store, candidates), "joint")
    drawn = ids_of(store, "train", lists.query_rows_L, lists.passages_LxP)
    assert drawn
    assert all(query != passage for query, passage in drawn)
    # The retriever does find it.
    vectors = tokens.open_store(workdir / "data" / "tokens")
    unmarked = Finder(run, vectors, workdir / "lists" / "unmarked", "unmarked")
    ignored_by_nothing = unmarked.find(
        {"train": candidates["train"].query_rows_Q},
        workdir / "vectors" / "unmarked",
        lambda: run.params(state="retriever", model="retriever"),
    )["train"]
    pairs = ids_of(store, "train", ignored_by_nothing.query_rows_Q, ignored_by_nothing.passages_QxN)
    assert any(query == passage for query, passage in pairs)


def test_run_files_never_name_it(messy, tmp_path):
    _, workdir, _ = messy
    paths = sorted((workdir / "runs").glob("*.trec"))
    assert len(paths) == 8
    for path in paths:
        run = trec.read_run(path)
        assert all(query not in dict(found) for query, found in run.items())
        assert {len(found) for found in run.values()} == {20}
    # Topics that name the queries themselves, half of them without labels.
    shutil.copytree(workdir, tmp_path / "w")
    topics = workdir.parent / "data" / "queries.jsonl"
    arguments = [f"--workdir={tmp_path / 'w'}", f"--topics={topics}", f"--to={tmp_path / 'run'}"]
    ended = run_program("rqv2_jax.search", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "2 queries have no text; left out (first: mute)" in ended.stdout
    run = trec.read_run(tmp_path / "run")
    assert len(run) == 48
    assert all(query not in dict(found) for query, found in run.items())
    expected = trec.read_run(workdir / "runs" / "test.joint.reranker.exact.trec")
    for query, found in expected.items():
        assert [passage for passage, _ in run[query]] == [passage for passage, _ in found]


def test_candidates_of_msmarcos_three_columns_are_reranked_without_it(messy, tmp_path):
    _, workdir, _ = messy
    shutil.copytree(workdir, tmp_path / "w")
    rows = [
        f"q{n}\t{p}\t{rank}\n" for n in range(40, 48) for rank, p in ((2, f"p{n}"), (1, f"q{n}"))
    ]
    (tmp_path / "given.run").write_text("".join(rows))
    flags.FLAGS.mark_as_parsed()
    arguments = {"workdir": str(tmp_path / "w"), "candidates": str(tmp_path / "given.run")}
    with flagsaver.flagsaver(**arguments):
        evaluate.main()
    report = json.loads((tmp_path / "w" / "eval" / "test.given.json").read_text())
    assert [row["metrics"]["RR@10"] for row in report["rows"]] == [1.0, 1.0, 1.0]
    written = (tmp_path / "w" / "runs" / "test.joint.reranker.given.trec").read_text()
    assert [line.split()[2] for line in written.splitlines()] == [f"p{n}" for n in range(40, 48)]


def test_topics_of_beir_are_measured_without_those_that_have_no_text(messy, tmp_path, capsys):
    _, workdir, _ = messy
    run = open_workdir(workdir)
    store, data = open_store(run), workdir.parent / "data"
    shutil.copy(data / "queries.jsonl", tmp_path / "further.jsonl")
    (tmp_path / "qrels").write_text("q41\tp1\t1\nasked\tp3\t1\nq41\tnowhere\t0\nnobody\tp1\t-1\n")
    found, name = with_topics(run, store, tmp_path / "further.jsonl", tmp_path / "qrels")
    assert name == "further"
    assert found.splits[name].ids == ["q41"]
    assert found.splits[name].qrels_3xN.tolist() == [[0], [1], [1]]
    assert own_texts.of_rows(found.splits[name], np.array([0])).tolist() == [
        store.passage_ids.index("q41")
    ]
    said = capsys.readouterr().out
    assert "further: 2 queries have no text; left out (first: mute)" in said
    assert "further: 1 labels that are not positive name a passage that is not there" in said


def test_dev_is_measured_without_it(messy, monkeypatch):
    _, workdir, _ = messy
    run, measured = open_workdir(workdir), []
    monkeypatch.setattr(Dev, "_values", lambda self, passages_QxK, _: measured.append(passages_QxK))
    unmarked = tokens.open_store(workdir / "data" / "tokens")
    for store in (open_store(run), unmarked):
        dev = Dev(run.config, run.forward, store, None)
        dev.pool_N = np.arange(len(store.passage_ids))
        dev.retriever(run.params(state="joint", model="retriever"))
        assert measured[-1].shape == (3, 10)
    own_Q = np.array([unmarked.passage_ids.index(key) for key in unmarked.splits["dev"].ids])
    with_it, without = (np.array(x) == own_Q[:, None] for x in reversed(measured))
    assert not without.any()
    assert with_it.any()


@pytest.mark.parametrize("stage", ["reranker", "joint"])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(messy, tmp_path, stage):
    config, workdir, _ = messy
    config = config_lib.loads(config_lib.dumps(config))
    config[stage].update({"learning_rate": 1e10, "evaluate_every": 100, "save_every": 1})
    if stage == "joint":
        # Up to there it is the finished run.
        shutil.copytree(workdir, tmp_path / "w", ignore=shutil.ignore_patterns("joint"))
    else:
        config.retriever.epochs = 0.0
    messages = []
    for _ in range(2):
        # The second resumes from what the first one left.
        with pytest.raises(InputError) as raised:
            pipeline.main(config, tmp_path / "w")
        messages.append(str(raised.value))
        steps = [int(path.name) for path in (tmp_path / "w" / stage / "last").glob("[0-9]*")]
        run = open_run(config, tmp_path / "w")
        assert steps
        saved = restored(run, stage)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))
    assert len(set(messages)) == 1
    assert re.match(rf"{stage}, step \d+: .*loss is (nan|inf)", messages[0])
    assert max(steps) == int(re.search(r"step (\d+)", messages[0])[1]) - 1
    assert "\n" not in messages[0]


def test_a_dev_score_that_is_no_number_names_the_stage_and_not_a_passage(
    messy, tmp_path, monkeypatch
):
    config, _, _ = messy
    config = config_lib.loads(config_lib.dumps(config))
    config.retriever.epochs = 0.0
    config.reranker.update({"evaluate_every": 2, "save_every": 1})
    score_pairs = rerank.scores

    def broken(forward, params, *given):
        return score_pairs(forward, params, *given) * np.nan

    monkeypatch.setattr(rerank, "scores", broken)
    with pytest.raises(InputError, match=r"^reranker, step 2: dev/reranker RR@10 is nan; "):
        pipeline.main(config, tmp_path / "w")
    assert [path.name for path in (tmp_path / "w/reranker/last").glob("[0-9]*")] == ["1"]


def restored(run, stage):
    """The params of a stage's last checkpoint."""
    import orbax.checkpoint as ocp

    folder = run.workdir / stage / "last"
    (step,) = folder.glob("[0-9]*")
    (item,) = (path for path in step.iterdir() if (path / "_METADATA").exists())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(item)["params"]


@pytest.fixture
def moved(messy, tmp_path):
    """A copy of the finished run, whose data and weights have moved since: (workdir, new places)."""
    config, workdir, _ = messy
    shutil.copytree(workdir, tmp_path / "w")
    shutil.copytree(config.data.path, tmp_path / "new data")
    shutil.copytree(config.model.weights, tmp_path / "new weights")
    written = json.loads((tmp_path / "w" / "config.json").read_text())
    written["data"]["path"] = str(tmp_path / "old data")
    written["model"]["weights"] = str(tmp_path / "old weights")
    (tmp_path / "w" / "config.json").write_text(json.dumps(written))
    return tmp_path / "w", {key: str(tmp_path / f"new {key}") for key in ("data", "weights")}


def test_what_has_moved_is_found_at_the_place_of_the_flags(moved):
    workdir, places = moved
    with pytest.raises(InputError, match=r"old weights', which is not there; .* --weights DIR"):
        open_workdir(workdir)
    run = open_workdir(workdir, weights=places["weights"])
    with pytest.raises(InputError, match=r"old data: .* are not there any more; .* as --data DIR"):
        texts_of(run, open_store(run).fingerprint)
    run = open_workdir(workdir, **places)
    assert len(list(texts_of(run, open_store(run).fingerprint).passages())) == 98
    arguments = [f"--{name}={place}" for name, place in places.items()]
    ended = run_program("rqv2_jax.search", f"--workdir={workdir}", *arguments, "stone garden")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("rank  re-ranker  retriever  passage\n")


def test_other_content_is_not_what_has_moved(moved, make_bert):
    workdir, places = moved
    other, _ = make_bert(seed=9)
    with pytest.raises(InputError, match="was made from other weights or tokenizers than those in"):
        open_workdir(workdir, **{**places, "weights": str(other)})
    with (pathlib.Path(places["data"]) / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "more", "text": "more"}\n')
    run = open_workdir(workdir, **places)
    with pytest.raises(InputError, match="have changed since this workdir was made"):
        texts_of(run, open_store(run).fingerprint)


def test_main_takes_the_new_places_if_their_content_is_the_same(messy, moved, make_bert):
    config = config_lib.loads(config_lib.dumps(messy[0]))
    workdir, places = moved
    config.data.path, config.model.weights = places["data"], places["weights"]
    before = (workdir / "config.json").read_text()
    other, _ = make_bert(seed=9)
    config.model.weights = str(other)
    with pytest.raises(InputError, match="was made from other weights or tokenizers than those in"):
        claim(open_run(config, workdir))
    config.model.weights = places["weights"]
    assert (workdir / "config.json").read_text() == before
    stamps = {path: path.stat().st_mtime_ns for path in (workdir / "data").rglob("*")}
    results = json.loads((workdir / "results.json").read_text())
    pipeline.main(config, workdir)
    # From here on they are known.
    run = open_workdir(workdir)
    assert len(list(texts_of(run, open_store(run).fingerprint).passages())) == 98
    assert stamps == {path: path.stat().st_mtime_ns for path in (workdir / "data").rglob("*")}
    assert json.loads((workdir / "results.json").read_text()) == results
    with (pathlib.Path(places["data"]) / "qrels" / "train.tsv").open("a") as file:
        file.write("q2\tp9\t1\n")
    config.data.path = str(shutil.move(places["data"], workdir.parent / "third"))
    with pytest.raises(InputError, match=r"data\.path: .*not those it was made from"):
        claim(open_run(config, workdir))


def test_a_scorer_takes_no_passages_and_no_titles(messy):
    scorer = score.open_scorer(str(messy[1]), "joint")
    for scores in scorer("stone garden", []):
        assert (scores.shape, scores.dtype) == ((0,), np.float32)
    given = [(None, "river stone"), ("", "river stone"), ("stone", None), ("stone", "")]
    for scores in scorer("stone garden", given):
        assert scores.shape == (4,)
        np.testing.assert_allclose(scores[::2], scores[1::2], rtol=1e-5)
