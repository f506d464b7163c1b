"""Assembles the trained parts as `assets/toy-sdxl` (a StableDiffusionXLPipeline) and
`assets/toy-dino`.

python -m toybox.assemble --work WORK --assets assets
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from toybox.learning.build_tokenizer import load

__all__ = ["build_pipeline"]


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL's own sampler settings, for a UNet that predicts velocities."""
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_pipeline(work: Path) -> StableDiffusionXLPipeline:
    """Build the pipeline in fp16 from the folders which the training scripts wrote below `work`."""
    clip = work / "clip" / "model"
    decoder = work / "decoder" / "model"  # the same autoencoder, its decoder trained further
    vae = decoder if decoder.is_dir() else work / "vae" / "model"
    half = {"dtype": torch.float16}
    tokenizer = load(work / "tokenizer")
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(clip / "text_encoder", **half),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(clip / "text_encoder_2", **half),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(
            work / "unet" / "model", torch_dtype=torch.float16
        ),
        scheduler=build_scheduler(),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(clip / "image_encoder", **half),
        feature_extractor=CLIPImageProcessor.from_pretrained(clip / "feature_extractor"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def compute_in_fp32(folder: Path) -> None:
    """Make transformers load the fp16 weights as fp32, as diffusers does with the other parts."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def convert_to_transformers_4(base: Path) -> None:
    """transformers 4 looks for `text_model.` before the keys of a text encoder, and for a
    tokenizer's vocab.json and merges.txt; without them it draws other words than those asked for,
    or fails. transformers 5 reads both."""
    file = base / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    prefixed = {
        f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()
    }
    save_file(prefixed, file, {"format": "pt"})
    for folder in (base / "tokenizer", base / "tokenizer_2"):
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (folder / "vocab.json").write_text(
            json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8"
        )
        (folder / "merges.txt").write_text(
            "\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8"
        )


def remove_origin(folder: Path) -> None:
    """Remove the folder that a part was loaded from from every config."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    args = parser.parse_args(argv)
    base = args.assets / "toy-sdxl"
    build_pipeline(args.work).save_pretrained(base, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2", "image_encoder"):
        compute_in_fp32(base / name)
    remove_origin(base)
    convert_to_transformers_4(base)
    if (args.work / "vit" / "model").exists():
        shutil.copytree(args.work / "vit" / "model", args.assets / "toy-dino", dirs_exist_ok=True)
        compute_in_fp32(args.assets / "toy-dino")
    files = [
        f for name in ("toy-sdxl", "toy-dino") for f in (args.assets / name).rglob("*.safetensors")
    ]
    for file in files:
        print(f"{file.stat().st_size / 1e6:7.2f} MB  {file}")
    print(f"{sum(f.stat().st_size for f in files) / 1e6:7.2f} MB in all")


if __name__ == "__main__":
    main()
