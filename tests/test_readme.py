"""README, CONTRIBUTING and docs/: commands, flags, files and links that they name exist."""

import ast
import json
import re
import shlex
import tomllib
from contextvars import copy_context
from importlib.util import find_spec
from pathlib import Path

import pytest

from dreambooth_moslora.base.devices import TORCH_COMMAND
from dreambooth_moslora.cli.main import COMMANDS, load_command
from dreambooth_moslora.cli.parser import CommandParser, normalize_flags
from dreambooth_moslora.cli.train_flags import build_train_parser
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora.metadata import format_dora_table
from dreambooth_moslora.ui import app as serve
from tests.helpers.command_line import parse_train_config
from tests.helpers.stub_faces import stub_faces  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.name for path in DOCUMENTS]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
ROW = re.compile(rf"^\| `((?:{'|'.join(COMMANDS)})\b[^`]*)`", re.MULTILINE)
FOLDERS = r"assets|tests|benchmarks|toybox|tools|dreambooth_moslora|notebooks|docs|\.ci"
FILE = re.compile(rf"`((?:{FOLDERS})/[^`\s]*)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
OTHER_PROGRAMS = (
    "hf ",
    "git",
    "accelerate",
    "ACCELERATE",
    "python",
    "mkdocs",
    "pip",
    "uv ",
    "pre-commit",
    "docker",
)
READER_FOLDERS = ("photos/dog", "photos/anna", "photos/ink")
"""The reader's photos in the examples."""
MAX_WORDS = 700
PLACE = re.compile(r"^\| [^|]+ \| `([\w/]+)` \| (.*) \|$", re.MULTILINE)
"""Row of the table "where to put what": its package and its files."""


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def strip_blocks(path: Path) -> str:
    """Return the text of a document without its fenced blocks."""
    return FENCED.sub("", read_text(path))


def list_blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(read_text(path)) if kind == language]


def list_spans(path: Path) -> list[str]:
    """Return the code within the text; a span may continue on the next line."""
    return [" ".join(span.split()) for span in SPAN.findall(strip_blocks(path))]


def list_commands(path: Path) -> list[str]:
    """Return the commands of the bash blocks, and complete ones within the text."""
    commands = []
    for line in "".join(list_blocks(path, "bash")).replace("\\\n", " ").splitlines():
        commands += shlex.join(shlex.split(line, comments=True)).split(" '&&' ")
    rows = [f"python -m dreambooth_moslora {row}" for row in ROW.findall(read_text(path))]
    inline = [
        s
        for s in list_spans(path)
        if s.startswith("python ") and "…" not in s and "COMMAND" not in s
    ]
    return [*filter(None, commands), *rows, *inline]


ALL_LINES = sorted({line for path in DOCUMENTS for line in list_commands(path)})


def build_command_parser(name: str) -> CommandParser:
    parser = CommandParser(prog=name)
    add_arguments, _ = load_command(name)
    add_arguments(parser)
    return parser


def build_app_parser() -> CommandParser:
    parser = CommandParser(prog="app.py")
    serve.add_arguments(parser)
    return parser


def check_command(line: str) -> None:
    """Raise UserError for an unknown flag, LookupError for an unknown command, module or file."""
    require(
        all((ROOT / word).exists() for word in line.split() if word.startswith("assets/")), line
    )
    match shlex.split(line):
        case ["pip", "install", "-r", file]:
            require((ROOT / file).is_file(), file)
        case ["pip", "install", "."]:
            require((ROOT / "pyproject.toml").is_file(), line)
        case ["uv", "pip", "install", "-r", file, "--torch-backend=auto"]:
            require((ROOT / file).is_file(), file)
        case ["uv", *_]:
            require(line == TORCH_COMMAND, line)
        case ["pip", "install", name] if name.startswith(".["):
            extras = tomllib.loads(read_text(ROOT / "pyproject.toml"))["project"][
                "optional-dependencies"
            ]
            require(name.partition("[")[2].rstrip("]") in extras, line)
        case ["python", "train_dreambooth.py", *arguments] | [
            "python",
            "-m",
            "dreambooth_moslora",
            "train",
            *arguments,
        ]:
            parse_train_config(
                ["assets/subjects/robot" if word in READER_FOLDERS else word for word in arguments]
            )
        case ["python", "app.py", *arguments]:
            build_app_parser().parse_args(arguments)
        case ["python", "-m", "dreambooth_moslora", name, *arguments]:
            require(name in COMMANDS, name)
            build_command_parser(name).parse_args(normalize_flags(arguments))
        case ["python", "-m", "pytest", *arguments]:
            require(
                all((ROOT / word).exists() for word in arguments if word.startswith("tests")), line
            )
        case ["mkdocs", "build", "--strict"] | ["mkdocs", "serve"]:
            require((ROOT / "mkdocs.yml").is_file(), line)
        case ["pip", "install", "uv"]:
            pass
        case ["pip", "install", "pre-commit"] | ["pre-commit", "install"]:
            require((ROOT / ".pre-commit-config.yaml").is_file(), line)
        case ["python", "-m", module, *arguments]:
            spec = find_spec(module)
            require(spec is not None, module)
            flags = [word for word in arguments if word.startswith("-")]
            text = read_text(Path(spec.origin))
            require(all(f'"{flag}"' in text for flag in flags), line)
        case _:
            raise LookupError(line)


def require(is_valid: bool, text: str) -> None:
    if not is_valid:
        raise LookupError(text)


