"""What the pre-training scripts rest on: timesteps, norms, runs that resume, the tokenizer, the aim
of the decoder."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from torch import nn
from torch.nn.functional import avg_pool2d

from toybox.learning import train_unet, training
from toybox.learning.adversary import Adversary
from toybox.learning.alignment import Alignment
from toybox.learning.build_tokenizer import MAX_TOKENS, load
from toybox.learning.channels_last import FastGroupNorm, replace_group_norms, to_channels_last
from toybox.learning.sharpen_decoder import (
    compute_anchor_loss,
    compute_contrast,
    compute_contrast_gains,
    scale_bands,
)
from toybox.learning.train_unet import (
    SNR_GAMMA,
    TOY_WEIGHT,
    TimestepSampler,
    build_noise_schedule,
    build_unet,
)
from toybox.learning.train_vae import add_random_noise
from toybox.learning.train_vit import ViewDataset
from toybox.learning.training import MasterWeights, TrainingRun, compute_dtype, read_saved_step

pytestmark = pytest.mark.slow
SHIPPED = Path(__file__).parents[2] / "assets" / "toy-sdxl" / "tokenizer"
TEXTS = [
    "a photo of a sks red robot on the beach",
    "two toys: an orange duck, naïve 熊 42's",
    "word " * 100,
]
OLD_X86, NEW_X86, ARM = (
    {"avx2": True, "avx512_bf16": False},
    {"avx512_bf16": True},
    {"neon": True, "bf16": True},
)
BF16 = torch.bfloat16


@pytest.mark.parametrize("detail", [0.0, 0.5])
def test_weighted_timesteps_average_like_weighted_uniform_ones(detail):
    """Of min-SNR, and of EDM: ln σ is normal with mean -1.2 and deviation 1.2, at a data deviation
    of 1/2."""
    schedule = build_noise_schedule()
    snr = compute_snr(schedule, torch.arange(1000))
    value = torch.sin(torch.arange(1000) / 100) + 2
    sigma = torch.exp(1.2 * torch.randn(10**6, generator=torch.Generator().manual_seed(0)) - 1.2)
    level = (0.25 / sigma**2).log()
    level = level[(level < snr[0].log()) & (level > snr[-1].log())]
    edm = value[torch.searchsorted(-snr.log(), -level).clamp(max=999)].mean()
    truth = float((1 - detail) * (value * snr.clamp(max=SNR_GAMMA) / snr).mean() + detail * edm)
    generator, timesteps = (
        torch.Generator().manual_seed(0),
        TimestepSampler(schedule, detail=detail),
    )
    means = [
        float((value[t] * w).mean())
        for t, w in (timesteps.sample(64, generator) for _ in range(400))
    ]
    assert sum(means) / len(means) == pytest.approx(truth, rel=2e-3)
    # a batch covers the whole schedule
    t, weight = timesteps.sample(50, torch.Generator().manual_seed(1))
    assert t.min() < 60 and t.max() > 970 and (t.diff() >= 0).all() and (weight > 0).all()


def test_cells_of_a_toy_weigh_more_and_a_batch_weighs_one():
    toys = torch.zeros(2, 16, 16, dtype=torch.float16)
    toys[0, 4:8, 4:8] = 1
    weights = train_unet.compute_cell_weights(toys)
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[0, 0, 5, 5] / weights[0, 0, 0, 0]) == pytest.approx(1 + TOY_WEIGHT)


def test_alignment_trains_the_unet_up_to_its_middle_alone():
    torch.manual_seed(0)
    unet, features = build_unet(), torch.randn(14, 160, 4, 4).half()
    alignment = Alignment(unet, features)
    added = {"text_embeds": torch.randn(2, 160), "time_ids": torch.zeros(2, 6)}
    unet(torch.randn(2, 4, 16, 16), 500, torch.randn(2, 77, 256), added_cond_kwargs=added)
    loss = alignment.compute_loss(features[:2])
    loss.backward()
    assert 0.5 < loss.item() < 1.5
    assert (
        all(p.grad is not None for p in unet.mid_block.parameters())
        and unet.conv_in.weight.grad is not None
    )
    assert all(p.grad is None for p in unet.up_blocks.parameters())
    opposite = 2 * alignment.mean.view(-1, 1, 1) - features[:2].float()
    assert alignment.compute_loss(opposite).item() == pytest.approx(2 - loss.item(), abs=1e-5)
    alignment.state = alignment.state.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert alignment.compute_loss(features[:2]).item() == pytest.approx(loss.item(), abs=1e-5), (
        "a larger middle is averaged"
    )


def test_an_adversary_sharpens_what_squared_errors_blur():
    torch.manual_seed(0)
    adversary = Adversary(weight=1.0)
    x = torch.randint(0, 2, (8, 1, 32, 32)).float().mul(2).sub(1).expand(8, 3, 32, 32)
    grey = nn.Conv2d(3, 3, 1).to(training.compute_dtype())
    for _ in range(30):
        adversary_loss = adversary.step(to_channels_last(x), to_channels_last(torch.zeros_like(x)))
    assert adversary_loss < 0.5, "it tells checkers from grey"
    y = grey(to_channels_last(0.3 * x))
    loss = (y.float() - 0.3 * x).square().mean()
    joined = loss + adversary.compute_loss_term(loss, y, grey.weight)
    apart = torch.autograd.grad(joined - loss, grey.weight, retain_graph=True)[0].float().norm()
    alone = torch.autograd.grad(loss, grey.weight, retain_graph=True)[0].float().norm()
    assert float(apart / alone) == pytest.approx(1, abs=0.1)
    joined.backward()
    assert all(p.grad is None and p.requires_grad for p in adversary.network.parameters())


def test_a_batch_of_views_has_two_kinds_and_sides(tmp_path):
    kinds = ["duck", "bear", "car"] * 6
    numbers = np.arange(18 * 4, dtype=np.uint8).reshape(18, 4, 1, 1, 1)
    np.save(tmp_path / "views.npy", np.broadcast_to(numbers, (18, 4, 2, 2, 3)))
    (tmp_path / "kinds.json").write_text(json.dumps(kinds))
    views = ViewDataset(tmp_path, held_back=3)
    first, second = (
        v[:, 0, 0, 0].long() for v in views.sample_pairs(8, torch.Generator().manual_seed(0))
    )
    toys = first // 4
    assert (
        torch.equal(toys, second // 4) and (first != second).all() and len(set(toys.tolist())) == 8
    )
    assert toys.max() < 15 and sorted(Counter(kinds[t] for t in toys).values()) == [4, 4]


def test_dropped_captions_are_zero_and_a_tenth():
    embeds, pooled = torch.ones(4000, 2, 3), torch.ones(4000, 5)
    train_unet.drop_captions(embeds, pooled, torch.Generator().manual_seed(0))
    gone = pooled.sum(1) == 0
    assert torch.equal(gone, embeds.sum((1, 2)) == 0) and 0.08 < gone.float().mean() < 0.12


def test_the_group_norm_and_its_gradients_are_those_of_pytorch():
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 16, 6, 5) + 0.5
    cotangent = torch.randn_like(x)
    results = []
    for module in (norm, FastGroupNorm(norm)):
        norm.zero_grad()
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(cotangent)
        results.append((y.detach(), leaf.grad, norm.weight.grad.clone(), norm.bias.grad.clone()))
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_has_the_rates_networks_and_log_of_one(
    tmp_path,
):
    def part(out: Path, until: int | None) -> tuple[list[float], MasterWeights]:
        beside, often = MasterWeights(nn.Linear(2, 2)), {"save_every": 100, "log_every": 2}
        run = TrainingRun(
            out,
            MasterWeights(nn.Linear(2, 2)),
            8,
            until=until,
            batch=3,
            beside={"other": beside},
            **often,
        )
        return [run.compute_rate_factor(step, warmup=2) for step in run], beside

    (first, saved), (whole, _) = part(tmp_path / "a", 4), part(tmp_path / "b", None)
    assert read_saved_step(tmp_path / "a") == 4 and read_saved_step(tmp_path / "none") == 0
    second, resumed = part(tmp_path / "a", 8)
    assert first + second == whole == pytest.approx([0.5, 1, 1, 1, 1, 0.9375, 0.625, 0.3125])
    assert all(torch.equal(a, b) for a, b in zip(resumed.masters, saved.masters, strict=True))
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [row["seen"] for row in rows] == [6, 12, 18, 24] and all(
        row["samples_sec"] > 0 for row in rows
    )


SHARED = """
import sys, torch
from torch import nn
from toybox.learning.training import MasterWeights, get_rank_and_world
torch.manual_seed(0)
model = nn.Linear(8, 2)
weights = MasterWeights(model, adamw_lr=1e-2, dtype=torch.float32)
rank, world = get_rank_and_world()
x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).split(8 // world)[rank]
model(x).square().mean().backward()
weights.step(1.0)
torch.save(weights.get_averaged(), f"{sys.argv[1]}/{rank}_of_{world}.pt")
"""


def test_two_processes_learn_what_one_learns_from_both_halves(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    root, free = Path(__file__).parents[2], ("--nproc_per_node", "2", "--standalone")
    for launcher in ((), ("-m", "torch.distributed.run", *free)):
        command = [sys.executable, *launcher, str(script), str(tmp_path)]
        subprocess.run(
            command, check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, timeout=300
        )
    whole, *halves = (
        torch.load(tmp_path / name) for name in ("0_of_1.pt", "0_of_2.pt", "1_of_2.pt")
    )
    for shared in halves:
        torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-7)


def steps_by_the_clock(
    out: Path, clock: list[float], stop_after: int | None = None
) -> list[tuple[int, float]]:
    """Steps of ten seconds each, with their rates, in a run of two minutes."""
    run = TrainingRun(
        out, MasterWeights(nn.Linear(2, 2)), 10**6, minutes=2, save_every=1, log_every=1000
    )
    done = []
    for step in run:
        done.append((step, run.compute_rate_factor(step, warmup=1)))
        clock[0] += 10
        if len(done) == stop_after:
            break
    return done


def test_a_run_of_minutes_ends_by_the_clock_of_all_its_pieces(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    unbroken = steps_by_the_clock(tmp_path / "a", clock)
    assert [step for step, _ in unbroken] == list(range(12))
    assert [rate for _, rate in unbroken[-3:]] == pytest.approx(
        [0.25 / 0.4, 2 / 12 / 0.4, 1 / 12 / 0.4]
    )
    first = steps_by_the_clock(tmp_path / "b", clock, stop_after=5)
    clock[0] += 3600
    second = steps_by_the_clock(tmp_path / "b", clock)
    assert [step for step, _ in second] == list(range(4, 12)), (
        "the step that was not saved is made again"
    )
    assert first[:4] + second == unbroken
    assert steps_by_the_clock(tmp_path / "b", clock) == []


def test_noise_on_latents_is_a_share_of_their_deviation():
    draw = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    latents = torch.randn(2000, 4, 8, 8, generator=draw()).requires_grad_()
    added = add_random_noise(latents, 0.3, torch.Generator().manual_seed(1)) - latents
    share = added.detach().std(dim=(1, 2, 3))
    assert float((share == 0).float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float(share.max()) == pytest.approx(0.3, rel=0.2)
    twice = add_random_noise(2 * latents, 0.3, torch.Generator().manual_seed(1)) - 2 * latents
    torch.testing.assert_close(twice, 2 * added, atol=1e-5, rtol=1e-4)
    # The encoder is told that larger latents bring larger noise.
    added.square().mean().backward()
    assert float((latents.grad * latents).sum()) > 0
    assert torch.equal(add_random_noise(latents, 0.0, draw()), latents)


def test_the_shipped_tokenizer_equals_that_of_the_training(tmp_path):
    model = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    trained, shipped = (
        load(f)(TEXTS, padding="max_length", truncation=True) for f in (tmp_path, SHIPPED)
    )
    assert (
        trained.input_ids == shipped.input_ids and trained.attention_mask == shipped.attention_mask
    )
    assert {len(ids) for ids in shipped.input_ids} == {MAX_TOKENS}


@pytest.mark.parametrize(
    ("has", "dtype"),
    [(OLD_X86, torch.float32), (NEW_X86, BF16), (ARM, BF16), ({"amx_bf16": True}, BF16)],
)
def test_computation_has_the_processors_dtype_and_masters_fp32(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    model = replace_group_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)))
    assert compute_dtype() == to_channels_last(torch.randn(1, 3, 8, 8)).dtype == dtype
    assert isinstance(model[1], FastGroupNorm) == (dtype == BF16)
    layer, x = nn.Conv2d(3, 8, 3), to_channels_last(torch.randn(1, 3, 8, 8))
    masters = MasterWeights(layer).masters
    assert layer(x).dtype == x.dtype and {master.dtype for master in masters} == {torch.float32}


@pytest.fixture
def pictures() -> torch.Tensor:
    """Noise of several sizes in [-1, 1], (4,3,64,64)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    return (noise + avg_pool2d(noise, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)) / 2


def test_contrast_is_matched_and_the_mean_colour_stays(pictures):
    torch.testing.assert_close(scale_bands(pictures, [1.0] * 4), pictures)
    softer = 0.8 * pictures + 0.2 * avg_pool2d(pictures, 3, stride=1, padding=1)
    changed = scale_bands(pictures, compute_contrast_gains(pictures, softer))
    assert compute_contrast(pictures) != pytest.approx(compute_contrast(softer), rel=0.1)
    assert compute_contrast(changed) == pytest.approx(compute_contrast(softer), rel=0.02)
    torch.testing.assert_close(changed.mean((2, 3)), pictures.mean((2, 3)), atol=0.02, rtol=0)


def test_a_picture_that_has_moved_is_told_by_the_anchor(pictures):
    assert compute_anchor_loss(pictures, pictures) == 0
    assert (
        compute_anchor_loss(pictures.roll(4, -1), pictures)
        > compute_anchor_loss(pictures.roll(1, -1), pictures)
        > 0
    )
