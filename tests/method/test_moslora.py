"""The adapter: the formula, both doors, every mixer, convolutions, which layers a config means,
PEFT's own ways and files, models of transformers, and 4-bit bases (QMoSLoRA)."""

import copy
import pickle
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import StableDiffusionXLPipeline
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraModel
from torch import nn

from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.method import moslora
from dreambooth_moslora.method.mixer import MixerLinear
from dreambooth_moslora.method.moslora import (
    MoSLoraConfig,
    fold,
    get_adapter_layers,
    inject,
    list_adapter_parameters,
)
from dreambooth_moslora.settings.field_facts import ATTENTION_LAYERS, is_target
from dreambooth_moslora.settings.setting_rows import MIXERS
from tests.helpers.folding import loaded_by_diffusers
from tests.helpers.live_adapters import PROJECTIONS, shake, text_encoders
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_adapters import set_scale

MIXED = [kind for kind in MIXERS if kind != "none"]
X = torch.randn(7, 12, generator=torch.Generator().manual_seed(9))
PIXELS = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(2))
PLAIN = LoraConfig(r=4, target_modules=["to_q", "to_k"])


class Net(nn.Module):
    """Two linear layers and an embedding, to aim at."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.words = nn.Embedding(5, 12)
        self.to_q = nn.Linear(12, 10, dtype=dtype)
        self.to_k = nn.Linear(10, 8, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_k(torch.tanh(self.to_q(x)))


def config(**options) -> MoSLoraConfig:
    return MoSLoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k"]} | options)


def adapted(
    seed: int = 0, dtype: torch.dtype = torch.float32, adapter_name: str = "default", **options
) -> Net:
    torch.manual_seed(seed)
    net = inject(Net(dtype), config(**options), adapter_name)
    shake(net, adapter_name)
    return net.eval()


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_is_the_formula_of_the_paper(kind, rslora):
    """A fresh adapter changes nothing."""
    fresh = Net()
    before = fresh(X)
    assert torch.equal(inject(fresh, config(mixer=kind))(X), before)
    net = adapted(mixer=kind, lora_alpha=3, use_rslora=rslora)
    layer = net.to_q
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"]
    scale = 3 / 2 if rslora else 3 / 4
    expected = layer.base_layer(X) + scale * (((X @ a.T) @ b.mixer.T) @ b.up.T)
    assert torch.allclose(layer(X), expected, atol=1e-5)
    change = moslora.get_matrices(layer, "default").fold().delta
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    assert torch.allclose(X @ (weight + change).T + bias, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_fp32_on_a_half_precision_base(dtype):
    """They are fp32 and learn even if PEFT is told not to cast."""
    net = inject(Net(dtype), config(r=8))
    assert {p.dtype for _, p in list_adapter_parameters(net)} == {torch.float32}
    mixer = net.to_q.lora_B["default"].mixer
    assert torch.allclose(mixer @ mixer.T, torch.eye(8), atol=1e-6), (
        "made in half precision it is off by 3e-3"
    )
    model = get_peft_model(Net(dtype), config(), autocast_adapter_dtype=False)
    model(X.to(dtype)).sum().backward()
    assert {p.dtype for _, p in list_adapter_parameters(model)} == {torch.float32}


def test_none_is_plain_peft_lora_bit_for_bit():
    options = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["to_q", "to_k"],
        "init_lora_weights": "gaussian",
    }
    base, states = Net(), []
    for door in (
        lambda net: get_peft_model(net, LoraConfig(**options)).get_base_model(),
        lambda net: inject(net, MoSLoraConfig(mixer="none", **options)),
    ):
        torch.manual_seed(4)
        net = door(copy.deepcopy(base))
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(X).square().sum().backward()
            optimizer.step()
        states.append(net.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("train_mixer", [True, False])
def test_only_the_adapter_learns_and_a_frozen_mixer_stays(train_mixer):
    net = inject(Net(), config(train_mixer=train_mixer))
    net.to_q.set_adapter("default")  # PEFT turns on every parameter of an adapter
    learnt = {id(p) for p in net.parameters() if p.requires_grad}
    assert learnt == {id(p) for _, p in list_adapter_parameters(net)}
    assert len(moslora.list_mixer_parameters(net)) == (2 if train_mixer else 0)
    start = net.to_q.lora_B["default"].mixer.clone()
    shake(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(X).square().sum().backward()
    optimizer.step()
    assert torch.equal(start, net.to_q.lora_B["default"].mixer) == (not train_mixer)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 7}])
def test_merge_and_unmerge(options):
    net = adapted(**options)
    live, weight = net(X), net.to_q.base_layer.weight.clone()
    for method in ("merge", "unmerge"):
        for layer in (net.to_q, net.to_k):
            getattr(layer, method)()
        assert torch.allclose(net(X), live, atol=1e-5)
        assert torch.allclose(net.to_q.base_layer.weight, weight, atol=1e-5) == (
            method == "unmerge"
        )


def test_several_adapters_scale_disable_and_delete():
    net = adapted(seed=1)
    net.to_k.lora_A["default"].weight.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    with moslora.disable_adapters(net):
        alone = net(X)
        assert torch.equal(net.to_q(X), net.to_q.base_layer(X))
    assert flags == [p.requires_grad for p in net.parameters()]
    first, change = net(X), net.to_q(X) - net.to_q.base_layer(X)
    inject(net, config(r=2, mixer="kaiming"), "second")
    shake(net, "second", seed=8)
    assert not torch.allclose(first, net(X), atol=1e-3)
    for layer in get_adapter_layers(net, "second").values():
        layer.set_adapter(["default", "second"])
    second = net.to_q.scaling["second"] * net.to_q.lora_B["second"](net.to_q.lora_A["second"](X))
    assert torch.allclose(net.to_q(X) - net.to_q.base_layer(X) - change, second, atol=1e-5)
    for layer in get_adapter_layers(net).values():
        layer.delete_adapter("second")
        layer.set_adapter("default")
    assert torch.equal(net(X), first)
    set_scale(net, 0.0)
    assert torch.allclose(net(X), alone, atol=1e-6)
    set_scale(net, 1.0)
    assert torch.equal(net(X), first)


def test_dropout_acts_in_training_alone_and_layers_can_be_copied():
    net = adapted(lora_dropout=0.5)
    assert torch.equal(net(X), net(X)) and torch.equal(copy.deepcopy(net)(X), net(X))
    again = pickle.loads(pickle.dumps(net.to_q.lora_B))
    assert torch.equal(again["default"].weight, net.to_q.lora_B["default"].weight)
    with pytest.raises(UserError, match="No adapter named 'dog' in Net; it has: default"):
        fold(net, "dog")
    net.train()
    assert not torch.equal(net(X), net(X))


def test_mixed_batches_name_an_adapter_per_row():
    model = get_peft_model(Net(), config(), "one").eval()
    model.add_adapter("two", config(mixer="kaiming"))
    for seed, name in enumerate(("one", "two")):
        shake(model, name, seed)
    rows = model(X[:3], adapter_names=["two", "__base__", "one"])
    for row, name in ((0, "two"), (2, "one")):
        model.set_adapter(name)
        assert torch.allclose(rows[row], model(X)[row], atol=1e-6)
    with model.disable_adapter():
        assert torch.allclose(rows[1], model(X)[1], atol=1e-6)


def test_autocast_and_full_graph_compilation():
    net = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(X)
    assert torch.allclose(low.float(), net(X), atol=0.1, rtol=0.05)
    assert torch.allclose(torch.compile(net, fullgraph=True, backend="eager")(X), net(X), atol=1e-6)


def test_an_adapter_leaves_the_bases_modules_as_they_were():
    def named(modules) -> list[tuple[str, str]]:
        return [(path, type(module).__name__) for path, module in modules if path]

    options = {"r": 2, "target_modules": ["to_q", "conv1"]}
    wrapped = get_peft_model(
        inject(tiny_unet(), MoSLoraConfig(**options)), MoSLoraConfig(**options), "second"
    )
    plain = named(tiny_unet().named_modules())
    assert (
        named(moslora.get_base_modules(tiny_unet()).items())
        == named(moslora.get_base_modules(wrapped).items())
        == plain
    )
    model = nn.ModuleDict(
        {"line": nn.Linear(2, 3), "norm": nn.LayerNorm(2), "words": nn.Embedding(4, 2)}
    )
    assert list(moslora.get_matrix_layers(model)) == ["line", "words"], "norms have vectors alone"
    unet = inject(
        tiny_unet(), MoSLoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION_LAYERS))
    )
    projections = [path for path, _ in plain if path.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert list(get_adapter_layers(unet)) == projections and unet.active_adapters() == ["default"]
    unet.delete_adapters("default")
    assert not [n for n, _ in unet.named_parameters() if ".default." in n]


def test_targets_are_matched_as_by_peft():
    paths = list(moslora.get_base_modules(tiny_unet()))
    for target in ("to_q", "to_out.0", "conv1", "mid_block.attentions.0.proj_in", "q", "out.0"):
        config = LoraConfig(target_modules=[target])
        assert all(
            bool(LoraModel._check_target_module_exists(config, p)) == is_target(p, target)
            for p in paths
        ), target


BLOCK_NAMES = {
    "mid_block": lambda path: (
        path.startswith("mid_block.") and path.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ),
    "blora_style": lambda path: (
        "up_blocks.0.attentions.1." in path and ".to_" in path and not path.endswith("to_out")
    ),
    "unet.up_blocks.0.attentions.1": lambda path: is_target(path, "blora_style"),
    "down_blocks.1.*": lambda path: path.startswith("down_blocks.1."),
    "*conv1": lambda path: path.endswith(".conv1"),
    "attn1.*": lambda path: ".attn1." in path,
    "down_blocks.*.to_q": lambda path: path.startswith("down_blocks.") and path.endswith(".to_q"),
}


def test_blocks_and_patterns_name_layers_too():
    paths = list(moslora.get_matrix_layers(tiny_unet()))
    for name, is_meant in BLOCK_NAMES.items():
        layers = [path for path in paths if is_target(path, name)]
        assert layers and layers == [path for path in paths if is_meant(path)], name


FOLD = """
import copy, os, sys, torch
from dreambooth_moslora.method.moslora import fold
from tests.method.test_moslora import adapted
from tests.helpers.python_gpu import DEVICE, Watch

