"""Which layers a model has, and which of them a config means."""

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn

from dreambooth_moslora.adapters.moslora import (
    MoSLoraConfig,
    adapter_layers,
    base_modules,
    inject,
    matrix_layers,
    value_pattern,
)
from dreambooth_moslora.settings.fields import is_target
from tests.helpers.tiny import tiny_unet

TARGETS = ["to_q", "to_out.0", "conv1", "mid_block.attentions.0.proj_in", "q", "out.0"]


def named(model: nn.Module) -> list[tuple[str, str]]:
    return [(path, type(module).__name__) for path, module in base_modules(model).items()]


def test_the_base_has_the_same_modules_with_an_adapter_as_without():
    plain = [(path, type(module).__name__) for path, module in tiny_unet().named_modules() if path]
    options = {"r": 2, "target_modules": ["to_q", "conv1"]}
    wrapped = get_peft_model(inject(tiny_unet(), MoSLoraConfig(**options)), MoSLoraConfig(**options), "second")
    assert named(tiny_unet()) == named(wrapped) == plain


def test_matrix_layers_are_those_whose_weight_is_no_vector():
    model = nn.ModuleDict({"line": nn.Linear(2, 3), "norm": nn.LayerNorm(2), "words": nn.Embedding(4, 2)})
    assert list(matrix_layers(model)) == ["line", "words"]


@pytest.mark.parametrize("target", TARGETS)
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
    net = nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_k": nn.Linear(2, 2)})
    net["inner"] = nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_k": nn.Linear(2, 2)})
    inject(net, MoSLoraConfig(r=3, target_modules=["to_q", "to_k"], rank_pattern=value_pattern(ranks, 3)))
    assert {path: layer.r["default"] for path, layer in adapter_layers(net).items()} == ranks
