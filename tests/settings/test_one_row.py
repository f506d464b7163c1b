"""A setting is one row of the table: with one more row, the whole program knows one more setting."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEFORE = "    repeats: int = of_photos("
ROW = """    haze: float = of_photos(0.5, "how much haze", low=0, high=2,
        publish="if_changed", idle=unless(random_flip=True), kohya="ss_fog", elsewhere="fog", replaces=("crop_zoom",),
        per_subject=True, path=False, packages={1.5: "no_such_package"})
"""
PROGRAM = """
import json, sys
from pathlib import Path
from dreambooth_moslora.cli.parser import build_train_parser, parse_train_config, unknown_flag_message
from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings import rules, sources, versions
from dreambooth_moslora.settings.table import SubjectTable, TrainConfig
from tools.settings_table import page

NEEDED = ["--pretrained_model_name_or_path", "toy", "--instance_data_dir", "x", "--instance_prompt", "a sks dog"]

def taken(*words):
    try:
        return parse_train_config([*NEEDED, *words]).haze
    except UserError as error:
        return str(error)

def error_of(call):
    try:
        call()
    except UserError as error:
        return str(error)

Path("a.toml").write_text("[photos]\\nhaze = 1.25")
told = sources.recipe_of(TrainConfig(haze=1.0))
json.dump({
    "default": taken(),
    "flag": taken("--haze", "1"),
    "bound": taken("--haze", "3"),
    "file": taken("--config", "a.toml"),
    "near": taken("--hase", "1"),
    "help": [line.split() for line in build_train_parser().format_help().splitlines() if line.startswith("  --haze")],
    "told": [told["haze"], "haze" in sources.recipe_of(TrainConfig())],
    "header": sources.recipe_in({"moslora": json.dumps({"recipe": told})}).settings["haze"],
    "kohya": sources.recipe_in({"ss_fog": "0.75"}).settings,
    "given": sources.unless_given({"haze": 1.0, "crop_zoom": 2.0, "rank": 3}, {"haze": 2}),
    "elsewhere": unknown_flag_message("--fog=1"),
    "remarks": rules.remarks(TrainConfig(haze=1.0)),
    "package": error_of(lambda: versions.require_packages(TrainConfig(haze=1.5, random_flip=True))),
    "subject": SubjectTable(haze=2).to_dict(),
    "docs": [line for line in page().splitlines() if "haze" in line],
}, sys.stdout)
"""


def test_with_one_more_row_everything_knows_one_more_setting(tmp_path):
    unneeded = shutil.ignore_patterns("__pycache__")
    for folder in ("dreambooth_moslora", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, copy_function=os.symlink, ignore=unneeded)
    table = tmp_path / "dreambooth_moslora" / "settings" / "table.py"
    rows = table.read_text(encoding="utf-8")
    assert rows.count(BEFORE) == 1
    table.unlink()
    table.write_text(rows.replace(BEFORE, ROW + BEFORE), encoding="utf-8")
    command = [sys.executable, "-B", "-c", PROGRAM]
    found = json.loads(subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert found == {
        "default": 0.5,
        "flag": 1.0,
        "bound": "--haze 3: must be at most 2.",
        "file": 1.25,
        "near": "unknown flag --hase: did you mean --haze?",
        "help": [["--haze", "X", "how", "much", "haze", "(default:", "0.5)"]],
        "told": [1.0, False],
        "header": 1.0,
        "kohya": {"haze": 0.75},
        "given": {"rank": 3},
        "elsewhere": "--fog: use --haze.",
        "remarks": ["--haze has no effect without --random_flip"],
        "package": "--haze 1.5 needs no_such_package: pip install no_such_package.",
        "subject": {"haze": 2},
        "docs": ["| `--haze` | number from 0 to 2 | `0.5` | how much haze | if changed |"],
    }
