"""What is done before the first step: `--init_adapter`, encoding, the first samples."""

import io
from weakref import ref

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.base.load import load_pipeline
from dreambooth_moslora.cli.terminal import TerminalProgress
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.events import PhaseProgress, SamplesDrawn
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan.checks import preflight
from dreambooth_moslora.training import frozen_base, prepare
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.prepare import too_slow_for_samples
from tests.helpers.few_steps import few_steps
from tests.helpers.tiny import tiny_sdxl
from tests.helpers.tiny_adapters import save_diffusers_lora
from tests.helpers.tiny_training import adapter_sha256, tiny_config
from tests.training.test_resume import stop_at


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "is_there"), [({}, False), ({"num_validation_images": 1}, True), ({"caching": "off"}, True)]
)
def test_the_vae_leaves_memory_unless_it_is_needed_again(changes, is_there, tiny_base, photos, tmp_path, monkeypatch):
    load, loaded, seen = prepare.load_base, [], []

    def load_base(*arguments):
        pipeline = load(*arguments)
        loaded.append(ref(pipeline.vae))
        return pipeline

    monkeypatch.setattr(prepare, "load_base", load_base)
    note = lambda event: seen.append(loaded[0]() is not None) if event.kind == "step" else None  # noqa: E731
    with few_steps():
        train(tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=1, **changes), note)
    assert seen == [is_there]


@pytest.mark.slow
def test_only_what_the_steps_will_show_is_encoded(tiny_base, photos, tmp_path):
    events, size = [], {"max_train_steps": 1, "gradient_accumulation_steps": 2, "train_batch_size": 2}
    prior = {"with_prior_preservation": True, "num_class_images": 5}
    with few_steps():
        train(tiny_config(tiny_base, photos, tmp_path / "run", crops_per_photo=9, **size, **prior), events.append)
    assert {event.total for event in events if getattr(event, "phase", "") == "caching"} == {4 + 4}


def test_a_slow_precision_is_warned_of_once_and_only_for_a_base_like_sdxl(tiny_base, caplog, monkeypatch):
    for device, dtype, has_bf16, advice in (
        ("cuda", torch.float32, False, "--mixed_precision bf16"),
        ("cuda", torch.bfloat16, False, None),
        ("cpu", torch.float32, False, None),
        ("cpu", torch.bfloat16, True, None),
        ("cpu", torch.bfloat16, False, "--mixed_precision no"),
    ):
        monkeypatch.setattr(frozen_base, "has_fast_bf16", lambda has_bf16=has_bf16: has_bf16)
        pipeline, where = load_pipeline(tiny_base, dtype=dtype), torch.device(device)
        caplog.clear()
        frozen_base.warn_of_slow_precision(pipeline, where)
        assert not caplog.records
        pipeline.unet.register_to_config(sample_size=1024 // pipeline.vae_scale_factor)
        frozen_base.warn_of_slow_precision(pipeline, where)
        lines = [record.message for record in caplog.records if record.name == frozen_base.__name__]
        assert [advice in line and "\n" not in line for line in lines] == [True] * (advice is not None)


@pytest.fixture
def file(tiny_base, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    return save_diffusers_lora(unet, tmp_path / "old", seed=1, rank=3, size=0.1)


@pytest.fixture
def config(tiny_base, photos, tmp_path, file):
    start = {"target_modules": ("to_q", "to_k"), "init_adapter": str(file)}
    return lambda **changes: tiny_config(tiny_base, photos, tmp_path / "run", **start | changes)


def deltas(path):
    tensors = load_file(path)
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = {key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])}
    return {name: tensors[name + ends[1]].double() @ tensors[name + ends[0]].double() for name in modules}


def test_at_a_rate_of_zero_the_published_file_is_the_one_it_began_with(config, file, tmp_path, caplog):
    train(config(learning_rate=0.0, max_train_steps=1, rank=5, lora_alpha=2))
    found, given = deltas(RunDir(tmp_path / "run").adapter_path), deltas(file)
    assert found and all(torch.dist(found[n], given[n]) < 1e-5 * given[n].norm() for n in found)
    said = [line for line in caplog.messages if "--init_adapter" in line]
    assert len(said) == 1 and f"{len(found)} layers go on from it, largest relative deviation" in said[0]
    assert f"{len(given) - len(found)} layers (unet." in said[0]


