"""LoRA files of other programs: a file means here what it means in diffusers, also beside other
adapters.

A hostile file is refused in one line, or does no more than its LoRA. LoHa, LoKr, 8-bit floats and
names that diffusers does not read have the ΔW of their definition. An adapter that starts from a
file has its update before the first step, for any rank and mixer.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.lora import (
    key_names,
    raw_file,
    reader,
    verify,
    writer,
)
from dreambooth_moslora.lora.describe import describe
from dreambooth_moslora.lora.lora_settings import PEFT_SETTINGS_KEY
from dreambooth_moslora.method import moslora
from dreambooth_moslora.settings import field_facts
from dreambooth_moslora.settings.setting_rows import MIXERS
from tests.generation.test_pipeline import generate_first, has_difference
from tests.helpers.live_adapters import CONVOLUTIONS, PROJECTIONS, facts_of, live, shake
from tests.helpers.tiers import slow_but
from tests.helpers.tiny import tiny_sdxl, tiny_unet
from tests.helpers.tiny_adapters import base_bytes, save_diffusers_lora, save_kohya_lora
from tests.helpers.tiny_families import tiny_pipeline

PARTS, ATTENTION = ("unet", "text_encoder", "text_encoder_2"), list(field_facts.ATTENTION_LAYERS)
QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def load_into(subject, path, name="x"):
    subject.load_adapter(path, name)
    return subject


def build_pipeline(base, **options):
    """Return a fresh pipeline with moved adapters, and its components."""
    pipeline = SubjectPipeline.from_base(base).pipeline
    components = {name: getattr(pipeline, name) for name in PARTS}
    for name, model in components.items():
        targets = ATTENTION if name == "unet" else PROJECTIONS
        moslora.inject(
            model, moslora.MoSLoraConfig(r=4, lora_alpha=11, target_modules=targets, **options)
        )
        shake(model)
    return pipeline, components


def save_published(base, folder, name=PUBLISHED_NAME, **options):
    """Publish an adapter; return one of its two files."""
    _, components = build_pipeline(base, **options)
    writer.publish(
        components, folder, "dog", raw_file.build_adapter_metadata(components, base_id="tiny")
    )
    return folder / name


def save_peft(base, folder, **options):
    """Save a LoRA as diffusers does, with PEFT's settings in the header."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    config = LoraConfig(r=4, lora_alpha=9, target_modules=ATTENTION, **options)
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    state = {
        k: torch.randn(v.shape, generator=generator) * 0.3
        for k, v in get_peft_model_state_dict(unet).items()
    }
    settings = {
        f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()
    }
    header = {"lora_adapter_metadata": json.dumps(settings, default=str)}
    save_file({f"unet.{k}": v for k, v in state.items()}, folder / "x.safetensors", header)
    return folder / "x.safetensors"


