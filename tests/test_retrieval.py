import dataclasses
import json
import os
import pathlib
import types
import weakref

import jax
import numpy as np
import pytest
import tqdm
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from rqv2_jax.errors import InputError
from rqv2_jax.models.scoring import tower
from rqv2_jax.retrieval import bm25, encode, index, rerank, stream
from rqv2_jax.training import sharding as sharding_lib

SCANN = types.SimpleNamespace(
    brute_force_below=20_000, leaves_per_sqrt=1.0, searched_share=0.3, seen=10.0, reorder=4.0
)


@given(seed=st.integers(0, 2**31), total=st.integers(1, 60), depth=st.integers(1, 70))
@settings(max_examples=20, deadline=None)
def test_exact_search_finds_what_brute_force_finds(seed, total, depth):
    rng = np.random.default_rng(seed)
    passages = rng.normal(size=(total, 8)).astype(np.float32)
    queries = rng.normal(size=(5, 8)).astype(np.float32)
    cuts = np.sort(rng.integers(0, total + 1, 2))
    shards = [part for part in np.split(passages, cuts) if len(part)]
    rows, scores = index.exact(queries, shards, depth)
    expected = queries @ passages.T
    order = np.argsort(-expected, axis=1)[:, :depth]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, 1), rtol=1e-5, atol=1e-5)


def test_exact_search_over_several_tiles_of_queries_and_passages(monkeypatch, tmp_path):
    monkeypatch.setattr(index, "PASSAGES_PER_TILE", 16)
    monkeypatch.setattr(index, "QUERIES_PER_TILE", 2)
    rng = np.random.default_rng(0)
    passages = rng.normal(size=(50, 8)).astype(np.float32)
    # More than lie on the devices at once.
    queries = rng.normal(size=(2 * jax.local_device_count() + 3, 8)).astype(np.float32)
    for name, part in (("first", passages[:37]), ("second", passages[37:])):
        np.save(tmp_path / f"{name}.npy", part)
    shards = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("first", "second")]
    rows, _ = index.exact(queries, shards, 20)
    np.testing.assert_array_equal(rows, np.argsort(-(queries @ passages.T), axis=1)[:, :20])


def test_exact_search_reads_every_passage_once(monkeypatch):
    monkeypatch.setattr(index, "PASSAGES_PER_TILE", 16)
    monkeypatch.setattr(index, "QUERIES_PER_TILE", 1)
    read = []

    class Shard:
        def __len__(self):
            return 40

        def __getitem__(self, rows):
            read.append(range(40)[rows])
            return np.ones((40, 2), np.float32)[rows]

    index.exact(np.ones((3 * jax.local_device_count(), 2), np.float32), [Shard()], 5)
    assert read == [range(16), range(16, 32), range(32, 40)]


def test_negative_scores_never_lose_to_padding():
    rows, scores = index.exact(np.ones((1, 2), np.float32), [-np.ones((3, 2), np.float32)], 3)
    assert sorted(rows[0]) == [0, 1, 2]
    np.testing.assert_array_equal(scores, -2)


def test_merge_keeps_the_rerankers_order_on_top_and_the_retrievers_below():
    top = np.array([[0.5, 3.0], [-7.0, -9.0]], np.float32)
    retriever = np.array([[9.0, 8.0, 7.0, 7.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]], np.float32)
    merged = rerank.merge(top, retriever)
    np.testing.assert_array_equal(merged[:, :2], top)
    np.testing.assert_array_equal(np.argsort(-merged, axis=1, kind="stable")[0], [1, 0, 2, 3, 4])
    np.testing.assert_array_equal(np.argsort(-merged, axis=1, kind="stable")[1], [0, 1, 2, 3, 4])
    assert merged[0, 2] == merged[0, 3]
    np.testing.assert_array_equal(rerank.merge(top, retriever[:, :2]), top)


