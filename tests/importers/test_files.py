"""Configuration files of other trainers: recognized by shape, read safely, written as TOML."""

import json
import os
import tomllib
from pathlib import Path

import pytest

from dreambooth_moslora.cli.command_train import parse_training
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers.files import TRAINERS, load_config
from dreambooth_moslora.importers.reading import read_file
from dreambooth_moslora.importers.rows import Unsupported, list_rows
from dreambooth_moslora.settings.rules import list_remarks
from dreambooth_moslora.settings.setting_names import SETTINGS
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.foreign_configs import CONFIGS, write_config

BEAR = "assets/subjects/bear"
HOSTILE = {
    "tag.yaml": ("!!python/object/apply:os.system ['touch hacked']", "cannot be read"),
    "bomb.yaml": ("a: &a [x]\nb: [*a, *a]", "aliases"),
    "deep.yaml": ("[" * 5000, "cannot be read"),
    "deep.toml": (f"network_dim = {'[' * 5000}", "nested too deep"),
    "deep.json": ('{"model_family": ' + "[" * 100_000, "recursion depth"),
    "twice.yaml": ("job: extension\njob: x", "job is given twice"),
    "twice.json": ('{"training_method": "LORA", "training_method": "X"}', "given twice"),
    "missing.toml": (
        'network_dim = 4\ndataset_config = "none.toml"',
        "error: dataset_config none.toml: there is no",
    ),
    "pipe.toml": ('network_dim = 4\ndataset_config = "pipe"', "pipe: it is a pipe"),
    "outside.json": (
        '{"training_method": "LORA", "concept_file_name": "../outside.txt"}',
        "outside.txt: Invalid JSON",
    ),
    "kinds.toml": ('network_dim = ["x"]\nlearning_rate = nan', "expected a whole number"),
    "kinds.json": ('{"model_family": "flux", "flow_schedule_shift": {}}', "expected a number"),
    "kinds.yaml": ("{job: x, config: {process: [3]}}", "training jobs alone"),
    "typo.yaml": ('job: extension\nconfig: "x\nname: y', "it is not valid YAML in line "),
    "list.yaml": ("- 1", "expected a table"),
    "own.yaml": ("rank: 8", "no configuration of a trainer"),
    "huge.json": ('{"model_family": "' + "x" * (20 * 2**20), "it is not valid JSON"),
    "huge.yaml": ("x" * (20 * 2**20), "it has more than 1 MiB"),
}
"""File's name -> its content, and a part of the one line that it costs."""


@pytest.fixture(autouse=True)
def work_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_costs_one_line(name, capsys):
    content, message = HOSTILE[name]
    Path(name).write_text(content)
    Path("../outside.txt").write_text("secret")
    os.mkfifo("pipe")
    assert main(["train", "--config", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error and not Path("hacked").exists()


@pytest.mark.parametrize("content", ['{"prompt": 3}', "3", '["a", [', '{"a": ["b"]}', "[{}, [1]]"])
@pytest.mark.parametrize("key", ["sample_prompts", "user_prompt_library"])
def test_odd_file_of_prompts_costs_a_line_at_most(key, content):
    Path("odd.json").write_text(content)
    name = "network_dim" if key == "sample_prompts" else "model_family"
    Path("config.json").write_text(json.dumps({name: 4, key: "odd.json"}))
    try:
        load_config(Path("config.json"))
    except UserError as error:
        assert "odd.json" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("trainer", CONFIGS)
def test_file_means_the_same_settings_here(trainer):
    _, translation = load_config(write_config(trainer))
    assert not translation.unsupported and not translation.unknown
    config = TrainConfig.from_dict(translation.settings)
    expected = CONFIGS[trainer].settings
    assert {name: getattr(config, name) for name in expected} == expected
    assert not [remark for remark in list_remarks(config) if "has no effect" in remark]


@pytest.mark.parametrize("trainer", CONFIGS)
def test_train_reads_the_file_and_reports_every_key(trainer, capsys):
    path = write_config(trainer)
    settings = parse_training(["--config", str(path), "--rank", "3"]).all_settings
    assert settings["rank"] == 3
    report = capsys.readouterr().err
    assert report.startswith("Translated from ")
    assert "plain LoRA" in report and f"--learning_rate {settings['learning_rate']}" in report
    assert max(map(len, report.splitlines())) <= 100
    assert " False" not in report  # switches that are off are not worth a line


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        (
            "ai-toolkit",
            (
                *(
                    "black-forest-labs/FLUX.1-dev, is_flux: true, quantize",
                    "toy, is_xl: true, low_vram",
                ),
                *("noise_scheduler: flowmatch", "noise_scheduler: ddpm", "sampler: flowmatch", ""),
                *("folder_path: photos", f"folder_path: {find_asset(BEAR)}"),
            ),
        ),
        (
            "kohya",
            (
                *("stabilityai/stable-diffusion-xl-base-1.0", "toy"),
                *('image_dir = "photos"', f'image_dir = "{find_asset(BEAR)}"'),
                *('image_dir = "regular"\nis_reg = true', 'image_dir = "photos"\nis_reg = true'),
            ),
        ),
    ],
)
def test_train_plans_a_run_of_the_file_as_it_is(trainer, changes, capsys):
    path = write_config(trainer, changes)
    assert main(["train", "--config", str(path), "--dry_run"]) == 0
    assert "steps an epoch" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", CONFIGS)