def save_kohya(base, folder):
    """Save a kohya file whose alpha is not the rank."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    tensors = load_file(save_kohya_lora(unet, folder / "x.safetensors"))
    save_file(
        {k: t * 0 + 3 if k.endswith("alpha") else t for k, t in tensors.items()},
        folder / "x.safetensors",
    )
    return folder / "x.safetensors"


PATTERNS = {"rank_pattern": {"to_k": 2, "attn1.to_v": 6}}
PEFT_PATTERNS = PATTERNS | {
    "use_rslora": True,
    "alpha_pattern": {"attn1.to_q": 3, "to_q": 5, "^no": 1},
}
HONEST = {
    "ours": save_published,
    "ours for kohya": partial(save_published, name="dog.kohya.safetensors"),
    "DoRA": partial(save_published, use_dora=True),
    "several ranks": partial(save_published, alpha_pattern={"to_q": 3}, **PATTERNS),
    "PEFT": save_peft,
    "PEFT with patterns": partial(save_peft, **PEFT_PATTERNS),
    "PEFT with biases": partial(save_peft, lora_bias=True),
    "kohya": save_kohya,
}


@pytest.mark.parametrize("kind", slow_but(("ours", "PEFT with patterns", "kohya"), HONEST))
def test_a_file_computes_what_diffusers_computes(kind, tiny_base, subject, tmp_path):
    """Compare also the base afterwards: it is unchanged."""
    file, stock = HONEST[kind](tiny_base, tmp_path), SubjectPipeline.from_base(tiny_base)
    stock.pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    bare, before = generate_first(subject), base_bytes(subject.pipeline)
    image = generate_first(load_into(subject, file), adapters=(("x", 1.0),))
    assert np.array_equal(image, generate_first(stock)) and has_difference(image, bare)
    assert np.array_equal(generate_first(subject), bare)
    subject.unload_adapter("x")
    assert np.array_equal(generate_first(subject), bare) and base_bytes(subject.pipeline) == before


FILES_OF_A_RUN = {
    PUBLISHED_NAME: "dog",
    f"checkpoint-500/{RAW_NAME}": "dog@500",
    f"last/{RAW_NAME}": "dog@last",
    f"best/{PUBLISHED_NAME}": "dog@best",
    "dog.kohya.safetensors": "dog.kohya",
}


@pytest.mark.parametrize("place", FILES_OF_A_RUN)
def test_an_adapter_is_called_after_its_run(place, tmp_path):
    run = RunDir(tmp_path / "dog")
    (run.path / place).parent.mkdir(parents=True)
    (run.path / place).touch()
    run.config_path.touch()
    assert reader.get_adapter_name(run.path / place) == FILES_OF_A_RUN[place]


@pytest.mark.slow
def test_an_adapter_of_only_the_text_encoder_works(tiny_base, state, subject, tmp_path):
    tensors = load_file(save_published(tiny_base, tmp_path))
    save_file(
        {k: t for k, t in tensors.items() if k.startswith("text_encoder.")},
        tmp_path / "words.safetensors",
    )
    save_file(state, tmp_path / "dog.safetensors")
    bare = generate_first(subject)
    encoder_image = generate_first(
        load_into(subject, tmp_path / "words.safetensors", "words"), adapters=(("words", 1.0),)
    )
    dog_image = generate_first(
        load_into(subject, tmp_path / "dog.safetensors", "dog"), adapters=(("dog", 1.0),)
    )
    assert has_difference(encoder_image, bare) and has_difference(dog_image, encoder_image)
    assert np.array_equal(generate_first(subject), bare)
    assert np.array_equal(generate_first(subject, adapters=(("words", 1.0),)), encoder_image)
    assert np.array_equal(generate_first(subject, adapters=(("dog", 1.0),)), dog_image)
    fresh = load_into(SubjectPipeline.from_base(tiny_base), tmp_path / "dog.safetensors", "dog")
    assert np.array_equal(generate_first(fresh, adapters=(("dog", 1.0),)), dog_image)


def test_every_alpha_of_a_kohya_file_counts(tiny_base, tmp_path):
    """Compare with a file whose alphas are folded; diffusers uses only the most common one."""
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    tensors = load_file(save_kohya_lora(unet, tmp_path / "a.safetensors"))
    folded = {}
    for number, key in enumerate(k for k in list(tensors) if k.endswith(".alpha")):
        up = key.replace(".alpha", ".lora_up.weight")
        folded |= {key: tensors[key], up: tensors[up] * 2.0 ** (number % 3)}
        tensors[key] = tensors[key] * 2.0 ** (number % 3)
    save_file(tensors, tmp_path / "alphas.safetensors")
    save_file(tensors | folded, tmp_path / "folded.safetensors")
    assert (
        max_difference(
            *(
                measure_file(tiny_base, tmp_path / f"{name}.safetensors")
                for name in ("alphas", "folded")
            )
        )
        < 1e-6
    )


def add_part(key: str, tensor: torch.Tensor):
    return lambda state: (state | {key: tensor}, None)


def add_pair(path: str, width: int):
    """Add a LoRA of a module that has none."""
    return lambda state: (
        state | {f"{path}.lora_{x}.weight": torch.ones(width, width) for x in "AB"},
        None,
    )


def save_other(folder, state, change):
    """Save the LoRA with changed tensors, or, given a dict, with these PEFT settings in the
    header."""
    tensors, header = (state, None) if isinstance(change, dict) else change(state)
    if isinstance(change, dict):
        settings = {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        } | change
        header = {
            "lora_adapter_metadata": json.dumps(
                {f"unet.{name}": value for name, value in settings.items()}
            )
        }
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / "x.safetensors",
        header,
    )
    return folder / "x.safetensors"


def change_shapes(**shapes):
    """Change shape or dtype of parts of one layer."""
    parts = {f"{QUERY}.{name}.weight": change for name, change in shapes.items()}
    return lambda state: (state | {key: change(state[key]) for key, change in parts.items()}, None)


REFUSED = {
    "a weight of the base": add_part("unet.conv_out.weight", torch.ones(4, 8, 3, 3)),
    "a wrapped weight of the base": add_part(f"{QUERY}.base_layer.weight", torch.ones(16, 16)),
    "a wrapped bias": add_part(
        f"{QUERY.replace('to_q', 'to_out.0')}.base_layer.bias", torch.ones(16)
    ),
    "a LoRA in a LoRA": add_pair(f"{QUERY}.base_layer", 16),
    "a weight of a text encoder": add_part(
        "text_encoder.embeddings.token_embedding.weight", torch.ones(4, 16)
    ),
    "a LoRA on a whole block": add_pair("unet.mid_block.attentions.0", 32),
    "a control LoRA": add_part("unet.lora_controlnet", torch.ones(1)),
    "LoKr": add_part(f"{QUERY}.lokr_w1", torch.ones(4, 4)),
    "a line break": add_part("unet.a\nb.lora_A.weight", torch.ones(4, 4)),
    "settings in a list": lambda state: (state, {"lora_adapter_metadata": "[1]"}),
    "settings without a floor": lambda state: (state, {"lora_adapter_metadata": "[" * 100_000}),
    "four dimensions on a linear layer": change_shapes(
        **dict.fromkeys(("lora_A", "lora_B"), lambda t: t[..., None, None])
    ),
    "a magnitude of another length": add_part(f"{QUERY}.lora_magnitude_vector", torch.ones(7)),
    "rank 0": change_shapes(lora_A=lambda t: t[:0], lora_B=lambda t: t[:, :0]),
    **{name: {"init_lora_weights": name} for name in ("olora", "pissa", "pissa_niter_1")},
    "an alpha by expression": {"alpha_pattern": {"(.*)to_q": 7}},
    "an endless alpha": {"lora_alpha": 10**400},
    "an alpha of no number": {"lora_alpha": float("nan")},
    "an alpha in words": {"lora_alpha": "four"},
    "an alpha in a list": {"alpha_pattern": {"to_q": [1]}},
    "alphas in a list": {"alpha_pattern": ["to_q"]},
}
COMPARED = ("a weight of the base", "a wrapped bias", "olora", "a LoRA in a LoRA")
"""Refused files after which images are compared too."""


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused_and_changes_nothing(name, state, subject, tmp_path):
    images = {}
    if name in COMPARED:
        save_file(state, tmp_path / "good.safetensors")
        images = {(): generate_first(subject)}
        load_into(subject, tmp_path / "good.safetensors", "good")
        images[("good", 1.0),] = generate_first(subject, adapters=(("good", 1.0),))
    before = base_bytes(subject.pipeline)
    adapters_before = list(subject.adapters), subject.pipeline.get_list_adapters()
    with pytest.raises(UserError) as error:
        subject.load_adapter(save_other(tmp_path, state, REFUSED[name]))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert (list(subject.adapters), subject.pipeline.get_list_adapters()) == adapters_before
    assert base_bytes(subject.pipeline) == before
    for adapters, image in images.items():
        assert np.array_equal(generate_first(subject, adapters=adapters), image)


OTHER_SETTINGS = {
    "target_modules": ".*to_q",
    "rank_pattern": {"(.*)to_q": 7},
    "modules_to_save": ["conv_out"],
    "nobody": {"knows": ["this"]},
    "runtime_config": 3,
    "peft_type": "LOHA",
    "megatron_config": {"a": 1},
}


def test_other_settings_of_a_file_do_not_reach_peft(state, subject, tmp_path):
    """Give expressions, whole modules, unknown settings, and an attack on a class."""
    save_file(state, tmp_path / "plain.safetensors")
    plain, bare = (
        generate_first(load_into(subject, tmp_path / "plain.safetensors"), adapters=(("x", 1.0),)),
        generate_first(subject),
    )
    before = base_bytes(subject.pipeline)
    load_into(subject, save_other(tmp_path, state, OTHER_SETTINGS), "settings")
    config = subject.pipeline.unet.peft_config[subject.adapters["settings"].key]
    assert (
        isinstance(config.target_modules, set)
        and not config.rank_pattern
        and config.modules_to_save is None
    )
    assert all(any(f"{name}." in key for key in state) for name in config.target_modules)
    assert np.array_equal(generate_first(subject, adapters=(("settings", 1.0),)), plain)
    assert np.array_equal(generate_first(subject), bare) and base_bytes(subject.pipeline) == before


@pytest.mark.slow
def test_a_failed_load_removes_the_whole_adapter(tiny_base, subject, tmp_path, monkeypatch):
    file = save_published(tiny_base, tmp_path)

    def fail(*_, **__):
        raise RuntimeError("no\nmemory")

    before, bare = base_bytes(subject.pipeline), generate_first(subject)
    with monkeypatch.context() as patch:
        # the text encoders come before it
        patch.setattr(subject.pipeline, "load_lora_into_unet", fail)
        with pytest.raises(UserError, match="could not be put into the base: no memory"):
            subject.load_adapter(file)
    assert not subject.adapters and not any(subject.pipeline.get_list_adapters().values())
    assert base_bytes(subject.pipeline) == before and np.array_equal(generate_first(subject), bare)
    assert has_difference(generate_first(load_into(subject, file), adapters=(("x", 1.0),)), bare)


def measure_changes(pipeline) -> dict[str, torch.Tensor]:
    """Return `component.path` -> W' − W of every adapted layer, as PEFT merges it."""
    changes = {}
    for component in PARTS:
        for path, layer in getattr(pipeline, component).named_modules():
            if isinstance(layer, LoraLayer):
                before = layer.get_base_layer().weight.detach().clone()
                layer.merge()
                changes[f"{component}.{path}"] = layer.get_base_layer().weight.detach() - before
    return changes


