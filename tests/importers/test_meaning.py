"""Settings that mean what another trainer's program does, also where its file is silent."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dreambooth_moslora.importers.families import CONVOLUTIONS, LINEAR_UNET_LAYERS
from dreambooth_moslora.importers.files import load_config
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.noise_schedule import build_noise_schedule
from dreambooth_moslora.training.objective import sample_flow_timesteps
from dreambooth_moslora.training.optimizer import make_lr_schedule
from tests.helpers.foreign_configs import write_config

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
PRODIGY = {
    "optimizer": "Prodigy",
    "adam_weight_decay": 0.0,
    "prodigy_use_bias_correction": False,
    "prodigy_safeguard_warmup": False,
}
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
CONTEXT_LAYERS = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
SDXL_TYPE = '"STABLE_DIFFUSION_XL_10_BASE"'
MASKED = '"masked_training": true'
MEANINGS = {
    "ai-toolkit": {
        ("optimizer: adamw8bit", "optimizer: prodigy"): PRODIGY | {"learning_rate": 1.0},
        ("timestep_type: sigmoid", ""): {"weighting_scheme": "logit_normal", "flow_shift": 1.0},
        ("sigmoid", "linear"): {"weighting_scheme": "none", "flow_shift": 1.0},
        ("sigmoid", "flux_shift"): {"weighting_scheme": "none", "shift_timesteps": True},
        ("noise_scheduler: flowmatch", ""): {"weighting_scheme": None},
        ("dtype: bf16", "max_grad_norm: 0"): {"max_grad_norm": 1e9},
        ("is_flux: true", "arch: zimage"): {"target_modules": ("layers.*",)},
        ("is_flux: true", "arch: anima"): {
            "target_modules": ("*transformer_blocks.*",),
            "weighting_scheme": "logit_normal",
        },
        ("dtype: bf16", "optimizer_params: {betas: [0.8, 0.9], eps: 1.0e-8}"): {
            "adam_beta1": 0.8,
            "adam_beta2": 0.9,
            "adam_epsilon": 1e-8,
        },
        ("dtype: bf16", "optimizer_params: {}", "caption_ext: txt", "batch_size: 3"): {
            "adam_weight_decay": 0.01,
            "train_batch_size": 3,
        },
        ("is_flux: true", "arch: sd15"): {"target_modules": LINEAR_UNET_LAYERS},
        ("is_flux: true", "is_xl: true"): {
            "target_modules": LINEAR_UNET_LAYERS,
            "weighting_scheme": None,
        },
        ("accumulation_steps: 2", "accumulation: 2"): {"max_train_steps": 2000},
        ("linear_alpha: 8", "linear_alpha: 8, conv: 16, conv_alpha: 4"): {"rank_pattern": ()},
        (
            "linear_alpha: 8",
            "linear_alpha: 8, conv: 16, conv_alpha: 4",
            "is_flux: true",
            "arch: sdxl",
        ): {
            "rank_pattern": tuple(f"{name}=16" for name in CONVOLUTIONS),
            "alpha_pattern": tuple(f"{name}=4" for name in CONVOLUTIONS),
            "target_modules": (*LINEAR_UNET_LAYERS, *CONVOLUTIONS),
        },
        ("dtype: bf16", "lr_scheduler: constant_with_warmup"): {
            "lr_warmup_steps": 500,
            "mixed_precision": "no",
        },
        ("is_flux: true", "arch: sd3"): {"precondition_outputs": False},
    },
    "kohya": {
        ('"AdamW8bit"\noptimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]', '"Prodigy"'): (
            PRODIGY | {"learning_rate": 2e-4}
        ),
        ("network_train_unet_only = true", ""): {
            "train_text_encoder": True,
            "text_encoder_lr": 2e-6,
            "learning_rate": 2e-4,
        },
        ("steps = 50\nmax_train_epochs = 10", "steps = 0.1\nmax_train_steps = 300"): {
            "lr_warmup_steps": 30
        },
        ("betas=0.9,0.99", 'betas=0.9,0.99"]\nnetwork_args = ["conv_dim=8'): {
            "rank_pattern": tuple(f"{name}=8" for name in CONVOLUTIONS),
            "alpha_pattern": tuple(f"{name}=1" for name in CONVOLUTIONS),
        },
        ("networks.lora", "networks.lora_flux"): {
            "weighting_scheme": "none",
            "flow_shift": 3.0,
            "target_modules": ("*transformer_blocks.*",),
        },
        (
            'networks.lora"',
            'networks.lora_flux"\ntimestep_sampling = "shift"\ndiscrete_flow_shift = 3.1',
        ): {"weighting_scheme": "logit_normal", "flow_shift": 3.1, "logit_mean": 0.0},
        ('networks.lora"', 'networks.lora_flux"\ntimestep_sampling = "flux_shift"'): {
            "weighting_scheme": "logit_normal",
            "shift_timesteps": True,
            "flow_shift": None,
        },
        ("networks.lora", "networks.lora_anima"): {
            "weighting_scheme": "logit_normal",
            "flow_shift": 1.0,
            "target_modules": ("transformer_blocks.*.attn*", "transformer_blocks.*.ff.*"),
        },
        ('networks.lora"\nnetwork_dim', 'networks.lora_zimage"\ndit = "z.safetensors"\n#'): {
            "target_modules": ("layers.*.attention.*", "layers.*.feed_forward.*"),
            "flow_shift": 1.0,
            "train_text_encoder": False,
            "rank": 4,
        },
    },
    "OneTrainer": {
        (SDXL_TYPE, '"FLUX_DEV_1", "noising_bias": 0.5, "noising_weight": 0.2'): {
            "weighting_scheme": "none",
            "flow_shift": 1.0,
            "target_modules": ("*attn*", "*ff.net*", "*proj_mlp*"),
        },
        (SDXL_TYPE, '"ANIMA"'): {"target_modules": ("*attn*", "*ff*"), "flow_shift": 1.0},
        (
            SDXL_TYPE,
            '"FLUX_DEV_1", "timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.5, '
            '"noising_weight": 0.2, "timestep_shift": 2',
        ): {"logit_mean": -0.5, "logit_std": 1.2, "flow_shift": 2.0},
        (
            SDXL_TYPE,
            '"FLUX_DEV_1", "timestep_distribution": "HEAVY_TAIL", "noising_weight": 0.4, '
            '"dynamic_timestep_shifting": true',
        ): {"weighting_scheme": "mode", "mode_scale": 0.4, "shift_timesteps": True},
        (MASKED, '"clip_grad_norm": 0'): {"max_grad_norm": 1e9},
        (MASKED, '"gradient_accumulation_steps": 4'): {
            "lr_warmup_steps": 25,
            "unmasked_weight": 0.2,
        },
        ('"layer_filter_preset": "attn-mlp"', '"dropout_probability": 0'): {
            "target_modules": ("down_blocks.*", "mid_block.*", "up_blocks.*")
        },
        (MASKED, '"layer_filter": "^(?=.*attention)(?!.*refiner).*,feed_forward"'): {
            "target_modules": ("layers.*attention*", "*feed_forward*")
        },
        ('"text_encoder": {"train": false}, ', ""): {"train_text_encoder": True},
        ('"COSINE"', '"COSINE_WITH_HARD_RESTARTS"'): {"lr_scheduler": "cosine_with_restarts"},
        ('"COSINE"', '"CONSTANT"'): {"lr_scheduler": "constant_with_warmup"},
    },
    "SimpleTuner": {
        ('shift": 3', 'shift": 0'): {"flow_shift": 1.0},
        ('z_image", "--model_flavour": "base"', 'flux"'): {"flow_shift": 3.0},
        ('"z_image"', '"flux", "--flow_schedule_auto_shift": true'): {"flow_shift": 3.0},
        ('"z_image"', '"sdxl"'): {"weighting_scheme": None, "flow_shift": None},
        ('"z_image"', '"sd3"'): {"precondition_outputs": False},
        ('z_image", "--model_flavour": "base"', 'anima", "--model_flavour": "release"'): {
            "pretrained_model_name_or_path": "circlestone-labs/Anima-Base-v1.0-Diffusers"
        },
        ("adamw_bf16", "prodigy"): PRODIGY,
        ('z_image"', 'sdxl", "--offset_noise": true'): {
            "noise_offset": 0.1,
            "target_modules": ATTENTION_LAYERS,
        },
        ('"z_image"', '"sdxl", "--noise_offset": 0.2'): {"noise_offset": 0.0},
        ('z_image"', 'z_image", "--musubi_blocks_to_swap": 4'): {"stream_blocks": True},
        ('"z_image"', '"flux"'): {"target_modules": (*ATTENTION_LAYERS, *CONTEXT_LAYERS)},
        ('"z_image"', '"flux", "--flux_lora_target": "context"'): {
            "target_modules": CONTEXT_LAYERS
        },
        ('"z_image"', '"flux2"'): {
            "target_modules": (
                *(f"attn.{name}" for name in ATTENTION_LAYERS),
                "attn.to_qkv_mlp_proj",
            )
        },
        ('_steps": 100', '_steps": 0, "--max_grad_norm": 0.0'): {
            "validation_steps": None,
            "max_grad_norm": 1e9,
        },
    },
}
"""Trainer -> {a text of its file and another in its place: the settings}."""
ROWS = [(trainer, *row) for trainer, rows in MEANINGS.items() for row in rows.items()]
REFUSALS = [
    ("ai-toolkit", ("network: {type: lora, linear: 16, linear_alpha: 8}", ""), "no network"),
    ("ai-toolkit", ("dtype: bf16", "lr_scheduler: linear"), "lr_scheduler linear"),
    ("kohya", ("warmup_steps = 50", "warmup_steps = 0.1"), "lr_warmup_steps 0.1"),
    ("OneTrainer", ('"COSINE"', '"COSINE_WITH_RESTARTS"'), "COSINE_WITH_RESTARTS"),
    ("OneTrainer", ('_steps": 100', '_steps": 0.05'), "learning_rate_warmup_steps 0.05"),
    ("SimpleTuner", ('"cosine"', '"cosine_with_restarts"'), "lr_scheduler cosine_with_restarts"),
    ("SimpleTuner", ("adamw_bf16", "optimi-lion"), "optimi-lion: AdamW, Prodigy, "),
    ("SimpleTuner", ('"z_image"', '"flux", "--tread_config": {"routes": [1]}'), "tread_config"),
]
"""Trainer, changed text, and what cannot be meant here."""


def shift_noise(share: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * share / (1 + (factor - 1) * share)


NOISE_SHARES = {
    ("ai-toolkit", ()): lambda normal: normal.sigmoid(),
    (
        "kohya",
        (
            'networks.lora"',
            'networks.lora_flux"\ntimestep_sampling = "shift"\ndiscrete_flow_shift = 3.1',
        ),
    ): lambda normal: shift_noise(normal.sigmoid(), 3.1),
    (
        "OneTrainer",
        (
            SDXL_TYPE,
            '"Z_IMAGE", "timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.5, '
            '"timestep_shift": 2',
        ),
    ): lambda normal: shift_noise((normal + 0.5).sigmoid(), 2.0),
    ("SimpleTuner", ()): lambda normal: shift_noise(normal.sigmoid(), 3.0),
}
"""Trainer and changed text -> its formula of the noise's share, from a normal draw."""


