"""Which plan `--memory` takes on which card, and what is tried when memory runs out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import family_memory
from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.command_train import train_main
from dreambooth_moslora.disk.run_folder import CHECKPOINT_FILES
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan import memory_plans, speed
from dreambooth_moslora.plan.base_size import BaseSize, find_base_size
from dreambooth_moslora.plan.defaults import (
    Choices,
    choose_family_settings,
    choose_recipe,
    load_recipe,
)
from dreambooth_moslora.plan.memory import estimate_memory
from dreambooth_moslora.plan.memory_plans import USABLE_RATIO, check_memory, choose_memory_settings
from dreambooth_moslora.plan.validation import check_base_settings, validate_run
from dreambooth_moslora.settings import memory_presets
from dreambooth_moslora.settings.config_files import load_settings
from dreambooth_moslora.settings.family_facts import FAMILIES, SDXL_HUB_ID
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.command_line import parse_train_config
from tests.helpers.tiny_families import tiny_pipeline

CONFIGS = Path(__file__).parents[2] / "assets" / "configs"
SDXL = TrainConfig(
    pretrained_model_name_or_path=SDXL_HUB_ID,
    train_batch_size=1,
    resolution=1024,
    rank=16,
    memory="auto",
)


@pytest.fixture
def card(gpu, monkeypatch):
    """A GPU with so much free beside CUDA's context, in a machine with 32 GiB; bitsandbytes is
    there."""
    monkeypatch.setattr(memory_plans, "find_spec", lambda name: True)
    monkeypatch.setattr(memory_plans, "measure_host_gib", lambda: 32.0)
    return lambda free_gib, capability=8: gpu(capability, free_gib)


def planned(config: TrainConfig) -> TrainConfig:
    return replace(config, **choose_memory_settings(config, Base.of(config)))


def check(config: TrainConfig) -> None:
    validate_run(config, Base.of(config))


def chosen(config: TrainConfig) -> tuple:
    return config.mixed_precision, config.gradient_checkpointing, config.base_quantization


def short(config: TrainConfig) -> str:
    """The plan in one word, with the images that pass at once."""
    parts = []
    if config.base_quantization != "none":
        parts = [config.base_quantization]
    elif config.gradient_checkpointing:
        parts = ["recompute"]
    parts += ["ff"] * config.recompute_feed_forward
    return f"{' '.join(parts) or 'full'}, {config.images_per_pass}"


CARDS = {"4 GB": (3.3, "int8, 1"), "6 GB": (5.05, "int8, 2"), "8 GB": (6.9, "recompute, 2")}
CARDS |= {
    "3060 on Windows": (10.2, "ff, 1"),
    "3060": (11.5, "ff, 1"),
    "T4": (14.6, "full, 1"),
}
CARDS |= {
    "4090 with a desktop": (20.8, "full, 2"),
    "4090": (23.2, "full, 2"),
    "H100": (78.6, "full, 8"),
}


@pytest.mark.parametrize(("free_gib", "plan"), CARDS.values(), ids=CARDS)
def test_each_card_trains_the_recipe_by_the_fastest_fitting_plan(card, free_gib, plan):
    """Eight images a step, of photos and prior. Rank, crops and steps are the same on all."""
    recipe = load_settings(CONFIGS / "sdxl.toml") | {
        "instance_data_dir": ".",
        "instance_prompt": "a photo of sks dog",
    }
    prior = {"with_prior_preservation": True, "class_prompt": "a photo of a dog"}
    card(free_gib, 7 if free_gib == 14.6 else 8)
    run = planned(TrainConfig.from_dict(recipe | prior))
    assert short(run) == plan
    assert run.mixed_precision == ("fp16" if free_gib == 14.6 else "bf16")
    cost = estimate_memory(run, BaseSize(), 400)
    assert cost.peak_gib <= USABLE_RATIO * (free_gib + 0.5) and cost.encoding_gib <= 3.4
    assert (run.rank, run.crops_per_photo, run.max_train_steps, run.train_batch_size) == (
        16,
        4,
        400,
        1,
    )
    assert planned(run) == run


def test_one_word_trains_sdxl_on_apples_gpu_with_recomputation(apple, tmp_path, monkeypatch):
    """Its attention keeps all scores: 23.8 GiB of an image without."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    Image.new("RGB", (256, 256)).save("dog/0.png")
    assert devices.get_best_device().type == "mps"
    assert (
        devices.measure_free_gib(torch.device("mps"))
        == devices.measure_free_gpu_gib()
        == pytest.approx(21.3)
    )
    run = planned(parse_train_config(["dog", "dog"]))
    assert run.pretrained_model_name_or_path == SDXL_HUB_ID and run.mixed_precision == "bf16"
    assert (
        run.gradient_checkpointing
        and estimate_memory(run, BaseSize(), 1).training_gib <= USABLE_RATIO * 21.3
    )
    image = replace(run, images_at_once=None, with_prior_preservation=False)
    assert estimate_memory(image, BaseSize(), 1).training_gib == pytest.approx(7.8, rel=0.05)
    whole = replace(image, gradient_checkpointing=False)
    assert estimate_memory(whole, BaseSize(), 1).training_gib == pytest.approx(23.8, rel=0.05)
    assert not speed.choose_local_speed(run, 10_000).has_cudnn_search


