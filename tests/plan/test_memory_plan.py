"""`--memory`: which plan fits a card, what stays as the person said, and that a resumed run keeps its plan."""

import json
from dataclasses import replace

import pytest
import torch

from dreambooth_moslora.cli.main import train_main
from dreambooth_moslora.core import UserError
from dreambooth_moslora.plan import memory as memory_plan
from dreambooth_moslora.plan.memory import STOCK_SDXL, USABLE, BaseSize, choose_memory, estimate
from dreambooth_moslora.settings.table import TrainConfig

GIB = 2**30
SDXL = TrainConfig(
    pretrained_model_name_or_path=STOCK_SDXL, train_batch_size=1, resolution=1024, rank=16, memory="auto"
)


@pytest.fixture
def card(monkeypatch):
    """Pretend that there is a GPU with so much free; bitsandbytes is there."""

    def put(free_gib: float, capability: int = 8) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (capability, 0))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (int(free_gib * GIB), 80 * GIB))

    monkeypatch.setattr(memory_plan, "find_spec", lambda name: True)
    return put


def chosen(config: TrainConfig) -> tuple:
    return config.mixed_precision, config.gradient_checkpointing, config.base_quantization


@pytest.mark.parametrize(
    ("free_gib", "capability", "settings"),
    [
        (23.0, 8, ("bf16", False, "none")),
        (23.0, 7, ("fp16", False, "none")),
        (9.0, 8, ("bf16", True, "none")),
        (5.5, 8, ("bf16", True, "nf4")),
    ],
)
def test_the_first_plan_that_fits_is_taken(card, free_gib, capability, settings):
    card(free_gib, capability)
    found = choose_memory(SDXL)
    assert chosen(found) == settings
    assert estimate(found, BaseSize(), 1).peak_gib <= USABLE * (free_gib + 0.5)
    assert choose_memory(found) == found


@pytest.mark.parametrize(
    ("free_gib", "recomputed", "cached"),
    [(11.9, False, False), (11.2, False, True), (9.0, True, False), (7.0, True, True)],
)
def test_the_texts_projections_leave_where_that_saves_recomputation_or_bits(card, free_gib, recomputed, cached):
    """`free_gib` is beside CUDA's context."""
    card(free_gib)
    found = choose_memory(SDXL)
    assert chosen(found) == ("bf16", recomputed, "none") and found.cache_cross_attention == cached


def test_no_plan_caches_a_text_that_changes(card):
    card(11.2)
    found = choose_memory(replace(SDXL, train_text_encoder=True))
    assert chosen(found) == ("bf16", True, "none") and not found.cache_cross_attention
    with pytest.raises(UserError, match="--cache_cross_attention and --use_dora"):
        choose_memory(replace(SDXL, memory="full_cached", use_dora=True))


def test_4_bit_and_cached_text_exclude_each_other(card):
    card(4)
    found = choose_memory(replace(SDXL, cache_cross_attention=True))
    assert chosen(found) == ("bf16", True, "none") and found.cache_cross_attention
    with pytest.raises(UserError, match="--cache_cross_attention and --base_quantization"):
        choose_memory(replace(SDXL, memory="nf4", cache_cross_attention=True))


def test_what_was_given_stays(card):
    card(23.0)
    given = replace(SDXL, mixed_precision="fp16", gradient_checkpointing=True, base_quantization="int8")
    assert chosen(choose_memory(given)) == ("fp16", True, "int8")
    assert chosen(choose_memory(replace(given, memory="nf4"))) == ("fp16", True, "int8")
    plain = replace(SDXL, memory=None)
    assert choose_memory(plain) is plain


def test_without_a_gpu_nothing_is_chosen_for_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert chosen(choose_memory(SDXL)) == (None, False, "none")
    assert chosen(choose_memory(replace(SDXL, memory="recompute"))) == (None, True, "none")


def test_a_run_that_goes_on_keeps_its_plan_on_another_card(card, tmp_path):
    card(9.0)
    begun = choose_memory(replace(SDXL, output_dir=str(tmp_path)))
    (tmp_path / "train_config.json").write_text(json.dumps(begun.to_dict()))
    card(80.0)
    resumed = choose_memory(replace(SDXL, output_dir=str(tmp_path), resume_from_checkpoint="latest"))
    assert chosen(resumed) == ("bf16", True, "none") and resumed.cache_cross_attention == begun.cache_cross_attention


def test_a_dry_run_says_what_each_plan_needs(capsys):
    assert train_main(["--config", "assets/configs/quickstart.toml", "--dry_run", "--memory", "recompute"]) == 0
    said = capsys.readouterr().out
    assert "gradient_checkpointing = true" in said and "memory plans: full 0." in said
    assert "(--memory recompute)" in said
