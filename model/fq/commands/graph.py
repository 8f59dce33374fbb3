"""fq graph."""

from __future__ import annotations

import argparse
from typing import Any

from ..run.model import Model
from ..words import table
from .options import add_described_model, describe_model

add_options = add_described_model


def main(args: argparse.Namespace) -> int:
    return describe_model("graph", args, _data, _text)


def _data(model: Model) -> dict[str, Any]:
    types = {name: info.type.name for name, info in model.file.tensors.items()}
    return {
        "model": model.path,
        "nodes": [
            {
                "index": i,
                "name": node.name,
                "op": node.op.value,
                "shape": list(node.shape),
                "inputs": list(node.inputs),
                "weight": node.weight,
                "weight_type": types.get(node.weight or ""),
                "sites": [str(site) for site in node.sites],
            }
            for i, node in enumerate(model.graph.nodes)
        ],
    }


def _text(data: dict[str, Any]) -> str:
    rows = [["#", "node", "op", "shape", "inputs", "weight", "sites"]]
    for node in data["nodes"]:
        rows.append(
            [
                str(node["index"]),
                node["name"],
                node["op"],
                "(" + ", ".join(map(str, node["shape"])) + ")",
                " ".join(map(str, node["inputs"])),
                f"{node['weight']} {node['weight_type']}" if node["weight"] else "",
                ", ".join(node["sites"]),
            ]
        )
    return table(rows, {0})