def test_memory_flag_replaces_a_files_plan_and_fits_the_pass(card, tmp_path):
    """A file for a small card would keep recomputing on a large one."""
    card(11.0)
    file = tmp_path / "small.toml"
    file.write_text('base_quantization = "nf4"\ngradient_checkpointing = true\n')
    file = ["--config", str(file), "--instance_data_dir", ".", "--instance_prompt", "a sks dog"]
    file += ["--pretrained_model_name_or_path", SDXL_HUB_ID, "--resolution", "1024"]
    by_file, by_flag = parse_train_config(file), parse_train_config([*file, "--memory", "auto"])
    assert (by_file.base_quantization, by_file.gradient_checkpointing) == ("nf4", True)
    assert (by_flag.base_quantization, by_flag.gradient_checkpointing) == ("none", False)
    full = planned(replace(SDXL, memory="full", gradient_accumulation_steps=4))
    assert short(full) == "full, 1"
    with_tokens = planned(
        replace(full, train_text_encoder=True, with_prior_preservation=True, class_prompt="a dog")
    )
    assert with_tokens.images_per_pass == 2  # their texts have one gradient


def test_user_settings_stay_and_without_a_gpu_none_are_chosen(card, monkeypatch):
    card(23.0)
    user_config = replace(
        SDXL, mixed_precision="fp16", gradient_checkpointing=True, base_quantization="int8"
    )
    assert chosen(planned(user_config)) == ("fp16", True, "int8")
    assert chosen(planned(replace(user_config, memory="nf4"))) == ("fp16", True, "int8")
    assert chosen(planned(replace(SDXL, mixed_precision="no")))[0] == "no"
    plain = replace(SDXL, memory=None)
    assert planned(plain) == plain
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert chosen(planned(SDXL)) == (None, False, "none")
    assert chosen(planned(replace(SDXL, memory="recompute"))) == (None, True, "none")


def begin(folder: Path, **changes) -> TrainConfig:
    """A run that has left settings and a checkpoint there."""
    begun = planned(replace(SDXL, output_dir=str(folder), **changes))
    (folder / "train_config.json").write_text(json.dumps(begun.to_dict()))
    (folder / "last").mkdir()
    for name in CHECKPOINT_FILES:
        (folder / "last" / name).write_text('{"step": 1, "seed": 3}')
    return begun


