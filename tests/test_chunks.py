"""Tokenising that is killed goes on, to the same bytes."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest

from rqv2_jax.data import chunks, tokenise
from rqv2_jax.data.collection import Collection, Passage, Qrel, Query
from rqv2_jax.data.tokenise import Tokenizer, prepare
from rqv2_jax.data.tokens import open_store

CHUNK, PASSAGES, QUERIES = 10, 34, 13
ROOT = pathlib.Path(__file__).parent.parent

# Kills a process at its first step, its second, and so on, each time from the start, until one ends by
# itself; after each kill the same work is begun again. Prints how often it came, and what differs.
STORM = """
import json, os, pathlib, shutil, signal, sys
import test_chunks as t

base = pathlib.Path(sys.argv[1])
steps, last, kills = [0], [0], 0

def step(call):
    def counted(*args, **options):
        steps[0] += 1
        if steps[0] == last[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return counted

wanted, faults = t.contents(t.make(base / "wanted")), []
os.fsync = step(lambda number: None)
os.replace, os.truncate, shutil.rmtree = map(step, (os.replace, os.truncate, shutil.rmtree))
pathlib.Path.unlink = step(pathlib.Path.unlink)
while True:
    folder = base / str(kills) / "store"
    t.make(folder, source="earlier")
    child = os.fork()
    if not child:
        steps[0], last[0] = 0, kills + 1
        t.make(folder, encode=step(t.encode))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        break
    kills += 1
    whole, texts = t.whole(folder), []
    t.make(folder, encode=lambda given: texts.extend(given) or t.encode(given))
    if t.contents(folder) != wanted:
        faults.append(f"{kills}: other bytes")
    if len(texts) != (2 * (t.PASSAGES - whole[0]) + t.QUERIES - whole[1] if whole else 0):
        faults.append(f"{kills}: {len(texts)} texts tokenised again, {whole} were whole")
    if sorted(path.name for path in folder.parent.iterdir()) != ["store"]:
        faults.append(f"{kills}: something is left")
print(json.dumps([kills, status, faults]))
"""


def encode(texts):
    return [[int(word) for word in text.split()] for text in texts]


def of_source(source):
    rng = np.random.default_rng(zlib.crc32(source.encode()))
    texts = [" ".join(map(str, rng.integers(0, 99, n % 5))) for n in range(PASSAGES + QUERIES)]
    passages = [Passage(f"p{n}", str(n), texts[n]) for n in range(PASSAGES)]
    queries = [Query(f"q{n}", texts[PASSAGES + n], ()) for n in range(QUERIES)]
    return Collection(
        name="in memory",
        fingerprint=source,
        splits=("train",),
        passages=lambda: iter(passages),
        queries=lambda split: iter(queries),
        qrels=lambda split: (Qrel(f"q{n}", f"p{2 * n}", 1, "") for n in range(QUERIES)),
    )


def make(folder, source="source", encode=encode, fingerprint="numbers"):
    tokenise.CHUNK = CHUNK
    folder.parent.mkdir(exist_ok=True)
    prepare(of_source(source), Tokenizer(encode, fingerprint, 30_000, 1, 2), folder)
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def whole(folder):
    """Passages and queries in whole chunks; None if the store is complete under its name."""
    partial, items = folder.with_name(f"{folder.name}.partial"), []
    complete = folder / "manifest.json"
    if complete.is_file() and json.loads(complete.read_text())["source"] == "source":
        return None
    begun = partial / "manifest.json"
    for name in ("passages", "train"):
        path = partial / name / chunks.JOURNAL
        of_this = begun.is_file() and json.loads(begun.read_text())["source"] == "source"
        journal = json.loads(path.read_text()) if of_this and path.is_file() else []
        items.append(journal[-1]["items"] if journal else 0)
    return items


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokenise, "CHUNK", CHUNK)


def test_a_kill_at_any_step_costs_no_more_than_a_chunk_and_changes_no_byte(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ended = subprocess.run(
        [sys.executable, "-c", STORM, tmp_path], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    kills, status, faults = json.loads(ended.stdout.splitlines()[-1])
    assert not faults
    assert kills > 80
    assert status == 0


def interrupted(tmp_path, texts):
    """The folder of a store for which this number of texts was tokenised, then no more."""
    left = [texts]

    def until(given):
        left[0] -= len(given)
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(given)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "w" / "store", encode=until)
    return tmp_path / "w" / "store"


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda path: flip(path, path.stat().st_size // 2),
    "the end is gone": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "gone": pathlib.Path.unlink,
}


@pytest.mark.parametrize("name", ["texts.bin", "titles.offsets.bin", "ids.json", chunks.JOURNAL])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_chunk_is_made_again_and_so_are_those_behind_it(tmp_path, capsys, name, damage):
    folder = interrupted(tmp_path, 2 * 3 * CHUNK)
    path = folder.with_name("store.partial") / "passages" / name
    DAMAGE[damage](path)
    capsys.readouterr()
    encoded = []
    make(folder, encode=lambda texts: encoded.extend(texts) or encode(texts))
    assert contents(folder) == contents(make(tmp_path / "other" / "store"))
    said = [line for line in capsys.readouterr().out.splitlines() if "made again" in line]
    if (name, damage) != (chunks.JOURNAL, "gone"):
        assert len(said) == 1
        assert str(path.parent) in said[0]
    # Of three whole chunks, titles and texts.
    kept = {"a flipped bit": 1, "the end is gone": 2}.get(damage, 0)
    if name != chunks.JOURNAL:
        assert len(encoded) == 2 * (PASSAGES - kept * CHUNK) + QUERIES


def test_whatever_of_a_journal_is_flipped_only_what_is_whole_is_kept(tmp_path):
    folder = interrupted(tmp_path, 2 * 2 * CHUNK).with_name("store.partial") / "passages"
    wanted, kept = contents(folder), set()
    for place in range((folder / chunks.JOURNAL).stat().st_size):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        flip(copy / chunks.JOURNAL, place)
        kept.add(items := chunks.Growing(copy).items)
        found = contents(copy)
        assert len(found.pop("ids.offsets.bin", "")) == 8 * (items + 1) * (items > 0)
        found.pop(chunks.JOURNAL)
        assert all(wanted[name].startswith(data) for name, data in found.items())
    assert kept == {0, CHUNK}


@pytest.mark.parametrize("changed", [{"source": "other"}, {"fingerprint": "other"}])
def test_chunks_of_other_texts_or_another_tokenizer_are_not_taken(tmp_path, changed):
    folder = interrupted(tmp_path, 2 * 2 * CHUNK)
    encoded = []
    make(folder, encode=lambda texts: encoded.extend(texts) or encode(texts), **changed)
    assert len(encoded) == 2 * PASSAGES + QUERIES
    assert contents(folder) == contents(make(tmp_path / "other" / "store", **changed))
    assert len(open_store(folder).texts) == PASSAGES
    assert not [*folder.rglob(chunks.JOURNAL)]


def test_a_complete_store_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    folder, synced = tmp_path / "w" / "store", set()

    def rename(old, new, replace=os.replace):
        if pathlib.Path(new) == folder:
            of_all = {partial, *partial.rglob("*")} - {*partial.rglob(chunks.JOURNAL)}
            assert of_all <= synced
        replace(old, new)

    partial = folder.with_name("store.partial")
    monkeypatch.setattr(
        os, "fsync", lambda n: synced.add(pathlib.Path(f"/proc/self/fd/{n}").readlink())
    )
    monkeypatch.setattr(os, "replace", rename)
    make(folder)
    assert folder.parent in synced


def test_a_store_that_is_made_again_says_why(tmp_path, capsys):
    folder = make(tmp_path / "w" / "store")
    make(folder)
    assert "made again" not in capsys.readouterr().out
    make(folder, fingerprint="other")
    assert f"{folder}: is of another tokenizer; it is made again" in capsys.readouterr().out
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    make(folder, fingerprint="other")
    assert f"{folder}: is of another format; it is made again" in capsys.readouterr().out


def test_a_run_says_where_it_goes_on(tmp_path, capsys):
    folder = interrupted(tmp_path, 2 * 2 * CHUNK)
    capsys.readouterr()
    make(folder)
    assert "passages: goes on after 20, which are tokenised already" in capsys.readouterr().out