def test_merge_keeps_the_order_of_scores_that_are_tiny_or_infinite():
    # As a language model's probabilities and a fusion of ranks are, far below the re-ranker's.
    places = np.arange(1000.0)
    given = np.stack([np.exp(-0.05 * places), 1 / (60 + places)]).astype(np.float32)
    merged = rerank.merge(np.full((2, 10), -12.5, np.float32), given)
    assert (np.diff(merged[:, 9:]) < 0).all()
    given[:, 500:] = -np.inf
    merged = rerank.merge(np.zeros((2, 10), np.float32), given)
    assert (np.diff(merged[:, 9:500]) < 0).all()
    assert (merged[:, 500:] == merged[:, 500:501]).all()
    assert (merged[:, 500] < merged[:, 499]).all()


def near_centres(whole):
    """Passages around centres, queries near these, and ScaNN's settings: all scored, or a tree."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 16)) * 3
    passages = (centres[rng.integers(0, 40, 3000)] + rng.normal(size=(3000, 16))).astype(np.float32)
    queries = (centres[:20] + rng.normal(size=(20, 16))).astype(np.float32)
    settings = types.SimpleNamespace(**{**vars(SCANN), "brute_force_below": 10**6 if whole else 10})
    return passages, queries, settings


@pytest.mark.parametrize("whole", [True, False])
def test_scann_is_built_once_loaded_again_and_close_to_exact(tmp_path, whole):
    passages, queries, settings = near_centres(whole)
    exact, _ = index.exact(queries, [passages], 20)
    found = []
    for _ in range(2):
        searcher = index.build_scann([passages], settings, 20, tmp_path / "index", "source")
        found.append(index.scann_search(searcher, queries, 20)[0])
    np.testing.assert_array_equal(found[0], found[1])
    # A tree is drawn at random, and usually finds .98.
    assert index.recall(found[0], exact) >= (1.0 if whole else 0.8)
    stamp = (tmp_path / "index" / "rqv2_jax.json").stat().st_mtime_ns
    index.build_scann([passages], settings, 20, tmp_path / "index", "source")
    assert (tmp_path / "index" / "rqv2_jax.json").stat().st_mtime_ns == stamp
    index.build_scann([passages], settings, 20, tmp_path / "index", "other source")
    assert (tmp_path / "index" / "rqv2_jax.json").stat().st_mtime_ns != stamp


@pytest.mark.parametrize("whole", [True, False])
def test_scanns_folder_loads_by_a_relative_path_and_after_it_was_moved(
    tmp_path, monkeypatch, capsys, whole
):
    passages, queries, settings = near_centres(whole)
    monkeypatch.chdir(tmp_path)
    found, stamps = [], []

    def search(folder):
        searcher = index.build_scann([passages], settings, 20, pathlib.Path(folder), "source")
        found.append(index.scann_search(searcher, queries, 20)[0])
        stamps.append((pathlib.Path(folder) / "rqv2_jax.json").stat().st_mtime_ns)

    search("a workdir/index")
    search("a workdir/index")
    search(tmp_path / "a workdir/index")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a workdir").rename(tmp_path / "elsewhere/moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    search("moved/index")
    assert len(set(stamps)) == 1
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])
    assert "made again" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["emptied", "cut", "gone"])
def test_scanns_folder_is_built_again_when_a_file_of_it_is_damaged(tmp_path, capsys, damage):
    passages, queries, settings = near_centres(whole=False)
    folder = tmp_path / "index"

    def search():
        searcher = index.build_scann([passages], settings, 20, folder, "source")
        return index.scann_search(searcher, queries, 20)[0]

    expected = search()
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 8
    for name in names:
        break_file(folder / name, damage)
        # Trees are drawn at random.
        assert index.recall(search(), expected) > 0.7
        said = capsys.readouterr().out
        assert sorted(path.name for path in folder.iterdir()) == names
        # Without the manifest, which is written last, the folder is not taken for whole.
        if name != "rqv2_jax.json":
            assert said.startswith(f"{folder}: cannot be read (")
            assert "it is made again" in said
            assert len(said.splitlines()) == 1


def test_scanns_manifest_is_written_after_everything_else(tmp_path, monkeypatch):
    from scann import scann_ops_pybind

    passages, _, settings = near_centres(whole=True)
    folder = tmp_path / "index"

    def fail(*args, **kwargs):
        raise RuntimeError("the disk is full")

    for holder, name in (
        (scann_ops_pybind.ScannSearcher, "serialize"),
        (scann_ops_pybind, "load_searcher"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, fail)
            with pytest.raises(RuntimeError, match="the disk is full"):
                index.build_scann([passages], settings, 20, folder, "source")
        assert not (folder / "rqv2_jax.json").exists()
    index.build_scann([passages], settings, 20, folder, "source")
    assert (folder / "rqv2_jax.json").is_file()


def in_parts(settings, count, passages):
    """ScaNN's settings with memory for so many parts of the passages."""
    memory = 4 * passages.size * index.BUILT / index.room.GIB / count
    return types.SimpleNamespace(**vars(settings), memory=memory * 1.0001)


