import hashlib
import itertools
import json
import platform
import re
import sys
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rqv2_jax.data import docstrings
from rqv2_jax.data.collection import Left, check_qrels
from rqv2_jax.data.docstrings import (
    Doc,
    name_key,
    read_docs,
    read_packages,
    records,
    select,
    source_files,
)
from rqv2_jax.errors import InputError

# The Python whose pinned packages are the published embedded data.
PUBLISHED = "3.11.7"
REST = " ".join(f"word{i}" for i in range(30))


def documented(text, *, header="def f():", indent="    "):
    quotes = f'"""{text}"""'
    return "\n".join([header, *(indent + line for line in quotes.split("\n")), ""]).encode()


def found(source, path="pkg/mod.py"):
    return list(read_docs(path, source))


def names(source, path="pkg/mod.py"):
    return [doc.name for doc in found(source, path)]


def test_first_paragraph_is_the_query_and_the_rest_the_passage():
    source = documented(f"Add two\n  numbers   here.\n\nArgs:\n  x: one.\n\n>>> f(1)\n{REST}")
    assert found(source) == [
        Doc("pkg", "mod.f", "Add two numbers here.", f"Args: x: one. >>> f(1) {REST}")
    ]


@pytest.mark.parametrize(
    ("query_words", "rest_words", "kept"),
    [(3, 30, 0), (4, 30, 1), (40, 30, 1), (41, 30, 0), (4, 29, 0), (4, 31, 1)],
)
def test_word_limits(query_words, rest_words, kept):
    text = " ".join(["word"] * query_words) + "\n\n" + " ".join(["more"] * rest_words)
    assert len(found(documented(text))) == kept


def test_a_docstring_of_one_paragraph_has_no_passage():
    assert found(documented(f"Add two numbers here. {REST}")) == []


def test_functions_classes_and_methods_that_are_public():
    doc = f'"""Do the named thing.\n\n{REST}"""'
    source = f"""
def f():
    {doc}
    def inner():
        {doc}
async def g():
    {doc}
def _private():
    {doc}
class C:
    {doc}
    def method(self):
        {doc}
    def __call__(self):
        {doc}
    class Inner:
        def deep(self):
            {doc}
class _Hidden:
    def method(self):
        {doc}
if True:
    def in_if():
        {doc}
else:
    def in_else():
        {doc}
try:
    def in_try():
        {doc}
except ImportError:
    pass
@deprecated("use f")
def old():
    {doc}
@tools.deprecated
class Older:
    def method(self):
        {doc}
""".encode()
    assert names(source, "pkg/__init__.py") == [
        "f",
        "g",
        "C",
        "C.method",
        "C.Inner.deep",
        "in_if",
        "in_else",
        "in_try",
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pkg/__init__.py", "f"),
        ("pkg/linalg/norms.py", "linalg.norms.f"),
        ("pkg/_src/numpy/linalg.py", "numpy.linalg.f"),
        ("pkg/src/ops/__init__.py", "ops.f"),
        ("pkg/linalg/_linalg.py", "linalg.f"),
        ("pkg/_core/fromnumeric.py", "f"),
    ],
)
def test_private_parts_leave_the_name(path, name):
    assert names(documented(f"Do the named thing.\n\n{REST}"), path) == [name]


@pytest.mark.parametrize(
    ("decorator", "expected"),
    [
        ('tf_export("math.f", "f", v1=["g"])', ["math.f"]),
        ('tf_export("f", v1=[])', ["f"]),
        ('tf_export(v1=["f"])', []),
        ('tf_export("__internal__.f", v1=[])', []),
        ('keras_export("pkg.ops.f")', ["ops.f"]),
        ('api.keras_export(["pkg.ops.f", "pkg.f"])', ["ops.f"]),
        ('other("pkg.ops.f")', ["mod.f"]),
    ],
)
def test_names_that_a_package_exports(decorator, expected):
    header = f"@{decorator}\ndef f():"
    assert names(documented(f"Do the named thing.\n\n{REST}", header=header)) == expected


