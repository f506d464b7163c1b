"""`verify` over the settings: whatever shapes a run is in its file or asked for, and the run comes out again."""

import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dreambooth_moslora.adapters.metadata import UNTOLD, AdapterMetadata
from dreambooth_moslora.adapters.raw_file import read_tensors
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.cli.parser import parse_train_config
from dreambooth_moslora.cli.verify import FLAGS
from dreambooth_moslora.disk.events import StepDone
from dreambooth_moslora.settings.sources import RECIPE, TOLD_IF_CHANGED, load_settings
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

CONFIGS = Path(__file__).parents[2] / "assets" / "configs"
SHAPE_NOTHING = {
    *("cache_dir", "dataloader_num_workers", "enable_xformers_memory_efficient_attention"),
    *("validation_prompt", "num_validation_images", "validation_epochs", "validation_steps", "evaluate_steps"),
    *("find_scale", "output_dir", "output_kohya_format", "checkpointing_steps", "checkpoints_total_limit"),
    *("logging_dir", "report_to", "dry_run", "push_to_hub", "hub_token", "hub_model_id"),
}
IN_OTHER_ENTRIES = {
    "instance_data_dir": "--photos",
    "memory": "the settings that the plan chose",
    "local_rank": "processes",
    "early_stopping": "step",
    "resume_from_checkpoint": "withheld",
}
PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}
IMAGES = {"with_prior_preservation": True, "num_class_images": 3, "sample_batch_size": 2}
RUNS = {
    "plain": {},
    "class images": IMAGES | {"prior_generation_precision": "fp32"},
    "prior prompts": PRIOR | {"prior_prompts": ("a photo of a cup, red", "a house")},
    "own class prompt": PRIOR | {"class_prompt": "an animal, a dog"},
    "left out": {"leave_out": ("1.png",)},
    "captions": {"caption_prefix": "my", "caption_suffix": "today", "shuffle_caption": True},
    "encoded each step": {"caching": "off", "train_batch_size": 2},
    "encoded on the disk": {"caching": "disk"},
    "cached products": PRIOR | {"cache_cross_attention": True},
    "bf16": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    "buckets": {"enable_bucket": True, "crops_per_photo": 2, "crop_zoom": 1.5, "random_flip": True},
    "text encoders": {"train_text_encoder": True},
    "new tokens": {"train_text_encoder_ti": True, "initializer_concept": "brown dog"},
    "a word": {"train_text_encoder_ti": True, "instance_prompt": "a photo of TOK", "token_abstraction": "TOK"},
    "averaged": {"use_ema": True, "optimizer": "Prodigy", "learning_rate": 1.0},
    "free of a schedule": {"optimizer": "AdamWScheduleFree", "num_validation_images": 1, "validation_steps": 1},
    "an svd basis": {"basis": "svd", "rank": 2},
    "a random seed": {"seed": None},
    "exposures": {"max_train_steps": None, "exposures_per_photo": 2, "gradient_accumulation_steps": 2},
}
QUICK = ("plain", "prior prompts")


def facts_of(run: str) -> AdapterMetadata:
    return AdapterMetadata.from_json(read_tensors(Path(run) / "pytorch_lora_weights.safetensors")[1]["moslora"])


def as_flags(config: TrainConfig, names) -> list[str]:
    words = []
    for name in names:
        value = getattr(config, name)
        words += [f"--{name}", *(value if isinstance(value, tuple) else [str(value)])]
    return words


def verified(config: TrainConfig, *more: str) -> int:
    return main(["verify", config.output_dir, "--photos", config.instance_data_dir, *more])


def test_each_setting_is_told_or_asked_for_or_shapes_nothing():
    """A new setting belongs into one of these lists."""
    known = [*RECIPE, *TOLD_IF_CHANGED, *FLAGS, *SHAPE_NOTHING, *IN_OTHER_ENTRIES]
    assert {item.name for item in fields(TrainConfig)} == set(known)
    assert not SHAPE_NOTHING & {*RECIPE, *TOLD_IF_CHANGED, *FLAGS}


def marks_of(kind: str) -> list:
    slow = [] if kind in QUICK else [pytest.mark.slow]
    return [*slow, pytest.mark.extra("schedulefree")] if kind == "free of a schedule" else slow


