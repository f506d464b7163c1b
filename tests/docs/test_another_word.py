"""The copies of sample subjects that stand beside others in a study."""

import json
from pathlib import Path

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.photos.folder import instance_photos
from tools.another_word import main


def test_only_the_word_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    main(["rocket", "--word", "zwx", "--out", str(tmp_path)])
    copied, source = tmp_path / "rocket", Path("assets/subjects/rocket")
    assert sorted(path.name for path in copied.iterdir()) == sorted(path.name for path in source.iterdir())
    facts = json.loads((copied / "subject.json").read_text())
    assert facts == {**json.loads((source / "subject.json").read_text()), "token": "zwx"}
    prompt = "a photo of a zwx rocket"
    photos = instance_photos(TrainConfig(instance_data_dir=str(copied), instance_prompt=prompt)).photos
    assert len(photos) == 5 and all(caption.startswith(prompt) for photo in photos for caption in photo.captions)