def measure_file(base, file) -> dict[str, torch.Tensor]:
    """Return the changes of the base by a file."""
    subject = SubjectPipeline.from_base(base)
    subject.activate(((subject.load_adapter(file), 1.0),))
    return measure_changes(subject.pipeline)


def max_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference of two updates of the same layers."""
    assert actual.keys() == expected.keys() and actual
    return max(
        verify.compute_relative_difference(actual[name], change)
        for name, change in expected.items()
    )


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-5), (torch.float16, verify.MAX_DIFFERENCES[torch.float16])],
)
def test_a_trained_dora_comes_back_from_both_files(dtype, bound, tiny_base, tmp_path):
    pipeline, components = build_pipeline(tiny_base, use_dora=True)
    writer.publish(
        components,
        tmp_path,
        "dog",
        raw_file.build_adapter_metadata(components, base_id="tiny"),
        dtype,
    )
    assert ", DoRA, PEFT keys" in describe(tmp_path / PUBLISHED_NAME)["kind"]
    expected = measure_changes(pipeline)
    for file in (PUBLISHED_NAME, "dog.kohya.safetensors"):
        assert max_difference(measure_file(tiny_base, tmp_path / file), expected) < bound


def save_foreign_dora(base, file, shape=(-1, 1)) -> dict[str, torch.Tensor]:
    """Save DoRA as LyCORIS does, with an alpha that is not the rank; return W' − W by its
    definition.

    W' = dora_scale · (W + ΔW) / ‖W + ΔW‖ for each row, as LyCORIS and PEFT merge it.
    """
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    tensors, expected = load_file(save_kohya_lora(unet, file, size=0.2)), {}
    generator = torch.Generator().manual_seed(2)
    for path, module in unet.named_modules():
        name = key_names.format_kohya_name("unet", path)
        if f"{name}.alpha" not in tensors:
            continue
        weight = module.weight.detach()
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
        moved = (
            weight + 3 / 4 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        )
        magnitude = weight.norm(dim=1, keepdim=True) * (
            1 + 0.3 * torch.rand(len(weight), 1, generator=generator)
        )
        tensors[f"{name}.dora_scale"] = (
            magnitude if shape == (-1, 1) else torch.ones(1, weight.shape[1])
        )
        expected[f"unet.{path}"] = magnitude * moved / moved.norm(dim=1, keepdim=True) - weight
    save_file(tensors, file)
    return expected


def test_foreign_dora_follows_its_definition_or_is_refused(tiny_base, subject, tmp_path):
    file = tmp_path / "x.safetensors"
    expected = save_foreign_dora(tiny_base, file)
    assert describe(file)["kind"] == "DoRA, kohya keys"
    assert max_difference(measure_file(tiny_base, file), expected) < 1e-5
    tensors = load_file(file)
    del tensors[next(key for key in tensors if key.endswith(".dora_scale"))]
    save_file(tensors, file)
    with pytest.raises(UserError, match="holds DoRA for some layers of its unet alone"):
        subject.load_adapter(file)
    save_foreign_dora(tiny_base, file, shape=(1, -1))
    assert "DoRA by columns, which is not read" in describe(file)["kind"]
    with pytest.raises(
        UserError,
        match=r"x.safetensors holds DoRA by the columns of W \(lora_unet.*dora_scale \(1, ",
    ):
        subject.load_adapter(file)


ALPHA = 3.0
KINDS = {
    "LoHa": LoHaConfig(r=2, alpha=ALPHA, target_modules=["to_q"]),
    "LoHa of a high rank": LoHaConfig(r=8, alpha=ALPHA, target_modules=["to_q", "to_k"]),
    "LoHa of convolutions": LoHaConfig(r=2, alpha=ALPHA, target_modules=CONVOLUTIONS),
    "LoHa with cores": LoHaConfig(
        r=2, alpha=ALPHA, target_modules=CONVOLUTIONS, use_effective_conv2d=True
    ),
    "LoKr": LoKrConfig(r=2, alpha=ALPHA, target_modules=["to_q"], decompose_factor=4),
    "LoKr of two products": LoKrConfig(
        r=1, alpha=ALPHA, target_modules=["to_k"], decompose_both=True
    ),
    "LoKr of convolutions": LoKrConfig(r=2, alpha=ALPHA, target_modules=CONVOLUTIONS),
    "LoKr with cores": LoKrConfig(
        r=2, alpha=ALPHA, target_modules=CONVOLUTIONS, use_effective_conv2d=True
    ),
    "LoKr of whole matrices": LoKrConfig(r=64, alpha=64, target_modules=["to_q"]),
}
LYCORIS_QUERY = "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def shake_peft_model(unet, config):
    model, generator = get_peft_model(unet, config), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def save_lycoris(base, file, config, prefix="lycoris") -> dict[str, torch.Tensor]:
    """Write PEFT's LoHa or LoKr under LyCORIS's names; return the ΔW that PEFT computes.

    Two whole matrices have no scale in LyCORIS.
    """
    model, tensors, expected = (
        shake_peft_model(UNet2DConditionModel.from_pretrained(base, subfolder="unet"), config),
        {},
        {},
    )
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "adapter_layer_names") and "default" in layer.scaling:
            is_whole = all("default" in getattr(layer, part, ()) for part in ("lokr_w1", "lokr_w2"))
            scale = layer.scaling["default"] if is_whole else 1
            expected[f"unet.{path}"] = layer.get_delta_weight("default").detach() / scale
            name = f"{prefix}_{path.replace('.', '_')}"
            tensors[f"{name}.alpha"] = torch.tensor(float(config.alpha))
            for kind in layer.adapter_layer_names:
                if "default" in getattr(layer, kind):
                    tensors[f"{name}.{kind}"] = (
                        getattr(layer, kind)["default"].detach().contiguous()
                    )
    save_file(tensors, file)
    return expected


@pytest.mark.parametrize("kind", slow_but(("LoHa", "LoKr"), [*KINDS, "original blocks"]))
def test_a_lycoris_file_changes_weights_by_its_definition(kind, tiny_base, tmp_path):
    """Use also kohya's names, and those of SDXL's original blocks."""
    prefix = "lora_unet" if kind in ("LoKr of two products", "original blocks") else "lycoris"
    expected = save_lycoris(
        tiny_base, file := tmp_path / "x.safetensors", KINDS.get(kind, KINDS["LoHa"]), prefix
    )
    if kind == "original blocks":
        tensors = {
            k.replace("mid_block_attentions_0", "middle_block_1"): t
            for k, t in load_file(file).items()
        }
        assert tensors.keys() != load_file(file).keys()
        save_file(tensors, file)
    assert max_difference(measure_file(tiny_base, file), expected) < 1e-5


RENAMED = {
    "lycoris": lambda component, path: f"lycoris_{path.replace('.', '_')}",
    "PEFT": lambda component, path: f"base_model.model.{path}",
    "bare": lambda component, path: path,
    "dotted": lambda component, path: f"{component}.{path}",
}


@pytest.mark.parametrize("name", slow_but(("lycoris", "PEFT"), RENAMED))
def test_a_file_with_other_names_is_the_same_adapter(name, tiny_base, state, tmp_path):
    updates = []
    for format_name in (RENAMED[name], key_names.format_kohya_name):
        tensors = {}
        for key, tensor in state.items():
            component, _, layer_key = key.partition(".")
            path, side = layer_key.removesuffix(".weight").rsplit(".", 1)
            part = "lora_down.weight" if side == "lora_A" else "lora_up.weight"
            layer_parts = {part: tensor, "alpha": torch.tensor(3.0)}
            tensors |= {
                f"{format_name(component, path)}.{part_name}": value
                for part_name, value in layer_parts.items()
            }
        save_file(tensors, tmp_path / "x.safetensors")
        updates.append(measure_file(tiny_base, tmp_path / "x.safetensors"))
    assert max_difference(*updates) < 1e-6


def test_comfyuis_prefix_keeps_the_headers_settings(tmp_path):
    key, pipeline = "layers.0.attention.to_q", tiny_pipeline("z_image", tmp_path)
    pair = {"A": torch.eye(2, 32), "B": torch.eye(32, 2)}
    tensors = {f"diffusion_model.{key}.lora_{side}.weight": tensor for side, tensor in pair.items()}
    header = {PEFT_SETTINGS_KEY: json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})}
    save_file(tensors, file := tmp_path / "x.safetensors", header)
    _, scales = reader.read_adapter(file, pipeline).parts["transformer"]
    assert scales.get_scale(key, 2) == 3

    # Alphas beside these settings would be ignored.
    save_file(tensors | {f"diffusion_model.{key}.alpha": torch.tensor(1.0)}, file, header)
    with pytest.raises(UserError, match="has both alphas and LoRA settings"):
        reader.read_adapter(file, pipeline)


def test_a_file_of_peft_is_read_with_its_settings(tiny_base, tmp_path):
    """Use the second text encoder, whose names the first one has too."""
    text = SubjectPipeline.from_base(tiny_base).pipeline.text_encoder_2
    config = LoraConfig(
        r=4, lora_alpha=9, target_modules=["q_proj"], alpha_pattern={"layers.1.self_attn.q_proj": 2}
    )
    model = shake_peft_model(text, config)
    model.save_pretrained(tmp_path)
    expected = {
        f"text_encoder_2.{path}": layer.get_delta_weight("default").detach()
        for path, layer in model.base_model.model.named_modules()
        if path.endswith("q_proj")
    }
    assert (
        max_difference(measure_file(tiny_base, tmp_path / "adapter_model.safetensors"), expected)
        < 1e-6
    )


OF_PEFT = {
    "LoRA": LoraConfig(r=4, lora_alpha=9, target_modules=["to_q"]),
    "DoRA": LoraConfig(r=4, lora_alpha=9, target_modules=["to_q"], use_dora=True),
    "biases": LoraConfig(r=4, lora_alpha=9, target_modules=["proj_in"], lora_bias=True),
}


@torch.no_grad()
def predict(unet) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    sizes = (1, 4, 8, 8), (1, 5, 48), (1, 32), (1, 6)
    latents, text, pooled, time_ids = (torch.randn(size, generator=random) for size in sizes)
    return unet(
        latents, 10, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
    ).sample


@pytest.mark.parametrize("kind", OF_PEFT)
def test_a_file_of_peft_computes_what_peft_computes(kind, tiny_base, tmp_path):
    subject, stock = (
        SubjectPipeline.from_base(tiny_base),
        SubjectPipeline.from_base(tiny_base).pipeline.unet,
    )
    bare = predict(stock)
    shake_peft_model(stock, OF_PEFT[kind]).save_pretrained(tmp_path)
    load_into(subject, file := tmp_path / "adapter_model.safetensors").activate((("x", 1.0),))
    change = predict(stock) - bare
    assert (
        verify.compute_relative_difference(predict(subject.pipeline.unet) - bare, change) < 1e-3
        and change.norm() > 1e-3
    )
    if kind == "LoRA":
        assert describe(file)["alpha"] == "9"


def test_another_type_of_peft_is_named(subject, tmp_path):
    config = LoHaConfig(r=4, target_modules=["to_q"])
    get_peft_model(tiny_unet(), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is of PEFT's type 'LOHA', and only LORA"):
        subject.load_adapter(tmp_path / "adapter_model.safetensors")


def test_mixers_that_diffusers_saved_unfolded_are_refused(subject, tmp_path):
    unet = moslora.inject(tiny_unet(), moslora.MoSLoraConfig(r=4, target_modules=["to_q"]))
    unet.save_lora_adapter(tmp_path / "one")
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "other", get_peft_model_state_dict(unet))
    for name in ("one", "other"):
        with pytest.raises(UserError, match=PUBLISHED_NAME):
            subject.load_adapter(tmp_path / name / PUBLISHED_NAME)


def test_a_file_of_save_lora_adapter_keeps_its_settings(tiny_base, tmp_path):
    """Save by `save_lora_adapter`, whose names begin with no component."""
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    generator = torch.Generator().manual_seed(0)
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=9, target_modules=["to_q"], alpha_pattern={"attn2.to_q": 2})
    )
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    unet.save_lora_adapter(tmp_path)
    layers = {path: layer for path, layer in unet.named_modules() if isinstance(layer, LoraLayer)}
    expected = {
        f"unet.{path}": layer.get_delta_weight("default").detach() for path, layer in layers.items()
    }
    assert max_difference(measure_file(tiny_base, tmp_path / PUBLISHED_NAME), expected) < 1e-6
    facts = describe(tmp_path / PUBLISHED_NAME)
    assert facts["alpha"] == "2, 9"


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"alpha_pattern": {"attn2.to_q": 4}}, "4, 9"),
        ({"init_lora_weights": "pissa"}, "9"),  # it is described, but cannot be loaded
    ],
)
def test_a_description_has_the_alphas_of_peft_in_the_header(settings, alpha, state, tmp_path):
    facts = describe(save_other(tmp_path, state, {"lora_alpha": 9} | settings))
    assert facts["alpha"] == alpha
    for broken in ({"lora_alpha": "four"}, {"alpha_pattern": ["to_q"]}):
        with pytest.raises(UserError, match=r"x\.safetensors is broken: "):
            describe(save_other(tmp_path, state, broken))
    for header in ("[1]", "[" * 100_000):
        save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": header})
        with pytest.raises(UserError, match=r"x\.safetensors is broken: its LoRA settings"):
            describe(tmp_path / "x.safetensors")


def test_floats_of_eight_bits_are_cast(tiny_base, state, tmp_path):
    """Cast also where diffusers converts kohya's names."""
    short = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in state.items()}
    save_file(short, tmp_path / "short.safetensors")
    save_file({key: tensor.float() for key, tensor in short.items()}, tmp_path / "long.safetensors")
    actual, expected = (
        measure_file(tiny_base, tmp_path / f"{name}.safetensors") for name in ("short", "long")
    )
    assert max_difference(actual, expected) == 0 and all(
        change.any() for change in expected.values()
    )


