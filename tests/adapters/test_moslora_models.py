"""MoSLoRA on models of transformers (text encoders, LLaMA, LLaVA), on 4-bit bases (QMoSLoRA), in PEFT's own files."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from benchmarks.fold_table import loaded_by_diffusers
from dreambooth_moslora.adapters.describe import summary
from dreambooth_moslora.adapters.mixer import MixerLinear
from dreambooth_moslora.adapters.moslora import (
    ATTENTION_PROJECTIONS,
    MoSLoraConfig,
    adapter_layers,
    adapter_parameters,
    fold,
    inject,
)
from dreambooth_moslora.core import UserError
from tests.adapters.test_moslora import Net, X, config, shake
from tests.helpers.layer_figures import diagnostics
from tests.helpers.tiny import tiny_text_config, tiny_unet

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WORDS = torch.tensor([[3, 7, 9, 1, 30]])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**LLAMA), image_token_index=31, image_seq_length=4)
    )


def in_nf4(model: nn.Module, skipped: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Every linear layer in 4-bit NormalFloat, quantised on the CPU, and the flag that transformers sets then."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.endswith(skipped):
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                quant_type="nf4",
                compute_dtype=torch.float32,
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
            layer.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def forward_of(model: nn.Module) -> torch.Tensor:
    """Scores of a fixed input, whatever the model."""
    torch.manual_seed(1)
    if isinstance(model, LlavaForConditionalGeneration):
        words = torch.cat([torch.full((1, 4), 31), WORDS], dim=1)
        return model(input_ids=words, pixel_values=torch.randn(1, 3, 16, 16)).logits
    if isinstance(model, LlamaForCausalLM):
        return model(input_ids=WORDS).logits
    if isinstance(model, (CLIPTextModel, CLIPTextModelWithProjection)):
        return model(input_ids=WORDS)[0]
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)}
    return model(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 7, 48), added_cond_kwargs=added).sample


def with_folded_weights(model: nn.Module) -> nn.Module:
    """A copy of an adapted model whose projections are plain LoRA pairs: up = s·B·M, down = A, alpha = rank."""
    twin, folded = copy.deepcopy(model), fold(model)
    for path, layer in adapter_layers(twin).items():
        plain = nn.Linear(layer.r["default"], layer.out_features, bias=False)
        plain.weight.data = folded[path].up
        layer.lora_B["default"], layer.scaling["default"] = plain, 1.0
        layer.lora_A["default"].weight.data = folded[path].down
    return twin


MODELS = {
    "text_encoder": (lambda: CLIPTextModel(tiny_text_config(16, 31)), PROJECTIONS),
    "text_encoder_2": (lambda: CLIPTextModelWithProjection(tiny_text_config(32, 31, projection_dim=32)), PROJECTIONS),
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]),
    "llava": (llava, r".*language_model.*\.(q_proj|v_proj)"),
    "unet": (tiny_unet, list(ATTENTION_PROJECTIONS)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dora", [False, True])
def test_both_doors_and_the_fold(name, dora):
    make, targets = MODELS[name]
    settings = MoSLoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=dora)
    torch.manual_seed(2)
    through_peft = get_peft_model(make(), copy.deepcopy(settings)).get_base_model().eval()
    torch.manual_seed(2)
    model = inject(make(), settings).eval()
    states = model.state_dict(), through_peft.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    base = forward_of(model).detach()
    shake(model)
    change = (forward_of(model) - base).detach()
    assert change.abs().max() > 1e-4
    assert (forward_of(with_folded_weights(model)) - base - change).abs().max() <= 1e-5 * max(1, change.abs().max())


@pytest.mark.parametrize("kind", ["llama", "unet"])
@pytest.mark.parametrize("dora", [False, True])
def test_qmoslora_on_a_4_bit_base(kind, dora):
    make, targets = MODELS[kind]
    model = in_nf4(make(), ("lm_head",) if kind == "llama" else ("time_emb_proj", "linear_1", "linear_2"))
    # Training mode, without dropout: in evaluation mode bitsandbytes repacks the weights for inference on the CPU.
    inject(model, MoSLoraConfig(r=4, lora_alpha=4, target_modules=targets, use_dora=dora)).train()
    layers = adapter_layers(model)
    assert all(isinstance(layer.get_base_layer(), bnb.nn.Linear4bit) for layer in layers.values())
    assert all(isinstance(layer.lora_B["default"], MixerLinear) for layer in layers.values())
    shake(model)
    forward_of(model).square().sum().backward()
    for name, parameter in adapter_parameters(model):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        live, folded = forward_of(model), forward_of(with_folded_weights(model))
    assert (live - folded).abs().max() <= 1e-5 * live.abs().max()


def test_training_a_4_bit_llama_lowers_its_loss():
    model = in_nf4(llama())
    inject(model, MoSLoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    optimizer = torch.optim.AdamW([p for _, p in adapter_parameters(model)], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=WORDS, labels=WORDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and summary(diagnostics(model))["mixer_drift_median"] > 0.01


def test_peft_files_come_back_whole_and_a_peft_without_this_package_refuses_them(tmp_path, monkeypatch):
    net = Net()
    fresh = copy.deepcopy(net)
    model = get_peft_model(net, config(mixer="kaiming", lora_alpha=7)).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert isinstance(again.peft_config["default"], MoSLoraConfig) and torch.equal(again(X), model(X))
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "MOSLORA")  # as it is before this package is imported
    with pytest.raises(KeyError, match="MOSLORA"):
        PeftModel.from_pretrained(Net(), tmp_path)


def plain_lora() -> PeftModel:
    return get_peft_model(Net(), LoraConfig(r=4, target_modules=["to_q", "to_k"]))


def test_state_dicts_with_and_without_a_mixer_never_fit_each_other():
    mixed, again = get_peft_model(Net(), config(mixer="kaiming")), get_peft_model(Net(), config(mixer_seed=3))
    shake(mixed)
    state = get_peft_model_state_dict(mixed)
    set_peft_model_state_dict(again, state)
    pairs = zip(adapter_layers(mixed).values(), adapter_layers(again).values(), strict=True)
    assert all(torch.equal(a.get_delta_weight("default"), b.get_delta_weight("default")) for a, b in pairs)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(plain_lora(), state)
    with pytest.raises(RuntimeError, match="plain LoRA's B, and this adapter has a mixer"):
        set_peft_model_state_dict(mixed, get_peft_model_state_dict(plain_lora()))


def test_diffusers_refuses_the_unfolded_state_dict_instead_of_filling_b_with_noise(tmp_path):
    """What diffusers' training scripts do when they save: with a mixer that must not become a LoRA file."""
    unet = inject(tiny_unet(), config(target_modules=list(ATTENTION_PROJECTIONS)))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded_by_diffusers(tiny_unet(), tmp_path / "pytorch_lora_weights.safetensors")


