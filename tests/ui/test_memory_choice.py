"""What the page chooses for a run on a GPU, and what it says of it."""

import PIL.Image
import pytest
import torch

from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.ui.app_state import AppContext
from dreambooth_moslora.ui.server.users import Visitor
from dreambooth_moslora.ui.train_form import TrainForm
from dreambooth_moslora.ui.training.cost_estimate import estimate_cost
from dreambooth_moslora.ui.training.jobs import Jobs

GIB = 2**30


@pytest.fixture
def card(monkeypatch):
    """Pretend that there is a GPU of some capability, with so much free and so much in this process's hands."""

    def put(capability: int, free_gib: float, own_gib: float = 0.0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (capability, 0))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (int(free_gib * GIB), 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *device: int(own_gib * GIB))

    return put


@pytest.mark.parametrize(
    ("capability", "free_gib", "own_gib", "prior", "precision", "recomputes"),
    [
        (8, 23.0, 0.0, False, "bf16", False),
        (8, 11.0, 0.0, False, "bf16", True),
        (8, 16.0, 0.0, True, "bf16", True),  # twice the images
        (8, 8.0, 7.0, False, "bf16", False),  # the page's own base makes room
        (7, 14.5, 0.0, False, "fp16", False),
        (7, 7.0, 0.0, False, "fp16", True),
    ],
)
def test_a_run_on_sdxl_fits_its_card(card, tmp_path, capability, free_gib, own_gib, prior, precision, recomputes):
    card(capability, free_gib, own_gib)
    form = TrainForm("sks", "dog", prior_preservation=prior)
    config = TrainConfig.from_dict(form.config("owner/sdxl", 1024, tmp_path, tmp_path / "run"))
    assert (config.mixed_precision, config.gradient_checkpointing) == (precision, recomputes)


def test_nothing_is_chosen_for_a_small_base_nor_without_a_gpu(card, tmp_path):
    form = TrainForm("sks", "dog")
    if not torch.cuda.is_available():
        assert "mixed_precision" not in form.config("owner/sdxl", 1024, tmp_path, tmp_path / "run")
    card(8, 4.0)
    assert "mixed_precision" not in form.config("toy", 128, tmp_path, tmp_path / "run")


@pytest.mark.parametrize(
    ("free_gib", "words", "is_tight"), [(40.0, "without", False), (11.0, "with", False), (5.0, "with", True)]
)
def test_the_cost_says_what_was_chosen_for_the_card(card, tmp_path, free_gib, words, is_tight):
    card(8, free_gib)
    (tmp_path / "visitor" / "photos").mkdir(parents=True)
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "visitor" / "photos" / "photo_01.png")
    folders = {"adapters_dir": tmp_path / "adapters", "runs_dir": tmp_path / "runs"}
    ctx = AppContext(lambda: None, base="sdxl", base_name="owner/sdxl", resolution_px=1024, training=True, **folders)
    cost = estimate_cost(ctx, Jobs(ctx.runs_dir), TrainForm("sks", "dog"), Visitor("a" * 64, tmp_path / "visitor"))
    assert f"{free_gib} GiB free for this run, so it trains in bf16, {words} gradient checkpointing" in cost
    assert ("too little memory" in cost) == is_tight
    ctx.visitors.close()
