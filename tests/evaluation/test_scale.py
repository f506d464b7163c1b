"""The strength that a file wants: found by scores, written into header, card and page; the tensors stay as they are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dreambooth_moslora.adapters.export import note_scale
from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.adapters.raw_file import read_tensors
from dreambooth_moslora.training.explain import choose_scale
from dreambooth_moslora.training.model_card import with_strength
from dreambooth_moslora.ui.generate_form import summary_of
from tests.helpers.tiny_adapters import save_diffusers_lora


def header_of(file: Path) -> AdapterMetadata:
    with safe_open(file, framework="pt") as opened:
        return AdapterMetadata.from_json(opened.metadata()["moslora"])


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
    found = choose_scale(scores)
    assert (found.best, (found.low, found.high)) == (best, usable)
    assert f"best scale is {best:g}" in found.sentence()


def test_no_scale_is_recommended_when_none_shows_the_subject():
    assert choose_scale({0.4: 0.0, 1.0: 0.0}) is None


def test_a_header_without_scales_is_as_it_was_and_a_wrong_one_is_refused():
    facts = AdapterMetadata(4, 4.0)
    assert "scale" not in facts.to_json()
    known = replace(facts, best_scale=0.8, usable_scales=(0.6, 1.0))
    assert AdapterMetadata.from_json(known.to_json()) == known
    for wrong in ({"best_scale": "much"}, {"usable_scales": [1]}, {"usable_scales": ["a", "b"]}):
        with pytest.raises(ValueError):
            AdapterMetadata.from_json(json.dumps({"rank": 4, "alpha": 4.0, **wrong}))


def test_a_foreign_file_stays_as_it_is(tiny_base, tmp_path):
    from dreambooth_moslora.base.load import load_pipeline

    file = save_diffusers_lora(load_pipeline(tiny_base).unet, tmp_path)
    before = file.read_bytes()
    assert not note_scale(file, 0.8, (0.6, 1.0)) and file.read_bytes() == before


def test_a_published_file_keeps_its_tensors_and_the_page_presets_its_scale(dog, tmp_path):
    file = shutil.copy(dog[0] / "dog.kohya.safetensors", tmp_path / "dog.safetensors")
    tensors = read_tensors(file)[0]
    assert summary_of(file).scale == 1
    assert note_scale(file, 0.6, (0.4, 0.8)) and note_scale(file, 0.7, (0.4, 0.8))
    assert header_of(file).best_scale == 0.7 and header_of(file).usable_scales == (0.4, 0.8)
    assert summary_of(file).scale == 0.7 and "best at scale 0.7" in summary_of(file).sentence()
    after = read_tensors(file)[0]
    assert list(after) == list(tensors) and all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert note_scale(file, 1e9, (0.4, 0.8)) and summary_of(file).scale == 1  # beyond the slider


def test_a_card_names_the_strength_once():
    card = "# dog\n\n## Use\n\ncode\n\n## Training\n\n| | |\n"
    once = with_strength(card, 0.8, (0.6, 1.0))
    assert "Scale 0.8 scored best; from 0.6 to 1 the score stays near it" in once
    assert once.replace(once[once.index("## Strength") : once.index("## Training")], "") == card
    again = with_strength(once, 1.2, (1.2, 1.2))
    assert again.count("## Strength") == 1 and "Scale 1.2 scored best. In diffusers" in again
