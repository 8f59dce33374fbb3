"""What numpy computes for a result does not depend on what other libraries left in the control register."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from float_environments import (
    FTZ_AND_DAZ,
    MXCSR_CONTROL,
    ROUNDING_MODES,
    X86_64_GLIBC,
    float_environment,
    foreign_environment,
)

from fq import Context, FakeQuant, Perplexity, Sampler, Sweep, cells_of
from fq.gguf.synthetic import SAMPLE_TEXT, tiny_shape, write_llama_gguf
from fq.measure.statistics import score
from fq_kernels import Executor, default_fpu, describe_formats, get_format, reference

STATES = {f"rounding {name}": {"mode": mode} for name, mode in ROUNDING_MODES.items()}
if X86_64_GLIBC:
    STATES["FTZ and DAZ"] = {"mxcsr_bits": FTZ_AND_DAZ}
SUBNORMAL = np.full(4, 1e-40, np.float32)


@pytest.fixture(params=STATES)
def foreign(request):
    return lambda: foreign_environment(**STATES[request.param])


def shows(x: np.ndarray) -> np.ndarray:
    """Differs in every foreign state: a subnormal, and quotients of either sign between two floats."""
    return np.concatenate([x * np.float32(0.5), np.float32(1) / np.float32([3, -3, 7])])


def test_a_block_has_the_default_state_and_gives_the_other_back(foreign):
    want = shows(SUBNORMAL).tobytes()
    with foreign():
        outside = shows(SUBNORMAL).tobytes()
        before = bytes(float_environment().bytes)
        with default_fpu():
            inside = shows(SUBNORMAL).tobytes()
            with default_fpu():  # one in the other
                pass
            still = shows(SUBNORMAL).tobytes()
        decorated = default_fpu()(shows)(SUBNORMAL).tobytes()
        with pytest.raises(ZeroDivisionError), default_fpu():
            raise ZeroDivisionError
        after = bytes(float_environment().bytes)
    assert outside != want, "the state does not show, so this would show nothing"
    assert inside == still == decorated == want
    assert clean(after) == clean(before)


def clean(environment: bytes) -> bytes:
    """Without the flags that any operation may set."""
    if not X86_64_GLIBC:
        return environment[:4]
    mxcsr = int.from_bytes(environment[28:32], "little") & MXCSR_CONTROL
    return environment[:4] + mxcsr.to_bytes(4, "little")


@pytest.mark.parametrize(
    "spec", [f["name"] for f in describe_formats()] + ["int4:asymmetric,group=16", "int8:tensor"]
)
def test_formats_quantise_the_same(foreign, spec):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((32, 256), dtype=np.float32)
    # rows of every size of number, down to subnormals
    x *= np.exp2(np.arange(32, dtype=np.float32) * 5 - 148)[:, None]
    want = get_format(spec).quantise(x)
    by_reference = reference.round_trip(x, spec)
    with foreign():
        got = get_format(spec).quantise(x)
        by_reference_now = reference.round_trip(x, spec)
    assert got.values.tobytes() == want.values.tobytes()
    assert by_reference_now.tobytes() == by_reference.tobytes()
    assert (got.clipped is None) == (want.clipped is None)


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))


def as_bytes(result) -> str:
    return repr({key: value for key, value in result.items() if key != "seconds"})


@pytest.mark.parametrize("activations", ["exact", "ggml"])
def test_a_measurement_is_the_same(tiny, tokens, foreign, activations):
    def measured() -> str:
        with Executor(2) as executor:  # whose thread inherits the state
            rules = FakeQuant(tiny.values, ["ffn_norm[0]=int4", "ffn_norm[1]=fp8_e4m3fn"])
            run = Perplexity(
                tiny, tokens, n_ctx=32, chunks=2, fake_quant=rules, executor=executor, activations=activations
            )
            assert list(run) == [0, 1]
            return as_bytes(run.result())

    want = measured()
    with foreign():
        got = measured()
    assert got == want


def test_a_sweep_is_the_same(tiny, tokens, foreign):
    def measured() -> str:
        with Executor(2) as executor:
            cells = cells_of(tiny, ["ffn_norm"], ["bf16", "mxfp4"])
            run = Sweep(tiny, tokens, cells, n_ctx=32, chunks=2, executor=executor)
            assert len(list(run)) == 2 * len(cells)
            return as_bytes(run.result())

    want = measured()
    with foreign():
        got = measured()
    assert got == want


def test_logits_scores_and_samples_are_the_same(tiny, tokens, foreign):
    def drawn() -> tuple[bytes, bytes, list[int]]:
        with Executor(2) as executor:
            logits = Context(tiny, 32, executor).eval(tokens[:32], slice(None))
            nll = score(logits, np.array(tokens[1:33]), executor)
            sampler = Sampler(temp=0.8, top_p=0.999)
            return logits.tobytes(), nll.tobytes(), [sampler.sample(row) for row in logits]

    want = drawn()
    with foreign():
        got = drawn()
    assert got == want


def test_a_generated_model_has_the_same_bytes(tmp_path, foreign):
    shape = tiny_shape(n_layer=1)
    write_llama_gguf(tmp_path / "a.gguf", shape)
    with foreign():
        write_llama_gguf(tmp_path / "b.gguf", shape)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_tasks_in_python_run_in_the_default_state(foreign, threads):
    """On the caller and on workers, which inherit the state of who started them."""
    want = shows(SUBNORMAL).tobytes()
    found: dict[int, set[bytes]] = {}
    every = threading.Barrier(threads)

    def task(i: int) -> None:
        every.wait(60)  # so that each thread has one
        found.setdefault(threading.get_ident(), set()).add(shows(SUBNORMAL).tobytes())

    with foreign():
        with Executor(threads) as executor:
            executor.map(task, threads)
        after = shows(SUBNORMAL).tobytes()
    assert len(found) == threads and set.union(*found.values()) == {want}
    assert after != want  # the caller's own state is back
