"""From one photo to many: what is drawn, what is kept and why not, and the command whole."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from dreambooth_moslora.cli import command_enlarge
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.cli.terminal import EXIT_DONE, EXIT_MISTAKE
from dreambooth_moslora.evaluation import enlarge
from dreambooth_moslora.evaluation.metrics import load_dino
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.synthetic import RECORD_NAME, REJECTED_NAME, read_record
from dreambooth_moslora.settings import toy_bases
from dreambooth_moslora.settings.family_facts import FACTS_BY_PIPELINE
from dreambooth_moslora.settings.metric_kinds import MIN_LIKENESS
from tests.helpers.planted import planted
from tests.helpers.tiers import slow_but
from tests.helpers.tiny_families import tiny_pipeline
from toybox.make_subjects import SUBJECTS, Subject

PHOTOS = Path(toy_bases.ASSETS) / "subjects"


@pytest.fixture(scope="module")
def dino():
    return load_dino(toy_bases.DINO_FOLDER)


def toy(name: str, number: int) -> Image.Image:
    """A photo of a toy at the side at which the renders are sharp."""
    picture = Image.open(PHOTOS / name / f"{number:02d}.jpg")
    return picture.resize((128, 128), Image.Resampling.LANCZOS)


def test_each_shot_has_a_name_a_prompt_and_a_key_of_its_own():
    shots = enlarge.build_shots("dog", 45, 7, base="a")
    assert len({shot.name for shot in shots}) == len({shot.request.seed for shot in shots}) == 45
    first = shots[0]
    assert first.name == f"from_the_side_7_{first.key[:6]}.png" and first.request.seed == 7
    assert first.request.prompt.startswith("a photo of a dog seen from the side, on grass")
    assert first.request.prompt.endswith("the same dog as in the reference pictures")
    assert enlarge.build_shots("dog", 45, 7, base="a") == shots
    other = enlarge.build_shots("dog", 1, 7, base="b")[0]
    assert other.key != first.key and other.name != first.name


def test_pictures_that_are_broken_copies_or_of_another_subject_are_told_apart(dino):
    sorter = enlarge.ShotSorter(dino, toy("duck", 0))
    sorter.add_reference("1.jpg", toy("duck", 1))
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    judged = {
        "grass": toy("duck", 2),
        "robot": toy("robot", 0),
        "turned": ImageOps.mirror(toy("duck", 0)),
        "again": toy("duck", 1).crop((2, 2, 126, 126)),
        "black": Image.new("RGB", (128, 128)),
        "noise": Image.fromarray(noise),
        "blurred": toy("duck", 2).filter(ImageFilter.GaussianBlur(3)),
    }
    found = {name: sorter.evaluate_image(picture) for name, picture in judged.items()}
    assert {name: verdict.reason_kind for name, verdict in found.items()} == {
        "grass": "",
        "robot": "not the subject",
        "turned": "near copy",
        "again": "near copy",
        "black": "broken",
        "noise": "broken",
        "blurred": "broken",
    }
    assert found["turned"].reason == "near copy: of the photo"
    assert found["again"].reason == "near copy: of 1.jpg"
    details = [found[name].reason for name in ("black", "noise", "blurred")]
    assert [word.split()[1].rstrip(",") for word in details] == ["one", "noise", "blurred"]
    assert found["grass"].likeness > MIN_LIKENESS > found["robot"].likeness


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_of_twenty_planted_ones_eighteen_are_rejected_and_of_twenty_good_ones_two_at_most(
    name, dino
):
    """The threshold was chosen on sixteen other toys (`individuals(16, seed=2)`)."""
    subject = planted(Subject(name, SUBJECTS[name], SUBJECTS[name].kind))
    sorter = enlarge.ShotSorter(dino, subject.photo)
    rejected = {True: 0, False: 0}
    for number, (picture, is_good) in enumerate(subject.candidates):
        if sorter.evaluate_image(picture).reason:
            rejected[is_good] += 1
        else:
            sorter.add_reference(str(number), picture)
    assert len(subject.candidates) == 40
    assert rejected[False] >= 18 and rejected[True] <= 2, rejected


class Drawn:
    """Stands for the model: gives these pictures of the shots, and notes what was asked."""

    def __init__(self, shots: Sequence[enlarge.ShotRequest], pictures: Sequence[Image.Image]):
        self.pictures = dict(zip([shot.name for shot in shots], pictures, strict=True))
        self.asked: list[str] = []
        self.ends_at = ""

    def __call__(self, shots: Sequence[enlarge.ShotRequest]) -> Iterator[Image.Image]:
        for shot in shots:
            if shot.name == self.ends_at:
                raise KeyboardInterrupt
            self.asked.append(shot.name)
            yield self.pictures[shot.name]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "duck").mkdir()
    toy("duck", 0).save(tmp_path / "duck" / "photo.png")
    return tmp_path / "duck"


def into(folder, dino, **changes) -> enlarge.Enlargement:
    sorter = enlarge.ShotSorter(dino, toy("duck", 0), **changes)
    return enlarge.Enlargement(folder, sorter, base="owner/editor", licence="Apache-2.0")


def test_what_is_made_is_kept_after_a_stop_and_what_a_person_moves_stays(folder, dino):
    shots = enlarge.build_shots("duck", 4, 0)
    pictures = [toy("duck", 1), toy("robot", 1), toy("duck", 2), toy("duck", 1)]
    model = Drawn(shots, pictures)
    names = [shot.name for shot in shots]

    # A stop at the third: two are there, each in its place.
    model.ends_at = names[2]
    with pytest.raises(KeyboardInterrupt):
        list(into(folder, dino).generate_missing(shots, model))
    assert (folder / names[0]).is_file() and (folder / REJECTED_NAME / names[1]).is_file()

    # Going on draws the others alone.
    model.ends_at, model.asked = "", []
    again = into(folder, dino)
    assert list(again.generate_missing(shots, model)) == shots and model.asked == names[2:]
    rows = {
        kind: [shot.name for shot in some] for kind, some in again.collect_outcomes(shots).items()
    }
    assert rows == {
        "kept": [names[0], names[2]],
        "not the subject": [names[1]],
        "near copy": [names[3]],
    }
    assert again.draw_sheet(shots).is_file()

    # The folder is one of photos, which knows what was made.
    report = find_photos(folder, "a photo of sks duck", 128)
    made = {photo.path.name: photo.made_by for photo in report.photos}
    by = "owner/editor, licence Apache-2.0"
    assert made == {"photo.png": "", names[0]: by, names[2]: by} and not report.skipped

    # What a person moved stays; the rest is sorted anew without being drawn.
    (folder / REJECTED_NAME / names[3]).rename(folder / names[3])
    (folder / names[0]).rename(folder / REJECTED_NAME / names[0])
    model.asked = []
    list(into(folder, dino, min_likeness=-1.0).generate_missing(shots, model))
    assert model.asked == [] and (folder / REJECTED_NAME / names[0]).is_file()
    assert all((folder / name).is_file() for name in names[1:])
    assert read_record(folder)[names[1]]["rejected"] == ""

    # Another word or photo at the same seeds is drawn beside them, and changes none.
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    record = read_record(folder)
    others = enlarge.build_shots("toy", 2, 0)
    model = Drawn(others, [toy("robot", 2), toy("duck", 3)])
    list(into(folder, dino).generate_missing(others, model))
    assert model.asked == [shot.name for shot in others]
    assert {path: path.read_bytes() for path in before} == before
    assert {name: read_record(folder)[name] for name in record} == record


@pytest.mark.parametrize("name", slow_but((), ("flux2", "qwen_image21")))
def test_the_command_draws_sorts_and_says_what_comes_next(name, tmp_path, capsys):
    base, photo = tmp_path / "base", tmp_path / "my duck.png"
    tiny_pipeline(name, tmp_path / "files").save_pretrained(base)
    toy("duck", 0).save(photo)
    line = [
        "enlarge",
        str(photo),
        "duck",
        "--base",
        str(base),
        "--dino",
        str(toy_bases.DINO_FOLDER),
    ]
    line += ["--num_images", "3", "--steps", "1", "--resolution", "64", "--min_likeness", "-1"]
    assert main(line) == EXIT_DONE
    folder = tmp_path / "my duck"
    record = read_record(folder)
    assert (folder / photo.name).read_bytes() == photo.read_bytes()
    assert [made["seed"] for made in record.values()] == [0, 1, 2]
    for file, made in record.items():
        place = folder / REJECTED_NAME / file if made["rejected"] else folder / file
        assert Image.open(place).size == (64, 64) and made["base"] == "base"
        assert made["licence"] in ("Apache-2.0 (4B), FLUX Non-Commercial (9B)", "Qwen Research")
    said = capsys.readouterr().out
    assert " of 3 kept in " in said and f"then: train '{folder}' duck" in said

    # All is there: nothing is drawn again.
    before = (folder / RECORD_NAME).read_text()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*_?_*.png")}
    assert main(line) == EXIT_DONE and (folder / RECORD_NAME).read_text() == before
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*_?_*.png")}


@pytest.mark.parametrize("kept", [0, 1])
def test_a_training_comes_next_only_where_something_was_kept(kept):
    found = {"kept": [0] * kept, "not the subject": [0]}
    into = SimpleNamespace(
        collect_outcomes=lambda _: found, folder="duck", draw_sheet=lambda _: "sheet.png"
    )
    said = command_enlarge.format_summary(into, [0] * (kept + 1), "duck")
    assert "look at sheet.png" in said and ("then: train duck duck" in said) == bool(kept)


def test_a_model_is_told_with_its_own_licence():
    """The card of what the usual one drew named a non-commercial licence beside its own."""
    facts = FACTS_BY_PIPELINE["Flux2KleinPipeline"]
    said = [
        command_enlarge.get_licence(SimpleNamespace(public_name=name, facts=facts))
        for name in (command_enlarge.DEFAULT_EDITOR, "a folder")
    ]
    assert said == ["Apache-2.0", facts.licence]


@pytest.mark.parametrize(
    "base, said",
    [
        ("toy", "SDXL takes no reference pictures: give --base a model that does"),
        ("Tongyi-MAI/Z-Image", "is not on this machine, and the hub is not asked"),
        (enlarge.__name__, "does not exist"),
    ],
)
def test_a_base_that_cannot_do_it_is_refused_in_one_line(base, said, tmp_path, capsys):
    toy("duck", 0).save(tmp_path / "photo.png")
    assert main(["enlarge", str(tmp_path / "photo.png"), "duck", "--base", base]) == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "photo").exists()


@pytest.fixture
def klein(tmp_path) -> list[str]:
    """A command line of a photo and a base, which ends before anything is drawn."""
    folder = tmp_path / "klein"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    toy("duck", 0).save(tmp_path / "photo.png")
    return ["enlarge", str(tmp_path / "photo.png"), "duck", "--base", str(folder)]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--resolution 100", "a side of 100 px: FLUX.2 klein needs multiples of 16, such as 96"),
        ("--resolution 0", "--resolution 0: must be at least 1"),
        ("--num_images 0", "--num_images 0: must be at least 1"),
        ("--steps 0", "steps is 0; it must lie between 1 and 200"),
        ("--seed 99999999999999999999", "seed is 99999999999999999999; it must lie between 0"),
    ],
)
def test_a_number_that_cannot_be_drawn_is_refused_before_anything_is_loaded(
    words, said, klein, tmp_path, capsys
):
    assert main([*klein, *words.split()]) == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "photo").exists()


@pytest.mark.parametrize("word", ["", " ", "photos/dog"])
def test_a_word_that_is_none_is_refused(word, klein, capsys):
    klein[2] = word
    assert main(klein) == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("photo.png: say in one word what it shows, as in `enlarge rex.jpg dog`.")


@pytest.mark.parametrize("size", [(63, 200), (64, 513)])
def test_a_photo_that_diffusers_takes_for_no_reference_is_refused(size, klein, capsys):
    toy("duck", 0).resize(size).save(klein[1])
    assert main(klein) == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert f"photo.png: {size[0]} x {size[1]} px: it must be at least 64 px" in line


def test_a_folder_with_another_photo_of_that_name_is_refused(klein, tmp_path, capsys):
    """Its pictures went among those of the other photo."""
    (tmp_path / "out").mkdir()
    toy("robot", 0).save(tmp_path / "out" / "photo.png")
    before = (tmp_path / "out" / "photo.png").read_bytes()
    assert main([*klein, "--output_dir", str(tmp_path / "out")]) == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("photo.png is another photo: name another --output_dir.")
    assert (tmp_path / "out" / "photo.png").read_bytes() == before


def test_a_photo_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no photo")
    for name in ("notes.txt", "missing.jpg"):
        assert main(["enlarge", str(tmp_path / name), "duck"]) == EXIT_MISTAKE
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line
