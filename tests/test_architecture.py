"""What the package's source must keep to: layers, who imports what, sizes, docstrings.

An exception to a size has a comment `# size: why` beside the function's head, or above the file's first
import. The rules are functions of `{module: source}`, so that tests can show each of them a fault.
"""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From the top; a module imports from its own layer and from those below.
LAYERS = (
    (
        *("main", "evaluate", "search", "check", "plan", "export", "ablations", "report", "bench"),
        "convert",
    ),
    *(
        ("program",),
        ("tools",),
        ("recipe",),
        ("config", "config_check"),
        ("retrieval",),
        ("training",),
    ),
    *(
        ("models",),
        ("ranking",),
        ("data",),
        ("optional", "artifacts", "disk", "room", "hosts", "stopping", "errors"),
    ),
)
WITHOUT_JAX = ("data", "ranking")
ALONE = ("orbax", "flax.linen", "scann", "jax.distributed")
MOST_LINES, MOST_BODY, MOST_PARAMETERS = 350, 50, 8
WHY = re.compile(r"# size: \w+")
# Ends in s and is no verb.
NO_VERB = ("This", "Its", "As", "Whose", "Always", "Less", "Unless")


def sources():
    """{module, without rqv2_jax in front: source} of the whole package."""
    package = ROOT / "rqv2_jax"
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path.read_text()
    return found


@pytest.fixture(scope="module")
def package():
    return sources()


@functools.cache
def imports(source):
    """Names of all modules, and of what is imported from them, that a source may load."""
    return frozenset(_imports(ast.parse(source)))


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("optional.load", "load"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)
        elif isinstance(node, ast.Attribute):
            # jax.distributed needs no import of its own.
            yield ast.unparse(node) if isinstance(node.value, ast.Name) else ""


def own_imports(source, modules):
    """Which of the package's modules a source imports."""
    for name in imports(source):
        while name.startswith("rqv2_jax."):
            inner = name.removeprefix("rqv2_jax.")
            if inner in modules:
                yield inner
                break
            name = name.rpartition(".")[0]


def layer(module):
    """The number of a module's layer; 0 is the top. The package itself imports nothing."""
    head = module.partition(".")[0]
    (number,) = (i for i, names in enumerate(LAYERS) if head in names)
    return number


def upward_imports(modules):
    return [
        f"{module} imports {imported}"
        for module, source in modules.items()
        for imported in own_imports(source, modules)
        if not module or layer(imported) < layer(module)
    ]


def reaches_jax(modules):
    """Modules of `data` and `ranking` from which jax is reached, by whatever way."""

    def reached(module, seen):
        if module in seen:
            return False
        seen.add(module)
        names = set(imports(modules[module]))
        return any(name.partition(".")[0] in ("jax", "jaxlib", "flax") for name in names) or any(
            reached(other, seen) for other in own_imports(modules[module], modules)
        )

    return [m for m in modules if m.partition(".")[0] in WITHOUT_JAX and reached(m, set())]


def importers(modules, library):
    found = re.compile(rf"{re.escape(library)}(\.|$)")
    return [m for m, source in modules.items() if any(map(found.match, imports(source)))]


def plain_lines(node):
    """Lines beyond the first of containers in which nothing is computed."""
    plain = (ast.Constant, ast.Name, ast.Attribute, ast.Starred, ast.UnaryOp, ast.unaryop)
    containers = (ast.Dict, ast.List, ast.Tuple, ast.Set)
    if isinstance(node, containers) and all(
        isinstance(each, (*plain, *containers, ast.expr_context)) for each in ast.walk(node)
    ):
        return node.end_lineno - node.lineno
    return sum(map(plain_lines, ast.iter_child_nodes(node)))


