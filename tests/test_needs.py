"""What a run needs of disk and memory is what it takes, and what cannot fit is refused in one line."""

import collections
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from conftest import WORDS
from refusals import refused
from tiny_run import run_program, tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax import room
from rqv2_jax.data import drawing, lists, tokenise, tokens
from rqv2_jax.data.collection import Passage
from rqv2_jax.models import random_model
from rqv2_jax.recipe import memory, needs, pipeline, space
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.retrieval import bm25
from rqv2_jax.tools import doctor, fits

Usage = collections.namedtuple("Usage", "total used free")
CPU = memory.Host(True, 1)
SCANN = "ScaNN while it is built, in parts if need be"


def copied(config):
    return config_lib.loads(config_lib.dumps(config))


def sizes_of(workdir):
    return space.sizes_of(tokens.open_store(workdir / "data" / "tokens"))


def by_name(parts):
    return {part.name: part for part in parts}


# Arrays and texts to a percent; .npz and JSON have heads, which weigh in files as small as these.
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("token store", 4000),
        ("vectors", 2000),
        ("candidates", 12000),
        ("checkpoints", 0),
        ("rankings of the test queries", 60_000),
        ("run files", 0),
        ("ScaNN's indexes", 10_000),
    ],
)
def test_what_a_run_writes_lies_between_the_least_and_the_most(finished, name, heads):
    run = open_workdir(finished[1])
    part = by_name(needs.disk(run.config, run.models, sizes_of(finished[1])))[name]
    held = sum(space._held(finished[1], part))
    assert 0.99 * part.least <= held <= part.most + heads
    if name in ("token store", "vectors", "run files"):
        # The vectors of all states but the starting one as its folder has it.
        each = needs.of_vectors(48, 32, "float32") if name == "vectors" else 0
        assert held > 0.85 * (part.most - each) - heads


def test_every_part_of_a_workdir_is_counted(finished):
    """But for the figures, and what TensorBoard reads."""
    run = open_workdir(finished[1])
    parts = needs.disk(run.config, run.models, sizes_of(finished[1]))
    counted = {place.split("/")[0] for part in parts for place in part.places}
    assert {path.name for path in finished[1].iterdir() if path.is_dir()} <= counted


@pytest.mark.parametrize("name", sorted(random_model.SHAPES))
def test_params_are_counted_as_flax_makes_them(finished, name):
    models = open_workdir(finished[1]).models
    shape, layers = random_model.SHAPES[name]
    models = models.reshaped(**shape, num_layers=layers, unrolled=False)
    encoder = jax.tree.leaves(random_model.params_like(models.reranker))
    assert needs.of_params(models, "reranker") == 4 * sum(math.prod(x.shape) for x in encoder)


def test_sizes_of_a_store_are_those_that_the_doctor_reads(trained):
    config, folder = trained
    report, _ = doctor.examine_config(config)
    found, read = sizes_of(folder / "workdir"), report.sizes
    assert found._replace(tokens=0, query_tokens=0) == read._replace(tokens=0, query_tokens=0)
    assert (found.tokens, found.query_tokens) == pytest.approx((read.tokens, read.query_tokens))
    assert found.passages == 48
    assert found.queries == {"train": 32, "dev": 8, "test": 8}


def test_settings_that_lower_a_part_lower_it(finished):
    run, sizes = open_workdir(finished[1]), sizes_of(finished[1])._replace(passages=10**6)
    sizes = sizes._replace(queries={"train": 10**5, "dev": 100, "test": 1000})
    sizes = sizes._replace(labels={"train": 10**5})

    def parts(**changes):
        config = copied(run.config)
        config.update_from_flattened_dict(changes)
        made = needs.disk(config, run.models, sizes)
        return by_name([*made, *memory.parts_of(config, run.models, sizes, CPU)])

    before = parts()
    for name, changes in {
        "candidates": {"mine.depth": 4},
        "candidates while lists are drawn": {"mine.depth": 4},
        "run files": {"evaluate.retrieve_depth": 10},
        "rankings of the test queries": {"evaluate.queries": 10},
        "exact search and rankings": {"evaluate.queries": 10, "mine.depth": 2},
    }.items():
        assert parts(**changes)[name].most < before[name].most, name
    assert before[SCANN].most == pytest.approx(4.6 * 10**6 * 32 * 4)
    exact = parts(**{"evaluate.indexes": ("exact",)})
    assert not [name for name in exact if name.startswith("ScaNN")]
    assert parts(**{"joint.refresh_every": 2})["candidates"].most > 100 * before["candidates"].most
    assert "BM25" in before
    assert "BM25" not in parts(**{"evaluate.bm25.most_passages": 5})
    assert "BM25" in parts(
        **{"evaluate.bm25.most_passages": 5, "mine.sources": ("retriever", "bm25")}
    )


