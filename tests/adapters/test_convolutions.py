"""Adapters on convolutions: the formula, PEFT's merging, both adapter files, fewer ranks, and who is refused."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from benchmarks.fold_table import BOUND, loaded_by_diffusers
from dreambooth_moslora.adapters.describe import describe
from dreambooth_moslora.adapters.export import publish
from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_layers, adapter_parameters, fold, inject
from dreambooth_moslora.adapters.proof import kohya_name
from dreambooth_moslora.adapters.raw_file import save_raw
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME
from dreambooth_moslora.plan.memory import size_of_base
from tests.adapters.test_moslora import MIXERS, shake
from tests.helpers.layer_figures import diagnostics
from tests.helpers.live_adapters import facts_of
from tests.helpers.tiny import tiny_unet

TARGETS = ["conv1", "conv_shortcut", "downsamplers.0.conv", "to_q"]
PIXELS = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(2))


class Convolutions(nn.Module):
    """One of each kind that a UNet has, and what cannot have an adapter."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 6, 3, padding=1)
        self.point = nn.Conv2d(3, 6, 1)
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
        self.seamless = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.GroupNorm(2, 4)
        self.line = nn.Conv1d(4, 4, 3)


def config(*targets: str, **options) -> MoSLoraConfig:
    return MoSLoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets)} | options)


def live(**options) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    unet = inject(tiny_unet(), config(*TARGETS, **options))
    shake(unet)
    return {"unet": unet.eval()}


@pytest.mark.parametrize("name", ["wide", "point", "down"])
@pytest.mark.parametrize("kind", MIXERS)
def test_forward_and_merge_are_the_formula(name, kind):
    net = inject(Convolutions(), config(name, mixer=kind))
    layer = getattr(net, name)
    assert torch.equal(layer(PIXELS), layer.base_layer(PIXELS)), "an adapter starts as a no-op"
    shake(net)
    base, down, lora_b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"]
    up = lora_b.weight.flatten(1) if kind == "none" else lora_b.up @ lora_b.mixer
    delta = 6 / 4 * torch.einsum("or,rihw->oihw", up, down)
    wanted = F.conv2d(PIXELS, base.weight + delta, base.bias, base.stride, base.padding)
    assert torch.allclose(layer(PIXELS), wanted, atol=1e-5)
    assert torch.allclose(fold(net)[name].delta, delta, atol=1e-6)
    layer.merge()
    assert torch.allclose(layer(PIXELS), wanted, atol=1e-5)
    layer.unmerge()
    assert torch.allclose(layer(PIXELS), wanted, atol=1e-5)


def test_every_part_of_it_learns_and_a_frozen_mixer_does_not():
    for train_mixer in (True, False):
        net = inject(Convolutions(), config("wide", train_mixer=train_mixer))
        shake(net)
        net.wide(PIXELS).square().sum().backward()
        learnt = {name.rpartition(".")[2] for name, p in adapter_parameters(net) if p.grad.abs().max() > 0}
        assert learnt == {"weight", "up"} | ({"mixer"} if train_mixer else set())


@pytest.mark.parametrize("kind", ["orthogonal", "none"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"conv1": 2}}], ids=str)
def test_an_untouched_diffusers_computes_the_live_output_from_both_files(kind, options, tmp_path):
    components = live(mixer=kind, **options)
    proof = publish(components, tmp_path, "dog", facts_of(components))
    assert proof.max_relative_difference < 1e-6
    arguments, more = unet_inputs()
    for file in proof.files:
        nets = loaded_by_diffusers(tiny_unet(), tmp_path / file), components["unet"], tiny_unet()
        with torch.no_grad():
            found, wanted, bare = (net(*arguments, **more).sample for net in nets)
        assert (found - wanted).norm() <= BOUND * (wanted - bare).norm()


def unet_inputs() -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(4)
    words, text, latents = (torch.randn(s, generator=generator) for s in ((1, 7, 48), (1, 32), (1, 4, 8, 8)))
    added = {"text_embeds": text, "time_ids": torch.zeros(1, 6)}
    return (latents, torch.tensor([300]), words), {"added_cond_kwargs": added}


