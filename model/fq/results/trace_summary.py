"""What a trace says: calls, rows and time per kind of node, norm rows per layer.

The file is untrusted and may be larger than memory: it is read value by value, and what is
kept of it is eight bytes a call.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from fq_kernels.rules import is_norm

from ..arch.graph import Op
from ..errors import FqError
from ..run.trace import EVAL
from ..words import ascii_safe, table

MAX_FILE_BYTES = 2 << 30
MAX_VALUE_CHARS = 1 << 20  # one event; ours have some 250
READ_CHARS = 1 << 16
MAX_LAYERS, MAX_STREAMS, MAX_KINDS = 1024, 16, 64
MAX_DISTINCT = 100  # addresses, and threads, that are told apart in a layer

OPS = frozenset(op.value for op in Op)


# ---------------------------------------------------------------- reading


class _Values:
    """The JSON values of a text, one after the other; raises FqError for what is none."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._text, self._at, self._end = "", 0, False
        self._decoder = json.JSONDecoder(parse_constant=_no_constant)

    def _more(self) -> None:
        part = self._file.read(READ_CHARS)
        self._text, self._at, self._end = self._text[self._at :] + part, 0, not part

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if self._end:
                return ""
            self._more()

    def take(self, *allowed: str) -> str:
        """The next character that is not blank, which must be one of ``allowed``."""
        char = self.peek()
        if char not in allowed:
            found = repr(char) if char else "the end"
            raise FqError(f"not JSON: {found} where {' or '.join(map(repr, allowed))} should be")
        self._at += len(char)
        return char

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # a number at the end of what was read may go on
                if end < len(self._text) or self._end:
                    self._at = end
                    return value
            except RecursionError:
                raise FqError("not a trace: nested too deeply") from None
            except ValueError as e:
                if self._end:
                    what = e.msg if isinstance(e, json.JSONDecodeError) else str(e)
                    raise FqError(f"not JSON, or only its beginning: {what}") from None
            if len(self._text) - self._at > MAX_VALUE_CHARS:
                raise FqError(f"not a trace: a value of more than {MAX_VALUE_CHARS >> 20} MiB, or not JSON")
            self._more()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _events(values: _Values, other: dict[str, Any]) -> Iterator[Any]:
    """The events of either form of a Chrome trace; ``other`` gets what the object form has beside them."""

    def array() -> Iterator[Any]:
        values.take("[")
        if values.peek() == "]":
            values.take("]")
            return
        yield values.value()
        while values.take(",", "]") == ",":
            yield values.value()

    if values.peek() == "[":
        yield from array()
    else:
        values.take("{")
        while True:
            if values.peek() != '"':
                raise FqError("not a trace: a JSON object whose keys cannot be read")
            key = values.value()
            values.take(":")
            if key == "traceEvents" and values.peek() == "[":
                yield from array()
            else:
                value = values.value()
                if key == "otherData" and isinstance(value, dict):
                    other.clear()  # of several the last counts, as JSON has it: all might not fit
                    other.update(value)
            if values.take(",", "}") == "}":
                break
    if values.peek():
        raise FqError(f"not JSON: {values.peek()!r} after its end")


# ---------------------------------------------------------------- summing up


@dataclass
class _Kind:
    rows: int = 0
    rounded: int = 0
    times: array[float] = field(default_factory=lambda: array("d"))  # µs


@dataclass
class _Layer:
    rows: dict[str, int] = field(default_factory=lambda: {"attn_norm": 0, "ffn_norm": 0})
    calls: int = 0
    rounded: int = 0
    pointers: set[str] = field(default_factory=set)
    threads: set[int] = field(default_factory=set)


@dataclass
class _Stream:
    evals: int = 0
    tokens: int = 0
    kinds: dict[str, _Kind] = field(default_factory=dict)
    layers: dict[int, _Layer] = field(default_factory=dict)


