"""Files of deploy/, as far as they can be checked without the machines they are for."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dreambooth_moslora.cli.parser import CommandParser, normalize_flags
from dreambooth_moslora.extras.serving import command_serve
from dreambooth_moslora.extras.serving.front import ServeSettings

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "deploy").iterdir())
TOKEN = "correct-horse-battery"
yaml = pytest.importorskip("yaml")


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("DREAMBOOTH_TOKEN", TOKEN)


def parse_serve_settings(arguments: list[str]) -> ServeSettings:
    """Return the settings with which `serve` would start. Raises UserError."""
    parser = CommandParser(prog="serve")
    command_serve.serve_arguments(parser)
    return command_serve.build_settings(parser.parse_args(normalize_flags(arguments)))


def load_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / "deploy" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_begins_with_what_was_run(path):
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")
    ]
    assert re.match(r"# (Not run|Run): .*\.", lines[0]), lines[0]


def test_compose_starts_the_service_for_this_machine_alone():
    service = load_yaml("compose.yaml")["services"]["serve"]
    command = service["command"]
    assert service["entrypoint"] == ["python3", "-m", "dreambooth_moslora"]
    assert command[0] == "serve"
    settings = parse_serve_settings(command[1:])
    assert settings.tokens == (TOKEN,)
    assert service["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    build = service["build"]["args"]
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert all(f"ARG {name}" in text and f"${{{name}}}" in text for name in build)
    # Triton builds its launcher with them
    assert re.search(r"apt-get install .* python3-dev gcc ", text)
    assert re.search(r"^USER [1-9]", text, re.MULTILINE) and "HEALTHCHECK" in text
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", "runs", "photos", "tests"} <= set(ignored)


def test_the_kuberay_manifest_names_a_builder_and_its_settings():
    spec = load_yaml("rayservice.yaml")["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    text = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert f"def {name}(" in text
    settings = ServeSettings.from_dict(application["args"])
    workers = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    assert (
        settings.tokens == (TOKEN,) and settings.replicas == workers["replicas"] * settings.per_gpu
    )
    assert application["name"] in text  # the front looks its replicas up under this name


def test_skypilot_and_runpod_start_the_service():
    scripts = {
        "skypilot.yaml": load_yaml("skypilot.yaml")["run"],
        "runpod.sh": (ROOT / "deploy/runpod.sh").read_text(),
    }
    for name, script in scripts.items():
        lines = [
            shlex.split(line) for line in script.splitlines() if "dreambooth_moslora serve" in line
        ]
        (arguments,) = [line for line in lines if line[:1] == ["python"]]
        settings = parse_serve_settings(arguments[arguments.index("serve") + 1 :])
        assert settings.host == "0.0.0.0" and settings.tokens == (TOKEN,), name
    assert load_yaml("skypilot.yaml")["resources"]["ports"] == settings.port
    assert (
        subprocess.run(["bash", "-n", ROOT / "deploy" / "runpod.sh"], check=False).returncode == 0
    )


@pytest.mark.parametrize("name, extra", [("page", None), ("serve", "serve")])
def test_an_image_installs_exact_versions_by_their_digests(name, extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    text = (ROOT / "deploy" / f"{name}.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[a-z])", text.partition("\n#")[2])[1:]
    versions = dict(entry.split(" ", 1)[0].split("==") for entry in entries)
    assert all("--hash=sha256:" in entry for entry in entries)
    for needed in map(Requirement, project["dependencies"] + (extras[extra] if extra else [])):
        pinned = versions[needed.name.lower().replace("_", "-")]
        assert needed.specifier.contains(pinned), f"{needed.name}=={pinned} in {name}.lock"
    tools = {Requirement(line).name for line in extras["test"]} - {"setuptools", "gradio_client"}
    assert not tools & versions.keys()
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^FROM \S+@sha256:[0-9a-f]{64}$", dockerfile, re.MULTILINE)
    assert "--require-hashes" in dockerfile and "requirements.txt" not in dockerfile


def test_each_requirement_is_bounded_and_excludes_known_holes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    vulnerable = {"starlette": "0.49.0", "ray": "2.53.0"}
    for requirement in map(Requirement, lines):
        assert any(bound.operator == "<" for bound in requirement.specifier), requirement
        assert not requirement.specifier.contains(vulnerable.get(requirement.name, "0")), (
            requirement
        )
