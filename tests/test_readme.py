"""What README, CONTRIBUTING and the pages of `docs/` name is there: commands, flags, files,
links."""

import ast
import json
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from dreambooth_moslora.base.devices import CUDA_BUILD, ROCM_BUILD, WHEELS_COMMAND
from dreambooth_moslora.cli.main import COMMANDS, load_command
from dreambooth_moslora.cli.parser import CommandParser, normalize_flags
from dreambooth_moslora.cli.train_flags import build_train_parser
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora.metadata import format_dora_table
from dreambooth_moslora.ui import app as serve
from tests.helpers.command_line import parse_train_config

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
    "git",
    "accelerate",
    "ACCELERATE",
    "python",
    "mkdocs",
    "pip",
    "pre-commit",
    "docker",
)
OWN = ("photos/dog", "photos/anna", "photos/ink")
"""A reader's own photos in the examples."""
MAX_WORDS = 700
PLACE = re.compile(r"^\| [^|]+ \| `([\w/]+)` \| (.*) \|$", re.MULTILINE)
"""A row of the table "where to put what": its package and its files."""


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """The text without its fenced blocks."""
    return FENCED.sub("", read(path))


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(read(path)) if kind == language]


def spans(path: Path) -> list[str]:
    """Code within the text; one may go over the end of a line."""
    return [" ".join(span.split()) for span in SPAN.findall(prose(path))]


def command_lines(path: Path) -> list[str]:
    """Of the bash blocks, whole and without comments, and those within the text that are not
    shortened."""
    found = []
    for line in "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines():
        found += shlex.join(shlex.split(line, comments=True)).split(" '&&' ")
    rows = [f"python -m dreambooth_moslora {row}" for row in ROW.findall(read(path))]
    inline = [
        s for s in spans(path) if s.startswith("python ") and "…" not in s and "COMMAND" not in s
    ]
    return [*filter(None, found), *rows, *inline]


ALL_LINES = sorted({line for path in DOCUMENTS for line in command_lines(path)})


def command_parser(name: str) -> CommandParser:
    parser = CommandParser(prog=name)
    add_arguments, _ = load_command(name)
    add_arguments(parser)
    return parser


def app_parser() -> CommandParser:
    parser = CommandParser(prog="app.py")
    serve.add_arguments(parser)
    return parser


def understand(line: str) -> None:
    """Raises UserError for an unknown flag, LookupError for a command, module or file that is not
    there."""
    require(
        all((ROOT / word).exists() for word in line.split() if word.startswith("assets/")), line
    )
    match shlex.split(line):
        case ["pip", "install", "-r", file]:
            require((ROOT / file).is_file(), file)
        case ["pip", "install", "."]:
            require((ROOT / "pyproject.toml").is_file(), line)
        case ["pip", "install", *words] if "torch" in words:
            wheels = {f"{WHEELS_COMMAND}{build}" for build in (CUDA_BUILD, ROCM_BUILD)}
            require(
                line in wheels | {wheel.replace("--force-reinstall ", "") for wheel in wheels}, line
            )
        case ["pip", "install", name] if name.startswith(".["):
            extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"][
                "optional-dependencies"
            ]
            require(name.partition("[")[2].rstrip("]") in extras, line)
        case ["python", "train_dreambooth.py", *words] | [
            "python",
            "-m",
            "dreambooth_moslora",
            "train",
            *words,
        ]:
            parse_train_config(["assets/subjects/robot" if word in OWN else word for word in words])
        case ["python", "app.py", *words]:
            app_parser().parse_args(words)
        case ["python", "-m", "dreambooth_moslora", name, *words]:
            require(name in COMMANDS, name)
            command_parser(name).parse_args(normalize_flags(words))
        case ["python", "-m", "pytest", *words]:
            require(all((ROOT / word).exists() for word in words if word.startswith("tests")), line)
        case ["mkdocs", "build", "--strict"] | ["mkdocs", "serve"]:
            require((ROOT / "mkdocs.yml").is_file(), line)
        case ["pip", "install", "pre-commit"] | ["pre-commit", "install"]:
            require((ROOT / ".pre-commit-config.yaml").is_file(), line)
        case ["python", "-m", module, *words]:
            found = find_spec(module)
            require(found is not None, module)
            flags = [word for word in words if word.startswith("-")]
            text = read(Path(found.origin))
            require(all(f'"{flag}"' in text for flag in flags), line)
        case _:
            raise LookupError(line)


def require(holds: bool, what: str) -> None:
    if not holds:
        raise LookupError(what)