def test_a_run_that_goes_on_keeps_its_plan_on_another_card(card, tmp_path):
    card(9.5)
    begun = begin(tmp_path)
    card(80.0)
    resumed = planned(replace(SDXL, output_dir=str(tmp_path), resume_from_checkpoint="latest"))
    assert short(resumed) == short(begun) == "ff, 1" and resumed.mixed_precision == "bf16"
    for settings, plan in (
        ({"memory": "recompute"}, "recompute, 1"),
        ({"gradient_checkpointing": True}, "recompute ff, 1"),
    ):
        resumed = planned(
            replace(SDXL, output_dir=str(tmp_path), resume_from_checkpoint="latest", **settings)
        )
        assert short(resumed) == plan, "a run that had too little memory could not go on with less"


def test_saved_plan_that_does_not_fit_is_refused_with_advice(card, tmp_path):
    card(80.0)
    assert short(begin(tmp_path, gradient_accumulation_steps=8)) == "full, 8"
    card(7.0)
    again = replace(
        SDXL,
        output_dir=str(tmp_path),
        gradient_accumulation_steps=8,
        resume_from_checkpoint="latest",
    )
    with pytest.raises(
        UserError, match=r"7\.5 GiB are free, .+ give --memory recompute \(then 6\.\d GiB\)"
    ):
        check(planned(again))
    word = planned(replace(again, memory="recompute"))
    check(word)
    shutil.rmtree(tmp_path / "last")
    check(planned(again))
    assert short(planned(again)) == short(word)


def test_transformer_on_a_card_without_bf16_is_trained_in_fp32(card):
    """Each of the two was refused with the other as the way out, and `--memory auto` took fp16."""
    card(14.6, capability=7)
    base = next(facts for facts in FAMILIES if facts.title == "Z-Image").models[0].hub_id
    run = replace(SDXL, pretrained_model_name_or_path=base)
    name, recipe = load_recipe(Base.find(base))
    assert (name, recipe["mixed_precision"]) == ("z_image.toml", "no")
    choose_recipe(choices := Choices({"pretrained_model_name_or_path": base}), 14.6)
    assert "precision: fp32, as this GPU has no bf16" in choices.lines[-1]
    assert chosen(planned(run)) == ("no", True, "int8")
    for precision, says in (
        ("bf16", "give --mixed_precision no"),
        ("fp16", "Z-Image overflows in fp16; give no"),
    ):
        with pytest.raises(UserError, match=says):
            check_base_settings(replace(run, mixed_precision=precision), Base.of(run))


SUBJECT = {"instance_data_dir": ".", "instance_prompt": "a photo of sks dog"}
SETTINGS = SUBJECT | {
    "pretrained_model_name_or_path": SDXL_HUB_ID,
    "resolution": 1024,
    "train_batch_size": 1,
}


@pytest.mark.parametrize(
    "free_gib, says",
    [
        (
            15.0,
            r"needs about 2\d\.\d GiB .* 15\.5 GiB are free, of which it can use 14\.0: give",
        ),
        (7.4, r"give --memory auto \(then 6\.\d GiB\)\."),
        (2.9, r"give --memory auto \(then 3\.0 GiB\)\."),
        (1.9, r"give --memory auto \(then 2\.1 GiB\)\."),
        (1.0, r"give a smaller --resolution than 1024"),
    ],
)
def test_run_too_large_for_the_card_gets_a_fitting_suggestion(card, free_gib, says):
    card(free_gib)
    with pytest.raises(UserError, match=says):
        check(TrainConfig.from_dict(SETTINGS))