def test_scann_in_one_part_is_the_index_of_before(tmp_path):
    passages, queries, settings = near_centres(whole=False)
    searcher = index.build_scann([passages], settings, 20, tmp_path / "index", "source")
    expected = index.scann_search(searcher, queries, 20)
    stamp = (tmp_path / "index" / index.MANIFEST).stat().st_mtime_ns
    asked = in_parts(settings, 1, passages), 20, tmp_path / "index", "source"
    for found, each in zip(index.open_scann([passages], *asked)(queries), expected):
        np.testing.assert_array_equal(found, each)
    assert (tmp_path / "index" / index.MANIFEST).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_scann_in_parts_finds_what_exact_search_finds(tmp_path, whole, dtype):
    passages, queries, settings = near_centres(whole)
    passages = passages.astype(dtype)
    shards, folder = np.split(passages, [700, 1900]), tmp_path / "index"
    exact_QxK, exact_scores_QxK = index.exact(queries, shards, 20)
    asked = shards, in_parts(settings, 4, passages), 20, folder, "source"
    rows_QxK, scores_QxK = index.open_scann(*asked)(queries)
    assert index.recall(rows_QxK, exact_QxK) >= (1.0 if whole else 0.8)
    own_scores_QxK = np.einsum("qd,qkd->qk", queries, passages.astype(np.float32)[rows_QxK])
    np.testing.assert_allclose(scores_QxK, own_scores_QxK, rtol=1e-4)
    assert (np.diff(scores_QxK) <= 0).all()
    if whole:
        np.testing.assert_array_equal(rows_QxK, exact_QxK)
        np.testing.assert_allclose(scores_QxK, exact_scores_QxK, rtol=1e-5)
    manifests = sorted(folder.glob(f"*/{index.MANIFEST}"))
    assert [path.parent.name for path in manifests] == ["0000", "0001", "0002", "0003"]
    stamps = [path.stat().st_mtime_ns for path in manifests]
    np.testing.assert_array_equal(index.open_scann(*asked)(queries)[0], rows_QxK)
    assert [path.stat().st_mtime_ns for path in manifests] == stamps


def test_scann_pads_where_all_parts_hold_fewer_than_were_asked_for(tmp_path):
    passages, queries, settings = near_centres(whole=True)
    few = passages[:6]
    asked = in_parts(settings, 3, few), 9, tmp_path / "index", "source"
    rows_QxK, _ = index.open_scann([few], *asked)(queries)
    np.testing.assert_array_equal(rows_QxK, np.argsort(-(queries @ few.T), axis=1))


