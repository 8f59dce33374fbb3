"""A sweep extended by chunks and by cells: what one run of all of it gives, and nothing evaluated twice."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import replace

import pytest
from command_line import fq, popen
from stored_runs import CELL, RUN, bits, ended, killed_at_statement

from fq import FqError, Sweep, cells_of
from fq.cli import main
from fq.commands.show_sweep import sweep_text
from fq.gguf.synthetic import SAMPLE_TEXT
from fq.measure.cells import Cell
from fq.results.runs import Results
from fq.run.fork import Fork

N_CTX, CHUNKS, MORE = 32, 2, 5
# what goes by the rows before, by the whole chunk, and by the row alone
FORMATS = ["bf16", "bf16:first-call", "bf16:stochastic,seed=3", "int8:tensor"]


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))


@pytest.fixture
def evaluated(monkeypatch):
    """How many variants each chunk's evaluation had, as it is made."""
    counts, plain = [], Fork.logits

    def counted(self, ids, first_output, variants, on_step):
        counts.append(len(variants))
        return plain(self, ids, first_output, variants, on_step)

    monkeypatch.setattr(Fork, "logits", counted)
    return counts


def done(run):
    for _ in run:
        pass
    return run


def same(run, other):
    assert run.finished.keys() == other.finished.keys()
    for at, left in run.finished.items():
        assert bits(left) == bits(other.finished[at]), at


# ---------------------------------------------------------------- from Python


@pytest.mark.parametrize("order", ["random", "first"])
def test_by_chunks_and_by_cells(tiny, tokens, executor, evaluated, order):
    options = {"n_ctx": N_CTX, "executor": executor, "chunk_order": order}
    few, all_of_them = cells_of(tiny, formats=FORMATS[:2]), cells_of(tiny, formats=FORMATS)
    whole = done(Sweep(tiny, tokens, all_of_them, chunks=MORE, **options))
    short = done(Sweep(tiny, tokens, few, chunks=CHUNKS, **options))
    evaluated.clear()
    longer = Sweep(tiny, tokens, few, chunks=MORE, **options)
    longer.finished.update(short.finished)
    done(longer)
    assert evaluated == [len(few)] * (MORE - CHUNKS)
    evaluated.clear()
    wider = Sweep(tiny, tokens, all_of_them, chunks=MORE, **options)
    wider.finished.update(longer.finished)
    # of the new cells none has ended: the others keep their figures
    behind, had = wider.result(), longer.result()
    assert behind["partial"] and behind["behind"] == [cell.name for cell in all_of_them[len(few) :]]
    assert (
        behind["n_chunks"] == MORE and behind["cells"] == had["cells"] and behind["groups"] == had["groups"]
    )
    assert f"{len(all_of_them) - len(few)} cells are behind" in sweep_text(behind | {"text": "t"})
    done(wider)
    assert evaluated == [len(all_of_them) - len(few)] * MORE
    same(wider, whole)
    assert wider.result() == whole.result()


def test_the_same_rules_in_two_groups_are_evaluated_once(tiny, tokens, executor, evaluated):
    options = {"n_ctx": N_CTX, "executor": executor, "chunks": CHUNKS}
    cells = cells_of(tiny, ["ffn_norm", "ffn_norm[0-1]"])
    run = Sweep(tiny, tokens, cells, **options)
    steps = []
    total, run.on_step = run.steps, lambda: steps.append(1)
    assert sorted(run) == [(i, c) for i in range(len(cells)) for c in range(CHUNKS)]
    assert evaluated == [5] * CHUNKS and len(steps) == total  # control, 2 layers, both twice under two names
    alone = done(Sweep(tiny, tokens, cells_of(tiny, ["ffn_norm[0-1]"]), **options))
    assert run.result()["groups"][1] == alone.result()["groups"][0]


# ---------------------------------------------------------------- the store


def with_chunks(run, n):
    return replace(run, settings=run.settings | {"n_chunks_asked": n, "chunk_indices": list(range(n))[::-1]})