def test_advised_settings_fit_and_so_does_a_small_base(card):
    def check_with(**changes) -> None:
        check(TrainConfig.from_dict(SETTINGS | changes))

    card(14.6, capability=7)
    two = SETTINGS | {"train_batch_size": 2}
    with pytest.raises(UserError, match=r"give --memory auto \(then 10\.6 GiB\)\."):
        check(TrainConfig.from_dict(two))
    auto = TrainConfig.from_dict(two | {"memory": "auto"})
    check(planned(auto))
    card(24.0)
    check_with(mixed_precision="bf16")
    card(0.1)
    check_with(pretrained_model_name_or_path="toy", resolution=128)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("recompute", ""),
        ("int8", ""),
        ("int8_stream", " (weights in int8, 100% of the blocks streamed)"),
    ],
)
def test_a_dry_run_names_its_plan_and_with_verbose_what_each_needs(name, weights, capsys):
    config = ["--config", "assets/configs/quickstart.toml"]
    assert train_main([*config, "--dry_run", "--memory", name]) == 0
    short = capsys.readouterr().out
    assert f"memory plan: {name}{weights}; there is no GPU here (--memory {name})" in short
    assert "memory plans: " not in short and "gradient_checkpointing" not in short
    assert "--verbose also lists" in short

    assert train_main([*config, "--dry_run", "--memory", name, "--verbose"]) == 0
    report = capsys.readouterr().out
    assert "gradient_checkpointing = true" in report and "memory plans: full 0." in report
    assert "speed: " in report and "--verbose also lists" not in report


def test_refusal_names_the_family_and_auto_takes_a_fitting_plan(card, monkeypatch):
    facts = next(facts for facts in FAMILIES if facts.title == "Z-Image")
    size = replace(
        BaseSize(),
        unet=6_154_908_736,
        projections=6_142_033_920,
        streamed=5_426_380_800,
        largest_block=180_879_360,
        family=facts,
        is_measured=True,
    )
    run = replace(
        SDXL, target_modules=facts.targets, mixed_precision="bf16", num_validation_images=0
    )
    card(8.0)
    plans = {48.0: "full", 18.0: "recompute", 12.0: "stream", 6.2: "stream"}
    plans |= {5.0: "int8_stream", 4.2: "nf4_stream"}
    assert {free: memory_plans.choose_plan(run, size, free) for free in plans} == plans

    # What half of the host's memory cannot hold is streamed in 8 bit, or else in 4.
    for host_gib, plan in ((16.0, "int8_stream"), (6.0, "nf4_stream")):
        monkeypatch.setattr(memory_plans, "measure_host_gib", lambda host_gib=host_gib: host_gib)
        assert memory_plans.choose_plan(run, size, 6.2) == plan
    with pytest.raises(UserError, match=r"this run of Z-Image needs about .* give --memory auto"):
        check_memory(run, size)


def test_class_images_fit_a_card_that_trains_streamed_blocks(card):
    """The whole base had to be there for them: 32 GiB of FLUX.1."""
    card(7.5)
    prior = {"with_prior_preservation": True, "class_prompt": "a photo of a dog"}
    flux = {"pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev", "memory": "auto"}
    run = planned(TrainConfig.from_dict(SETTINGS | flux | prior))
    assert run.stream_blocks and run.uses_class_images
    check_memory(run, find_base_size(Base.of(run), ()))


