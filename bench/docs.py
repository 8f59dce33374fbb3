"""Makes the figures that README and docs keep, by one command from one commit.

A kept block is what its command gave, and a line that names the command, the commit, the processor with
what its sums depend on, and the date. Nobody writes in it: its digest would no longer be right.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fq import machine
from fq_kernels import isa

from .kept import keep, kept, marks

ROOT = Path(__file__).parents[1]
# What the options -f, --llama-python and --llama-perplexity stand for in the commands, as they are shown.
TEXT, LLAMA_PYTHON = "wiki.test.raw", "llama/bin/python"
LLAMA_PERPLEXITY = "llama/bin/llama-perplexity"
CHROMIUM = (
    "chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --force-color-profile=srgb "
    "--window-size=1280,1965 --screenshot=docs/example-report.png docs/example-report.html"
)


@dataclass(frozen=True)
class Block:
    """A kept block, and the commands that make it. With `{processor}` in its document's path there is one for
    each processor: made again on the same, and beside it on another."""

    name: str
    document: str
    commands: tuple[str, ...]  # what they print is kept
    minutes: int  # on two processors, about
    plain: bool = False  # not Markdown
    until: str | None = None  # what begins the first line that is left out
    only: str | None = None  # a pattern of the beginnings of the lines that are kept
    last: bool = False  # what the last command prints is kept alone
    judges: bool = False  # the last one's exit status is 1 where a figure is not as asked for

    def needs(self, word: str) -> bool:
        return any(word in shlex.split(command) for command in self.commands)

    def document_here(self) -> str:
        """The document of the processor that this runs on."""
        return self.document.format(processor=processor_slug())

    def documents(self, root: Path) -> list[str]:
        """Those that there are, of any processor."""
        if "{processor}" not in self.document:
            return [self.document]
        found = root.glob(self.document.format(processor="*"))
        return sorted(str(path.relative_to(root)) for path in found)


BLOCKS = (
    Block(
        "sample",
        "README.md",
        ("fq perplexity --fake-quant-ffn-norm bf16 --control",),
        minutes=1,
        plain=True,
        until="rule: ",
    ),
    Block(
        "deployed",
        "docs/rules.md",
        ("fq perplexity -f wiki.test.raw --chunks 8 --activations ggml --baseline-activations exact",),
        minutes=1,
        plain=True,
    ),
    Block(
        "example report",
        "docs/sweep.md",
        (
            "fq sweep -m smollm2 -f wiki.test.raw --chunks 8 --format bf16 --format fp8_e4m3fn "
            "--format noise_bf16 --format signs_bf16",
            "fq report -o docs/example-report.html",
            CHROMIUM,
        ),
        minutes=15,
        last=True,
    ),
    Block("kernels", "bench/results/{processor}/kernels.md", ("python -m bench.report",), minutes=10),
    Block(
        "peers",
        "bench/results/{processor}/peers.md",
        ("python -m bench.peers --llama-python llama/bin/python -f wiki.test.raw --perplexity-threads 1 2",),
        minutes=14,
        judges=True,
    ),
    Block(
        "where",
        "bench/results/{processor}/where.md",
        ("python -m bench.where -m smollm2 -m tinyllama-shape",),
        minutes=5,
    ),
    Block("casts", "bench/results/{processor}/casts.md", ("python -m bench.casts",), minutes=1),
    Block("summary", "bench/README.md", ("python -m bench.summary",), minutes=0),
    Block(
        "formats",
        "docs/formats.md",
        ("python -m bench.formats -f wiki.test.raw --chunks 8",),
        minutes=10,
        judges=True,
    ),
    Block(
        "cache and residual",
        "docs/models.md",
        (
            *(
                f"fq sweep -f wiki.test.raw --chunks 8 {options}"
                for options in (
                    "--sites 'k[*]' --sites 'v[*]' --format fp8_e4m3fn --format int8 --format int4",
                    "--resume --sites 'l_out[*]'",
                    "--resume --sites 'ffn_act[*]' --format int8",
                    "-m gemma3-270m -c 256 --sites 'k[*]' --sites 'v[*]' "
                    "--format fp8_e4m3fn --format int8 --format int4",
                    "-m gemma3-270m -c 256 --resume --sites 'l_out[*]' --sites 'attn_post_norm[*].weighted'",
                    "-m gemma3-270m -c 256 --resume --sites 'ffn_act[*]' --format int8",
                )
            ),
            "python -m bench.sites_table --over 'k[*]' 'v[*]' --over int8 fp8_e4m3fn",
        ),
        minutes=8,
        last=True,
    ),
    Block(
        "whole table",
        "docs/sensitivity.md",
        ("python -m bench.sensitivity -m smollm2 -f wiki.test.raw",),
        minutes=6,
    ),
    Block(
        "scale",
        "docs/scale-out.md",
        ("python -m bench.scale -m smollm2 -f wiki.test.raw",),
        minutes=25,
        judges=True,
    ),
    Block(
        "damaged stores",
        "docs/scale-out.md",
        ("python -m bench.damaged_stores",),
        minutes=2,
        judges=True,
    ),
    Block(
        "two files",
        "docs/tasks.md",
        (f"python -m bench.two_files -m smollm2 -f wiki.test.raw --llama-perplexity {LLAMA_PERPLEXITY}",),
        minutes=4,
        judges=True,
    ),
    Block(
        "tasks",
        "docs/tasks.md",
        (
            "python -m bench.tasks -m smollm2 -f wiki.test.raw --lm-eval "
            f"--llama-perplexity {LLAMA_PERPLEXITY}",
        ),
        minutes=10,
        judges=True,
    ),
    Block(
        "greedy divergence",
        "docs/tasks.md",
        (
            "fq divergence -m smollm2 -f wiki.test.raw --prompts 64 "
            "--fake-quant 'ffn_norm[*].raw=bf16' --fake-quant-counts rows",
        ),
        minutes=4,
        plain=True,
        until="rule: ",
    ),
    Block("crosscheck", "docs/formats.md", ("python -m bench.crosscheck",), minutes=1, judges=True),
    Block(
        "static scales",
        "docs/formats.md",
        ("python -m bench.static_scales -m smollm2 -m gemma3-270m -f wiki.test.raw --chunks 8",),
        minutes=15,
    ),
    Block(
        "norm steps",
        "docs/norm-unit.md",
        ("python -m bench.norm_units -m smollm2 -m gemma3-270m -f wiki.test.raw --chunks 8",),
        minutes=6,
    ),
    Block(
        "profiles",
        "docs/norm-unit.md",
        ("python -m bench.norm_units -m smollm2 -f wiki.test.raw --chunks 8 --profiles",),
        minutes=4,
    ),
    Block(
        "each norm",
        "docs/norm-unit.md",
        (
            "fq sweep -m smollm2 -f wiki.test.raw --chunks 8 --each-norm steps "
            "--norm-unit 'ffn_norm=x=bf16;acc=bf16;order=lanes=16;rsqrt=lut=6;out=bf16'",
        ),
        minutes=4,
        plain=True,
        only=r"mean KL, one norm|ffn_norm\[\d|in company",
    ),
    Block(
        "cheapest unit",
        "docs/norm-unit.md",
        (
            "fq sweep -m gemma3-270m -f wiki.test.raw --chunks 8 --whole-units --norm-unit "
            "'*=x={bf16|e8m10};acc={bf16|e8m10|f32};order=lanes=16;rsqrt={lut=6|lut=8|newton=1,lut=4};out={bf16|e8m10}'",
            "fq pareto --prices docs/unit-prices.csv --budget 1e-4 -o docs/unit-pareto.png",
        ),
        minutes=8,
        plain=True,
        last=True,
    ),
    Block(
        "torch norms",
        "docs/norm-unit.md",
        ("python -m bench.torch_norms -m smollm2 -m gemma3-270m -f wiki.test.raw",),
        minutes=3,
        judges=True,
    ),
    Block(
        "seeds",
        "docs/statistics.md",
        (f"fq perplexity -f {TEXT} --chunks 8 --fake-quant ffn_norm=bf16:stochastic --realisations 5",),
        minutes=1,
        plain=True,
        only=r"  of \d|  change of|  each",
    ),
    Block(
        "realisations", "docs/statistics.md", ("python -m bench.realisations -f wiki.test.raw",), minutes=5
    ),
    Block("coverage", "docs/statistics.md", ("python -m bench.coverage",), minutes=15, judges=True),
    Block("replication", "docs/replication.md", ("fq replicate --tinyllama-shape",), minutes=10),
)


# ---------------------------------------------------------------- a block in its document

LINE = re.compile(
    r"(?P<commands>`.+`), commit (?P<commit>[0-9a-f]{7}\+?), processor (?P<processor>.+), "
    r"(?P<numerics>\w+(?: with [^,]+)?), (?P<date>\d{4}-\d\d-\d\d) <!-- (?P<digest>[0-9a-f]{8}) -->"
)


def numerics() -> str:
    """What made the figures."""
    return isa()


def processor_slug() -> str:
    """The name of a folder for what this processor is, and the set that the kernels run: zen-3-avx2."""
    name = machine.processor()
    kind = re.search(r": ([^)]+)\)$", name)
    plain = re.sub(r"\((r|tm)\)|processor", " ", (kind[1] if kind else name).lower())
    words = re.findall(r"[a-z0-9]+", plain)
    return "-".join([*words, isa()])


def commands_text(block: Block) -> str:
    """Those that give figures: a picture of a page is none."""
    return ", ".join(f"`{command}`" for command in block.commands if command != CHROMIUM)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read(block: Block, root: Path = ROOT, document: str | None = None) -> tuple[str, dict[str, str]]:
    """What the command gave, and the fields of the line below it. Raises ValueError where they disagree."""
    document = document or block.document_here()
    body, _, line = ("\n" + kept(root / document, block.name)).rpartition("\n")
    found = LINE.fullmatch(line)
    where = f"{document}, {block.name}"
    if found is None:
        raise ValueError(f"{where}: no last line with command, commit, processor and date")
    if found["commands"] != commands_text(block):
        raise ValueError(f"{where}: was made by {found['commands']}, not by {commands_text(block)}")
    if digest(body.strip("\n") + line.partition(" <!--")[0]) != found["digest"]:
        raise ValueError(f"{where}: was changed by hand")
    return body.strip("\n"), found.groupdict()


def write(block: Block, body: str, commit: str, root: Path = ROOT) -> None:
    line = (
        f"{commands_text(block)}, commit {commit}, processor {machine.processor()}, {numerics()}, "
        f"{datetime.date.today().isoformat()}"
    )
    line += f" <!-- {digest(body + line)} -->"
    path = root / block.document_here()
    if "{processor}" in block.document and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        begin, end = marks(block.name)
        path.write_text(
            f"# {block.name.capitalize()}\n\n[What it is](../../README.md)\n\n{begin}\n{end}\n", "utf-8"
        )
    keep(path, f"{body}\n\n{line}" if body else line, block.name)


def problems(root: Path = ROOT) -> list[str]:
    """What is wrong with the blocks as they are kept."""
    found = []
    for block, document in [(b, d) for b in BLOCKS for d in b.documents(root)]:
        try:
            _, about = read(block, root, document)
        except ValueError as e:
            found.append(str(e))
        else:
            if about["commit"].endswith("+"):
                found.append(f"{document}, {block.name}: made by a changed {about['commit'][:-1]}")
    return found


# ---------------------------------------------------------------- making it


def output(block: Block, text: Path | None = None, programs: Mapping[str, str] = {}) -> str:
    """Run the block's commands and return what is kept. Raises ValueError or OSError.

    programs  what runs in the place of each that the commands name

    They run in a folder of their own, where the text lies under a bare name: no path of this machine
    gets into a document. The root's ``docs`` is there too.
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "model")])}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "docs").symlink_to(ROOT / "docs")
        if text:
            Path(folder, TEXT).symlink_to(text.resolve())
        printed = []
        for command in block.commands:
            argv = [programs.get(word, word) for word in shlex.split(command)]
            if argv[0] in ("fq", "python"):
                argv[:1] = [sys.executable, *(["-m", "fq"] if argv[0] == "fq" else [])]
            run = subprocess.run(
                argv, cwd=folder, env=env, stdout=subprocess.PIPE, encoding="utf-8", check=False
            )
            judged = block.judges and command is block.commands[-1] and run.stdout and run.returncode == 1
            if run.returncode and not judged:
                raise ValueError(f"{shlex.join(argv)}: exit status {run.returncode}")
            printed.append(run.stdout)
    return kept_of(block, printed)