def check_refused(subject, folder, tensors, message):
    save_file(tensors, folder / "x.safetensors")
    with pytest.raises(UserError, match=message):
        subject.load_adapter(folder / "x.safetensors")


def test_a_misfit_of_lycoris_is_refused_in_one_line(subject, tmp_path):
    pair = {
        f"{LYCORIS_QUERY}.lokr_w1": torch.ones(4, 4),
        f"{LYCORIS_QUERY}.lokr_w2": torch.ones(2, 2),
    }
    misfit = (
        r"x.safetensors is broken, or was made for another base: "
        r"unet.*attn1.to_q is \d+×\d+ \(out×in\) here"
    )
    check_refused(subject, tmp_path, pair, misfit)
    check_refused(subject, tmp_path, {f"{LYCORIS_QUERY}.lokr_w1": torch.ones(4, 4)}, misfit)
    huge = {
        f"{LYCORIS_QUERY}.lokr_w1": torch.ones(10**6, 1),
        f"{LYCORIS_QUERY}.lokr_w2": torch.ones(1, 10**6),
    }
    check_refused(subject, tmp_path, huge, misfit)
    core = {
        "lokr_w1": torch.ones(1, 1),
        "lokr_t2": torch.ones(1, 1, 1, 1),
        "lokr_w2_a": torch.ones(1, 10**5),
        "lokr_w2_b": torch.ones(1, 10**5),
    }
    core_tensors = {f"{LYCORIS_QUERY}.{part}": tensor for part, tensor in core.items()}
    check_refused(
        subject, tmp_path, core_tensors | {f"{LYCORIS_QUERY}.alpha": torch.ones(1)}, misfit
    )
    check_refused(
        subject,
        tmp_path,
        {"lycoris_nowhere.lokr_w1": torch.ones(4, 4)},
        "such as 'lycoris_nowhere', as LyCORIS",
    )


