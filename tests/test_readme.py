"""Every command line of the README is understood by the program it names, and every file it names is there."""

import ast
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from dreambooth_moslora.cli.main import COMMANDS, command
from dreambooth_moslora.cli.parser import Parser, build_train_parser, parse_train_config, underscored
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.ui import serve

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
FILE = re.compile(r"(?:\]\(|`)((?:assets|tests|benchmarks|toybox|tools|dreambooth_moslora|\.ci)/[^)`\s]*)")


def blocks(language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(README) if kind == language]


def spans() -> list[str]:
    """Code within the text; one may go over the end of a line."""
    return [" ".join(span.split()) for span in SPAN.findall(FENCED.sub("", README))]


def command_lines() -> list[str]:
    """Of the bash blocks, whole and without comments, and those within the text that are not shortened."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = [part for line in lines for part in shlex.join(shlex.split(line, comments=True)).split(" '&&' ")]
    rows = [f"python -m dreambooth_moslora {row}" for row in re.findall(r"^\| `([a-z]+[^`]*)`", README, re.MULTILINE)]
    return [*found, *rows, *(s for s in spans() if s.startswith("python ") and "…" not in s and "COMMAND" not in s)]


def command_parser(name: str) -> Parser:
    parser = Parser(prog=name)
    command(name).add_arguments(parser)
    return parser


def app_parser() -> Parser:
    parser = Parser(prog="app.py")
    serve.add_arguments(parser)
    return parser


def understand(line: str) -> None:
    """Raises UserError for a flag that is not known, LookupError for a command, module or file that is not there."""
    require(all((ROOT / word).exists() for word in line.split() if word.startswith("assets/")), line)
    match shlex.split(line):
        case ["pip", "install", "-r", file]:
            require((ROOT / file).is_file(), file)
        case ["python", "train_dreambooth.py", *words]:
            parse_train_config(words)
        case ["python", "app.py", *words]:
            app_parser().parse_args(words)
        case ["python", "-m", "dreambooth_moslora", name, *words]:
            require(name in COMMANDS, name)
            command_parser(name).parse_args(underscored(words))
        case ["python", "-m", module, *words]:
            found = find_spec(module)
            require(found is not None, module)
            flags = [word for word in words if word.startswith("-")]
            require(all(f'"{flag}"' in Path(found.origin).read_text(encoding="utf-8") for flag in flags), line)
        case _:
            raise LookupError(line)


def require(holds: bool, what: str) -> None:
    if not holds:
        raise LookupError(what)


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_is_understood(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    understand(line)


@pytest.mark.parametrize(
    "line",
    [
        "pip install -r requirement.txt",
        "python train_dreambooth.py --config assets/configs/quickstart.toml --max_steps 4",
        "python train_dreambooth.py --config assets/configs/none.toml",
        "python app.py --port 7860",
        "python -m dreambooth_moslora chek photos",
        "python -m dreambooth_moslora check photos --picure a.png",
        "python -m dreambooth_moslora compare --config assets/studies/none.toml",
        "python -m benchmarks.train_steps",
        "python -m benchmarks.random_sdxl --output DIR",
        "python setup.py",
    ],
)
def test_a_command_line_that_is_wrong_is_noticed(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((UserError, LookupError)):
        understand(line)


def test_the_command_lines_were_found():
    found = command_lines()
    assert len(found) == len(list(filter(None, found))) > 15
    assert {name for name in COMMANDS if any(line.split()[3:4] == [name] for line in found)} == set(COMMANDS)


def test_every_flag_in_the_text_is_one_of_ours():
    parsers = [build_train_parser(), app_parser(), *map(command_parser, COMMANDS)]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    ours = [span for span in spans() if not span.startswith(("accelerate", "ACCELERATE", "python"))]
    named = {word for span in ours for word in span.split() if word.startswith("--")}
    assert len(named) > 8 and named <= known


def test_every_file_in_the_text_is_there():
    named = FILE.findall(README)
    assert len(named) > 8 and [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("text", blocks("python"))
def test_every_program_is_python(text):
    ast.parse(text)
