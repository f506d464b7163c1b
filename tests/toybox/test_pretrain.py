"""One command from renders to the base: it goes on where it stopped, and its scripts take its
arguments."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from toybox import assemble, pretrain
from toybox.assemble import build_scheduler
from toybox.data import render_dataset
from toybox.data.render_dataset import Shard, write_shard
from toybox.data.renders import Renders
from toybox.data.sample_latents import draw
from toybox.learning import sharpen_decoder, train_clip, train_unet, train_vae
from toybox.learning.sharpen_decoder import sample_crops, sample_renders
from toybox.pretrain import Plan, Stage, build_stages

BASE = Path(__file__).parents[2] / "assets" / "toy-sdxl"


def plan_in(folder: Path) -> Plan:
    return Plan(folder / "work", folder / "assets", minutes=100, steps=7)


def test_a_stopped_pretraining_resumes_at_the_unfinished_stage(tmp_path, monkeypatch):
    calls, works = [], False

    def second(arguments: list[str]) -> None:
        calls.append("second")
        if not works:
            raise KeyboardInterrupt
        (tmp_path / "two").touch()

    def first(arguments: list[str]) -> None:
        calls.append(arguments[0])
        (tmp_path / "one").touch()

    rows = [
        Stage("first", first, ["--quickly"], tmp_path / "one"),
        Stage("second", second, [], tmp_path / "two"),
    ]
    monkeypatch.setattr(pretrain, "build_stages", lambda plan: rows)
    monkeypatch.setattr(assemble, "main", lambda arguments: calls.append("assemble"))
    with pytest.raises(KeyboardInterrupt):
        pretrain.run_stages(plan_in(tmp_path))
    works = True
    assert pretrain.run_stages(plan_in(tmp_path)) == tmp_path / "assets" / "toy-sdxl"
    assert calls == ["--quickly", "second", "second", "assemble"]


def test_each_script_takes_the_arguments_of_its_stage(tmp_path, monkeypatch):
    parsed: list[argparse.Namespace] = []
    for script in (train_vae, train_clip, train_unet, sharpen_decoder):
        monkeypatch.setattr(script, "train", parsed.append)
    shards = []
    monkeypatch.setattr(render_dataset, "write_all", lambda todo, workers: shards.extend(todo))
    by_name = {stage.name: stage for stage in build_stages(plan_in(tmp_path))}
    for name in ("renders", "vae", "clip", "unet", "decoder"):
        by_name[name].run(by_name[name].arguments)
    vae, clip, unet, decoder = parsed
    assert sum(shard.count for shard in shards) == 20_000
    assert [t.minutes for t in parsed] == pytest.approx([30, 8, 34, 8]) and {
        t.steps for t in parsed
    } == {7}
    assert decoder.start == vae.out / "model" and decoder.samples == by_name["samples"].result
    assert unet.clip == clip.out / "model" and unet.latents == by_name["latents"].result


def test_renders_that_are_all_there_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(render_dataset, "SHARD_SIZE", 2)
    for number in range(2):
        write_shard(Shard(tmp_path, number, 2, 1, 16, "cpu", compiled=False))
    monkeypatch.setattr(
        render_dataset, "write_all", lambda todo, workers: pytest.fail("nothing is left to do")
    )
    render_dataset.main(["--out", str(tmp_path), "--count", "4", "--workers", "1"])
    assert (tmp_path / "all.json").is_file()


class Perfect(nn.Module):
    """Predicts the velocity that leads to the latents it was made with."""

    def __init__(self, latents: torch.Tensor):
        super().__init__()
        self.latents, self.alphas = latents, build_scheduler().alphas_cumprod
        self.spreads: list[float] = []  # of what it is shown

    def forward(self, x, t, embeds, added_cond_kwargs):
        self.spreads.append(float(x.float().std()))
        alpha = self.alphas[int(t)]
        noise = (x.float() - alpha.sqrt() * self.latents.repeat(2, 1, 1, 1)) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * self.latents.repeat(2, 1, 1, 1)
        return argparse.Namespace(sample=velocity)


def test_a_perfect_unet_draws_its_latents_from_any_noise():
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        unet = Perfect(latents)
        generated = draw(unet, noise, torch.zeros(2, 77, 8), torch.zeros(2, 8))
        torch.testing.assert_close(generated, latents, rtol=0, atol=1e-3)
        assert unet.spreads[0] == pytest.approx(float(noise.std()), rel=0.02), (
            "it begins with noise alone"
        )


def test_samples_and_renders_are_cropped_at_the_same_place(tmp_path):
    """Latents that hold the render's own mean in each cell stay those of the crop."""
    write_shard(Shard(tmp_path, 0, 1, 1, 128, "cpu", compiled=False))
    renders = Renders(tmp_path)
    means = (
        renders.load_images(range(1))
        .permute(0, 3, 1, 2)
        .float()
        .unflatten(2, (16, 8))
        .unflatten(4, (16, 8))
    )
    latents = means.mean(dim=(3, 5)).div(127.5).sub(1)
    renders.sample = lambda count, generator: torch.randint(1, (count,), generator=generator)
    x = nn.functional.avg_pool2d(
        sample_renders(renders, 3, 64, torch.Generator().manual_seed(2)), 8
    )
    z = sample_crops(latents, 3, 64, torch.Generator().manual_seed(2))
    torch.testing.assert_close(x, z, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_sharpening_moves_the_decoder_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sharpen_decoder, "WARMUP", 1)
    monkeypatch.setattr(train_vae, "CHECKED_COUNT", 16)
    data, samples = tmp_path / "toys", tmp_path / "samples.safetensors"
    data.mkdir()
    np.save(
        data / "images_0000.npy",
        np.random.default_rng(0).integers(0, 255, (1004, 128, 128, 3), np.uint8),
    )
    (data / "scenes_0000.jsonl").write_text("{}\n" * 1004)
    save_file({"latents": torch.randn(4, 4, 16, 16).half()}, samples)
    arguments = [
        "--data",
        data,
        "--samples",
        samples,
        "--start",
        BASE / "vae",
        "--out",
        tmp_path / "out",
    ]
    sharpen_decoder.main([*map(str, arguments), "--steps", "3", "--batch", "4"])
    before = load_file(BASE / "vae" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "out" / "model" / "diffusion_pytorch_model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
