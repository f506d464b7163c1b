"""The plan of a run is made once, and each photo is opened once to be inspected."""

from collections import Counter

from dreambooth_moslora.cli.main import train_main
from dreambooth_moslora.photos import folder, masks
from dreambooth_moslora.plan import plan
from tests.helpers.tiny_training import paint_photos


def test_a_scored_run_by_one_word_makes_one_plan_and_opens_each_photo_once(tiny_base, encoders, tmp_path, monkeypatch):
    """Encoding and scoring open them for their pixels, by `photo.open_rgb`."""
    opened, plans = Counter(), []

    def counting(path, *sizes):
        opened[path.name] += 1
        return open_image(path, *sizes)

    def planning(*settings):
        plans.append(settings)
        return estimate(*settings)

    open_image, estimate = folder.open_image, plan.estimate
    monkeypatch.setattr(folder, "open_image", counting)
    monkeypatch.setattr(masks, "open_image", counting)
    monkeypatch.setattr(plan, "estimate", planning)
    monkeypatch.setattr("dreambooth_moslora.evaluation.during_training.load_encoders", lambda name: encoders)
    photos = paint_photos(tmp_path / "photos")
    flags = ["--pretrained_model_name_or_path", str(tiny_base), "--resolution", "64", "--report_to", "none"]
    flags += ["--max_train_steps", "1", "--evaluate_steps", "1", "--num_validation_images", "0", "--no_find_scale"]
    assert train_main([str(photos), "dog", *flags, "--output_dir", str(tmp_path / "dog")]) == 0
    assert opened == {path.name: 1 for path in photos.iterdir()} and len(plans) == 1
    assert "evaluation" in (tmp_path / "dog" / "metrics.jsonl").read_text()
