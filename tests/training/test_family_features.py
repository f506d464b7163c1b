"""What the program offers, for each family: it works, or it is refused in one line that names the family."""

import re
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
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_steps")]
WHOLE = {"enable_bucket": True, "caption_dropout": 0.1, "unmasked_weight": 0.0, "random_flip": True, "caching": "disk"}
WHOLE |= {"with_prior_preservation": True, "num_class_images": 2, "sample_batch_size": 2}


class Case:
    """A family's tiny base, and four photos, one of them wide, with a caption and a mask."""

    def __init__(self, name: str, folder: Path):
        self.facts = next(facts for facts in families.FAMILIES if facts.name == name)
        self.folder, self.base = folder, folder / "base"
        tiny_pipeline(name, folder / "files").save_pretrained(self.base)
        self.photos = paint_photos(folder / "photos", 4)
        photo = self.photos / "1.png"
        Image.open(photo).resize((96, 64)).save(photo)
        photo.with_suffix(".txt").write_text("a photo of sks dog, on a sofa")
        Image.new("L", (96, 64), 255).save(photo.with_suffix(".mask.png"))

    def config(self, run, **changes):
        usual = {"target_modules": rows.ATTENTION, "max_train_steps": 2}
        usual |= {"class_data_dir": str(self.folder / "class"), "cache_dir": str(self.folder / "cache")}
        return tiny_config(self.base, self.photos, self.folder / run, **usual | changes)

    def train(self, run, **changes) -> Path:
        train(self.config(run, **changes))
        return self.folder / run

    def refused(self, flag: str, **changes) -> None:
        with pytest.raises(UserError, match=f"{flag} is not for {re.escape(self.facts.title)}"):
            make_plan(self.config("refused", **changes))


@pytest.fixture(scope="module", params=MAKERS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def whole(case, encoders, two_steps) -> Path:
    """A run with all of `WHOLE`, with samples, scores and a strength."""
    drawn = {"num_validation_images": 1, "validation_steps": 2, "evaluate_steps": 1, "find_scale": True}
    with few_pictures(inference_steps=2):
        plan = make_plan(case.config("whole", **WHOLE, **drawn))
        train(plan, evaluator=TrainingEvaluator(plan.config, plan.photos, encoders))
    return case.folder / "whole"


def test_a_run_makes_its_class_images_samples_and_scores_and_the_next_takes_its_encodings(case, whole, capsys):
    assert len(list((case.folder / "class").rglob("*.png"))) == 2
    assert (whole / "image_0.png").is_file() and (whole / "contact_sheet.png").is_file()
    assert main(["explain", str(whole)]) == 0
    assert "--snr_gamma" not in capsys.readouterr().out
    files = sorted((case.folder / "cache").rglob("*.safetensors"))
    assert adapter_sha256(case.train("again", **WHOLE)) == adapter_sha256(whole)
    assert files and files == sorted((case.folder / "cache").rglob("*.safetensors"))


def test_several_subjects_at_given_sizes_without_a_cache(case):
    others = paint_photos(case.folder / "cat", 3)
    tables = [
        {"instance_data_dir": str(case.photos), "instance_prompt": "a photo of sks dog"},
        {"instance_data_dir": str(others), "instance_prompt": "a photo of zwx cat"},
    ]
    sizes = {"aspect_ratio_buckets": "64,64;64,96", "caching": "off", "class_data_dir": None}
    card = (case.train("several", subjects=tables, **sizes) / "README.md").read_text()
    assert "sks dog" in card and "zwx cat" in card


def test_like_verify_and_info(case, capsys):
    run = case.train("dog")
    flags = ["--pretrained_model_name_or_path", str(case.base), "--instance_data_dir", str(case.photos)]
    like = parse_train_config(["--like", str(run), *flags, "--instance_prompt", "a photo of sks dog"])
    assert (like.rank, like.resolution) == (4, 64)
    assert set(make_plan(like).config.target_modules) == set(make_plan(case.config("x")).config.target_modules)
    assert main(["info", str(run)]) == 0
    assert case.facts.denoiser in capsys.readouterr().out
    words = ["--instance_prompt", "a photo of sks dog", *flags[:2]]
    assert main(["verify", str(run), "--photos", str(case.photos), *words]) == 0
    assert "equal: " in capsys.readouterr().out


def test_generate_and_the_cards_snippet_draw(case, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--width", "64", "--height", "64", "--steps", "2", "--output_dir", "pictures"]
    words = ["generate", "--prompt", "a photo of sks dog", "--base", str(case.base), "--adapter", str(whole)]
    assert main([*words, *size]) == 0
    assert list((tmp_path / "pictures").glob("*.png"))
    (code,) = re.findall(r"```python\n(.+?)```", (whole / "README.md").read_text(), re.DOTALL)
    code = code.replace("path/to/the/base", str(case.base)).replace("path/to/this/folder", str(whole))
    code = re.sub(r'torch\.b?float16\)\.to\("cuda"\)', "torch.float32)", code)
    code = code.replace(").images", ", num_inference_steps=1, height=64, width=64).images")
    scope = {}
    exec(code, scope)
    assert isinstance(scope["image"], Image.Image)


def test_text_encoders_are_trained_where_the_family_has_small_ones(case):
    if not case.facts.adapted_encoders:
        return case.refused("--train_text_encoder", train_text_encoder=True)
    case.train("words", train_text_encoder=True)
    if not case.facts.has_new_tokens:
        case.refused("--train_text_encoder_ti", train_text_encoder_ti=True)


def test_settings_of_unets_are_for_unets_and_those_of_flows_for_flows(case):
    others = families.OF_UNETS if case.facts.style == "flow" else families.OF_FLOWS
    values = {"snr_gamma": 5.0, "noise_offset": 0.1, "basis": "svd", "timestep_bias_strategy": "later"}
    values |= {"weighting_scheme": "mode", "lora_blocks": "0"}
    for name in others:
        case.refused(f"--{name}.*", **{name: values.get(name, True)})


def test_a_fleets_runs_share_their_steps(case):
    runs = [case.config(str(seed), seed=seed) for seed in (1, 2)]
    ended = {}
    assert needs_to_be_alone(runs[0]) is None
    members = [Member(make_plan(config)) for config in runs]
    train_together(members, 2, lambda member, result: ended.update({member.plan.config.seed: result.step}))
    assert ended == {1: 2, 2: 2}


def test_one_word_takes_the_familys_recipe(case):
    name, recipe = recipe_settings(str(case.base), 8.0)
    assert name.startswith(case.facts.name)
    words = [str(case.photos), "dog", "--pretrained_model_name_or_path", str(case.base), "--resolution", "64"]
    config = parse_train_config([*words, "--output_dir", str(case.folder / "word"), "--base_quantization", "none"])
    assert make_plan(config, is_later=True).config.prior == "adapter_off" and recipe
