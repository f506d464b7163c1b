"""Rules between settings: those that have no effect together are remarked on before a run."""

import pytest

from dreambooth_moslora.settings.rules import remarks
from dreambooth_moslora.settings.table import TrainConfig


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixer": "none", "max_train_steps": 3, "optimizer": "Prodigy", "learning_rate": 1.0},
        {"class_prompt": "a dog", "class_data_dir": "dogs", "with_prior_preservation": True},
        {"lr_warmup_steps": 0, "caption_model": "", "unmasked_weight": 0.0, "random_flip": False},
        {"train_text_encoder_ti": True, "text_encoder_lr": 1e-5, "num_new_tokens_per_abstraction": 3},
    ],
)
def test_settings_that_have_an_effect_or_switch_something_off_draw_no_remark(settings):
    assert remarks(TrainConfig(**settings)) == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"prior": "adapter_off"}, "--prior has no effect without --with_prior_preservation"),
        ({"class_prompt": "a dog"}, "--class_prompt has no effect without --with_prior_preservation"),
        (
            {"prior_prompts": "a cup", "with_prior_preservation": True, "class_prompt": "a dog"},
            "--prior_prompts has no effect without --with_prior_preservation --prior adapter_off",
        ),
        (
            {"class_data_dir": "x", "with_prior_preservation": True, "class_prompt": "x", "prior": "adapter_off"},
            "--class_data_dir has no effect with --prior adapter_off, which needs no images",
        ),
        ({"ema_decay": 0.0}, "--ema_decay has no effect without --use_ema"),
        ({"huber_c": 0.5}, "--huber_c has no effect without --loss_type huber or smooth_l1"),
        (
            {"timestep_bias_multiplier": 2.0},
            "--timestep_bias_multiplier has no effect without --timestep_bias_strategy",
        ),
        (
            {"text_encoder_lr": 1e-5},
            "--text_encoder_lr has no effect without --train_text_encoder or --train_text_encoder_ti",
        ),
        ({"token_abstraction": "TOK"}, "--token_abstraction has no effect without --train_text_encoder_ti"),
        (
            {"num_new_tokens_per_abstraction": 3, "initializer_concept": "dog", "train_text_encoder_ti": True},
            "--num_new_tokens_per_abstraction has no effect with --initializer_concept, whose words say how many",
        ),
        ({"lr_warmup_steps": 10}, "--lr_warmup_steps has no effect with --lr_scheduler constant"),
        ({"mixer": "none", "mixer_lr_scale": 2.0}, "--mixer_lr_scale has no effect with --mixer none"),
        ({"use_8bit_adam": True, "optimizer": "Adafactor"}, "--use_8bit_adam has no effect with --optimizer Adafactor"),
        ({"dataloader_num_workers": 2}, "--dataloader_num_workers has no effect while photos are cached"),
        (
            {"num_train_epochs": 3, "max_train_steps": 10},
            "--num_train_epochs has no effect with --max_train_steps or --exposures_per_photo",
        ),
        (
            {"num_train_epochs": 3, "exposures_per_photo": 10},
            "--num_train_epochs has no effect with --max_train_steps or --exposures_per_photo",
        ),
        ({"mask_model": "x", "mask_prompt": ""}, "--mask_model has no effect without --masks auto"),
        (
            {"masks": "auto", "mask_prompt": "dog"},
            "--mask_prompt has no effect with the embedded base's own net; --mask_model names a CLIPSeg",
        ),
        ({"optimizer": "Prodigy"}, "Prodigy needs --learning_rate near 1.0"),
        (
            {"optimizer": "AdamWScheduleFree", "lr_scheduler": "cosine"},
            "--optimizer AdamWScheduleFree works best with --lr_scheduler constant or constant_with_warmup",
        ),
    ],
)
def test_a_setting_that_goes_badly_with_the_others_is_named_once(settings, line):
    assert remarks(TrainConfig(**settings)) == [line]
