"""What the commands write: never over what they read, and a link, a mode, a device stay what they are."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from command_line import fq

from fq import FqError
from fq.cli import main
from fq.commands.files import check_outputs, write
from fq.gguf import cache as model_cache

DATA = Path(__file__).parents[1] / "data"
MODEL, TEXT, STORE = "model.gguf", "text.txt", "store.sqlite"
LONG = "x" * 250  # a name may have 255 bytes: not with a suffix that a process's number is in


@pytest.fixture
def folder(tmp_path, tiny_path, monkeypatch):
    """A model, a text, a store and its write-ahead log, in the working folder; links to them."""
    shutil.copy(tiny_path, tmp_path / MODEL)
    (tmp_path / TEXT).write_text("Hello world, hello again. " * 40)
    shutil.copy(DATA / "store-1.sqlite", tmp_path / STORE)
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FQ_CACHE", str(tmp_path))
    # an alias, whose file in the cache is the model
    entry = model_cache.GeneratedModel(MODEL)
    monkeypatch.setitem(model_cache.ALIASES, "alias", entry)
    return tmp_path


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.is_symlink()}


TEXT_AND_MODEL = ["-m", MODEL, "-f", TEXT]
RUN = ["run", "-m", MODEL, "-p", "Hello", "-n", "1"]
PPL = ["perplexity", *TEXT_AND_MODEL, "-c", "16", "--chunks", "1"]
SWEEP = ["sweep", *TEXT_AND_MODEL, "-c", "16", "--chunks", "1"]
CALIBRATE = ["calibrate", *TEXT_AND_MODEL, "-c", "16", "--chunks", "1", "-o", "cal.json"]
RANGES = ["ranges", *TEXT_AND_MODEL, "-c", "16", "--chunks", "1"]
REPLICATE = ["replicate", *TEXT_AND_MODEL, "--rounds", "2"]
RESULTS = ["results", "1", "--store", STORE]
BENCH = ["bench", "-m", MODEL, "--rounds", "2"]
# command, its outputs, its inputs
COMMANDS = (
    (RUN, ("--json", "--trace"), {MODEL: "the model"}),
    (PPL, ("--json", "--trace"), {MODEL: "the model", TEXT: "the text"}),
    (SWEEP, ("--json", "--store"), {MODEL: "the model", TEXT: "the text"}),
    (RANGES, ("--json", "-o"), {MODEL: "the model", TEXT: "the text"}),
    (CALIBRATE, ("--json", "-o"), {MODEL: "the model", TEXT: "the text"}),
    (BENCH, ("--json",), {MODEL: "the model"}),
    (REPLICATE, ("--json", "-o"), {MODEL: "the model", TEXT: "the text"}),
    (RESULTS, ("--json", "--csv", "--parquet"), {STORE: "the store"}),
    (["report", "1", "--store", STORE], ("-o",), {STORE: "the store"}),
    (["results", "--store", STORE], ("--json",), {STORE: "the store"}),
    (["results", "compare", "1", "2", "--store", STORE], ("--json",), {STORE: "the store"}),
)
ONTO_INPUTS = [
    pytest.param(command, option, name, what, id=f"{command[0]} {option} onto {what}")
    for command, options, inputs in COMMANDS
    for option in options
    for name, what in inputs.items()
]


@pytest.mark.parametrize("command, option, name, what", ONTO_INPUTS)
@pytest.mark.parametrize("how", ["itself", "another way", "a symbolic link", "a hard link"])
def test_an_output_is_no_input(folder, capsys, command, option, name, what, how):
    target = {"itself": name, "another way": f"here/../{folder.name}/{name}"}.get(how, "link")
    if how == "a symbolic link":
        os.symlink(f"here/{name}", "link")
    elif how == "a hard link":
        os.link(name, "link")
    before = contents(folder)
    assert main([*command, option, target]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("fq: error: ") and f" {target}: is {what}\n" in said.err, said.err
    assert said.out == "" and contents(folder) == before


@pytest.mark.parametrize("command, option", [(RUN, "--json"), (PPL, "--trace"), (SWEEP, "--store")])
def test_an_output_is_no_model_that_an_alias_names(folder, capsys, command, option):
    command = ["alias" if word == MODEL else word for word in command]
    before = contents(folder)
    assert main([*command, option, MODEL]) == 2
    assert f"{option} {MODEL}: is the model" in capsys.readouterr().err
    assert contents(folder) == before
    os.unlink(MODEL)  # nor where it will be once it is fetched
    assert main([*command, option, MODEL]) == 2
    assert f"{option} {MODEL}: is the model" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["-wal", "-shm", "-journal"])
def test_an_output_is_no_part_of_the_store(folder, capsys, end):
    """Whether it is there by now or not, and beside the file that a link leads to."""
    (folder / f"{STORE}-wal").touch()
    os.symlink(STORE, "link")
    for path in (STORE, "link"):
        for command in (["results", "1"], ["report", "1"]):
            option = "-o" if command[0] == "report" else "--csv"
            assert main([*command, "--store", path, option, f"{STORE}{end}"]) == 2
            assert f"{option} {STORE}{end}: is the store's {end}" in capsys.readouterr().err
        assert main([*SWEEP, "--store", path, "--json", f"{STORE}{end}"]) == 2
        assert f"--json {STORE}{end}: is the file of --store's {end} too" in capsys.readouterr().err
    os.rename(TEXT, f"new{end}")
    command = [f"new{end}" if word == TEXT else word for word in SWEEP]
    assert main([*command, "--store", "new"]) == 2
    assert f"new{end}: is the text" in capsys.readouterr().err


@pytest.mark.parametrize("word", [STORE, f"{STORE}:1"])
def test_an_output_is_no_store_that_is_merged(folder, capsys, word):
    before = contents(folder)
    for name, end in ((STORE, ""), (f"{STORE}-wal", "'s -wal")):
        assert main(["results", "merge", "new", word, "--json", name]) == 2
        assert f"--json {name}: is the store {STORE}{end}" in capsys.readouterr().err
    assert main(["results", "merge", "new", word, "--json", "new"]) == 2
    assert "--json new: is the store new" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize(
    "command, one, other",
    [
        (RUN, "--json", "--trace"),
        (PPL, "--json", "--trace"),
        (SWEEP, "--store", "--json"),
        (REPLICATE, "--json", "--output"),
        (RESULTS, "--json", "--csv"),
        (RESULTS, "--csv", "--parquet"),
    ],
)
def test_two_outputs_are_two_files(folder, capsys, command, one, other):
    before = contents(folder)
    assert main([*command, one, "out", other, "here/out"]) == 2
    assert f"{other} here/out: is the file of {one} too" in capsys.readouterr().err
    assert contents(folder) == before


def test_plots_are_no_store(folder, capsys):
    """Their names are known only when they are drawn, and still nothing is written before."""
    assert main(["report", "1", "--store", STORE, "--png", "png"]) == 0
    name = sorted(os.listdir("png"))[0]
    os.replace(STORE, f"png/{name}")
    os.unlink("fq-report-1.html")
    before = contents(folder / "png")
    capsys.readouterr()
    assert main(["report", "1", "--store", f"png/{name}", "--png", "png"]) == 2
    assert f"--png's {name} png/{name}: is the store" in capsys.readouterr().err
    assert contents(folder / "png") == before and not os.path.exists("fq-report-1.html")


def test_the_default_name_is_no_way_onto_the_store(folder, capsys):
    os.symlink(STORE, "fq-report-1.html")
    before = contents(folder)
    assert main(["report", "1", "--store", STORE]) == 2
    assert "-o fq-report-1.html: is the store" in capsys.readouterr().err
    assert contents(folder) == before


def test_where_the_shell_sends_a_stream_is_no_output(folder):
    """What is put there in its place would take the table away."""
    with open("out", "w") as out:
        _, err = fq(*RESULTS, "--json", "out", status=2, cwd=folder, stdout=out)
    assert "--json out: is where stdout goes" in err


@pytest.mark.parametrize(
    "target, why",
    [
        ("no/such/folder", ""),
        ("png", ": is a directory"),
        ("new/", ""),
        (f"{TEXT}/x", ": Not a directory"),
        ("loop", ": Too many levels of symbolic links"),
        ("y" * 256, ": File name too long"),
        ("./" * 2100 + "y", ": File name too long"),
    ],
)
@pytest.mark.parametrize("command, options, _", COMMANDS)
def test_what_cannot_be_written_is_found_before_the_work(
    folder, capsys, monkeypatch, command, options, _, target, why
):
    os.symlink("loop", "loop")
    for module in ("fq.results.runs", "fq.measure.sweep"):  # which would keep what stands in its place
        importlib.import_module(module)
    monkeypatch.setattr("fq.run.model.Model.__init__", lambda *_: pytest.fail("began to work"))
    monkeypatch.setattr("fq.measure.figures.figures", lambda *_: pytest.fail("began to work"))
    for option in options:
        assert main([*command, option, target]) == 2
        err = capsys.readouterr().err
        assert f"{target}: cannot be written there{why}\n" in err, err


def test_a_file_that_may_not_be_written_stays(folder, monkeypatch):
    """Root may write all, so it is the answer of the system that is changed."""
    access, refused = os.access, [os.path.realpath("text.txt")]
    monkeypatch.setattr(os, "access", lambda p, mode: os.path.realpath(p) not in refused and access(p, mode))
    with pytest.raises(FqError, match=r"--json text\.txt: cannot be written there"):
        check_outputs({"--json": TEXT})
    check_outputs({"--json": "new"})
    refused[:] = [os.path.realpath(".")]
    with pytest.raises(FqError, match="--json new: cannot be written there"):
        check_outputs({"--json": "new"})


def test_stdout_is_for_what_goes_there_alone(folder, capsys):
    """Scales or JSON, whole documents, and no text beside them; no file is called "-"."""
    assert main([*CALIBRATE, "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["schema"] == "fq/calibrate/1"
    assert said.err.endswith("cal.json: 2 sites, tensor scales by largest\n")
    assert main([*CALIBRATE, "-o", "-", "--json", "figures.json"]) == 0
    assert capsys.readouterr().out == (folder / "cal.json").read_text()
    assert json.loads((folder / "figures.json").read_text())["sites"]
    assert not os.path.exists("-")


def test_devices_take_more_than_one_output_and_stay(folder, tmp_path):
    os.mkfifo("pipe")
    fd = os.open("pipe", os.O_RDWR)
    check_outputs({"--json": "pipe", "--csv": "/dev/null", "--parquet": "/dev/null"}, {"the text": "pipe"})
    write("said", "pipe")
    assert os.read(fd, 9) == b"said" and stat.S_ISFIFO(os.stat("pipe").st_mode)
    os.close(fd)


def test_a_link_stays_a_link_and_a_mode_stays(folder):
    (folder / "real").write_text("old")
    os.chmod("real", 0o640)
    os.symlink("here/real", "link")
    os.symlink("here/new", "dangling")
    for target in ("link", "dangling"):
        fq(*RESULTS, "--csv", target, cwd=folder)
        assert os.path.islink(target) and Path(target).read_text().startswith("name,")
    assert (folder / "real").read_text().startswith("name,")
    assert stat.S_IMODE(os.stat("real").st_mode) == 0o640
    umask = os.umask(0o027)
    try:
        write("", "by umask")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(os.stat("by umask").st_mode) == 0o640


def test_as_long_a_name_as_there_may_be(folder):
    fq(*RESULTS, "--json", LONG + ".json", cwd=folder)
    assert os.path.getsize(LONG + ".json") > 1000
    assert not [name for name in os.listdir() if name.endswith(".part")]


def test_what_cannot_be_written_whole_leaves_what_was_there(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    before = contents(folder)
    with pytest.raises(OSError, match="No space"):
        write("new", TEXT)
    assert contents(folder) == before
