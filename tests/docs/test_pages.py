"""What the pages say is so: the tables for those who come from another trainer, and the commands
that are followed."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from dreambooth_moslora.base import devices
from dreambooth_moslora.cli.command_train import train_main
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.cli.train_flags import build_train_parser
from dreambooth_moslora.disk.queue import LOCK_NAME
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.extras.lab.study import load_study
from dreambooth_moslora.importers.flags import FLAG_ROWS
from dreambooth_moslora.settings.config_files import load_settings
from dreambooth_moslora.settings.family_facts import FAMILIES
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.tiny_training import paint_photos
from tests.test_readme import list_blocks, list_commands

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("from_diffusers", "from_kohya", "from_onetrainer", "from_ai_toolkit", "from_simpletuner")


OF_FAMILIES = """
pretrained_model_name_or_path revision variant dataset_name dataset_config_name instance_data_dir
cache_dir image_column caption_column repeats class_data_dir instance_prompt class_prompt
max_sequence_length validation_prompt text_encoder_out_layers system_prompt
complex_human_instruction skip_final_inference final_validation_prompt rank num_validation_images
validation_epochs validation_model_path validation_num_inference_steps validation_guidance_scale
lora_alpha lora_dropout with_prior_preservation prior_loss_weight num_class_images output_dir seed
resolution aspect_ratio_buckets use_aspect_ratio_buckets center_crop random_flip caption_dropout
train_text_encoder train_batch_size sample_batch_size num_train_epochs max_train_steps
checkpointing_steps checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps
gradient_checkpointing learning_rate guidance_scale text_encoder_lr scale_lr lr_scheduler
lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers weighting_scheme logit_mean logit_std
mode_scale precondition_outputs shift_timesteps optimizer use_8bit_adam adam_beta1 adam_beta2
prodigy_beta3 prodigy_decouple adam_weight_decay adam_weight_decay_text_encoder lora_layers
lora_blocks adam_epsilon prodigy_use_bias_correction prodigy_safeguard_warmup max_grad_norm
push_to_hub hub_token hub_model_id logging_dir allow_tf32 cache_latents report_to mixed_precision
upcast_before_saving offload prior_generation_precision local_rank enable_npu_flash_attention
enable_vae_tiling fsdp_text_encoder remote_text_encoder bnb_quantization_config_path do_fp8_training
image_interpolation_mode"""
"""Flags of diffusers' scripts for SD 3, FLUX.1, FLUX.2, Z-Image, Qwen-Image, Krea 2, Lumina 2 and
Sana."""


def test_each_flag_of_diffusers_scripts_is_known():
    flags = {*build_train_parser()._option_string_actions, *(f"--{name}" for name in FLAG_ROWS)}
    assert [flag for flag in OF_FAMILIES.split() if f"--{flag}" not in flags] == []


@pytest.mark.parametrize(
    "facts", [facts for facts in FAMILIES if not facts.needs_sizes], ids=lambda facts: facts.name
)
def test_each_family_has_its_ids_licence_and_recipe_on_the_page(facts):
    page = (DOCS / "families.md").read_text(encoding="utf-8").partition("## Each family")[2]
    section = re.search(rf"### {re.escape(facts.title)}\n(.+?)\n##", page, re.DOTALL)[1]
    assert set(re.findall(r"configs/(\w+)\.toml", section)) == {facts.name}
    assert [model.hub_id for model in facts.models if f"`{model.hub_id}`" not in section] == []
    assert " ".join(facts.licence.split()) in " ".join(section.split())
    recipe = DOCS.parent / "assets" / "configs" / f"{facts.name}.toml"
    base = load_settings(recipe)["pretrained_model_name_or_path"]
    assert base in {model.hub_id for model in facts.models}
    assert "not run by us on a card" in recipe.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("folder", "page"), [("benchmarks", "benchmarks/README.md"), ("tools", "docs/developing.md")]
)
def test_each_benchmark_and_tool_is_in_its_list(folder, page):
    text = (DOCS.parent / page).read_text(encoding="utf-8")
    files = (DOCS.parent / folder).glob("*.py")
    names = [
        file.stem
        for file in files
        if 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")
    ]
    assert len(names) > 5
    assert [
        name
        for name in names
        if not re.search(rf"^\| `(python -m {folder}\.)?{name}`", text, re.MULTILINE)
    ] == []


def test_commands_of_the_pages_are_found():
    assert len(TRAININGS) >= 4 and len(WALK) >= 8
    names = {line.split()[3] for line in WALK}
    assert names == {"check", "caption", "train", "generate", "explain"}


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
OTHERS = ("Tongyi-MAI/Z-Image", "black-forest-labs/FLUX.1-dev")
"""The other bases of the walk to ComfyUI."""
RUN_ELSEWHERE = (
    *("pip install ", "uv pip install ", "python -m venv ", "python app.py"),
    "python -m dreambooth_moslora doctor",
)
"""`tests/test_wheel.py` installs the program in a fresh environment, `tests/cli/test_doctor.py`
runs the doctor, `tests/ui` the page."""
LINES = list(
    dict.fromkeys(
        line for page in ("comfyui", *PAGES) for line in list_commands(DOCS / f"{page}.md")
    )
)
TRAININGS = [line for line in LINES if " train_dreambooth.py " in line or " train " in line]
PLANNED = [
    pytest.param(line, marks=pytest.mark.slow) if "--resume_from_checkpoint" in line else line
    for line in TRAININGS
]
"""To look for a checkpoint imports diffusers and PEFT."""
WALK = [
    line
    for line in list_commands(DOCS / "comfyui.md")
    if not line.startswith(RUN_ELSEWHERE) and not any(base in line for base in OTHERS)
]
SHORTER = {
    "train": [
        "--max_train_steps",
        "2",
        "--num_validation_images",
        "1",
        "--evaluate_steps",
        "0",
    ],
    "generate": ["--steps", "1", "--base", "toy"],
    "caption": ["--pretrained_model_name_or_path", "toy"],
}
"""Command -> what is added, so that it ends soon and needs no download."""

FEWER = {
    "max_train_steps=120": "max_train_steps=2, num_validation_images=0, evaluate_steps=0",
    "seed=7": "seed=7, steps=1",
}
"""What the program of the API page says, and what it says in the test."""


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch) -> Path:
    """`photos/dog` in an empty folder, where the command runs; on whatever processor the tests run,
    it has bf16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "has_fast_bf16", lambda: True)
    for path in paint_photos(tmp_path / "photos" / "dog", 5).iterdir():
        Image.open(path).resize((256, 256)).save(path)
    return tmp_path / "photos" / "dog"


