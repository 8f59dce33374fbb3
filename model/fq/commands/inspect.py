"""fq inspect."""

from __future__ import annotations

import argparse
from collections import Counter as Tally
from typing import Any

import numpy as np

from fq_kernels import GGUFStrings
from fq_kernels.rules import describe_values

from ..arch.registry import unknown_keys
from ..errors import FqError
from ..gguf.file import GGUFFile
from ..gguf.split import Parts
from ..run.model import Model
from ..words import ascii_safe, table
from .files import write_json
from .options import add_described_model, find_model

MAX_VALUE_CHARS = 96

add_options = add_described_model


def main(args: argparse.Namespace) -> int:
    path = find_model(args.model, args.offline)
    with GGUFFile(path) as file:
        try:
            model, fault = Model(path), None
        except FqError as error:  # what it says of itself can be read all the same
            model, fault = None, str(error)
        data = _data(model.file if model else file, model) | {"fault": fault}
    if args.json:
        write_json("inspect", data, "-")
    else:
        print(_text(data))
    return 0


def _data(file: GGUFFile | Parts, model: Model | None) -> dict[str, Any]:
    by_type = Tally(info.type.name for info in file.tensors.values())
    n_bytes: Tally[str] = Tally()
    for info in file.tensors.values():
        n_bytes[info.type.name] += info.n_bytes
    return {
        "model": file.path,
        "bytes": file.size,
        "gguf_version": file.version,
        "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        "unknown_keys": unknown_keys(file.metadata),
        "parameters": sum(info.n_elements for info in file.tensors.values()),
        "tensor_types": [
            {"type": name, "tensors": count, "bytes": n_bytes[name]} for name, count in by_type.most_common()
        ],
        "tensors": [
            {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.n_bytes}
            for t in file.tensors.values()
        ],
        "norms": describe_values(v for v in model.values if v.is_norm) if model else None,
        "activations": describe_values(v for v in model.values if not v.is_norm) if model else None,
        "sites": [str(site) for node in model.graph.nodes for site in node.sites] if model else [],
    }


def _plain(value: Any) -> Any:
    """A metadata value for JSON: long arrays by their length, undecodable bytes escaped."""
    if isinstance(value, np.ndarray | GGUFStrings | list):
        if len(value) > 16:
            return f"array of {len(value)}"
        return [_plain(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


def _text(data: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        text = str(value) if isinstance(value, int | float) else ascii_safe(str(value))
        return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"

    lines = [
        f"{data['model']}: {data['bytes'] / 1e6:.1f} MB, {data['parameters'] / 1e6:.1f} M parameters, "
        f"GGUF version {data['gguf_version']}",
        "",
        table([["metadata", ""], *([key, shown(value)] for key, value in data["metadata"].items())]),
        "",
        table(
            [
                ["type", "tensors", "MB"],
                *([t["type"], str(t["tensors"]), f"{t['bytes'] / 1e6:.1f}"] for t in data["tensor_types"]),
            ],
            {1, 2},
        ),
        "",
    ]
    if data["unknown_keys"]:
        unknown = (f"  {ascii_safe(key)}" for key in data["unknown_keys"])
        lines += ["keys that fq does not know:", *unknown, ""]
    if data["fault"]:
        lines.append(f"fq cannot run it: {ascii_safe(data['fault'])}")
    else:
        lines += [f"norm sites: {data['norms']}", f"other sites: {data['activations']}"]
    return "\n".join(lines)
