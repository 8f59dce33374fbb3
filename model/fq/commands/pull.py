"""fq pull."""

from __future__ import annotations

import argparse

from ..errors import FqError
from ..gguf import cache
from .options import ALIASES, download_bar


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "alias", nargs="?", default=cache.DEFAULT_ALIAS, help=f"one of {ALIASES} (default %(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    if args.alias not in cache.ALIASES:
        raise FqError(f"unknown model alias {args.alias!r}; there are {', '.join(cache.ALIASES)}")
    if cache.cached(args.alias):
        path = cache.pull(args.alias)
    else:
        with download_bar(args.alias) as progress:
            path = cache.pull(args.alias, progress)
    print(path)
    return 0
