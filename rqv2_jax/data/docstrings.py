"""The embedded dataset: documentation of installed packages, read from their sources with `ast`.

A docstring's first paragraph is the query, the rest its one labelled passage, the title the package
and the public name. Nothing read is imported, nothing is downloaded. The same function documented
by several libraries stays in: an unlabelled positive.
"""

import ast
import gc
import hashlib
import importlib.util
import inspect
import itertools
import platform
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from rqv2_jax.data import prepared
from rqv2_jax.data.collection import Collection
from rqv2_jax.errors import InputError

STDLIB = "python"
CORE: tuple[str, ...] = ("numpy", "jax", "flax", "optax", "orbax", "ml_collections", "absl")
CORE += ("etils", "tensorflow_datasets", STDLIB)
FULL: tuple[str, ...] = (*CORE, "scipy", "tensorflow", "keras", "transformers", "huggingface_hub")
FULL += ("tensorboard", "pydantic", "grpc", "rich", "treescope", "fsspec", "werkzeug", "PIL")
FULL += ("anyio", "optree", "click", "pyarrow")
PRESETS = {"core": CORE, "full": FULL}
SPLITS = ("train", "dev", "test")

# Raised when other records are made of the same source files: it is a part of the fingerprint.
VERSION = 1

# Share of the function names, by hash: train below the first bound, dev below the second.
TRAIN_BELOW, DEV_BELOW = 0.75, 0.85
MIN_QUERY_WORDS, MAX_QUERY_WORDS, MIN_PASSAGE_WORDS = 4, 40, 30

# Tests, copies of other projects, re-exports, generated wrappers, and what is no library.
SKIPPED = re.compile(
    r"(^|[/_])(conftest|tests?)([/_.])"
    r"|(^|/)(_?vendor(ed)?|third_party|externals?|site-packages|dist-packages|include)/"
    r"|^(numpy/_pyinstaller|keras/_tf_keras|tensorflow/(_api|python/keras)|tensorboard/compat"
    r"|pydantic/v1)/"
    r"|^tensorflow/python/ops/gen_\w+_ops\.py$|^scipy/_lib/array_api_(compat|extra)/"
    r"|^python/(config-[^/]*|ensurepip|idlelib|lib2to3|pydoc_data|turtledemo)/"
)
# Folders that hold the source without being part of a name a user types.
UNNAMED_FOLDERS = {"_src", "src", "lib", "python"}
EXPORTERS = {"keras_export", "tf_export"}
# A line scipy fills in when it is imported.
TEMPLATE_LINE = re.compile(r"^\s*%\(\w+\)s\s*$", re.MULTILINE)
SIGNATURE = re.compile(r"[\w.]+\(.*\)( ?->.*)?( --)?")
# First paragraphs that describe nothing: section headings, argument lists, code, markup, notices.
NO_PROSE = re.compile(
    r"^(args|arguments|attributes|examples?|inputs?|notes?|outputs?|parameters|raises|returns?"
    r"|usage|yields) *(:|-{3})|^\W*[\w*, ]+ \(\[?`|>>>|```|-{3}|={3}|\.\. \w+|:param|:$"
    r"|\bdeprecated\b",
    re.IGNORECASE,
)


class Doc(NamedTuple):
    """One documented function, class or method; `name` is its public name inside `package`."""

    package: str
    name: str
    query: str
    text: str


def source_files(package: str) -> dict[str, Path]:
    """Returns a package's files by `package/relative/path.py`; InputError if not installed."""
    if package == STDLIB:
        roots = [sysconfig.get_path("stdlib")]
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise InputError(
                f"{package}: this package is not installed, its documentation is part of the"
                " dataset; run `pip install -r requirements.txt`"
            )
        roots = spec.submodule_search_locations
    files = {
        f"{package}/{file.relative_to(root).as_posix()}": file
        for root in roots
        for file in Path(root).rglob("*.py")
    }
    return {path: files[path] for path in sorted(files) if not SKIPPED.search(path)}


