"""The hand-written stubs say what the compiled module has: names, parameters, kinds, defaults."""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path

import numpy as np
import pytest

import fq_kernels
from fq_kernels import _kernels
from fq_kernels.formats import roundings

TREE = ast.parse((Path(fq_kernels.__file__).parent / "_kernels.pyi").read_text(encoding="utf-8"))
ALIASES = {
    node.target.id: node.value
    for node in TREE.body
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
}
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}
PUBLIC = [node for node in TREE.body if not getattr(node, "name", "").startswith("_")]
CLASSES = {node.name: node for node in PUBLIC if isinstance(node, ast.ClassDef)}
CONSTANTS = {
    node.target.id: node.annotation
    for node in TREE.body
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.value
}
METHODS = {
    f"{cls.name}.{node.name}": node
    for cls in CLASSES.values()
    for node in cls.body
    if isinstance(node, ast.FunctionDef)
}


def stub_signature(node: ast.FunctionDef) -> list[tuple[str, str, object]]:
    """(name, kind, default) of each parameter, self left out."""
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [inspect.Parameter.empty] * (len(plain) - len(a.defaults)) + [
        ast.literal_eval(d) for d in a.defaults
    ]
    kinds = ["POSITIONAL_ONLY"] * len(a.posonlyargs) + ["POSITIONAL_OR_KEYWORD"] * len(a.args)
    found = list(zip([p.arg for p in plain], kinds, defaults, strict=True))
    if a.vararg:
        found.append((a.vararg.arg, "VAR_POSITIONAL", inspect.Parameter.empty))
    for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        found.append((p.arg, "KEYWORD_ONLY", inspect.Parameter.empty if d is None else ast.literal_eval(d)))
    return [entry for entry in found if entry[0] not in ("self", "cls")]


def compiled_signature(function) -> list[tuple[str, str, object]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, p.default) for p in parameters if p.name not in ("self", "cls")]


def test_public_names_are_the_same():
    own = {
        name
        for name, value in vars(_kernels).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", _kernels.__name__) == _kernels.__name__
    }
    assert own == {*FUNCTIONS, *CLASSES, *CONSTANTS}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_same_parameters(name):
    assert stub_signature(FUNCTIONS[name]) == compiled_signature(getattr(_kernels, name))


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_the_same_parameters(name):
    node = METHODS[name]
    cls, method = name.split(".")
    if node.name == "__init__":
        arguments = {"Executor": {"threads": 1}, "GGUFStrings": {"data": b"", "start": 0, "count": 0}}[cls]
        assert [p[0] for p in stub_signature(node)] == [*arguments]
        getattr(_kernels, cls)(**arguments)
        return
    attribute = inspect.getattr_static(getattr(_kernels, cls), method)
    if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
        assert inspect.isgetsetdescriptor(attribute) or inspect.ismemberdescriptor(attribute)
    elif method == "__call__":  # a slot, which does not say its parameters
        assert [p[0] for p in stub_signature(node)] == ["fn"]
    else:
        function = attribute.__func__ if isinstance(attribute, classmethod) else attribute
        assert stub_signature(node) == compiled_signature(function)


@pytest.mark.parametrize("cls", CLASSES)
def test_public_attributes_of_classes_are_the_same(cls):
    public = {name for name in vars(getattr(_kernels, cls)) if not name.startswith("_")}
    assert public == {m.split(".")[1] for m in METHODS if m.startswith(f"{cls}.") and "._" not in m}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_have_the_types_that_the_stubs_say(name):
    said = ast.unparse(CONSTANTS[name]).split("[")[0]
    assert type(getattr(_kernels, name)).__name__ == said


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_every_parameter_and_result_is_annotated(name):
    node = {**FUNCTIONS, **METHODS}[name]
    a = node.args
    parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else [])]
    assert node.returns is not None
    assert all(p.annotation for p in parameters if p.arg not in ("self", "cls"))


def literals(annotation: ast.expr | None) -> list[str]:
    """What an annotation lets a type checker take; none where it is no Literal."""
    if isinstance(annotation, ast.Name) and annotation.id in ALIASES:
        annotation = ALIASES[annotation.id]
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return [e.value for e in ast.walk(annotation.slice) if isinstance(e, ast.Constant)]
    return []


def test_words_are_literals_in_the_stubs():
    x, found = np.ones((1, 4), np.float32), 0
    for name, node in FUNCTIONS.items():
        for parameter in node.args.kwonlyargs:
            if parameter.arg not in ("point", "rounding"):
                continue
            words = literals(parameter.annotation)
            if parameter.arg == "rounding":
                assert sorted(words) == sorted(roundings("bf16"))
            function = getattr(fq_kernels, name)
            arguments = [x] * (1 + (name == "add_rms_norm_f32"))
            for word in words:
                function(*arguments, **{parameter.arg: word})
            with pytest.raises(ValueError, match="boh"):
                function(*arguments, **{parameter.arg: "boh"})
            found += 1
    assert found == 4


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    import fq

    assert fq_kernels.__version__ == fq.__version__ == version("fq")
    with pytest.raises(AttributeError, match="no attribute '__verson__'"):
        fq_kernels.__verson__  # noqa: B018


def test_the_package_gives_the_kernels_on():
    for name in fq_kernels.__all__:
        assert hasattr(fq_kernels, name)
    assert {*FUNCTIONS, *CLASSES} <= set(fq_kernels.__all__)
