"""Measure on a card that is lent for half an hour what only a card can tell, the most useful
figures first.

    python -m benchmarks.first_half_hour --bundle FILE.tar.xz       # on your own machine
    python -m benchmarks.first_half_hour --bundle FILE.tar.xz --there PIP_LIST --wheels FOLDER
    python -m benchmarks.first_half_hour --out FOLDER               # on the card
    python -m benchmarks.first_half_hour --out FOLDER --size small  # on a CPU: does it run

`--bundle` is what to carry to a machine without a network (`benchmarks.bundle`). On the card, give
the same command again until it says that nothing is left: each call ends within `--minutes`, and
begins with the first command that has no result. A command that fails, or that the clock ends,
is a result, too. FOLDER gets `first_half_hour.json`, every line of every command, and
`first_half_hour.md`, a page of tables.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["SECTIONS", "Section", "main"]

ROOT = Path(__file__).parent.parent
GRACE_SEC = 15
"""Of each call, for writing what was found."""
MIN_SECTION_SEC = 60
"""Less is left for no command: it waits for the next call."""


@dataclass(frozen=True)
class Section:
    """Commands that answer one question.

    name: of the section
    question: the question
    commands: each a module of `benchmarks` with its arguments; {work} is a folder for its files
    """

    name: str
    question: str
    commands: tuple[str, ...]


SECTIONS = (
    Section(
        "step",
        "How long is a step of SDXL, how many kernels has it beside PEFT's own layers, and what "
        "would layouts and a compiler save?",
        (
            "gpu_step --arms floor ours peft channels_last benchmarked compiled",
            "gpu_step --checkpointing --arms ours peft",
            "gpu_step --batch 4 --arms ours compiled",
            "gpu_step --prior --arms ours",
        ),
    ),
    Section(
        "selftest",
        "Does this machine train, resume and draw as it should?",
        ("selftest_lines --out {work}/selftest",),
    ),
    Section(
        "streaming",
        "Does a streamed step compute what a step with all blocks on the card does, and what does "
        "it cost?",
        (
            'flow_step --model "Z-Image" --plan recompute int8 stream nf4 nf4_stream',
            'flow_step --model "FLUX.1 dev" --plan nf4 nf4_stream',
        ),
    ),
    Section(
        "recipe",
        "Does the recipe for SDXL take the memory that its plans say?",
        ("recipe_memory --out {work}/recipe",),
    ),
    Section(
        "flows",
        "How long is a step of the flow families, and what takes it?",
        (
            'flow_step --model "Z-Image" --arms ours peft compiled stateful',
            'flow_step --model "FLUX.1 dev" --arms ours peft',
            "flow_step --model Qwen-Image --arms ours",
            'flow_step --model "Krea 2" --plan recompute nf4',
        ),
    ),
)
"""In the order of their worth."""
SMALL = {
    "gpu_step": "--size small --resolution 64 --steps 1 --rank 2",
    "flow_step": "--size small --resolution 64 --steps 1 --rank 2",
    "recipe_memory": "--size small --plans stream",
    "selftest_lines": "--size small",
}
"""What makes each command one for a CPU."""
COLUMNS = (
    *("arm", "model", "plan", "checkpointing", "batch", "prior"),
    *("step_sec", "host_sec", "kernels", "reserved_gib", "memory_gib", "estimate_gib"),
    *("loss", "grad_norm", "name", "holds", "said", "error"),
)
"""Of the tables, as far as a table has them."""


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    if options.bundle:
        from benchmarks.bundle import make_bundle

        make_bundle(options.bundle, options.there, options.wheels)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes - GRACE_SEC
    file = options.out / "first_half_hour.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"results": []}
    report["machine"] = collect_machine_facts()

    # What has no result yet, in order, each in a process of its own: a broken one breaks no other.
    done = {result["command"] for result in report["results"]}
    for section, command in list_commands(options.sections, options.size):
        if command in done:
            continue
        left_sec = until - time.monotonic()
        if left_sec < MIN_SECTION_SEC:
            print("time is up: give the same command again")
            return
        print(f"{section.name}: {command}", flush=True)
        result = run(command, options.work, left_sec)
        report["results"].append({"section": section.name, **result})
        file.write_text(json.dumps(report, indent=1), encoding="utf-8")
        page = "\n".join(format_page(report)) + "\n"
        file.with_suffix(".md").write_text(page, encoding="utf-8")
    print(f"nothing is left: {file.with_suffix('.md')}")


def build_parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    options.add_argument("--out", type=Path, default=Path("first_half_hour"))
    options.add_argument("--size", choices=("full", "small"), default="full")
    options.add_argument("--sections", nargs="+", choices=names, default=names)
    options.add_argument("--minutes", type=float, default=10, help="of this call")
    work = Path(tempfile.gettempdir()) / "first_half_hour"
    options.add_argument("--work", type=Path, default=work, help="folder of large files")
    options.add_argument("--bundle", type=Path, metavar="FILE", help="make what is to be carried")
    options.add_argument(
        "--there", type=Path, metavar="FILE", help="`pip list --format=freeze` of that machine"
    )
    options.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="wheels that the bundle carries"
    )
    return options


def list_commands(names: Sequence[str], size: str) -> Iterable[tuple[Section, str]]:
    """List the sections' commands in their order."""
    for section in SECTIONS:
        for command in section.commands if section.name in names else ():
            module = command.split()[0]
            yield section, f"{command} {SMALL[module]}" if size == "small" else command


def run(command: str, work: Path, limit_sec: float) -> dict:
    """Run it; returns its lines of JSON, its seconds, and how it ended badly, if it did."""
    module, *arguments = shlex.split(command.format(work=work))
    start, ended = time.monotonic(), None
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            check=False,
            timeout=limit_sec,
        )
        output = done.stdout
        if done.returncode:
            error_lines = done.stderr.decode(errors="replace").strip().splitlines()
            reason = error_lines[-1] if error_lines else "no error message"
            ended = f"exit code {done.returncode}: {reason}"
    except subprocess.TimeoutExpired as broken:
        output, ended = broken.stdout or b"", f"ended by the clock after {limit_sec:.0f} s"

    lines = output.decode(errors="replace").splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    if ended:
        rows.append({"error": ended})
    return {"command": command, "seconds": round(time.monotonic() - start), "rows": rows}


def collect_machine_facts() -> dict[str, str]:
    import diffusers
    import peft
    import transformers

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "card": card,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def format_page(report: dict) -> Iterable[str]:
    """Format a table for each command."""
    yield "# The first half hour"
    yield ""
    yield ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    for section in SECTIONS:
        results = [result for result in report["results"] if result["section"] == section.name]
        if results:
            yield from ("", f"## {section.name}", "", section.question)
        for result in results:
            yield from ("", f"`{result['command']}`, {result['seconds']} s:", "")
            yield from format_table(result["rows"])


def format_table(rows: Sequence[dict]) -> Iterable[str]:
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join(str(row.get(name, '')) for name in columns)} |"


if __name__ == "__main__":
    main()
