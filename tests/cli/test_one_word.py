"""`train photos/dog dog`: what is chosen for a folder and a word, what is said of it, and that
flags win."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreambooth_moslora import UserError, train_subject
from dreambooth_moslora.base import devices as precision
from dreambooth_moslora.base.devices import TORCH_COMMAND
from dreambooth_moslora.cli import one_word
from dreambooth_moslora.cli.command_train import train_main
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.cli.terminal import EXIT_INTERRUPTED
from dreambooth_moslora.cli.train_flags import build_train_parser
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.disk.processes import STOP_FILE_VARIABLE
from dreambooth_moslora.disk.run_folder import CHECKPOINT_FILES, RunDir
from dreambooth_moslora.evaluation.during_training import build_small_plan
from dreambooth_moslora.generation.sampling import DEFAULT_INFERENCE_STEPS
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.plan import agreement
from dreambooth_moslora.plan.steps import plan_steps
from dreambooth_moslora.settings.config_files import load_settings
from dreambooth_moslora.settings.family_facts import SDXL_HUB_ID
from dreambooth_moslora.settings.metric_kinds import CLIP_REPO, DINO_REPO
from dreambooth_moslora.settings.prompts import list_context_prompts, parse_subject
from tests.helpers.command_line import parse_train_config
from tests.helpers.tiny_training import paint_photos

CONFIGS = Path(__file__).parents[2] / "assets" / "configs"
TOYS = ["assets/subjects/bear", "bear"]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> list[str]:
    """A folder of ordinary photos, and a word; the current folder is where `runs` goes."""
    monkeypatch.chdir(tmp_path)
    for path in paint_photos(tmp_path / "dog", 5).iterdir():
        Image.open(path).resize((256, 256)).save(path)
    return ["dog", "dog"]


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch):
    """On whatever processor the tests run."""
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: True)


def test_a_toy_is_trained_as_the_recipe_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = parse_train_config(TOYS)
    toy = load_settings(CONFIGS / "toy.toml")
    own_settings = {
        "instance_data_dir",
        "output_dir",
        "instance_prompt",
        "class_prompt",
        "max_train_steps",
    }
    own_settings |= {"validation_steps"}  # pictures come with the scores
    assert {name: config.to_dict()[name] for name in toy.keys() - own_settings} == {
        n: toy[n] for n in toy.keys() - own_settings
    }
    assert plan_steps(config, 5).total_steps == toy["max_train_steps"]
    assert (config.instance_prompt, config.class_prompt) == (
        "a photo of a sks bear",
        "a photo of a bear",
    )
    assert config.output_dir == "runs/bear"
    assert config.evaluate_steps == config.validation_steps == 120
    message = capsys.readouterr().err
    flags = set(re.findall(r"--(\w+)", message))
    assert len(flags) > 8 and flags <= {
        f.lstrip("-") for f in build_train_parser()._option_string_actions
    }
    assert (
        "photos: 5, 5 with a mask" in message
        and "steps: 480, which show each photo 384 times" in message
    )


def test_missing_masks_are_made_if_nothing_is_fetched(photos, capsys):
    toy = ["--pretrained_model_name_or_path", "toy"]
    assert parse_train_config([*photos, *toy]).masks == "auto"
    assert "masks: made for the 5 without one (--masks)" in capsys.readouterr().err
    assert parse_train_config([*photos, *toy, "--masks", "given"]).masks == "given"
    assert "masks: " not in capsys.readouterr().err
    assert (
        parse_train_config([*photos, "--pretrained_model_name_or_path", SDXL_HUB_ID]).masks
        == "given"
    )
    assert "masks: off, as they need a download (--masks auto)" in capsys.readouterr().err
    for base in (toy, ["--pretrained_model_name_or_path", SDXL_HUB_ID]):
        assert parse_train_config([*photos, *base, "--subject", "style"]).masks == "given"
        assert "masks: " not in capsys.readouterr().err, "a style is in the whole picture"
    assert main(["train", *photos, *toy, "--subject", "style", "--dry_run"]) == 0
    assert "\n  token “dog”\n" in capsys.readouterr().out


def test_photos_are_cropped_in_their_own_shapes(photos, tmp_path, capsys):
    (oblong := tmp_path / "wide").mkdir()
    Image.new("RGB", (160, 128)).save(oblong / "0.png")
    for arguments in (photos, [str(oblong), "dog", "--no_enable_bucket"]):
        assert (
            not parse_train_config(arguments).enable_bucket
            and "crops: " not in capsys.readouterr().err
        )
    assert parse_train_config([str(oblong), "dog"]).enable_bucket
    assert "crops: in the photos' own shapes (--no_enable_bucket)" in capsys.readouterr().err


@pytest.mark.parametrize("are_before", [False, True])
def test_flags_win_and_are_not_reported_as_chosen(photos, capsys, are_before):
    flags = [
        "--pretrained_model_name_or_path",
        "toy",
        "--output_dir",
        "mine",
        "--max_train_steps=7",
        "--rank",
        "3",
    ]
    flags += ["--no_with_prior_preservation"]
    config = parse_train_config(flags + photos if are_before else photos + flags)
    assert (config.output_dir, config.max_train_steps, config.rank) == ("mine", 7, 3)
    assert (
        config.exposures_per_photo is None
        and not config.with_prior_preservation
        and not config.prior_prompts
    )
    message = capsys.readouterr().err
    assert (
        not re.search("^(output|base|steps|the class)", message, re.MULTILINE)
        and "recipe: " in message
    )


def test_the_class_is_the_whole_word_that_was_given(photos):
    cup = parse_subject(parse_train_config([photos[0], "cup with handle"]))
    assert (cup.token, cup.class_word) == ("sks", "cup with handle")
    mug = parse_subject(
        parse_train_config(
            [photos[0], "cup with handle", "--instance_prompt", "a photo of sks mug"]
        )
    )
    assert mug.trigger_words == "sks mug"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--evaluate_steps 500",
            "scores: every 500 steps, the best in best/ (--ev",
        ),
        (
            "--num_validation_images 0",
            "scores: every 120 steps, the best in best/ (--ev",
        ),
        (
            "--class_prompt cats",
            "the class: “cats” stays as the base draws it (--no_with_prior_preservation, --class",
        ),
    ],
)
def test_the_lines_say_what_flags_and_choices_give_together(flags, message, capsys):
    parse_train_config([*TOYS, *flags.split()])
    assert f"\n{message}" in capsys.readouterr().err


def test_a_dry_run_ends_in_what_check_says_of_all_photos(photos, capsys):
    """It stood in the middle, below the names of the photos."""
    for number in range(1, 5):
        Path(f"dog/{number}.png").unlink()
    assert main(["train", *photos, "--base", "toy", "--dry_run"]) == 0
    remarks = capsys.readouterr().out.partition("\nremarks\n")[2]
    assert (
        "  too few: take 3 or more; of a thing the command “enlarge” makes them from one" in remarks
    )


def test_dora_leaves_the_convolutions_of_the_recipe_out():
    """It was refused for layers that nobody had named."""
    layers = parse_train_config([*TOYS, "--use_dora"]).target_modules
    assert {*layers} == {*parse_train_config(TOYS).target_modules} - {"conv1", "conv2"}
    config = parse_train_config([*TOYS, "--use_dora", "--target_modules", "conv1"])
    assert config.target_modules == ("conv1",)


@pytest.mark.parametrize("steps", [40, 120, 240, 480, 2000])
def test_scores_and_samples_take_a_quarter_of_the_run(steps):
    """40 steps were scored four times, with five sets of samples, for eight minutes."""
    config = parse_train_config([*TOYS, "--max_train_steps", str(steps)])
    photos = find_photos(
        Path(find_asset(config.instance_data_dir)), config.instance_prompt, 128
    ).photos
    plan = build_small_plan(config, photos)
    requests = [*plan.class_requests, *plan.unrelated_requests, *plan.subject_requests]

    # With the prompt and without: the base's images once, the adapter's at each scoring.
    score = 2 * plan.inference_steps * len([*requests, *plan.bare_requests])
    base = 2 * plan.inference_steps * len(requests)
    scorings = steps // config.evaluate_steps if config.evaluate_steps else 0
    samples = config.sample_count * (1 + steps // config.validation_steps)
    samples += len(list_context_prompts(config))
    drawing_passes = (
        score * scorings + base * bool(scorings) + 2 * DEFAULT_INFERENCE_STEPS * samples
    )

    # Three for an image, and the base's prediction of each prior image
    training_passes = steps * (3 * config.images_per_micro_batch + config.train_batch_size)
    assert drawing_passes <= (drawing_passes + training_passes) / 4 + 1 and config.sample_count > 0
    assert bool(scorings) == (steps >= 240)


def test_given_steps_of_scores_are_obeyed_in_a_short_run():
    config = parse_train_config([*TOYS, "--max_train_steps", "40", "--evaluate_steps", "10"])
    assert config.evaluate_steps == config.validation_steps == 10


def test_scores_are_refused_by_steps_of_0(capsys):
    config = parse_train_config([*TOYS, "--evaluate_steps", "0"])
    assert not config.is_scored and "scores: " not in capsys.readouterr().err


def test_config_replaces_recipe_without_its_subject(
    photos,
):
    config = parse_train_config([*photos, "--config", str(CONFIGS / "quickstart.toml")])
    assert (config.max_train_steps, config.crops_per_photo, config.learning_rate) == (
        240,
        8,
        2.5e-3,
    )
    assert (config.instance_data_dir, config.output_dir) == ("dog", "runs/dog")
    assert config.class_prompt == "a photo of a dog" and config.token is None
    names = [
        "mask_prompt",
        "validation_prompt",
        "class_data_dir",
    ]
    names += [
        "class_word",
        "caption_prefix",
        "leave_out",
        "hub_model_id",
        "output_dir",
    ]
    Path("rocket.toml").write_text(
        "rank = 3\n" + "".join(f'{name} = "my rocket"\n' for name in names)
    )
    config = parse_train_config([*photos, "--config", "rocket.toml"])
    assert config.rank == 3 and "rocket" not in str(config)
    assert (
        parse_train_config([*photos, "--config", "rocket.toml", "--mask_prompt", "dog"]).mask_prompt
        == "dog"
    )


CARDS = [
    ("nvidia-smi", "echo 'GPU 0: NVIDIA GeForce RTX 3060'", {}, TORCH_COMMAND),
    (
        "nvidia-smi",
        "echo 'GPU 0: NVIDIA GeForce RTX 3060'",
        {"cuda": "12.8"},
        "sees no GPU: install a newer driver",
    ),
    ("rocminfo", "", {}, TORCH_COMMAND),
    ("rocminfo", "", {"hip": "6.4"}, "usermod -aG render,video"),
    ("nvidia-smi", "echo 'it could not communicate with the driver'; exit 9", {}, None),
]


@pytest.mark.skipif(
    os.name != "posix" or precision.has_gpu(), reason="scripts in the place of a driver's"
)
@pytest.mark.parametrize(("program", "body", "built_for", "says"), CARDS)
def test_gpu_unseen_by_pytorch_is_reported(
    photos, tmp_path, monkeypatch, capsys, program, body, built_for, says
):
    """The embedded base would be trained on a person's photos."""
    (script := tmp_path / program).write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, name, built_for.get(name))
    assert main(["train", *photos, "--dry_run"]) == (2 if says else 0)
    assert (says or "there is no GPU here") in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # by which a person asks for the CPU
    for arguments in (photos, [*photos, "--pretrained_model_name_or_path", "toy"]):
        assert parse_train_config(arguments).pretrained_model_name_or_path == "toy"


