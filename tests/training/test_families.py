"""Every family is trained from photos to files, stopped and resumed to the same bytes, loaded,
drawn and described; and what else the program offers works for it, or is refused in one line that
names it."""

import gc
import json
import re
import shutil
import weakref
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from PIL import Image
from safetensors import safe_open

from dreambooth_moslora.base import devices, load, streaming
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.families import build_family
from dreambooth_moslora.cli.command_train import train_main
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.evaluation.during_training import TrainingEvaluator
from dreambooth_moslora.generation import offload as gpu_room
from dreambooth_moslora.generation.image_params import GenerationParams, check_sides
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.generation.sampling import Sampler, SampleRequest, generate_images
from dreambooth_moslora.lora import key_names
from dreambooth_moslora.lora.describe import describe
from dreambooth_moslora.plan.defaults import load_recipe
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.settings import distillation, family_facts, field_facts
from dreambooth_moslora.settings.train_config import TrainConfig, get_rank_and_alpha
from dreambooth_moslora.training.dry_run import describe_run
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.noise_schedule import build_noise_schedule
from dreambooth_moslora.training.objective import (
    add_noise,
    compute_target,
    compute_weights,
    sample_flow_timesteps,
)
from tests.helpers.command_line import parse_train_config
from tests.helpers.few_pictures import few_pictures
from tests.helpers.late_copies import LateCopies
from tests.helpers.tiers import slow_but
from tests.helpers.tiny_encoders import save_tiny_encoders
from tests.helpers.tiny_families import TINY_FAMILIES, tiny_pipeline
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("two_steps")
NAMES = slow_but(("z_image",), [name for name in TINY_FAMILIES if name != "sdxl"])


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """The base of a family, made once."""

    @cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        tiny_pipeline(name, folder / "files").save_pretrained(folder / "base")
        return folder / "base"

    return made


def facts_named(name):
    return next(facts for facts in family_facts.FAMILIES if facts.name == name)


def settings_of(name, **changes):
    usual = {
        "target_modules": field_facts.ATTENTION_LAYERS,
        "max_train_steps": 3,
        **TINY_FAMILIES[name].settings,
    }
    return usual | changes


