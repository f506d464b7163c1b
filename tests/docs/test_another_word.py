"""The copies of sample subjects that stand beside others in a study."""

import json
from pathlib import Path

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.settings.prompts import learnt_words
from dreambooth_moslora.settings.sources import load_settings
from dreambooth_moslora.settings.table import TrainConfig
from tools.another_word import main


def test_only_the_word_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    main(["rocket", "--word", "zwx", "--out", str(tmp_path)])
    copied, source = tmp_path / "rocket", Path("assets/subjects/rocket")
    assert sorted(path.name for path in copied.iterdir()) == sorted(path.name for path in source.iterdir())
    facts = json.loads((copied / "subject.json").read_text())
    assert facts == {**json.loads((source / "subject.json").read_text()), "token": "zwx"}
    prompt = "a photo of a zwx rocket"
    photos = photo_report(TrainConfig(instance_data_dir=str(copied), instance_prompt=prompt)).photos
    assert len(photos) == 5 and all(caption.startswith(prompt) for photo in photos for caption in photo.captions)


def test_the_recipe_of_two_subjects_says_what_to_change_for_new_tokens(tmp_path):
    recipe = (Path(__file__).parents[2] / "assets/configs/two_subjects.toml").read_text(encoding="utf-8")
    head, changed = recipe.partition("\n\n")[0], recipe
    assert "python -m tools.another_word rocket --word zwx --out runs/zwx" in head
    for old, new in (
        ("assets/subjects/rocket", "runs/zwx/rocket"),
        ("a photo of a sks rocket", "a photo of a zwx rocket"),
    ):
        assert f'"{new}"' in head
        changed = changed.replace(f'"{old}"', f'"{new}"')

    def words_of(text: str) -> tuple[str, ...]:
        (tmp_path / "two.toml").write_text(text, encoding="utf-8")
        return learnt_words(TrainConfig(**load_settings(tmp_path / "two.toml"), train_text_encoder_ti=True))

    assert words_of(changed) == ("sks", "zwx")
    with pytest.raises(UserError, match="a rare word of its own"):
        words_of(recipe)