nets = [adapted(lora_alpha=7, use_dora=True, mixer="kaiming"), adapted(lora_alpha=7, mixer="none")]
wanted = [fold(net) for net in nets]
Watch.has_fp64 = False
try:
    for net, layers in zip(nets, wanted):
        net = copy.deepcopy(net).to(DEVICE)
        for path, layer in fold(net).items():
            for part in ("down", "up", "magnitude"):
                one, other = getattr(layer, part), getattr(layers[path], part)
                assert (one is None and other is None) or torch.equal(one, other), (path, part)
    print("equal", flush=True)
except BaseException as error:
    print(f"{type(error).__name__}: {error}", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_an_adapter_on_a_device_without_fp64_folds_as_on_the_cpu():
    assert (
        subprocess.check_output([sys.executable, "-c", FOLD], text=True).strip().splitlines()[-1]
        == "equal"
    )


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
        self.line = nn.Conv1d(4, 4, 3)


@pytest.mark.parametrize("name", ["wide", "point", "down"])
@pytest.mark.parametrize("kind", [*MIXED, "none"])
def test_a_convolution_computes_and_merges_by_the_formula(name, kind):
    net = inject(Convolutions(), config(target_modules=[name], lora_alpha=6, mixer=kind))
    layer = getattr(net, name)
    assert torch.equal(layer(PIXELS), layer.base_layer(PIXELS)), "an adapter starts as a no-op"
    shake(net)
    base, down, lora_b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"]
    up = lora_b.weight.flatten(1) if kind == "none" else lora_b.up @ lora_b.mixer
    delta = 6 / 4 * torch.einsum("or,rihw->oihw", up, down)
    expected = F.conv2d(PIXELS, base.weight + delta, base.bias, base.stride, base.padding)
    assert torch.allclose(layer(PIXELS), expected, atol=1e-5)
    assert torch.allclose(fold(net)[name].delta, delta, atol=1e-6)
    for change in (layer.merge, layer.unmerge):
        change()
        assert torch.allclose(layer(PIXELS), expected, atol=1e-5)


CANNOT_CARRY = ["grouped", "dilated", "seamless", "line"]


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("target", CANNOT_CARRY)
def test_a_convolution_that_cannot_carry_a_mixer_is_refused(target):
    for door in (inject, get_peft_model):
        with pytest.raises(UserError, match=f"{target} is a Conv[12]d that cannot carry a mixer"):
            door(Convolutions(), config(target_modules=[target]))


WORDS = torch.tensor([[3, 7, 9, 1, 30]])
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA |= {"vocab_size": 32, "num_key_value_heads": 2}
LLAMAS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]


