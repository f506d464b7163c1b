"""`--rank_pattern` and `--alpha_pattern`: each layer has its own size in the run, in its files and
in the estimate."""

import pytest
from safetensors.torch import load_file

from dreambooth_moslora.cli.command_train import train_main
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora.raw_file import read_raw
from dreambooth_moslora.settings.train_config import get_rank_and_alpha
from dreambooth_moslora.training.checkpoint import check_resumed_settings, verify_checkpoint
from dreambooth_moslora.training.dry_run import describe_run
from dreambooth_moslora.training.loop import train
from tests.helpers.command_line import parse_train_config
from tests.helpers.tiny_training import paint_photos, tiny_config

SIZES = {
    "target_modules": ("blora_style", "blora_content", "down_blocks.1.*"),
    "rank": 4,
    "rank_pattern": ("blora_style=2", "*conv1:3", "attn2.to_k=6", "down_blocks.1.*=5"),
    "alpha_pattern": ("to_q=1.5",),
}
EXPECTED = {
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": (2, 2.0),
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (6, 6.0),
    "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (4, 1.5),
    "down_blocks.1.resnets.0.conv1": (3, 3.0),
    "down_blocks.1.resnets.0.conv2": (5, 5.0),
}


@pytest.fixture(scope="module")
def config(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    photos = paint_photos(folder / "photos")
    return lambda **changes: tiny_config(
        tiny_base,
        photos,
        folder / "run",
        **SIZES | {"max_train_steps": 2, "checkpointing_steps": 2} | changes,
    )


@pytest.fixture(scope="module")
def run(config):
    train(config())
    return RunDir(config().output_dir)


def test_first_matching_pattern_counts_and_alpha_follows_rank(config):
    assert {path: get_rank_and_alpha(config(), "unet", path) for path in EXPECTED} == EXPECTED
    assert get_rank_and_alpha(config(lora_alpha=8.0), "unet", min(EXPECTED)) == (3, 8.0)
    assert get_rank_and_alpha(config(), "text_encoder", "attn2.to_k") == (4, 4.0)


def test_checkpoint_files_and_dry_run_have_each_layers_size(run, config):
    tensors, facts = read_raw(run.find_latest_checkpoint() / "moslora_weights.safetensors")
    kohya = load_file(run.kohya_path)
    for path, (rank, alpha) in EXPECTED.items():
        name = "lora_unet_" + path.replace(".", "_")
        assert (
            tensors[f"unet.{path}.lora_A"].shape[0]
            == kohya[f"{name}.lora_down.weight"].shape[0]
            == rank
        )
        assert facts.alphas.get(f"unet.{path}", facts.alpha) == alpha and f"{name}.alpha" in kohya
    (proof,) = (event["proof"] for event in run.read_events() if event["type"] == "export")
    assert proof["max_relative_difference"] < 1e-5
    assert "rank 2 to 6" in run.card_path.read_text()
    count, layers = sum(tensor.numel() for tensor in tensors.values()), len(tensors) // 3
    assert f"adapter: {count:,} parameters on {layers} layers" in describe_run(config())


def test_a_run_is_resumed_with_the_same_sizes_alone(run, config):
    checkpoint = run.find_latest_checkpoint()
    check_resumed_settings(config(), checkpoint, verify_checkpoint(checkpoint))
    for changes, says in (
        (
            {"rank_pattern": SIZES["rank_pattern"][1:]},
            "--rank_pattern: checkpoint-2 has 2; you ask for 4",
        ),
        ({"rank_pattern": ()}, "--rank: checkpoint-2 has"),
        ({"alpha_pattern": ()}, "--lora_alpha: checkpoint-2 has 1.5; you ask for"),
        ({"alpha_pattern": ("to_q=2",)}, "--alpha_pattern: checkpoint-2 has 1.5; you ask for 2"),
    ):
        with pytest.raises(UserError, match=says):
            check_resumed_settings(config(**changes), checkpoint, verify_checkpoint(checkpoint))


@pytest.mark.slow
def test_checkpoint_with_fewer_layers_than_set_is_refused(config, tmp_path):
    """`to_q` alone means more layers than `mid_block.*.to_q`, though each layer there is a
    `to_q`."""
    few = {"rank_pattern": (), "alpha_pattern": (), "output_dir": str(tmp_path)}
    train(config(**few | {"target_modules": ("mid_block.*.to_q",)}))
    with pytest.raises(
        UserError, match="target_modules: checkpoint-2 was trained on other layers, first down_"
    ):
        train(
            config(
                **few
                | {
                    "target_modules": ("to_q",),
                    "resume_from_checkpoint": "latest",
                    "max_train_steps": 3,
                }
            )
        )


NONE_SUCH, NEAR = "no layer with an adapter has that name", "up_blocks.0.attention.1"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank_pattern": ("to_r=8",)}, f"--rank_pattern to_r=8: {NONE_SUCH}; did you mean to_"),
        ({"alpha_pattern": ("mid_block=8",)}, f"--alpha_pattern mid_block=8: {NONE_SUCH}"),
        (
            {"target_modules": (NEAR,)},
            f"{NEAR}: the UNet has no such layer; did you mean up_blocks.0",
        ),
        (
            {"mixer": "butterfly", "rank_pattern": ("to_q=3",)},
            "mixer butterfly needs an even rank, not 3",
        ),
    ],
)
def test_names_that_mean_nothing_are_answered_with_a_near_one(config, changes, says):
    with pytest.raises(UserError, match=says):
        describe_run(config(**changes))


def test_patterns_come_from_the_command_line_and_from_files(tmp_path):
    (tmp_path / "c.toml").write_text(
        'rank_pattern = ["to_k=8", "mid_block.*=2"]\nalpha_pattern = "to_k=4"\n'
    )
    argv = [
        "--pretrained_model_name_or_path",
        "toy",
        "--instance_data_dir",
        "x",
        "--instance_prompt",
        "sks dog",
    ]
    flags = ["--rank_pattern", "to_k=8", "mid_block.*=2", "--alpha_pattern", "to_k=4"]
    diffusers_way, kohya_way = (
        parse_train_config([*argv, *more])
        for more in (flags, ["--config", str(tmp_path / "c.toml")])
    )
    assert diffusers_way == kohya_way and diffusers_way.rank_pattern == ("to_k=8", "mid_block.*=2")
    assert train_main([*argv, "--use_blora"]) == 2