def test_another_number_of_parts_leaves_none_of_the_old_ones(tmp_path):
    passages, queries, settings = near_centres(whole=True)
    folder, found = tmp_path / "index", []
    for count in (1, 3, 2, 1):
        asked = in_parts(settings, count, passages), 20, folder, "source"
        found.append(index.open_scann([passages], *asked)(queries)[0])
        parts = sorted(path.name for path in folder.iterdir() if path.is_dir())
        assert parts == ([f"{number:04}" for number in range(count)] if count > 1 else [])
        assert (folder / index.MANIFEST).is_file() == (count == 1)
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


def test_only_one_part_of_scann_is_in_memory_at_a_time(tmp_path, monkeypatch):
    passages, queries, settings = near_centres(whole=True)
    alive, most, build = weakref.WeakSet(), [], index.build_scann

    class Searcher:
        def __init__(self, searcher):
            self.search_batched_parallel = searcher.search_batched_parallel

    def watched(shards, *asked):
        assert not alive
        assert sum(map(len, shards)) == 750
        searcher = Searcher(build(shards, *asked))
        alive.add(searcher)
        most.append(len(alive))
        return searcher

    monkeypatch.setattr(index, "build_scann", watched)
    asked = in_parts(settings, 4, passages), 20, tmp_path / "i", "source"
    index.open_scann([passages], *asked)(queries)
    assert most == [1] * 4


def test_scanns_parts_follow_from_the_memory(monkeypatch):
    # 21 million vectors of 768 take 60 GiB, and ScaNN 276 GiB.
    vectors = 4 * 21_000_000 * 768 / 2**30
    assert index.scann_parts(21_000_000, 768, vectors * index.BUILT * 1.001) == 1
    assert index.scann_parts(21_000_000, 768, vectors * index.BUILT * 0.999) == 2
    assert index.scann_parts(21_000_000, 768, 64.0) == 5
    assert index.scann_parts(3, 768, 1e-9) == 3
    # Half of what this process may take of the machine's memory.
    monkeypatch.setattr(index.room, "host_memory", lambda: (128.0 * 2**30, 1.0))
    assert index.scann_parts(21_000_000, 768, 0.0) == index.scann_parts(21_000_000, 768, 64.0)
    assert index.scann_parts(21_000_000, 768, 64.0) != index.scann_parts(21_000_000, 768, 128.0)


def test_scanns_results_are_named_by_its_parts_and_not_by_the_memory():
    settings = ConfigDict({**vars(SCANN), "memory": 0.001})
    before = json.dumps(vars(SCANN), sort_keys=True)
    assert index.scann_described(settings, 10, 8) == before
    assert json.loads(index.scann_described(settings, 10_000, 8)) == {**vars(SCANN), "parts": 2}


def break_file(path, damage):
    """Empties a file, cuts it in half, or deletes it."""
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, 0 if damage == "emptied" else path.stat().st_size // 2)


BM25 = types.SimpleNamespace(k1=1.2, b=0.75, stemmer="english")


def test_bm25_in_closed_form():
    passages = [
        "Rivers run, rivers bend",
        "a river of stone",
        "Stones and copper of a castle",
        "...",
    ]
    queries = ["the river bends", "copper stone copper", "nothing shared", ""]
    rows, scores = bm25.search(iter(passages), queries, 3, BM25)
    # By hand: stems of words of two letters and more.
    words = [
        ["river", "run", "river", "bend"],
        ["river", "of", "stone"],
        ["stone", "and", "copper", "of", "castl"],
        [],
    ]
    mean = np.mean([len(each) for each in words])

    def score(query, passage):
        total = 0
        for word in query:
            holding = sum(word in each for each in words)
            idf = np.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
            count = passage.count(word)
            total += idf * count / (count + 1.2 * (1 - 0.75 + 0.75 * len(passage) / mean))
        return total

    asked = [["the", "river", "bend"], ["copper", "stone", "copper"], ["noth", "share"], []]
    expected = np.array([[score(query, passage) for passage in words] for query in asked])
    np.testing.assert_array_equal(rows, [[0, 1, -1], [2, 1, -1], [-1] * 3, [-1] * 3])
    assert (np.isneginf(scores) == (rows < 0)).all()
    for found, row, each in zip(scores, rows, expected):
        np.testing.assert_allclose(found[row >= 0], each[row[row >= 0]], rtol=1e-5)
    every = np.array([[3, 2, 1, 0]] * 4)
    found = bm25.scores(iter(passages), queries, every, BM25)
    np.testing.assert_allclose(found, expected[:, ::-1], rtol=1e-5)


