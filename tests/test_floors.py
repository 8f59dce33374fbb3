"""The floors: no module imports one above it, and fq_kernels nothing but numpy.

By the import statements, wherever they stand: in functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"fq_kernels": ROOT / "fq_kernels", "fq": ROOT / "model" / "fq"}
PACKAGE = "fq_kernels"
KERNELS = "fq_kernels._kernels"
ALLOWED = {PACKAGE, "numpy", *sys.stdlib_module_names}

# The kernels take a format by its name, and some formats are rounded by a kernel. One of the two must
# import the other when it is called: it is these, so that the kernels find the formats' table complete.
LATE = {("fq_kernels.formats.format", KERNELS), ("fq_kernels.formats.narrow_floats", KERNELS)}

# The rooms of fq, each on its floor: it imports what is below, and no other of its floor.
FLOORS = (
    {"errors", "machine", "provenance", "words"},
    {"gguf", "text"},
    {"arch"},
    {"run"},
    {"measure"},
    {"results"},
    {"cluster", "replicate", "report"},
    {"commands"},
    {"cli", "lm_eval"},
    {"__main__"},
)

CYTHON_IMPORT = re.compile(r"^[ \t]*((?:from [\w.]+ )?import (?:\([^)]*\)|[^(\n#]+))", re.M)


class Import(NamedTuple):
    module: str  # that has the statement
    name: str  # absolute: of a module, or of something in one
    late: bool  # made when a function is called


def name_of(path: Path) -> str:
    source = next(folder for folder in SOURCES.values() if folder in path.parents)
    parts = path.relative_to(source.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_imports(path: Path) -> Iterator[Import]:
    module = name_of(path)
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    in_functions = {id(n) for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in names(node, package):
                yield Import(module, name, id(node) in in_functions)


def cython_imports(path: Path) -> Iterator[Import]:
    """Of the compiled module, which Python's parser does not read: its statements are, one by one."""
    for statement in CYTHON_IMPORT.findall(path.read_text(encoding="utf-8")):
        (node,) = ast.parse(statement.strip()).body
        assert isinstance(node, ast.Import | ast.ImportFrom)
        for name in names(node, PACKAGE):
            yield Import(KERNELS, name, False)


def names(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Absolute names of what is imported."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parents = package.split(".")
    start = parents[: len(parents) - node.level + 1] if node.level else []
    return [".".join(filter(None, [*start, node.module, alias.name])) for alias in node.names]


PATHS = [path for folder in SOURCES.values() for path in folder.rglob("*.py")]


def all_imports() -> list[Import]:
    found = [i for path in PATHS for i in python_imports(path)]
    sources = [*(ROOT / PACKAGE).glob("*.pyx"), *(ROOT / PACKAGE).glob("*.pxi")]
    return found + [i for path in sources for i in cython_imports(path)]


MODULES = {name_of(path) for path in PATHS} | {KERNELS}
IMPORTS = all_imports()


def module_of(name: str) -> str:
    """The module of the package that ``name`` is, or is in."""
    return name if name in MODULES else module_of(name.rpartition(".")[0])


# What a module's own package runs before it is not counted: its __init__ imports what stands in it.
EDGES = {(i.module, module_of(i.name), i.late) for i in IMPORTS if i.name.split(".")[0] in SOURCES}


def test_no_import_circle():
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, imported, late in EDGES:
        if not (late and (module, imported) in LATE):
            graph[module].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" imports ".join(reversed(e.args[1])))  # each comes after what it imports


def test_what_is_imported_late_still_is():
    assert {(module, imported, True) for module, imported in LATE} <= EDGES


def test_nothing_but_numpy_is_imported():
    ours = [i for i in IMPORTS if i.module.split(".")[0] == PACKAGE]
    assert {(i.module, i.name) for i in ours if i.name.split(".")[0] not in ALLOWED} == set()


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_no_import_upwards():
    floor_of = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    # the package's own module lists what users import, from all rooms
    inner = [(a, b) for a, b, _ in EDGES if a.startswith("fq.") and b.startswith("fq.")]
    assert {room_of(module) for edge in inner for module in edge} <= set(floor_of)
    upwards = [
        f"{a} imports {b}"
        for a, b in sorted(inner)
        if room_of(a) != room_of(b) and floor_of[room_of(a)] <= floor_of[room_of(b)]
    ]
    assert upwards == []
    assert not any(b == "fq" for a, b, _ in EDGES if a != "fq")


def test_all_statements_are_seen():
    """Of each kind one that there is."""
    assert ("fq_kernels", KERNELS, False) in EDGES
    assert (KERNELS, "fq_kernels.formats", False) in EDGES
    assert ("fq_kernels.formats.registry", "fq_kernels.formats.integers", False) in EDGES
    assert ("fq_kernels.rules.counter", "fq_kernels.formats", False) in EDGES
    assert Import("fq_kernels.formats.registry", "difflib", True) in IMPORTS
    assert Import(KERNELS, "threading", False) in IMPORTS
    assert ("fq.run.context", "fq.arch.ops", False) in EDGES and ("fq.cli", "fq.words", True) in EDGES
