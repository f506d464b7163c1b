"""The adapter: the formula, both doors, every mixer, which layers a config means, what PEFT does with such a layer."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn

from dreambooth_moslora.adapters.moslora import (
    ATTENTION_PROJECTIONS,
    MoSLoraConfig,
    adapter_layers,
    adapter_parameters,
    base_modules,
    disabled,
    fold,
    inject,
    matrices_of,
    matrix_layers,
    mixer_parameters,
    set_scale,
    value_pattern,
)
from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.fields import is_target
from dreambooth_moslora.settings.table import MIXERS
from tests.helpers.tiny import tiny_unet

MIXED = [kind for kind in MIXERS if kind != "none"]


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


def shake(model: nn.Module, adapter_name: str = "default", seed: int = 5) -> None:
    """Stand in for training: move every adapter weight, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, adapter_name):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(seed: int = 0, dtype: torch.dtype = torch.float32, adapter_name: str = "default", **options) -> Net:
    torch.manual_seed(seed)
    net = inject(Net(dtype), config(**options), adapter_name)
    shake(net, adapter_name)
    return net.eval()


X = torch.randn(7, 12, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_is_the_formula_of_the_paper(kind, rslora):
    net = adapted(mixer=kind, lora_alpha=3, use_rslora=rslora)
    layer = net.to_q
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"]
    scale = 3 / 2 if rslora else 3 / 4
    expected = layer.base_layer(X) + scale * (((X @ a.T) @ b.mixer.T) @ b.up.T)
    assert torch.allclose(layer(X), expected, atol=1e-5)
    matrices, weight, bias = matrices_of(layer, "default"), layer.base_layer.weight, layer.base_layer.bias
    assert torch.allclose(matrices.forward(X, weight) + bias, expected, atol=1e-5)
    assert torch.allclose(X @ (weight + matrices.fold().delta).T + bias, expected, atol=1e-5)


@pytest.mark.parametrize("kind", MIXERS)
def test_an_adapter_starts_as_a_no_op(kind):
    net = Net()
    before = net(X)
    assert torch.equal(inject(net, config(mixer=kind))(X), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_fp32_whatever_the_base(dtype):
    net = inject(Net(dtype), config(r=8))
    assert {p.dtype for _, p in adapter_parameters(net)} == {torch.float32}
    mixer = net.to_q.lora_B["default"].mixer
    assert torch.allclose(mixer @ mixer.T, torch.eye(8), atol=1e-6), "made in half precision it is off by 3e-3"


def test_none_is_plain_peft_lora_bit_for_bit():
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k"], "init_lora_weights": "gaussian"}
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


def test_an_identity_mixer_that_is_frozen_is_lora():
    nets = [adapted(mixer=kind, train_mixer=False) for kind in ("identity", "none")]
    assert torch.allclose(nets[0](X), nets[1](X), atol=1e-6)


def test_gradients_are_those_of_the_paper():
    net = adapted()
    layer = net.to_q
    grad = torch.randn(7, 10)
    layer(X).backward(grad)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"]
    g = grad.T @ X  # dL/dΔW (out, in)
    assert torch.allclose(b.up.grad, g @ a.T @ b.mixer.T, rtol=1e-4, atol=1e-5)
    assert torch.allclose(b.mixer.grad, b.up.T @ g @ a.T, rtol=1e-4, atol=1e-5)
    assert torch.allclose(a.grad, b.mixer.T @ b.up.T @ g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_mixer", [True, False])
def test_only_the_adapter_learns_and_a_frozen_mixer_stays(train_mixer):
    net = inject(Net(), config(train_mixer=train_mixer))
    net.to_q.set_adapter("default")  # PEFT turns on every parameter of an adapter
    learnt = {id(p) for p in net.parameters() if p.requires_grad}
    assert learnt == {id(p) for _, p in adapter_parameters(net)}
    assert len(mixer_parameters(net)) == (2 if train_mixer else 0)
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
    for layer in (net.to_q, net.to_k):
        layer.merge()
    assert not torch.allclose(net.to_q.base_layer.weight, weight, atol=1e-2)
    assert torch.allclose(net(X), live, atol=1e-5)
    for layer in (net.to_q, net.to_k):
        layer.unmerge()
    assert torch.allclose(net.to_q.base_layer.weight, weight, atol=1e-5)
    assert torch.allclose(net(X), live, atol=1e-5)


def test_several_adapters_scale_disable_and_delete():
    net = adapted(seed=1)
    with disabled(net):
        alone = net(X)
    first, change = net(X), net.to_q(X) - net.to_q.base_layer(X)
    inject(net, config(r=2, mixer="kaiming"), "second")
    shake(net, "second", seed=8)
    assert not torch.allclose(first, net(X), atol=1e-3)
    for layer in adapter_layers(net, "second").values():
        layer.set_adapter(["default", "second"])
    second = net.to_q.scaling["second"] * net.to_q.lora_B["second"](net.to_q.lora_A["second"](X))
    assert torch.allclose(net.to_q(X) - net.to_q.base_layer(X) - change, second, atol=1e-5)
    for layer in adapter_layers(net).values():
        layer.delete_adapter("second")
        layer.set_adapter("default")
    assert torch.equal(net(X), first)
    set_scale(net, 0.0)
    assert torch.allclose(net(X), alone, atol=1e-6)
    set_scale(net, 1.0)
    assert torch.equal(net(X), first)


def test_disabled_leaves_the_gradient_flags_alone():
    net = adapted()
    net.to_q.lora_A["default"].weight.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    with disabled(net):
        assert torch.equal(net.to_q(X), net.to_q.base_layer(X))
    assert flags == [p.requires_grad for p in net.parameters()]


def test_rank_and_alpha_patterns_and_regex_targets():
    net = adapted(target_modules=r"to_[qk]", rank_pattern={"to_k": 2}, alpha_pattern={"to_q": 16})
    assert net.to_k.lora_B["default"].mixer.shape == (2, 2)
    folded = fold(net)
    assert [len(folded[p].down) for p in ("to_q", "to_k")] == [4, 2]
    assert torch.allclose(
        X @ (folded["to_q"].up @ folded["to_q"].down).T, net.to_q(X) - net.to_q.base_layer(X), atol=1e-5
    )
    assert net.to_q.scaling["default"] == 4 and net.to_k.scaling["default"] == 2


def test_dropout_is_active_in_training_only_and_layers_can_be_copied_and_pickled():
    net = adapted(lora_dropout=0.5)
    assert torch.equal(net(X), net(X))
    assert torch.equal(copy.deepcopy(net)(X), net(X))
    again = pickle.loads(pickle.dumps(net.to_q.lora_B))
    assert torch.equal(again["default"].weight, net.to_q.lora_B["default"].weight)
    net.train()
    assert not torch.equal(net(X), net(X))


def test_a_half_precision_base_trains_where_peft_is_told_not_to_cast():
    model = get_peft_model(Net(torch.bfloat16), config(), autocast_adapter_dtype=False)
    model(X.bfloat16()).sum().backward()
    assert {p.dtype for _, p in adapter_parameters(model)} == {torch.float32}


def test_a_taken_or_unknown_name_is_refused():
    net = adapted()
    with pytest.raises(UserError, match="already has an adapter named 'default'"):
        inject(net, config())
    with pytest.raises(UserError, match="No adapter named 'dog' in Net; it has: default"):
        fold(net, "dog")


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


def test_autocast_and_gradient_checkpointing():
    net = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(X)
    assert torch.allclose(low.float(), net(X), atol=0.1, rtol=0.05)
    net(X).square().sum().backward()
    grads = [p.grad.clone() for _, p in adapter_parameters(net)]
    net.zero_grad()
    torch.utils.checkpoint.checkpoint(net, X, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(g, p.grad) for g, (_, p) in zip(grads, adapter_parameters(net), strict=True))


def test_the_unet_of_sdxl():
    unet = tiny_unet()
    inject(unet, MoSLoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION_PROJECTIONS)))
    linears = [n for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert list(adapter_layers(unet)) == linears
    assert unet.active_adapters() == ["default"]
    unet.delete_adapters("default")
    assert not [n for n, _ in unet.named_parameters() if ".default." in n]


NAMES = ["to_q", "to_out.0", "conv1", "mid_block.attentions.0.proj_in", "q", "out.0"]


def test_the_base_has_the_same_modules_with_an_adapter_as_without():
    def named(modules) -> list[tuple[str, str]]:
        return [(path, type(module).__name__) for path, module in modules if path]

    options = {"r": 2, "target_modules": ["to_q", "conv1"]}
    wrapped = get_peft_model(inject(tiny_unet(), MoSLoraConfig(**options)), MoSLoraConfig(**options), "second")
    plain = named(tiny_unet().named_modules())
    assert named(base_modules(tiny_unet()).items()) == named(base_modules(wrapped).items()) == plain


def test_matrix_layers_are_those_whose_weight_is_no_vector():
    model = nn.ModuleDict({"line": nn.Linear(2, 3), "norm": nn.LayerNorm(2), "words": nn.Embedding(4, 2)})
    assert list(matrix_layers(model)) == ["line", "words"]


@pytest.mark.parametrize("target", NAMES)
def test_the_rule_without_torch_is_pefts_own(target):
    config = LoraConfig(target_modules=[target])
    for path in base_modules(tiny_unet()):
        assert bool(LoraModel._check_target_module_exists(config, path)) == is_target(path, target), path


BLOCK_NAMES = {
    "mid_block": lambda path: path.startswith("mid_block.") and path.endswith(("to_q", "to_k", "to_v", "to_out.0")),
    "blora_style": lambda path: "up_blocks.0.attentions.1." in path and ".to_" in path and not path.endswith("to_out"),
    "unet.up_blocks.0.attentions.1": lambda path: is_target(path, "blora_style"),
    "down_blocks.1.*": lambda path: path.startswith("down_blocks.1."),
    "*conv1": lambda path: path.endswith(".conv1"),
    "attn1.*": lambda path: ".attn1." in path,
    "down_blocks.*.to_q": lambda path: path.startswith("down_blocks.") and path.endswith(".to_q"),
}


@pytest.mark.parametrize("name", BLOCK_NAMES)
def test_blocks_and_patterns_name_layers_too(name):
    paths = list(matrix_layers(tiny_unet()))
    found = [path for path in paths if is_target(path, name)]
    assert found and found == [path for path in paths if BLOCK_NAMES[name](path)]


def test_a_pattern_gives_every_module_its_value_back():
    ranks = {"to_q": 2, "to_k": 3, "inner.to_q": 4, "inner.to_k": 3}
    net, inner = (nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_k": nn.Linear(2, 2)}) for _ in range(2))
    net["inner"] = inner
    inject(net, MoSLoraConfig(r=3, target_modules=["to_q", "to_k"], rank_pattern=value_pattern(ranks, 3)))
    assert {path: layer.r["default"] for path, layer in adapter_layers(net).items()} == ranks


FOLD = """
import copy, os, sys, torch
from dreambooth_moslora.adapters.moslora import fold
from tests.adapters.test_moslora import adapted
from tests.helpers.layer_figures import diagnostics
from tests.helpers.python_gpu import DEVICE, Watch

net = adapted(lora_alpha=7, use_dora=sys.argv[1] == "dora", mixer=sys.argv[2])
wanted, figures = fold(net), diagnostics(net)
Watch.has_fp64 = False
net = copy.deepcopy(net).to(DEVICE)
try:
    found = fold(net)
    for path, layer in found.items():
        for part in ("down", "up", "magnitude"):
            one, other = getattr(layer, part), getattr(wanted[path], part)
            assert (one is None and other is None) or torch.equal(one, other), (path, part)
    assert diagnostics(net) == figures
    print("equal", flush=True)
except BaseException as error:
    print(f"{type(error).__name__}: {error}", flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "mixer"), [("dora", "kaiming"), ("plain", "none")])
def test_an_adapter_on_a_device_without_fp64_folds_as_on_the_cpu(variant, mixer):
    run = [sys.executable, "-c", FOLD, variant, mixer]
    assert subprocess.check_output(run, text=True).strip().splitlines()[-1] == "equal"