UNET = {
    "target_modules": LINEAR_UNET_LAYERS,
    "weighting_scheme": None,
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "flow_shift": None,
}
SIGMOID = {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0}
ONE_PHOTO_A_STEP = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "repeats": 1}
CAPTIONS_ALONE = {"instance_prompt": "", "caption_dropout": 0.0}
FIRST_STEPS = {
    ("ai-toolkit", ()): SIGMOID
    | {"rank": 16, "lora_alpha": 8.0, "target_modules": ("*transformer_blocks.*",)}
    | {"flow_shift": 1.0, "resolution": 1024, "more_resolutions": ("768", "512")}
    | ONE_PHOTO_A_STEP
    | {"gradient_accumulation_steps": 2, "instance_prompt": "sks", "caption_dropout": 0.05}
    | {"center_crop": True, "enable_bucket": True},
    (
        "ai-toolkit",
        (
            *("is_flux: true", "arch: zimage:turbo", "sigmoid", "weighted"),
            *(
                "linear: 16, linear_alpha: 8",
                "linear: 32",
                "accumulation_steps: 2",
                "accumulation: 3",
            ),
        ),
    ): {"rank": 32, "lora_alpha": 1.0, "target_modules": ("layers.*",), "flow_shift": 1.0}
    | {"weighting_scheme": "logit_normal", "logit_mean": -0.5, "logit_std": 1.55}
    | ONE_PHOTO_A_STEP
    | {"gradient_accumulation_steps": 3},
    (
        "ai-toolkit",
        (
            *("is_flux: true", "arch: sdxl", "flowmatch\n        opt", "ddpm\n        opt"),
            *(
                "batch_size: 1",
                "batch_size: 2",
                "[512, 768, 1024]",
                "768\n          num_repeats: 3",
            ),
            *("trigger_word: sks", "", "caption_dropout_rate: 0.05", "default_caption: a dog"),
        ),
    ): UNET
    | {"train_batch_size": 2, "gradient_accumulation_steps": 2, "repeats": 3, "resolution": 768}
    | {"more_resolutions": (), "instance_prompt": "a dog", "caption_dropout": 0.0},
    ("kohya", ()): UNET
    | {"rank": 16, "lora_alpha": 8.0, "resolution": 1024, "more_resolutions": ("512",)}
    | {"train_batch_size": 2, "gradient_accumulation_steps": 1, "repeats": 10}
    | {"instance_prompt": "sks dog", "caption_dropout": 0.0, "shuffle_caption": True}
    | {"keep_tokens": 1, "enable_bucket": True, "center_crop": True, "random_flip": False},
    (
        "kohya",
        (
            'networks.lora"\nnetwork_dim = 16\nnetwork_alpha = 8',
            'networks.lora_flux"\ntimestep_sampling = "shift"\ndiscrete_flow_shift = 3.1',
            *(
                "keep_tokens = 1",
                "flip_aug = true",
                "sdpa = true",
                "gradient_accumulation_steps = 4",
            ),
        ),
    ): SIGMOID
    | {"rank": 4, "lora_alpha": 1.0, "target_modules": ("*transformer_blocks.*",)}
    | {"flow_shift": 3.1, "gradient_accumulation_steps": 4, "keep_tokens": 0, "random_flip": True},
    (
        "kohya",
        (
            *('networks.lora"', 'networks.lora_zimage"\ndit = "z"\ntimestep_sampling = "shift"'),
            *("sdpa = true", "sigmoid_scale = 0.8\ndiscrete_flow_shift = 2.0"),
            *("keep_tokens = 1", "caption_dropout_rate = 0.1"),
        ),
    ): {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 0.8, "flow_shift": 2.0}
    | {"rank": 16, "lora_alpha": 8.0, "caption_dropout": 0.1}
    | {"target_modules": ("layers.*.attention.*", "layers.*.feed_forward.*")},
    ("OneTrainer", ()): UNET
    | {"target_modules": ("*attentions*",), "rank": 16, "lora_alpha": 1.0, "resolution": 1024}
    | {"train_batch_size": 4, "gradient_accumulation_steps": 1, "repeats": 20}
    | {"center_crop": True, "random_flip": True, "enable_bucket": True}
    | CAPTIONS_ALONE,
    (
        "OneTrainer",
        (
            *(SDXL_TYPE, '"FLUX_DEV_1", "timestep_distribution": "LOGIT_NORMAL"'),
            *('"lora_rank": 16, "lora_alpha": 1.0', '"lora_rank": 32, "lora_alpha": 16'),
            *('"batch_size": 4', '"batch_size": 2, "gradient_accumulation_steps": 2'),
            *('"resolution": "1024"', '"resolution": "512,768"'),
        ),
    ): SIGMOID
    | {"rank": 32, "lora_alpha": 16.0, "target_modules": ("*attn*", "*ff.net*", "*proj_mlp*")}
    | {"flow_shift": 1.0, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    | {"resolution": 768, "more_resolutions": ("512",)},
    (
        "OneTrainer",
        (
            *(SDXL_TYPE, '"Z_IMAGE", "timestep_shift": 2.5', "attn-mlp", "attn-only"),
            *('"enable_crop_jitter": false', '"enable_crop_jitter": true'),
            *('"balancing": 20.0', '"balancing": 2.6', '"batch_size": 4, ', ""),
        ),
    ): {"target_modules": ("layers.*attention*",), "weighting_scheme": "none", "flow_shift": 2.5}
    | {"center_crop": False, "repeats": 3, "train_batch_size": 1},
    ("SimpleTuner", ()): SIGMOID
    | {"rank": 8, "lora_alpha": None, "target_modules": ATTENTION_LAYERS, "flow_shift": 3.0}
    | {"train_batch_size": 1, "gradient_accumulation_steps": 1, "repeats": 4, "resolution": 1000}
    | {"instance_prompt": "sks dog", "caption_dropout": 0.1, "center_crop": False},
    (
        "SimpleTuner",
        (
            *('z_image", "--model_flavour": "base"', 'sdxl", "--lora_alpha": 4'),
            *('"--train_batch_size": 1', '"--caption_dropout_probability": 0.0'),
        ),
    ): UNET
    | {"target_modules": ATTENTION_LAYERS, "rank": 8, "lora_alpha": 4.0, "train_batch_size": 4}
    | {"caption_dropout": 0.0},
    (
        "SimpleTuner",
        (
            'z_image", "--model_flavour": "base"',
            'flux", "--model_flavour": "dev", "--flux_lora_target": "all+ffs", '
            '"--flow_sigmoid_scale": 0.9, "--gradient_accumulation_steps": 2',
        ),
    ): {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 0.9, "flow_shift": 3.0}
    | {"gradient_accumulation_steps": 2, "pretrained_model_name_or_path": FLUX_DEV}
    | {
        "target_modules": (
            *(*ATTENTION_LAYERS, *CONTEXT_LAYERS, "ff.net.0.proj", "ff.net.2"),
            *("ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
        )
    },
}
"""Trainer and changed text -> what its program does in the first step: the adapter, how noise
levels are drawn, photos, captions and batch. Three files for each."""


def warm_up(step: int, warmup: int) -> float:
    return min(1.0, step / warmup)


def fall_by_cosine(step: int, warmup: int, total: int) -> float:
    """A share of the rate, after a warm-up, before update number `step` + 1."""
    if step < warmup:
        return warm_up(step, warmup)
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


RATES = {
    ("ai-toolkit", (), 1000): lambda step: 1e-4,
    ("ai-toolkit", ("dtype: bf16", "lr_scheduler: cosine"), 1000): (
        lambda step: 1e-4 * fall_by_cosine(step, 0, 1000)
    ),
    (
        "ai-toolkit",
        ("dtype: bf16", "lr_scheduler: constant_with_warmup\n        dtype: bf16"),
        1000,
    ): lambda step: 1e-4 * warm_up(step, 500),
    ("kohya", (), 200): lambda step: 2e-4 * fall_by_cosine(step, 50, 200),
    ("kohya", ("cosine", "linear"), 200): (
        lambda step: 2e-4 * (warm_up(step, 50) if step < 50 else (200 - step) / 150)
    ),
    ("kohya", ("cosine", "constant_with_warmup"), 200): lambda step: 2e-4 * warm_up(step, 50),
    ("OneTrainer", (), 400): lambda step: 3e-4 * fall_by_cosine(step, 100, 400),
    ("OneTrainer", ('"COSINE"', '"CONSTANT"'), 400): lambda step: 3e-4 * warm_up(step, 100),
    ("OneTrainer", (MASKED, '"gradient_accumulation_steps": 4'), 100): (
        lambda step: 3e-4 * fall_by_cosine(step, 25, 100)
    ),
    ("SimpleTuner", ('"cosine"', '"constant"'), 300): lambda step: 2e-4,
    ("SimpleTuner", ('"cosine"', '"constant_with_warmup"'), 300): (
        lambda step: 2e-4 * warm_up(step, 20)
    ),
    # Its cosine swings; with a half period as long as the run it falls once.
    ("SimpleTuner", ('warmup_steps": 20', 'warmup_steps": 300'), 300): (
        lambda step: 2e-4 * fall_by_cosine(step, 0, 300)
    ),
}
"""Trainer, changed text and updates of the run -> the rate of its program before each update."""


def draw_noise_shares(trainer: str, changes: tuple[str, ...], count: int) -> torch.Tensor:
    """Draw shares of noise (count,) as a trainer's file says, whatever shift the base's own
    scheduler has."""
    config = TrainConfig.from_dict(load_config(write_config(trainer, changes))[0])
    schedule = build_noise_schedule(
        FlowMatchEulerDiscreteScheduler(shift=6.0), flow_shift=config.flow_shift
    )
    index = sample_flow_timesteps(
        schedule,
        count,
        torch.Generator().manual_seed(1),
        str(config.weighting_scheme),
        config.logit_mean,
        config.logit_std,
        config.mode_scale,
    )
    return 1 / (1 + 1 / schedule.sigmas[index])


@pytest.fixture(autouse=True)
def work_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("trainer", "changes", "expected"), ROWS)
def test_setting_means_what_the_trainer_does(trainer, changes, expected):
    _, translation = load_config(write_config(trainer, changes))
    assert not translation.unsupported and not translation.unknown
    config = TrainConfig.from_dict(translation.settings)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("case", FIRST_STEPS, ids=lambda case: f"{case[0]}-{case[1][1:2]}")
def test_first_step_is_that_of_the_trainer(case):
    _, translation = load_config(write_config(*case))
    assert not translation.unsupported and not translation.unknown
    config = TrainConfig.from_dict(translation.settings)
    assert config.instance_data_dir == "photos"
    expected = FIRST_STEPS[case]
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(("trainer", "changes", "key"), REFUSALS)
def test_value_with_another_meaning_is_refused(trainer, changes, key):
    _, translation = load_config(write_config(trainer, changes))
    (text,) = translation.unsupported
    assert key in text


@pytest.mark.parametrize("case", RATES, ids=lambda case: f"{case[0]}-{case[1][-1:]}")
def test_rate_of_the_first_tenth_and_last_step_is_that_of_the_trainer(case):
    trainer, changes, total = case
    _, translation = load_config(write_config(trainer, changes))
    assert not translation.unsupported and not translation.unknown
    config = TrainConfig.from_dict(translation.settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = make_lr_schedule(config, optimizer, total)
    rates = []
    for _ in range(total):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    expected = [RATES[case](step) for step in (0, 9, total - 1)]
    assert [rates[0], rates[9], rates[-1]] == pytest.approx(expected, rel=1e-6)


def test_noise_levels_are_drawn_as_often_as_ai_toolkit_weighs():
    """Means of its 1000 weights over tenths of the noise's share; all levels are drawn alike."""
    weights = torch.tensor([0.58, 0.73, 0.72, 0.76, 0.86, 1.0, 1.17, 1.36, 1.5, 1.32])
    shares = draw_noise_shares("ai-toolkit", ("sigmoid", "weighted"), 50_000)
    counts = torch.histc(shares, 10, 0, 1) / len(shares) * 10
    torch.testing.assert_close(counts, weights, atol=0.2, rtol=0)


@pytest.mark.parametrize("trainer_and_changes", NOISE_SHARES, ids=lambda item: item[0])
def test_noise_levels_have_the_distribution_of_the_trainer(trainer_and_changes):
    points = torch.linspace(0.05, 0.95, 19)
    shares = draw_noise_shares(*trainer_and_changes, 50_000)
    normal = torch.randn(50_000, generator=torch.Generator().manual_seed(2))
    expected = NOISE_SHARES[trainer_and_changes](normal)
    torch.testing.assert_close(
        shares.quantile(points), expected.quantile(points), atol=0.015, rtol=0
    )
