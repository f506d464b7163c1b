"""The old half of compat_old_versions.sh: nothing of this package is imported, only diffusers' loader."""

import sys
from pathlib import Path

import diffusers
import peft
import torch
import transformers
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

BOUND = 1e-5
# diffusers does not read kohya's DoRA, the old one as little as today's.
FILES = ("pytorch_lora_weights.safetensors", "compat.kohya.safetensors")


def fresh_unet(stored):
    known = set(UNet2DConditionModel().config)
    unet = UNet2DConditionModel(**{k: v for k, v in stored["config"].items() if k in known and not k.startswith("_")})
    unet.load_state_dict(stored["weights"])
    return unet.eval()


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    added = {"text_embeds": noise(2, 32), "time_ids": torch.full((2, 6), 128.0)}
    return unet(noise(2, 4, 16, 16), 300, noise(2, 77, 64), added_cond_kwargs=added).sample


def change(stored, folder, file):
    unet = fresh_unet(stored)
    pipeline = StableDiffusionXLPipeline(
        vae=VAE, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, scheduler=None, unet=unet
    )
    pipeline.load_lora_weights(str(folder), weight_name=file)
    return output(unet)


VAE = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)


def main(folder):
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, diffusers, transformers, peft)]
    print(f"In {', '.join(versions)}: largest output difference / largest effect")
    diffusers.utils.logging.set_verbosity_error()
    stored = torch.load(folder / "wanted.pt", weights_only=False)
    before, worst = output(fresh_unet(stored)), 0.0
    for name, place, wanted in stored["cases"]:
        for file in FILES:
            if "DoRA" in name and "kohya" in file:
                continue
            found = change(stored, folder / place, file) - before
            share = float((found - wanted).abs().max() / wanted.abs().max())
            worst = max(worst, share)
            print(f"{name:<26} {file:<34} {share:.1e}")
    print(f"largest {worst:.1e}, bound {BOUND:.0e}: {'kept' if worst <= BOUND else 'BROKEN'}")
    return worst > BOUND


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
