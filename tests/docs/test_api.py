"""Types of the public API: what type checkers and editors make of the names and of the examples."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dreambooth_moslora

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text("utf-8"), re.M | re.S
)
MYPY_CONFIG = """
[mypy]
ignore_missing_imports = true
follow_imports = silent
[mypy-torch.*,diffusers.*,transformers.*,peft.*,accelerate.*,numpy.*,pydantic.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def check_types(tmp_path_factory):
    """Return a function that gives mypy's remarks on a program."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("types")
    (folder / "mypy.ini").write_text(MYPY_CONFIG)

    def run_mypy(program: str) -> list[str]:
        (folder / "program.py").write_text(program)
        command = [sys.executable, "-m", "mypy", "--config-file", str(folder / "mypy.ini")]
        command += ["--cache-dir", str(folder / "cache"), str(folder / "program.py")]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert not output.stderr
        return output.stdout.splitlines()[:-1]  # the last line counts them

    return run_mypy


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_are_well_typed(number, check_types):
    assert check_types(EXAMPLES[number]) == []


def test_every_public_name_has_a_type(check_types):
    names = set(dreambooth_moslora.__all__)
    lines = [f"reveal_type(dreambooth_moslora.{name})" for name in sorted(names)]
    remarks = check_types("\n".join(["import dreambooth_moslora", *lines]))
    assert len(remarks) == len(names)
    assert not [line for line in remarks if line.endswith('"Any"') or "note: Revealed" not in line]


@pytest.mark.parametrize(
    ("statement", "remark"),
    [
        ("TrainConfig(rnk=3)", 'Unexpected keyword argument "rnk"'),
        ('TrainConfig(rank="three")', 'expected "int"'),
        ('train_subject("photos", "dog", rnk=3)', 'Unexpected keyword argument "rnk"'),
        ("dreambooth_moslora.os", "Module has no attribute"),
    ],
)
def test_a_mistake_is_a_type_error(check_types, statement, remark):
    program = (
        "import dreambooth_moslora\nfrom dreambooth_moslora import TrainConfig, train_subject\n"
    )
    assert remark in check_types(program + statement)[0]


def test_an_editor_completes_public_names():
    jedi = pytest.importorskip("jedi")
    code = "import dreambooth_moslora\ndreambooth_moslora."
    completions = jedi.Script(code, project=jedi.Project(ROOT)).complete()
    folders = {path.stem for path in (ROOT / "dreambooth_moslora").iterdir()}
    names = {item.name for item in completions if not item.name.startswith("_")}
    assert names - folders == {*dreambooth_moslora.__all__} - {"__version__"} - folders
