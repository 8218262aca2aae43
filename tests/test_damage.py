"""Damaged workdirs and bad data: made again, or refused with one line."""

import os
import shutil

import pytest
from absl import flags
from absl.testing import flagsaver
from tiny_run import tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax import evaluate
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import pipeline
from rqv2_jax.recipe.run import open_run
from rqv2_jax.recipe.texts import open_store

# Neither checkpoints nor what says of a stage's training what it was; logs are only written.
KEPT = ("best", "last", "begun.txt", "finished.txt")


@pytest.mark.parametrize("share", [0, 0.6])
def test_whatever_file_of_a_workdir_is_damaged_the_same_command_mends_it(
    finished, tmp_path, capsys, share
):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    damaged = [
        path
        for path in sorted((tmp_path / "w").rglob("*"))
        if path.is_file()
        and path.stat().st_size
        and not set(path.relative_to(tmp_path / "w").parts) & set(KEPT)
        and ".tfevents." not in path.name
    ]
    found = {path.suffix for path in damaged}
    assert {".npz", ".npy", ".json", ".bin", ".trec", ".pb", ".pbtxt"} <= found
    for path in damaged:
        os.truncate(path, int(share * path.stat().st_size))
    capsys.readouterr()
    pipeline.main(config, tmp_path / "w")
    said = capsys.readouterr().out
    assert (tmp_path / "w" / "results.json").read_text() == (workdir / "results.json").read_text()
    # A line for each thing that is read, of which a folder may be one.
    lines = [line for line in said.splitlines() if line.endswith("it is made again")]
    named = {line.partition(": cannot be read")[0] for line in lines}
    folder = tmp_path / "w"
    assert named >= {
        *(str(folder / name) for name in ("config.json", "data/tokens/manifest.json")),
        *(str(folder / "vectors" / stage / "manifest.json") for stage in ("zero_shot", "joint")),
        *map(str, folder.glob("lists/*.retrieved.npz")),
        *map(str, folder.glob("lists/*.scores/*.npz")),
        *map(str, folder.glob("eval/test.*.exact.npz")),
        str(folder / "eval/test.bm25.npz"),
    }
    assert len(lines) == len(named)


def test_a_stage_whose_mark_is_empty_is_trained_again(finished, tmp_path, capsys):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    (tmp_path / "w/joint/begun.txt").write_text("")
    pipeline.main(config, tmp_path / "w")
    assert "joint/begun.txt: cannot be read; this stage is trained again" in capsys.readouterr().out
    assert (tmp_path / "w/results.json").read_text() == (workdir / "results.json").read_text()
    assert len((tmp_path / "w/joint/begun.txt").read_text().split()) == 2


def test_a_damaged_token_store_is_made_again_from_the_same_texts_only(finished, tmp_path, capsys):
    config, workdir = finished
    shutil.copytree(workdir.parent, tmp_path / "all", symlinks=True)
    folder = tmp_path / "all" / "workdir"
    own = config_lib.loads(config_lib.dumps(config))
    own.data.path = str(tmp_path / "all" / "data")
    offsets = folder / "data/tokens/passages/texts.offsets.bin"
    before = offsets.read_bytes()
    os.truncate(offsets, 100)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(workdir=str(folder), split="dev"):
        evaluate.main()
    assert offsets.read_bytes() == before
    assert "data/tokens: cannot be read (" in capsys.readouterr().out
    os.truncate(offsets, 100)
    queries = tmp_path / "all" / "data" / "queries.jsonl"
    queries.write_text(queries.read_text().replace("river", "stone", 1))
    with pytest.raises(InputError, match="the texts of data have changed since this workdir was"):
        open_store(open_run(own, folder))
    with pytest.raises(InputError, match="holds no token store; run"):
        open_store(open_run(own, tmp_path / "new"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("corpus.jsonl", lambda text: text.replace("river", "stone", 1)),
        ("qrels/train.tsv", lambda text: text.replace("q0\tp0\t1\n", "")),
    ],
)
def test_checkpoints_of_other_data_are_not_taken_for_these(finished, tmp_path, name, change):
    given, workdir = finished
    shutil.copytree(workdir.parent, tmp_path / "all", symlinks=True)
    path = tmp_path / "all" / "data" / name
    path.write_text(change(path.read_text()))
    config = config_lib.loads(config_lib.dumps(given))
    config.data.path = str(tmp_path / "all" / "data")
    own = config_lib.loads((workdir / "config.json").read_text())
    own.data.path = config.data.path
    (tmp_path / "all" / "workdir" / "config.json").write_text(config_lib.dumps(own))
    results = (workdir / "results.json").read_text()
    with pytest.raises(InputError, match=r"retriever: was trained on other lists, .* delete it"):
        pipeline.main(config, tmp_path / "all" / "workdir")
    assert (tmp_path / "all" / "workdir" / "results.json").read_text() == results


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda d: (d / "qrels" / "train.tsv").unlink(), "train.tsv"),
        (lambda d: _append(d / "corpus.jsonl", "{nonsense\n"), r"corpus\.jsonl:49: .*JSON"),
        (
            lambda d: _append(d / "corpus.jsonl", '{"_id": "p0", "text": "again"}\n'),
            r"corpus\.jsonl:49: .*p0",
        ),
        (
            lambda d: _append(d / "corpus.jsonl", '{"_id": "new", "text": 7}\n'),
            r"corpus\.jsonl:49: `text` is 7",
        ),
        (
            lambda d: _append(d / "qrels" / "dev.tsv", "q33\tnowhere\t1\n"),
            r"dev\.tsv:10: .*nowhere",
        ),
    ],
)
def test_bad_data_is_one_line_with_file_and_line(tmp_path, bert_folder, breakage, message):
    data = write_beir(tmp_path / "data")
    breakage(data)
    with pytest.raises(InputError, match=message) as e:
        pipeline.main(tiny_config(data, bert_folder), tmp_path / "workdir")
    assert "\n" not in str(e.value)


def _append(path, text):
    with path.open("a") as f:
        f.write(text)
