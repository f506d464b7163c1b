"""Spellings of the keys of a LoRA: each row of the tables is read as what it is."""

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
def test_a_key_is_parsed_into_component_path_part_and_tool(text):
    key = key_names.parse_key(text)
    fields = key and (key.module.component, key.module.path, key.part, key.tool)
    assert fields == KEYS[text]


@pytest.mark.parametrize("row", key_names.ENDINGS, ids=lambda row: row.text)
def test_a_formatted_key_is_parsed_back(row):
    text = key_names.format_key(row.tool, "transformer.a.to_q", row.part)
    key = key_names.parse_key(text)
    assert (key.module.name, key.part, key.tool) == ("transformer.a.to_q", row.part, row.tool)


def test_one_spelling_of_each_part_is_written():
    written = [(row.tool, row.part) for row in key_names.ENDINGS if row.is_written]
    assert len(written) == len(set(written))
    assert set(written) == {(row.tool, row.part) for row in key_names.ENDINGS}

    read = {row.text: row for row in key_names.PREFIXES}
    for component, text in key_names.WRITTEN_PREFIXES.items():
        assert component in read[text].components
    assert read[key_names.WRITTEN_SINGLE_PREFIX].components == ("text_encoder",)


@pytest.mark.parametrize("row", key_names.PREFIXES, ids=lambda row: row.text)
def test_no_earlier_prefix_hides_a_later_one(row):
    assert key_names.parse_key(f"{row.text}a.to_q.lora_A.weight").module.prefix == row