OTHERS = [Cell(f"ffn_norm[0].raw=int{n}", "single", "g", (f"ffn_norm[0].raw=int{n}",)) for n in (4, 8)]


def test_what_is_there_stays_in_its_place(tmp_path):
    with Results(tmp_path / "s.sqlite") as store:
        number = store.add(replace(RUN, settings=RUN.settings | {"command": "fq a"}))
        more = replace(RUN, cells=(OTHERS[0], CELL), settings=RUN.settings | {"command": "fq b"})
        _, now, was = store.begin(RUN, more)
        assert was.cells == RUN.cells and now.cells == (*RUN.cells, OTHERS[0])
        assert now.settings["command"] == "fq a && fq b" and store.get(number) == now
        # fewer chunks and cells than there are ask for nothing
        assert store.begin(RUN, with_chunks(replace(RUN, cells=()), 1)) == (number, now, now)
        _, longer, was = store.begin(RUN, with_chunks(replace(RUN, cells=(CELL,)), 7))
        assert was == now and longer.cells == now.cells
        assert longer.settings["n_chunks_asked"] == 7 and longer.settings["chunk_indices"] == [
            6,
            5,
            4,
            3,
            2,
            1,
            0,
        ]
        assert [run["of"] for run in store.list()] == [3 * 7] and store.get(number) == longer


def test_which_of_several(tmp_path):
    """One that has the cells, though another is newer: it may have been interrupted."""
    with Results(tmp_path / "s.sqlite") as store:
        first = store.add(replace(RUN, cells=(*RUN.cells, OTHERS[0])))
        second = store.add(RUN)
        assert store.begin(RUN, replace(RUN, cells=(OTHERS[0],))).number == first
        assert store.begin(RUN, RUN).number == second
        assert store.begin(RUN, replace(RUN, cells=(OTHERS[1],))).number == second
        assert store.begin(RUN, replace(RUN, cells=tuple(OTHERS))).number == second


def test_two_begin_one_after_the_other(tmp_path, monkeypatch):
    """Else both find none and make one each, or each writes its cells over the other's."""
    monkeypatch.setattr("fq.results.store_file.BUSY_SECONDS", 0.05)
    with Results(tmp_path / "s.sqlite") as one, Results(tmp_path / "s.sqlite") as other:
        look = one._newest_like

        def meanwhile(run):
            found = look(run)
            with pytest.raises(FqError, match="locked"):
                other.begin(RUN, RUN)
            return found

        monkeypatch.setattr(one, "_newest_like", meanwhile)
        assert one.begin(RUN, RUN) == (1, RUN, None)
        assert other.begin(RUN, RUN) == (1, RUN, RUN)


# ---------------------------------------------------------------- static scales


def with_scales(run, **files):
    """A file of static scales by its name, with its SHA-256."""
    about = {"method": "largest", "per": "tensor", "same_text": False, "model": {"file": "m.gguf"}}
    about["text"] = {"name": "t.txt", "sha256": "0" * 64}
    found = [about | {"file": file, "sha256": sha256} for file, sha256 in files.items()]
    return replace(run, settings=run.settings | {"calibrations": found})


@pytest.fixture
def unchecked(monkeypatch):
    """Files of static scales that there are not."""
    monkeypatch.setattr("fq.results.runs.check_scales", lambda number, run: None)


def test_runs_can_be_one_unless_the_same_file_is_another(tmp_path, unchecked):
    with Results(tmp_path / "s.sqlite") as store:
        number = store.add(with_scales(RUN, a="1"))
        assert store.begin(RUN, replace(RUN, cells=())).number == number
        assert store.begin(RUN, with_scales(replace(RUN, cells=()), a="1", b="7")).number == number
        more = replace(RUN, cells=(OTHERS[0],))
        assert store.begin(RUN, with_scales(more, b="2", a="1")).run.scales == {"a": "1", "b": "2"}
        other = with_scales(RUN, b="3")
        assert store.begin(other, other) == (number + 1, other, None)
        plain = store.begin(replace(RUN, text_sha256="c" * 64)).number
        more = with_scales(replace(more, text_sha256="c" * 64), a="1")
        assert store.begin(more, more)[0] == plain and store.get(plain).scales == {"a": "1"}