def test_the_files_hold_kernels_under_the_names_that_others_know(tmp_path):
    """The same whether pictures or channels come first in memory."""
    components = live()
    publish(components, tmp_path, "dog", facts_of(components))
    path = next(p for p in adapter_layers(components["unet"]) if p.endswith("conv1"))
    diffusers = load_file(tmp_path / PUBLISHED_NAME)
    kohya = load_file(tmp_path / "dog.kohya.safetensors")
    down, up = diffusers[f"unet.{path}.lora_A.weight"], diffusers[f"unet.{path}.lora_B.weight"]
    assert down.shape[2:] == (3, 3) and up.shape[2:] == (1, 1)
    assert torch.equal(kohya[f"{kohya_name('unet', path)}.lora_down.weight"], down)
    assert torch.equal(kohya[f"{kohya_name('unet', path)}.lora_up.weight"], up)
    components["unet"].to(memory_format=torch.channels_last)
    publish(components, tmp_path / "b", "dog", facts_of(components))
    again = load_file(tmp_path / "b" / PUBLISHED_NAME)
    assert all(torch.equal(diffusers[key], again[key]) for key in diffusers)


def test_a_lower_rank_keeps_the_share_that_was_asked_for(tmp_path):
    components = live()
    proof = publish(components, tmp_path, "dog", facts_of(components), keep=0.9)
    assert 0.9 <= proof.kept < 1 and proof.rank_sum < 4 * proof.projections
    assert proof.max_relative_difference < 1e-6
    described = describe(tmp_path / PUBLISHED_NAME)
    assert len(described["ranks"]) > 1 and described["effective_rank_median"] > 1


def test_its_figures_are_those_of_the_flattened_matrix():
    unet = live()["unet"]
    path = next(p for p in adapter_layers(unet) if p.endswith("conv1"))
    figures, delta = diagnostics(unet)[path], fold(unet)[path].delta.flatten(1)
    sizes = torch.linalg.svdvals(delta)[:4]
    shares = sizes / sizes.sum()
    assert figures.rank == 4
    assert figures.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-4)


NO_DORA = "wide is a convolution, and DoRA is for projections"


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("grouped", {}, "grouped is a grouped, dilated or circular Conv2d"),
        ("dilated", {}, "dilated is a grouped, dilated or circular Conv2d"),
        ("seamless", {}, "seamless is a grouped, dilated or circular Conv2d"),
        ("norm", {}, "norm is a GroupNorm, which has no matrix to adapt"),
        ("norm", {"mixer": "none"}, "norm is a GroupNorm, which has no matrix to adapt"),
        ("line", {}, "line is a Conv1d"),
        ("wide", {"use_dora": True}, NO_DORA),
        ("wide", {"use_dora": True, "mixer": "none"}, NO_DORA),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_left_as_it_was(target, options, said):
    net = Convolutions()
    names = net.state_dict().keys()
    with pytest.raises(UserError, match=said):
        inject(net, config("wide", target, **options))
    assert net.state_dict().keys() == names


@pytest.mark.parametrize("targets", [("to_q", "to_k"), ("conv1", "conv_in", "to_q")])
def test_the_estimate_counts_what_is_trained(targets, tiny_base):
    size = size_of_base(tiny_base, targets)
    unet = inject(tiny_unet(), config(*targets))
    parameters = sum(p.numel() for _, p in adapter_parameters(unet))
    assert 4 * size.adapted_widths + 16 * size.adapted_layers == parameters


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(
    ("target", "options", "said"),
    [("grouped", {}, "grouped is a grouped, dilated or circular Conv2d"), ("wide", {"use_dora": True}, NO_DORA)],
)
def test_get_peft_model_refuses_too(target, options, said):
    with pytest.raises(UserError, match=said):
        get_peft_model(Convolutions(), config(target, **options))


def test_dora_of_pefts_own_on_a_convolution_is_not_saved(tmp_path):
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"], use_dora=True), "default")
    components, facts = {"unet": unet}, AdapterMetadata(rank=2, alpha=2)
    for save in (
        lambda: save_raw(components, tmp_path / "x", facts),
        lambda: publish(components, tmp_path, "x", facts),
    ):
        with pytest.raises(UserError, match="conv1 is a convolution with DoRA, which cannot be saved here"):
            save()
    assert not list(tmp_path.iterdir())