def test_a_person_without_opencv_is_refused_before_any_choice(photos, monkeypatch, capsys):
    """The line stood below eight choices."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main(["train", *photos, "--subject", "person", "--base", "toy"]) == 2
    expected = "error: faces are found by OpenCV: pip install opencv-python-headless\n"
    assert capsys.readouterr().err == expected


def test_embedded_base_is_chosen_without_a_gpu(photos, monkeypatch, capsys):
    another = parse_train_config([*photos, "--pretrained_model_name_or_path", "someone/another-xl"])
    # stock SDXL alone has files in fp16
    assert another.variant is None and another.mixed_precision == "bf16"
    monkeypatch.setattr(agreement, "get_min_free_gib", lambda: None)
    assert parse_train_config(photos).pretrained_model_name_or_path == "toy"
    assert "as there is no GPU here, and it knows toys alone (--base)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "is_said"),
    [
        ("dog dog", True),
        ("dog dog --pretrained_model_name_or_path toy", False),
        (f"dog dog --config {CONFIGS / 'toy.toml'}", False),
        (" ".join(TOYS), False),
    ],
)
def test_last_lines_warn_of_real_photos_on_the_toy(photos, monkeypatch, capsys, arguments, is_said):
    """It was line 2 of eleven, and nobody saw it; then it gave a command without the flags that
    were given, such as --subject. The run is asked to stop before its first step."""
    monkeypatch.setattr(agreement, "get_min_free_gib", lambda: None)
    last = (
        "\nNo GPU found. Using a practice model that cannot learn real photos.\n"
        "Choose another with --base. With a GPU this trains SDXL.\n\n"
    )
    assert main(["train", *arguments.split(), "--dry_run"]) == 0
    assert capsys.readouterr().out.endswith(last) == is_said
    Path("job.stop").touch()
    monkeypatch.setenv(STOP_FILE_VARIABLE, "job.stop")
    assert main(["train", *arguments.split(), "--max_train_steps", "9"]) == EXIT_INTERRUPTED
    message = capsys.readouterr().err
    assert (last in message) == is_said
    assert not is_said or message.index("note: each photo is seen") < message.index(
        last
    ) < message.index("stopped before")


def test_recipe_is_fixed_and_memory_plan_fits_the_gpu(photos, monkeypatch):
    """`tests/plan/test_memory_plans.py` says which plan each card gets."""
    configs = []
    for free in (3.8, 12.0, 79.1):
        monkeypatch.setattr(agreement, "get_min_free_gib", lambda free=free: free)
        configs.append(parse_train_config(photos))
    config, recipe = configs[0], load_settings(CONFIGS / "sdxl.toml")
    assert configs == [config] * 3 and config.memory == "auto"
    assert config.pretrained_model_name_or_path == SDXL_HUB_ID and config.rank == recipe["rank"]
    assert (
        config.with_prior_preservation
        and config.prior == "adapter_off"
        and config.evaluate_steps is None
    )
    assert plan_steps(config, 5).total_steps == recipe["max_train_steps"]
    assert parse_train_config([*photos, "--memory", "full"]).memory == "full"


def test_sdxl_is_scored_where_both_encoders_are_here(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    sdxl = [*photos, "--pretrained_model_name_or_path", SDXL_HUB_ID]
    for name, steps in ((CLIP_REPO, None), (DINO_REPO, 100)):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "snapshots" / "abc" / "model.safetensors").write_bytes(b"")
        assert parse_train_config(sdxl).evaluate_steps == steps
        assert ("scores: none" in capsys.readouterr().err) == (steps is None)


@pytest.mark.parametrize("flag", ["--debiased_estimation_loss", "--do_edm_style_training"])
def test_a_recipe_or_a_file_gives_way_to_another_weighting(flag, photos):
    """SDXL's recipe weighs by min-SNR, and who gave one flag was told to give one of two."""
    sdxl = [*photos, "--pretrained_model_name_or_path", SDXL_HUB_ID]
    for arguments in (sdxl, [*sdxl, "--config", str(CONFIGS / "sdxl.toml")]):
        config = parse_train_config([*arguments, flag])
        assert getattr(config, flag[2:]) and config.snr_gamma is None
        assert parse_train_config(arguments).snr_gamma == 5.0
        assert parse_train_config([*arguments, flag, "false"]).snr_gamma == 5.0
        with pytest.raises(UserError, match=f"--snr_gamma and {flag}: .*; give one of them"):
            parse_train_config([*arguments, flag, "--snr_gamma", "5"])


