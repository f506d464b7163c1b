"""Runs on the embedded base, made to have faults: what is chosen, scored, said, and recommended."""

import io
import re
import shutil
from contextlib import chdir, redirect_stderr
from pathlib import Path

import pytest
from safetensors import safe_open

from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.core import find_asset
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training.explain import Figures, advice_after, figures_of
from tests.helpers.few_pictures import few_pictures

pytestmark = pytest.mark.slow

FAULTS = ("--no_with_prior_preservation", "--max_train_steps=12", "--evaluate_steps=4", "--lr_scheduler=constant")


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[RunDir, str]:
    """The run, and what its command said."""
    home, said = tmp_path_factory.mktemp("home"), io.StringIO()
    shutil.copytree(find_asset("assets/subjects/rocket"), home / "rocket")
    with chdir(home), redirect_stderr(said), few_pictures(templates=2, class_images=2):
        assert main(["train", "rocket", "rocket", *FAULTS, "--num_validation_images=0"]) == 0
    return RunDir(home / "runs" / "rocket"), said.getvalue()


def test_one_word_trains_scores_and_explains_both_faults(ended, capsys):
    run, said = ended
    kinds = {event["type"] for event in run.read_metrics()}
    assert {"evaluation", "scale", "export", "end"} <= kinds and run.best_dir.is_dir()
    assert 1 <= said.count("try next: ") <= 3
    run, said = ended
    assert re.search("try next: every rocket turns into yours.* --with_prior_preservation", said)
    assert main(["explain", str(run.path)]) == 0
    assert "a bare rocket went " in capsys.readouterr().out
    said = advice_after(figures_of(ended[0]))
    assert any("likeness still rose" in line and "--exposures_per_photo" in line for line in said), said


def test_the_adapter_wants_more_than_a_weak_scale(ended):
    (event,) = [event for event in ended[0].read_metrics() if event["type"] == "scale"]
    scores = {float(scale): score for scale, score in event["by_scale"].items()}
    assert event["low"] <= event["best"] <= event["high"] and event["best"] > 0.4
    assert scores[event["best"]] >= 0.99 * max(scores.values()) > 1.3 * scores[0.4]
    with safe_open(ended[0].adapter_path, framework="pt") as file:
        assert AdapterMetadata.from_json(file.metadata()["moslora"]).best_scale == event["best"]


SHORT = ("--max_train_steps=80", "--evaluate_steps=40", "--no_find_scale", "--num_validation_images=0")


def trained(home: Path, *flags: str) -> Figures:
    """The figures of a run on the sample photos, of whose captions only those with a place stay."""
    photos = Path(shutil.copytree(find_asset("assets/subjects/tall_cactus"), home / "cactus"))
    for path in photos.glob("*.txt"):
        path.write_text(path.read_text().splitlines()[1])
    with chdir(home), few_pictures(templates=2, seeds=2, class_images=2, inference_steps=12):
        assert main(["train", "cactus", "cactus", *SHORT, "--crops_per_photo=2", *flags]) == 0
    return figures_of(RunDir(home / "runs" / "cactus"))


def test_without_a_share_the_bare_prompt_is_said_to_lag_and_with_the_usual_one_it_is_not(tmp_path):
    never, usual = trained(tmp_path / "never", "--instance_prompt_share=0"), trained(tmp_path / "usual")
    assert never.without_bare_prompt == usual.without_bare_prompt == 5
    said = [line for line in advice_after(never) if "alone shows" in line]
    assert len(said) == 1 and said[0].endswith("--instance_prompt_share 0.33"), never.scores
    assert not [line for line in advice_after(usual) if "alone shows" in line], usual.scores
    assert usual.moved("dino_bare") > never.moved("dino_bare") + 0.2
