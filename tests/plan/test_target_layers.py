"""The names of `--target_modules`: those of a UNet pass, others are answered with the nearest one."""

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.plan.checks import check_layers, check_targets

LAYERS = ["conv_in", "down.0.attn1.to_q", "down.0.attn1.to_k", "down.0.attn1.to_out.0", "mid.proj_in"]


@pytest.mark.parametrize("names", [("to_q", "to_out.0"), ("attn1.to_k",), ("conv_in",), ("down.0.attn1.to_q",)])
def test_ends_of_layers_paths_pass(names):
    check_targets(names, LAYERS)


@pytest.mark.parametrize(
    ("name", "says"),
    [("to_foo", "did you mean to_"), ("to_out", "did you mean to_out.0"), ("o_q", "mean to_q"), ("zzz", "to_v")],
)
def test_a_name_that_matches_nothing_is_answered_with_a_near_one(name, says):
    with pytest.raises(UserError, match=f"--target_modules {name}: .*{says}"):
        check_targets(("to_q", name), LAYERS)


def test_dora_on_a_convolution_is_refused_by_its_path():
    layers = dict.fromkeys(LAYERS, 2) | {"conv_in": 4, "down.0.conv1": 4}
    check_layers(("to_q",), layers, use_dora=True)
    check_layers(("to_q", "conv1"), layers, use_dora=False)
    with pytest.raises(UserError, match=r"--use_dora: down.0.conv1 is a convolution; leave conv1 out of"):
        check_layers(("to_q", "conv1"), layers, use_dora=True)


def test_a_layer_that_other_programs_could_not_read_again_is_refused():
    layers = {"time_embedding.linear_1": 2, "add_embedding.linear_1": 2}
    check_layers(("time_embedding.linear_1",), layers, use_dora=False)
    with pytest.raises(UserError, match=r"linear_1: add_embedding.linear_1 has no name in kohya's files"):
        check_layers(("linear_1",), layers, use_dora=False)
    with pytest.raises(UserError, match=r"kohya's files; name the blocks: down_blocks\.\*"):
        check_layers(("*",), layers, use_dora=False)