def test_a_planned_step_counts_on_a_cpu(finished):
    run, sizes = open_workdir(finished[1]), sizes_of(finished[1])

    def training(host):
        parts = memory.parts_of(run.config, run.models, sizes, host)
        return next(part for part in parts if part.name.startswith("training"))

    size = sum(needs.of_params(run.models, model) for model in ("retriever", "reranker"))
    drawn = 2 * 48 * 4 * 5
    assert training(CPU).most == 8 * size + drawn
    assert training(memory.Host(True, 1, 1e9)).most == 1e9 + 3 * size + drawn
    assert training(memory.Host(False, 8, 0.0)).most == 3 * size + drawn


def test_phases_follow_one_another_and_the_rest_is_held():
    parts = [
        needs.Part("program", 1, 2, ""),
        needs.Part("ids", 1, 3, "fewer"),
        needs.Part("a", 0, 10, "x", ("a",)),
        needs.Part("b", 5, 7, "y", ("b",)),
    ]
    assert memory.peak(parts, "most") == (15, parts[2])
    assert memory.peak(parts, "least") == (7, parts[3])
    assert memory.peak(parts[:2], "most") == (5, parts[1])


def traced(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_drawn_lists_is_as_estimated():
    rng, queries, depth = np.random.default_rng(0), 200, 1000
    found = rng.integers(0, 10**6, (queries, depth))
    scores = rng.random((queries, depth), np.float32)
    candidates = lists.Candidates(np.arange(queries), found, scores, scores)
    held = found.nbytes + 2 * scores.nbytes
    taken = traced(
        lambda: drawing.draw(
            candidates,
            np.stack([np.arange(queries), np.arange(queries)]),
            np.zeros((2, 0), np.int64),
            list_size=4,
            denoising=drawing.Denoising(0.5, (1.0, 0.0), 0.5, 0.9),
            num_passages=10**6,
            seed=0,
            epoch=0,
        )
    )
    cells = queries * depth
    assert memory.DRAWN_LEAST * cells <= held
    most = (memory.DRAWN + memory.LOOKED_AT) * cells
    assert 0.5 * most < held + taken < 1.15 * most


def test_memory_of_bm25_and_of_ids_is_as_estimated(tmp_path):
    rng, passages, length = np.random.default_rng(0), 5000, 40
    made = [f"{word}{i}" for word in WORDS for i in range(30)]
    texts = [" ".join(rng.choice(made, length)) for _ in range(passages)]
    settings = config_lib.default().evaluate.bm25
    taken = traced(lambda: bm25.search(iter(texts), ["river1"], 10, settings))
    words = passages * length
    assert memory.BM25_LEAST * words < taken < memory.BM25_WORD * words
    tokenizer = tokenise.Tokenizer(lambda texts: [[5, 6]] * len(texts), "", 9, 1, 2)
    fields = {"title": "titles", "text": "texts"}
    items = (Passage(f"p{i:07}", "", "text") for i in range(passages))
    taken = traced(lambda: tokenise._write(items, tokenizer, tmp_path / "p", fields))
    assert memory.KEYED_LEAST * passages < taken < (memory.KEYED + 8) * passages + 2**22


def meminfo(root, files):
    for name, text in {
        "proc/meminfo": "MemTotal: 1000 kB\nMemFree: 9 kB\nMemAvailable: 800 kB\n",
        "proc/self/statm": "900 5 4 3 2 1 0\n",
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    own = 5 * os.sysconf("SC_PAGE_SIZE")
    total, available = room.host_memory(root)
    return total / 1024, (available - own) / 1024


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1000, 800)),
        ({"proc/self/cgroup": "9:cpu:/a\n0::/\n"}, (1000, 800)),
        # Version 2: the group of a batch job, inside one without a limit. Files' pages can be given up.
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "0\n",
                "sys/fs/cgroup/job/step/memory.stat": "anon 5\nfile 0\n",
                "sys/fs/cgroup/job/memory.max": str(500 * 1024),
                "sys/fs/cgroup/job/memory.current": str(300 * 1024),
                "sys/fs/cgroup/job/memory.stat": f"file {100 * 1024}\n",
            },
            (500, 300),
        ),
        # Version 1: a container sees its own group as the topmost.
        (
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(400 * 1024),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(390 * 1024),
                "sys/fs/cgroup/memory/memory.stat": f"cache 0\ntotal_cache {50 * 1024}\n",
            },
            (400, 60),
        ),
    ],
)
def test_memory_is_within_the_limits_of_control_groups(tmp_path, files, expected):
    assert meminfo(tmp_path, files) == pytest.approx(expected)