def test_add_newdoc():
    doc = f'"""\n    f(x, /)\n    --\n\n    Do the named thing.\n\n    {REST}\n    """'
    source = f"""
add_newdoc('numpy._core.multiarray', 'f', {doc})
add_newdoc('numpy._core', 'C', ('g', {doc}))
add_newdoc('numpy.lib', 'D', [('h', {doc}), ('_i', {doc})])
add_newdoc('agm', {doc})
add_newdoc('numpy', '_private', {doc})
add_newdoc(place, name, {doc})
add_newdoc('numpy', 'f', make({doc}))
""".encode()
    docs = found(source, "numpy/special/_add_newdocs.py")
    assert [doc.name for doc in docs] == ["f", "C.g", "lib.D.h", "special.agm"]
    assert {(doc.query, doc.text) for doc in docs} == {("Do the named thing.", REST)}


def test_signatures_and_template_lines_are_no_text():
    text = f"f(x, y=(1, 2)) -> int\n\nf(x)\n\nDo the named thing.\n\n%(before)s\n\n{REST} %(kept)s"
    assert [doc[2:] for doc in found(documented(text))] == [
        ("Do the named thing.", f"{REST} %(kept)s")
    ]


@pytest.mark.parametrize(
    "query",
    [
        "Args: x the number",
        "Parameters ---------- x : int a number",
        "input_ids (`torch.Tensor` of shape `(n,)`) the ids",
        ">>> f(1) and then some more",
        "Solves the equation .. math:: x",
        "Solves one of the following:",
        "Deprecated, use the other function.",
        ":param x: the number of things",
    ],
)
def test_queries_that_describe_nothing_go(query):
    assert found(documented(f"{query}\n\n{REST}")) == []


@pytest.mark.parametrize("query", ["Return a value (a number).", "Inputs are summed over an axis."])
def test_prose_stays(query):
    assert [doc.query for doc in found(documented(f"{query}\n\n{REST}"))] == [query]


def test_a_source_that_does_not_parse_is_passed_over():
    assert found(b'"""x"""\nprint "python 2"') == []


def test_escapes_that_python_warns_about_are_read_quietly(recwarn):
    assert len(found(documented(f"Compute \\d of things.\n\n{REST}"))) == 1
    assert not recwarn


def test_select_drops_repeated_passages_and_keeps_the_first():
    first = Doc("a", "m.f", "Do the first thing.", "same")
    assert select([first, Doc("b", "m.g", "Do another thing.", "same")]) == [first]


def test_select_keeps_namesakes_of_several_packages_once_each():
    docs = [
        Doc("a", "m.reduce_sum", "Sum of the elements.", "1"),
        Doc("a", "m.v1.reduce_sum_v2", "Sum of the elements.", "2"),
        Doc("b", "ReduceSum", "sum of the Elements.", "3"),
    ]
    assert select(docs) == [docs[0], docs[2]]


def test_select_drops_queries_that_fit_several_names():
    docs = [
        Doc("a", "m.f", "See the base class.", "1"),
        Doc("b", "m.g", "See the Base class.", "2"),
        Doc("b", "m.h", "Do the third thing.", "3"),
    ]
    assert select(docs) == docs[2:]


def test_name_key():
    assert {name_key(n) for n in ("a.log_softmax", "LogSoftmax", "b.c.log_softmax_v2")} == {
        "logsoftmax"
    }
    assert name_key("sum") != name_key("cumsum")


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1), st.sampled_from(["x.", "y.z.", ""]))
def test_namesakes_share_a_split(letters, prefix):
    name = "".join(letters)
    split = docstrings.split_of(name)
    assert split in docstrings.SPLITS
    assert docstrings.split_of(prefix + name.upper() + "_v2") == split


def test_split_is_the_same_on_every_machine_and_near_the_shares():
    splits = [docstrings.split_of(f"name{i}") for i in range(10_000)]
    assert splits[:8] == GOLDEN_SPLITS
    # Four standard deviations of a binomial share are below 0.018 here.
    for split, share in zip(docstrings.SPLITS, (0.75, 0.10, 0.15), strict=True):
        assert splits.count(split) / 10_000 == pytest.approx(share, abs=0.018)