def test_bm25_without_a_stemmer_tells_words_of_one_stem_apart():
    plain = types.SimpleNamespace(**{**vars(BM25), "stemmer": ""})
    rows, _ = bm25.search(["rivers", "river"], ["river"], 9, plain)
    np.testing.assert_array_equal(rows, [[1, -1]])
    rows, _ = bm25.search(["rivers", "river"], ["river"], 9, BM25)
    assert sorted(rows[0]) == [0, 1]


def test_bm25_of_passages_without_words_finds_nothing():
    rows, scores = bm25.search(["?", "!"], ["a question"], 5, BM25)
    np.testing.assert_array_equal(rows, [[-1, -1]])
    assert np.isneginf(scores).all()
    found = bm25.scores(["?", "!"], ["a question"], np.array([[1, 0]]), BM25)
    np.testing.assert_array_equal(found, [[0, 0]])


def test_recall_in_closed_form():
    exact = np.array([[1, 2], [3, 4]])
    assert index.recall(np.array([[2, 1], [3, 9]]), exact) == 0.75
    assert index.recall(np.array([[-1, -1], [-1, -1]]), exact) == 0.0


@pytest.fixture(scope="module")
def forward(world):
    sharding = sharding_lib.make(1, 1)
    return forward_of(world, sharding, 32)


def test_streamed_vectors_come_in_order_and_equal_those_of_one_batch(world, forward):
    rows = np.random.default_rng(1).permutation(24)
    tower = world.params["retriever"]["passage"]
    streamed = encode.passages(forward, tower, world.store, rows)
    each = [encode.passages(forward, tower, world.store, rows[i : i + 1])[0] for i in range(24)]
    np.testing.assert_allclose(streamed, each, atol=1e-5)


