"""Where a page's figures come from."""

from __future__ import annotations

import os
from typing import Any

from .data import plain


def provenance(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Model by its file's name alone: a page travels, folders do not concern its readers."""
    numerics, versions = dict(data["numerics"]), dict(data["versions"])
    rows = [
        ("run", str(data["run"])),
        ("started", data.get("started", "")),
        ("model", os.path.basename(data["model"])),
        ("model SHA-256", data["model_sha256"]),
        ("text", os.path.basename(data.get("text") or "")),
        ("text SHA-256", data["text_sha256"]),
        *(
            (
                f"static scales: {os.path.basename(each['file'])}",
                f"{each['method']} per {each['per']}, of {os.path.basename(each['model']['file'])}, "
                f"on {os.path.basename(each['text']['name'])}, SHA-256 {each['text']['sha256']}",
            )
            for each in data.get("calibrations", [])
        ),
        (
            "measured",
            f"{data['n_tokens']} tokens; {data['n_chunks']} of {data['n_chunks_asked']} chunks of "
            f"{data['n_ctx']}, {data['n_scored']} tokens scored, batches of {data['batch']}",
        ),
        ("numerics", _pairs(numerics)),
        ("versions", _pairs(versions)),
        *((f"machine: {name}", _value(value)) for name, value in data["machine"].items()),
    ]
    return [(plain(name), plain(value)) for name, value in rows if value]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
