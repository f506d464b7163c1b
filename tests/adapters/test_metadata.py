"""What a file tells of its run and what a reader concludes from it; what `info` says of a file, however odd it is, and
in what two adapter files differ; the strength that an adapter wants."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.adapters import published_file, raw_file
from dreambooth_moslora.adapters.describe import describe, difference_of
from dreambooth_moslora.adapters.metadata import AdapterMetadata, concluded, told_by, with_told
from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.prompts import class_word_of, trigger_words
from dreambooth_moslora.settings.sources import load_settings
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import explain, model_card
from dreambooth_moslora.ui.generate_values import summary_of
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_adapters import save_diffusers_lora

CONFIGS = Path(__file__).parents[2] / "assets" / "configs"
PROMPTS = tuple(load_settings(CONFIGS / "toy.toml")["prior_prompts"])
NAME = "lora_unet_mid_block_attentions_0_proj_in"
TENSORS = {"a": torch.arange(4.0), "b": torch.zeros(2, 3), "s": torch.tensor(1.0)}


def told(config: TrainConfig) -> AdapterMetadata:
    words = {"trigger_words": trigger_words(config), "class_word": class_word_of(config), "base_id": "toy"}
    return with_told(config, AdapterMetadata(4, 4, **words))


def recipe(name: str, **changes) -> TrainConfig:
    return TrainConfig.from_dict(load_settings(CONFIGS / f"{name}.toml") | changes)


@pytest.mark.parametrize("name", ["quickstart", "toy", "overtrained"])
def test_the_header_of_an_unchanged_recipe_does_not_grow(name):
    facts, config = told(recipe(name)), recipe(name)
    assert not told_by(facts) and "public" not in facts.to_json() and "withheld" not in facts.to_json()
    found = concluded(AdapterMetadata.from_json(facts.to_json()))
    assert (found["instance_prompt"], found["prior_prompts"]) == (config.instance_prompt, config.prior_prompts)


def test_only_what_shapes_the_run_and_the_prompts_of_a_recipe_are_told():
    idle = {"mask_prompt": "alice", "class_data_dir": "/alice"}
    idle |= {"initializer_concept": "alice", "revision": "alice", "prior_prompts": ["alice"], "token": "sks"}
    assert not told_by(told(TrainConfig(instance_prompt="a photo of a sks dog", class_prompt="a dog", **idle)))
    one = {"instance_data_dir": "/alice", "instance_prompt": "alice", "class_prompt": "a dog"}
    two = one | {"instance_data_dir": "/bob", "instance_prompt": "bob"}
    assert told(TrainConfig(subjects=[one, two], with_prior_preservation=True)).withheld == ("subjects",)
    words = told(TrainConfig(instance_prompt="a drawing of alice", init_adapter="/alice"))
    assert words.withheld == ("instance_prompt", "init_adapter")
    sdxl = {"pretrained_model_name_or_path": "other/base", "revision": "alice", "mask_model": "/alice"}
    found = told(TrainConfig(instance_prompt="a photo of a sks dog", masks="auto", variant="fp16", **sdxl))
    assert (found.public, found.withheld) == ({"variant": "fp16"}, ("revision", "mask_model"))
    facts = told(recipe("toy", rank=3))
    assert (facts.public, facts.withheld) == ({"prior_prompts": PROMPTS}, ())
    assert concluded(AdapterMetadata.from_json(facts.to_json()))["prior_prompts"] == PROMPTS
    own = told(recipe("toy", rank=3, prior_prompts=[*PROMPTS, "alice"], leave_out=["alice.png"]))
    assert (own.public, set(own.withheld)) == ({}, {"prior_prompts", "leave_out"}) and "alice" not in own.to_json()
    none = told(recipe("toy", prior_prompts=[]))
    assert none.public == {"prior_prompts": ()} and concluded(none)["prior_prompts"] == ()


STRANGE = [{"output_dir": "/etc"}, {"variant": "../x"}, {"variant": ["fp16"]}, {"prior_prompts": "a"}, {"x": 1}]
STRANGE = [("public", public) for public in STRANGE]
STRANGE += [("best_scale", "much"), ("usable_scales", [1]), ("usable_scales", ["a", "b"])]


@pytest.mark.parametrize(("name", "value"), STRANGE)
def test_a_strangers_header_may_only_hold_what_a_file_tells(name, value):
    with pytest.raises(ValueError, match=name):
        AdapterMetadata.from_json(json.dumps({"rank": 4, "alpha": 4.0, name: value}))
    known = replace(AdapterMetadata(4, 4.0), best_scale=0.8, usable_scales=(0.6, 1.0))
    assert AdapterMetadata.from_json(known.to_json()) == known and "scale" not in AdapterMetadata(4, 4.0).to_json()


@pytest.mark.parametrize(
    ("scores", "best", "usable"),
    [
        ({0.4: 0.2, 0.6: 0.5, 0.8: 0.6, 1.0: 0.58, 1.2: 0.3}, 0.8, (0.8, 1.0)),
        ({0.4: 0.2, 0.6: 0.5, 0.8: 0.600, 1.0: 0.598, 1.2: 0.597}, 1.0, (0.8, 1.2)),  # all as good: as trained
        ({0.4: 0.6, 0.6: 0.3, 0.8: 0.6, 1.0: 0.2, 1.2: 0.1}, 0.8, (0.8, 0.8)),  # a gap ends the range
        ({0.4: 0.1, 0.6: 0.2, 0.8: 0.3, 1.0: 0.4, 1.2: 0.5}, 1.2, (1.2, 1.2)),
    ],
)
def test_the_best_scale_and_the_range_around_it(scores, best, usable):
    found = explain.choose_scale(scores)
    assert (found.best, (found.low, found.high)) == (best, usable)
    assert f"best scale is {best:g}" in found.sentence()
    assert explain.choose_scale(dict.fromkeys(scores, 0.0)) is None, "none shows the subject"


def test_a_published_file_keeps_its_tensors_and_the_page_and_the_card_name_its_scale(dog, tmp_path):
    file = shutil.copy(dog[0] / "dog.kohya.safetensors", tmp_path / "dog.safetensors")
    tensors = raw_file.read_tensors(file)[0]
    assert summary_of(file).scale == 1
    assert published_file.note_scale(file, 0.6, (0.4, 0.8)) and published_file.note_scale(file, 0.7, (0.4, 0.8))
    after, header = raw_file.read_tensors(file)
    facts = AdapterMetadata.from_json(header["moslora"])
    assert facts.best_scale == 0.7 and facts.usable_scales == (0.4, 0.8)
    assert summary_of(file).scale == 0.7 and "best at scale 0.7" in summary_of(file).sentence()
    assert list(after) == list(tensors) and all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert published_file.note_scale(file, 1e9, (0.4, 0.8)) and summary_of(file).scale == 1  # beyond the slider
    foreign = save_diffusers_lora(tiny_unet(), tmp_path)
    before = foreign.read_bytes()
    assert not published_file.note_scale(foreign, 0.8, (0.6, 1.0)) and foreign.read_bytes() == before
    card = "# dog\n\n## Use\n\ncode\n\n## Training\n\n| | |\n"
    once = model_card.with_strength(card, 0.8, (0.6, 1.0))
    assert "Scale 0.8 scored best; from 0.6 to 1 the score stays near it" in once
    assert once.replace(once[once.index("## Strength") : once.index("## Training")], "") == card
    again = model_card.with_strength(once, 1.2, (1.2, 1.2))
    assert again.count("## Strength") == 1 and "Scale 1.2 scored best. In diffusers" in again


def pair(dtype=torch.float32, value: float = 1.0) -> dict[str, torch.Tensor]:
    down, up = torch.full((2, 4), value, dtype=dtype), torch.full((4, 2), value, dtype=dtype)
    return {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up}


ODD = {
    "overflow": pair(torch.float64, 1e200),
    "complex alpha": pair() | {f"{NAME}.alpha": torch.tensor(1 + 1j)},
    "float4": {key: torch.zeros(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for key in pair()},
    "up alone": {key: value for key, value in pair().items() if "up" in key} | {f"{NAME}_b.lora_mid": torch.ones(1)},
}


@pytest.mark.parametrize("kind", ODD)
def test_a_file_that_cannot_be_computed_with_is_refused_in_words(tmp_path, kind):
    save_file(ODD[kind], tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="is broken"):
        describe(tmp_path / "odd.safetensors")


def test_a_foreign_file_is_described_whatever_its_kernels_are(tmp_path):
    eye, found = torch.eye(4)[..., None, None], {}
    plain = {"lora_up": eye, "lora_down": eye}
    changes = {"plain": {}, "with a middle": {"lora_mid": torch.ones(4, 4, 3, 3)}, "empty": {"lora_up": eye[:0]}}
    for name, change in changes.items():
        tensors = {f"lora_unet_conv_in.{part}.weight": tensor.clone() for part, tensor in (plain | change).items()}
        save_file(tensors, tmp_path / "x.safetensors")
        found[name] = describe(tmp_path / "x.safetensors")
    assert found["plain"]["effective_rank_median"] == 4 and found["plain"]["kind"] == "kohya keys"
    assert "effective_rank_median" not in found["with a middle"] and "LoCon" in found["with a middle"]["kind"]
    assert found["empty"]["ranks"] == {"4": 1}


@pytest.fixture
def against(tmp_path):
    """The difference of TENSORS, whose header names torch 1, and other tensors."""
    save_file(TENSORS, tmp_path / "one.safetensors", metadata={"moslora": json.dumps({"versions": {"torch": "1"}})})

    def difference(changes: dict, header: str = json.dumps({"versions": {"torch": "1"}})):
        tensors = {name: tensor for name, tensor in (TENSORS | changes).items() if tensor is not None}
        save_file(tensors, tmp_path / "other.safetensors", metadata={"moslora": header})
        return difference_of(tmp_path / "one.safetensors", tmp_path / "other.safetensors")

    return difference


ALONE, GAP = "is in one of the files alone", "of its norm"
OTHERS = [({}, "", False), ({"b": None}, f"b {ALONE}", False), ({"c": torch.ones(1)}, f"c {ALONE}", False)]
OTHERS += [({"b": torch.zeros(6)}, "b is [2, 3] and [6]", True)]
OTHERS += [({"a": torch.arange(4.0).half()}, "a is float32 and float16", True)]
OTHERS += [({"s": torch.tensor(2.0)}, f"s differs by 1.0e+00 {GAP}", False)]
OTHERS += [({"a": torch.tensor([0.0, 1.0, 2.0, 2.0])}, f"a differs by 2.7e-01 {GAP}", False)]
OTHERS += [({"b": -torch.zeros(2, 3)}, f"b differs by 0.0e+00 {GAP}", False)]


@pytest.mark.parametrize(("changes", "first", "is_cast"), OTHERS)
def test_tensors_are_compared_bit_by_bit(against, changes, first, is_cast):
    """A cast is another shape or type, and no other number."""
    found = against(changes)
    assert (found.first, found.count, found.is_cast) == (first, bool(first), is_cast) and not found.header


def test_facts_of_headers_and_updates_are_compared_whatever_the_factors(against, tmp_path):
    """One layer of two has half its update: by hand, sqrt(0.25 / 2)."""
    assert against({}, json.dumps({"versions": {"torch": "2"}, "best_scale": 0.8})).header == ("best_scale", "versions")
    assert "moslora" in against({}, "{broken").header
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a safetensors file"):
        difference_of(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    same = {f"unet.{layer}.lora_{half}.weight": torch.ones(1, 1) for layer in "xy" for half in "AB"}
    halved = same | {"unet.y.lora_B.weight": torch.full((1, 1), 0.5)}
    scaled = halved | {"unet.y.lora_A.weight": torch.full((1, 1), 2.0)}
    for tensors, gap in ((halved, 0.125**0.5), (scaled, 0)):
        for name, content in (("a", same), ("b", tensors)):
            save_file(content, tmp_path / f"{name}.safetensors")
        found = difference_of(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        assert found.of_updates == pytest.approx(gap)
    assert against({}).of_updates == against({"c": torch.ones(1)}).of_updates == float("inf")