def test_streaming_over_several_devices_changes_nothing(world, forward):
    tower = world.params["retriever"]["passage"]
    rows = np.arange(24)
    expected = encode.passages(forward, tower, world.store, rows)
    sharding = sharding_lib.make(2, 2)
    several = forward_of(world, sharding, 32)
    found = encode.passages(several, sharding.put_params(tower), world.store, rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_corpus_resumes_at_the_first_missing_shard_and_forgets_other_sources(
    world, forward, tmp_path, monkeypatch
):
    monkeypatch.setattr(encode, "PASSAGES_PER_SHARD", 10)
    tower = world.params["retriever"]["passage"]
    whole = np.concatenate(
        encode.corpus(forward, tower, world.store, tmp_path / "v", "a", "float32")
    )
    np.testing.assert_allclose(
        whole, encode.passages(forward, tower, world.store, np.arange(24)), atol=1e-5
    )
    kept, lost = tmp_path / "v" / "00000.npy", tmp_path / "v" / "00001.npy"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    again = np.concatenate(
        encode.corpus(forward, tower, world.store, tmp_path / "v", "a", "float32")
    )
    np.testing.assert_array_equal(again, whole)
    assert kept.stat().st_mtime_ns == stamp
    encode.corpus(forward, tower, world.store, tmp_path / "v", "b", "float32")
    assert kept.stat().st_mtime_ns != stamp


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_vectors_in_half_precision_take_half_the_disk_and_are_scored_in_float32(
    world, forward, tmp_path, monkeypatch, dtype
):
    monkeypatch.setattr(encode, "PASSAGES_PER_SHARD", 10)
    towers, texts = world.params["retriever"], world.store.splits["train"].texts
    encoded = forward, tower(towers, "passage"), world.store
    full, half = (
        encode.corpus(*encoded, tmp_path / each, "a", each) for each in ("float32", dtype)
    )
    assert [each.nbytes for each in half] == [each.nbytes // 2 for each in full]
    sizes = [(tmp_path / each / "00000.npy").stat().st_size for each in ("float32", dtype)]
    assert sizes[1] - 128 == (sizes[0] - 128) / 2
    rounded_NxD = np.concatenate(full).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate(half, dtype=np.float32), rounded_NxD)
    queries_QxD = encode.queries(forward, tower(towers, "query"), texts, np.arange(8))
    expected_QxN = queries_QxD @ rounded_NxD.T
    rows_QxK, scores_QxK = index.exact(queries_QxD, half, 24)
    assert scores_QxK.dtype == np.float32
    found = np.take_along_axis(expected_QxN, rows_QxK, axis=1)
    np.testing.assert_allclose(scores_QxK, found, rtol=1e-5, atol=1e-5)


def test_shards_in_another_dtype_are_made_again(world, forward, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, "PASSAGES_PER_SHARD", 10)
    folder, stamps = tmp_path / "v", []
    encoded = forward, world.params["retriever"]["passage"], world.store, folder, "a"

    def stamp(dtype):
        shards = encode.corpus(*encoded, dtype)
        assert {str(shard.dtype) for shard in shards} == {dtype}
        stamps.append((folder / "00000.npy").stat().st_mtime_ns)

    stamp("float32")
    # As before manifests named the dtype.
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("dtype") == "float32"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for dtype in ("float32", "float16", "float16", "bfloat16"):
        stamp(dtype)
    assert stamps[0] == stamps[1] < stamps[2] == stamps[3] < stamps[4]
    np.save(folder / "00001.npy", np.zeros((10, 32), np.float16))
    capsys.readouterr()
    stamp("bfloat16")
    assert stamps[4] == stamps[5]
    assert f"{folder / '00001.npy'}: cannot be read (float16 of" in capsys.readouterr().out


def test_a_vector_that_float16_cannot_hold_is_refused(world, forward, tmp_path):
    large = jax.tree.map(lambda x: x, world.params["retriever"]["passage"])
    norms = [leaf for leaf in jax.tree_util.tree_leaves_with_path(large) if "scale" in str(leaf[0])]
    assert norms
    large = jax.tree_util.tree_map_with_path(
        lambda path, x: x * (1e6 if "scale" in str(path) else 1), large
    )
    encoded = forward, large, world.store, tmp_path / "v", "a"
    with pytest.raises(InputError, match=r"dtype is float16, .* --config\.encode\.dtype=float32"):
        encode.corpus(*encoded, "float16")
    assert not list((tmp_path / "v").glob("*.npy"))
    for dtype in ("bfloat16", "float32"):
        assert np.isfinite(np.concatenate(encode.corpus(*encoded, dtype), dtype=np.float32)).all()


@pytest.mark.parametrize("damage", ["emptied", "cut", "short"])
def test_corpus_encodes_again_the_shards_that_are_damaged(
    world, forward, tmp_path, monkeypatch, capsys, damage
):
    monkeypatch.setattr(encode, "PASSAGES_PER_SHARD", 10)
    tower, folder = world.params["retriever"]["passage"], tmp_path / "v"
    whole = np.concatenate(encode.corpus(forward, tower, world.store, folder, "a", "float32"))
    kept, broken = folder / "00000.npy", folder / "00001.npy"
    stamp = kept.stat().st_mtime_ns
    if damage == "short":
        np.save(broken, np.load(broken)[:7])
    else:
        break_file(broken, damage)
    again = np.concatenate(encode.corpus(forward, tower, world.store, folder, "a", "float32"))
    np.testing.assert_array_equal(again, whole)
    assert kept.stat().st_mtime_ns == stamp
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "made again" in x)
    assert line.startswith(f"{broken}: cannot be read (")


