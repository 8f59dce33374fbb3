"""A Dask cluster as a `Pool`."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import FqError
from ..machine import default_threads

CONNECT_SECONDS = 10
MOST_LOCAL = 1024
HERE = "local:"  # and how many processes


@dataclass(frozen=True)
class _Handle:
    future: Any

    def cancel(self) -> None:
        with contextlib.suppress(Exception):  # the scheduler may be gone
            self.future.cancel()


class DaskPool:
    """Of a client of the package distributed."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def workers(self) -> dict[str, str]:
        try:
            found = self._client.scheduler_info(n_workers=-1)["workers"]
        except (OSError, KeyError):  # the connection is cut, and may come back
            return {}
        return {address: _name(address, about) for address, about in found.items()}

    def start(
        self, address: str, done: Callable[[Any, BaseException | None], None], function: Any, *args: Any
    ) -> _Handle:
        # fq itself gives what is lost to another worker
        future = self._client.submit(function, *args, workers=[address], pure=False, retries=0)

        def ended(future: Any) -> None:
            try:
                done(future.result(), None)
            except BaseException as e:
                done(None, e)

        future.add_done_callback(ended)
        return _Handle(future)


def _name(address: str, about: dict[str, Any]) -> str:
    name = address if about.get("name") is None else str(about["name"])
    return name if name == address else f"{name} ({address})"


@contextlib.contextmanager
def dask_pool(where: str, threads: int | None = None) -> Iterator[DaskPool]:
    """The workers of a scheduler: its address, or a file that it has written, or "local:N": N processes here
    with so many threads each (None: all processors, divided).

    Raises FqError where the package is missing, or no scheduler answers.
    """
    try:
        import distributed
    except ImportError:
        raise FqError(
            "workers need the package distributed, which is not installed: pip install 'fq[dask]'"
        ) from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what is to be said we say
    with contextlib.ExitStack() as stack:
        if where.startswith(HERE):
            n = _local(where)
            each = threads or max(default_threads() // n, 1)
            cluster = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=n,
                    threads_per_worker=each,
                    processes=True,
                    memory_limit=None,
                    dashboard_address=None,
                    silence_logs=logging.CRITICAL,
                )
            )
            client = distributed.Client(cluster)
        else:
            client = _connected(distributed.Client, where)
        stack.callback(client.close, timeout=5)
        yield DaskPool(client)


def _local(where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text := where[len(HERE) :]) or not 1 <= int(text) <= MOST_LOCAL:
        raise FqError(f"--scheduler {where}: local:N makes N processes, from 1 to {MOST_LOCAL}")
    return int(text)


def _connected(client: Callable[..., Any], where: str) -> Any:
    try:
        if os.path.exists(where):
            return client(scheduler_file=where, timeout=CONNECT_SECONDS)
        return client(where, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TypeError, KeyError) as e:
        what = "an address such as tcp://host:8786, a scheduler's file, or local:N"
        raise FqError(f"--scheduler {where}: no Dask scheduler answers ({e}); it is {what}") from None