def kept_of(block: Block, printed: Sequence[str]) -> str:
    """What of its commands' outputs is kept. Raises ValueError."""
    printed = [text.strip("\n") for text in printed]
    body = "\n".join(printed[-1:] if block.last else printed)
    if block.until is not None:
        body = body.partition(f"\n{block.until}")[0].rstrip("\n")
    if block.only is not None:
        body = "\n".join(line for line in body.split("\n") if re.match(block.only, line))
    if not body and not block.last:
        raise ValueError(f"{block.name}: its commands gave nothing that is kept")
    return f"```text\n{body}\n```" if block.plain else body


def commit_here(*, allow_dirty: bool) -> str:
    """HEAD, with a + where anything but the documents differs from it, which ValueError refuses."""

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if run.returncode:
            raise ValueError("git says nothing of the commit")
        return run.stdout.strip()

    others = (":!README.md", ":!bench/README.md", ":!bench/results", ":!docs")
    dirty = bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", *others))
    if dirty and not allow_dirty:
        raise ValueError("the tree differs from its commit: commit first, or --allow-dirty for a trial")
    return git("rev-parse", "--short=7", "HEAD")[:7] + "+" * dirty


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.docs", description=__doc__)
    parser.add_argument("-f", "--file", type=Path, metavar="TEXT", help="where wiki.test.raw is")
    parser.add_argument(
        "--llama-python", metavar="PATH", help="the Python that has llama-cpp-python installed"
    )
    parser.add_argument("--llama-perplexity", metavar="PATH", help="llama.cpp's program")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[block.name for block in BLOCKS], help="these alone"
    )
    parser.add_argument("--list", action="store_true", help="the blocks and their commands; runs nothing")
    parser.add_argument("--check", action="store_true", help="the blocks as they are kept; runs nothing")
    parser.add_argument("--allow-dirty", action="store_true", help="for a trial: the commit gets a +")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> list[Block]:
    """Raises ValueError where one that was asked for cannot be made."""
    blocks = []
    for block in BLOCKS:
        missing = [
            option
            for option, word, value in (
                ("-f TEXT", TEXT, args.file),
                ("--llama-python PATH", LLAMA_PYTHON, args.llama_python),
                ("--llama-perplexity PATH", LLAMA_PERPLEXITY, args.llama_perplexity),
            )
            if value is None and block.needs(word)
        ]
        if args.only and block.name not in args.only:
            continue
        if not missing:
            blocks.append(block)
        elif args.only:
            raise ValueError(f"{block.name} needs {missing[0]}")
        else:
            print(f"bench.docs: {block.name} is left out: needs {missing[0]}", file=sys.stderr)
    return blocks


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        for block in BLOCKS:
            print(f"{block.name}: {block.document}, {block.minutes} min, {commands_text(block)}")
        return 0
    if args.check:
        print("\n".join(found := problems()) or "all blocks are as they were made")
        return 1 if found else 0
    try:
        commit = commit_here(allow_dirty=args.allow_dirty)
        if args.file is not None:
            args.file.open().close()  # found out before the work
        # a venv's interpreter is a link: its absolute path, not what it leads to
        named = {LLAMA_PYTHON: args.llama_python, LLAMA_PERPLEXITY: args.llama_perplexity}
        programs = {word: os.path.abspath(path) for word, path in named.items() if path}
        for block in chosen(args):
            for document in block.documents(ROOT):
                kept(ROOT / document, block.name)
            print(f"bench.docs: {block.name}, some {block.minutes} min", file=sys.stderr, flush=True)
            write(block, output(block, args.file, programs), commit)
    except (ValueError, OSError) as e:
        print(f"bench.docs: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