def test_corpus_is_encoded_again_when_nobody_can_say_by_what_it_was(
    world, forward, tmp_path, capsys
):
    tower, folder = world.params["retriever"]["passage"], tmp_path / "v"
    encode.corpus(forward, tower, world.store, folder, "a", "float32")
    manifest, stamp = folder / "manifest.json", (folder / "00000.npy").stat().st_mtime_ns
    break_file(manifest, "cut")
    encode.corpus(forward, tower, world.store, folder, "a", "float32")
    assert (folder / "00000.npy").stat().st_mtime_ns != stamp
    assert f"{manifest}: cannot be read (" in capsys.readouterr().out


def test_reranker_scores_stand_where_their_candidates_stand(world, forward):
    params, texts = world.params["reranker"], world.store.splits["train"].texts
    queries = np.array([3, 0])
    passages = np.array([[1, 5, 7, -1], [2, -1, 0, 9]])
    scores = rerank.scores(forward, params, world.store, texts, queries, passages)
    for i in range(2):
        for j in range(4):
            if passages[i, j] < 0:
                assert scores[i, j] == 0
                continue
            one = rerank.scores(
                forward,
                params,
                world.store,
                texts,
                queries[i : i + 1],
                passages[i : i + 1, j : j + 1],
            )
            assert scores[i, j] == pytest.approx(one[0, 0], abs=1e-5)


def test_no_candidates_at_all_are_scored_0(world, forward):
    texts, none_QxK = world.store.splits["train"].texts, np.full((2, 3), -1)
    found = rerank.scores(
        forward, world.params["reranker"], world.store, texts, np.arange(2), none_QxK
    )
    np.testing.assert_array_equal(found, np.zeros((2, 3), np.float32))


def test_query_tower_and_passage_tower_are_not_swapped(world, forward):
    texts = world.store.splits["train"].texts
    towers = world.params["retriever"]
    ours = encode.queries(forward, tower(towers, "query"), texts, np.arange(4))
    other = encode.queries(forward, tower(towers, "passage"), texts, np.arange(4))
    assert np.abs(ours - other).max() > 0.1


def forward_of(world, sharding, batch_tokens):
    return stream.make_forward(
        world.models, world.inputs, sharding, batch_tokens=batch_tokens, max_blocks=3
    )


@given(
    usual=st.lists(st.integers(1, 96), min_size=1, max_size=60),
    lengths=st.lists(st.integers(1, 96), min_size=1, max_size=60),
    shards=st.sampled_from([1, 2, 4]),
    tokens=st.sampled_from([30, 64, 300, 2000]),
)
@settings(deadline=None)
def test_every_sequence_has_one_row_that_holds_it(usual, lengths, shards, tokens):
    layout = stream.plan(np.array(usual), 96, tokens, 4)
    assert len(layout.usual) <= 4
    per_shard = sum(s.rows * s.width for s in layout.usual)
    assert per_shard <= tokens or sum(s.rows for s in layout.usual) == 1
    lengths_N, found, shapes = np.array(lengths), [], set()
    for numbers_SxR, batch_shapes in stream.schedule(lengths_N, layout, shards):
        shapes.add(batch_shapes)
        widths = np.repeat(*np.array([(s.width, s.rows) for s in batch_shapes]).T)
        assert numbers_SxR.shape == (shards, len(widths))
        for numbers_R in numbers_SxR:
            real = numbers_R[numbers_R >= 0]
            # Sequences are laid out shortest first, empty ones before all.
            lengths_R = np.append(np.zeros(len(numbers_R) - len(real), int), lengths_N[real])
            assert np.all(np.sort(lengths_R) <= widths)
            found += list(real)
            assert np.all(numbers_R[: len(real)] == real)
    assert sorted(found) == list(range(len(lengths)))
    assert shapes <= {layout.usual, layout.spare}


