"""One command from renders to the base: it goes on where it stopped, and its scripts take its arguments."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from toybox import assemble, pretrain, render_dataset, train_clip, train_unet, train_vae
from toybox.assemble import scheduler
from toybox.build_tokenizer import build
from toybox.data import Renders
from toybox.estimate_latents import is_whole, resample, start_steps
from toybox.pretrain import Plan, Stage, stages
from toybox.render_dataset import Shard, write_shard
from toybox.train_vae import estimated

BASE = Path(__file__).parents[2] / "assets" / "toy-sdxl"


def plan_in(folder: Path) -> Plan:
    return Plan(folder / "work", folder / "assets", minutes=100, steps=7)


def test_a_stopped_pretraining_goes_on_with_the_stage_that_was_not_finished(tmp_path, monkeypatch):
    calls, works = [], False

    def second(arguments: list[str]) -> None:
        calls.append("second")
        if not works:
            raise KeyboardInterrupt
        (tmp_path / "two").touch()

    def first(arguments: list[str]) -> None:
        calls.append(arguments[0])
        (tmp_path / "one").touch()

    rows = [Stage("first", first, ["--quickly"], tmp_path / "one"), Stage("second", second, [], tmp_path / "two")]
    monkeypatch.setattr(pretrain, "stages", lambda plan: rows)
    monkeypatch.setattr(assemble, "main", lambda arguments: calls.append("assemble"))
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(plan_in(tmp_path))
    works = True
    assert pretrain.pretrain(plan_in(tmp_path)) == tmp_path / "assets" / "toy-sdxl"
    assert calls == ["--quickly", "second", "second", "assemble"]


def test_each_script_takes_the_arguments_of_its_stage(tmp_path, monkeypatch):
    taken: list[argparse.Namespace] = []
    for script in (train_vae, train_clip, train_unet):
        monkeypatch.setattr(script, "train", taken.append)
    shards = []
    monkeypatch.setattr(render_dataset, "write_all", lambda todo, workers: shards.extend(todo))
    by_name = {stage.name: stage for stage in stages(plan_in(tmp_path))}
    for name in ("renders", "vae", "clip", "unet", "decoder"):
        by_name[name].run(by_name[name].arguments)
    vae, clip, unet, decoder = taken
    assert sum(shard.count for shard in shards) == 20_000
    assert [t.minutes for t in taken] == pytest.approx([30, 8, 34, 8]) and {t.steps for t in taken} == {7}
    assert decoder.decoder_only and not vae.decoder_only and decoder.start == vae.out / "model"
    assert unet.clip == clip.out / "model" and unet.latents == by_name["latents"].result


def test_renders_that_are_all_there_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(render_dataset, "SHARD", 2)
    for number in range(2):
        write_shard(Shard(tmp_path, number, 2, 1, 16, "cpu", compiled=False))
    monkeypatch.setattr(render_dataset, "write_all", lambda todo, workers: pytest.fail("nothing is left to do"))
    render_dataset.main(["--out", str(tmp_path), "--count", "4", "--workers", "1"])
    assert (tmp_path / "all.json").is_file()


class Perfect(nn.Module):
    """Predicts the velocity that leads to the latents it was made with."""

    def __init__(self, latents: torch.Tensor):
        super().__init__()
        self.latents, self.alphas = latents, scheduler().alphas_cumprod

    def forward(self, x, t, embeds, added_cond_kwargs):
        alpha = self.alphas[int(t)]
        noise = (x.float() - alpha.sqrt() * self.latents.repeat(2, 1, 1, 1)) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * self.latents.repeat(2, 1, 1, 1)
        return argparse.Namespace(sample=velocity)


def test_a_perfect_unet_finds_the_latents_again_from_any_noise():
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions, time_ids = (torch.zeros(2, 77, 8), torch.zeros(2, 8)), torch.zeros(2, 6)
    for seed in range(3):
        found = resample(Perfect(latents), latents, conditions, time_ids, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found, latents, rtol=0, atol=1e-3)


def test_noise_starts_between_its_bounds():
    sampler = scheduler()
    sampler.set_timesteps(30)
    levels = sampler.sigmas[start_steps(sampler)]
    assert len(levels) > 5 and levels.min() >= 0.15 and levels.max() <= 1.5


def test_only_a_whole_render_counts_as_one():
    assert is_whole(torch.tensor([384, 384, 0, 0, 128, 128]))
    assert not is_whole(torch.tensor([150, 150, 3, 0, 128, 128])), "a crop"
    assert not is_whole(torch.tensor([64, 64, 0, 0, 128, 128])), "a small photo"


def test_estimates_and_renders_are_cropped_alike(tmp_path):
    """Latents that hold the render's own mean in each cell stay those of the crop."""
    write_shard(Shard(tmp_path, 0, 4, 1, 128, "cpu", compiled=False))
    renders = Renders(tmp_path)
    means = renders.images(range(4)).permute(0, 3, 1, 2).float().unflatten(2, (16, 8)).unflatten(4, (16, 8))
    latents = means.mean(dim=(3, 5)).div(127.5).sub(1)
    estimates = {"rows": torch.arange(4), "latents": latents}
    x, z = estimated(estimates, renders, 6, 64, torch.Generator().manual_seed(0))
    assert x.shape == (6, 3, 64, 64)
    again = nn.functional.avg_pool2d(x, 8)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-4)


@pytest.mark.skipif(not (BASE / "unet").is_dir(), reason="the embedded base is not in this checkout")
def test_a_finished_unet_goes_on_by_the_clock_from_where_it_stood(tmp_path, monkeypatch):
    monkeypatch.setattr(train_unet, "HELD_BACK", 0)
    data = tmp_path / "toys"
    data.mkdir()
    write_shard(Shard(data, 0, 4, 1, 16, "cpu", compiled=False))
    build([row["caption"] for row in Renders(data).rows], tmp_path / "tokenizer")
    cache = {
        "latents": torch.randn(4, 4, 16, 16).half(),
        "toys": torch.rand(4, 16, 16).half(),
        "seen": torch.randn(4, 160, 4, 4).half(),
        "time_ids": torch.full((4, 6), 128, dtype=torch.int16),
    }
    save_file(cache, tmp_path / "latents.safetensors")
    folders = {"data": data, "latents": tmp_path / "latents.safetensors", "clip": BASE}
    folders |= {"tokenizer": tmp_path / "tokenizer", "out": tmp_path / "unet", "start": BASE / "unet"}
    words = [word for name, path in folders.items() for word in (f"--{name}", str(path))]
    train_unet.main([*words, "--steps", "2", "--batch", "4", "--drop", "0.5"])
    before, after = (
        load_file(p / "diffusion_pytorch_model.safetensors") for p in (BASE / "unet", tmp_path / "unet/model")
    )
    moved = [float((after[k].float() - v.float()).abs().max()) for k, v in before.items()]
    assert before.keys() == after.keys() and 0 < max(moved) < 0.01
