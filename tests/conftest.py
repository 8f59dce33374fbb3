from __future__ import annotations

import os
import signal

import pytest
from changed_models import rewrite
from hypothesis import settings

import fq_kernels
from fq import Model, find
from fq.gguf.synthetic import tiny_shape, write_llama_gguf

# Other examples on each run, so that few at a time are many in the end.
settings.register_profile("default", deadline=None, max_examples=20)
# The same examples on every run: a failure there is the change's, not the day's.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=20)
# Before a release.
settings.register_profile("release", deadline=None, max_examples=200)
# For code that runs ten times slower: what is looked for there does not hide in rare values.
settings.register_profile("sanitizers", deadline=None, derandomize=True, max_examples=10)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


def pytest_configure():
    expected = os.environ.get("FQ_KERNELS_EXPECTED")
    if expected and not fq_kernels.__file__.startswith(expected):
        pytest.exit(f"these are the kernels of {fq_kernels.__file__}, not of {expected}", returncode=2)


def pytest_collection_modifyitems(items):
    for item in items:
        if {"smollm2_path", "gemma3_path"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("model")
    # else a processor is at them in the end, and the others wait
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import WorkStealingScheduling

    # what -n alone asks for gives the first tests, all the long ones, to one processor and leaves them there
    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


@pytest.fixture(scope="session")
def executor():
    with fq_kernels.Executor(2) as shared:
        yield shared


# Class scope is once per plain test function too, and unlike function scope hypothesis
# takes it: one instruction set for all examples of a test is what is meant.
@pytest.fixture(scope="class", params=fq_kernels.supported_isas())
def isa(request):
    """Each instruction set in turn, forced for one test."""
    before = fq_kernels.isa()
    fq_kernels.force_isa(request.param)
    yield request.param
    fq_kernels.force_isa(before)


@pytest.fixture(scope="session")
def smollm2_path():
    """The real model, from the user's cache, fetched into it at first use. Without it tests fail."""
    return find("smollm2")


@pytest.fixture(scope="session")
def gemma3_path():
    """Another, whose norms are of every role."""
    return find("gemma3-270m")


@pytest.fixture(scope="session")
def gemma3(gemma3_path):
    return Model(gemma3_path)


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    return Model(smollm2_path)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """Two layers of random F32 weights, a vocabulary that adds BOS, a context of 128."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_llama_gguf(path, tiny_shape(n_embd=64, n_ff=96, n_vocab=512, n_ctx_train=128), mix="F32")
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path):
    return Model(tiny_path)


@pytest.fixture(scope="session")
def packed_path(tiny_path, tmp_path_factory):
    """The tiny model's matrices as Q8_0, where their rows allow."""
    path = tmp_path_factory.mktemp("packed") / "packed.gguf"
    rewrite(tiny_path, path)
    return path


@pytest.fixture(scope="session")
def twin_path(packed_path, tmp_path_factory):
    """The packed model's values as float32."""
    path = tmp_path_factory.mktemp("twin") / "twin.gguf"
    rewrite(packed_path, path, q8_0=False)
    assert path.stat().st_size > 2 * packed_path.stat().st_size
    return path


@pytest.fixture
def ctrl_c():
    """A parent that ignores SIGINT (a shell's background job) would pass that on to its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
