"""`--new_backgrounds`: subjects before scenes of the base, made once in the run folder, and trained on."""

from dataclasses import replace

import pytest
from PIL import Image, ImageChops, ImageDraw, ImageStat

from dreambooth_moslora.cli.main import train_main
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.prompts import placed, scene_places
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.photos.backgrounds import new_backgrounds
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.training.inputs import run_backgrounds
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.planning.advice import settings_without_effect
from dreambooth_moslora.training.planning.dry_run import describe_run
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")

SUBJECT = (12, 14, 48, 52)


def masked_photos(folder):
    folder = paint_photos(folder, count=2)
    for photo in sorted(folder.glob("*.png")):
        mask = Image.new("L", Image.open(photo).size)
        ImageDraw.Draw(mask).ellipse(SUBJECT, fill=255)
        mask.save(photo.with_suffix(".mask.png"))
    return folder


@pytest.fixture
def config(tiny_base, tmp_path):
    photos = masked_photos(tmp_path / "photos")
    return tiny_config(tiny_base, photos, tmp_path / "run", new_backgrounds=2, max_train_steps=2)


@pytest.fixture(scope="module")
def drawn():
    """Prompt and size of each scene that the base was asked for."""
    asked, draw = [], run_backgrounds.generate_images

    def generate(pipeline, prompt, seeds, size_px, should_stop=bool):
        asked.append((prompt, size_px))
        return draw(pipeline, prompt, seeds, size_px, should_stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_backgrounds, "generate_images", generate)
        yield asked


@pytest.fixture(scope="module")
def finished(tiny_base, drawn, tmp_path_factory):
    """The configuration of a run that has ended."""
    home = tmp_path_factory.mktemp("backgrounds")
    config = tiny_config(tiny_base, masked_photos(home / "photos"), home / "run", new_backgrounds=2, max_train_steps=2)
    train(config)
    return config


def made_of(config):
    folder = RunDir(config.output_dir).backgrounds_dir
    return list(new_backgrounds(config, photo_report(config).photos, folder))


@pytest.mark.slow
def test_a_run_draws_them_once_and_goes_on_with_the_same(finished, drawn):
    made, places = made_of(finished), scene_places(finished)
    assert [one.path.name for one in made] == ["0.png.0.png", "0.png.1.png", "1.png.0.png", "1.png.1.png"]
    assert all(one.is_made and one.place in places for one in made) and len({one.place for one in made}) == 4
    assert [size for _, size in drawn] == [one.scene_px for one in made] == [(48, 80), (48, 80), (72, 56), (72, 56)]
    assert all(one.place in prompt for one, (prompt, _) in zip(made, drawn, strict=True))
    assert (made[0].path.parent / "sheet.png").is_file()
    first = adapter_sha256(RunDir(finished.output_dir).path)
    made[1].path.write_bytes(b"half a picture")
    train(finished)
    assert len(drawn) == 5 and adapter_sha256(RunDir(finished.output_dir).path) == first
    (made[0].path.parent / "sheet.png").unlink()  # as when a run is killed before it is drawn
    train(finished)
    assert len(drawn) == 5 and (made[0].path.parent / "sheet.png").is_file()


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_draws_goes_on_to_the_same_bytes(finished, tmp_path):
    config = replace(finished, output_dir=str(tmp_path / "run"))
    whole, folder = (RunDir(found.output_dir).backgrounds_dir for found in (finished, config))
    stopped = train(config, should_stop=lambda: len(list(folder.glob("*.[01].png"))) > 1)
    assert stopped.interrupted and stopped.step == 0 and not (folder / "sheet.png").exists()
    train(replace(config, resume_from_checkpoint="latest"))
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert adapter_sha256(tmp_path / "run") == adapter_sha256(whole.parent)


@pytest.mark.slow
def test_the_subject_stays_as_it_is_and_nothing_of_the_old_background_does(finished):
    one = made_of(finished)[0]
    whole, photo = Image.open(one.path), Image.open(one.photo.path).convert("RGB")
    assert whole.size == photo.size
    inside, rim = (24, 26, 36, 40), (SUBJECT[2] + 1, 0, photo.width, photo.height)
    assert difference(whole.crop(inside), photo.crop(inside)) < 2
    assert difference(whole.crop(rim), photo.crop(rim)) > 20
    found = one.as_photo(finished)
    assert found.captions == (placed("a photo of sks dog", one.place),) and found.mask_path == one.mask_path


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean, of 255 levels."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


@pytest.mark.slow
def test_they_are_learnt_from(finished, tmp_path):
    plain = replace(finished, new_backgrounds=0, output_dir=str(tmp_path / "plain"))
    train(plain)
    assert adapter_sha256(tmp_path / "plain") != adapter_sha256(RunDir(finished.output_dir).path)
    assert not (tmp_path / "plain" / "backgrounds").exists()


def test_photos_without_masks_are_refused_before_the_base_is_loaded(config, tmp_path):
    for mask in (tmp_path / "photos").glob("*.mask.png"):
        mask.unlink()
    broken = replace(config, pretrained_model_name_or_path=str(tmp_path))
    with pytest.raises(UserError, match="--new_backgrounds needs masks"):
        train(broken)
    with pytest.raises(UserError, match="--new_backgrounds needs masks"):
        describe_run(config)


def test_photos_without_masks_leave_no_run_folder(tmp_path, capsys):
    words = ["--instance_data_dir", str(paint_photos(tmp_path / "photos")), "--output_dir", str(tmp_path / "run")]
    words += ["--pretrained_model_name_or_path", "toy", "--instance_prompt", "a photo of sks dog", "--resolution", "64"]
    assert train_main([*words, "--new_backgrounds", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --new_backgrounds needs masks")
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_them_and_says_what_will_be_drawn(config):
    said = describe_run(replace(config, background_scenes=("in a barn",), max_train_steps=None))
    assert "new backgrounds: 4 pictures before scenes that the base draws before training, of 2 photos" in said
    assert "6 steps an epoch" in said and "“in a barn”" in said
    idle = replace(config, new_backgrounds=0, background_scenes=("in a barn",))
    assert any("--background_scenes has no effect" in line for line in settings_without_effect(idle))


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("a photo of sks dog", "a photo of sks dog in a barn"),
        ("a photo of a sks dog on grass, sharp", "a photo of a sks dog in a barn"),
    ],
)
def test_the_caption_names_the_new_place_alone(prompt, caption):
    assert placed(prompt, "in a barn") == caption