def run(line: str, *more: str) -> int:
    """The exit code of a command as it is written, with `more` behind it."""
    match shlex.split(line):
        case ["python", "train_dreambooth.py", *words]:
            return train_main([*words, *more])
        case ["python", "-m", "dreambooth_moslora", *words]:
            return main([*words, *more])
    raise LookupError(line)


@pytest.mark.parametrize("line", PLANNED)
def test_each_training_of_the_pages_is_planned(line, capsys):
    assert run(line, "--dry_run", "--verbose") == 0
    output = capsys.readouterr()
    base = next((base for base in OTHERS if base in line), SDXL)
    assert "memory: encoding" in output.out and base in output.out, output.err


def test_the_exported_checkpoint_is_one_that_the_recipe_keeps():
    recipe = load_settings(DOCS.parent / "assets" / "configs" / "sdxl.toml")
    steps = range(recipe["max_train_steps"], 0, -recipe["checkpointing_steps"])[
        : recipe["checkpoints_total_limit"]
    ]
    exported = [line for line in list_commands(DOCS / "troubleshooting.md") if " export " in line]
    assert exported and all(
        re.search(r"runs/dog/checkpoint-(\d+) ", line)[1] in map(str, steps) for line in exported
    )


def test_the_files_of_a_run_that_the_page_names_are_a_runs():
    """It named `run.owner`, which no run writes."""
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    listed = re.search(r"^runs/dog/\n((?:  .+\n)+)", page, re.MULTILINE)[1]
    names = re.findall(r"^  ([^\s,]+(?:, [^\s,]+)*)", listed, re.MULTILINE)
    names = {name.rstrip("/") for line in names for name in line.split(", ")}
    run = RunDir("runs/dog")
    files = {
        path.name for path in [*vars(run).values(), run.kohya_path, run.get_checkpoint_path(500)]
    }
    files |= {TrainConfig.logging_dir, LOCK_NAME, "image_*.png", "earlier_run_1"}
    assert names <= files and len(names) > 15


def test_the_study_of_the_page_is_one(tmp_path):
    (text,) = [text for text in list_blocks(DOCS / "evaluating.md", "toml") if "[study]" in text]
    (tmp_path / "study.toml").write_text(text)
    (tmp_path / "photos" / "duck").mkdir()
    study = load_study(tmp_path / "study.toml")
    assert [subject.name for subject in study.subjects] == ["duck"]


def test_what_the_walk_says_is_printed_is_what_is_printed(capsys):
    (line,) = [line for line in WALK if "--dry_run" in line]
    assert run(line) == 0
    output = capsys.readouterr()
    page = (DOCS / "comfyui.md").read_text(encoding="utf-8")
    assert all(choice in page for choice in output.err.splitlines() if ": " in choice)
    cost = [
        row for row in output.out.splitlines() if row.startswith(("  memory: ", "  memory plan: "))
    ]
    assert len(cost) == 2 and all(row in page for row in cost)


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_the_whole_walk_on_the_embedded_base(capsys):
    for line in WALK:
        name = line.split()[3]
        assert run(line.replace(SDXL, "toy"), *SHORTER.get(name, [])) == 0, (
            line,
            capsys.readouterr().err,
        )
    for file in (
        "dog.kohya.safetensors",
        "pytorch_lora_weights.safetensors",
        "contact_sheet.png",
        "README.md",
    ):
        assert (Path("runs/dog") / file).is_file()
    assert (
        json.loads(Path("runs/dog/train_config.json").read_text())["instance_prompt"]
        == "a photo of a sks dog"
    )
    assert "after 2 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_the_api_pages_program_trains_outside_the_clone():
    program = list_blocks(DOCS / "api.md", "python")[0]
    assert all(code in program for code in FEWER)
    for code, fewer in FEWER.items():
        program = program.replace(code, fewer)
    exec(compile(program, "api.md", "exec"), {})
    assert Path("runs/rocket/pytorch_lora_weights.safetensors").is_file()
    assert [Image.open(f"rocket_{number}.png").size for number in range(2)] == [(128, 128)] * 2
