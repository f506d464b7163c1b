"""`train cactus cactus` on the embedded base with captions that all name a place: if the instance prompt has no share
of the exposures, it does not draw the subject, and the run says so."""

import shutil
from contextlib import chdir
from pathlib import Path

import pytest

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.core import find_asset
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training.explain import Figures, advice_after, figures_of
from tests.helpers.few_pictures import few_pictures

pytestmark = pytest.mark.slow
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
    assert usual.moved("dino_bare") > never.bare_prompt_moved + 0.2