def test_wrong_settings_beside_a_file_are_refused(subject, tmp_path):
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    width = subject.pipeline.unet.get_submodule(path).in_features
    pair = {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.ones(width, 2)}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": "four"}))
    tensors = {f"base_model.model.{path}.{part}": tensor for part, tensor in pair.items()}
    check_refused(subject, tmp_path, tensors, "an alpha of 'four'")
    (tmp_path / "adapter_config.json").write_text("{")
    check_refused(subject, tmp_path, tensors, "adapter_config.json: it is not valid JSON")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("tokenizer"))


def get_deltas(model):
    return {path: layer.delta for path, layer in moslora.fold(model).items()}


def start_from(file, pipeline, rank=4, mixer="orthogonal", targets=ATTENTION, **options):
    """Return a fresh UNet that starts from the file, and the line about it."""
    unet = tiny_unet()
    config = {
        "r": rank,
        "lora_alpha": 3,
        "mixer": mixer,
        "mixer_seed": 5,
        "target_modules": list(targets),
    }
    moslora.inject(unet, moslora.MoSLoraConfig(**config | options))
    weights = reader.read_start(file, pipeline, options.get("use_dora", False))
    return unet, reader.copy_into_adapter(weights, {"unet": unet})


def read_update(file, pipeline):
    layers, scales = reader.read_adapter(file, pipeline).parts["unet"]
    return {path: scales.alphas[path] / p.rank * p.delta for path, p in layers.items()}