def test_converted_file_means_what_the_file_means(trainer):
    path = write_config(trainer)
    assert main(["convert", str(path), "--out", "ours.toml"]) == 0
    converted = TrainConfig.from_dict(tomllib.loads(Path("ours.toml").read_text()))
    assert converted == TrainConfig.from_dict(load_config(path)[0])
    assert main(["convert", str(path), "--out", "ours.toml"]) == 2  # never replaced
    assert main(["convert", "ours.toml"]) == 2


def test_every_trainer_has_an_example_that_it_alone_matches():
    names = []
    for example in CONFIGS:
        content = read_file(write_config(example))
        names += [trainer.name for trainer in TRAINERS if trainer.matches(content)]
    assert sorted(names) == sorted(trainer.name for trainer in TRAINERS)


def test_a_rate_that_the_file_names_stays_though_it_is_idle():
    path = write_config("ai-toolkit", ("lr: 1e-4", "lr: 1e-4\n        text_encoder_lr: 1e-5"))
    assert float(load_config(path)[0]["text_encoder_lr"]) == 1e-5


def test_own_file_is_read_as_ours():
    Path("own.toml").write_text("[training]\nrank = 8\nlearning_rate = 1e-4\n")
    assert load_config(Path("own.toml")) == ({"rank": 8, "learning_rate": 1e-4}, None)


@pytest.mark.parametrize("trainer", CONFIGS)
def test_every_row_names_settings_that_exist(trainer):
    for key, row in list_rows(CONFIGS[trainer].table):
        setting = getattr(row, "setting", None)
        assert setting is None or setting in SETTINGS, key


@pytest.mark.parametrize("trainer", CONFIGS)
def test_no_row_refuses_a_key_that_is_a_setting(trainer):
    """A new setting, such as another loss, has to be translated."""
    refused = [key for key, row in list_rows(CONFIGS[trainer].table) if type(row) is Unsupported]
    assert refused and not {key.rpartition(".")[2] for key in refused} & SETTINGS.keys()


def test_unsupported_keys_end_the_command_together():
    path = write_config("ai-toolkit", ("dtype: bf16", "loss_type: mae\n        noise_offset: x"))
    with pytest.raises(UserError, match=r"(?s)train\.loss_type mae.*train\.noise_offset x"):
        parse_training(["--config", str(path)])


def test_folders_with_repeats_become_subjects():
    for name in ("10_sks dog", "4_ohwx cat", "samples"):
        Path("train", name).mkdir(parents=True)
    Path("regular/1_dog").mkdir(parents=True)
    Path("config.toml").write_text(
        'network_dim = 8\ntrain_data_dir = "train"\nreg_data_dir = "regular"\n'
    )
    settings, translation = load_config(Path("config.toml"))
    assert not translation.unsupported
    config = TrainConfig.from_dict(settings)
    assert [subject.instance_prompt for subject in config.subjects] == ["sks dog", "ohwx cat"]
    assert {subject.class_data_dir for subject in config.subjects} == {"regular/1_dog"}
    assert (config.rank, config.lora_alpha, config.mixer) == (8, 1.0, "none")


def test_folders_of_one_subject_cost_a_line():
    two_folders = "- folder_path: more\n        - folder_path: photos"
    path = write_config("ai-toolkit", ("- folder_path: photos", two_folders))
    with pytest.raises(UserError, match="several folders with one prompt: join their photos"):
        parse_training(["--config", str(path)])