def test_a_cpu_without_bf16_trains_sdxl_in_fp32(photos, monkeypatch, capsys):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: False)
    arguments = [*photos, "--pretrained_model_name_or_path", SDXL_HUB_ID]
    config = parse_train_config(arguments)
    assert config.mixed_precision == "no"
    assert "precision: fp32, as this CPU has no bf16 (--mixed_precision)" in capsys.readouterr().err
    # the trainer draws none there
    assert (config.num_validation_images, config.validation_steps) == (0, None)
    assert parse_train_config([*arguments, "--mixed_precision", "bf16"]).mixed_precision == "bf16"


SAME = (
    *("rank", "instance_prompt", "class_prompt", "class_word", "instance_data_dir", "output_dir"),
    *("exposures_per_photo", "evaluate_steps", "masks", "learning_rate", "prior"),
)


def test_train_subject_equals_the_command_and_is_silent(photos, capsys):
    """It is stopped before its first step."""
    expected = parse_train_config([*photos, "--base", "toy", "--rank", "3"])
    events = []
    capsys.readouterr()
    result = train_subject(
        *photos, base="toy", rank=3, on_event=events.append, should_stop=lambda: True
    )
    assert result.interrupted and str(result.run_dir) == "runs/dog" and events
    assert capsys.readouterr() == ("", "")
    saved_config = read_json(RunDir(result.run_dir).config_path)
    assert {name: saved_config[name] for name in SAME} == {
        name: getattr(expected, name) for name in SAME
    }
    for positionals, settings, message in (
        (["nowhere", "dog"], {}, "no such folder"),
        (photos, {"rnak": 3}, "did you mean `rank`"),
        (photos, {"base": "my models/x"}, "does not exist"),
        (photos, {"lr": 1e-4}, "did you mean `learning_rate`"),
        (photos, {"rank": -1}, "^rank=-1: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            train_subject(*positionals, **settings)


def write_ended_run(name: str, state: str, at: float | None = None) -> None:
    """A run's folder that ended so; with a checkpoint of the time `at`, if there is one."""
    run = RunDir(Path("runs") / name)
    run.record_event({"type": "end", "state": state, "step": 4})
    if at is not None:
        checkpoint = run.get_checkpoint_path(4)
        checkpoint.mkdir()
        for file in CHECKPOINT_FILES:
            (checkpoint / file).write_text("x")
        os.utime(checkpoint, (at, at))


def test_latest_resumes_the_newest_run_of_that_name(photos, capsys):
    write_ended_run("dog", "interrupted", at=200)
    write_ended_run("dog_2", "interrupted", at=100)
    write_ended_run("dog_3", "done", at=50)
    write_ended_run("dog_4", "failed")
    resumed = [*photos, "--resume_from_checkpoint", "latest"]
    assert parse_train_config(resumed).output_dir == "runs/dog"
    assert "output: runs/dog, which is resumed (--output_dir)" in capsys.readouterr().err
    assert parse_train_config(photos).output_dir == "runs/dog_4"


def test_new_run_gets_a_free_name(photos, monkeypatch):
    assert parse_train_config(photos).output_dir == "runs/dog"
    for name in ("dog", "dog_2", "dogs"):
        (Path("runs") / name).mkdir(parents=True)
    assert parse_train_config(photos).output_dir == "runs/dog_3"
    resumed = [*photos, "--resume_from_checkpoint", "latest"]
    (Path("runs") / "dog" / "checkpoint-1").mkdir()
    for name in CHECKPOINT_FILES:
        (Path("runs") / "dog" / "checkpoint-1" / name).write_text("x")
    assert parse_train_config(resumed).output_dir == "runs/dog", (
        "the empty one may wait in the queue"
    )
    shutil.copytree("runs/dog/checkpoint-1", "runs/dog_2/checkpoint-1")
    os.utime("runs/dog/checkpoint-1", (1, 1))
    assert parse_train_config(resumed).output_dir == "runs/dog_2"
    resumed_config = parse_train_config(
        [*photos, "--resume_from_checkpoint", "runs/dog/checkpoint-1"]
    )
    assert resumed_config.output_dir == "runs/dog", "the other run would have been moved aside"
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process would find another free name
    assert one_word.choose_run_folder("dog") == Path("runs/dog")


MISTAKES = [
    (["nowhere", "dog"], "nowhere: no such folder"),
    (["dog/0.png", "dog"], "not a folder"),
]
MISTAKES += [(["dog"], "dog: say in one word what it shows"), (["dog", " "], "say in one word")]
MISTAKES += [
    (["dog", "stuffed", "animal"], 'as in `train dog "stuffed animal"`.'),
    (["empty", "dog"], "no usable photo"),
]
MISTAKES += [
    (["dog", "--flag=a dog"], "unknown flag --flag"),
    (["--rank", "4", "dog", "--flag=dog"], "unknown flag --flag"),
]
MISTAKES += [(["dog", "dog", "--instance_data_dir", "dog"], "give the folder of photos once")]
# before eight lines of choices that name a recipe
MISTAKES += [(["dog", "dog", "--base", "Tongyi-MAI/Z-Image-Turbo"], "distilled to a few steps")]
MISTAKES += [(["dog", "dog", "--rank", "much"], "--rank 'much'")]
MISTAKES += [(["--instance_prompt", "a", "sks", "dog"], "belongs to no flag")]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line(photos, capsys, arguments, message):
    Path("empty").mkdir()
    for run in (train_main, lambda argv: main(["train", *argv])):
        assert run(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@pytest.mark.parametrize(
    ("base", "gib", "expected"),
    [(SDXL_HUB_ID, 24, "memory = "), ("black-forest-labs/FLUX.1-dev", 8, "stream_blocks = true")],
)
def test_a_card_that_is_elsewhere_gets_its_plan(photos, capsys, base, gib, expected):
    flags = ["--base", base, "--vram", str(gib), "--dry_run", "--verbose"]
    assert main(["train", *photos, *flags]) == 0
    report = capsys.readouterr().out
    assert expected in report and 'mixed_precision = "bf16"' in report

    # Nothing of it stays for the next command, and nothing is trained.
    assert precision.assumed_vram_gib.get() is None
    assert main(["train", *photos, "--vram", str(gib)]) == 2
    assert "give --dry_run too" in capsys.readouterr().err


def test_a_misspelled_base_is_named_in_the_first_line(photos, capsys):
    assert main(["train", *photos, "--base", "Tongyi-MAI/Z-Imge", "--dry_run"]) == 0
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("did you mean Tongyi-MAI/Z-Image?")
