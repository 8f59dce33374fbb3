"""A figure and its numbers as links that hold the files themselves: no script, and nothing is fetched."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from .data import Entry, Interval, kind_of, plain, site_of
from .svg import LIGHT

Row = list[Any]
CI95 = ["ci95_low", "ci95_high"]
SITE = ["site", "kind", "layer"]
# what a URL of data may hold as it stands
_AS_IT_IS = " !$'()*+,-./:;=?@_~[]"
# what a spreadsheet would take for the beginning of a formula
_FORMULA = ("=", "+", "-", "@")


def site_row(entry: Entry) -> Row:
    """Columns `SITE` of a single cell: ``ffn_norm[3].raw``, ``ffn_norm.raw``, 3."""
    return [plain(entry["name"].partition("=")[0]), plain(kind_of(entry)), site_of(entry)[1]]


def ends(interval: Interval | Sequence[float] | None) -> Row:
    """Columns `CI95`, empty where there is no interval."""
    return [None, None] if interval is None else [*interval]


def csv_text(rows: Sequence[Row]) -> str:
    """Numbers in full precision, no field that a spreadsheet runs, nothing for what is not
    known or not finite."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_field(value) for value in row] for row in rows)
    return out.getvalue()


def _field(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else ""
    return value


def csv_url(rows: Sequence[Row]) -> str:
    return _url("text/csv;charset=utf-8", csv_text(rows))


def svg_url(text: str) -> str:
    """A file of its own from an element of the page: in the light, with a ground and a font."""
    head, view, rest = re.split(r'(?<=viewBox=")([^"]*)', text, maxsplit=1)
    width, height = view.split()[2:]
    head = head.replace(
        "<svg ",
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}pt" height="{height}pt" '
        'font-family="system-ui, DejaVu Sans, sans-serif" ',
    )
    ground = f'<rect width="100%" height="100%" fill="{LIGHT["ground"]}"/>'
    rest = rest.replace("<defs>", f"{ground}<defs>", 1)
    return _url("image/svg+xml;charset=utf-8", _in_the_light(head + view + rest))


def _in_the_light(text: str) -> str:
    return re.sub(r"<[^>]*>", _tag_in_the_light, text)


def _tag_in_the_light(tag: re.Match[str]) -> str:
    text = re.sub(r"var\(--(\w+)\)", lambda name: LIGHT[name[1]], tag[0])
    # one quote is as good as the other, and this one needs no escape in a URL
    return text if "'" in text else text.replace('"', "'")


def _url(kind: str, text: str) -> str:
    return f"data:{kind},{quote(text, safe=_AS_IT_IS)}"
