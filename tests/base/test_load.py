"""The base model: names, loading, encoding and decoding. Damaged, foreign or half
fetched ones: `--dry_run` and training refuse them in the same line. One that is a single file, of
any family, is the same model as its folder."""

import copy
import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save, save_file

from dreambooth_moslora.base import decode, devices, load
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.model_files import OTHER_MODELS, list_variants, list_weight_files
from dreambooth_moslora.cli.command_generate import find_runs_base
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.plan import base_size
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.settings.family_facts import ANIMA_NAMES, FAMILIES
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.noise_schedule import build_noise_schedule
from tests.helpers.single_file import (
    PREFIX,
    clip_layout,
    save_single_file,
    unet_layout,
    vae_layout,
    z_image_layout,
)
from tests.helpers.tiny_families import TINY_FAMILIES, tiny_pipeline
from tests.helpers.tiny_training import paint_photos, tiny_config


@pytest.fixture(scope="module")
def pipeline(tiny_base):
    return load.load_pipeline(tiny_base)


def test_a_base_is_loaded_frozen_and_in_the_requested_dtype(tiny_base):
    """The VAE may have a finer dtype."""
    pipeline = load.load_pipeline(tiny_base, dtype=torch.bfloat16)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert part.dtype == torch.bfloat16 and not part.training
        assert not any(p.requires_grad for p in part.parameters())
    exact = StableDiffusionXLPipeline.from_pretrained(tiny_base).vae.decoder.conv_in.weight
    pipeline = load.load_pipeline(tiny_base, dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert pipeline.unet.dtype == torch.bfloat16
    assert torch.equal(pipeline.vae.decoder.conv_in.weight, exact)


def decode_images(vae, latents):
    return decode.to_images(decode.warn_nonfinite_pixels(decode.decode_pixels(vae, latents)))


def test_latents_are_the_scaled_mean_and_decode_to_the_photo(pipeline):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = load.encode_image(pipeline.vae, pixels)
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(
            latents, 0.5 * pipeline.vae.encode(pixels).latent_dist.mean, atol=1e-6
        )
    vae = copy.deepcopy(pipeline.vae)
    vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    assert torch.allclose(load.encode_image(vae, pixels), (latents / 0.5 - 1) / 2 * 0.5, atol=1e-6)
    latents = torch.randn(2, 4, 8, 8) * 0.5
    pictures = decode_images(pipeline.vae, latents)
    with torch.no_grad():
        truth = pipeline.image_processor.postprocess(
            pipeline.vae.decode(latents / 0.5).sample, output_type="np"
        )
    assert [p.size for p in pictures] == [(64, 64)] * 2
    assert np.abs(np.stack([np.asarray(p) for p in pictures]) - 255 * truth).max() <= 1


def test_a_vae_that_overflows_in_fp16_computes_in_fp32(tiny_base, caplog):
    """A VAE whose weights are NaN is refused, and NaN latents, which are not the VAE's fault,
    are warned of."""
    pixels, vae = (
        torch.rand(1, 3, 64, 64),
        StableDiffusionXLPipeline.from_pretrained(tiny_base).vae.half(),
    )
    assert decode_images(vae, torch.zeros(1, 4, 8, 8)) and not caplog.text
    (picture,) = decode_images(vae, torch.full((1, 4, 8, 8), float("nan")))
    assert (
        picture.getextrema() == ((0, 0),) * 3 and "bf16, or no on Nvidia GPUs before" in caplog.text
    )
    assert vae.dtype == torch.float16
    caplog.clear()
    vae.encoder.conv_in.weight.data.fill_(6e4)
    assert load.encode_image(vae, pixels).isfinite().all()
    assert vae.dtype == torch.float32 and "float32" in caplog.text
    vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="VAE"):
        load.encode_image(vae, pixels)


