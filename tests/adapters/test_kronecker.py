"""`--mixer kronecker`: LoKr as a MoSLoRA whose A and B are tied, from the layer to the published file."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from dreambooth_moslora.adapters import mixer, published_file
from dreambooth_moslora.adapters.describe import describe
from dreambooth_moslora.adapters.lora_file import read_adapter
from dreambooth_moslora.adapters.moslora import (
    ATTENTION_PROJECTIONS,
    MoSLoraConfig,
    adapter_layers,
    adapter_parameters,
    fold,
    inject,
    matrices_of,
)
from dreambooth_moslora.adapters.raw_file import RAW_KEY, read_raw, save_raw, write_file
from dreambooth_moslora.base.load import load_pipeline
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.cli.train import parse_train_config
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME
from dreambooth_moslora.plan.checks import check_settings
from dreambooth_moslora.plan.memory import adapter_parameters as counted
from dreambooth_moslora.plan.memory import size_of_base
from dreambooth_moslora.settings.table import layer_parameters
from dreambooth_moslora.training.loop import train
from tests.helpers.live_adapters import PROJECTIONS, facts_of, live, shake
from tests.helpers.tiny_training import paint_photos, tiny_config

X = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.to_q = nn.Linear(12, 20)

    def forward(self, x):
        return self.to_q(x)


def config(**options) -> MoSLoraConfig:
    return MoSLoraConfig(**{"r": 8, "lora_alpha": 3, "target_modules": ["to_q"], "mixer": "kronecker"} | options)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"train_mixer": False}])
def test_it_is_lokr(options):
    """x·(W₀ + s·W₁ ⊗ (B₂·A₂))ᵀ, with the gradients of that; at the start it is the base."""
    net = inject(Net(), config(mixer_factor=4, **options))
    assert torch.equal(net(X), Net()(X))
    shake(net)
    layer = net.to_q
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    leaves = [p.detach().clone().requires_grad_() for p in (down.tied, up.mixer, up.up)]
    assert [tuple(leaf.shape) for leaf in leaves] == [(2, 3), (4, 4), (5, 2)]
    weight = layer.base_layer.weight + layer.scaling["default"] * torch.kron(leaves[1], leaves[2] @ leaves[0])
    expected = F.linear(X, weight, layer.base_layer.bias)
    assert torch.allclose(net(X), expected, atol=1e-5)
    for result in (net(X), expected):
        result.square().sum().backward()
    for mine, leaf in zip((down.tied, up.mixer, up.up), leaves, strict=True):
        assert torch.allclose(mine.grad, leaf.grad, rtol=1e-4) if mine.requires_grad else not options["train_mixer"]
    matrices = matrices_of(layer, "default")
    assert torch.allclose(matrices.forward(X, layer.base_layer.weight) + layer.base_layer.bias, expected, atol=1e-5)
    plain = fold(net)["to_q"]
    assert plain.rank == 8 and torch.allclose(layer.base_layer.weight + plain.delta, weight, atol=1e-6)
    layer.merge()
    assert torch.allclose(layer.base_layer.weight, weight, atol=1e-6)


def test_it_starts_orthogonal_from_its_seed_and_learns_few_numbers():
    one, other = (inject(Net(), config(mixer_factor=4, mixer_seed=seed)) for seed in (1, 2))
    mixers = [net.to_q.lora_B["default"].mixer for net in (one, other)]
    assert torch.allclose(mixers[0] @ mixers[0].T, torch.eye(4), atol=1e-6) and not torch.equal(*mixers)
    assert sum(p.numel() for _, p in adapter_parameters(one)) == 2 * 3 + 4 * 4 + 5 * 2


@pytest.mark.parametrize(
    "options, words",
    [
        ({"r": 6}, "needs ranks that 4 divides, not 6"),
        ({"mixer_factor": 8}, r"to_q of 20×12 \(out×in\) cannot be a Kronecker product of 8×8 blocks"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(options, words):
    net = Net()
    with pytest.raises(UserError, match=words):
        inject(net, config(**{"mixer_factor": 4} | options))
    assert isinstance(net.to_q, nn.Linear)


def test_a_run_publishes_a_plain_lora_and_counts_its_numbers(tiny_base, tmp_path):
    options = {"mixer": "kronecker", "rank": 8, "mixer_factor": 4, "max_train_steps": 1}
    config = tiny_config(tiny_base, paint_photos(tmp_path / "photos"), tmp_path / "run", **options)
    train(config)
    file = tmp_path / "run" / PUBLISHED_NAME
    assert {len(tensor) for key, tensor in load_file(file).items() if "lora_A" in key} == {8}
    assert describe(file)["mixer"] == "kronecker, folded"
    tensors, metadata = read_raw(tmp_path / "run" / "last" / RAW_NAME)
    stored = sum(tensor.numel() for tensor in tensors.values())
    assert metadata.mixer_factor == 4 and layer_parameters(config, 8, 64) == 2 * 16 + 16
    assert counted(config, size_of_base(tiny_base, config.target_modules, None)) == stored


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_it_is_written_as_a_lokr_too_which_is_read_as_what_was_trained(options, tiny_base, tmp_path, capsys):
    pipeline = load_pipeline(tiny_base)
    components = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    for name, model in components.items():
        targets = ATTENTION_PROJECTIONS if name == "unet" else PROJECTIONS
        inject(model, config(target_modules=list(targets), lora_alpha=11, mixer_factor=4, **options))
        shake(model)
    save_raw(components, tmp_path / RAW_NAME, facts_of(components))
    folder = tmp_path / "out"
    assert main(["export", str(tmp_path / RAW_NAME), "--out", str(folder), "--for", "lycoris", "--name", "dog"]) == 0
    layers = sum(len(adapter_layers(model)) for model in components.values())
    assert f"{layers} layers read back" in capsys.readouterr().out
    file = folder / "dog.lokr.safetensors"
    parts = read_adapter(file, load_pipeline(tiny_base)).parts
    for component, model in components.items():
        (read, scales), wanted = parts[component], fold(model)
        assert read.keys() == wanted.keys()
        for path, layer in wanted.items():
            assert torch.allclose(scales.of(path, layer.rank) * read[path].delta, layer.delta, atol=1e-5)
            assert (read[path].magnitude is None) == ("use_dora" not in options)
    learnt = sum(p.numel() for model in components.values() for _, p in adapter_parameters(model))
    assert sum(tensor.numel() for tensor in load_file(file).values()) == learnt + layers, "and an alpha for each layer"


def test_a_lokr_file_that_would_mean_something_else_is_refused(tmp_path, monkeypatch):
    components = live(mixer="kronecker", r=8, mixer_factor=4)
    save_raw(components, tmp_path / RAW_NAME, facts_of(components))
    monkeypatch.setattr(mixer, "nominal_scale", lambda *_: 1.01 * 11 / 8)
    with pytest.raises(UserError, match="differs from the trained adapter"):
        published_file.write_lokr(tmp_path / RAW_NAME, tmp_path / "dog.lokr.safetensors")
    save_raw(plain := live(), tmp_path / RAW_NAME, facts_of(plain))
    with pytest.raises(UserError, match="is no LoKr"):
        published_file.write_lokr(tmp_path / RAW_NAME, tmp_path / "dog.lokr.safetensors")


def with_facts(file, **facts) -> None:
    tensors, metadata = read_raw(file)
    write_file(file, {RAW_KEY: torch.tensor([1]), **tensors}, replace(metadata, **facts).header)


def test_a_header_that_says_another_factor_is_no_crash(tmp_path):
    file = tmp_path / RAW_NAME
    save_raw(components := live(), file, facts_of(components))
    plain = describe(file)
    with_facts(file, mixer_factor=3)  # which is a LoKr's alone
    assert describe(file) == plain
    save_raw(components := live(mixer="kronecker", r=8, mixer_factor=4), file, facts_of(components))
    content = file.read_bytes()
    for factor in (0, 3, 16):
        file.write_bytes(content)
        with_facts(file, mixer_factor=factor)
        with pytest.raises(UserError, match="is broken"):
            describe(file)
    with pytest.raises(UserError, match="needs ranks"):
        config(mixer_factor=0)


WRONG = [
    (["--mixer_factor", "3"], "--mixer kronecker needs a --rank that --mixer_factor 3 divides, not 8."),
    (["--mixer_factor", "2", "--target_modules", "conv1"], "cannot be a Kronecker product of 2×2 blocks"),
]


@pytest.mark.parametrize("flags, words", WRONG)
def test_a_run_says_what_does_not_fit(flags, words, tiny_base, tmp_path):
    """Before the base is loaded."""
    folder = ["--instance_data_dir", str(paint_photos(tmp_path / "photos")), "--output_dir", str(tmp_path / "run")]
    words_of = ["--instance_prompt", "a sks dog", "--pretrained_model_name_or_path", str(tiny_base)]
    config = parse_train_config([*folder, *words_of, "--mixer", "kronecker", "--rank", "8", *flags])
    with pytest.raises(UserError, match=re.escape(words)):
        check_settings(config)
