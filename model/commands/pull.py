"""fq pull."""

from __future__ import annotations

import argparse

from .. import store
from ..errors import FqError
from .options import ALIASES, download_bar


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "alias", nargs="?", default=store.DEFAULT_ALIAS, help=f"one of {ALIASES} (default %(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    if args.alias not in store.ALIASES:
        raise FqError(f"unknown model alias {args.alias!r}; there are {', '.join(store.ALIASES)}")
    if store.cached(args.alias):
        path = store.pull(args.alias)
    else:
        with download_bar(args.alias) as progress:
            path = store.pull(args.alias, progress)
    print(path)
    return 0
