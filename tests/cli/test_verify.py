"""`verify`: a run's published file comes out again of its own recipe and photos, and of nothing else."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors.numpy import save_file

from dreambooth_moslora.adapters.metadata import UNTOLD, AdapterMetadata
from dreambooth_moslora.adapters.published_file import note_scale
from dreambooth_moslora.adapters.raw_file import read_tensors, write_file
from dreambooth_moslora.cli import verify
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.cli.parser import Parser
from dreambooth_moslora.cli.train import parse_train_config
from dreambooth_moslora.cli.verify import FLAGS
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.events import StepDone
from dreambooth_moslora.settings.sources import RECIPE, TOLD_IF_CHANGED, load_settings
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

NAMED = {"recipe": {"seed": 1}, "base_id": "toy", "trigger_words": ("sks dog",)}
PUBLISHED, KOHYA = "pytorch_lora_weights.safetensors", "dog.kohya.safetensors"


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """(the settings of a run that has ended, what its file does not tell as words of the command line)."""
    folder = tmp_path_factory.mktemp("verify")
    photos = paint_photos(folder / "photos", 2)
    settings = {"max_train_steps": 3, "target_modules": ("to_q", "to_k"), "with_prior_preservation": True}
    config = tiny_config(tiny_base, photos, folder / "dog", prior="adapter_off", **settings)
    train(config)
    untold = ["--pretrained_model_name_or_path", str(tiny_base), "--instance_prompt", "a photo of sks dog"]
    return config, untold


@pytest.mark.slow
def test_a_run_and_a_stopped_one_which_tells_its_step_come_out_again(trained, tmp_path, capsys):
    config, untold = trained
    assert verified(config, *untold) == 0
    assert capsys.readouterr().out.startswith("equal: the same file, sha256 ")
    stopped, done = replace(config, output_dir=str(tmp_path / "dog")), []
    train(stopped, lambda event: done.extend([event] * isinstance(event, StepDone)), lambda: len(done) == 2)
    assert facts_of(stopped.output_dir).step == 2 and verified(stopped, *untold) == 0
    shutil.copy(tmp_path / "dog" / KOHYA, tmp_path / "renamed.safetensors")
    note_scale(tmp_path / "renamed.safetensors", 0.8, (0.6, 1.0))
    capsys.readouterr()
    command = ["verify", str(tmp_path / "renamed.safetensors"), "--photos", config.instance_data_dir, *untold]
    assert main([*command, "--step", "2"]) == 0
    said = capsys.readouterr().out
    assert said == "equal: the weights are the same, bit for bit; the header differs in best_scale, usable_scales\n"
    train(replace(stopped, resume_from_checkpoint="latest"))
    facts = facts_of(stopped.output_dir)
    assert facts.step is None and "resume_from_checkpoint" not in facts.withheld


@pytest.mark.slow
def test_other_photos_give_another_file_which_other_versions_might_too(trained, tmp_path, capsys):
    config, untold = trained
    others = tmp_path / "others"
    shutil.copytree(config.instance_data_dir, others)
    for number, colour in enumerate(("red", "yellow")):
        Image.new("RGB", (72, 72), colour).save(others / f"{number}.png")
    tensors, header = read_tensors(Path(config.output_dir) / PUBLISHED)
    facts = json.loads(header["moslora"])
    facts["versions"]["torch"] = "0.0.1"
    write_file(tmp_path / "old.safetensors", tensors, header | {"moslora": json.dumps(facts)})
    assert main(["verify", str(tmp_path / "old.safetensors"), "--photos", str(others), *untold]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("cannot tell: the weights differ") and "the first: unet." in captured.out
    assert "here, 0.0.1 in the file" in captured.out and "note: torch" in captured.err
    assert "instance_prompt = 'a photo of sks dog'" in captured.out


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(facts: AdapterMetadata | dict, path: str = "a.safetensors", change: float = 0.0) -> str:
    """A file with such facts, or with such a header."""
    layer = {"lora_A": numpy.ones((1, 2), "f"), "lora_B": numpy.full((2, 1), 1 + change, "f")}
    header = facts if isinstance(facts, dict) else {"moslora": facts.to_json()}
    save_file({f"unet.x.{name}.weight": value for name, value in layer.items()}, path, metadata=header)
    return path


def read(facts: AdapterMetadata, *flags: str) -> tuple:
    """(what was asked, the receipt of a file with these facts, the settings of its training)."""
    parser = Parser()
    verify.verify_arguments(parser)
    args = parser.parse_args([written(facts), "--photos", "photos", *flags])
    receipt = verify.read_receipt(args.file)
    return args, receipt, verify.config_of(args, receipt, Path("run"))


@pytest.fixture
def answer(capsys):
    """(exit code, output) for the facts of a file, if the weights that training gave differ by `change`, and its facts
    in `others`."""

    def answer(facts: AdapterMetadata, *flags: str, change: float = 3.0, **others):
        args, receipt, config = read(facts, *flags)
        made = Path(written(replace(facts, **others), "b.safetensors", change))
        code = verify.answer(receipt, made, config, verify.unknown_settings(args, receipt, config))
        return code, capsys.readouterr().out

    return answer


PLAIN = AdapterMetadata(4, 4, class_word="dog", **NAMED)


def test_nothing_is_called_different_that_rounding_may_explain_or_before_what_is_not_known_is_given(answer):
    code, said = answer(replace(PLAIN, withheld=("leave_out", "init_adapter")), "--leave_out", "1.png")
    assert code == 2 and said.startswith("cannot tell: ")
    assert "with --init_adapter, whose value is not in the file; give it" in said and "with --leave_out" not in said
    assert answer(replace(PLAIN, withheld=("leave_out",)), "--leave_out", "1.png")[0] == 1
    code, said = answer(replace(PLAIN, withheld=("resume_from_checkpoint",)), "--nothing_else")
    assert code == 2 and "resumed with other settings or photos" in said
    code, said = answer(PLAIN, "--nothing_else", change=1e-3)
    assert code == 2 and "differ by 1.0e-03 of the adapter, as they can by rounding" in said


def test_other_new_tokens_are_a_difference_and_another_name_of_their_file_is_none(answer):
    """The adapter's tensors alone were compared."""
    note = {"word": "sks", "count": 2, "file": "dog_emb.safetensors", "sha256": "0" * 64}
    for changed, code in (({"sha256": "1" * 64}, 1), ({"file": "cat_emb.safetensors"}, 0)):
        told = answer(replace(PLAIN, tokens=(note,)), "--nothing_else", change=0.0, tokens=(note | changed,))
        assert told[0] == code and ("the new tokens differ" in told[1]) == bool(code)