GOLDEN_SPLITS = ["train", "train", "train", "train", "train", "train", "train", "test"]


def test_records_label_each_passage_once():
    docs = [Doc("p", f"m.f{i // 2}", f"query {i}", f"text {i}") for i in range(40)]
    rows = records(docs)
    passages = {row["id"]: row for row in rows["passages"]}
    assert len(passages) == 40
    assert {"p:m.f0", "p:m.f0~2"} <= passages.keys()
    queries = [(split, row) for split in docstrings.SPLITS for row in rows[split]]
    assert sorted(row["labelled"][0] for _, row in queries) == sorted(passages)
    assert not {row["id"] for _, row in queries} & passages.keys()
    for split, row in queries:
        (positive,) = row["labelled"]
        assert row["text"].removeprefix("query ") == passages[positive]["text"].split()[1]
        assert docstrings.split_of(passages[positive]["title"]) == split
    assert passages["p:m.f7"]["title"] == "p m.f7"


def test_order_tells_nothing():
    """Over many docs, query order and passage order correlate neither together nor with reading."""
    docs = [Doc("p", f"m.f{i}", f"query {i}", f"text {i}") for i in range(2000)]
    rows = records(docs)
    place = {row["id"]: i for i, row in enumerate(rows["passages"])}
    read = [int(row["title"][5:]) for row in rows["passages"]]
    positives = [place[row["labelled"][0]] for row in rows["train"]]
    for sequence in (read, positives):
        ascending = sum(a < b for a, b in itertools.pairwise(sequence)) / (len(sequence) - 1)
        # A shuffled sequence rises half the time, with a deviation of 0.29 / sqrt(n).
        assert ascending == pytest.approx(0.5, abs=0.05)
    assert rows == records(docs)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A preset of one package that breaks when imported."""
    root = tmp_path / "site" / "fakepkg"
    for folder in ("", "tests", "_vendor", "linalg"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    # tensorflow-datasets refuses an empty split: 60 names fill all three.
    for i in range(60):
        source = documented(f"Do the thing number {i}.\n\n{REST} {i}", header=f"def f{i}():")
        (root / "linalg" / f"m{i:02}.py").write_bytes(b"raise RuntimeError\n" + source)
    (root / "__init__.py").write_text("raise RuntimeError\n")
    skipped = documented(f"Skip all of this.\n\nnever {REST}")
    for name in ("tests/a.py", "_vendor/a.py", "test_a.py", "a_test.py", "conftest.py"):
        (root / name).write_bytes(skipped)
    monkeypatch.syspath_prepend(root.parent)
    monkeypatch.setitem(docstrings.PRESETS, "core", ("fakepkg",))
    return root


def test_source_files_are_sorted_and_leave_out_tests_and_copies(fake):
    assert list(source_files("fakepkg")) == [
        "fakepkg/__init__.py",
        *(f"fakepkg/linalg/m{i:02}.py" for i in range(60)),
    ]
    assert "fakepkg" not in sys.modules


def test_the_standard_library_is_read_without_its_tests():
    files = source_files("python")
    assert {"python/json/__init__.py", "python/unittest/case.py", "python/doctest.py"} <= set(files)
    assert not [path for path in files if re.search("/(test|idlelib|site-packages)/", path)]


def test_a_package_that_is_not_installed():
    with pytest.raises(InputError, match=r"^no_such_package: .*pip install -r requirements.txt"):
        source_files("no_such_package")


def test_unknown_preset(tmp_path):
    with pytest.raises(InputError, match="no preset 'huge'; choose from core, full"):
        docstrings.docstrings(tmp_path, preset="huge")


def test_collection_round_trip_and_rebuild(fake, tmp_path, capfd):
    def prepare():
        return docstrings.docstrings(tmp_path / "data", preset="core")

    collection = prepare()
    assert collection.splits == ("train", "dev", "test")
    passages = list(collection.passages())
    rows = records(read_packages(["fakepkg"]))
    assert [passage._asdict() for passage in passages] == [
        {key: row[key] for key in ("id", "title", "text")} for row in rows["passages"]
    ]
    assert len(passages) == 60
    passage_rows = {passage.id: row for row, passage in enumerate(passages)}
    labels = 0
    for split in collection.splits:
        queries = list(collection.queries(split))
        assert [(query.id, query.text, query.answers) for query in queries] == [
            (row["id"], row["text"], ()) for row in rows[split]
        ]
        query_rows = {query.id: row for row, query in enumerate(queries)}
        query_N, passage_N, relevance_N = check_qrels(
            collection.qrels(split), query_rows, passage_rows, Left()
        )
        assert query_N.tolist() == list(range(len(queries)))
        assert [passages[row].id for row in passage_N] == [
            row["labelled"][0] for row in rows[split]
        ]
        assert (relevance_N == 1).all()
        labels += len(query_N)
    assert labels == 60
    with pytest.raises(InputError, match="no split 'valid'; it has train, dev, test"):
        next(collection.queries("valid"))

    built = sorted((tmp_path / "data").rglob("*.tfrecord*"))
    stamps = [file.stat().st_mtime_ns for file in built]
    assert prepare().fingerprint == collection.fingerprint
    assert [file.stat().st_mtime_ns for file in built] == stamps

    file = fake / "linalg" / "m03.py"
    file.write_bytes(file.read_bytes().replace(b"word7", b"WORD7"))
    changed = prepare()
    assert changed.fingerprint != collection.fingerprint
    assert sum("WORD7" in passage.text for passage in changed.passages()) == 1
    # The first collection still streams what it was built from.
    assert list(collection.passages()) == passages


def test_records_of_the_same_source_differ_only_with_the_version(fake):
    """Old workdirs name their texts by fingerprint: a new digest here needs a new `VERSION`."""
    rows = json.dumps(records(read_packages(["fakepkg"])), sort_keys=True)
    digest = hashlib.sha256(rows.encode()).hexdigest()[:16]
    assert (docstrings.VERSION, digest) == (1, "32610a9b709eadc3")


def test_core_preset():
    selected = select(read_packages(docstrings.PRESETS["core"]))
    rows = records(selected)
    assert {doc.package for doc in selected} == set(docstrings.CORE)
    assert 4000 <= len(rows["passages"]) <= 6000
    assert len(rows["test"]) >= 500
    assert len(rows["train"]) >= 3000
    assert len({row["id"] for row in rows["passages"]}) == len(selected)
    assert len({doc.text for doc in selected}) == len(selected)
    seen = {split: {row["text"].casefold() for row in rows[split]} for split in docstrings.SPLITS}
    assert not seen["train"] & (seen["dev"] | seen["test"])
    assert not seen["dev"] & seen["test"]
    titles = {row["title"] for row in rows["passages"]}
    assert {
        "numpy linalg.norm",
        "numpy arange",
        "numpy ndarray.shape",
        "python json.dumps",
    } <= titles
    packages_of = defaultdict(set)
    for doc in selected:
        packages_of[name_key(doc.name)].add(doc.package)
    # Positives nobody labelled.
    assert sum({"numpy", "jax"} <= packages for packages in packages_of.values()) >= 200
    for row in rows["passages"]:
        assert not re.search(r"\s\s|[\n\t]|^\s|\s$", row["text"])
        assert not re.search(r"\s", row["id"])


@pytest.mark.skipif(
    platform.python_version() != PUBLISHED,
    reason=f"the texts are the installed packages' own; figures are of Python {PUBLISHED}'s",
)
def test_the_texts_that_figures_are_published_for_are_made_from_the_pinned_packages():
    rows = records(select(read_packages(docstrings.CORE)))
    sizes = {split: len(rows[split]) for split in rows}
    assert sizes == {"passages": 4457, "train": 3334, "dev": 444, "test": 679}
    text = json.dumps(rows, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e296a8d32766f2a6"