def save_moved(folder, name, **options):
    """Save an adapter that has moved in one of our forms; return the file and its ΔW."""
    components = live(**options)
    folder.mkdir(exist_ok=True)
    if name == RAW_NAME:
        raw_file.save_raw(components, folder / name, facts_of(components))
    else:
        writer.publish(components, folder, "dog", facts_of(components))
    return folder / name, get_deltas(components["unet"])


@pytest.mark.slow
def test_the_update_of_each_kind_of_file_is_the_start(pipeline, tmp_path):
    kohya, halved = tmp_path / "kohya.safetensors", tmp_path / "halved.safetensors"
    save_kohya_lora(pipeline.unet, kohya, seed=1)
    save_file(
        {k: t * 0.5 if k.endswith(".alpha") else t for k, t in load_file(kohya).items()}, halved
    )
    foreign_files = (
        save_diffusers_lora(pipeline.unet, tmp_path / "diffusers", seed=2),
        kohya,
        halved,
    )
    files = [(file, read_update(file, pipeline)) for file in foreign_files]
    files += [
        save_moved(tmp_path / name, name)
        for name in (RAW_NAME, PUBLISHED_NAME, "dog.kohya.safetensors")
    ]
    assert all(
        torch.allclose(files[2][1][path], update / 2) for path, update in files[1][1].items()
    )
    for file, update in files:
        unet, line = start_from(file, pipeline)
        assert max_difference(get_deltas(unet), update) < 2e-6, file
        assert f": {len(update)} layers go on from it, 0 begin anew, and 0 of its" in line, file