def test_a_file_that_lists_nothing_may_be_of_an_earlier_version(answer):
    prior = replace(PLAIN, recipe={"seed": 1, "with_prior_preservation": True, "prior": "adapter_off"})
    code, said = answer(prior)
    assert code == 2 and "--prior_prompts" in said and "--leave_out" in said and "--class_data_dir" not in said
    code, said = answer(prior, "--prior_prompts", "a cup")
    assert code == 2 and "--prior_prompts" not in said and "--nothing_else" in said
    assert answer(prior, "--nothing_else")[0] == 1 and answer(prior, change=0.0)[0] == 0
    assert answer(replace(prior, public={"prior_prompts": ["a cup"]}))[0] == 1


def test_the_step_is_the_files_unless_it_is_said(monkeypatch):
    steps = []
    monkeypatch.setattr(verify, "retrain", lambda config, step: steps.append(step))
    told = written(replace(PLAIN, step=7))
    Path("photos").mkdir()
    for words in ([], ["--step", "3"]):
        assert main(["verify", told, "--photos", "photos", *words]) == 130
    assert steps == [7, 3]


def test_a_recipe_that_train_refuses_is_refused(capsys):
    """A misspelt word was left out, and the weights of another run were compared."""
    Path("wrong.toml").write_text("class_promt = 'a dog'")
    for file, said in (("wrong.toml", "unknown setting `class_promt`: did you mean `class_prompt`?"), ("", "is empty")):
        assert main(["verify", written(PLAIN), "--config", file]) == 2
        assert said in capsys.readouterr().err


