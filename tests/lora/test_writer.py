"""Published files are verified in full fp32, and refused when broken, also for mistakes of the
export.

Raw files come back bit for bit; a broken one, or one of another base or program, is refused in one
line.
"""

import json
import pickle
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from benchmarks.sdxl_structure import count
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME
from dreambooth_moslora.disk.safetensors_header import read_header
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import (
    key_names,
    lora_settings,
    metadata,
    raw_file,
    reader,
    safetensors_file,
    verify,
    writer,
)
from dreambooth_moslora.lora.describe import describe
from dreambooth_moslora.lora.empty_models import build_empty_model, get_model_config
from dreambooth_moslora.lora.key_names import format_kohya_name
from dreambooth_moslora.lora.raw_file import load_raw, save_raw
from dreambooth_moslora.lora.safetensors_file import read_tensors
from dreambooth_moslora.lora.writer import publish
from dreambooth_moslora.method import mixer, moslora
from dreambooth_moslora.method.mixer import LowRank, MixedLowRank
from dreambooth_moslora.method.moslora import (
    MoSLoraConfig,
    fold,
    get_adapter_layers,
    inject,
    list_adapter_parameters,
)
from tests.helpers.folding import BOUND, loaded_by_diffusers, measure, small_unet
from tests.helpers.live_adapters import CONVOLUTIONS, facts_of, live, shake, text_encoders
from tests.helpers.tiers import slow_but
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_families import tiny_pipeline

KOHYA = "dog.kohya.safetensors"