def test_the_noise_schedule_has_the_schedulers_levels(pipeline):
    """An EDM base trains in EDM style, and a base of zero terminal SNR keeps its pure noise."""
    schedule = build_noise_schedule(pipeline.scheduler)
    assert len(schedule) == 1000 and (schedule.style, schedule.prediction_type) == (
        "ddpm",
        "epsilon",
    )
    assert torch.allclose(
        schedule.sigmas, (1 / pipeline.scheduler.alphas_cumprod - 1).sqrt(), rtol=1e-4
    )
    edm = build_noise_schedule(EDMEulerScheduler())
    assert (edm.style, edm.sigma_data) == ("edm", 0.5) and len(edm.sigmas) == len(edm.timesteps)
    zero_snr = EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert build_noise_schedule(zero_snr).sigmas[-1].isinf()
    assert build_noise_schedule(zero_snr, edm_style=True).sigmas.isfinite().all()


@pytest.fixture
def vae(tiny_base):
    """Eight pixels a latent, as SDXL's; notes the shape of each decoded tensor."""
    vae = load.load_pipeline(tiny_base).vae
    vae.shapes = []
    vae.decoder.register_forward_pre_hook(
        lambda _, inputs: vae.shapes.append((len(inputs[0]), *inputs[0].shape[2:]))
    )
    return vae


def test_latents_are_decoded_one_by_one_and_tiling_is_restored(vae, monkeypatch):
    latents = torch.randn(4, 4, 8, 8)
    pixels = decode.decode_pixels(vae, latents)
    assert vae.shapes == [(1, 8, 8)] * 4
    assert torch.equal(
        pixels, torch.cat([decode.decode_pixels(vae, latent[None]) for latent in latents])
    )

    # By a pipeline that decodes by itself, too.
    vae.shapes.clear()
    with decode.enable_tiling(vae, (64, 64), vae.device):
        vae.decode(latents)
    assert vae.shapes == [(1, 8, 8)] * 4 and not vae.use_slicing

    vae.enable_tiling()
    for free, bytes_per_pixel, side in (
        (1.2, 4300, 64),
        (1.0, 4300, 32),
        (1.0, 2600, 64),
        (0.1, 4300, 32),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(devices, "measure_free_gib", lambda device, free=free: free)
            with decode.enable_tiling(vae, (1024, 1024), vae.device, bytes_per_pixel):
                assert vae.tile_latent_min_size == side
    assert vae.use_tiling and vae.tile_latent_min_size == 8


def test_free_memory_includes_the_allocators_unused_blocks(gpu):
    gpu(8, free_gib=3, own_gib=2)
    assert devices.measure_free_gib(torch.device("cuda")) == 5.0


@pytest.mark.parametrize(
    ("gib", "side", "is_tiled"), [(None, 128, 0), (20.0, 128, 0), (3.0, 128, 1), (2.0, 64, 0)]
)
def test_an_image_that_does_not_fit_is_decoded_in_tiles(vae, monkeypatch, gib, side, is_tiled):
    monkeypatch.setattr(devices, "measure_free_gib", lambda device: gib)
    pixels = decode.decode_pixels(vae, torch.randn(1, 4, side, side))
    assert pixels.shape == (1, 3, 8 * side, 8 * side)
    assert max(side for _, *sides in vae.shapes for side in sides) == (64 if is_tiled else side)
    assert (len(vae.shapes) > 1) == bool(is_tiled) and not vae.use_tiling


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\n"
    "size 492265168\n"
)
INDEX = "model_index.json"
UNET, TEXT = (
    Path("unet/diffusion_pytorch_model.safetensors"),
    Path("text_encoder/model.safetensors"),
)


