"""A Dask cluster as a `Pool`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import FqError
from ..machine import default_threads
from .spread import LostError

CONNECT_SECONDS = 10
FETCH_SECONDS = 60  # for a result that is there
MOST_LOCAL = 1024
ENVIRONMENT = "distributed.nanny.pre-spawn-environ"
HERE = "local:"  # and how many processes


@dataclass(frozen=True)
class _Handle:
    future: Any

    def cancel(self) -> None:
        with contextlib.suppress(Exception):  # the scheduler may be gone
            self.future.cancel()  # or there is none


class DaskPool:
    """Of a client of the package distributed.

    connect  makes another one, where the connection was lost for longer than a client waits
    n_here   as of `Pool`
    """

    def __init__(self, client: Any, connect: Callable[[], Any], n_here: int | None = None) -> None:
        self._client, self._connect = client, connect
        self.n_here = n_here

    def workers(self) -> dict[str, str]:
        if self._client.status in ("closed", "closing"):
            # what the old one had asked for is lost: nobody is there until the next look
            with contextlib.suppress(Exception):
                self._client = self._connect()
            return {}
        try:
            found = self._client.scheduler_info(n_workers=-1)["workers"]
        except (OSError, KeyError):  # the connection is cut, and may come back
            return {}
        return {address: _name(address, about) for address, about in found.items()}

    def close(self) -> None:
        self._client.close(timeout=5)

    def start(
        self, address: str, done: Callable[[Any, BaseException | None], None], function: Any, *args: Any
    ) -> _Handle:
        try:
            # fq itself gives what is lost to another worker
            future = self._client.submit(function, *args, workers=[address], pure=False, retries=0)
        except Exception as e:  # the client is closed
            done(None, LostError(str(e)))
            return _Handle(None)

        def fetch(future: Any) -> None:
            try:
                result = future.result(timeout=FETCH_SECONDS)
            except _lost_errors() as e:
                done(None, LostError(f"{type(e).__name__}: {e}"))
            except BaseException as e:
                done(None, e)
            else:
                done(result, None)

        def ended(future: Any) -> None:
            # all of these callbacks have one thread, which a result whose worker has died would hold up
            threading.Thread(target=fetch, args=(future,), daemon=True).start()

        future.add_done_callback(ended)
        return _Handle(future)


def _lost_errors() -> tuple[type[BaseException], ...]:
    """What is raised where a worker or the connection is lost, and not by a task."""
    import concurrent.futures

    from distributed import KilledWorker
    from distributed.comm.core import CommClosedError

    return (
        TimeoutError,
        concurrent.futures.TimeoutError,
        concurrent.futures.CancelledError,
        asyncio.CancelledError,
        CommClosedError,
        KilledWorker,
    )


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
        import dask
        import distributed
    except ImportError:
        raise FqError(
            "workers need the package distributed, which is not installed: pip install 'fq[dask]'"
        ) from None
    # distributed has no types here
    local_cluster: Callable[..., Any] = distributed.LocalCluster
    client: Callable[..., Any] = distributed.Client
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what is to be said we say
    with contextlib.ExitStack() as stack:
        n = _local(where) if where.startswith(HERE) else None
        if n is not None:
            if threads is not None and threads < 1:
                raise FqError(f"--threads: threads must be at least 1, not {threads}")
            each = threads or max(default_threads() // n, 1)
            # Dask would have memory given back as soon as it is free, and so has glibc in the arenas of all
            # threads but the first: pages that are fresh each time take a fifth of a sweep. And Dask's looks
            # at itself, up to a hundred a second, stop the threads that work.
            quiet = {
                ENVIRONMENT: {"OPENBLAS_NUM_THREADS": 1, "MALLOC_ARENA_MAX": 1},
                "distributed.worker.profile.enabled": False,
                "distributed.admin.tick.interval": "1s",
                "distributed.admin.system-monitor.interval": "10s",
            }
            stack.enter_context(dask.config.set(quiet))
            with _without_ctrl_c():
                cluster = stack.enter_context(
                    local_cluster(
                        n_workers=n,
                        threads_per_worker=each,
                        processes=True,
                        memory_limit=None,
                        dashboard_address=None,
                        scheduler_kwargs={"dashboard_address": ":0"},  # any port: another may be there
                        silence_logs=logging.CRITICAL,
                    )
                )

            def connect() -> Any:
                return client(cluster)
        else:

            def connect() -> Any:
                return _connected(client, where)

        pool = DaskPool(connect(), connect, n)
        stack.callback(pool.close)
        yield pool


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """For processes that are started in the block, which this one ends."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
