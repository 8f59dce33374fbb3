"""What a figure comes from: the digest that tells two files apart."""

from __future__ import annotations

import os


def sha256_of(*paths: str | os.PathLike[str]) -> str:
    """A file's SHA-256 in hexadecimal, or that of several one after the other. Raises OSError."""
    import hashlib  # a millisecond, and most commands need none

    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