def compute_output(model: nn.Module) -> torch.Tensor:
    """Scores of a fixed input, whatever the model."""
    torch.manual_seed(1)
    if isinstance(model, transformers.LlamaForCausalLM):
        return model(input_ids=WORDS).logits
    if isinstance(model, (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)):
        return model(input_ids=WORDS)[0]
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)}
    return model(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 7, 48), added_cond_kwargs=added).sample


def fold_weights(model: nn.Module) -> nn.Module:
    """A copy of an adapted model whose projections are plain LoRA pairs: up = s·B·M, down = A,
    alpha = rank."""
    twin, folded = copy.deepcopy(model), fold(model)
    for path, layer in get_adapter_layers(twin).items():
        plain = nn.Linear(layer.r["default"], layer.out_features, bias=False)
        plain.weight.data = folded[path].up
        layer.lora_B["default"], layer.scaling["default"] = plain, 1.0
        layer.lora_A["default"].weight.data = folded[path].down
    return twin


MODELS = {
    **{
        name: (lambda name=name: text_encoders()[name], PROJECTIONS)
        for name in ("text_encoder", "text_encoder_2")
    },
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), LLAMAS),
    "unet": (tiny_unet, list(ATTENTION_LAYERS)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dora", [False, True])
def test_peft_and_inject_agree_and_the_fold_is_exact(name, dora):
    make, targets = MODELS[name]
    settings, models = MoSLoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=dora), []
    for door in (lambda net, config: get_peft_model(net, config).get_base_model(), inject):
        torch.manual_seed(2)
        models.append(door(make(), copy.deepcopy(settings)).eval())
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    model = models[1]
    base = compute_output(model).detach()
    shake(model)
    change = (compute_output(model) - base).detach()
    assert change.abs().max() > 1e-4
    assert (compute_output(fold_weights(model)) - base - change).abs().max() <= 1e-5 * max(
        1, change.abs().max()
    )