@pytest.mark.slow
@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - {"butterfly"}))
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "train_mixer": False, "rank": 9}], ids=str
)
def test_every_mixer_begins_as_the_run_starts_it(mixer, options, pipeline, tmp_path):
    file = save_diffusers_lora(pipeline.unet, tmp_path, seed=3)
    unet, _ = start_from(file, pipeline, mixer=mixer, **options)
    assert max_difference(get_deltas(unet), read_update(file, pipeline)) < (
        1e-3 if mixer == "kaiming" else 2e-6
    )
    settings = {"mixer": mixer, "mixer_seed": 5, "target_modules": ATTENTION}
    fresh = moslora.inject(tiny_unet(), moslora.MoSLoraConfig(r=options.get("rank", 4), **settings))
    mixers = [
        {n: t for n, t in model.state_dict().items() if n.endswith(".mixer")}
        for model in (unet, fresh)
    ]
    assert mixers[0].keys() == mixers[1].keys() and bool(mixers[0]) == (mixer != "none")
    assert all(torch.equal(mixers[0][name], mixers[1][name]) for name in mixers[0])


@pytest.mark.slow
def test_convolutions_and_text_encoders_begin_too(dog, pipeline, tmp_path):
    file, update = save_moved(
        tmp_path, PUBLISHED_NAME, target_modules=[*ATTENTION, "conv1", "conv_shortcut"]
    )
    unet, _ = start_from(file, pipeline, rank=5, targets=[*ATTENTION, "conv1", "conv_shortcut"])
    assert max_difference(get_deltas(unet), update) < 2e-6
    assert any("conv1" in path for path in get_deltas(unet))
    folder, components, _ = dog
    moslora.inject(pipeline.text_encoder, moslora.MoSLoraConfig(r=4, target_modules=["q_proj"]))
    weights = reader.read_start(folder, pipeline, False)
    reader.copy_into_adapter(weights, {"text_encoder": pipeline.text_encoder})
    expected, actual = get_deltas(components["text_encoder"]), get_deltas(pipeline.text_encoder)
    assert max_difference(actual, {path: expected[path] for path in actual}) < 2e-6


