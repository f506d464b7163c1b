"""What compat_old_versions.sh runs. `write FOLDER`, today: published files, and the output change that each live
adapter makes. `read FOLDER`, in the old environment: nothing of this package is imported, only diffusers' loader."""

import copy
import sys
from pathlib import Path

import torch

BOUND = 1e-5
# diffusers does not read kohya's DoRA, the old one as little as today's.
FILES = ("pytorch_lora_weights.safetensors", "compat.kohya.safetensors")


def write(folder: Path) -> int:
    from benchmarks import fold_table
    from dreambooth_moslora.adapters.published_file import publish
    from dreambooth_moslora.adapters.raw_file import adapter_metadata

    kinds = [("orthogonal", variant) for variant in fold_table.VARIANTS]
    kinds += [("kaiming", "alpha ≠ r"), ("none", "rank pattern")]
    base, cases = fold_table.small_unet(), []
    before = fold_table.output(base)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (kind, variant) in enumerate(kinds):
        live = fold_table.adapt(copy.deepcopy(base), kind, variant)
        publish({"unet": live}, folder / str(number), "compat", adapter_metadata({"unet": live}))
        cases.append((f"{kind}, {variant}", str(number), fold_table.output(live) - before))
    torch.save({"weights": base.state_dict(), "config": dict(base.config), "cases": cases}, folder / "wanted.pt")
    return 0


def fresh_unet(stored):
    from diffusers import UNet2DConditionModel

    known = set(UNet2DConditionModel().config)
    unet = UNet2DConditionModel(**{k: v for k, v in stored["config"].items() if k in known and not k.startswith("_")})
    unet.load_state_dict(stored["weights"])
    return unet.eval()


@torch.no_grad()
def output(unet):
    """As `fold_table.output`."""
    generator = torch.Generator().manual_seed(3)
    noise = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    added = {"text_embeds": noise(2, 32), "time_ids": torch.full((2, 6), 128.0)}
    return unet(noise(2, 4, 16, 16), 300, noise(2, 77, 64), added_cond_kwargs=added).sample


def read(folder: Path) -> int:
    import diffusers
    import peft
    import transformers

    versions = [f"{m.__name__} {m.__version__}" for m in (torch, diffusers, transformers, peft)]
    print(f"In {', '.join(versions)}: largest output difference / largest effect")
    diffusers.utils.logging.set_verbosity_error()
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"))
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    stored = torch.load(folder / "wanted.pt", weights_only=False)
    before, worst = output(fresh_unet(stored)), 0.0
    for name, place, wanted in stored["cases"]:
        for file in FILES[:1] if "DoRA" in name else FILES:
            unet = fresh_unet(stored)
            pipeline = diffusers.StableDiffusionXLPipeline(vae=vae, unet=unet, **nothing)
            pipeline.load_lora_weights(str(folder / place), weight_name=file)
            share = float((output(unet) - before - wanted).abs().max() / wanted.abs().max())
            worst = max(worst, share)
            print(f"{name:<26} {file:<34} {share:.1e}")
    print(f"largest {worst:.1e}, bound {BOUND:.0e}: {'kept' if worst <= BOUND else 'BROKEN'}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit({"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2])))
