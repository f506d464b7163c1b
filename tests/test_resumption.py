"""Going on with other settings, or from a damaged checkpoint: one line that names it, and nothing touched."""

import pytest

from dreambooth_moslora.checkpoint import read_position
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.resumption import check_resumed
from dreambooth_moslora.rundir import RunDir
from dreambooth_moslora.trainer import train
from tests.tiny_training import paint_photos, tiny_config


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """(run folder, its configuration with changes)."""
    folder = tmp_path_factory.mktemp("finished")
    photos = paint_photos(folder / "photos")

    def config(**changes):
        return tiny_config(tiny_base, photos, folder / "run", max_train_steps=1, **changes)

    train(config())
    return folder / "run", config


CHANGES = {
    "rank": (16, "has 4; you ask for 16"),
    "lora_alpha": (8.0, "has 4; you ask for 8"),
    "mixer": ("identity", "has orthogonal; you ask for identity"),
    "train_mixer": (False, "has True; you ask for False"),
    "use_rslora": (True, "has False; you ask for True"),
    "use_dora": (True, "has False; you ask for True"),
    "lora_dropout": (0.5, "has 0; you ask for 0.5"),
    "target_modules": (("to_q", "to_out.0"), "has to_q; you ask for to_q to_out.0"),
    "train_text_encoder": (True, "has False; you ask for True"),
    "seed": (4, "has 3; you ask for 4"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_the_checkpoint_has_otherwise_is_refused_with_both_values(name, finished):
    folder, config = finished
    value, says = CHANGES[name]
    checkpoint = RunDir(folder).latest_checkpoint()
    with pytest.raises(UserError, match=f"--{name}: checkpoint-1 {says}: resume without it"):
        check_resumed(config(**{name: value}), checkpoint, read_position(checkpoint))


def test_the_same_settings_and_an_unnamed_seed_go_on(finished):
    folder, config = finished
    checkpoint = RunDir(folder).latest_checkpoint()
    for same in (
        {},
        {"seed": None},
        {"lora_alpha": 4.0},
        {"learning_rate": 1.0},
        {"target_modules": ("to_q", "attn1.to_q")},
    ):
        check_resumed(config(**same), checkpoint, read_position(checkpoint))


def test_the_trainer_asks(finished):
    with pytest.raises(UserError, match="--rank"):
        train(finished[1](rank=2, resume_from_checkpoint="latest"))
