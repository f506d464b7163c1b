"""What forbids a run: folders that it would harm, layers without a name, bf16 on a GPU that is too
old for it."""

import os
from types import SimpleNamespace

import pytest
import torch

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.command_doctor import Findings, collect_machine_facts
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan.distributed import make_accelerator
from dreambooth_moslora.plan.validation import check_folders, check_layers, validate_run
from dreambooth_moslora.precision import choose_half_precision
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")


class Always:
    """An evaluator to whom the first step is the best."""

    prompts = ()

    def __call__(self, sampler, step):
        return {"score": 1.0, "best": {"step": step, "score": 1.0, "since": 0}}


def check(output, photos="photos", **changes):
    check_folders(TrainConfig(output_dir=str(output), instance_data_dir=str(photos), **changes))


NO_RUN_FOLDERS = {
    "--output_dir": ("", " ", ".", "../photos", "{home}/photos"),
    "--output_dir .* itself: name a folder of the run's own": (
        "/",
        "//",
        "~",
        "{home}/.",
        "{home}/photos/..",
    ),
    "name": ("a\nb", "d" * 245, "ü" * 101),  # no adapter can be called so
}


@pytest.mark.parametrize(
    "says, output",
    [(says, output) for says, outputs in NO_RUN_FOLDERS.items() for output in outputs],
)
def test_unsuitable_run_folder_is_refused_with_nothing_made(says, output, tmp_path, monkeypatch):
    photos = paint_photos(tmp_path / "photos")
    monkeypatch.chdir(photos)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=says):
        check(output.format(home=tmp_path), photos)
    assert list(tmp_path.iterdir()) == [photos] and len(list(photos.iterdir())) == 3


@pytest.mark.skipif(
    not os.path.isdir("/proc"), reason="only Linux has a folder that nobody can write to"
)
def test_folder_that_cannot_be_made_is_refused_before_training(tmp_path, monkeypatch):
    photos, run = paint_photos(tmp_path / "photos"), tmp_path / "run"
    for name in ("output_dir", "class_data_dir"):
        places = {"output": run, name.replace("output_dir", "output"): "/proc/no/such"}
        with pytest.raises(UserError, match=rf"--{name} /proc/no/such: cannot be written"):
            check(**places, photos=photos)
    (tmp_path / "file").write_text("no folder")
    for cache in ("/proc/nope", "/proc", str(tmp_path / "file")):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        check(run, photos)
        with pytest.raises(UserError, match=r"--cache_dir .* cannot be written"):
            check(run, photos, caching="disk")
        with pytest.raises(UserError, match="--cache_dir /proc: cannot be written"):
            check(run, photos, caching="disk", cache_dir="/proc")


def test_current_folder_and_longest_name_give_usable_file_names(tiny_base, tmp_path, monkeypatch):
    photos, name = paint_photos(tmp_path / "photos"), "d" * 200
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    check(tmp_path / name)
    train(
        tiny_config(tiny_base, photos, ".", max_train_steps=1, evaluate_steps=1), evaluator=Always()
    )
    assert (tmp_path / name / "best" / f"{name}.kohya.safetensors").is_file()


@pytest.mark.parametrize("inner", ["samples", "checkpoint-5", "best/mine", "class_images", "masks"])
def test_photos_in_folders_that_the_run_writes_are_refused(inner, tmp_path):
    with pytest.raises(UserError, match="--instance_data_dir"):
        check(tmp_path, tmp_path / inner)
    with pytest.raises(UserError, match="--class_data_dir is the folder of --instance_data_dir"):
        check(tmp_path / "run", tmp_path / inner, class_data_dir=f"{tmp_path}/x/../{inner}")
    check(tmp_path, tmp_path / "photos", class_data_dir=str(tmp_path / "class_images"))
    check(tmp_path / "photos" / "run", tmp_path / "photos")


