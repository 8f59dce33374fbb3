"""One event per kernel call, as Chrome trace JSON: chrome://tracing and Perfetto open it.

The file is the format's object form: ``displayTimeUnit``, ``otherData`` (what ran) and
``traceEvents``, one event a line, written as the calls end. All but the names of processes and
threads are complete events (ph "X"), times in microseconds since the trace began:

- ``cat`` an op (``MUL_MAT``): one node of the graph, under llama.cpp's name (``ffn_norm-5``).
  args: op, rows (of the result), data (address of the result's first row), layer; for a norm
  also norm (``ffn_norm[5]``); for a norm, and where a rule takes a site, rounded, rows_rounded, and
  sites, those that a rule takes: {site, format, rows_rounded}
- ``cat`` ``eval``: one evaluation of the graph, around its nodes.
  args: n_tokens, n_outputs, n_past

Labels (stream, chunk) join the args of either. The tid is the operating system's number of the
thread that made the call; an executor's other threads may have worked on its rows.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import threading
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from fq_kernels import Executor, isa
from fq_kernels.rules import FakeQuant

from ..arch.graph import Node
from ..errors import FqError
from ..machine import package_version

if TYPE_CHECKING:
    from .model import Model

EVAL = "eval"
_END = b"\n]}\n"


class Trace:
    """A trace file being written; leaving the ``with`` block, however it is left, ends the JSON.

    about  ``otherData`` of the file, see `provenance`

    Nothing is kept in memory but the file's buffer. Contexts on several threads may share a
    trace. Raises FqError when the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], about: dict[str, Any]) -> None:
        self.path = os.fspath(path)
        self._labels: dict[str, Any] = {}
        self._pid = os.getpid()
        self._threads: set[int] = set()
        try:
            self._file = open(path, "wb")
        except OSError as e:
            raise self._cannot(e) from None
        self._start = perf_counter_ns()
        head = {"displayTimeUnit": "ms", "otherData": about}
        process = {"ph": "M", "name": "process_name", "pid": self._pid, "tid": 0, "args": {"name": "fq"}}
        # with the first event in place every other one is a comma, a line's end and itself
        self._put(f'{json.dumps(head)[:-1]}, "traceEvents": [\n{json.dumps(process)}')

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            try:
                self._file.write(_END)
            finally:
                self._file.close()
        except OSError as e:
            if kind is None:  # else the error that ended the block is the one to hear of
                raise self._cannot(e) from None

    def labelled(self, **labels: Any) -> Trace:
        """This trace with ``labels`` among the args of the events written through it."""
        view = copy.copy(self)
        view._labels = self._labels | labels
        return view

    def call(
        self,
        node: Node,
        fake_quant: FakeQuant,
        compute: Callable[..., np.ndarray],
        *args: Any,
        rounds: Node | None = None,
    ) -> np.ndarray:
        """``compute(node, *args)``, and its event; ``rounds`` is a node whose value is rounded in it too."""
        before = _sites(fake_quant, node)
        of_other = _sites(fake_quant, rounds) if rounds is not None else []
        begin = perf_counter_ns()
        value = compute(node, *args)
        end = perf_counter_ns()
        about: dict[str, Any] = {
            "op": node.op.value,
            "rows": len(value),
            "data": hex(value.__array_interface__["data"][0]),
        }
        if node.layer is not None:
            about["layer"] = node.layer
        if node.norm or before:
            after = _sites(fake_quant, node)
            rows = [now[2] - then[2] for now, then in zip(after, before, strict=True)]
            # the sites of one node take its rows from the first on: the most of one is all of them; in
            # rows of the result, of which each holds several where heads are rounded
            taken = [(v.rows, fake_quant.counters[site].rule) for v in node.values for site in v.sites]
            per_row = [heads for heads, rule in taken if rule]
            rounded = max((-(-n // heads) for n, heads in zip(rows, per_row, strict=True)), default=0)
            about |= {"norm": str(node.norm)} if node.norm else {}
            about |= {"rounded": rounded > 0, "rows_rounded": rounded}
            about["sites"] = [
                {"site": site, "format": fmt, "rows_rounded": n}
                for (site, fmt, _), n in zip(after, rows, strict=True)
            ]
            if rounds is not None:
                about["sites"] += [
                    {"site": site, "format": fmt, "rows_rounded": now - then}
                    for (site, fmt, now), (*_, then) in zip(_sites(fake_quant, rounds), of_other, strict=True)
                ]
        self._event(node.name, node.op.value, begin, end, about)
        return value

    def evaluated(self, begin: int, n_tokens: int, n_outputs: int, n_past: int) -> None:
        """The event of an evaluation that began at ``begin`` (perf_counter_ns) and ends now."""
        about = {"n_tokens": n_tokens, "n_outputs": n_outputs, "n_past": n_past}
        self._event(EVAL, EVAL, begin, perf_counter_ns(), about)

    def _event(self, name: str, cat: str, begin: int, end: int, args: dict[str, Any]) -> None:
        tid = threading.get_native_id()
        if tid not in self._threads:
            self._threads.add(tid)
            about = {"name": threading.current_thread().name}
            self._line({"ph": "M", "name": "thread_name", "pid": self._pid, "tid": tid, "args": about})
        self._line(
            {
                "name": name,
                "cat": cat,
                "ph": "X",
                "ts": (begin - self._start) / 1000,
                "dur": (end - begin) / 1000,
                "pid": self._pid,
                "tid": tid,
                "args": args | self._labels,
            }
        )

    def _line(self, event: dict[str, Any]) -> None:
        self._put(",\n" + json.dumps(event, separators=(",", ":")))

    def _put(self, text: str) -> None:
        try:
            # one write: whole, whenever Ctrl-C or another thread comes
            self._file.write(text.encode())
        except OSError as e:
            raise self._cannot(e) from None

    def _cannot(self, e: OSError) -> FqError:
        return FqError(f"{self.path}: cannot write the trace: {e.strerror or e}")


def _sites(fake_quant: FakeQuant, node: Node) -> list[tuple[str, str, int]]:
    """The node's sites that a rule takes: (site, format, rows rounded so far)."""
    counters = [fake_quant.counters[site] for site in node.sites]
    return [(str(c.site), str(c.format), c.rows_quantised) for c in counters if c.rule]


def provenance(model: Model, executor: Executor, rules: Sequence[object] = ()) -> dict[str, Any]:
    """``otherData`` of a run: the model, the rules and the versions, and nothing of the machine."""
    return {
        "model": os.path.basename(model.path),
        "n_layer": model.hparams.n_layer,
        "n_embd": model.hparams.n_embd,
        "rules": [str(rule) for rule in rules],
        "fq": package_version("fq") or "not installed",
        "numpy": np.__version__,
        "python": platform.python_version(),
        "isa": isa(),
        "threads": executor.threads,
    }