@pytest.fixture
def base(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(file, length):
    file.write_bytes(file.read_bytes()[:length])


DAMAGES = {
    "a pointer for the UNet": (
        lambda base: (base / UNET).write_text(POINTER),
        r"unet.* is a git-lfs pointer",
    ),
    "a pointer for a text encoder": (
        lambda base: (base / TEXT).write_text(POINTER),
        r"text_encoder.*`git lfs pull`",
    ),
    "half a file": (
        lambda base: cut(base / UNET, -1000),
        r"cut short.*not fully covered\): fetch it again",
    ),
    "half a header": (lambda base: cut(base / UNET, 100), r"is damaged, cut short.*header"),
    "an empty file": (
        lambda base: cut(base / UNET, 0),
        r"not a safetensors file \(.*header too small",
    ),
    "no UNet": (lambda base: shutil.rmtree(base / "unet"), "unet is missing"),
    "no weights": (lambda base: (base / UNET).unlink(), "has no weights"),
    "no tokenizer": (lambda base: shutil.rmtree(base / "tokenizer"), "tokenizer is missing"),
    "a broken index": (
        lambda base: (base / INDEX).write_text("{"),
        "model_index.json: it is not valid JSON",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_base_is_refused_in_one_line(name, base):
    damage, says = DAMAGES[name]
    damage(base)
    with pytest.raises(UserError, match=says) as checked:
        Base.find(base).check()
    with pytest.raises(UserError, match=says) as loaded:
        load.load_pipeline(base)
    assert str(checked.value) == str(loaded.value) and "\n" not in str(checked.value)


def test_a_fault_that_only_the_loader_finds_is_one_line(base, tiny_base):
    index = (base / INDEX).read_text()
    change(base / INDEX, text_encoder_2=[None, None])
    with pytest.raises(UserError, match="not an SDXL base model"):
        load.load_pipeline(base)
    (base / INDEX).write_text(index)
    save_file(
        {k: v for k, v in load_file(base / UNET).items() if k != "conv_out.bias"}, base / UNET
    )
    with pytest.raises(UserError, match=r"not whole: the files of its unet have no conv_out\.bias"):
        load.load_pipeline(base)
    shutil.copy(tiny_base / UNET, base / UNET)
    weights = load_file(base / TEXT)
    last = max(name for name in weights if name.endswith("layer_norm2.weight"))
    save_file(weights | {last: torch.zeros(3, 3)}, base / TEXT)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load.load_pipeline(base)
    assert "\n" not in str(caught.value)


def test_only_the_files_that_are_loaded_need_be_whole(base):
    shutil.copy(base / UNET, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    whole = base_size.find_base_size(Base.find(base), ("to_q",))
    (base / UNET).write_text(POINTER)
    half = Base.find(base, variant="fp16")
    half.check()
    assert base_size.find_base_size(half, ("to_q",)) == whole
    with pytest.raises(UserError, match="git-lfs pointer"):
        Base.find(base / UNET)


def test_a_missing_vae_is_refused_in_one_line(base):
    with pytest.raises(UserError, match=r"the VAE .*missing cannot be loaded: "):
        load.load_pipeline(Base.find(base, vae=str(base / "missing")))


@pytest.mark.parametrize("name", ["a.fp16", "a.fp16-00001-of-00002", "a-00001-of-00002.fp16"])
def test_variants_are_read_from_file_names(name, tmp_path):
    for file in (
        f"{name}.safetensors",
        "a.safetensors",
        "a-00001-of-00002.safetensors",
        "b.ema.bin",
        "a.json",
    ):
        (tmp_path / file).touch()
    assert list_variants(tmp_path) == ["fp16"]
    assert [file.stem for file in list_weight_files(tmp_path, "fp16")] == [name]
    assert list_variants(tmp_path / "none") == []


def test_a_base_that_is_local_in_fp16_alone_is_loaded_in_fp16(tiny_base, tmp_path, monkeypatch):
    """Training by the recipe for SDXL fetches the fp16 files alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--owner--half"
    folder = model / "snapshots" / ("0" * 40)
    load.load_pipeline(tiny_base).save_pretrained(folder, variant="fp16")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    for name in (str(folder), "owner/half"):
        assert Base.find(name).local_variant == "fp16"
        assert SubjectPipeline.from_base(name).pipeline.unet.num_parameters()
    # `evaluate` and `generate` find the base of a run by its settings.
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other"))
        run = {
            "pretrained_model_name_or_path": "owner/half",
            "revision": "0" * 40,
            "cache_dir": str(tmp_path),
        }
        RunDir(tmp_path).config_path.write_text(json.dumps(run))
        base = find_runs_base([str(tmp_path)])
        assert base == Base.of_run(TrainConfig(**run))
        assert SubjectPipeline.from_base(base).pipeline.unet.num_parameters()
        with pytest.raises(UserError, match="owner/half cannot be loaded"):
            SubjectPipeline.from_base("owner/half")
    load.load_pipeline(tiny_base).unet.save_pretrained(folder / "unet")
    assert [Base.find(name).local_variant for name in ("owner/half", tiny_base, "owner/none")] == [
        None
    ] * 3


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory):
    """model.safetensors, and beside it `model` with the configs and no weights."""
    folder = tmp_path_factory.mktemp("single")
    shutil.copytree(tiny_base, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return save_single_file(
        StableDiffusionXLPipeline.from_pretrained(tiny_base), folder / "model.safetensors"
    )


def test_a_single_file_is_the_same_model_as_its_folder(checkpoint, tiny_base):
    ours, truth = load.load_pipeline(checkpoint), load.load_pipeline(tiny_base)
    pairs = [
        (getattr(ours, part), getattr(truth, part))
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    ]
    for ours_part, truth_part in pairs:
        actual, expected = ours_part.state_dict(), truth_part.state_dict()
        assert actual.keys() == expected.keys() and all(
            torch.equal(actual[name], expected[name]) for name in expected
        )


WRONG_LAYERS = [
    ({"target_modules": ("to_q", "conv9")}, 'target_modules="conv9": the UNet has no such layer'),
    ({"target_modules": ("to_q", "norm1")}, 'target_modules="norm1": the UNet has no such layer'),
    ({"target_modules": ("conv1",), "use_dora": True}, "use_dora: .*conv1 is a convolution"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG_LAYERS)
def test_wrong_layers_are_refused_before_class_images(changes, says, checkpoint, tmp_path):
    changes |= {
        "with_prior_preservation": True,
        "class_prompt": "a photo of a dog",
        "prior": "class_images",
    }
    with pytest.raises(UserError, match=says):
        train(
            tiny_config(checkpoint, paint_photos(tmp_path / "photos"), tmp_path / "run", **changes)
        )
    assert not (tmp_path / "run" / "class_images").exists()


def odd_copy(checkpoint, folder, tensors):
    """Another file beside a copy of the checkpoint's configs: of tensors or of bytes."""
    shutil.copytree(checkpoint.with_suffix(""), folder / "odd")
    (folder / "odd.safetensors").write_bytes(
        tensors if isinstance(tensors, bytes) else save(tensors)
    )
    return folder / "odd.safetensors"


def test_a_velocity_mark_is_read_and_missing_configs_are_named(checkpoint, tmp_path):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    scheduler = load.load_pipeline(
        odd_copy(checkpoint, tmp_path, load_file(checkpoint) | marks)
    ).scheduler
    assert build_noise_schedule(scheduler).prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    alone = shutil.copy(checkpoint, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="holds weights alone") as error:
        load.load_pipeline(alone)
    assert str(tmp_path / "alone") + "." in str(error.value) and "\n" not in str(error.value)


OTHER_CONTENTS = {
    "no VAE": lambda tensors: {
        name: t for name, t in tensors.items() if not name.startswith("first_stage_model")
    },
    "a LoRA": lambda tensors: {"unet.down_blocks.1.attn.to_q.lora_A.weight": torch.zeros(4, 8)},
    "other widths": lambda tensors: {
        n: t[..., :1].contiguous() if t.ndim else t for n, t in tensors.items()
    },
    "empty": lambda tensors: b"",
    "text": lambda tensors: b"not a checkpoint",
    "JSON": lambda tensors: b"{}" * 10,
}


@pytest.mark.parametrize("kind", OTHER_CONTENTS)
def test_a_file_of_another_content_is_refused_in_one_line(kind, checkpoint, tmp_path):
    with pytest.raises(UserError, match="odd"):
        load.load_pipeline(
            odd_copy(checkpoint, tmp_path, OTHER_CONTENTS[kind](load_file(checkpoint)))
        )


VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def attention_name(name):
    """Of a VAE's attention, as its authors call it."""
    start, middle, suffix = name.partition("mid_block.attentions.0.")
    part, dot, kind = suffix.rpartition(".")
    return f"{start}mid.attn_1.{VAE_ATTENTION[part]}{dot}{kind}" if middle else name


def sd1_layout(pipe):
    vae = vae_layout(pipe.vae.state_dict())
    parts = {
        PREFIX: unet_layout(pipe.unet.state_dict(), pipe.unet.config.layers_per_block),
        "first_stage_model.": {attention_name(name): value for name, value in vae.items()},
        "cond_stage_model.transformer.text_model.": clip_layout(pipe.text_encoder.state_dict()),
    }
    return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}


def anima_layout(pipe):
    """As in circlestone-labs' files, which hold the text conditioner too."""
    names = {"norm_q": "q_norm", "norm_k": "k_norm", "time_embed.norm": "t_embedding_norm"}
    tensors = {
        f"net.llm_adapter.{name}": value
        for name, value in pipe.text_conditioner.state_dict().items()
    }
    for name, value in pipe.transformer.state_dict().items():
        for text, original in (*ANIMA_NAMES, *names.items()):
            name = name.replace(text, original)
        tensors[f"net.{name}"] = value
    return tensors


LAYOUTS = {
    "anima": anima_layout,
    "z_image": lambda pipe: z_image_layout(pipe.transformer.state_dict()),
    "sd1": sd1_layout,
}


@pytest.fixture(params=LAYOUTS)
def family_file(request, tmp_path):
    """The family's facts, its base as a folder, and as a file with the folder's other parts beside
    it."""
    pipe = tiny_pipeline(request.param, tmp_path / "files")
    pipe.save_pretrained(tmp_path / "folder")
    tensors = {
        name: value.clone().contiguous() for name, value in LAYOUTS[request.param](pipe).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    facts = next(facts for facts in FAMILIES if facts.name == request.param)
    parts = (facts.denoiser, *dict(facts.file_parts))
    if facts.style != "flow":
        parts = (facts.denoiser, "vae", "text_encoder")

    def list_weights(folder, names):
        return [
            name
            for name in names
            if name.endswith(".safetensors") and any(f"/{part}" in folder for part in parts)
        ]

    shutil.copytree(tmp_path / "folder", tmp_path / "model", ignore=list_weights)
    return facts, tmp_path / "folder", tmp_path / "model.safetensors"


@pytest.mark.slow
def test_a_familys_file_equals_its_folder_and_trains(family_file, tmp_path):
    facts, folder, file = family_file
    assert Base.find(file).facts is facts
    ours, truth = (
        getattr(load.load_pipeline(base), facts.denoiser).state_dict() for base in (file, folder)
    )
    assert ours.keys() == truth.keys() and all(
        torch.equal(ours[name], truth[name]) for name in truth
    )
    adapters, photos = [], paint_photos(tmp_path / "photos")
    for base in (folder, file):
        out = tmp_path / base.stem / "run"
        train(
            tiny_config(
                base,
                photos,
                out,
                target_modules=("to_q", "to_k", "to_v", "to_out.0"),
                max_train_steps=1,
            )
        )
        adapters.append(load_file(out / "pytorch_lora_weights.safetensors"))
    torch.testing.assert_close(*adapters, rtol=0, atol=5e-5)


def test_a_file_without_its_other_parts_names_its_family(
    family_file,
):
    facts, _, file = family_file
    shutil.rmtree(file.with_suffix(""))
    assert base_size.find_base_size(Base.find(file), ()).family is Base.find(file).facts is facts
    message = "configs that belong to them could not be fetched"
    if facts.style == "flow":
        message = f"holds {facts.title}'s transformer alone"
    with pytest.raises(UserError, match=message):
        load.load_pipeline(file)


@pytest.mark.parametrize("family_file", ["anima"], indirect=True)
def test_a_file_of_anima_has_its_conditioner_and_its_own_depth(family_file, tmp_path):
    """Some fine-tunes have more blocks than the configuration."""
    _, folder, file = family_file
    tensors = load_file(file)
    for name in list(tensors):
        if name.startswith("net.blocks.1."):
            tensors[name.replace("blocks.1.", "blocks.2.")] = tensors[name].clone()
    save_file(tensors, file)
    pipe, truth = load.load_pipeline(file), load.load_pipeline(folder)
    assert len(pipe.transformer.transformer_blocks) == 3
    ours, theirs = (part.text_conditioner.state_dict() for part in (pipe, truth))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(
        pipe.transformer.transformer_blocks[2].attn1.to_q.weight,
        truth.transformer.transformer_blocks[1].attn1.to_q.weight,
    )


@pytest.mark.parametrize("name", [name for name, row in TINY_FAMILIES.items() if row.file_type])
def test_a_familys_marker_tensor_is_also_diffusers(name, tmp_path):
    facts = next(facts for facts in FAMILIES if facts.name == name)
    row = TINY_FAMILIES[name]
    for prefix in ("", PREFIX):
        tensors = {
            prefix + key: torch.zeros(64, 64) for key in (facts.marker_tensor, *row.file_keys)
        }
        save_file(tensors, tmp_path / "one.safetensors")
        assert Base.find(tmp_path / "one.safetensors").facts is facts
        assert infer_diffusers_model_type(tensors) == row.file_type or (
            prefix and name in ("flux", "sana")
        )


@pytest.mark.parametrize(
    "model", [model for model in OTHER_MODELS if model.keys], ids=lambda model: model.title
)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_file_of_an_unsupported_model_is_refused_by_name(model, prefix, tmp_path):
    tensors = {f"{prefix}{key}": torch.zeros(1) for key in model.keys}
    if model.title != "FLUX.1 schnell":
        tensors[f"{prefix}guidance_in.in_layer.bias"] = torch.zeros(1)
    if model.inputs:
        tensors[f"{prefix}img_in.weight"] = torch.zeros(1, model.inputs)
    file = tmp_path / f"some_{model.title.replace(' ', '_')}_fp8.safetensors"
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"is {re.escape(model.title)}, which is no base here"):
        load.load_pipeline(file)


def test_a_file_of_no_family_is_not_called_sdxl(tmp_path):
    save_file({"video.blocks.0.weight": torch.zeros(1)}, tmp_path / "new.safetensors")
    with pytest.raises(UserError, match=r"of no family .*, but video\.blocks") as error:
        load.load_pipeline(tmp_path / "new.safetensors")
    assert "\n" not in str(error.value)


UNSUPPORTED_IDS = {
    "Tongyi-MAI/Z-Image-Turbo": "“turbo” says that it is distilled .*train .* Tongyi-MAI/Z-Image,",
    "black-forest-labs/FLUX.1-schnell": "“schnell” says that it is distilled",
    "city96/Qwen-Image-gguf": "is a GGUF file by its name",
}


@pytest.mark.parametrize("name", UNSUPPORTED_IDS)
def test_an_unsupported_hub_id_is_refused_offline_by_its_name(name, tmp_path):
    config = tiny_config(Path(name), paint_photos(tmp_path / "photos"), tmp_path / "run")
    with pytest.raises(UserError, match=UNSUPPORTED_IDS[name]) as error:
        make_plan(replace(config, pretrained_model_name_or_path=name))
    assert "\n" not in str(error.value)


def test_a_quantised_folder_is_refused_in_the_dry_run(tmp_path):
    tiny_pipeline("z_image", tmp_path / "files").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "transformer" / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    photos = paint_photos(tmp_path / "photos")
    with pytest.raises(UserError, match=r"transformer is quantised already \(bitsandbytes\)"):
        make_plan(tiny_config(tmp_path / "base", photos, tmp_path / "run"))


def test_a_base_chooses_no_kernel_and_runs_no_pickle(tiny_base, tmp_path):
    """A kernel on the hub is code."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = base / "text_encoder" / "config.json"
    kernels = {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel"}
    config.write_text(json.dumps(json.loads(config.read_text()) | kernels))
    loaded = load.load_pipeline(base).text_encoder
    assert "owner" not in str(loaded.config._attn_implementation)

    (base / "text_encoder" / "model.safetensors").unlink()
    (base / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match="base cannot be loaded: ") as error:
        load.load_pipeline(base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_a_flow_decodes_in_tiles_if_memory_is_short(name, tmp_path, monkeypatch):
    """Its pipeline decodes: Qwen-Image's decoder takes 6.8 GiB for a whole image of 1024 px."""
    subject = SubjectPipeline(tiny_pipeline(name, tmp_path), "tiny")
    vae, tiling = subject.pipeline.vae, []
    decode_latents = vae.decode
    monkeypatch.setattr(
        vae,
        "decode",
        lambda *args, **options: tiling.append(vae.use_tiling) or decode_latents(*args, **options),
    )
    params = GenerationParams("a dog", steps=1, height_px=64, width_px=64)
    for free in (None, 1e-4):
        monkeypatch.setattr(devices, "measure_free_gib", lambda device, free=free: free)
        subject.draw(params)
    assert tiling == [False, True] and not vae.use_tiling