def read_docs(path: str, source: bytes) -> Iterator[Doc]:
    """Yields what the source of `path` (`package/relative/path.py`) documents, in its order.

    Only public names, and docstrings with 4 to 40 words of prose in the first paragraph and 30 words
    or more after it. White space is normalised to single blanks.
    """
    if b'"""' not in source and b"'''" not in source:
        return
    with warnings.catch_warnings(action="ignore"):
        try:
            tree = ast.parse(source)
        except SyntaxError:
            # Packages ship code for other Python versions.
            return
    package, *folders, stem = path.removesuffix(".py").split("/")
    module = [part for part in (*folders, stem) if part not in UNNAMED_FOLDERS]
    for name, docstring in _documented(tree.body, _public(module)):
        query, text = _query_and_text(docstring)
        if (
            MIN_QUERY_WORDS <= len(query.split()) <= MAX_QUERY_WORDS
            and len(text.split()) >= MIN_PASSAGE_WORDS
            and not NO_PROSE.search(query)
        ):
            yield Doc(package, name.removeprefix(f"{package}."), query, text)


def read_packages(packages: Iterable[str]) -> list[Doc]:
    """Reads all docs of the installed packages, in the order of `packages` and of sorted paths."""
    # Syntax trees hold no cycles, and looking for some takes half the time.
    gc.disable()
    try:
        return [
            doc
            for package in packages
            for path, file in source_files(package).items()
            for doc in read_docs(path, file.read_bytes())
        ]
    finally:
        gc.enable()


def select(docs: Iterable[Doc]) -> list[Doc]:
    """Selects one doc per passage text and per package and query; no query fits several names.

    The first of equal docs is kept. A query shared by functions of different names is boilerplate, or
    asks for any of them: all its docs are dropped. Under one name one doc per package is kept.
    """
    by_text: dict[str, Doc] = {}
    for doc in docs:
        by_text.setdefault(doc.text, doc)
    by_query = defaultdict(list)
    for doc in by_text.values():
        by_query[doc.query.casefold()].append(doc)
    selected: list[Doc] = []
    for same_query in by_query.values():
        if len({name_key(doc.name) for doc in same_query}) == 1:
            by_package = {doc.package: doc for doc in reversed(same_query)}
            selected.extend(reversed(by_package.values()))
    return selected


def name_key(name: str) -> str:
    """Returns what namesakes share: the last part, without case, underscores and version suffix."""
    last = name.rsplit(".", 1)[-1].lower()
    return re.sub(r"_v\d+$", "", last).replace("_", "")


def split_of(name: str) -> str:
    """Returns train (75%), dev (10%) or test (15%) by a hash of the name's key, so of namesakes.

    A query text belongs to one name key after `select`, so none is in two splits.
    """
    position = int(_digest(name_key(name))[:13], 16) / 16**13
    return "train" if position < TRAIN_BELOW else "dev" if position < DEV_BELOW else "test"


def records(docs: Iterable[Doc]) -> dict[str, list[dict]]:
    """Returns the rows of splits `passages`, `train`, `dev` and `test`, as `prepared` has them.

    Passages and queries are each shuffled by a hash, so neither order tells anything of the other.
    """
    passages, queries = [], defaultdict(list)
    copies: Counter[str] = Counter()
    for doc in docs:
        passage_id = f"{doc.package}:{doc.name}"
        copies[passage_id] += 1
        if copies[passage_id] > 1:
            passage_id += f"~{copies[passage_id]}"
        title = f"{doc.package} {doc.name}"
        passages.append(prepared.row(passage_id, title, doc.text))
        query = prepared.row(f"query:{passage_id}", "", doc.query, [(passage_id, 1)])
        queries[split_of(doc.name)].append(query)
    rows = {"passages": passages} | {split: queries[split] for split in SPLITS}
    return {split: sorted(rows[split], key=lambda row: _digest(row["id"])) for split in rows}


class Docstrings(prepared.Builder):
    """Documentation of installed packages; a query is a docstring's first paragraph."""

    VERSION = tfds.core.Version("1.0.0")
    # Never raised: `docstrings` keeps each state in a folder of its own, named by its fingerprint.
    BUILDER_CONFIGS = tuple(
        tfds.core.BuilderConfig(name=preset, description=f"Documentation of {', '.join(packages)}.")
        for preset, packages in PRESETS.items()
    )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        splits = records(select(read_packages(PRESETS[self.builder_config.name])))
        return {split: self._generate_examples(rows.__iter__) for split, rows in splits.items()}