@given(
    lengths=st.lists(st.integers(1, 96), min_size=1, max_size=300),
    shards=st.sampled_from([1, 2, 4]),
    tokens=st.sampled_from([30, 300, 2000]),
)
@settings(deadline=None)
def test_flat_rows_hold_every_sequence_once(lengths, shards, tokens):
    lengths_N = np.array(lengths)
    layout, found = stream.plan_flat(lengths_N, 96, tokens), []
    (shape,) = layout.usual
    assert shape.rows == 1
    assert shape.width <= max(tokens, 128)
    for numbers_SxR, shapes in stream.schedule(lengths_N, layout, shards):
        assert shapes == (shape,)
        assert numbers_SxR.shape == (shards, shape.slots)
        for numbers_R in numbers_SxR:
            real = numbers_R[numbers_R >= 0]
            assert lengths_N[real].sum() <= shape.width
            assert np.all(numbers_R[: len(real)] == real)
            found += list(real)
    assert found == list(range(len(lengths)))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_flat_rows_give_the_same_vectors(world, forward, pooling):
    """By the kernel, of a store's passages in several batches, some of them not full."""
    plain = dataclasses.replace(world.models, pooling=pooling)
    flat = plain.reshaped(attention="ragged")
    tower, rows_N, found = world.params["retriever"]["passage"], np.arange(24), []
    for models in (flat, plain):
        own = stream.make_forward(
            *(models, world.inputs, sharding_lib.make(1, 1)), batch_tokens=256, max_blocks=3
        )
        found.append(encode.passages(own, tower, world.store, rows_N))
    np.testing.assert_allclose(*found, rtol=0, atol=2e-5)


def computed_over_real(lengths_N, layout, shards):
    batches = list(stream.schedule(lengths_N, layout, shards))
    return shards * sum(s.rows * s.width for x in batches for s in x.shapes) / lengths_N.sum()


@pytest.mark.parametrize(
    ("count", "shards", "most"),
    [(200, 1, 1.3), (1_000, 1, 1.15), (20_000, 1, 1.075), (20_000, 4, 1.1)],
)
def test_few_tokens_are_computed_beside_those_of_usual_lengths(count, shards, most):
    """With the lengths of MS MARCO's passages, mean 79 of 128 tokens."""
    rng = np.random.default_rng(0)
    usual_N, lengths_N = (
        np.clip(rng.lognormal(np.log(76), 0.36, n), 16, 128).astype(int) for n in (10_000, count)
    )
    layout = stream.plan(usual_N, 128, 8192, 12)
    assert sum(s.rows * s.width for s in layout.usual) <= 8192
    assert computed_over_real(lengths_N, layout, shards) < most


def test_rows_for_the_longest_do_not_hold_up_shorter_sequences():
    rng = np.random.default_rng(0)
    lengths_N = np.clip(rng.lognormal(np.log(76), 0.36, 20_000), 16, 200).astype(int)
    layout = stream.plan(lengths_N, 512, 16384, 12)
    assert computed_over_real(lengths_N, layout, 1) < 1.15


def test_lengths_unlike_the_usual_ones_take_few_batches_more():
    lengths_N = np.full(400, 100)
    layout = stream.plan(np.append(np.full(300, 10), np.full(100, 30)), 128, 2048, 12)
    batches = list(stream.schedule(lengths_N, layout, 2))
    assert {batch.shapes for batch in batches} == {layout.spare}
    # 4 rows of 128 tokens on either device.
    assert len(batches) == 50


def test_progress_counts_every_sequence(world, forward):
    with tqdm.tqdm(total=24, disable=False) as bar:
        encode.passages(
            forward, world.params["retriever"]["passage"], world.store, np.arange(24), bar
        )
        assert bar.n == 24
