"""Renders the template that stdin has as JSON, and writes what came of it as JSON.

A script, run by chat.py in a process of its own; it imports nothing of this package.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

MAX_ERROR = 300  # characters


def limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def render(template: str, names: dict[str, Any]) -> str:
    """As transformers does it: the same environment, the same names."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks what the assistant says; its text is its body's."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def strftime_now(form: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(template).render(**names)


def answer() -> dict[str, Any]:
    try:
        request = json.load(sys.stdin.buffer)
        limits = request["limits"]
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_CPU, limits["cpu"])
        limit(resource.RLIMIT_AS, limits["memory"])
        sys.path[:] = request["path"]
        text = render(request["template"], json.loads(request["names"]))
    except MemoryError:
        return {"memory": True}
    except BaseException as error:  # a hostile template can raise anything
        try:
            reason = " ".join(str(error)[: 4 * MAX_ERROR].split()) or type(error).__name__
        except MemoryError:
            return {"memory": True}
        return {"error": reason if len(reason) <= MAX_ERROR else reason[: MAX_ERROR - 1] + "…"}
    if len(text) > limits["characters"]:
        return {"error": f"it gives {len(text)} characters, more than {limits['characters']}"}
    return {"text": text}


if __name__ == "__main__":
    json.dump(answer(), sys.stdout)