@pytest.mark.parametrize("kind", [pytest.param(k, marks=marks_of(k)) for k in RUNS])
def test_a_run_comes_out_again_and_its_private_settings_are_asked_for(tiny_base, tmp_path, capsys, kind):
    photos = paint_photos(tmp_path / "photos", 3)
    for photo in photos.glob("*.png"):
        photo.with_suffix(".txt").write_text("a photo of sks dog, on grass, by day\n")
    shutil.copy(photos / "0.png", photos / "0.mask.png")
    config = tiny_config(tiny_base, photos, tmp_path / "dog", **{"max_train_steps": 2} | RUNS[kind])
    train(config)
    private = facts_of(config.output_dir).withheld
    assert set(private) <= {*UNTOLD} and all(str(tmp_path) not in name for name in private)
    told = as_flags(config, ["pretrained_model_name_or_path"])
    assert verified(config, *told, *as_flags(config, private)) == 0
    said = capsys.readouterr().out
    if config.train_text_encoder_ti:  # the header names the file of new tokens, which is called as the run is
        assert said == "equal: the weights are the same, bit for bit; the header differs in tokens\n"
    else:
        assert said.startswith("equal: the same file, sha256 ")
    if private:
        assert verified(config, *told) in (0, 2)
        said = capsys.readouterr().out
        assert said.startswith("equal") or all(
            f"with --{name}, whose value is not in the file" in said for name in private
        )


@pytest.mark.slow
@pytest.mark.parametrize(("there", "here"), [("bf16", None), (None, "bf16")])
def test_a_precision_of_accelerates_own_settings_is_told(tiny_base, tmp_path, monkeypatch, capsys, there, here):
    def use(precision: str | None) -> None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        if precision:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)

    config = tiny_config(tiny_base, paint_photos(tmp_path / "photos", 2), tmp_path / "dog", max_train_steps=2)
    use(there)
    train(config)
    use(here)
    assert verified(config, *as_flags(config, ["pretrained_model_name_or_path", "instance_prompt"])) == 0


@pytest.mark.slow
def test_a_run_resumed_with_other_settings_and_class_images_of_another_run_cannot_be_repeated(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos", 2)
    config = tiny_config(tiny_base, photos, tmp_path / "dog", **IMAGES, max_train_steps=1)
    train(config)
    assert "class_data_dir" not in facts_of(config.output_dir).withheld
    train(replace(config, max_train_steps=2, learning_rate=1e-3, resume_from_checkpoint="latest"))
    assert "resume_from_checkpoint" in facts_of(config.output_dir).withheld
    train(replace(config, seed=4))
    assert facts_of(config.output_dir).withheld == ("instance_prompt", "class_data_dir")


@pytest.mark.slow
def test_a_stopped_run_tells_its_step_and_comes_out_again(tiny_base, tmp_path, capsys):
    done = []
    config = tiny_config(tiny_base, paint_photos(tmp_path / "photos", 2), tmp_path / "dog")
    train(config, lambda event: done.extend([event] * isinstance(event, StepDone)), lambda: len(done) == 2)
    assert facts_of(config.output_dir).step == 2
    assert verified(config, *as_flags(config, ["pretrained_model_name_or_path", "instance_prompt"])) == 0
    train(replace(config, resume_from_checkpoint="latest"))
    facts = facts_of(config.output_dir)
    assert facts.step is None and "resume_from_checkpoint" not in facts.withheld


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quickstart", "toy", "overtrained", "two_subjects"])
def test_a_recipe_of_the_embedded_base_comes_out_again(tmp_path, capsys, recipe):
    file = CONFIGS / f"{recipe}.toml"
    quick = {"output_dir": str(tmp_path / "run"), "max_train_steps": 2, "num_validation_images": 0}
    photos = {"instance_data_dir": "assets/subjects/bear"} if recipe == "overtrained" else {}
    config = TrainConfig.from_dict(load_settings(file) | quick | photos)
    train(config)
    source = ["--config", str(file)] if config.subjects else ["--photos", config.instance_data_dir]
    assert main(["verify", config.output_dir, *source]) == 0
    said = capsys.readouterr().out
    if config.train_text_encoder_ti:  # the header names the file of new tokens, which is called as the run is
        assert said == "equal: the weights are the same, bit for bit; the header differs in tokens\n"
    else:
        assert said.startswith("equal: the same file, sha256 ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [[], ["--rank", "3", "--mixer", "none"], ["--no_with_prior_preservation"], ["--captions", "auto"]],
)
def test_a_run_of_one_word_comes_out_again(tmp_path, monkeypatch, capsys, flags):
    """Its photos are oblong and have no masks, so that shapes and masks are chosen too."""
    monkeypatch.chdir(tmp_path)
    paint_photos(tmp_path / "dog", 3)
    quick = ["--max_train_steps", "2", "--evaluate_steps", "0", "--num_validation_images", "0"]
    config = parse_train_config(["dog", "small dog", "--pretrained_model_name_or_path", "toy", *quick, *flags])
    train(config)
    assert main(["verify", config.output_dir, "--photos", "dog"]) == 0
    said = capsys.readouterr().out
    if config.train_text_encoder_ti:  # the header names the file of new tokens, which is called as the run is
        assert said == "equal: the weights are the same, bit for bit; the header differs in tokens\n"
    else:
        assert said.startswith("equal: the same file, sha256 ")