@pytest.mark.parametrize(("local_processes", "streams"), [("1", True), ("2", False)])
def test_each_process_keeps_its_blocks_on_the_host(local_processes, streams, monkeypatch):
    """FLUX.1's blocks weigh 22 GiB; half of 64 GiB holds those of one process."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64 * 2**30))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_processes)
    flux = find_base_size(Base.find("black-forest-labs/FLUX.1-dev"), ())
    run = TrainConfig.from_dict(SETTINGS | {"mixed_precision": "bf16"})
    assert ("stream" in memory_plans.estimate_plans(run, flux)) == streams


CHECKPOINTED = {"gradient_checkpointing": True}
BY_HALVES = {"train_batch_size": 3, "gradient_accumulation_steps": 2, "images_at_once": 6}
NF4 = ("nf4", "nf4_stream")
LEANER = [
    ("sdxl", BY_HALVES, ["at_once 3", "at_once 2", "at_once 1", "ff", "recompute", *NF4]),
    ("flux", {"train_batch_size": 2}, ["at_once 1", "recompute", *NF4]),
    ("sdxl", {"train_text_encoder": True, "train_batch_size": 2}, ["ff", "recompute", *NF4]),
    ("sdxl", {"use_dora": True}, ["ff", "recompute"]),
    ("sdxl", {"base_quantization": "int8"}, ["ff", "recompute", "int8_stream"]),
    ("sdxl", {"base_quantization": "nf4"}, ["ff", "recompute", "nf4_stream"]),
    ("z_image", CHECKPOINTED, [*NF4]),
    ("z_image", CHECKPOINTED | {"stream_blocks": True}, []),
    (
        "z_image",
        CHECKPOINTED | {"stream_blocks": True, "streamed_share": 0.3},
        ["_share 0.6", "_share 1"],
    ),
]


@pytest.mark.parametrize(("family", "changes", "ends"), LEANER)
def test_a_run_out_of_memory_has_these_ways_left(family, changes, ends):
    """One after the other, each for a loaded base, and as settings that are allowed."""
    facts, config = family_memory.find_facts(family), TrainConfig.from_dict(SETTINGS | changes)
    flags = []
    while leaner := memory_plans.find_leaner_settings(config, facts):
        config = replace(config, **leaner[1])
        flags.append(leaner[0])
    assert len(flags) == len(ends)
    assert all(flag.endswith(end) for flag, end in zip(flags, ends))


def test_a_plan_is_judged_by_its_settings_and_not_by_its_name(card, monkeypatch):
    """DoRA's magnitudes are those of the dense weights, whatever quantises them."""
    card(8.0)
    sdxl, plain = family_memory.find_facts("sdxl"), TrainConfig.from_dict(SETTINGS)
    needs = memory_plans.estimate_plans(plain, BaseSize())
    _, settings = memory_plans.find_leaner_settings(plain, sdxl)
    renamed = {name.upper(): plan for name, plan in memory_presets.MEMORY_PLANS.items()}
    renamed["EIGHTHS"] = CHECKPOINTED | {"base_quantization": "int8"}
    monkeypatch.setattr(memory_presets, "MEMORY_PLANS", renamed)

    costs = memory_plans.estimate_plans(plain, BaseSize())
    assert costs.pop("EIGHTHS") and list(costs.values()) == list(needs.values())
    assert memory_plans.find_leaner_settings(plain, sdxl) == ("--memory RECOMPUTE_FF", settings)
    with_dora = replace(plain, gradient_checkpointing=True, use_dora=True)
    assert memory_plans.find_leaner_settings(with_dora, sdxl) is None


def test_a_run_out_of_memory_passes_by_a_plan_in_8_bit(card, monkeypatch):
    """Layers in 8 bit cannot become those in 4 bit, in which the next plans train."""
    card(8.0)
    in_8_bit = CHECKPOINTED | {"base_quantization": "int8"}
    plans = {"recompute": CHECKPOINTED, "int8": in_8_bit, "nf4": memory_presets.MEMORY_PLANS["nf4"]}
    monkeypatch.setattr(memory_presets, "MEMORY_PLANS", plans)
    run = TrainConfig.from_dict(SETTINGS | CHECKPOINTED)
    flag, _ = memory_plans.find_leaner_settings(run, family_memory.find_facts("sdxl"))
    assert flag == "--memory nf4"


def test_run_out_of_memory_continues_in_8_bit_without_4_bit(apple):
    sdxl, run = family_memory.find_facts("sdxl"), TrainConfig.from_dict(SETTINGS | CHECKPOINTED)
    flag, settings = memory_plans.find_leaner_settings(run, sdxl)
    assert flag == "--memory int8"
    assert memory_plans.find_leaner_settings(replace(run, **settings), sdxl) is None


def test_a_transformer_on_apples_gpu_gets_no_plan_of_unets(apple):
    flux = find_base_size(Base.find("black-forest-labs/FLUX.1-dev"), ())
    assert [*memory_plans.estimate_plans(TrainConfig.from_dict(SETTINGS), flux)] == [
        "recompute",
        "int8",
    ]