@pytest.mark.parametrize("line", ALL_LINES)
def test_every_command_line_is_understood(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    understand(line)


WRONG = [
    "python train_dreambooth.py --max_steps 4",
    "python train_dreambooth.py --config assets/configs/none.toml",
]
WRONG += [
    "python -m dreambooth_moslora chek photos",
    "python -m benchmarks.random_sdxl --output X",
    "python setup.py",
]


def test_a_command_line_or_link_that_is_wrong_is_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in WRONG:
        with pytest.raises((UserError, LookupError)):
            understand(line)
    text = (
        "[a](docs/none.md) [b](docs/photos.md#none) [c](#none) [d](docs/photos.md#masks) "
        "![](none.png)"
    )
    assert broken_links(README, text) == [
        "docs/none.md",
        "docs/photos.md#none",
        "#none",
        "none.png",
    ]


def test_the_command_lines_and_files_were_found():
    assert len(command_lines(README)) > 5 and len(ALL_LINES) > 25
    assert len({name for path in DOCUMENTS for name in FILE.findall(read(path))}) > 15
    assert set(COMMANDS) <= {word for line in ALL_LINES for word in line.split()[3:4]}


def test_every_flag_in_the_text_is_one_of_ours():
    parsers = [build_train_parser(), app_parser(), *map(command_parser, COMMANDS)]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    ours = [
        span for path in DOCUMENTS for span in spans(path) if not span.startswith(OTHER_PROGRAMS)
    ]
    named = {word for span in ours for word in span.split() if word.startswith("--")}
    assert len(named) > 30 and named - known == set()


def missing_places(text: str) -> list[str]:
    """Files of the table that its package does not have; what is in brackets may name others."""
    missing = []
    for package, files in PLACE.findall(text):
        for name in SPAN.findall(re.sub(r"\(.*?\)", "", files)):
            pattern = name.rstrip("/") if name.endswith("/") else f"{name}.py"
            if not list((ROOT / "dreambooth_moslora").glob(f"{package}/{pattern}")):
                missing.append(f"{package}/{name}")
    return missing


def test_where_to_put_what_names_files_that_are_there():
    text = read(ROOT / "CONTRIBUTING.md")
    assert len(PLACE.findall(text)) > 12 and missing_places(text) == []
    assert missing_places("| masks | `photos` | `masks`, `none` (why) |") == ["photos/none"]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_links(path: Path, text: str) -> list[str]:
    """Links of a document to files and anchors that are not there; those to the web are left
    alone."""
    broken = []
    for link in LINK.findall(FENCED.sub("", text)):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if link.startswith("https://"):
            continue
        if not target.is_file() or (
            anchor and anchor not in map(slug, HEADING.findall(prose(target)))
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_file_in_the_text_is_there_every_link_leads_somewhere_and_every_program_is_python(
    path,
):
    assert [name for name in FILE.findall(read(path)) if not (ROOT / name).exists()] == []
    assert broken_links(path, read(path)) == []
    for text in blocks(path, "python"):
        ast.parse(text)


ON_A_CPU = {
    "stabilityai/stable-diffusion-xl-base-1.0": "assets/toy-sdxl",
    ', torch_dtype=torch.float16, variant="fp16"': "",
    '.to("cuda")': "",
    "runs/dog": "assets/adapters/rocket.safetensors",
    ").images": ", num_inference_steps=1).images",
}
"""What a GPU and SDXL's own files need, and what stands in its place for the toy."""


@pytest.mark.parametrize(
    "path", [README, ROOT / "docs" / "training.md"], ids=["README", "training"]
)
def test_the_snippet_for_diffusers_asks_for_a_gpu_and_fp16_and_draws_with_the_toy(
    path, monkeypatch
):
    """As it stood, SDXL drew on the CPU in fp32."""
    monkeypatch.chdir(ROOT)
    (code,) = [text for text in blocks(path, "python") if "StableDiffusionXLPipeline" in text]
    for words, instead in ON_A_CPU.items():
        assert code.count(words) == 1, words
        code = code.replace(words, instead)
    drawn = {}
    exec(code, drawn)
    assert drawn["image"].size == (128, 128)
    assert drawn["pipe"].get_active_adapters() == ["default_0"]


def test_the_readme_is_short_and_the_docs_say_by_program_what_dora_in_kohya_s_form_is():
    assert len(read(README).split()) <= MAX_WORDS and format_dora_table() in read(
        ROOT / "docs" / "training.md"
    )


def test_the_container_starts_the_page_with_flags_that_it_has(monkeypatch):
    monkeypatch.chdir(ROOT)
    started = re.search(r"^ENTRYPOINT (\[.*\])$", read(ROOT / "Dockerfile"), re.MULTILINE)
    understand(shlex.join(json.loads(started[1])).replace("python3", "python"))
