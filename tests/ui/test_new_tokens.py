"""Pivotal tuning on the page: the form's config is that of the flags, and the run's tokens are used and offered."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from gradio_client import Client, handle_file

from dreambooth_moslora.core import UserError, assets_folder
from dreambooth_moslora.settings.prompts import learnt_words
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui.train_form import TOKENS_RATE, SubjectWords, TrainForm
from dreambooth_moslora.ui.train_watch import watched
from dreambooth_moslora.ui.visitors import COOKIE
from tests.helpers.tiny_training import paint_photos
from tests.helpers.ui_server import cookie_of, secret_of, serve


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    shutil.copy(assets_folder() / "subjects" / "duck" / "00.jpg", tmp_path / "photos" / "photo_01.png")
    return tmp_path / "photos"


def config_of(photos, **form) -> TrainConfig:
    return TrainConfig.from_dict(TrainForm("sks", "duck", **form).config("toy", 128, photos, photos.parent / "run"))


def test_the_tick_and_its_words_are_the_flags(photos):
    plain, ticked = (
        config_of(photos).to_dict(),
        config_of(photos, new_tokens=True, tokens_begin_as=" toy  duck ").to_dict(),
    )
    changed = {name: value for name, value in ticked.items() if plain[name] != value}
    flags = {"train_text_encoder_ti": True, "text_encoder_lr": TOKENS_RATE, "initializer_concept": "toy duck"}
    assert changed == flags
    assert config_of(photos, tokens_begin_as="toy duck", tokens_learning_rate=0.5).to_dict() == plain
    assert config_of(photos, new_tokens=True, tokens_learning_rate=1e-4).text_encoder_lr == 1e-4
    assert config_of(photos, new_tokens=True).initializer_concept is None


def test_each_of_several_subjects_says_what_its_own_begin_as(photos):
    shutil.copytree(photos, photos.with_name("photos_2"))
    others = (SubjectWords("rocket", "zwx", tokens_begin_as=" red  rocket "),)
    config = config_of(photos, new_tokens=True, tokens_begin_as="toy duck", others=others)
    assert config.train_text_encoder_ti and config.text_encoder_lr == TOKENS_RATE and not config.initializer_concept
    assert [table.initializer_concept for table in config.subjects] == ["toy duck", "red rocket"]
    assert learnt_words(config) == ("sks", "zwx")
    plain = config_of(photos, tokens_begin_as="toy duck", others=others)
    assert [table.initializer_concept for table in plain.subjects] == [None, None]


@pytest.mark.parametrize(
    "form, words",
    [
        ({"new_tokens": "yes"}, "new_tokens must be true or false"),
        ({"new_tokens": True, "tokens_learning_rate": -1}, "learning rate of the new tokens"),
        ({"new_tokens": True, "tokens_learning_rate": "x"}, "learning rate of the new tokens"),
    ],
)
def test_a_mistake_is_told_in_words(photos, form, words):
    with pytest.raises(UserError, match=words):
        config_of(photos, **form)


@pytest.mark.slow
def test_a_run_with_new_tokens_is_drawn_with_them_and_offers_their_file(tiny_base, tmp_path):
    photos = [handle_file(file) for file in sorted(paint_photos(tmp_path / "mine").iterdir())]
    secret = "of-new-tokens"
    with serve(tiny_base, tmp_path / "app") as served:
        client = Client(served.url, verbose=False, headers=cookie_of(secret))
        settings = {"class_word": "hen", "steps": 1, "scores": False, "new_tokens": True}
        run, _ = client.predict(photos=photos, **settings, api_name="/train")
        state = {"state": "starting"}
        while state["state"] in ("starting", "running"):
            time.sleep(1)
            state = client.predict(run["value"], api_name="/train_status")
        assert state["state"] == "done", state
        client.predict("a photo of a sks hen", adapter="hen", steps=2, api_name="/generate")
        assert [tokens.word for tokens in served.ctx.pipeline().adapters["hen"].tokens] == ["sks"]
        ann = served.ctx.visitors.of(SimpleNamespace(cookies={COOKIE: secret_of(secret)}))
        offered = watched(served.ctx.jobs, "hen", None, ann)["download_tokens"]
        assert offered.visible and Path(str(offered.value["path"])).name == "hen_emb.safetensors"
