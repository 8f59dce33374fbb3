"""What a program gave and a document keeps, between two marks."""

from __future__ import annotations

from pathlib import Path

from fq.commands.files import write


def marks(name: str) -> tuple[str, str]:
    """The lines before and after a block; a document may hold several, each under its name."""
    return f"<!-- begin of the kept block: {name} -->", f"<!-- end of the kept block: {name} -->"


def _split(path: Path, name: str) -> tuple[str, str, str]:
    begin, end = marks(name)
    old = path.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(end) < old.index(begin):
        raise ValueError(f"{path}: the line {begin} and after it {end} must be there, once each")
    before, _, rest = old.partition(begin)
    block, _, after = rest.partition(end)
    return before + begin, block.strip("\n"), end + after


def keep(path: Path, text: str, name: str) -> None:
    """Put ``text`` between the marks of the document. Raises ValueError if it has them not once each."""
    before, _, after = _split(path, name)
    write(f"{before}\n\n{text}\n\n{after}", path)


def kept(path: Path, name: str) -> str:
    """What is between the marks. Raises ValueError like `keep`."""
    return _split(path, name)[1]