def test_a_higher_rank_is_reduced_to_the_best_of_the_runs_rank(pipeline, tmp_path):
    file = save_diffusers_lora(pipeline.unet, tmp_path, seed=4, rank=6)
    update = read_update(file, pipeline)
    unet, _ = start_from(file, pipeline, rank=2)
    for path, delta in get_deltas(unet).items():
        sizes = torch.linalg.svdvals(update[path].double())
        best = float(sizes[2:].norm())
        assert float((update[path] - delta).norm()) == pytest.approx(best, rel=1e-3), path


@pytest.mark.slow
def test_rows_that_a_file_pads_with_zeros_can_be_trained(pipeline, tmp_path):
    """Start from a padded file of several ranks: a row that is zero in A and B has no gradient."""
    file, _ = save_moved(tmp_path, PUBLISHED_NAME, rank_pattern={"to_k": 1})
    unet, _ = start_from(file, pipeline, rank=4)
    downs = [p for name, p in moslora.list_adapter_parameters(unet) if ".lora_A." in name]
    assert all((down != 0).any(1).all() for down in downs)


def test_layers_in_only_one_side_are_counted_in_one_line(pipeline, tmp_path):
    file = save_diffusers_lora(pipeline.unet, tmp_path)
    unet, line = start_from(file, pipeline, targets=["to_q", "proj_in"])
    fresh = len(get_deltas(unet))
    common = sum(path.endswith("to_q") for path in get_deltas(unet))
    assert f": {common} layers go on from it, {fresh - common} begin anew, and " in line
    with pytest.raises(
        UserError, match=r"no layer of it is trained here \(it holds unet.*, the run trains unet"
    ):
        start_from(file, pipeline, targets=["proj_in"])


@pytest.mark.slow
def test_dora_starts_only_from_dora(pipeline, tmp_path):
    plain = save_diffusers_lora(pipeline.unet, tmp_path / "plain")
    file, update = save_moved(tmp_path, PUBLISHED_NAME, use_dora=True)
    stored = {k: t for k, t in load_file(file).items() if "magnitude" in k}
    assert len(stored) == len(update)
    for dora_file in (file, tmp_path / "dog.kohya.safetensors"):
        unet, _ = start_from(dora_file, pipeline, use_dora=True)
        parameters = {
            f"unet.{name.removesuffix('.weight')}": p
            for name, p in moslora.list_adapter_parameters(unet)
        }
        assert {name for name in parameters if "magnitude" in name} == stored.keys()
        assert all(torch.equal(parameters[name], stored[name]) for name in stored)
    with pytest.raises(UserError, match="it holds DoRA: give --use_dora"):
        start_from(file, pipeline)
    with pytest.raises(UserError, match="it holds no DoRA: leave --use_dora out"):
        start_from(plain, pipeline, use_dora=True)


def test_a_start_from_another_base_is_refused_in_one_line(pipeline, tmp_path):
    """Refuse also numbers beyond single precision, where a lower rank needs an SVD."""
    state = {f"unet.x.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"--init_adapter: x.safetensors was made for another base"):
        start_from(tmp_path / "x.safetensors", pipeline)
    file = save_diffusers_lora(pipeline.unet, tmp_path)
    save_file({key: torch.full_like(t.double(), 1e200) for key, t in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"is broken: .* beyond single precision"):
        start_from(file, pipeline, rank=2)
