"""Many Python threads in the kernels at once; on a free-threaded interpreter they really are."""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from strategies import assert_same_bits

from fq_kernels import Executor, get_format, rms_norm_f32

N_THREADS = 6


def at_once(*calls: Callable[[], object]) -> None:
    """Each on a thread of its own, all let go together; raises the first error."""
    errors: list[BaseException] = []
    gate = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> None:
        try:
            gate.wait()
            call()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


if sysconfig.get_config_var("Py_GIL_DISABLED"):

    def test_importing_the_kernels_leaves_the_gil_off():
        assert not sys._is_gil_enabled()


def test_formats_and_one_executor_from_many_threads():
    x = np.random.default_rng(0).standard_normal((96, 640), dtype=np.float32)
    formats = ["bf16", "bf16:truncate", "f16", "bf16:stochastic,seed=3", "int8", "bf16:nearest-away"]
    expected = [rms_norm_f32(x, quant=name) for name in formats]
    with Executor(3) as executor:

        def call(i: int) -> None:
            for turn in range(200):
                which = (i + turn) % len(formats)
                # new objects and names: what the module keeps of formats changes all the time
                quant = get_format(formats[which]) if turn % 3 else formats[which]
                assert_same_bits(rms_norm_f32(x, quant=quant, executor=executor), expected[which])

        at_once(*(lambda i=i: call(i) for i in range(N_THREADS)))


def test_an_executor_starts_its_threads_once():
    x = np.ones((128, 1024), np.float32)
    for _ in range(20):
        before = threading.active_count()
        with Executor(4) as executor:
            at_once(*(lambda: rms_norm_f32(x, executor=executor) for _ in range(N_THREADS)))
            assert threading.active_count() == before + 3


def test_closing_while_others_call():
    x = np.ones((128, 1024), np.float32)

    def call(executor: Executor) -> None:
        try:
            for _ in range(50):
                rms_norm_f32(x, executor=executor)
        except RuntimeError as e:
            assert str(e) == "the executor is closed"

    before = threading.active_count()
    for _ in range(20):
        executor = Executor(3)
        at_once(*[partial(call, executor)] * (N_THREADS - 2), *[executor.close] * 2)
    assert threading.active_count() == before


def test_one_of_many_errors_is_raised():
    def fail(i: int) -> None:
        raise ValueError(i)

    with Executor(4) as executor:
        for _ in range(200):
            with pytest.raises(ValueError):
                executor.map(fail, 64)