def functions(source):
    """(function, whether a comment beside its head explains its size) for each."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            above = lines[first - 2] if first > 1 else ""
            head = lines[first - 1 : max(node.lineno, node.body[0].lineno - 1)]
            beside = head + [above] * above.lstrip().startswith("#")
            yield node, any(map(WHY.search, beside))


def body_lines(node):
    documented = ast.get_docstring(node) is not None
    body = node.body[documented:]
    if not body:
        return 0
    return node.end_lineno - body[0].lineno + 1 - sum(map(plain_lines, body))


def parameters(node):
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([each for each in named if each.arg not in ("self", "cls")])


def too_large(modules):
    """`place: what is too large` of each fault."""
    faults = []
    for module, source in modules.items():
        lines = len(source.splitlines())
        head = re.split(r"^(?:import|from) ", source, maxsplit=1, flags=re.MULTILINE)[0]
        if lines > MOST_LINES and not WHY.search(head):
            faults.append(f"{module}: {lines} lines")
        for node, explained in functions(source):
            place = f"{module}.{node.name}, line {node.lineno}"
            body, given = body_lines(node), parameters(node)
            if not explained and body > MOST_BODY:
                faults.append(f"{place}: a body of {body} lines")
            if not explained and given > MOST_PARAMETERS:
                faults.append(f"{place}: {given} parameters")
    return faults


def poor_docstrings(modules):
    faults = []
    for module, source in modules.items():
        for node in ast.walk(ast.parse(source)):
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
            doc = ast.get_docstring(node) if isinstance(node, kinds) else None
            if doc is None:
                continue
            first = re.match(r"\w*", doc)[0]
            is_function = not isinstance(node, ast.ClassDef | ast.Module)
            verb = re.fullmatch(r"[A-Z][a-z]*s", first) and first not in NO_VERB
            if first == "Of" or (is_function and not verb):
                faults.append(f"{module}.{getattr(node, 'name', '')}: {doc.splitlines()[0]}")
    return faults


def test_every_module_has_a_layer(package):
    unplaced = {m.partition(".")[0] for m in package} - {"", *(n for ns in LAYERS for n in ns)}
    assert not unplaced


@pytest.mark.parametrize("rule", [upward_imports, reaches_jax, too_large, poor_docstrings])
def test_the_package_keeps_to_every_rule(package, rule):
    faults = rule(package)
    assert not faults, "\n".join(faults)


def test_data_and_ranking_run_where_there_is_no_jax(package):
    """Nor do the libraries that they import bring it along."""
    names = sorted(m for m in package if m.partition(".")[0] in WITHOUT_JAX)
    program = (
        "import importlib, sys\nfor name in ('jax', 'jaxlib', 'flax'): sys.modules[name] = None\n"
    )
    program += "".join(f"importlib.import_module('rqv2_jax.{name}')\n" for name in names)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("library", ALONE)
def test_one_module_imports_it(package, library):
    assert len(importers(package, library)) == 1, importers(package, library)


def test_exceptions_to_sizes_are_needed(package):
    without = {module: WHY.sub("#", source) for module, source in package.items()}
    large, unexplained = (
        {fault.rpartition(": ")[0] for fault in too_large(modules)}
        for modules in (without, package)
    )
    explained = sum(len(WHY.findall(source)) for source in package.values())
    assert explained == len(large - unexplained)


LONG = "def f():\n    x = 0\n" + "    x += 1\n" * 50
DATA = "def f():\n    x = [\n" + "        1,\n" * 60 + "    ]\n    return x\n"
MANY = "def f({}):\n    pass\n"


@pytest.mark.parametrize(
    ("rule", "modules"),
    [
        (upward_imports, {"data.lists": "from rqv2_jax.models import losses", "models.losses": ""}),
        (upward_imports, {"models.bert": "def f():\n    import rqv2_jax.config", "config": ""}),
        (upward_imports, {"hosts": "from rqv2_jax.data.lists import draw", "data.lists": ""}),
        (upward_imports, {"tools.hlo": "from rqv2_jax import program", "program": ""}),
        (upward_imports, {"": "from rqv2_jax import errors", "errors": ""}),
        (reaches_jax, {"data.lists": "import jax.numpy as jnp"}),
        (reaches_jax, {"ranking.metrics": "def f():\n    from jax import lax"}),
        (reaches_jax, {"data.a": "from rqv2_jax import hosts", "hosts": "import jax"}),
        (too_large, {"a": LONG}),
        (too_large, {"a": DATA.replace("1,", "int(),")}),
        (too_large, {"a": "x = 0\n" * 351}),
        (too_large, {"a": MANY.format("a, b, c, d, e, f, g, *, h, i")}),
        (too_large, {"a": f"x = 0  # size: of another\n{LONG}"}),
        (too_large, {"a": f"# size:\n{LONG}"}),
        (poor_docstrings, {"a": 'def f():\n    """The rows."""\n'}),
        (poor_docstrings, {"a": 'def f():\n    """This gives rows."""\n'}),
        (poor_docstrings, {"a": 'class A:\n    def f(self):\n        """Whether it does."""\n'}),
        (poor_docstrings, {"a": 'class A:\n    """Of a row."""\n'}),
        (poor_docstrings, {"a": '"""Of rows."""\n'}),
    ],
)
def test_a_fault_is_seen(rule, modules):
    assert len(rule(modules)) == 1


@pytest.mark.parametrize(
    ("rule", "modules"),
    [
        (upward_imports, {"models.bert": "from rqv2_jax.data import lists", "data.lists": ""}),
        (upward_imports, {"data.a": "from rqv2_jax.data import b", "data.b": "", "data": ""}),
        (
            reaches_jax,
            {"data.a": "from rqv2_jax import errors", "errors": "", "hosts": "import jax"},
        ),
        (too_large, {"a": LONG.replace("    x += 1\n", "", 1)}),
        (too_large, {"a": DATA}),
        (too_large, {"a": f"# size: a table of cases\n{LONG}"}),
        (too_large, {"a": "# size: one table\nimport os\n" + "x = 0\n" * 351}),
        (too_large, {"a": MANY.format("self, a, b, c, d, e, f, g, h")}),
        (poor_docstrings, {"a": '"""Rows."""\ndef f():\n    """Returns rows."""\ndef g(): pass\n'}),
    ],
)
def test_what_is_allowed_is_not_taken_for_a_fault(rule, modules):
    assert not rule(modules)


def test_importers_are_found_however_they_import():
    modules = {
        "a": "from flax import linen as nn",
        "b": "import flax.linen as nn",
        "c": "from flax.linen import Module",
        "d": "import flax",
        "e": "optional.load('scann', 'it')",
        "f": "jax.distributed.initialize()",
    }
    assert importers(modules, "flax.linen") == ["a", "b", "c"]
    assert importers(modules, "scann") == ["e"]
    assert importers(modules, "jax.distributed") == ["f"]


def test_the_page_of_the_architecture_names_every_module(package):
    page = (ROOT / "docs" / "architecture.md").read_text()
    folder, named = "", set()
    for line in page.splitlines():
        if line.startswith("### "):
            name = line.removeprefix("### ")
            folder = name.replace("/", ".") if name.endswith("/") else ""
        elif match := re.match(r"\| `(\w+)` \|", line):
            named.add(folder + match[1])
    kept = {module for module in package if (ROOT / "rqv2_jax" / module.replace(".", "/")).is_dir()}
    assert named == set(package) - kept - {""}