def test_a_run_is_refused_before_it_touches_the_photos(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    (photos / "image_0.png").write_bytes((photos / "0.png").read_bytes())
    (photos / "README.md").write_text("my photos")
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    with pytest.raises(UserError, match="is the folder of instance_data_dir"):
        train(tiny_config(tiny_base, photos, photos))
    assert {path.name: path.read_bytes() for path in photos.iterdir()} == before
    for name in ("README.md", "image_7.png"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(UserError, match="is not a run's"):
            check(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is allowed to root")
def test_unwritable_folder_is_refused_before_training(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=r"--output_dir .*: cannot be written: Permission denied"):
        check(tmp_path / "a" / "b")


@pytest.mark.slow
def test_a_run_replaces_the_pictures_of_its_own_card_only(tiny_base, tmp_path):
    photos, run = paint_photos(tmp_path / "photos"), tmp_path / "run"
    samples = {"max_train_steps": 1, "num_validation_images": 2}
    train(tiny_config(tiny_base, photos, run, **samples))
    assert len(list(run.glob("image_*.png"))) == 6
    train(tiny_config(tiny_base, photos, run, **{**samples, "num_validation_images": 0}))
    assert not list(run.glob("image_*.png"))


ATTENTION = [f"down.0.attn1.{name}" for name in ("to_q", "to_k", "to_out.0")]
LAYERS = dict.fromkeys(["conv_in", *ATTENTION, "mid.proj_in"], 2)


def test_unknown_layer_gets_a_suggestion_and_path_ends_pass():
    for names in (("to_q", "to_out.0"), ("attn1.to_k",), ("conv_in",), ("down.0.attn1.to_q",)):
        check_layers(names, LAYERS, use_dora=False)
    near = {
        "to_foo": "did you mean to_",
        "to_out": "did you mean to_out.0",
        "o_q": "mean to_q",
        "zzz": "to_v",
    }
    for name, says in near.items():
        with pytest.raises(UserError, match=f"--target_modules {name}: .*{says}"):
            check_layers(("to_q", name), LAYERS, use_dora=False)


def test_layer_without_a_name_in_kohya_files_is_refused():
    layers = {"time_embedding.linear_1": 2, "add_embedding.linear_1": 2}
    check_layers(("time_embedding.linear_1",), layers, use_dora=False)
    no_name = r"linear_1: add_embedding.linear_1 has no name in kohya's files"
    for target, says in (
        ("linear_1", no_name),
        ("*", r"kohya's files; name others, or blocks: down_blocks\.\*"),
    ):
        with pytest.raises(UserError, match=says):
            check_layers((target,), layers, use_dora=False)


@pytest.fixture
def t4(gpu):
    gpu(7, name="Tesla T4", minor=5)


def asked(**changes):
    config = TrainConfig(**{"report_to": "none"} | changes)
    validate_run(config, Base.of(config))


def test_bf16_on_an_older_gpu_is_refused_with_advice(t4, tmp_path, monkeypatch):
    says = (
        r"^--mixed_precision bf16: Tesla T4 \(compute capability 7.5\) has no bf16.*: "
        r"give --mixed_precision fp16\.$"
    )
    with pytest.raises(UserError, match=says):
        asked(mixed_precision="bf16")
    says = "give --mixed_precision fp16"
    with pytest.raises(UserError, match=says):
        make_accelerator(
            TrainConfig(report_to="none", mixed_precision="bf16"), RunDir(tmp_path / "run")
        )
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=says):
        asked()
    asked(mixed_precision="fp16")


def test_other_precisions_and_devices_pass_and_doctor_agrees(t4, gpu, monkeypatch, capsys):
    for precision in ("fp16", "no", None):
        asked(mixed_precision=precision)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    asked(mixed_precision="bf16")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    for major, says in ((7, "no: use --mixed_precision fp16"), (8, "yes")):
        gpu(major)
        main(["doctor"])
        (line,) = [
            line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["bf16"]
        ]
        assert line.split(maxsplit=1)[1] == says
    asked(mixed_precision="bf16")


def test_amd_gpus_get_bf16_by_architecture_as_doctor_says(gpu, monkeypatch):
    """ROCm gives the architecture's number as a compute capability: 10.3 for gfx1030. PyTorch says
    bf16 of all."""
    gpu(10, minor=3)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    older = ("gfx1030", "gfx906:sramecc+:xnack-")
    for name in (*older, "gfx90a:sramecc+:xnack-", "gfx942", "gfx1100", "gfx1201"):
        facts = SimpleNamespace(gcnArchName=name, name="Radeon", total_memory=2**34)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device=None, facts=facts: facts
        )
        assert choose_half_precision() == ("fp16" if name in older else "bf16"), name
        collect_machine_facts(findings := Findings())
        assert findings.facts["bf16"] == (
            "no: use --mixed_precision fp16" if name in older else "yes"
        ), name