def test_this_machines_memory_is_known():
    total, available = room.host_memory()
    assert 2**28 < available < total + 2**30


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_main_refuses_at_its_start_what_cannot_fit_and_force_goes_on(
    tmp_path, bert_folder, monkeypatch, capsys, what
):
    config = tiny_config(write_beir(tmp_path / "data"), bert_folder)
    if what == "disk":
        monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(9, 9, 1000))
    else:
        monkeypatch.setattr(space, "host_memory", lambda: (2.0**20, 2.0**20))
    workdir = tmp_path / "w"
    names = {
        "disk": ("the run writes", "free some of it", "config.model.num_layers"),
        "memory": ("GiB of memory", "config.model.num_layers"),
    }
    refused(lambda: pipeline.main(config, workdir), workdir, *names[what], "--force goes on")
    assert not workdir.exists()

    def stop(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prepare", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.main(config, workdir, force=True)
    assert f"warning: {workdir}: the run " in capsys.readouterr().out


def test_with_force_a_part_begins_on_a_disk_that_looks_full(
    finished, tmp_path, monkeypatch, capsys
):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "vectors" / "joint")
    for path in (tmp_path / "w" / "eval").glob("test.joint.*.npz"):
        path.unlink()
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(9, 9, 0))
    refused(lambda: pipeline.main(config, tmp_path / "w"), "vectors: will hold", "--force goes on")
    pipeline.main(config, tmp_path / "w", force=True)
    assert "vectors: will hold 0.00 GiB more" in capsys.readouterr().out
    assert (tmp_path / "w/vectors/joint/00000.npy").is_file()


def test_passages_are_estimated_before_they_are_tokenised(finished, tmp_path, monkeypatch):
    """At least half of the lines of a file; so a large one is refused before an hour of tokenising."""
    run = open_workdir(finished[1])
    folder = tmp_path / "data"
    folder.mkdir()
    line = json.dumps({"_id": "p", "title": "", "text": "river " * 40}) + "\n"
    (folder / "corpus.jsonl").write_text(line * 20_000)
    config = copied(run.config)
    config.data.path = str(folder)
    fresh = dataclasses.replace(run, config=config, workdir=tmp_path / "w")
    sizes = space._known_sizes(fresh)
    assert 9_900 < sizes.passages <= 10_000
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(9, 9, 2**21))
    refused(
        lambda: space.check_run(fresh),
        "of vectors: config.encode.dtype=float16, a smaller retriever",
        "fewer passages",
    )
    config.data.path = str(tmp_path / "nowhere")
    assert space._known_sizes(fresh).passages == 0


def test_a_finished_run_is_never_refused(finished, monkeypatch):
    config, workdir = finished
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(9, 9, 0))
    monkeypatch.setattr(space, "host_memory", lambda: (2.0**30, 2.0**30))
    pipeline.main(config, workdir)


def test_plan_and_check_print_the_same(trained):
    """Of the same sizes, but for the activations, which only a plan knows."""
    config, _ = trained
    report, opened = doctor.examine_config(config)
    there = fits.Room(2.0**40, 2.0**40)
    text, faults = fits.compare(opened.config, opened.models, report.sizes, CPU, there)
    assert not faults
    planned = memory.Host(True, 1, 1e9)
    other, _ = fits.compare(opened.config, opened.models, report.sizes, planned, there)
    pairs = itertools.zip_longest(text.splitlines(), other.splitlines())
    different = [a for a, b in pairs if a != b]
    assert [line.split(" |")[0] for line in different] == [
        "| training, without activations",
        "| at the worst moment; there is: 1024.00",
    ]


@pytest.mark.parametrize("force", [False, True])
def test_check_says_what_does_not_fit(tmp_path, bert_folder, force):
    """A depth that no disk has room for."""
    data = write_beir(tmp_path / "data", passages=300)
    arguments = [
        *("--config=configs/beir.py", f"--config.data.path={data}"),
        *(f"--config.model.weights={bert_folder}", "--config.reranker.batch=2"),
        *("--config.joint.batch=2", "--config.retriever.batch=2", f"--disk={tmp_path / 'later'}"),
        *("--config.joint.list_size=900000", "--config.joint.epochs=1000000"),
    ]
    ended = run_program("rqv2_jax.check", *arguments, *["--force"] * force)
    kind = "warning " if force else "error   "
    (line,) = [
        x for x in ended.stdout.splitlines() if x.startswith(f"{kind} memory: the run needs")
    ]
    assert line.endswith("smaller models (config.model.num_layers)")
    assert ended.returncode == (0 if force else 1), ended.stdout
    assert "| disk | GiB, at most |" in ended.stdout
    assert not pathlib.Path(tmp_path / "later").exists()
