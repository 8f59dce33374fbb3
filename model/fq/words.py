"""Tables, and text that is safe to show."""

from __future__ import annotations


def table(rows: list[list[str]], right: frozenset[int] | set[int] = frozenset()) -> str:
    """Rows of cells, the first one the heading, in columns; ``right`` names those aligned right."""
    rows = [[ascii_safe(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in cells))
    return "\n".join(line.rstrip() for line in lines)


def ascii_safe(text: str) -> str:
    """Control characters escaped: metadata is untrusted and the reader may be a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