PAIRS = [
    ("orthogonal", "rank pattern"),
    ("kaiming", "DoRA"),
    pytest.param("orthogonal", "alpha ≠ r", marks=pytest.mark.slow),
    pytest.param("identity", "rsLoRA", marks=pytest.mark.slow),
    pytest.param("butterfly", "alpha = r", marks=pytest.mark.slow),
    pytest.param("none", "rank pattern", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_stock_diffusers_computes_the_live_output(kind, variant, tmp_path):
    assert max(measure(kind, variant, tmp_path).values()) <= BOUND


def publish_dog(components, folder, *arguments, **options):
    return publish(components, folder, "dog", facts_of(components), *arguments, **options)


RANKS = {
    "rank_pattern": {"conv_shortcut": 2, "downsamplers.0.conv": 6},
    "alpha_pattern": {"conv_shortcut": 3},
}


@pytest.mark.parametrize("kind", slow_but(("orthogonal",), ("orthogonal", "none")))
@pytest.mark.parametrize(
    "options",
    [{}, RANKS, pytest.param({"use_rslora": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_stock_diffusers_computes_convolutions_like_the_adapter(kind, options, tmp_path):
    """Check also that alpha is the rank in the header, and that lower ranks are padded with
    zeros."""
    components, generator = (
        live(mixer=kind, target_modules=CONVOLUTIONS, **options),
        torch.Generator().manual_seed(4),
    )
    assert facts_of(components).alpha == 11
    proof = publish_dog(components, tmp_path)
    assert proof.max_relative_difference < 1e-6
    for name in (PUBLISHED_NAME, KOHYA):
        header = metadata.AdapterMetadata.from_json(
            read_header(tmp_path / name).metadata["moslora"]
        )
        assert (header.rank, header.alpha, header.use_rslora) == (4, 4, False)
    downs = [
        tensor for key, tensor in load_file(tmp_path / PUBLISHED_NAME).items() if ".lora_A." in key
    ]
    assert {len(down) for down in downs} == {6 if options is RANKS else 4}
    text, pooled, latents = (
        torch.randn(s, generator=generator) for s in ((1, 7, 48), (1, 32), (1, 4, 8, 8))
    )
    added = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
    for file in proof.files:
        nets = loaded_by_diffusers(tiny_unet(), tmp_path / file), components["unet"], tiny_unet()
        with torch.no_grad():
            loaded, expected, bare = (
                net.eval()(latents, 300, text, added_cond_kwargs=added).sample for net in nets
            )
        assert (loaded - expected).norm() <= BOUND * (expected - bare).norm()


def test_kernels_have_the_names_of_other_programs(tmp_path):
    """Compare also with the channels-last memory format."""
    components = live(target_modules=CONVOLUTIONS)
    publish_dog(components, tmp_path)
    path = next(p for p in get_adapter_layers(components["unet"]) if p.endswith("conv1"))
    diffusers, kohya = (load_file(tmp_path / name) for name in (PUBLISHED_NAME, KOHYA))
    down, up = diffusers[f"unet.{path}.lora_A.weight"], diffusers[f"unet.{path}.lora_B.weight"]
    assert down.shape[2:] == (3, 3) and up.shape[2:] == (1, 1)
    assert torch.equal(kohya[f"{format_kohya_name('unet', path)}.lora_down.weight"], down)
    assert torch.equal(kohya[f"{format_kohya_name('unet', path)}.lora_up.weight"], up)
    components["unet"].to(memory_format=torch.channels_last)
    publish_dog(components, tmp_path / "b")
    again = load_file(tmp_path / "b" / PUBLISHED_NAME)
    assert all(torch.equal(diffusers[key], again[key]) for key in diffusers)


def test_proof_and_headers_have_the_facts_that_tools_show(dog):
    folder, components, proof = dog
    assert proof.files == (PUBLISHED_NAME, KOHYA) and all(
        (folder / f).is_file() for f in proof.files
    )
    assert 0 < proof.max_relative_difference < 1e-6 and proof.projections == 112
    assert json.loads(json.dumps(proof.to_dict()))["bound"] == 1e-5
    assert not list(folder.glob(".*")), "scratch is left behind"
    sdxl = count(4)
    assert (sdxl["projections"], round(sdxl["a_and_b"], 2), round(sdxl["mixers"], 3)) == (
        560,
        5.81,
        0.009,
    )
    tensors, header = load_file(folder / KOHYA), read_header(folder / KOHYA).metadata
    names = {key.split(".")[0] for key in tensors}
    assert len(names) == sum(len(get_adapter_layers(m)) for m in components.values())
    for name in names:
        assert tensors[f"{name}.alpha"] == tensors[f"{name}.lora_down.weight"].shape[0] == 4
    unet = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"}
    assert names >= unet | {
        f"lora_te{n}_text_model_encoder_layers_0_self_attn_q_proj" for n in (1, 2)
    }
    assert header["modelspec.title"] == header["ss_output_name"] == "dog"
    assert header["modelspec.trigger_phrase"] == "sks dog" and header[
        "modelspec.architecture"
    ].endswith("/lora")
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    assert header["modelspec.resolution"] == "1024x1024"
    assert facts_of(components, base_id=folder / "private" / "toy-sdxl").base_id == "toy-sdxl"
    for file in (RAW_NAME, PUBLISHED_NAME, KOHYA):
        text = json.dumps(read_header(folder / file).metadata)
        assert not any(
            word in text
            for word in ("/tmp", "/root", "/home", "ss_dataset", "ss_tag", str(folder.parent))
        )


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_the_first_steps_keep_their_bound(dtype, options, tmp_path):
    """Use B as small as after the first optimizer steps: fp16 alone would underflow."""
    components = live(target_modules=["to_q", "to_k"], **options)
    for name, parameter in list_adapter_parameters(components["unet"]):
        if name.endswith("lora_B.up"):
            parameter.data.mul_(1e-6)
    proof = publish_dog(components, tmp_path, dtype)
    assert 0 < proof.max_relative_difference < verify.MAX_DIFFERENCES[dtype]
    types = {
        t.dtype
        for k, t in load_file(tmp_path / PUBLISHED_NAME).items()
        if ".lora_magnitude" not in k
    }
    assert types == {dtype}


FORMS = [{}, {"use_rslora": True, "rank_pattern": {"attn.to_k": 2}}, {"use_dora": True}]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_transformers_file_is_correct_without_its_settings(options, tmp_path):
    """Compare diffusers, which reads the settings, with a loader that takes alpha to be the
    rank."""
    pipeline, components = tiny_pipeline("flux", tmp_path / "files"), {}
    for name, targets in (
        ("transformer", ["attn.to_q", "attn.to_k"]),
        ("text_encoder", ["q_proj", "v_proj"]),
    ):
        config = MoSLoraConfig(r=4, lora_alpha=11, target_modules=targets, **options)
        components[name] = inject(getattr(pipeline, name), config)
        shake(components[name])
    publish_dog(components, tmp_path)
    tensors, header = read_tensors(tmp_path / PUBLISHED_NAME)
    settings = json.loads(header.pop("lora_adapter_metadata"))
    assert settings["transformer.lora_alpha"] == settings["transformer.r"] and len(settings) == 16
    assert "text_encoder.target_modules" in settings
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "x.safetensors", header)
    with_settings = verify.load_stock_layers(tmp_path / PUBLISHED_NAME, components)
    without = verify.load_stock_layers(tmp_path / "bare" / "x.safetensors", components)
    for path, layer in with_settings.items():
        assert torch.equal(
            verify.get_delta(layer, verify.STOCK_ADAPTER),
            verify.get_delta(without[path], verify.STOCK_ADAPTER),
        )
    pipeline = tiny_pipeline("flux", tmp_path / "again")
    reader.check_fits(reader.read_adapter(tmp_path / PUBLISHED_NAME, pipeline), pipeline)


def test_a_layer_with_a_hyphen_may_have_an_alpha():
    last = "all_final_layer.2-1.linear"
    assert lora_settings.match_pattern("transformer", [last, "to_q"], {last: 2}, "x") == {last: 2}


DIFFERS = r"differs from the live adapter by \d"
NO_MIXER = (
    MixedLowRank,
    "fold",
    lambda real, m: LowRank(m.down.detach().clone(), (m.scale * m.up).detach()),
)
NO_ALPHA = (mixer, "compute_scale", lambda real, *_: 1.0)


def swap_factors(real, *arguments):
    swaps = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {
        re.sub("lora_[AB]", lambda match: swaps[match[0]], key): tensor.T.contiguous()
        for key, tensor in real(*arguments).items()
    }


def double_alphas(real, *arguments):
    return {k: 2 * t if k.endswith(".alpha") else t for k, t in real(*arguments).items()}


def test_a_long_loader_error_is_cut_to_its_end():
    text = verify.format_error_end(
        ValueError("StableDiffusionXLPipeline {\n" + "x " * 400 + "\nExpected y")
    )
    assert text.startswith("…") and text.endswith(" Expected y") and len(text) == 200
    assert (
        verify.format_error_end(ValueError("short")) == "short"
        and verify.format_error_end(ValueError()) == "ValueError"
    )


KOHYA_ALPHA, SWAPPED = (
    (key_names, "build_kohya_tensors", double_alphas),
    (writer, "build_published_tensors", swap_factors),
)
SKIPPED = (moslora, "fold", lambda real, *all: dict(list(real(*all).items())[:-1]))


MISTAKES = [
    *((mistake, {}, DIFFERS) for mistake in (NO_MIXER, NO_ALPHA, KOHYA_ALPHA, SWAPPED)),
    # it is not square
    (SWAPPED, {"target_modules": ["attn2.to_k"]}, "the stock loader refuses it"),
    (SKIPPED, {}, "adapts other modules"),
]


@pytest.mark.parametrize(("mistake", "options", "message"), MISTAKES)
def test_a_mistake_in_the_export_is_caught_by_the_proof(
    mistake, options, message, monkeypatch, tmp_path
):
    owner, name, wrong = mistake
    components = live(**{"target_modules": ["attn1.to_q", "attn1.to_k"]} | options)
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: wrong(real, *arguments))
    with pytest.raises(UserError, match=message):
        publish_dog(components, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_and_invalid_names_are_not_saved(tmp_path):
    components = live(target_modules=["attn1.to_q"])
    layer = next(iter(get_adapter_layers(components["unet"]).values()))
    facts, folder = facts_of(components), tmp_path / "none"

    for name in ("", "..", "a/b", "a\nb", "a\udcff"):
        with pytest.raises(UserError, match="cannot be part of a file's name"):
            publish(components, folder, name, facts)
    for value in (float("inf"), float("nan")):
        layer.lora_A["default"].weight.data[0, 0] = value
        with pytest.raises(UserError, match="NaN or infinite"):
            save_raw(components, folder / RAW_NAME, facts)
        with pytest.raises(UserError, match="NaN or infinite"):
            publish(components, folder, "dog", facts)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.fixture
def tf32_switches():
    """Enable TF32 during a test and yield PyTorch's switches, which `monkeypatch` cannot
    restore."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = True
    yield switches
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


def test_comparisons_are_in_full_fp32_and_restore_tf32(tf32_switches, monkeypatch, tmp_path):
    allowed, compare, components = [], verify.compute_relative_difference, live()

    def record_switches(*tensors):
        allowed.append([switch.allow_tf32 for switch in tf32_switches])
        return compare(*tensors)

    monkeypatch.setattr(verify, "compute_relative_difference", record_switches)
    publish_dog(components, tmp_path)
    assert allowed and all(each == [False, False] for each in allowed)
    assert [switch.allow_tf32 for switch in tf32_switches] == [True, True]


ADAPTER_OPTIONS = [
    {},
    {"mixer": "kaiming", "train_mixer": False, "use_rslora": True, "lora_dropout": 0.1},
    {"mixer": "none"},
    {"use_dora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn1.to_q": 3}},
    {"target_modules": CONVOLUTIONS, "mixer": "kaiming"},
    {"target_modules": CONVOLUTIONS, "mixer": "none"},
]


@pytest.mark.parametrize("options", ADAPTER_OPTIONS)
def test_raw_files_round_trip_and_stock_loaders_refuse_them(options, tmp_path):
    components = live(with_text=not options, **options)
    save_raw(components, tmp_path / RAW_NAME, facts_of(components))
    again = {"unet": tiny_unet()} | (text_encoders() if not options else {})
    facts = load_raw(tmp_path / RAW_NAME, again)
    assert (
        facts.trigger_words == ("sks dog",) and facts.class_word == "dog" and facts.versions["peft"]
    )
    for name, model in components.items():
        weights, loaded_weights = model.state_dict(), again[name].state_dict()
        assert weights.keys() == loaded_weights.keys() and all(
            torch.equal(weights[k], loaded_weights[k]) for k in weights
        )
        pairs = zip(
            get_adapter_layers(model).values(),
            get_adapter_layers(again[name]).values(),
            strict=True,
        )
        assert all(
            (a.scaling, a.r, [*a.lora_dropout]) == (b.scaling, b.r, [*b.lora_dropout])
            for a, b in pairs
        )
        trainable = [
            [n for n, p in m.named_parameters() if p.requires_grad] for m in (model, again[name])
        ]
        assert trainable[0] == trainable[1]
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        loaded_by_diffusers(tiny_unet(), tmp_path / RAW_NAME)
    if "conv1" in options.get("target_modules", ()):
        folded, folded_live = reader.fold_raw(tmp_path / RAW_NAME), fold(components["unet"])
        for path, layer in folded_live.items():
            assert torch.equal(folded["unet"][path].down, layer.down)
            assert torch.allclose(folded["unet"][path].up, layer.up, atol=1e-6)
        assert describe(tmp_path / RAW_NAME)["kind"].startswith("raw")


def put_nan(whole, tensors, header):
    return save({k: t * torch.nan if ".lora_A" in k else t for k, t in tensors.items()}, header)


BROKEN = {
    "truncated": (lambda whole, *_: whole[:-100], "truncated or not a safetensors file"),
    "empty": (lambda *_: struct.pack("<Q", 1 << 40), "truncated or not a safetensors file"),
    "pickled": (lambda _, tensors, header: pickle.dumps(tensors), "not a safetensors file"),
    "nan": (put_nan, "NaN or infinite values, first in"),
    "headless": (lambda _, tensors, header: save(tensors), "lost its header"),
}


@pytest.mark.parametrize("kind", [*BROKEN, "published", "absent"])
def test_broken_files_get_one_clear_line(kind, dog, tmp_path):
    raw, file = dog[0] / RAW_NAME, tmp_path / "x.safetensors"
    message = {"published": "loads with load_lora_weights", "absent": "there is no file"}.get(kind)
    if kind == "published":
        file = dog[0] / PUBLISHED_NAME
    elif kind in BROKEN:
        change, message = BROKEN[kind]
        file.write_bytes(change(raw.read_bytes(), *safetensors_file.read_tensors(raw)))
    components = {"unet": tiny_unet()} | text_encoders()
    with pytest.raises(UserError, match=message) as caught:
        load_raw(file, components)
    assert "\n" not in str(caught.value) and not hasattr(components["unet"], "peft_config")


def test_another_base_is_named_with_both_sizes(dog, tmp_path):
    with pytest.raises(
        UserError,
        match=r"another base \(some/base\).*to_k of 16×16 \(out×in\), which is 64×64 here",
    ):
        load_raw(dog[0] / RAW_NAME, {"unet": small_unet()} | text_encoders())
    with pytest.raises(UserError, match="also adapts text_encoder, text_encoder_2"):
        load_raw(dog[0] / RAW_NAME, {"unet": tiny_unet()})
    components, wider_unet = live(target_modules=["conv1"]), tiny_unet()
    save_raw(components, tmp_path / RAW_NAME, facts_of(components))
    for name, module in list(wider_unet.named_modules()):
        if name.endswith("conv1"):
            wider = torch.nn.Conv2d(module.in_channels, module.out_channels, 5, padding=2)
            wider_unet.get_submodule(name.rpartition(".")[0]).conv1 = wider
    with pytest.raises(UserError, match=r"(\d+×\d+)×3×3 \(out×in\), which is \1×5×5 here"):
        load_raw(tmp_path / RAW_NAME, {"unet": wider_unet})
    assert not hasattr(wider_unet, "peft_config")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder, components = tmp_path_factory.mktemp("raw"), live(target_modules=["attn1.to_q"])
    save_raw(components, folder / RAW_NAME, facts_of(components))
    return folder


HOSTILE = [
    {"rank": "four"},
    {"alpha": float("nan")},
    {"alpha": 10**400},
    {"alphas": {"unet.x": "y"}},
    {"mixer": ["orthogonal"]},
    {"trigger_words": 5},
    {"versions": ["1"]},
]


@pytest.mark.parametrize("change", HOSTILE)
def test_a_header_that_is_not_ours_is_refused(change, raw, tmp_path):
    tensors, header = safetensors_file.read_tensors(raw / RAW_NAME)
    facts = json.loads(header["moslora"]) | change
    file = tmp_path / "x.safetensors"
    file.write_bytes(save(tensors, {"moslora": json.dumps(facts)}))
    for read in (raw_file.read_raw, describe):
        with pytest.raises(UserError, match="has lost its header"):
            read(file)


def test_a_header_that_is_no_object_is_refused(raw, tmp_path):
    tensors, file = load_file(raw / RAW_NAME), tmp_path / "x.safetensors"
    for text in ("[]", "null", "5", "{", "{}", "[" * 100_000):
        file.write_bytes(save(tensors, {"moslora": text}))
        with pytest.raises(UserError, match="has lost its header"):
            raw_file.read_raw(file)


ODD_PARTS = [("utils", {}), ("AutoModel", {}), ("UNet2DConditionModel", None)]
ODD_PARTS += [
    ("UNet2DConditionModel", {"block_out_channels": "x"}),
    ("CLIPTextModel", {"vocab_size": -3}),
]


@pytest.mark.parametrize(("name", "config"), ODD_PARTS)
def test_a_file_cannot_choose_other_classes_or_attention_code(name, config):
    with pytest.raises(UserError, match=r"is not a part of a model|cannot be built"):
        build_empty_model({"class": name} | ({} if config is None else {"config": config}))
    config = get_model_config(text_encoders()["text_encoder"])["config"]
    model = build_empty_model(
        {"class": "CLIPTextModel", "config": config | {"attn_implementation": "somebody/kernel"}}
    )
    assert model.config._attn_implementation != "somebody/kernel"


def test_metadata_order_does_not_change_a_files_bytes(tmp_path):
    names = [f"name {number}" for number in range(8)]
    for path, order in ((tmp_path / "a", names), (tmp_path / "b", names[::-1])):
        safetensors_file.write_safetensors(
            path, {"x": torch.arange(3.0), "y": torch.ones(2, 2)}, {name: "ü\n" for name in order}
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors, header = safetensors_file.read_tensors(tmp_path / "a")
    assert (
        tensors["x"].tolist() == [0, 1, 2]
        and list(tensors) == ["x", "y"]
        and header["name 7"] == "ü\n"
    )