def _number(values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    # a bool is an int to Python, and an infinity (1e999) a float
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
        raise FqError(f"{name} must be a number from 0 up, not {_short(value)}")
    return value


def _count(values: dict[str, Any], name: str) -> int:
    value = _number(values, name)
    if not isinstance(value, int):
        raise FqError(f"{name} must be a whole number, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = ascii_safe(repr(value))
    return text if len(text) <= 40 else text[:40] + "…"


def _add(streams: dict[str | None, _Stream], event: Any) -> bool:
    """Count an event; False for one that is none of ours."""
    if not isinstance(event, dict) or event.get("ph") != "X":
        return False
    args, cat = event.get("args"), event.get("cat")
    if not isinstance(args, dict) or not isinstance(cat, str):
        return False
    if not (cat == EVAL and "n_tokens" in args) and not (cat in OPS and args.get("op") == cat):
        return False
    name = args.get("stream")
    if not isinstance(name, str | None) or (name not in streams and len(streams) == MAX_STREAMS):
        raise FqError(f"stream must be a name, and there are at most {MAX_STREAMS}, not {_short(name)}")
    stream = streams.setdefault(name, _Stream())
    duration = float(_number(event, "dur"))
    if cat == EVAL:
        stream.evals += 1
        stream.tokens += _count(args, "n_tokens")
        return True
    rows = _count(args, "rows")
    kind = cat.lower()
    rounded = _count(args, "rows_rounded") if "norm" in args or "rows_rounded" in args else 0
    if "norm" in args:
        kind = str(args["norm"]).partition("[")[0]
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", kind) or not is_norm(kind):
            raise FqError(f"norm must be a norm such as ffn_norm[5], not {_short(args['norm'])}")
        if kind not in stream.kinds and len(stream.kinds) == MAX_KINDS:
            raise FqError(f"there are at most {MAX_KINDS} kinds of norms and ops")
        if "layer" in args:
            _add_to_layer(stream, kind, rows, rounded, event)
    total = stream.kinds.setdefault(kind, _Kind())
    total.rows += rows
    total.rounded += rounded
    total.times.append(duration)
    return True


def _add_to_layer(stream: _Stream, kind: str, rows: int, rounded: int, event: dict[str, Any]) -> None:
    args = event["args"]
    number, pointer, tid = _count(args, "layer"), args.get("data"), _count(event, "tid")
    if number >= MAX_LAYERS:
        raise FqError(f"layer must be below {MAX_LAYERS}, not {number}")
    if not isinstance(pointer, str) or len(pointer) > 18:
        raise FqError(f"data must be an address, not {_short(pointer)}")
    layer = stream.layers.setdefault(number, _Layer())
    layer.rows[kind] = layer.rows.get(kind, 0) + rows
    layer.calls += 1
    layer.rounded += rounded
    if len(layer.pointers) < MAX_DISTINCT:
        layer.pointers.add(pointer)
    if len(layer.threads) < MAX_DISTINCT:
        layer.threads.add(tid)


def summarise(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A trace's figures, as ``fq trace --json`` prints them. Times are in microseconds.

    Takes either form of a Chrome trace whose events have the args of `run.trace`; events
    without them are counted as foreign_events. Raises FqError naming the file for one that is
    no such trace, is cut off, or is larger than 2 GiB.
    """
    streams: dict[str | None, _Stream] = {}
    other: dict[str, Any] = {}
    ours = foreign = n = 0
    with open(path, encoding="utf-8-sig") as file:
        if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
            raise FqError(f"{path}: larger than {MAX_FILE_BYTES >> 30} GiB")
        try:
            for event in _events(_Values(file), other):
                n += 1
                if _add(streams, event):
                    ours += 1
                elif not (isinstance(event, dict) and event.get("ph") == "M"):
                    foreign += 1
        except UnicodeDecodeError:
            raise FqError(f"{path}: not a trace: not UTF-8") from None
        except FqError as e:
            raise FqError(f"{path}: after {n} events: {e}") from None
    if not ours:
        raise FqError(f"{path}: no event of fq among its {n}")
    return {
        "trace": os.fspath(path),
        "about": other,
        "events": ours,
        "foreign_events": foreign,
        "streams": [_stream_data(name, stream) for name, stream in streams.items()],
    }


def _stream_data(name: str | None, stream: _Stream) -> dict[str, Any]:
    times = {kind: np.frombuffer(total.times) for kind, total in stream.kinds.items()}
    node_us = sum(float(t.sum()) for t in times.values())
    kinds = [
        {
            "kind": kind,
            "calls": len(times[kind]),
            "rows": total.rows,
            "rows_rounded": total.rounded,
            "total_us": float(times[kind].sum()),
            "median_us": float(np.median(times[kind])),
            "share": float(times[kind].sum()) / node_us if node_us else 0.0,
        }
        for kind, total in stream.kinds.items()
    ]
    data: dict[str, Any] = {
        "stream": name,
        "evals": stream.evals,
        "tokens": stream.tokens,
        "kinds": sorted(kinds, key=lambda k: -float(k["total_us"])),
        "layers": [
            {
                "layer": number,
                **{f"{kind}_rows": rows for kind, rows in layer.rows.items()},
                "rows": sum(layer.rows.values()),
                "rows_rounded": layer.rounded,
                "calls": layer.calls,
                "pointers": sorted(layer.pointers),
                "threads": sorted(layer.threads),
            }
            for number, layer in sorted(stream.layers.items())
        ],
    }
    data["explanation"] = _explanation(data["layers"])
    return data


def _explanation(layers: list[dict[str, Any]]) -> str | None:
    """Why a counter inside the kernel finds so many "calls" per layer; None for another pattern."""
    if len(layers) < 2:
        return None
    first, last = layers[0], layers[-1]

    def counts(layer: dict[str, Any]) -> tuple[int, int, int]:
        return layer["attn_norm_rows"], layer["ffn_norm_rows"], layer["calls"]

    if any(counts(layer) != counts(first) for layer in layers[:-1]) or not first["ffn_norm_rows"]:
        return None
    attn, ffn, calls = counts(first)
    pointers = max(len(layer["pointers"]) for layer in layers)
    lines = [
        f"Each layer has {attn + ffn} norm rows = {attn} attn_norm + {ffn} ffn_norm, one per token and norm,"
        f" in {calls} kernel calls.",
    ]
    if counts(last) != counts(first):
        lines.append(
            f"The last layer has {last['rows']} = {last['attn_norm_rows']} + {last['ffn_norm_rows']}: "
            "its ffn_norm sees only the rows whose logits are wanted."
        )
    lines.append(
        f'A counter inside the kernel\'s loop over rows counts these {attn + ffn} rows as "calls" of the'
        " layer (as the report's 30 were: 14 tokens of prompt and 1 decoded, 15 + 15)."
    )
    lines.append(
        "They are no chunks of one tensor: a call writes its rows side by side in one buffer, whose address"
        " they share, and buffers are used again: "
        f"{pointers} address{'es' if pointers > 1 else ''} for the {calls} calls of a layer here."
    )
    return " ".join(lines)


# ---------------------------------------------------------------- text


def summary_text(data: dict[str, Any]) -> str:
    about = data["about"]
    rules = about.get("rules")
    lines = [f"trace    {data['trace']}: {data['events']} events" + _foreign(data["foreign_events"])]
    for name in ("model", "fq", "isa", "threads"):
        if name in about:
            lines.append(f"{name:9}{_short_text(about[name])}")
    lines += [f"rule     {_short_text(rule)}" for rule in rules] if isinstance(rules, list) else []
    for stream in data["streams"]:
        lines += ["", *_stream_lines(stream)]
    return "\n".join(lines)


def _foreign(n: int) -> str:
    return f", and {n} of another program" if n else ""


def _short_text(value: Any) -> str:
    return ascii_safe(str(value))[:96]


def _stream_lines(stream: dict[str, Any]) -> list[str]:
    name = "" if stream["stream"] is None else f"{_short_text(stream['stream'])}: "
    kinds = [["node", "calls", "rows", "rounded", "total ms", "median µs", "share"]]
    for k in stream["kinds"]:
        norm = is_norm(k["kind"]) or k["rows_rounded"]
        kinds.append(
            [
                k["kind"],
                str(k["calls"]),
                str(k["rows"]),
                str(k["rows_rounded"]) if norm else "",
                f"{k['total_us'] / 1e3:.2f}",
                f"{k['median_us']:.1f}",
                f"{100 * k['share']:.1f} %",
            ]
        )
    lines = [f"{name}{stream['evals']} evaluations, {stream['tokens']} tokens", ""]
    lines += [table(kinds, set(range(1, 7))), ""]
    keys = dict.fromkeys(key for layer in stream["layers"] for key in layer)
    of_kinds = [key for key in keys if key.endswith("norm_rows")]
    layers = [["layer", *(key.replace("_rows", " rows") for key in of_kinds)]]
    layers[0] += ["rows", "rounded", "addresses", "threads"]
    for layer in stream["layers"]:
        layers.append(
            [
                str(layer["layer"]),
                *(str(layer.get(key, 0)) for key in (*of_kinds, "rows", "rows_rounded")),
                str(len(layer["pointers"])),
                str(len(layer["threads"])),
            ]
        )
    if len(layers) > 1:
        total = sum(layer["rows"] for layer in stream["layers"])
        lines += [table(layers, set(range(len(layers[0])))), f"norm rows in the layers: {total}"]
    if stream["explanation"]:
        lines += ["", stream["explanation"]]
    return lines
