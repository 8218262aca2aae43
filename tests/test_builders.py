"""Formats as tensorflow-datasets: fetched, read by hand, prepared once, and what fails."""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import pathlib
import tarfile
import threading
import zipfile

import pytest
import tensorflow_datasets as tfds
import test_dpr
import test_tables
import test_tevatron

from rqv2_jax import config as config_lib
from rqv2_jax import config_check
from rqv2_jax.data import collection, prepared
from rqv2_jax.data.readers import builders, dpr, tables, tevatron
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import texts as texts_lib


def write_beir(folder):
    """Graded labels, one of them 0, answers, and titles that may be absent."""
    files = {
        "corpus.jsonl": [
            {"_id": "p1", "title": "One", "text": "é 1"},
            *({"_id": f"p{n}", "text": f"text {n}"} for n in range(2, 5)),
        ],
        "queries.jsonl": [
            {"_id": f"q{n}", "text": f"question {n}", "answers": ["ü", "2"][:n]} for n in range(4)
        ],
    }
    (folder / "qrels").mkdir(parents=True)
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = {"train": ["q2\tp3\t2", "q2\tp1\t0", "q0\tp2\t1", "q2\tp4\t1"], "dev": ["q1\tp1\t1"]}
    for split, rows in {**labels, "test": ["q3\tp4\t3"]}.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def everything(texts):
    """All of a collection; labels without those of queries that take part nowhere."""
    found = {"passages": list(texts.passages()), "answer_splits": texts.answer_splits}
    for split in texts.splits:
        found[split] = list(texts.queries(split))
        ids = {query.id for query in found[split]}
        labels = [label[:3] for label in texts.qrels(split) if label.query_id in ids]
        found[f"{split} labels"] = sorted(labels)
    return found


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """tensorflow-datasets' own folder."""
    made = functools.partial(builders.PassageRanking, data_dir=tmp_path / "tfds")
    monkeypatch.setattr(builders, "PassageRanking", made)
    return tmp_path / "tfds"


@pytest.fixture
def publish(monkeypatch):
    """`publish(name, bytes)` puts a format's archive on a server; `publish.asked`: paths asked for."""
    served, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            found = served.get(self.path)
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def put(name, data, md5=None):
        (made,) = (each for each in builders.FORMATS if each.name == name)
        path = "/" + made.source.rsplit("/", 1)[1]
        if data is not None:
            served[path] = data
            md5 = md5 or hashlib.md5(data).hexdigest()
            monkeypatch.setattr(made, "md5", md5)
        monkeypatch.setattr(made, "source", f"http://127.0.0.1:{server.server_port}{path}")

    put.asked = asked
    yield put
    server.shutdown()
    server.server_close()


def zipped(folder, inside):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{inside}/{file.relative_to(folder)}")
    return data.getvalue()


def open_collection(name, path=""):
    config = config_lib.default()
    config.data.update({"dataset": name, "path": str(path)})
    config_check.check(config)
    return texts_lib.open_collection(config.data, pathlib.Path("nowhere"))


def test_beir_is_fetched_once_and_read_as_from_its_folder(tmp_path, data_dir, publish):
    folder = write_beir(tmp_path / "folder")
    publish("beir_fiqa", zipped(folder, "fiqa"))
    found = open_collection("beir_fiqa")
    assert everything(found) == everything(open_collection("beir_fiqa", folder))
    assert [query.answers for query in found.queries("train")] == [(), ("ü", "2")]
    assert found.splits == ("train", "dev", "test")
    with pytest.raises(InputError, match="no split 'valid'; it has train, dev, test"):
        next(found.queries("valid"))
    again = open_collection("beir_fiqa")
    assert again.fingerprint == found.fingerprint == open_collection("beir", folder).fingerprint
    assert publish.asked == ["/fiqa.zip"]


def test_holes_of_what_is_fetched_are_counted(tmp_path, data_dir, publish):
    """As in the archive of FiQA, which holds empty rows."""
    folder = write_beir(tmp_path / "folder")
    (folder / "qrels" / "dev.tsv").unlink()
    with (folder / "corpus.jsonl").open("a") as file:
        for row in (
            {"_id": "p5", "title": "", "text": ""},
            {"_id": "p6", "title": "Six", "text": ""},
        ):
            file.write(json.dumps(row) + "\n")
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q8", "text": ""}\n')
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("q8\tp1\t1\nq0\tp9\t0\nq0\tp1\t-1\n")
    publish("beir_fiqa", zipped(folder, "fiqa"))
    found, texts = open_collection("beir_fiqa"), open_collection("beir_fiqa", folder)
    assert list(found.passages())[-2:] == [
        collection.Passage("p5", "", ""),
        collection.Passage("p6", "Six", ""),
    ]
    assert everything(found) == everything(texts)
    left = collection.Left()
    collection.left_out(texts, left)
    assert left.lines() == [
        "1 queries have no text; left out (first: q8)",
        # Dev had its labels.
        "1 queries have no positive or answer in any split; left out (first: q1)",
    ]
    assert found.remarks == (*texts.remarks, *left.lines())
    assert found.remarks[0].startswith("dev is held out from the training queries")
    # Labels of 0 are looked at where there are passages to find.
    rows = {key: 0 for key in ("p1", "p2", "p3", "p4")}
    left = collection.Left()
    collection.check_qrels(found.qrels("dev"), {"q0": 0, "q2": 1}, rows, left)
    collection.check_qrels(found.qrels("train"), {"q0": 0, "q2": 1}, rows, left)
    assert len(left.lines()) == 1
    assert open_collection("beir_fiqa").remarks == found.remarks