@pytest.mark.parametrize("dora", [True, False])
def test_an_adapter_on_a_4_bit_base_learns_and_folds(dora):
    make, targets = MODELS["llama"]
    model = make()
    quantize(model, "nf4", torch.float32)
    # Training mode, without dropout: in evaluation mode bitsandbytes repacks the weights for
    # inference on the CPU.
    inject(model, MoSLoraConfig(r=4, lora_alpha=4, target_modules=targets, use_dora=dora)).train()
    for layer in get_adapter_layers(model).values():
        assert isinstance(layer.get_base_layer(), bnb.nn.Linear4bit)
        assert isinstance(layer.lora_B["default"], MixerLinear)
    shake(model)
    compute_output(model).square().sum().backward()
    for name, parameter in list_adapter_parameters(model):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        live, folded = compute_output(model), compute_output(fold_weights(model))
    assert (live - folded).abs().max() <= 1e-5 * live.abs().max()


def test_state_dicts_with_and_without_mixer_do_not_fit(tmp_path):
    """Files of diffusers' training scripts are refused too, which would otherwise get noise for
    B."""
    mixed, again = (
        get_peft_model(Net(), config(mixer="kaiming")),
        get_peft_model(Net(), config(mixer_seed=3)),
    )
    shake(mixed)
    state, plain = get_peft_model_state_dict(mixed), get_peft_model(Net(), PLAIN)
    set_peft_model_state_dict(again, state)
    pairs = zip(get_adapter_layers(mixed).values(), get_adapter_layers(again).values(), strict=True)
    assert all(
        torch.equal(a.get_delta_weight("default"), b.get_delta_weight("default")) for a, b in pairs
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(plain, state)
    with pytest.raises(RuntimeError, match="plain LoRA's, and this adapter has a mixer"):
        set_peft_model_state_dict(mixed, get_peft_model_state_dict(plain))
    unet = inject(tiny_unet(), config(target_modules=list(ATTENTION_LAYERS)))
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(unet)
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded_by_diffusers(tiny_unet(), tmp_path / "pytorch_lora_weights.safetensors")


EXCLUDED = [{"lora_bias": True, "init_lora_weights": True}, {"init_lora_weights": "pissa"}]


@pytest.mark.parametrize("options", EXCLUDED)
def test_a_variant_that_would_ignore_the_mixer_is_refused(options):
    with pytest.raises(UserError, match=f"{next(iter(options))}.* excludes a mixer"):
        moslora.MoSLoraConfig(**options)
