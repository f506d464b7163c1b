"""From one photo to many: the shots, the images that are accepted or rejected, and the command."""

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


def open_toy(name: str, number: int) -> Image.Image:
    """Return a photo of a toy at the side at which the renders are sharp."""
    picture = Image.open(PHOTOS / name / f"{number:02d}.jpg")
    return picture.resize((128, 128), Image.Resampling.LANCZOS)


def test_each_shot_has_its_own_name_prompt_and_key():
    shots = enlarge.build_shots("dog", 45, 7, base="a")
    assert len({shot.name for shot in shots}) == len({shot.request.seed for shot in shots}) == 45
    first = shots[0]
    assert first.name == f"from_the_side_7_{first.key[:6]}.png" and first.request.seed == 7
    assert first.request.prompt.startswith("a photo of a dog seen from the side, on grass")
    assert first.request.prompt.endswith("the same dog as in the reference pictures")
    assert enlarge.build_shots("dog", 45, 7, base="a") == shots
    other_base = enlarge.build_shots("dog", 1, 7, base="b")[0]
    assert other_base.key != first.key and other_base.name != first.name


def test_broken_copied_and_wrong_images_are_rejected(dino):
    sorter = enlarge.ShotSorter(dino, open_toy("duck", 0))
    sorter.add_reference("1.jpg", open_toy("duck", 1))
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    images = {
        "grass": open_toy("duck", 2),
        "robot": open_toy("robot", 0),
        "turned": ImageOps.mirror(open_toy("duck", 0)),
        "again": open_toy("duck", 1).crop((2, 2, 126, 126)),
        "black": Image.new("RGB", (128, 128)),
        "noise": Image.fromarray(noise),
        "blurred": open_toy("duck", 2).filter(ImageFilter.GaussianBlur(3)),
    }
    verdicts = {name: sorter.evaluate_image(picture) for name, picture in images.items()}
    assert {name: verdict.reason_kind for name, verdict in verdicts.items()} == {
        "grass": "",
        "robot": "not the subject",
        "turned": "near copy",
        "again": "near copy",
        "black": "broken",
        "noise": "broken",
        "blurred": "broken",
    }
    assert verdicts["turned"].reason == "near copy: of the photo"
    assert verdicts["again"].reason == "near copy: of 1.jpg"
    details = [verdicts[name].reason for name in ("black", "noise", "blurred")]
    assert [word.split()[1].rstrip(",") for word in details] == ["one", "noise", "blurred"]
    assert verdicts["grass"].likeness > MIN_LIKENESS > verdicts["robot"].likeness


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_planted_images_are_rejected_and_good_ones_are_not(name, dino):
    """Of 20 each, 18 planted and at most 2 good ones; the threshold comes from 16 other toys."""
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


class StubModel:
    """Model that gives these images of the shots, and records which were requested."""

    def __init__(self, shots: Sequence[enlarge.ShotRequest], pictures: Sequence[Image.Image]):
        self.pictures = dict(zip([shot.name for shot in shots], pictures, strict=True))
        self.requested: list[str] = []
        self.stops_at = ""

    def __call__(self, shots: Sequence[enlarge.ShotRequest]) -> Iterator[Image.Image]:
        for shot in shots:
            if shot.name == self.stops_at:
                raise KeyboardInterrupt
            self.requested.append(shot.name)
            yield self.pictures[shot.name]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "duck").mkdir()
    open_toy("duck", 0).save(tmp_path / "duck" / "photo.png")
    return tmp_path / "duck"


def build_enlargement(folder, dino, **changes) -> enlarge.Enlargement:
    sorter = enlarge.ShotSorter(dino, open_toy("duck", 0), **changes)
    return enlarge.Enlargement(folder, sorter, base="owner/editor", licence="Apache-2.0")


def test_images_survive_a_stop_and_moved_ones_stay(folder, dino):
    shots = enlarge.build_shots("duck", 4, 0)
    pictures = [open_toy("duck", 1), open_toy("robot", 1), open_toy("duck", 2), open_toy("duck", 1)]
    model = StubModel(shots, pictures)
    names = [shot.name for shot in shots]

    # Stop at the third shot: two images are in their folders.
    model.stops_at = names[2]
    with pytest.raises(KeyboardInterrupt):
        list(build_enlargement(folder, dino).generate_missing(shots, model))
    assert (folder / names[0]).is_file() and (folder / REJECTED_NAME / names[1]).is_file()

    # The next call generates only the missing images.
    model.stops_at, model.requested = "", []
    again = build_enlargement(folder, dino)
    assert list(again.generate_missing(shots, model)) == shots and model.requested == names[2:]
    outcomes = again.collect_outcomes(shots)
    rows = {kind: [shot.name for shot in outcome] for kind, outcome in outcomes.items()}
    assert rows == {
        "kept": [names[0], names[2]],
        "not the subject": [names[1]],
        "near copy": [names[3]],
    }
    assert again.draw_sheet(shots).is_file()

    # The folder's photos know the model that made them.
    report = find_photos(folder, "a photo of sks duck", 128)
    makers = {photo.path.name: photo.made_by for photo in report.photos}
    maker = "owner/editor, licence Apache-2.0"
    assert makers == {"photo.png": "", names[0]: maker, names[2]: maker} and not report.skipped

    # Images that a person moved stay; all others are sorted again without being generated.
    (folder / REJECTED_NAME / names[3]).rename(folder / names[3])
    (folder / names[0]).rename(folder / REJECTED_NAME / names[0])
    model.requested = []
    list(build_enlargement(folder, dino, min_likeness=-1.0).generate_missing(shots, model))
    assert model.requested == [] and (folder / REJECTED_NAME / names[0]).is_file()
    assert all((folder / name).is_file() for name in names[1:])
    assert read_record(folder)[names[1]]["rejected"] == ""

    # Another class word at the same seeds adds images, and changes none.
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    record = read_record(folder)
    other_shots = enlarge.build_shots("toy", 2, 0)
    model = StubModel(other_shots, [open_toy("robot", 2), open_toy("duck", 3)])
    list(build_enlargement(folder, dino).generate_missing(other_shots, model))
    assert model.requested == [shot.name for shot in other_shots]
    assert {path: path.read_bytes() for path in before} == before
    assert {name: read_record(folder)[name] for name in record} == record


