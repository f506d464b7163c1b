"""The files of deploy/: what can be known without the machines they are for."""

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


def settings_of(words: list[str]) -> ServeSettings:
    """What `serve` would start with. Raises UserError."""
    parser = CommandParser(prog="serve")
    command_serve.serve_arguments(parser)
    return command_serve.build_settings(parser.parse_args(normalize_flags(words)))


def content(name: str) -> dict:
    return yaml.safe_load((ROOT / "deploy" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_says_first_what_was_run_and_what_was_not(path):
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")
    ]
    assert re.match(r"# (Not run|Run): .*\.", lines[0]), lines[0]


def test_compose_starts_the_service_for_this_machine_alone():
    service = content("compose.yaml")["services"]["serve"]
    command, first = service["command"], service["entrypoint"]
    assert first == ["python3", "-m", "dreambooth_moslora"] and command[0] == "serve"
    settings = settings_of(command[1:])
    assert settings.tokens == (TOKEN,)
    assert service["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    build = service["build"]["args"]
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert all(f"ARG {name}" in text and f"${{{name}}}" in text for name in build)
    # Triton builds its launcher with them
    assert re.search(r"apt-get install .* python3-dev gcc ", text)
    assert re.search(r"^USER [1-9]", text, re.MULTILINE) and "HEALTHCHECK" in text
    kept_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", "runs", "photos", "tests"} <= set(kept_out)


def test_the_manifest_of_kuberay_names_a_builder_and_settings_that_it_takes():
    spec = content("rayservice.yaml")["spec"]
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


def test_skypilot_and_runpod_start_a_service_that_takes_their_command():
    scripts = {
        "skypilot.yaml": content("skypilot.yaml")["run"],
        "runpod.sh": (ROOT / "deploy/runpod.sh").read_text(),
    }
    for name, script in scripts.items():
        lines = [
            shlex.split(line) for line in script.splitlines() if "dreambooth_moslora serve" in line
        ]
        (words,) = [line for line in lines if line[:1] == ["python"]]
        settings = settings_of(words[words.index("serve") + 1 :])
        assert settings.host == "0.0.0.0" and settings.tokens == (TOKEN,), name
    assert content("skypilot.yaml")["resources"]["ports"] == settings.port
    assert (
        subprocess.run(["bash", "-n", ROOT / "deploy" / "runpod.sh"], check=False).returncode == 0
    )


@pytest.mark.parametrize("name, extra", [("page", None), ("serve", "serve")])
def test_an_image_installs_exact_versions_by_their_digests_and_no_test_tool(name, extra):
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


def test_each_requirement_has_an_upper_bound_and_none_admits_a_version_with_a_known_hole():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    asked = [Requirement(line) for line in lines]
    for one in asked:
        assert any(bound.operator == "<" for bound in one.specifier), one
    for name, broken in (("starlette", "0.49.0"), ("ray", "2.53.0")):
        assert not any(one.name == name and one.specifier.contains(broken) for one in asked)