def test_msmarco_is_fetched(tmp_path, data_dir, publish):
    (tmp_path / "folder").mkdir()
    folder = test_tables.write(tmp_path / "folder", names=test_tables.MSMARCO)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)
    publish("msmarco", data.getvalue())
    found = open_collection("msmarco")
    assert everything(found) == everything(tables.msmarco(folder))
    assert len(list(found.passages())) == 40


def test_what_is_not_as_published_is_refused(tmp_path, data_dir, publish):
    publish("beir_fiqa", zipped(write_beir(tmp_path / "folder"), "fiqa"), md5="0" * 32)
    with pytest.raises(InputError, match=r"has md5 .*fiqa\.zip should have 0000") as raised:
        open_collection("beir_fiqa")
    assert "\n" not in str(raised.value)
    assert not list(data_dir.rglob("*.tfrecord*"))


def test_what_cannot_be_fetched_says_what_to_do(data_dir, publish):
    publish("beir_fiqa", None)
    with pytest.raises(InputError, match=r"fiqa.zip: cannot be fetched \(.*path=DIR") as raised:
        open_collection("beir_fiqa")
    assert "\n" not in str(raised.value)


def test_bad_lines_keep_their_place(tmp_path, data_dir, publish):
    folder = write_beir(tmp_path / "folder")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"title": "p9"}\n')
    publish("beir_fiqa", zipped(folder, "fiqa"))
    with pytest.raises(InputError, match=r"corpus\.jsonl:5: `_id` is missing"):
        open_collection("beir_fiqa")


MANUAL = {
    "beir": (write_beir, builders._beir),
    "rocketqa_marco": (
        lambda folder: test_tables.write(folder, names=test_tables.MARCO),
        tables.rocketqa,
    ),
    "rocketqa_nq": (
        lambda folder: test_tables.write(folder, names=test_tables.NQ),
        tables.rocketqa,
    ),
    "dpr": (test_dpr.write, dpr.dpr),
    "tevatron": (test_tevatron.write, tevatron.tevatron),
}


@pytest.mark.parametrize("name", MANUAL)
def test_files_put_there_by_hand(name, tmp_path):
    """Where the message about missing ones says."""
    write, read = MANUAL[name]
    builder = builders.PassageRanking(config=name, data_dir=tmp_path)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with pytest.raises(InputError) as raised:
        builder.download_and_prepare(download_config=config)
    folder = tmp_path / "downloads" / "manual"
    assert f"passage_ranking/{name}: no files; fetch " in str(raised.value)
    assert builder.builder_config.source in str(raised.value)
    assert f"into {folder} or" in str(raised.value)
    assert "\n" not in str(raised.value)

    folder.mkdir(parents=True)
    write(folder)
    builder.download_and_prepare(download_config=config)
    texts, metadata = read(folder), builder.info.metadata
    answer_splits = tuple(metadata["answer_splits"])
    found = prepared.collection(builder, name=name, fingerprint="", answer_splits=answer_splits)
    assert everything(found) == everything(texts)
    assert metadata["fingerprint"] == texts.fingerprint


def test_loaded_as_any_other_dataset(tmp_path):
    folder = write_beir(tmp_path / "folder")
    config = tfds.download.DownloadConfig(manual_dir=folder, try_download_gcs=False)
    dataset, info = tfds.load(
        "passage_ranking/beir",
        split="train",
        data_dir=tmp_path / "tfds",
        with_info=True,
        download_and_prepare_kwargs={"download_config": config},
    )
    rows = list(tfds.as_numpy(dataset))
    assert [row["id"] for row in rows] == [b"q0", b"q2"]
    assert rows[1]["labelled"].tolist() == [b"p3", b"p1", b"p4"]
    assert rows[1]["relevances"].tolist() == [2, 0, 1]
    assert info.splits["passages"].num_examples == 4


def test_settings_name_what_can_be_fetched():
    names = {each.name: each for each in builders.FORMATS}
    assert {name for name, each in names.items() if each.md5} == set(config_check.FETCHED)
    for name in config_check.FETCHED:
        assert names[name].source.startswith("https://")
        assert len(names[name].md5) == 32
    known = {name.split("_")[0] for name in config_check.CHOICES["data.dataset"]}
    assert known == {name.split("_")[0] for name in names} | {"docstrings"}
    for name in sorted(
        set(config_check.CHOICES["data.dataset"]) - {*config_check.FETCHED, "docstrings"}
    ):
        with pytest.raises(InputError, match=r"data.path is empty; .* fetched \(msmarco, beir_"):
            open_collection(name)


def test_records_and_back(tmp_path):
    """Labels of relevance 0 stay with their query; those of queries without a positive go."""
    texts = builders._beir(write_beir(tmp_path))
    train = list(prepared.rows(texts, "train"))
    assert train == [
        prepared.row("q0", "", "question 0", [("p2", 1)]),
        prepared.row("q2", "", "question 2", [("p3", 2), ("p1", 0), ("p4", 1)], ["ü", "2"]),
    ]
    fewer = dataclasses.replace(
        texts, queries=lambda split: iter([collection.Query("q0", "x", ())])
    )
    assert [row["labelled"] for row in prepared.rows(fewer, "train")] == [["p2"]]
