"""The reference pages of the docs site, as Markdown: commands from the parser, Python from docstrings."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from fq.cli import whole_parser
from fq.commands.completion import commands_of

WIDTH = 80  # of usages and signatures, in characters
SPECIAL = re.compile(r"([\\`*_{}\[\]#|~])")
DOCUMENT = re.compile(
    r"docs/([\w/-]+\.md)"
)  # as help texts and docstrings name one, from the repository's root


class MissingDocstring(Exception):
    """A public name of which nothing is said."""


def plain(text: str) -> str:
    """Text that says nothing to Markdown; a document's name becomes a link, ``code`` or `code` stays code."""
    parts = re.split(r"(``.+?``|`.+?`)", " ".join(text.split()))
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"`{part.strip('`')}`"
        else:
            escaped = SPECIAL.sub(r"\\\1", part).replace("&", "&amp;").replace("<", "&lt;")
            parts[i] = DOCUMENT.sub(r"[docs/\1](../\1)", escaped)
    return "".join(parts)


def code(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.strip()}\n```\n"


def indented(text: str) -> str:
    return re.sub(r"^(?=.)", "    ", text, flags=re.M)


# Commands


def commands_page() -> str:
    commands = commands_of(whole_parser())
    lines = ["# Commands", "", "What `fq COMMAND --help` shows, of every command.", ""]
    lines += ["| Command | |", "|---|---|"]
    lines += [f"| [`{c.prog}`](#{anchor(c)}) | {plain(c.description or '')} |" for c in commands]
    return "\n".join([*lines, "", *(command(c) for c in commands)])


def anchor(parser: argparse.ArgumentParser) -> str:
    return parser.prog.replace(" ", "-")


def command(parser: argparse.ArgumentParser) -> str:
    with mock.patch.dict(os.environ, COLUMNS=str(WIDTH), NO_COLOR="1"):
        usage = parser.format_usage()
    lines = [
        f"## `{parser.prog}` {{ #{anchor(parser)} }}",
        "",
        plain(parser.description or ""),
        "",
        code(usage),
    ]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if actions:
            lines += [f"**{(group.title or '').capitalize()}**", ""]
            if group.description:
                lines += [plain(group.description), ""]
            lines += [option(parser, action) for action in actions]
    if parser.epilog:
        lines.append(code(parser.epilog))
    return "\n".join(lines)


def option(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = argparse.HelpFormatter(parser.prog)
    if action.option_strings:
        value = formatter._format_args(action, action.dest.upper()) if action.nargs != 0 else ""
        names = ", ".join(f"`{f'{name} {value}'.strip()}`" for name in action.option_strings)
    else:
        names = f"`{formatter._format_args(action, action.dest)}`"
    return f"{names}\n:   {plain(formatter._expand_help(action))}\n"


# Python


def python_page(module: ModuleType) -> str:
    """What a module's `__all__` names. Raises MissingDocstring where nothing is said of one."""
    name = module.__name__
    lines = [f"# `{name}`", "", blocks((module.__doc__ or "").strip()), "| Name | |", "|---|---|"]
    parts = []
    for public in module.__all__:
        text = documentation(module, public)
        if not text:
            raise MissingDocstring(f"{name}.{public} has no docstring")
        lines.append(f"| [`{public}`](#{name}.{public}) | {plain(summary(text))} |")
        parts.append(f"## `{public}` {{ #{name}.{public} }}\n\n{described(module, public, text)}")
    return "\n".join([*lines, "", *parts])


def documentation(module: ModuleType, name: str) -> str:
    """The docstring, or of a constant the string below it where it is assigned or declared."""
    value = getattr(module, name)
    if callable(value):
        return own_doc(value)
    for tree in (source(module), stub(module.__name__)):
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in assigned(node):
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    return inspect.cleandoc(str(after.value.value))
    return ""


def own_doc(value: Any) -> str:
    """Without the signature that Cython puts before a docstring."""
    value = getattr(value, "func", value) if not inspect.isclass(value) else value  # a cached_property's
    text = inspect.cleandoc(getattr(value, "__doc__", None) or "")
    if getattr(value, "__doc__", None) == type(value).__doc__:
        return ""
    first, _, rest = text.partition("\n")
    called = re.match(r"[\w.]+\(.*\)$", first)
    return rest.strip("\n") if called and not rest.startswith(" ") else text


def summary(text: str) -> str:
    """The first sentence."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[\w)`])\.(?= |$)", paragraph, maxsplit=1)[0].rstrip(":")