@pytest.fixture(scope="module", params=NAMES)
def trained(request, base_of, photos, two_steps, tmp_path_factory):
    """A run with the frozen base as the prior, samples, and a prompt of another length: the
    family's facts, the run's configuration, and what was still there of the encoders when each
    denoiser came, None for what had gone."""
    folder, facts = tmp_path_factory.mktemp("run"), facts_named(request.param)
    more = {
        "with_prior_preservation": True,
        "prior": "adapter_off",
        "num_validation_images": 1,
        "learning_rate": 0.3,
    }
    config = tiny_config(
        base_of(facts.name), photos, folder / "run", **settings_of(facts.name, **more)
    )
    encoders, alive_encoders, load_pipeline, load_denoiser = (
        [],
        [],
        load.load_pipeline,
        load.load_denoiser,
    )

    def loaded(*arguments, **options):
        pipeline = load_pipeline(*arguments, **options)
        encoders.extend(weakref.ref(getattr(pipeline, part)) for part in facts.encoders)
        return pipeline

    def denoiser(pipeline, *arguments, **options):
        gc.collect()
        alive_encoders.append(
            [getattr(pipeline, facts.denoiser), *(reference() for reference in encoders)]
        )
        load_denoiser(pipeline, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load_pipeline", loaded)
        patch.setattr(load, "load_denoiser", denoiser)
        train(config)
    return facts, config, alive_encoders


def same_files(
    config, other_config, names=("pytorch_lora_weights.safetensors", "image_0.png")
) -> bool:
    return all(
        (Path(config.output_dir) / n).read_bytes()
        == (Path(other_config.output_dir) / n).read_bytes()
        for n in names
    )


def test_photos_become_files_that_say_what_they_are(trained):
    facts, config, _ = trained
    run = RunDir(config.output_dir)
    with safe_open(run.adapter_path, "pt") as opened:
        keys, header = set(opened.keys()), json.loads(opened.metadata()["moslora"])
    prefix = "diffusion_model" if facts.original_names else facts.denoiser
    assert {key.partition(".")[0] for key in keys} == {prefix} and header["mixer"] == "orthogonal"
    assert run.kohya_path.exists() == (facts.denoiser == "unet")
    assert f"{facts.pipeline}.from_pretrained" in run.read_card() and facts.title in run.read_card()
    assert describe(run.adapter_path)["modules"] == {facts.denoiser: len(keys) // 2}


def test_encoders_leave_before_the_denoiser_and_resume_is_equal(trained, tmp_path):
    """sd1's UNet comes with its small encoder."""
    facts, whole, alive_encoders = trained
    assert facts.name == "sd1" or alive_encoders == [[None] * (1 + len(facts.encoders))]
    config, done = replace(whole, output_dir=str(tmp_path / "run")), []
    train(config, lambda event: done.append(event.kind), lambda: "step" in done)
    assert train(replace(config, resume_from_checkpoint="latest")).step == 3
    assert same_files(config, whole)


def test_dry_run_resumes_a_checkpoint_with_family_layers(trained):
    _, config, _ = trained
    assert "photos" in describe_run(replace(config, resume_from_checkpoint="latest"))


def test_adapter_loads_and_at_scale_zero_equals_the_base(trained):
    _, config, _ = trained
    plain, subject = (
        SubjectPipeline.from_base(config.pretrained_model_name_or_path) for _ in range(2)
    )
    adapter = subject.load_adapter(config.output_dir)

    def generate_pixels(pipeline, *adapters):
        params = GenerationParams(
            "a photo of sks dog", steps=2, height_px=64, width_px=64, adapters=adapters
        )
        return np.asarray(pipeline.draw(params)[0].pixels)

    without = generate_pixels(plain)
    assert np.array_equal(generate_pixels(subject, (adapter, 0.0)), without)
    assert not np.array_equal(generate_pixels(subject, (adapter, 1.0)), without)


def test_streamed_blocks_generate_equal_images(trained, monkeypatch):
    """Again after it rested, and with an adapter that is there already or comes meanwhile. The
    device is the CPU; late copies show that no block computes before it has come."""
    facts, config, _ = trained
    params = GenerationParams("a photo of sks dog", steps=2, height_px=64, width_px=64)

    def base():
        """Each weight begins where a kernel likes it, as on a GPU and unlike in a mapped file."""
        subject = SubjectPipeline.from_base(config.pretrained_model_name_or_path, device="cpu")
        for model in gpu_room.list_models(subject.pipeline):
            for weight in model.parameters():
                weight.data = weight.data.clone()
        return subject

    def generate_pixels(subject):
        plain = subject.draw(params)
        with_it = replace(params, adapters=((subject.load_adapter(config.output_dir), 1.0),))
        images = [plain, subject.draw(with_it), subject.draw(with_it), subject.draw(params)]
        return [np.asarray(image.pixels).tolist() for (image,) in images]

    expected = generate_pixels(base())
    assert expected[0] != expected[1]
    monkeypatch.setattr(devices, "measure_free_gib", lambda device: 2**-20)
    monkeypatch.setattr(streaming, "BlockCopier", LateCopies)
    for is_there in (False, True):
        subject = base()
        subject.home.is_resting = True
        if is_there:
            subject.load_adapter(config.output_dir)
        assert generate_pixels(subject) == expected

    # Two blocks of each model are on the device, as all weights lie in two places, and none later.
    subject.home.enter()
    streamed, gone = subject.home.streamed, []
    assert len(streamed) == 1 + len(facts.encoders)
    for blocks in streamed:
        weights = [layer.weight for block in blocks.blocks for layer in block.layers]
        places = {place.untyped_storage().data_ptr() for place in blocks.buffers}
        assert {weight.untyped_storage().data_ptr() for weight in weights} == places and len(
            places
        ) == 2
        gone += map(weakref.ref, blocks.buffers)
    subject.home.leave()
    assert [place() for place in gone] == [None] * 2 * len(streamed)


@pytest.mark.slow
def test_samples_of_a_run_with_streamed_blocks_are_the_same(trained, tmp_path):
    """And so is its adapter. In bf16 no weight lies as in the file, where few are aligned."""
    _, config, _ = trained
    changes = {"gradient_checkpointing": True, "mixed_precision": "bf16"}
    whole = replace(config, output_dir=str(tmp_path / "whole"), **changes)
    train(whole)
    streamed = replace(whole, output_dir=str(tmp_path / "streamed"), stream_blocks=True)
    train(streamed)
    assert same_files(streamed, whole, ["image_0.png"])
    assert adapter_sha256(tmp_path / "streamed") == adapter_sha256(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "flux",
            {"mixed_precision": "fp16"},
            "--mixed_precision fp16: FLUX.1 overflows in fp16; give bf16",
        ),
        ("flux", {"snr_gamma": 5.0}, "--snr_gamma is not for FLUX.1"),
        ("z_image", {"train_text_encoder": True}, "--train_text_encoder is not for Z-Image"),
        (
            "sd1",
            {"weighting_scheme": "mode"},
            "--weighting_scheme mode is not for Stable Diffusion 1.5",
        ),
        (
            "sd1",
            {"max_sequence_length": 99},
            "--max_sequence_length is not for Stable Diffusion 1.5",
        ),
        ("z_image", {"shift_timesteps": True}, "--shift_timesteps is not for Z-Image"),
        (
            "z_image",
            {"target_modules": "blora_style"},
            "Z-Image's transformer has no such layer; diffusers' script",
        ),
        (
            "z_image",
            {"target_modules": "to_qq"},
            "Z-Image's transformer has no such layer; did you mean to_q?",
        ),
        (
            "flux",
            {"resolution": 72},
            "--resolution 72: FLUX.1 needs multiples of 16 px, such as 64",
        ),
        (
            "flux2",
            {"text_encoder_out_layers": ("1", "2")},
            "--text_encoder_out_layers: 2 given; this base's transformer reads 3.",
        ),
    ],
)
def test_setting_of_another_family_is_refused(name, changes, message, base_of, photos, tmp_path):
    config = tiny_config(base_of(name), photos, tmp_path / "run", **settings_of(name, **changes))
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        make_plan(config)
    assert not (tmp_path / "run").exists()