def test_a_run_whose_kept_identity_has_its_scales_is_found(tmp_path, unchecked):
    with Results(tmp_path / "s.sqlite") as store:
        number = store.add(with_scales(RUN, a="1"))
        for run in (RUN, replace(RUN, text_sha256="c" * 64)):
            store.add(with_scales(run, b="1"))
        store._db.execute("UPDATE runs SET digest = NULL, identity = 'before' || id")
        assert store.begin(RUN, with_scales(RUN, a="1", b="2")).number == number
        other = with_scales(replace(RUN, versions={"fq": "2"}), a="1")
        assert store.begin(other, other).was is None


# ---------------------------------------------------------------- the command


@pytest.fixture
def sweep(tiny_path, tmp_path):
    return ["sweep", "-m", str(tiny_path), "-c", str(N_CTX), "-t", "1", "--store", str(tmp_path / "s.sqlite")]


def formats(*specs):
    return [word for spec in specs for word in ("--format", spec)]


def loaded(path, number=1):
    with Results(path) as store:
        cells, left = store.get(number).cells, store.load(number)
        return {(cells[cell].name, chunk): bits(one) for (cell, chunk), one in left.items()}


def test_the_command_extends(sweep, tmp_path, evaluated, capsys):
    path = tmp_path / "s.sqlite"

    def extend(*options, said, counts):
        evaluated.clear()
        assert main([*sweep, *options]) == 0
        err = capsys.readouterr().err
        for line in said:
            assert f"fq: {line}\n" in err, err
        assert err.count("is extended by") == sum("is extended by" in line for line in said)
        assert evaluated == counts

    extend(*formats("bf16"), "--chunks", "2", said=[], counts=[4, 4])
    extend(
        "--resume",
        said=["going on with run 1: 8 of 8 chunks of cells are there (4 cells, 2 chunks)"],
        counts=[],
    )
    extend(
        *("--resume", "--chunks", "4"),
        said=[
            "going on with run 1: 8 of 16 chunks of cells are there (4 cells, 4 chunks)",
            "run 1 is extended by 2 chunks",
        ],
        counts=[4, 4],
    )
    extend(
        *("--resume", *formats("bf16:stochastic"), "--seed", "7", "--noise")[:-1],
        said=[
            "going on with run 1: 16 of 28 chunks of cells are there (7 cells, 4 chunks)",
            "run 1 is extended by 3 cells (ffn_norm[*].raw=bf16:stochastic,seed=7)",
        ],
        counts=[3] * 4,
    )
    extend(
        *("--resume", "--noise", "--chunks", "5"),
        said=[
            "going on with run 1: 28 of 65 chunks of cells are there (13 cells, 5 chunks)",
            "run 1 is extended by 6 cells (ffn_norm[*].raw=noise_bf16, ffn_norm[*].raw=signs_bf16) "
            "and 1 chunk",
        ],
        counts=[6] * 4 + [13],
    )
    # the noise is known, though this command names none
    extend(
        *("--resume", "--sites", "output_norm", "--chunks", "3"),
        said=[
            "going on with run 1: 65 of 70 chunks of cells are there (14 cells, 5 chunks)",
            "run 1 is extended by 1 cell (output_norm.raw=bf16)",
        ],
        counts=[1] * 5,
    )
    whole = tmp_path / "whole.sqlite"
    at_once = [*sweep[:-1], str(whole), "--sites", "ffn_norm", "--sites", "output_norm", "--chunks", "5"]
    assert main([*at_once, *formats("bf16", "bf16:stochastic,seed=7"), "--noise"][:-1]) == 0
    got, want = loaded(path), loaded(whole)
    shared = got.keys() & want.keys()
    assert len(shared) == 8 * 5 and all(got[at] == want[at] for at in shared)
    out, _ = fq("results", 1, "--store", path, "--json", "-")
    data = json.loads(out)
    assert not data["partial"] and data["n_chunks"] == len(data["chunk_indices"]) == 5
    assert data["command"].count(" && fq sweep ") == 4


