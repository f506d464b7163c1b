"""What the program offers, for each family: it works, or it is refused in one line that names the family."""

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.cli.train import parse_train_config
from dreambooth_moslora.core import UserError
from dreambooth_moslora.evaluation.during_training import TrainingEvaluator
from dreambooth_moslora.extras.cluster.fleet import needs_to_be_alone
from dreambooth_moslora.extras.cluster.together import Member, train_together
from dreambooth_moslora.plan.choices import recipe_settings
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.settings import families, rows
from dreambooth_moslora.training.loop import train
from tests.helpers.few_pictures import few_pictures
from tests.helpers.tiny_families import MAKERS, tiny_pipeline
from tests.helpers.tiny_training import paint_photos, tiny_config


class Case:
    """A family's tiny base, and photos: four, one with a caption and a mask."""

    def __init__(self, name: str, folder: Path):
        self.facts = next(facts for facts in families.FAMILIES if facts.name == name)
        self.folder, self.base = folder, folder / "base"
        tiny_pipeline(name, folder / "files").save_pretrained(self.base)
        self.photos = paint_photos(folder / "photos", 4)

    def config(self, run="dog", **changes):
        usual = {"target_modules": rows.ATTENTION, "max_train_steps": 2}
        return tiny_config(self.base, self.photos, self.folder / run, **usual | changes)

    def train(self, run="dog", **changes) -> Path:
        train(self.config(run, **changes))
        return self.folder / run

    def bytes(self, run="dog", **changes) -> bytes:
        return (self.train(run, **changes) / "pytorch_lora_weights.safetensors").read_bytes()

    def refused(self, flag: str, **changes) -> None:
        with pytest.raises(UserError, match=f"{flag} is not for {re.escape(self.facts.title)}"):
            make_plan(self.config(**changes))


def captions_masks_and_buckets(case):
    photo = sorted(case.photos.glob("*.png"))[0]
    Image.open(photo).resize((96, 64)).save(photo)
    photo.with_suffix(".txt").write_text("a photo of sks dog, on a sofa")
    Image.new("L", (96, 64), 255).save(photo.with_suffix(".mask.png"))
    case.train(enable_bucket=True, caption_dropout=0.1, unmasked_weight=0.0, random_flip=True)
    assert (case.train("listed", aspect_ratio_buckets="64,64;64,96") / "README.md").is_file()


def class_images_as_the_prior(case):
    run = case.train(with_prior_preservation=True, num_class_images=2, sample_batch_size=2)
    assert len(list((run / "class_images").rglob("*.png"))) == 2


def several_subjects(case):
    others = paint_photos(case.folder / "cat", 3)
    tables = [
        {"instance_data_dir": str(case.photos), "instance_prompt": "a photo of sks dog"},
        {"instance_data_dir": str(others), "instance_prompt": "a photo of zwx cat"},
    ]
    card = (case.train(subjects=tables) / "README.md").read_text()
    assert "sks dog" in card and "zwx cat" in card


def caches(case):
    first = case.bytes("first", caching="disk", cache_dir=str(case.folder / "cache"))
    files = list((case.folder / "cache").rglob("*.safetensors"))
    shutil.move(case.folder / "first", case.folder / "moved")
    assert case.bytes("first", caching="disk", cache_dir=str(case.folder / "cache")) == first
    assert sorted(files) == sorted((case.folder / "cache").rglob("*.safetensors")) and files
    case.train("each", caching="off")


def samples(case):
    run = case.train(num_validation_images=1, validation_steps=1)
    assert (run / "image_0.png").is_file() and (run / "contact_sheet.png").is_file()


def scores_and_strength(case, encoders, capsys):
    config = case.config(evaluate_steps=1, find_scale=True)
    with few_pictures(inference_steps=2):
        plan = make_plan(config)
        train(plan, evaluator=TrainingEvaluator(plan.config, plan.photos, encoders))
    assert main(["explain", config.output_dir]) == 0
    assert "--snr_gamma" not in capsys.readouterr().out