@pytest.mark.parametrize("facts", FAMILIES, ids=lambda facts: facts.name)
@pytest.mark.parametrize("free_gib", [7.5, 11.4, 15.3, 23.2])
def test_every_card_trains_the_one_recipe_of_a_family(card, facts, free_gib, tmp_path):
    """Rank and resolution are the same on all, and what fits at all is taken by one bound."""
    recipe = load_settings(CONFIGS / f"{facts.name}.toml")
    card(free_gib)
    run = TrainConfig.from_dict(recipe | SUBJECT | {"output_dir": str(tmp_path)})
    assert (run.memory, run.rank, run.resolution) == ("auto", 16, facts.resolution_px)
    run = replace(run, **choose_family_settings(run, Base.of(run)))
    size = find_base_size(Base.of(run), facts.targets)
    config = planned(run)
    assert size.family is facts and estimate_memory(config, size, 1).peak_gib <= USABLE_RATIO * (
        free_gib + 0.5
    )


COARSENESS = {"none": 0, "int8": 1, "nf4": 2}
LARGE_MODELS = [
    model.hub_id for facts in FAMILIES for model in facts.models if model.parameters > 2e9
]


@pytest.mark.parametrize("base", LARGE_MODELS)
def test_no_larger_card_has_coarser_weights(card, base, tmp_path):
    """No more of the blocks are streamed than must be: with 5 % fewer it would not fit."""
    kinds = []
    for vram_gib in (6, 8, 10, 12, 16, 24, 32, 48, 80):
        card(vram_gib - 1.0)
        run = TrainConfig.from_dict(
            SETTINGS | {"pretrained_model_name_or_path": base, "memory": "auto"}
        )
        config = planned(run)
        kinds.append(COARSENESS[config.base_quantization])
        size, usable_gib = find_base_size(Base.of(run), ()), USABLE_RATIO * (vram_gib - 0.5)
        if 0.05 < config.streamed_share < 1:
            assert estimate_memory(config, size, 1).peak_gib <= usable_gib
            less = replace(config, streamed_share=config.streamed_share - 0.05)
            assert estimate_memory(less, size, 1).peak_gib > usable_gib
    assert kinds == sorted(kinds, reverse=True) and kinds[-1] == 0


def test_auto_passes_by_a_plan_whose_copies_take_longer_than_the_computation(card, monkeypatch):
    """A small image computes little while its blocks are copied."""
    card(7.5)
    monkeypatch.setattr(memory_plans, "measure_host_gib", lambda: 64.0)
    flux = {"pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev", "memory": "auto"}
    whole = planned(TrainConfig.from_dict(SETTINGS | flux))
    assert (whole.base_quantization, whole.stream_blocks) == ("none", True)
    small = planned(TrainConfig.from_dict(SETTINGS | flux | {"resolution": 256}))
    assert (small.base_quantization, small.stream_blocks) == ("nf4", False)


def test_auto_keeps_the_share_of_the_user(card):
    card(7.5)
    flux = {"pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev", "memory": "auto"}
    run = TrainConfig.from_dict(SETTINGS | flux | {"streamed_share": 0.97})
    assert planned(run).streamed_share == 0.97


def test_one_word_takes_the_recipe_of_the_bases_family(tmp_path):
    tiny_pipeline("z_image", tmp_path / "files").save_pretrained(tmp_path / "base")
    assert load_recipe(Base.find(tmp_path / "base"))[0] == "z_image.toml"


@pytest.mark.parametrize(("optimizer", "rate"), [("AdamW", None), ("prodigy", 1.0), (None, 1.0)])
def test_the_rate_of_a_recipes_optimizer_is_not_given_to_another(optimizer, rate):
    """Z-Image's is Prodigy's: 1.0 would be ten thousand times AdamW's."""
    user_settings = {"pretrained_model_name_or_path": "Tongyi-MAI/Z-Image"}
    choices = Choices(user_settings | ({"optimizer": optimizer} if optimizer else {}))
    choose_recipe(choices, 23.0)
    assert choices.all_settings.get("learning_rate") == rate
