"""The table of norms in docs/architectures.md is that of the graphs."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from fq import Model

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- begin of the atlas -->\n", "<!-- end of the atlas -->\n"


def atlas(folder: Path) -> str:
    """Of each architecture's norms, in the order of a layer: node, tensor, elements, rows of a token."""
    from tiny_models import TINY, write_tiny

    from fq.arch.registry import ARCHITECTURES

    lines = [
        "| architecture | norm | node | tensor | elements | rows of a token | llama.cpp's raw name |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ARCHITECTURES:
        # of one head of keys, rows a head would be told from no others
        tiny = replace(TINY[name], n_head_kv=max(TINY[name].n_head_kv, 2))
        model = Model(write_tiny(folder / f"{name}.gguf", tiny))
        for node in model.graph.nodes:
            if node.norm is None or node.norm.layer not in (0, None):
                continue
            value, n = node.values[0], len(model.vectors[str(node.weight)])
            heads = {1: "1", tiny.n_head: "n_head", tiny.n_head_kv: "n_head_kv"}
            widths = {
                tiny.n_head_kv * tiny.head_dim: "n_head_kv × head_dim",
                tiny.n_head * tiny.head_dim: "n_head × head_dim",
                tiny.head_dim: "head_dim",
                tiny.n_embd: "n_embd",
            }
            if node.norm.kind == "q_norm" and value.rows == 1:
                widths[n] = "n_head × head_dim"
            row = [
                name,
                str(node.norm.kind),
                node.name.replace("-0", "-N"),
                str(node.weight).replace("blk.0.", "blk.N."),
                widths[n],
                heads[value.rows],
                "norm-N" if value.norm_n else "norm",
            ]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def test_the_documented_norms_are_those_of_the_graphs(tmp_path):
    text = DOCS.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == atlas(tmp_path)


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        table = atlas(Path(folder))
    text = DOCS.read_text(encoding="utf-8")
    text = text[: text.index(BEGIN) + len(BEGIN)] + table + text[text.index(END) :]
    DOCS.write_text(text, encoding="utf-8")