def described(module: ModuleType, name: str, text: str) -> str:
    value = getattr(module, name)
    if not callable(value):
        shown = f"{name} = {value!r}"
        return (
            code(shown if len(shown) <= WIDTH else f"{name}: {type(value).__name__}", "python")
            + "\n"
            + blocks(text)
        )
    lines = [code(folded(signature(value, name)), "python"), blocks(text)]
    if inspect.isclass(value):
        for member, held in vars(value).items():
            said = "" if member.startswith("_") or is_field(held) else own_doc(member_of(held))
            if said:
                shown = signature(value, name, member) if callable(member_of(held)) else member
                lines.append(f"`{shown}`\n:   {indented(blocks(said)).lstrip()}")
    return "\n".join(lines)


def is_field(held: Any) -> bool:
    """A default or a place of a value, which the class's docstring speaks of."""
    return not (callable(member_of(held)) or isinstance(held, property) or hasattr(held, "func"))


def member_of(held: Any) -> Any:
    return getattr(held, "__func__", held)


def signature(value: Any, name: str, method: str = "") -> str:
    """How it, or its method, is called."""
    package, _, module = value.__module__.rpartition(".")
    if module == "_kernels":
        found = definitions(stub(package), name, method)
        return stubbed(found[-1], method or name) if found else name
    try:
        called = inspect.signature(member_of(vars(value)[method]) if method else value)
    except ValueError:  # an exception's
        return name
    parameters = [p.replace(annotation=Bare(p.annotation)) if p.annotation is not p.empty else p
                  for p in called.parameters.values()]  # fmt: skip
    if method and parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    returned = called.return_annotation
    text = str(called.replace(parameters=parameters, return_annotation=called.empty))
    return f"{method or name}{text}" + (
        f" -> {Bare(returned)}" if returned not in (called.empty, None, "None") else ""
    )


class Bare:
    """An annotation's text without quotes around it."""

    def __init__(self, annotation: Any):
        self.text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    def __repr__(self) -> str:
        return self.text


def stubbed(found: ast.FunctionDef, name: str) -> str:
    """Without types, which are several for one name, or private ones: the docstring says what is taken."""
    arguments = found.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
        if argument.arg in ("self", "cls"):
            arguments.args.remove(argument)
    return f"{name}({ast.unparse(arguments)})"


def definitions(tree: ast.Module, name: str, method: str) -> list[ast.FunctionDef]:
    """Of a function, of a method, or of how a class is called."""
    found = [node for node in tree.body if getattr(node, "name", "") == name]
    if found and isinstance(found[0], ast.ClassDef):
        found = [node for node in found[0].body if getattr(node, "name", "") == (method or "__init__")]
    return [node for node in found if isinstance(node, ast.FunctionDef)]


def folded(text: str) -> str:
    """A parameter a line, where it is too long for one."""
    if len(text) <= WIDTH:
        return text
    depth, parts, start = 0, [], text.index("(") + 1
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and c == ")":
            parts.append(text[start:i])
            return "\n".join([text[: text.index("(") + 1], *(f"    {p.strip()}," for p in parts), text[i:]])
        if depth == 1 and c == ",":
            parts.append(text[start:i])
            start = i + 1
    return text


def source(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text("utf-8"))


def stub(package: str) -> ast.Module:
    """Of a package's compiled module; empty where it has none."""
    path = Path(str(sys.modules[package].__file__)).with_name("_kernels.pyi")
    return ast.parse(path.read_text("utf-8") if path.exists() else "")


def assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


# Docstrings


def blocks(text: str) -> str:
    """A docstring as Markdown: paragraphs, columns of names and what they are, examples."""
    parts: list[str] = []
    for part in re.split(r"\n(?:[ \t]*\n)+", text):
        if parts and part.startswith("    ") and parts[-1].startswith("    "):
            parts[-1] += f"\n\n{part}"  # an example goes on over blank lines
        else:
            parts.append(part)
    return "\n".join(map(block, parts))


def block(text: str) -> str:
    if text.startswith(">>> "):
        return code(text, "pycon")
    if text.startswith("    "):
        return code(inspect.cleandoc(text), "python")
    names = list(columns(text.splitlines()))
    if names:
        return "\n".join(f"`{name}`\n:   {plain(said)}\n" for name, said in names)
    return plain(text) + "\n"


def columns(lines: list[str]) -> Iterator[tuple[str, str]]:
    """What each name in the first column is; nothing, if these are no two columns."""
    wide = next((m for line in lines if (m := re.match(r"\S.*?  +(?=\S)", line))), None)
    if wide is None:
        return
    at = wide.end()
    found: list[tuple[str, str]] = []
    for line in lines:
        name, said = line[:at].rstrip(), line[at:]
        if not name:
            if not found:
                return
            found[-1] = (found[-1][0], f"{found[-1][1]} {said}")
        elif len(line) <= at or line[at - 1] == " ":
            found.append((name, said))
        elif len(name) == at and " " not in line.replace(", ", ""):
            found.append((line, ""))  # longer than its column: what it is follows below
        else:
            return
    yield from found