def test_an_extension_that_is_killed_goes_on(sweep, tmp_path):
    path, whole = tmp_path / "s.sqlite", tmp_path / "whole.sqlite"
    first, second = formats("bf16", "bf16:first-call"), formats("bf16:stochastic,seed=3")
    fq(*sweep[:-1], whole, *first, *second, "--chunks", 12)
    fq(*sweep, *first, "--chunks", 4)
    before, all_of_it = ended(path), 10 * 12
    assert before == 7 * 4
    rng, killed = random.Random(3), 0
    for _ in range(5):
        _, status = killed_at_statement(
            rng.randint(10, 120), [*sweep, *second, "--chunks", 12, "--resume"], tmp_path
        )
        killed += status == -signal.SIGKILL
        assert ended(path) >= before
        before = ended(path)
    assert killed >= 2 and before > 7 * 4
    fq(*sweep, "--resume")  # which need not say again what is to be done
    assert ended(path) == all_of_it and loaded(path) == loaded(whole)


def test_processes_that_begin_and_extend_one_run_at_once(sweep, tmp_path):
    """One run, each cell in one place: whoever comes first makes it, the others extend it."""
    path, whole = tmp_path / "s.sqlite", tmp_path / "whole.sqlite"
    specs = ("bf16", "int4", "bf16:stochastic,seed=3")
    processes = [
        popen(*sweep, "--resume", *formats(spec), "--chunks", 20 + i) for i, spec in enumerate(specs)
    ]
    said = [process.communicate()[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    assert sum("a new one" in err for err in said) == 1
    fq(*sweep, "--resume")  # of the first ones the chunks that the last one added
    fq(*sweep[:-1], whole, *formats(*specs), "--chunks", 22)
    with Results(path) as store:
        assert len(store.list()) == 1 and len(set(store.get(1).cells)) == len(store.get(1).cells) == 10
    assert loaded(path) == loaded(whole)


def test_the_command_extends_a_run_of_static_scales(sweep, tmp_path, tiny_path):
    path, file = tmp_path / "s.sqlite", tmp_path / "scales.json"
    calibrate = ["calibrate", "-m", tiny_path, "-c", N_CTX, "--sites", "ffn_norm[*].raw", "-o", file]
    fq(*calibrate, "--chunks", 2)
    static = formats(f"int8:scale=@{file}")
    fq(*sweep, *static, "--chunks", 2)
    _, err = fq(*sweep, "--resume", "--chunks", 3)
    assert "run 1 is extended by 1 chunk\n" in err
    _, err = fq(*sweep, "--resume", *formats("bf16"))
    assert "run 1 is extended by 3 cells (ffn_norm[*].raw=bf16)\n" in err
    other = tmp_path / "other.sqlite"
    fq(*sweep[:-1], other, *formats("bf16"), "--chunks", 3)
    fq(*sweep[:-1], other, "--resume", *static)
    assert loaded(path) == loaded(other)
    with Results(path) as store, Results(other) as beside:
        was = store.get(1)
        assert was.settings["calibrations"] == beside.get(1).settings["calibrations"] and was.scales
    fq(*calibrate, "--chunks", 1)
    _, err = fq(*sweep, "--resume", "--chunks", 4, status=2)
    assert f"{file} has other static scales than run 1 was measured with" in err
    file.write_text("{}")
    _, err = fq(*sweep, "--resume", "--chunks", 4, status=2)
    assert "is no file of static scales" in err
    with Results(path) as store:
        assert store.get(1) == was and len(store.list()) == 1
