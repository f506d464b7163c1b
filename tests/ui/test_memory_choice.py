"""What the page chooses for a run on a GPU: the recipe for its memory, as the command line does, and what it says."""

import PIL.Image
import pytest
import torch

from dreambooth_moslora.cli import parser as one_word
from dreambooth_moslora.cli.parser import parse_train_config
from dreambooth_moslora.plan.memory import RECIPES, BaseSize, choose_memory, estimate
from dreambooth_moslora.plan.plan import plan_steps
from dreambooth_moslora.settings.sources import load_settings
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui.state import AppContext
from dreambooth_moslora.ui.train_form import TrainForm, crop_config
from dreambooth_moslora.ui.train_start import estimate_cost
from dreambooth_moslora.ui.visitors import Visitor
from tests.helpers.tiny_training import paint_photos

GIB = 2**30
WORDS_AND_PATHS = {
    *("pretrained_model_name_or_path", "variant", "instance_data_dir", "output_dir"),
    *("instance_prompt", "class_prompt"),
}
OF_THE_PAGE = {"seed", "memory"}
"""Named by the form alone: the crops it shows are drawn from the seed, and a plan may add to the recipe's."""


@pytest.fixture
def card(monkeypatch):
    """Pretend that there is a GPU of some capability, with so much free and so much in this process's hands."""

    def put(capability: int, free_gib: float, own_gib: float = 0.0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Some Card <3")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (capability, 0))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: capability >= 8)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (int(free_gib * GIB), 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *device: int(own_gib * GIB))

    return put


@pytest.fixture
def photos(tmp_path):
    for path in paint_photos(tmp_path / "dog", 5).iterdir():
        with PIL.Image.open(path) as image:
            image.resize((256, 256)).save(path)
    return tmp_path / "dog"


def config_of(form: TrainForm, photos, base: str = "owner/sdxl", resolution_px: int = 1024) -> TrainConfig:
    return TrainConfig.from_dict(form.config(base, resolution_px, photos, photos.parent / "run"))


@pytest.mark.parametrize("gb", RECIPES)
def test_the_form_is_the_recipe_for_the_card_and_what_the_command_chooses(card, photos, monkeypatch, gb):
    card(8, 0.95 * gb)
    config = config_of(TrainForm("sks", "dog"), photos)
    recipe = load_settings(f"assets/configs/sdxl_{gb}gb.toml")
    own = WORDS_AND_PATHS | {"max_train_steps", "prior"}
    if gb == 16:  # for a class that is kept too, says the recipe itself
        recipe["gradient_checkpointing"] = True
    assert {n: v for n, v in recipe.items() if n not in own} == {n: config.to_dict()[n] for n in recipe.keys() - own}
    assert plan_steps(config, 5).total_steps == recipe["max_train_steps"]
    monkeypatch.setattr(one_word, "least_free_gib", lambda **later: 0.95 * gb)
    command = parse_train_config([str(photos), "dog", "--pretrained_model_name_or_path", "owner/sdxl"])
    left_out = {"output_dir", *OF_THE_PAGE}
    mine, its = ({n: v for n, v in c.to_dict().items() if n not in left_out} for c in (config, command))
    assert mine == its and (config.memory, config.seed) == ("auto", 0)
    assert choose_memory(config, 0.95 * gb) == config and estimate(config, BaseSize(), 400).peak_gib <= 0.95 * gb
    crops = crop_config("owner/sdxl", 1024, photos, [])
    assert crops.crops_per_photo == config.crops_per_photo == recipe.get("crops_per_photo", 1)


@pytest.mark.parametrize(
    ("capability", "free_gib", "own_gib", "form", "expected"),
    [
        (8, 8.0, 7.0, {}, ("bf16", True, "none")),  # the page's own base makes room: the recipe for 16 GB
        (7, 23.0, 0.0, {}, ("fp16", False, "none")),
        (8, 7.0, 0.0, {"memory": "full"}, ("bf16", False, "none")),
        (8, 7.0, 0.0, {"memory": "recompute"}, ("bf16", True, "none")),
        (8, 23.0, 0.0, {"memory": "nf4"}, ("bf16", True, "nf4")),
        (8, 23.0, 0.0, {"rank": 256, "prior": "class_images"}, ("bf16", True, "none")),  # more than the recipe needs
    ],
)
def test_a_run_on_sdxl_has_the_plan_of_its_card_and_its_word(
    card, photos, capability, free_gib, own_gib, form, expected
):
    card(capability, free_gib, own_gib)
    config = choose_memory(config_of(TrainForm("sks", "dog", **form), photos), free_gib + own_gib)
    assert (config.mixed_precision, config.gradient_checkpointing, config.base_quantization) == expected


def test_the_embedded_base_is_trained_as_the_command_does_on_any_card(card, photos):
    command = parse_train_config([str(photos), "dog", "--pretrained_model_name_or_path", "toy"])
    card(8, 4.0)
    config = config_of(TrainForm("sks", "dog"), photos, "toy", 128)
    mine, its = ({n: v for n, v in c.to_dict().items() if n != "output_dir"} for c in (config, command))
    assert mine == its and config.mixed_precision is None and config.memory is None and config.evaluate_steps


@pytest.mark.parametrize(
    ("free_gib", "words", "is_tight"), [(40.0, "without", False), (11.0, "with", False), (4.0, "with", True)]
)
def test_the_cost_says_each_choice_and_names_the_card(card, tmp_path, photos, free_gib, words, is_tight):
    card(8, free_gib)
    (tmp_path / "visitor").mkdir()
    photos.rename(tmp_path / "visitor" / "photos")
    for number, path in enumerate(sorted((tmp_path / "visitor" / "photos").iterdir()), 1):
        path.rename(path.with_name(f"photo_{number:02d}.png"))
    folders = {"adapters_dir": tmp_path / "adapters", "runs_dir": tmp_path / "runs"}
    ctx = AppContext(lambda: None, base="sdxl", base_name="owner/sdxl", resolution_px=1024, training=True, **folders)
    cost = estimate_cost(ctx, TrainForm("sks", "dog"), Visitor("a" * 64, tmp_path / "visitor"))
    ctx.visitors.close()
    card_line = f"GPU: Some Card &lt;3, {free_gib} GiB free for this run, so it trains in bf16, {words} gradient"
    assert card_line in cost and ("too little memory" in cost) == is_tight
    for said in (
        "photos: 5, 0 with a mask",
        "recipe: assets/configs/sdxl_",
        "which show each photo",
        "scores: none, as",
    ):
        assert said in cost, (said, cost)