def test_words_come_from_flags_then_from_a_recipe_of_the_same_subject_then_from_the_file():
    facts = replace(PLAIN, recipe={"seed": 1, "rank": 8, "with_prior_preservation": True})
    cat = 'instance_prompt = "a sks cat"\nclass_prompt = "a cat"\nprior_prompts = ["a cup, red"]\nrank = 2\n'
    Path("cat.toml").write_text(cat)
    Path("dog.toml").write_text(cat.replace("cat", "dog"))
    alone, cats, dogs = (read(facts, *flags)[2] for flags in ((), ("--config", "cat.toml"), ("--config", "dog.toml")))
    assert (alone.instance_prompt, alone.class_prompt, alone.rank) == ("a photo of a sks dog", "a photo of a dog", 8)
    assert cats == replace(alone, prior_prompts=("a cup, red",))
    assert dogs == replace(cats, instance_prompt="a sks dog", class_prompt="a dog")
    mine = read(facts, "--config", "dog.toml", "--instance_prompt", "my sks dog")[2]
    assert mine.instance_prompt == "my sks dog"


def facts(**entries) -> AdapterMetadata:
    return AdapterMetadata(4, 4, **{"recipe": {"seed": 1}} | entries)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (None, "there is no such file"),
        ({}, "this program did not publish it"),
        ({"moslora": "{}"}, "this program did not publish it"),
        (AdapterMetadata(4, 4), "it holds no recipe"),
        (facts(subject_prompts=("a", "b")), "2 subjects; give --subjects"),
        (facts(processes=2), "2 processes"),
        (facts(basis={"kind": "file", "sha256": "0", "file": "b.safetensors"}), "give that file with --basis"),
        (facts(recipe={"seed": 1, "x": 2}), "not known here"),
        (facts(), "give --pretrained_model"),
        (facts(base_id="toy"), "give --instance_prompt"),
        (facts(base_id="gone", trigger_words=("sks dog",)), "gone"),
    ],
)
def test_a_file_that_cannot_be_verified_is_one_line(tmp_path, capsys, header, says):
    paint_photos(tmp_path / "dog", 1)
    before = header is not None and Path(written(header)).read_bytes()
    assert main(["verify", "a.safetensors", "--photos", "dog"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and says in error
    assert header is None or Path("a.safetensors").read_bytes() == before


@pytest.mark.parametrize("base", ["evil/model", "photos/base", "stabilityai/stable-diffusion-xl-base-1.0"])
def test_a_base_that_a_strangers_file_names_is_loaded_only_if_the_person_names_it(base):
    Path(base).mkdir(parents=True)
    foreign = replace(PLAIN, base_id=base)
    with pytest.raises(UserError, match=f"give --pretrained_model_name_or_path; the file says '{base}'"):
        read(foreign)
    assert read(foreign, "--pretrained_model_name_or_path", base)[2].pretrained_model_name_or_path == base


CONFIGS = Path(__file__).parents[2] / "assets" / "configs"
SHAPE_NOTHING = {
    *("cache_dir", "dataloader_num_workers", "enable_xformers_memory_efficient_attention"),
    *("cache_latents", "offload", "upcast_before_saving"),
    *("validation_prompt", "num_validation_images", "validation_epochs", "validation_steps", "evaluate_steps"),
    *("find_scale", "output_dir", "output_kohya_format", "checkpointing_steps", "checkpoints_total_limit"),
    *("logging_dir", "report_to", "dry_run", "push_to_hub", "hub_token", "hub_model_id"),
}
IN_OTHER_ENTRIES = {
    "instance_data_dir": "--photos",
    "memory": "the settings that the plan chose",
    "local_rank": "processes",
    "early_stopping": "step",
    "lora_blocks": "target_modules",
    "resume_from_checkpoint": "withheld",
}
PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}
CAPTIONS = {"caption_prefix": "my", "caption_suffix": "today", "shuffle_caption": True}
TOKENS = {"train_text_encoder_ti": True, "initializer_concept": "brown dog"}
IMAGES = {"with_prior_preservation": True, "num_class_images": 3, "sample_batch_size": 2}
RUNS = {
    "prior prompts": PRIOR | {"prior_prompts": ("a photo of a cup, red", "a house")},
    "class images": IMAGES | {"prior_generation_precision": "fp32"},
    "prior of some": PRIOR | {"prior_every": 2, "gradient_accumulation_steps": 3},
    "own class prompt": PRIOR | {"class_prompt": "an animal, a dog", "cache_cross_attention": True},
    "left out, captions": {"leave_out": ("1.png",), "caching": "off", "train_batch_size": 2, **CAPTIONS},
    "buckets": {"enable_bucket": True, "crops_per_photo": 2, "crop_zoom": 1.5, "random_flip": True, "caching": "disk"},
    "bf16, basis": {"mixed_precision": "bf16", "gradient_checkpointing": True, "basis": "svd", "rank": 2},
    "text encoders": {"train_text_encoder": True, "use_ema": True, "optimizer": "Prodigy", "learning_rate": 1.0},
    "new tokens": TOKENS | {"instance_prompt": "a photo of TOK", "token_abstraction": "TOK"},
    "free of a schedule": {"optimizer": "AdamWScheduleFree", "num_validation_images": 1, "validation_steps": 1},
    "exposures": {"max_train_steps": None, "exposures_per_photo": 2, "gradient_accumulation_steps": 2, "seed": None},
}


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


def said_to_be_equal(config: TrainConfig, said: str) -> bool:
    """The header names the file of new tokens, which is called as the run is."""
    if config.train_text_encoder_ti:
        return said == "equal: the weights are the same, bit for bit; the header differs in tokens\n"
    return said.startswith("equal: the same file, sha256 ")


def test_each_setting_is_told_or_asked_for_or_shapes_nothing():
    """A new setting belongs into one of these lists."""
    known = [*RECIPE, *TOLD_IF_CHANGED, *FLAGS, *SHAPE_NOTHING, *IN_OTHER_ENTRIES]
    assert {item.name for item in fields(TrainConfig)} == set(known)
    assert not SHAPE_NOTHING & {*RECIPE, *TOLD_IF_CHANGED, *FLAGS}


MARKS = {"free of a schedule": [pytest.mark.slow, pytest.mark.extra("schedulefree")], "prior prompts": []}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=MARKS.get(k, pytest.mark.slow)) for k in RUNS])
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
    assert said_to_be_equal(config, capsys.readouterr().out)
    if private:
        assert verified(config, *told) in (0, 2)
        said, asked = capsys.readouterr().out, [f"with --{name}, whose value is not in the file" for name in private]
        assert said.startswith("equal") or all(words in said for words in asked)