@pytest.mark.parametrize("name", slow_but((), ("flux2", "qwen_image21")))
def test_the_command_generates_sorts_and_names_the_next_step(name, tmp_path, capsys):
    base, photo = tmp_path / "base", tmp_path / "my duck.png"
    tiny_pipeline(name, tmp_path / "files").save_pretrained(base)
    open_toy("duck", 0).save(photo)
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
    assert [entry["seed"] for entry in record.values()] == [0, 1, 2]
    for file, entry in record.items():
        path = folder / REJECTED_NAME / file if entry["rejected"] else folder / file
        assert Image.open(path).size == (64, 64) and entry["base"] == "base"
        assert entry["licence"] in ("Apache-2.0 (4B), FLUX Non-Commercial (9B)", "Qwen Research")
    out = capsys.readouterr().out
    assert " of 3 kept in " in out and f"then: train '{folder}' duck" in out

    # A second call generates nothing.
    before = (folder / RECORD_NAME).read_text()
    mtimes = {path: path.stat().st_mtime_ns for path in folder.rglob("*_?_*.png")}
    assert main(line) == EXIT_DONE and (folder / RECORD_NAME).read_text() == before
    assert mtimes == {path: path.stat().st_mtime_ns for path in folder.rglob("*_?_*.png")}


@pytest.mark.parametrize("count", [0, 1])
def test_training_is_suggested_only_with_accepted_images(count):
    outcomes = {"kept": [0] * count, "not the subject": [0]}
    enlargement = SimpleNamespace(
        collect_outcomes=lambda _: outcomes, folder="duck", draw_sheet=lambda _: "sheet.png"
    )
    summary = command_enlarge.format_summary(enlargement, [0] * (count + 1), "duck")
    assert "look at sheet.png" in summary and ("then: train duck duck" in summary) == bool(count)


def test_a_model_has_its_own_licence():
    facts = FACTS_BY_PIPELINE["Flux2KleinPipeline"]
    licences = [
        command_enlarge.get_licence(SimpleNamespace(public_name=name, facts=facts))
        for name in (command_enlarge.DEFAULT_EDITOR, "a folder")
    ]
    assert licences == ["Apache-2.0", facts.licence]


@pytest.mark.parametrize(
    "base, message",
    [
        ("toy", "SDXL takes no reference pictures: give --base a model that does"),
        ("Tongyi-MAI/Z-Image", "is not on this machine, and the hub is not asked"),
        (enlarge.__name__, "does not exist"),
    ],
)
def test_an_unsuitable_base_is_refused_in_one_line(base, message, tmp_path, capsys):
    open_toy("duck", 0).save(tmp_path / "photo.png")
    assert main(["enlarge", str(tmp_path / "photo.png"), "duck", "--base", base]) == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "photo").exists()


@pytest.fixture
def klein(tmp_path) -> list[str]:
    """Return a command line of a photo and a base, which ends before any image is generated."""
    folder = tmp_path / "klein"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    open_toy("duck", 0).save(tmp_path / "photo.png")
    return ["enlarge", str(tmp_path / "photo.png"), "duck", "--base", str(folder)]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--resolution 100", "a side of 100 px: FLUX.2 klein needs multiples of 16, such as 96"),
        ("--resolution 0", "--resolution 0: must be at least 1"),
        ("--num_images 0", "--num_images 0: must be at least 1"),
        ("--steps 0", "steps is 0; it must lie between 1 and 200"),
        ("--seed 99999999999999999999", "seed is 99999999999999999999; it must lie between 0"),
    ],
)
def test_an_invalid_number_is_refused_before_loading(flags, message, klein, tmp_path, capsys):
    assert main([*klein, *flags.split()]) == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "photo").exists()


@pytest.mark.parametrize("word", ["", " ", "photos/dog"])
def test_an_invalid_class_word_is_refused(word, klein, capsys):
    klein[2] = word
    assert main(klein) == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("photo.png: say in one word what it shows, as in `enlarge rex.jpg dog`.")


@pytest.mark.parametrize("size", [(63, 200), (64, 513)])
def test_a_photo_of_an_unusable_size_is_refused(size, klein, capsys):
    open_toy("duck", 0).resize(size).save(klein[1])
    assert main(klein) == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert f"photo.png: {size[0]} x {size[1]} px: it must be at least 64 px" in line


def test_a_folder_with_another_photo_of_that_name_is_refused(klein, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    open_toy("robot", 0).save(tmp_path / "out" / "photo.png")
    before = (tmp_path / "out" / "photo.png").read_bytes()
    assert main([*klein, "--output_dir", str(tmp_path / "out")]) == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("photo.png is another photo: name another --output_dir.")
    assert (tmp_path / "out" / "photo.png").read_bytes() == before


def test_a_file_that_is_no_photo_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no photo")
    for name in ("notes.txt", "missing.jpg"):
        assert main(["enlarge", str(tmp_path / name), "duck"]) == EXIT_MISTAKE
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line
