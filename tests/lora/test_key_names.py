"""How tools spell the keys of a LoRA: each row of the tables is read as what it is."""

import pytest

from dreambooth_moslora.lora import key_names

KEYS = {
    "unet.a.attn1.to_q.lora_A.weight": ("unet", "a.attn1.to_q", "down", "PEFT keys"),
    "unet.a.lora.up.bias": ("unet", "a", "bias", "diffusers keys"),
    "unet.a.attn1.processor.to_out_lora.up.weight": (
        "unet",
        "a.attn1.to_out.0",
        "up",
        "old diffusers keys",
    ),
    "text_encoder.a.self_attn.to_out_lora.down.weight": (
        "text_encoder",
        "a.self_attn.out_proj",
        "down",
        "old diffusers keys",
    ),
    "text_encoder_2.a.lora_linear_layer.down.weight": (
        "text_encoder_2",
        "a",
        "down",
        "diffusers text encoder keys",
    ),
    "transformer.a.lora_magnitude_vector.weight": ("transformer", "a", "magnitude", "PEFT keys"),
    "lora_unet_a_b.lora_down.weight": ("unet", "a_b", "down", "kohya keys"),
    "lora_te_a_b.lora_up.weight": ("text_encoder", "a_b", "up", "kohya keys"),
    "lora_te1_a_b.alpha": ("text_encoder", "a_b", "alpha", "kohya keys"),
    "lora_te2_a_b.dora_scale": ("text_encoder_2", "a_b", "dora_scale", "kohya keys"),
    "lora_transformer_a_b.lora_up.weight": ("transformer", "a_b", "up", "kohya keys"),
    "lycoris_a_b.hada_w1_a": ("transformer", "a_b", "hada_w1_a", "LyCORIS LoHa"),
    "diffusion_model.a.b.lokr_w2": ("transformer", "a.b", "lokr_w2", "LyCORIS LoKr"),
    "base_model.model.a.lora_B.weight": ("", "a", "up", "PEFT keys"),
    "a.b.lora_B.mixer": ("", "a.b", "mixer", "MoSLoRA in PEFT's form, unfolded"),
    "unet.conv_out.weight": None,
    "unet.a\nb.lora_A.weight": None,
    "lora_A.weight": None,
}


@pytest.mark.parametrize("text", KEYS)
def test_a_key_is_of_whom_and_what_the_tables_say(text):
    key = key_names.parse(text)
    found = key and (key.module.component, key.module.path, key.part, key.tool)
    assert found == KEYS[text]


@pytest.mark.parametrize("row", key_names.ENDINGS, ids=lambda row: row.text)
def test_what_is_spelled_is_read_again(row):
    text = key_names.spell(row.tool, "transformer.a.to_q", row.part)
    key = key_names.parse(text)
    assert (key.module.name, key.part, key.tool) == ("transformer.a.to_q", row.part, row.tool)
