"""Tables that are kept in a document, between two marks."""

from __future__ import annotations

from pathlib import Path


def marks(name: str = "") -> tuple[str, str]:
    """The lines before and after a table; a document may hold several, each under its name."""
    which = f": {name}" if name else ""
    return f"<!-- begin of the kept table{which} -->", f"<!-- end of the kept table{which} -->"


BEGIN, END = marks()


def keep(path: Path, text: str, name: str = "") -> None:
    """Put ``text`` between the marks of the document. Raises ValueError if it has them not once each."""
    begin, end = marks(name)
    old = path.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(end) < old.index(begin):
        raise ValueError(f"{path}: the line {begin} and after it {end} must be there, once each")
    before, _, rest = old.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")