@pytest.mark.usefixtures("stub_faces")  # OpenCV is an extra
@pytest.mark.parametrize("line", ALL_LINES)
def test_every_command_is_valid(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    copy_context().run(check_command, line)  # `--vram` holds for its command alone


WRONG_COMMANDS = [
    "python train_dreambooth.py --max_steps 4",
    "python train_dreambooth.py --config assets/configs/none.toml",
    "python -m dreambooth_moslora chek photos",
    "python -m benchmarks.random_sdxl --output X",
    "python setup.py",
    "uv pip install -r none.txt --torch-backend=auto",
    "uv pip install torch",
]


def test_wrong_commands_and_links_are_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in WRONG_COMMANDS:
        with pytest.raises((UserError, LookupError)):
            check_command(line)
    text = (
        "[a](docs/none.md) [b](docs/photos.md#none) [c](#none) [d](docs/photos.md#masks) "
        "![](none.png)"
    )
    assert find_broken_links(README, text) == [
        "docs/none.md",
        "docs/photos.md#none",
        "#none",
        "none.png",
    ]


def test_commands_suit_bash_and_powershell():
    """A continued line and `export` mean something else in PowerShell."""
    for path in DOCUMENTS:
        for line in "".join(text for _, text in FENCED.findall(read_text(path))).splitlines():
            assert not line.endswith("\\") and not line.startswith("export "), (path.name, line)


def test_trainings_are_spelled_alike():
    """The script has a place where a command of diffusers is run as it is."""
    scripts = {
        path.name
        for path in DOCUMENTS
        if any("python train_dreambooth.py" in text for _, text in FENCED.findall(read_text(path)))
    }
    assert scripts == {"README.md", "from_diffusers.md"}


def test_the_command_lines_and_files_were_found():
    assert len(list_commands(README)) > 5 and len(ALL_LINES) > 25
    assert len({name for path in DOCUMENTS for name in FILE.findall(read_text(path))}) > 15
    assert set(COMMANDS) <= {word for line in ALL_LINES for word in line.split()[3:4]}


def test_every_flag_in_the_text_is_one_of_ours():
    parsers = [build_train_parser(), build_app_parser(), *map(build_command_parser, COMMANDS)]
    flags = {flag for parser in parsers for flag in parser._option_string_actions}
    own_spans = [
        span
        for path in DOCUMENTS
        for span in list_spans(path)
        if not span.startswith(OTHER_PROGRAMS)
    ]
    mentioned = {word for span in own_spans for word in span.split() if word.startswith("--")}
    assert len(mentioned) > 30 and mentioned - flags == set()


def find_missing_files(text: str) -> list[str]:
    """Return the files of the table that do not exist; names in brackets are not checked."""
    missing = []
    for package, files in PLACE.findall(text):
        for name in SPAN.findall(re.sub(r"\(.*?\)", "", files)):
            pattern = name.rstrip("/") if name.endswith("/") else f"{name}.py"
            if not list((ROOT / "dreambooth_moslora").glob(f"{package}/{pattern}")):
                missing.append(f"{package}/{name}")
    return missing


def test_the_table_of_places_names_existing_files():
    text = read_text(ROOT / "CONTRIBUTING.md")
    assert len(PLACE.findall(text)) > 12 and find_missing_files(text) == []
    assert find_missing_files("| masks | `photos` | `masks`, `none` (why) |") == ["photos/none"]


def format_anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def find_broken_links(path: Path, text: str) -> list[str]:
    """Return the links of a document to files and anchors that do not exist; web links are
    skipped."""
    broken = []
    for link in LINK.findall(FENCED.sub("", text)):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if link.startswith("https://"):
            continue
        if not target.is_file() or (
            anchor and anchor not in map(format_anchor, HEADING.findall(strip_blocks(target)))
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_files_and_links_exist_and_programs_are_python(path):
    assert [name for name in FILE.findall(read_text(path)) if not (ROOT / name).exists()] == []
    assert find_broken_links(path, read_text(path)) == []
    for text in list_blocks(path, "python"):
        ast.parse(text)


ON_A_CPU = {
    "stabilityai/stable-diffusion-xl-base-1.0": "assets/toy-sdxl",
    ', torch_dtype=torch.float16, variant="fp16"': "",
    '.to("cuda")': "",
    "runs/dog": "assets/adapters/rocket.safetensors",
    ").images": ", num_inference_steps=1).images",
}
"""Parts of the snippet for a GPU and SDXL -> their replacement for the toy."""


@pytest.mark.parametrize(
    "path", [README, ROOT / "docs" / "training.md"], ids=["README", "training"]
)
def test_the_snippet_for_diffusers_uses_fp16_and_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = [text for text in list_blocks(path, "python") if "StableDiffusionXLPipeline" in text]
    for part, replacement in ON_A_CPU.items():
        assert code.count(part) == 1, part
        code = code.replace(part, replacement)
    variables = {}
    exec(code, variables)
    assert variables["image"].size == (128, 128)
    assert variables["pipe"].get_active_adapters() == ["default_0"]


def test_the_readme_is_short_and_the_docs_have_the_dora_table():
    assert len(read_text(README).split()) <= MAX_WORDS
    assert format_dora_table() in read_text(ROOT / "docs" / "training.md")


def test_the_container_starts_the_page_with_flags_that_it_has(monkeypatch):
    monkeypatch.chdir(ROOT)
    entrypoint = re.search(r"^ENTRYPOINT (\[.*\])$", read_text(ROOT / "Dockerfile"), re.MULTILINE)
    check_command(shlex.join(json.loads(entrypoint[1])).replace("python3", "python"))