def like_verify_and_info(case, capsys):
    run = case.train()
    flags = ["--pretrained_model_name_or_path", str(case.base), "--instance_data_dir", str(case.photos)]
    like = parse_train_config(["--like", str(run), *flags, "--instance_prompt", "a photo of sks dog"])
    assert (like.rank, like.resolution) == (4, 64)
    assert set(make_plan(like).config.target_modules) == set(make_plan(case.config()).config.target_modules)
    assert main(["info", str(run)]) == 0
    assert case.facts.denoiser in capsys.readouterr().out
    words = ["--instance_prompt", "a photo of sks dog", *flags[:2]]
    assert main(["verify", str(run), "--photos", str(case.photos), *words]) == 0
    assert "equal: " in capsys.readouterr().out


def generate(case, monkeypatch):
    run = case.train()
    monkeypatch.chdir(case.folder)
    size = ["--width", "64", "--height", "64", "--steps", "2", "--output_dir", "pictures"]
    words = ["generate", "--prompt", "a photo of sks dog", "--base", str(case.base), "--adapter", str(run)]
    assert main([*words, *size]) == 0
    assert list((case.folder / "pictures").glob("*.png"))


def text_encoders(case):
    if not case.facts.adapted_encoders:
        return case.refused("--train_text_encoder", train_text_encoder=True)
    case.train(train_text_encoder=True)
    if not case.facts.has_new_tokens:
        case.refused("--train_text_encoder_ti", train_text_encoder_ti=True)


def settings_of_unets(case):
    others = families.OF_UNETS if case.facts.style == "flow" else families.OF_FLOWS
    values = {"snr_gamma": 5.0, "noise_offset": 0.1, "basis": "svd", "timestep_bias_strategy": "later"}
    values |= {"weighting_scheme": "mode", "lora_blocks": "0"}
    for name in others:
        case.refused(f"--{name}.*", **{name: values.get(name, True)})


def a_fleets_runs_together(case):
    runs = [case.config(str(seed), seed=seed) for seed in (1, 2)]
    ended = {}
    assert needs_to_be_alone(runs[0]) is None
    members = [Member(make_plan(config)) for config in runs]
    train_together(members, 2, lambda member, result: ended.update({member.plan.config.seed: result.step}))
    assert ended == {1: 2, 2: 2}


def one_word(case, capsys):
    name, recipe = recipe_settings(str(case.base), 8.0)
    assert name.startswith(case.facts.name)
    words = [str(case.photos), "dog", "--pretrained_model_name_or_path", str(case.base), "--resolution", "64"]
    config = parse_train_config([*words, "--output_dir", str(case.folder / "word"), "--base_quantization", "none"])
    assert make_plan(config, is_later=True).config.prior == "adapter_off" and recipe


def the_cards_snippet(case):
    card = (case.train() / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.+?)```", card, re.DOTALL)
    code = code.replace("path/to/the/base", str(case.base)).replace("path/to/this/folder", str(case.folder / "dog"))
    code = re.sub(r'torch\.b?float16\)\.to\("cuda"\)', "torch.float32)", code)
    code = code.replace(").images", ", num_inference_steps=1, height=64, width=64).images")
    scope = {}
    exec(code, scope)
    assert isinstance(scope["image"], Image.Image)


FEATURES = {
    feature.__name__: feature
    for feature in (
        *(captions_masks_and_buckets, class_images_as_the_prior, several_subjects, caches, samples),
        *(scores_and_strength, like_verify_and_info, generate, text_encoders, settings_of_unets),
        *(one_word, the_cards_snippet, a_fleets_runs_together),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", MAKERS)
def test_each_feature_works_with_each_family_or_is_refused_by_its_name(name, feature, tmp_path, request):
    run, case = FEATURES[feature], Case(name, tmp_path)
    wanted = run.__code__.co_varnames[1 : run.__code__.co_argcount]
    partial(run, case)(**{fixture: request.getfixturevalue(fixture) for fixture in wanted})