@pytest.mark.slow
def test_it_learns_on_and_a_resumed_run_needs_the_file_no_more(config, file, tmp_path):
    train(config(seed=1, max_train_steps=3))
    unbroken, given = adapter_sha256(tmp_path / "run"), deltas(file)
    found = deltas(RunDir(tmp_path / "run").adapter_path)
    assert all(1e-4 < torch.dist(found[n], given[n]) / given[n].norm() < 0.9 for n in found)
    train(config(seed=1, max_train_steps=3), *stop_at(2))
    file.unlink()
    train(config(seed=1, max_train_steps=3, resume_from_checkpoint="latest"))
    assert adapter_sha256(tmp_path / "run") == unbroken


def test_a_file_that_cannot_be_gone_on_from_is_said_before_the_base_is_loaded(config, file):
    def said() -> str:
        with pytest.raises(UserError, match=r"--init_adapter .*: ") as error:
            preflight(config())
        return str(error.value)

    note = {"word": "sks", "count": 2, "file": "dog_emb.safetensors", "sha256": "0" * 64}
    save_file(load_file(file), file, {"moslora": AdapterMetadata(4, 4.0, tokens=note).to_json()})
    assert "it has learnt new tokens for 'sks'" in said()
    file.write_bytes(b"no adapter")
    assert "it is not a safetensors file" in said()
    file.unlink()
    assert "there is no such file or folder" in said()


def test_on_a_cpu_with_a_large_base_there_are_no_samples_unless_they_are_asked_for(tmp_path, photos, caplog):
    """The tiny base, said to draw 512 px."""
    pipeline, events = tiny_sdxl(tmp_path), []
    pipeline.unet.register_to_config(sample_size=64)
    pipeline.save_pretrained(tmp_path / "model")
    config = tiny_config(tmp_path / "model", photos, tmp_path / "run", max_train_steps=1)
    train(type(config).from_dict(config.to_dict() | {"num_validation_images": None}), events.append)
    assert not [event for event in events if isinstance(event, SamplesDrawn)]
    (said,) = [line for line in caplog.messages if "No sample images are drawn" in line]
    assert "--num_validation_images 4" in said


def test_only_the_default_is_left_out(subject, tmp_path):
    def is_left_out(device="cpu", px=64, **asked):
        subject.pipeline.unet.register_to_config(sample_size=px)
        config = tiny_config(tmp_path, tmp_path, tmp_path, **{"num_validation_images": None} | asked)
        assert config.sample_count == 4
        return too_slow_for_samples(config, subject.pipeline, torch.device(device))

    assert is_left_out() and not is_left_out(device="cuda") and not is_left_out(px=16)
    for asked in ({"num_validation_images": 4}, {"validation_prompt": "a dog"}, {"validation_steps": 9}):
        assert not is_left_out(**asked)


@pytest.mark.slow
def test_the_first_samples_show_their_steps_and_the_time_left(tiny_base, photos, tmp_path):
    screen, events = io.StringIO(), []
    progress = TerminalProgress(screen)

    def hear(event):
        events.append(event)
        progress(event)

    train(tiny_config(tiny_base, photos, tmp_path / "run", num_validation_images=2, max_train_steps=1), hear)
    first = next(i for i, event in enumerate(events) if isinstance(event, SamplesDrawn))
    counted = [isinstance(e, PhaseProgress) and e.phase == "sampling" and e.total > 1 for e in events]
    counts = [event for event, is_counted in zip(events[:first], counted) if is_counted]
    assert counts[0].done == 0 and counts[-1].done == counts[-1].total and not any(counted[first:])
    assert all(word in screen.getvalue() for word in ("drawing samples: 100%", "50/50", "<00:"))