@pytest.mark.slow
def test_a_precision_of_accelerates_own_settings_is_told(trained, tmp_path, monkeypatch):
    config, untold = trained
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert verified(config, *untold) == 0
    train(other := replace(config, output_dir=str(tmp_path / "dog")))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert verified(other, *untold) == 0


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
@pytest.mark.parametrize("recipe", ["quickstart", "two_subjects"])
def test_a_recipe_of_the_embedded_base_comes_out_again(tmp_path, monkeypatch, capsys, recipe):
    monkeypatch.chdir(CONFIGS.parents[1])  # its photos are named from there
    file = CONFIGS / f"{recipe}.toml"
    quick = {"output_dir": str(tmp_path / "run"), "max_train_steps": 2, "num_validation_images": 0}
    config = TrainConfig.from_dict(load_settings(file) | quick)
    train(config)
    source = ["--config", str(file)] if config.subjects else ["--photos", config.instance_data_dir]
    assert main(["verify", config.output_dir, *source]) == 0
    assert said_to_be_equal(config, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--rank 3 --mixer none --no_with_prior_preservation --captions auto"])
def test_a_run_of_one_word_comes_out_again(tmp_path, capsys, flags):
    """Its photos are oblong and have no masks, so that shapes and masks are chosen too."""
    paint_photos(tmp_path / "dog", 3)
    quick = ["--max_train_steps", "2", "--evaluate_steps", "0", "--num_validation_images", "0"]
    config = parse_train_config(["dog", "small dog", "--pretrained_model_name_or_path", "toy", *quick, *flags.split()])
    train(config)
    assert main(["verify", config.output_dir, "--photos", "dog"]) == 0
    assert said_to_be_equal(config, capsys.readouterr().out)