def test_patterns_of_rank_and_alpha_are_for_transformers_too():
    config = TrainConfig(rank=4, rank_pattern="to_q=8", alpha_pattern="to_q=2")
    parts = {"unet": (8, 2.0), "transformer": (8, 2.0), "text_encoder": (4, 4.0)}
    assert {
        part: get_rank_and_alpha(config, part, "layers.0.attention.to_q") for part in parts
    } == parts


def test_size_that_the_family_cannot_generate_is_refused():
    for facts in map(facts_named, ("sdxl", "sd1", "flux")):
        check_sides((facts.multiple_px, 2 * facts.multiple_px), facts)
        message = (
            f"a side of 100 px: {facts.title} needs multiples of {facts.multiple_px}, such as 96"
        )
        with pytest.raises(UserError, match=message):
            check_sides((96, 100), facts)


def test_the_draws_and_weights_of_a_flow_are_those_of_diffusers():
    schedule = build_noise_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
    for scheme in ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"):
        draws = [torch.Generator().manual_seed(1) for _ in range(2)]
        index = sample_flow_timesteps(schedule, 64, draws[0], scheme, 0.1, 0.9, 1.29)
        theirs = compute_density_for_timestep_sampling(
            scheme, 64, 0.1, 0.9, 1.29, generator=draws[1]
        )
        assert torch.equal(index, (theirs * 1000).long())
        share = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[index]
        config = TrainConfig(weighting_scheme=scheme)
        weights = compute_weights(config, schedule, index, len(index))
        torch.testing.assert_close(weights, compute_loss_weighting_for_sd3(scheme, share))
        latents, noise = torch.randn(2, 64, 4, 8, 8)
        z = add_noise(schedule, latents, noise, index)
        expected = (1 - share.view(-1, 1, 1, 1)) * latents + share.view(-1, 1, 1, 1) * noise
        torch.testing.assert_close(z.denoiser_input, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(compute_target(schedule, latents, noise, index), noise - latents)
        assert torch.equal(z.timesteps, FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps[index])


def test_noise_levels_are_shifted_like_the_scheduler():
    """By the number of tokens: 1024 px, a wide picture, 256 px."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    schedule, tokens = build_noise_schedule(scheduler), torch.tensor([4096.0, 1024.0, 256.0])
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    index = sample_flow_timesteps(schedule, 3, draws[0], "none", 0.0, 1.0, 1.29, tokens)
    for number, share, count in zip(index, 1 - torch.rand(3, generator=draws[1]), tokens):
        theirs = scheduler.time_shift(calculate_shift(float(count)), 1.0, share.numpy())
        assert number == int((1 - theirs) * 1000)
    assert build_noise_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0)).shift_line is None


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=["shifted", "dynamic", "solver"],
)
def test_flow_shift_replaces_that_of_the_scheduler(scheduler):
    schedule = build_noise_schedule(scheduler, flow_shift=2.0)
    share = 1 / (1 + 1 / schedule.sigmas)
    plain = torch.linspace(1, 1e-3, 1000)
    torch.testing.assert_close(share, 2 * plain / (1 + plain), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(schedule.timesteps, 1000 * share, atol=1e-2, rtol=1e-4)
    assert schedule.shift_line is None


def test_flow_solver_gives_levels_of_its_shift():
    """The published bases are saved with it; a flow's own scheduler of that shift has the same
    levels."""
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    schedule, expected = map(
        build_noise_schedule,
        (DPMSolverMultistepScheduler(**flow), FlowMatchEulerDiscreteScheduler(shift=3)),
    )
    assert schedule.style == "flow" and torch.equal(schedule.sigmas, expected.sigmas)
    assert torch.equal(schedule.timesteps, expected.timesteps) and schedule.shift_line is None


@pytest.mark.parametrize(("name", "shift", "share"), [("lumina2", 6.0, 0.77), ("sana", 3.0, 0.68)])
def test_mean_noise_share_equals_the_documented_one(name, shift, share):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule, draws = build_noise_schedule(scheduler), torch.Generator().manual_seed(1)
    scheme = facts_named(name).weighting_scheme
    index = sample_flow_timesteps(schedule, 50_000, draws, scheme, 0.0, 1.0, 1.29)
    assert float(scheduler.sigmas[index].mean()) == pytest.approx(share, abs=0.005)


def test_preconditioned_error_equals_that_of_the_latents():
    schedule, index = (
        build_noise_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0)),
        torch.tensor([0, 500, 900]),
    )
    latents, noise, answer = torch.randn(3, 3, 4, 8, 8)
    noisy, share = (
        add_noise(schedule, latents, noise, index),
        schedule.compute_signal_and_noise(index)[1],
    )
    for scheme in ("logit_normal", "sigma_sqrt"):
        weights = compute_loss_weighting_for_sd3(scheme, share)
        theirs = (weights * (noisy.denoiser_input - share * answer - latents) ** 2).mean((1, 2, 3))
        errors = (answer - compute_target(schedule, latents, noise, index)).square().mean((1, 2, 3))
        config = TrainConfig(weighting_scheme=scheme, precondition_outputs=True)
        torch.testing.assert_close(compute_weights(config, schedule, index, 3) * errors, theirs)


def test_plan_uses_family_layers_levels_and_block_numbers(base_of, photos, tmp_path):
    base = base_of("sd3")

    def planned(**changes):
        return make_plan(
            tiny_config(base, photos, tmp_path / "run", **settings_of("sd3", **changes))
        ).config

    assert planned().target_modules == facts_named("sd3").targets
    assert planned().weighting_scheme == "logit_normal"
    first, last = (planned(lora_blocks=block).target_modules for block in ("0", "1"))
    assert set(first) == {f"transformer_blocks.0.{name}" for name in facts_named("sd3").targets}
    assert len(last) < len(first), "the last block gives no text back"
    assert (
        planned(lora_blocks="0,1").target_modules == first + last
        and planned(lora_blocks="0").lora_blocks == ()
    )
    with pytest.raises(UserError, match=r"--target_modules transformer_blocks\.7\.attn\.to_q"):
        planned(lora_blocks="7")


NAMED = {  # a base's name -> the word that says that it is distilled
    "black-forest-labs/FLUX.1-schnell": "schnell",
    "/hub/models--Tongyi-MAI--Z-Image-Turbo/snapshots/0a1b": "turbo",
    "someone/Upgrade-Turbo": "turbo",
    "/home/turbo/Z-Image": "",
    "ostris/Z-Image-De-Turbo": "",
    "/hub/models--ostris--Z-Image-De-Turbo/snapshots/0a1b": "",
    "z_image_de_turbo_v1_bf16.safetensors": "",
    "Z-Image-Turbo-De-Distilled": "",
    "someone/FLUX.1-schnell-dedistilled": "",
    "nyanko7/flux-dev-de-distill": "",
}


@pytest.mark.parametrize("name", NAMED)
def test_distillation_is_recognised_by_the_name(name):
    message = distillation.explain_distilled({}, name, facts_named("flux"))
    if word := NAMED[name]:
        assert f"“{word}” says that it is distilled" in message
        assert message.endswith("black-forest-labs/FLUX.1-dev")
    else:
        assert not message
    assert distillation.explain_distilled({"is_distilled": True}, name, facts_named("flux"))


def test_distilled_or_unknown_base_is_refused(base_of, photos, tmp_path):
    """A distilled one is refused with the one to train."""
    flux2, sd1 = (shutil.copytree(base_of(name), tmp_path / name) for name in ("flux2", "sd1"))
    for base, old, new, message in (
        (
            flux2,
            '"is_distilled": false',
            '"is_distilled": true',
            "it is distilled to a few steps: train the base",
        ),
        (
            sd1,
            "StableDiffusionPipeline",
            "KandinskyPipeline",
            "of the class KandinskyPipeline cannot be trained here",
        ),
    ):
        index = base / "model_index.json"
        index.write_text(index.read_text().replace(old, new))
        with pytest.raises(UserError, match=message):
            make_plan(tiny_config(base, photos, tmp_path / "run", **settings_of("flux2")))


WHOLE = {
    "enable_bucket": True,
    "caption_dropout": 0.1,
    "unmasked_weight": 0.0,
    "random_flip": True,
    "caching": "disk",
}
WHOLE |= {"with_prior_preservation": True, "num_class_images": 2, "sample_batch_size": 2}


class Case:
    """A family's tiny base, and four photos, one of them wide, with a caption and a mask."""

    def __init__(self, name: str, base: Path, folder: Path):
        self.facts, self.base, self.folder = facts_named(name), base, folder
        self.photos = paint_photos(folder / "photos", 4)
        photo = self.photos / "1.png"
        Image.open(photo).resize((96, 64)).save(photo)
        photo.with_suffix(".txt").write_text("a photo of sks dog, on a sofa")
        Image.new("L", (96, 64), 255).save(photo.with_suffix(".mask.png"))

    def config(self, run, **changes):
        usual = {"target_modules": field_facts.ATTENTION_LAYERS, "max_train_steps": 2}
        usual |= {
            "class_data_dir": str(self.folder / "class"),
            "cache_dir": str(self.folder / "cache"),
        }
        return tiny_config(self.base, self.photos, self.folder / run, **usual | changes)

    def train(self, run, **changes) -> Path:
        train(self.config(run, **changes))
        return self.folder / run


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in TINY_FAMILIES]
)
def case(request, base_of, tmp_path_factory):
    return Case(request.param, base_of(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def whole(case, encoders, two_steps) -> Path:
    """A run with all of `WHOLE`, with samples and scores."""
    sample_settings = {
        "num_validation_images": 1,
        "validation_steps": 2,
        "evaluate_steps": 1,
    }
    with few_pictures(inference_steps=2):
        plan = make_plan(case.config("whole", **WHOLE, **sample_settings))
        train(plan, evaluator=TrainingEvaluator(plan.config, plan.photos, encoders))
    return case.folder / "whole"


def test_class_images_samples_scores_and_reused_encodings(case, whole, capsys):
    assert len(list((case.folder / "class").rglob("*.png"))) == 2
    assert (whole / "image_0.png").is_file() and (whole / "contact_sheet.png").is_file()
    assert main(["explain", str(whole)]) == 0
    assert "--snr_gamma" not in capsys.readouterr().out
    files = sorted((case.folder / "cache").rglob("*.safetensors"))
    assert adapter_sha256(case.train("again", **WHOLE)) == adapter_sha256(whole)
    assert files and files == sorted((case.folder / "cache").rglob("*.safetensors"))


def test_several_subjects_in_shapes_of_their_own_without_a_cache(case):
    cat_photos = paint_photos(case.folder / "cat", 3)
    tables = [
        {"instance_data_dir": str(case.photos), "instance_prompt": "a photo of sks dog"},
        {"instance_data_dir": str(cat_photos), "instance_prompt": "a photo of zwx cat"},
    ]
    changes = {"enable_bucket": True, "caching": "off", "class_data_dir": None}
    card = (case.train("several", subjects=tables, **changes) / "README.md").read_text()
    assert "sks dog" in card and "zwx cat" in card


@pytest.mark.slow
def test_evaluate_judges_the_run_and_its_file_alone(trained, photos, tmp_path, monkeypatch, capsys):
    """At 64 px: at their families' own side the little bases would draw for minutes."""
    monkeypatch.setattr(Base, "resolution_px", 64)
    _, config, _ = trained
    run, file, scores = (
        shutil.copytree(config.output_dir, tmp_path / "run"),
        tmp_path / "dog.safetensors",
        [],
    )
    shutil.copy(RunDir(run).adapter_path, file)
    clip, dino = map(str, save_tiny_encoders(tmp_path))
    few = [
        "--num_prompts",
        "1",
        "--images_per_prompt",
        "1",
        "--class_images",
        "1",
        "--inference_steps",
        "2",
    ]
    few += ["--clip", clip, "--dino", dino]
    for place in [run], [file, "--base", config.pretrained_model_name_or_path, "--photos", photos]:
        assert main(["evaluate", *map(str, place), *few]) == 0
        scores.append(json.loads(Path(capsys.readouterr().out.split()[-1]).read_text())["scores"])
    assert scores[0] == scores[1] and scores[0]["drift"]["mean"] != 0


def test_generate_and_the_cards_snippet_draw(case, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--width", "64", "--height", "64", "--steps", "2", "--output_dir", "pictures"]
    flags = [
        "generate",
        "--prompt",
        "a photo of sks dog",
        "--base",
        str(case.base),
        "--adapter",
        str(whole),
    ]
    assert main([*flags, *size]) == 0
    assert list((tmp_path / "pictures").glob("*.png"))
    (code,) = re.findall(r"```python\n(.+?)```", (whole / "README.md").read_text(), re.DOTALL)
    code = code.replace("path/to/the/base", str(case.base)).replace(
        "path/to/this/folder", str(whole)
    )
    code = re.sub(r'torch\.b?float16\)(\npipe)?\.to\("cuda"\)', "torch.float32)", code)
    code = code.replace(").images", ", num_inference_steps=1, height=64, width=64).images")
    scope = {}
    exec(code, scope)
    assert isinstance(scope["image"], Image.Image)


def test_small_text_encoders_can_be_trained(case):
    if not case.facts.adapted_encoders:
        pytest.skip("it has none")
    case.train("words", train_text_encoder=True)


def test_one_word_takes_the_familys_recipe(case):
    name, recipe = load_recipe(Base.find(case.base))
    assert name == f"{case.facts.name}.toml"
    flags = [
        str(case.photos),
        "dog",
        "--pretrained_model_name_or_path",
        str(case.base),
        "--resolution",
        "64",
    ]
    config = parse_train_config(
        [*flags, "--output_dir", str(case.folder / "word"), "--base_quantization", "none"]
    )
    assert make_plan(config, is_later=True).config.prior == "adapter_off" and recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in TINY_FAMILIES.items() if row.one_layer])
def test_flags_of_diffusers_script_tests_work(name, base_of, photos, tmp_path):
    """One layer, numbered checkpoints, no more than two of them, and a run that goes on from one
    with more steps."""
    flags = [
        "--pretrained_model_name_or_path",
        str(base_of(name)),
        "--instance_data_dir",
        str(photos),
    ]
    flags += [
        "--output_dir",
        str(tmp_path),
        "--instance_prompt",
        "dog",
        "--resolution=64",
        "--train_batch_size=1",
    ]
    flags += [
        "--gradient_accumulation_steps=1",
        "--checkpointing_steps=2",
        "--num_validation_images=0",
    ]
    flags += [
        "--learning_rate=5.0e-04",
        "--scale_lr",
        "--lr_scheduler",
        "constant",
        "--lr_warmup_steps=0",
    ]
    row = TINY_FAMILIES[name]
    flags += ["--cache_latents", "--lora_layers", row.one_layer]
    if "max_sequence_length" in facts_named(name).text_options:
        flags += ["--max_sequence_length", "16"]
    for setting, values in row.settings.items():
        flags += [f"--{setting}", *values]
    assert train_main([*flags, "--max_train_steps=4"]) == 0
    limited = [
        "--resume_from_checkpoint=checkpoint-4",
        "--checkpoints_total_limit=2",
        "--max_train_steps=8",
    ]
    assert train_main([*flags, *limited]) == 0
    assert {path.name for path in tmp_path.glob("checkpoint*")} == {"checkpoint-6", "checkpoint-8"}
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as opened:
        keys, header = set(opened.keys()), json.loads(opened.metadata()["lora_adapter_metadata"])
    layer = key_names.format_published_name("transformer", row.one_layer, facts_named(name))
    assert {key.rpartition(".lora_")[0] for key in keys} == {layer}
    assert header["transformer.target_modules"] == [row.one_layer]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen_image", "sana", "lumina2"])
def test_class_images_are_drawn_as_samples_are(name, tmp_path):
    """Guided and without Sana's instruction, which the pipeline's call with a prompt alone is not;
    Lumina 2's is before the prompt alone."""
    pipe = tiny_pipeline(name, tmp_path)
    texts = partial(build_family(pipe).encode_prompts, pipe)
    (sample,) = Sampler(pipe, texts, 64, torch.device("cpu"), None, 2)([SampleRequest("a dog", 3)])
    (image,) = generate_images(pipe, "a dog", [3], (64, 64))
    assert np.array_equal(np.asarray(sample), np.asarray(image))
