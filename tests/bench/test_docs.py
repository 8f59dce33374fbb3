"""What README and docs keep is what the programs gave, and the sample text still gives what README says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # last: an installed package goes before the sources

from bench import docs
from bench.docs import BLOCKS, ROOT, Block
from bench.kept import kept, marks
from fq import machine

BY_NAME = {block.name: block for block in BLOCKS}
KEPT = [(document, block) for block in BLOCKS for document in block.documents(ROOT)]
DOCUMENTS = sorted({document for document, _ in KEPT})
NUMBER = re.compile(r"\d\.\d+e[-+]\d+")
CLOSE = 0.05  # of mean KL divergences: other orders of summation, on other processors or by other commits


def number_after(label: str, text: str) -> str:
    found = NUMBER.search(text, text.index(label))
    assert found, label
    return found[0]


def only(pattern: str, text: str) -> str:
    (found,) = set(re.findall(pattern, text))
    return found


# ---------------------------------------------------------------- the blocks, as they are kept


def test_all_blocks_are_as_they_were_made():
    assert docs.problems() == []


def test_the_marks_are_the_blocks():
    begin = re.compile(re.escape(marks("@")[0]).replace("@", "(.+)"))
    found = [(d, name) for d in DOCUMENTS for name in begin.findall((ROOT / d).read_text("utf-8"))]
    assert sorted(found) == sorted((document, block.name) for document, block in KEPT)


@pytest.mark.parametrize(("document", "block"), KEPT, ids=str)
@pytest.mark.parametrize("change", ["figure", "commit", "processor", "command", "no line"])
def test_what_is_changed_by_hand_is_found(tmp_path, monkeypatch, document, block, change):
    monkeypatch.setattr(docs, "BLOCKS", (block,))
    (tmp_path / document).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / document, tmp_path / document)
    old = kept(ROOT / document, block.name)
    body, _, line = old.rpartition("\n")
    if change == "figure":
        digit = re.search(r"\d", old)
        assert digit
        new = f"{old[: digit.start()]}{(int(digit[0]) + 1) % 10}{old[digit.end() :]}"
    elif change == "no line":
        new = body
    else:
        pattern = {"commit": r"(?<=commit )\w", "processor": "processor ", "command": "`"}[change]
        new = f"{body}\n{re.sub(pattern, 'x', line, count=1)}"
    assert new != old
    text = (tmp_path / document).read_text("utf-8")
    (tmp_path / document).write_text(text.replace(old, new), "utf-8")
    (problem,) = docs.problems(tmp_path)
    assert problem.startswith(f"{document}, {block.name}: ")


def test_the_summary_is_that_of_the_tables():
    summary = BY_NAME["summary"]
    assert docs.output(summary) == docs.read(summary)[0]


def test_readme_shows_the_commands_of_its_blocks():
    readme = (ROOT / "README.md").read_text("utf-8")
    first = only(r"<!-- measure -->\n```sh\n(.*)\n```", readme)
    assert first.endswith(f".venv/bin/{BY_NAME['sample'].commands[0]}")


def test_rules_show_the_command_of_their_block():
    assert f"\n    {BY_NAME['deployed'].commands[0]}\n" in (ROOT / "docs/rules.md").read_text("utf-8")


def test_readme_has_its_figures_in_blocks_alone():
    readme = (ROOT / "README.md").read_text("utf-8")
    for block in BLOCKS:
        if block.document == "README.md":
            readme = readme.replace(kept(ROOT / "README.md", block.name), "")
    assert NUMBER.findall(readme) == []


# ---------------------------------------------------------------- they agree


def measured():
    """((what is rounded, text, chunks), mean KL as it is printed, the block's line) of all of SmolLM2's."""
    every, wiki, sample = "ffn_norm[*].raw=", docs.TEXT, "the sample"
    found = []
    for name, what, text in (("sample", f"{every}bf16", sample), ("deployed", "deployed path", wiki)):
        body, about = docs.read(BY_NAME[name])
        chunks = only(r"(\d+) (?:\w+ )*chunks of 512", body)
        found.append(((what, text, chunks), number_after("mean KL divergence", body), about))

    body, about = docs.read(BY_NAME["formats"])
    head, *rows = ([cell.strip(" `") for cell in row.split("|")] for row in re.findall(r"^\| .*", body, re.M))
    for row in rows:
        what = row[1] if row[1] == "deployed path" else every + row[1]
        if value := NUMBER.search(row[head.index("mean KL")]):
            found.append(((what, wiki, only(r"(\d+) chunks of 512", body)), value[0], about))

    body, about = docs.read(BY_NAME["replication"])
    body = body.partition("\n## 7. Perplexity\n")[2].partition("\n### tinyllama-shape")[0]
    (row,) = re.findall(r"^\| mean KL \|.*", body, re.M)
    value = NUMBER.findall(row)[-1]
    found.append(((f"{every}bf16", sample, only(r"(\d+) chunks of 512", body)), value, about))

    page = (ROOT / "docs/example-report.html").read_text("utf-8")
    _, about = docs.read(BY_NAME["example report"])
    chunks = only(rf"{re.escape(wiki)}: (\d+) chunks of 512", page)
    groups = re.findall(rf'<th scope="row">({re.escape(every)}[\w:]+)</th><td>({NUMBER.pattern})', page)
    assert {what for what, _ in groups} >= {f"{every}bf16", f"{every}fp8_e4m3fn"}
    return found + [((what, wiki, chunks), value, about) for what, value in dict(groups).items()]


def last_digit(value: str) -> float:
    mantissa, exponent = value.split("e")
    return 10.0 ** (int(exponent) - len(mantissa.partition(".")[2]))


def agree(a, b) -> bool:
    """To the last digit that both have, if one commit gave them with one order of summation."""
    (_, x, about_x), (_, y, about_y) = a, b
    same = all(about_x[key] == about_y[key] for key in ("commit", "numerics"))
    margin = 0.51 * max(last_digit(x), last_digit(y)) if same else CLOSE * float(x)
    return abs(float(x) - float(y)) <= margin


def test_equal_measurements_agree():
    pairs = [(a, b) for a, b in combinations(measured(), 2) if a[0] == b[0]]
    assert {a[0][0] for a, _ in pairs} >= {
        "deployed path",
        "ffn_norm[*].raw=bf16",
        "ffn_norm[*].raw=fp8_e4m3fn",
    }
    assert [pair for pair in pairs if not agree(*pair)] == []


@pytest.mark.parametrize(
    ("x", "y", "commit", "agreed"),
    [
        ("9.413e-03", "9.41e-03", "a", True),
        ("9.413e-03", "9.42e-03", "a", False),
        ("2.709e-03", "2.709e-03", "a", True),
        ("2.709e-03", "2.710e-03", "a", False),
        ("2.709e-03", "2.823e-03", "b", True),
        ("2.709e-03", "2.909e-03", "b", False),
    ],
)
def test_agreement(x, y, commit, agreed):
    one, other = ({"commit": c, "numerics": "avx512"} for c in ("a", commit))
    assert agree((None, x, one), (None, y, other)) is agreed


@pytest.mark.long
def test_the_sample_text_gives_what_readme_says(smollm2_path):
    """To the last digit, on any machine.

    FQ_README_SAID, a file, has what its first command has printed, where that has just been run.
    """
    block = BY_NAME["sample"]
    said, _ = docs.read(block)
    if printed := os.environ.get("FQ_README_SAID"):
        installed, model, measured = Path(printed).read_text("utf-8").rpartition("\nmodel ")
        assert installed
        given = docs.kept_of(block, [model + measured])
    else:
        given = docs.output(block)
    said, given = (re.sub(r"^time .*", "", text, flags=re.M) for text in (said, given))
    assert given == said


# ---------------------------------------------------------------- making them


def python(code: str, **options) -> Block:
    return Block("b", "a.md", (f'python -c "{code}"',), minutes=0, **options)


def test_what_is_kept_of_an_output():
    assert docs.output(python("print('\\n| a |\\n')")) == "| a |"
    block = python("print('PPL 1\\n\\nrule: r\\nrow')", plain=True, until="rule: ")
    assert docs.output(block) == "```text\nPPL 1\n```"
    several = ("python -c 'print(1)'", "fq --version")
    assert docs.output(Block("b", "a.md", several, minutes=0)).startswith("1\nfq ")
    assert docs.output(Block("b", "a.md", several, minutes=0, last=True)).startswith("fq ")
    assert docs.output(Block("b", "a.md", several, minutes=0, only="f")).startswith("fq ")
    with pytest.raises(ValueError, match="b: its commands gave nothing that is kept"):
        docs.output(Block("b", "a.md", several, minutes=0, only="x"))


def test_the_commands_see_the_text_and_no_folder_of_this_machine(tmp_path):
    text = tmp_path / "else.txt"
    text.write_text("words")
    block = python("import os; print(open('wiki.test.raw').read(), sorted(os.listdir()))")
    assert docs.output(block, text) == "words ['docs', 'wiki.test.raw']"
    block = Block("b", "a.md", (f"{docs.LLAMA_PYTHON} -c 'print(1)'",), minutes=0)
    assert docs.output(block, programs={docs.LLAMA_PYTHON: sys.executable}) == "1"


def test_a_command_that_fails(tmp_path):
    with pytest.raises(ValueError, match="exit status 1"):
        docs.output(python("print(1); exit(1)"))
    with pytest.raises(ValueError, match="exit status 1"):  # died, and has not judged
        docs.output(python("exit(1)", judges=True))
    assert docs.output(python("print(1); exit(1)", judges=True)) == "1"
    with pytest.raises(ValueError, match="exit status 2"):
        docs.output(python("print(1); exit(2)", judges=True))


def test_a_block_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "processor", lambda: "P (x), y")
    (tmp_path / "a.md").write_text("\n".join(["before", *marks("b"), "after"]))
    block = python("")
    for body in ("| 1 |\n\n| 2 |", ""):
        docs.write(block, body, "abcdef0", tmp_path)
        again, about = docs.read(block, tmp_path)
        assert again == body
        assert (about["commit"], about["processor"]) == ("abcdef0", "P (x), y")
        assert about["numerics"] == docs.numerics()
    text = (tmp_path / "a.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter")


def test_a_table_is_added_for_each_processor(tmp_path, monkeypatch):
    block = Block("b", "results/{processor}/b.md", ('python -c ""',), minutes=0)
    monkeypatch.setattr(docs, "BLOCKS", (block,))
    for name, isa in (("A (family 25 model 1: Zen 3)", "avx2"), ("B(R) Processor C", "avx512")):
        monkeypatch.setattr(machine, "processor", lambda name=name: name)
        monkeypatch.setattr(docs, "isa", lambda isa=isa: isa)
        docs.write(block, f"old {isa}", "abcdef0", tmp_path)
        docs.write(block, f"new {isa}", "abcdef0", tmp_path)  # in the place of the old one
    assert block.documents(tmp_path) == ["results/b-c-avx512/b.md", "results/zen-3-avx2/b.md"]
    assert [docs.read(block, tmp_path, d)[0] for d in block.documents(tmp_path)] == ["new avx512", "new avx2"]
    assert docs.problems(tmp_path) == []


def test_a_changed_tree_is_refused(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=tmp_path, check=True)

    for name in ("program.py", "README.md"):
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "1")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("2")  # as a run of bench.docs leaves it
    clean = docs.commit_here(allow_dirty=False)
    assert re.fullmatch("[0-9a-f]{7}", clean)
    (tmp_path / "program.py").write_text("2")
    with pytest.raises(ValueError, match="the tree differs from its commit"):
        docs.commit_here(allow_dirty=False)
    assert docs.commit_here(allow_dirty=True) == f"{clean}+"


def test_figures_of_a_changed_tree_do_not_stay(tmp_path, monkeypatch):
    (tmp_path / "a.md").write_text("\n".join(marks("b")))
    monkeypatch.setattr(docs, "BLOCKS", (python(""),))
    docs.write(docs.BLOCKS[0], "1", "abcdef0+", tmp_path)
    assert docs.problems(tmp_path) == ["a.md, b: made by a changed abcdef0"]


def test_what_cannot_be_made_is_left_out_or_refused(capsys):
    assert [b.name for b in docs.chosen(docs.parse([]))] == [
        *("sample", "kernels", "where", "casts", "summary", "damaged stores", "crosscheck", "coverage"),
        "replication",
    ]
    assert "bench.docs: peers is left out: needs -f TEXT\n" in capsys.readouterr().err
    given = ["-f", "x", "--llama-python", "y", "--llama-perplexity", "z"]
    assert [b.name for b in docs.chosen(docs.parse(given))] == list(BY_NAME)
    some = [b.name for b in docs.chosen(docs.parse(given[:4]))]
    assert set(BY_NAME) - set(some) == {"two files", "tasks"}
    with pytest.raises(ValueError, match="formats needs -f TEXT"):
        docs.chosen(docs.parse(["--only", "sample", "formats"]))


def test_list_and_check(capsys):
    assert docs.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(BLOCKS)
    assert docs.main(["--check"]) == 0
    assert capsys.readouterr().out == "all blocks are as they were made\n"


CPU = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: {}\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (CPU.format("AuthenticAMD", 25, 17, "AMD EPYC"), "AMD EPYC (family 25 model 17: Zen 4)"),
        (CPU.format("AuthenticAMD", 25, 1, "AMD EPYC"), "AMD EPYC (family 25 model 1: Zen 3)"),
        (CPU.format("GenuineIntel", 6, 17, "Intel Xeon"), "Intel Xeon (family 6 model 17)"),
        (CPU.format("GenuineIntel", "", "x", "Intel"), "Intel"),
        ("processor\t: 0\nCPU part\t: 0xd0c\n", "aarch64"),
        ("", "aarch64"),
    ],
)
def test_the_processor_is_named(monkeypatch, cpuinfo, name):
    monkeypatch.setattr(machine, "_read", lambda path: cpuinfo)
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.processor() == name
