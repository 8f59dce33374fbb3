"""Tables that are kept in a document, between two marks."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- begin of the kept table -->", "<!-- end of the kept table -->"


def keep(path: Path, text: str) -> None:
    """Put ``text`` between the marks of the document. Raises ValueError if it has them not once each."""
    old = path.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(END) < old.index(BEGIN):
        raise ValueError(f"{path}: the line {BEGIN} and after it {END} must be there, once each")
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