def test_dataset_of_musubi_tuner_names_the_folder_of_its_jsonl():
    Path("photos").mkdir()
    Path("dataset.toml").write_text(
        "[general]\nresolution = [960, 544]\nbatch_size = 2\n"
        '[[datasets]]\nimage_jsonl_file = "photos/metadata.jsonl"\nnum_repeats = 3\n'
    )
    settings, translation = load_config(Path("dataset.toml"))
    assert not translation.unsupported and not translation.unknown
    config = TrainConfig.from_dict(settings)
    assert (config.instance_data_dir, config.repeats) == ("photos", 3)
    assert (config.resolution, config.train_batch_size) == (720, 2)


def test_datasets_without_folders_are_recognized():
    """As pages of sd-scripts and musubi-tuner show parts of a file."""
    Path("dataset.toml").write_text("[[datasets]]\nresolution = 768\nbatch_size = 2\n")
    _, translation = load_config(Path("dataset.toml"))
    assert translation.trainer == "kohya's sd-scripts" and not translation.unknown


def test_folder_of_masks_is_refused_with_the_place_for_masks():
    masks = 'image_dir = "photos"\nconditioning_data_dir = "masks"'
    path = write_config("kohya", ('image_dir = "photos"', masks))
    with pytest.raises(UserError, match=r"conditioning_data_dir masks: .*`dog\.mask\.png`"):
        parse_training(["--config", str(path)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "# two\na dog --w 512 --n blurry\na cat\n"),
        ("prompts.json", '[{"prompt": "a dog", "width": 512}, "a cat --w 512"]'),
        (
            "prompts.toml",
            '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a dog"\n'
            '[[prompt.subset]]\nprompt = "a cat"\n',
        ),
    ],
)
def test_sample_prompts_of_kohya_are_read_in_each_form(name, content):
    Path(name).write_text(content)
    path = write_config("kohya", ("sdpa = true", f'sample_prompts = "{name}"'))
    assert load_config(path)[0]["validation_prompt"] == ("a dog", "a cat")


def test_prompt_library_of_simpletuner_is_read():
    Path("library.json").write_text('{"dog": "a dog", "cat": {"prompt": "a cat"}}')
    path = write_config(
        "SimpleTuner", ('"--seed"', '"user_prompt_library": "library.json", "--seed"')
    )
    prompts = load_config(path)[0]["validation_prompt"]
    assert list(prompts) == ["a photo of sks dog", "a dog", "a cat"]


@pytest.mark.parametrize(
    ("line", "is_named"),
    [("", True), ('"sigma_scaled"', True), ('"raw"', False)],
)
def test_prediction_of_flux_in_sd_scripts_is_named(line, is_named):
    """Its default compares clean latents with the velocity."""
    flag = f"\nmodel_prediction_type = {line}" if line else ""
    path = write_config("kohya", ('networks.lora"', f'networks.lora_flux"{flag}'))
    _, translation = load_config(path)
    assert not translation.unsupported
    assert any("as with `raw`" in reason for reason in translation.ignored) == is_named


def test_subsets_of_sd_scripts_need_no_dataset_above_them():
    Path("dataset.toml").write_text('[[datasets.subsets]]\nimage_dir = "photos"\nnum_repeats = 8\n')
    settings, translation = load_config(Path("dataset.toml"))
    assert not translation.unknown and settings["repeats"] == 8


def test_dataset_of_the_hub_costs_a_line_with_the_download():
    backends = [{"id": "x", "type": "huggingface", "dataset_name": "user/dogs"}]
    Path("multidatabackend.json").write_text(json.dumps(backends))
    Path("config.json").write_text(
        json.dumps({"model_family": "flux", "data_backend_config": "multidatabackend.json"})
    )
    with pytest.raises(UserError, match=r"dataset_name user/dogs: .*hf download NAME"):
        parse_training(["--config", "config.json"])


def test_parts_without_effect_are_counted():
    content = json.loads(CONFIGS["OneTrainer"].content)
    content |= {"decoder": {"train": True, "weight_dtype": "x"}, "lokr_dim": 16}
    Path("saved.json").write_text(json.dumps(content))
    _, translation = load_config(Path("saved.json"))
    assert translation.ignored["they are not of this adapter"] == [
        "4 keys of unet, decoder, lokr_dim"
    ]