def test_peft_functions_that_write_a_new_b_raise():
    model = get_peft_model(Net(), config())
    shake(model)
    with pytest.raises(UserError, match=r"lora_B\.weight is B·M here and cannot be set"):
        reduce_intruder_dimension(model, logging_sink=None)


def test_adapters_are_swapped_in_place_only_for_their_like(tmp_path):
    net = Net()
    fresh = copy.deepcopy(net)
    model = get_peft_model(net, config()).eval()
    model.save_pretrained(tmp_path / "first")
    shake(model)
    model.save_pretrained(tmp_path / "second")
    swapped = PeftModel.from_pretrained(fresh, tmp_path / "first").eval()
    hotswap_adapter(swapped, tmp_path / "second", "default")
    assert torch.equal(swapped(X), model(X))
    plain_lora().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="incompatible: for mixer"):
        hotswap_adapter(swapped, tmp_path / "plain", "default")


def test_without_a_mixer_the_saved_config_is_plain_pefts(tmp_path, recwarn):
    get_peft_model(Net(), config(mixer="none")).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert type(again.peft_config["default"]) is LoraConfig
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]


def test_full_graph_compilation():
    net = inject(Net(), config()).eval()
    shake(net)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(X), net(X), atol=1e-6)


def test_diagnostics_of_an_untrained_and_a_moved_mixer():
    net = inject(Net(), config())
    figures = diagnostics(net)
    assert all(f.drift == 0 and abs(f.condition_number - 1) < 1e-5 and f.effective_rank == 0 for f in figures.values())
    assert diagnostics(inject(Net(), config(mixer="butterfly")))["to_q"].condition_number == float("inf")
    layer = net.to_q
    with torch.no_grad():
        layer.lora_B["default"].mixer.mul_(1.5)
        layer.lora_A["default"].weight.copy_(torch.eye(4, 12))
        layer.lora_B["default"].up.copy_(torch.eye(10, 4))
    moved = diagnostics(net)["to_q"]
    assert abs(moved.drift - 0.5) < 1e-6 and abs(moved.effective_rank - 4) < 1e-5 and moved.rank == 4
    with torch.no_grad():
        layer.lora_B["default"].up[:, 1:] = 0
    assert abs(diagnostics(net)["to_q"].effective_rank - 1) < 1e-5
