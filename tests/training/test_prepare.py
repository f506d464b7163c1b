"""What is encoded before training, and what is still in memory when it begins."""

from weakref import ref

import pytest
import torch

from dreambooth_moslora.base.load import load_pipeline
from dreambooth_moslora.training import encoder as frozen_base
from dreambooth_moslora.training import prepare
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "is_there"), [({}, False), ({"num_validation_images": 1}, True), ({"caching": "off"}, True)]
)
def test_the_vae_leaves_memory_unless_it_is_needed_again(changes, is_there, tiny_base, tmp_path, monkeypatch):
    load, loaded, seen = prepare.load_base, [], []

    def load_base(*arguments):
        pipeline = load(*arguments)
        loaded.append(ref(pipeline.vae))
        return pipeline

    def note(event):
        if event.kind == "step":
            seen.append(loaded[0]() is not None)

    monkeypatch.setattr(prepare, "load_base", load_base)
    photos = paint_photos(tmp_path / "photos")
    train(tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=1, **changes), note)
    assert seen == [is_there]


@pytest.mark.slow
def test_only_what_the_steps_will_show_is_encoded(tiny_base, tmp_path):
    events, photos = [], paint_photos(tmp_path / "photos")
    size = {"max_train_steps": 1, "gradient_accumulation_steps": 2, "train_batch_size": 2}
    prior = {"with_prior_preservation": True, "num_class_images": 5}
    train(tiny_config(tiny_base, photos, tmp_path / "run", crops_per_photo=9, **size, **prior), events.append)
    assert {event.total for event in events if getattr(event, "phase", "") == "caching"} == {4 + 4}


@pytest.mark.parametrize(
    ("device", "dtype", "has_bf16", "advice"),
    [
        ("cuda", torch.float32, False, "--mixed_precision bf16"),
        ("cuda", torch.bfloat16, False, None),
        ("cpu", torch.float32, False, None),
        ("cpu", torch.bfloat16, True, None),
        ("cpu", torch.bfloat16, False, "--mixed_precision no"),
    ],
)
def test_a_slow_precision_is_warned_of_once_and_only_for_a_base_like_sdxl(
    tiny_base, caplog, monkeypatch, device, dtype, has_bf16, advice
):
    monkeypatch.setattr(frozen_base, "has_fast_bf16", lambda: has_bf16)
    pipeline, where = load_pipeline(tiny_base, dtype=dtype), torch.device(device)
    frozen_base.warn_of_slow_precision(pipeline, where)
    assert not caplog.records
    pipeline.unet.register_to_config(sample_size=1024 // pipeline.vae_scale_factor)
    frozen_base.warn_of_slow_precision(pipeline, where)
    lines = [record.message for record in caplog.records if record.name == frozen_base.__name__]
    assert [advice in line and "\n" not in line for line in lines] == [True] * (advice is not None)