def docstrings(data_dir: str | Path, *, preset: str) -> Collection:
    """Returns the embedded collection, prepared below `data_dir` unless it is there already.

    `preset` is a key of `PRESETS`. The fingerprint hashes every source file that would be read, the
    Python version and `VERSION`, and names the folder: another package version is another set.
    """
    if preset not in PRESETS:
        raise InputError(f"docstrings: no preset {preset!r}; choose from {', '.join(PRESETS)}")
    fingerprint = _fingerprint(preset)
    builder = Docstrings(data_dir=Path(data_dir) / fingerprint[:16], config=preset)
    prepared.prepare(builder)
    return prepared.collection(builder, name=f"docstrings/{preset}", fingerprint=fingerprint)


def _documented(body: list[ast.stmt], prefix: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (dotted public name, docstring) of the public definitions in `body` and its classes."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names = _names(node, prefix)
                if names is None:
                    continue
                yield ".".join(names), ast.get_docstring(node) or ""
                if isinstance(node, ast.ClassDef):
                    yield from _documented(node.body, names)
            case ast.If() | ast.Try():
                yield from _documented([*node.body, *node.orelse], prefix)
            case ast.Expr(ast.Call(func=ast.Name("add_newdoc"), args=args)):
                yield from _added_docs(args, prefix)


def _names(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, prefix: list[str]
) -> list[str] | None:
    """Returns the parts of a definition's public name; None for what is private or deprecated."""
    names = [*prefix, node.name]
    for decorator in node.decorator_list:
        function = decorator.func if isinstance(decorator, ast.Call) else decorator
        kind = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if kind == "deprecated":
            return None
        if kind in EXPORTERS and isinstance(decorator, ast.Call):
            if not decorator.args:
                # tf_export(v1=[...]): a name of TensorFlow 1 only.
                return None
            match decorator.args[0]:
                case ast.Constant(str(name)) | ast.List([ast.Constant(str(name)), *_]):
                    names = name.split(".")
    return names if _is_public(names) else None


def _added_docs(args: list[ast.expr], prefix: list[str]) -> Iterator[tuple[str, str]]:
    """Yields docs of `add_newdoc([module,] name, doc | (attribute, doc) | [(attribute, doc), ...])`."""
    match args:
        case [ast.Constant(str(module)), ast.Constant(str(name)), doc]:
            owner = [*_public(module.split(".")[1:]), name]
        case [ast.Constant(str(name)), doc]:
            owner = [*prefix, name]
        case _:
            return
    for entry in doc.elts if isinstance(doc, ast.List) else [doc]:
        match entry:
            case ast.Constant(str(text)):
                names = owner
            case ast.Tuple([ast.Constant(str(attribute)), ast.Constant(str(text))]):
                names = [*owner, attribute]
            case _:
                continue
        if _is_public(names):
            yield ".".join(names), inspect.cleandoc(text)


def _is_public(names: list[str]) -> bool:
    return not any(name.startswith("_") for name in names)


def _public(parts: list[str]) -> list[str]:
    """Returns the parts before the first private one: what it defines is exported above it."""
    return list(itertools.takewhile(lambda part: not part.startswith("_"), parts))


def _query_and_text(docstring: str) -> tuple[str, str]:
    """Returns the first paragraph that is no signature, and all after it, on one line each."""
    docstring = TEMPLATE_LINE.sub("", docstring).strip()
    first, *rest = (" ".join(each.split()) for each in re.split(r"\n\s*\n", docstring))
    while rest and SIGNATURE.fullmatch(first):
        first, *rest = rest
    return first, " ".join(rest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(preset: str) -> str:
    total = hashlib.sha256(f"{VERSION} {preset} {platform.python_version()}\n".encode())
    for package in PRESETS[preset]:
        for path, file in source_files(package).items():
            total.update(f"{path} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
