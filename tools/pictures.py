"""Trains and draws what README, docs and page show of the embedded bases: all pictures, and the
sample adapter.

    python -m tools.pictures [--work runs/pictures] [--only quick_start recipe …]

Half an hour on two cores. A run that WORK holds is not made again, so that a picture can be drawn
from it once more. The page is photographed with the sample adapter, which is therefore made first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"
QUALITY = 88


STRIP_PROMPTS = {
    "a photo of a sks rocket in the snow": 3,
    "a photo of a sks rocket on a purple rug": 0,
    "a photo of a sks rocket on a checkered floor": 0,
    "a photo of a sks rocket on the moon": 3,
}
"""Prompts of README's first picture, and their seeds: of four each, chosen by eye."""
RECIPE_SUBJECTS = (
    "bear",
    "big_headed_dinosaur",
    "long_eared_rabbit",
    "rocket",
    "tall_cactus",
    "train",
)
"""Sample subjects of the recipe's study."""
TILE_PX, GAP_PX, CAPTION_PX, LABEL_PX = 256, 8, 96, 110
FONT_PX = 22


def run_program(*arguments: str | Path, folder: Path = ROOT) -> None:
    """Run a Python program of the project in a folder. Raises CalledProcessError if it fails."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, *map(str, arguments)]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def get_trained_run(work: Path, name: str, *flags: str | Path) -> Path:
    """Return the run folder of `assets/configs/NAME.toml`, after training it if WORK does not have
    it."""
    run = work / name
    if not RunDir(run).adapter_path.is_file():
        config = ASSETS / "configs" / f"{name}.toml"
        run_program("train_dreambooth.py", "--config", config, "--output_dir", run, *flags)
    return run


def draw_strip(work: Path) -> Path:
    """Draw one photo of the rocket, and toy-zimage's images of four places before and after
    training: the same prompts and noise, without and with the adapter."""
    pipeline = SubjectPipeline.from_base("toy-zimage")
    rocket = pipeline.load_adapter(get_trained_run(work, "toy_zimage"))
    rows = {"before": (), "after": ((rocket, 1.0),)}

    # The left column: the photo, between the two rows
    step = TILE_PX + GAP_PX
    pictures_left = step + LABEL_PX
    size = (pictures_left + len(STRIP_PROMPTS) * step, CAPTION_PX + len(rows) * step)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=FONT_PX)
    photo_top = CAPTION_PX + step // 2
    with Image.open(ASSETS / "subjects" / "rocket" / "00.jpg") as photo:
        sheet.paste(resize_tile(photo), (0, photo_top))
    draw.text((0, photo_top - FONT_PX - GAP_PX), "one of 5 photos", "black", font)

    # A column for each prompt, a row without and one with the adapter
    for column, (prompt, seed) in enumerate(STRIP_PROMPTS.items()):
        left_px = pictures_left + column * step
        caption = textwrap.fill(prompt, width=22)
        draw.text((left_px, CAPTION_PX - GAP_PX), caption, "black", font, anchor="ld")
        for row, adapters in enumerate(rows.values()):
            params = GenerationParams(prompt, seed=seed, adapters=adapters)
            (image,) = pipeline.draw(params)
            sheet.paste(resize_tile(image.pixels), (left_px, CAPTION_PX + row * step))
    for row, label in enumerate(rows):
        middle = (pictures_left - LABEL_PX // 2, CAPTION_PX + row * step + TILE_PX // 2)
        draw.text(middle, label, "black", font, anchor="mm")

    picture = work / "strip.png"
    sheet.save(picture)
    return picture


def resize_tile(picture: Image.Image) -> Image.Image:
    """Resize the picture to a tile of the strip."""
    return picture.convert("RGB").resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)


def make_quick_start(work: Path) -> Path:
    return RunDir(get_trained_run(work, "quickstart")).contact_sheet_path


def make_toy_zimage(work: Path) -> Path:
    return RunDir(get_trained_run(work, "toy_zimage")).contact_sheet_path


def get_overtrained_run(work: Path) -> Path:
    """Return a run on bare photos that is scored while it trains."""
    bare = work / "bare"
    bare.mkdir(exist_ok=True)
    for path in [
        *(ASSETS / "subjects" / "bear").glob("*.jpg"),
        ASSETS / "subjects" / "bear" / "subject.json",
    ]:
        shutil.copy(path, bare)
    flags = ["--evaluate_steps", "80", "--num_validation_images", "4"]
    return get_trained_run(work, "overtrained", "--instance_data_dir", bare, *flags)


def make_overtrained(work: Path) -> Path:
    return RunDir(get_overtrained_run(work)).contact_sheet_path


def make_score_plot(work: Path) -> Path:
    return RunDir(get_overtrained_run(work)).loss_plot_path


def check_crops(work: Path) -> Path:
    photos = ASSETS / "subjects" / "rocket"
    run_program("-m", "dreambooth_moslora", "check", photos, "rocket", folder=work)
    return work / "rocket_crops.png"


def make_toy_base(work: Path) -> Path:
    """Make a sheet of a hundred pictures of combinations that no training picture showed."""
    out = work / "toy_base"
    options = ["--images", "100", "--groups", "held-out combinations", "--no_timings"]
    run_program(
        "-m", "toybox.measures.evaluate_base", "--base", ASSETS / "toy-sdxl", "--out", out, *options
    )
    return next(out.glob("*.png"))


def make_recipe(work: Path) -> Path:
    """Make a sheet of the six subjects, each trained by one word."""
    sheet = work / "recipe.png"
    runs = []
    for subject in RECIPE_SUBJECTS:
        photos, run = ASSETS / "subjects" / subject, work / "one_word" / subject
        class_word = json.loads((photos / "subject.json").read_text(encoding="utf-8"))["class_word"]
        if not RunDir(run).adapter_path.is_file():
            run_program(
                "-m", "dreambooth_moslora", "train", photos, class_word, "--output_dir", run
            )
        runs.append(run)
    run_program("-m", "tools.subject_sheet", *runs, "--out", sheet)
    return sheet


JPEGS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "strip": (draw_strip, 1200),
    "quick_start": (make_quick_start, 1032),
    "toy_zimage": (make_toy_zimage, 1032),
    "toy_base": (make_toy_base, 1280),
    "overtrained": (make_overtrained, 800),
    "scores_while_training": (make_score_plot, 1100),
    "check_crops": (check_crops, 900),
    "recipe": (make_recipe, 712),
}
"""Name -> what makes the picture in WORK, and its width in `assets/pictures`, px."""


def sample_adapter(work: Path, out: Path) -> None:
    """OUT/adapters/rocket.safetensors, by the recipe for the embedded base."""
    exported = work / "rocket"
    options = ["--dtype", "fp16", "--out", exported]
    run_program("-m", "dreambooth_moslora", "export", get_trained_run(work, "toy"), *options)
    (out / "adapters").mkdir(exist_ok=True)
    shutil.copy(RunDir(exported).adapter_path, out / "adapters" / "rocket.safetensors")


def make_page_pictures(work: Path, out: Path) -> None:
    run_program(
        "-m", "tools.screenshots", "--adapters_dir", out / "adapters", "--out", out / "pictures"
    )


OTHER_PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "sample_adapter": sample_adapter,
    "page": make_page_pictures,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "pictures", help="folder for the runs"
    )
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help="folder with pictures/ and adapters/"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*OTHER_PICTURES, *JPEGS], default=[*OTHER_PICTURES, *JPEGS]
    )
    args = parser.parse_args(argv)
    work, out = args.work.resolve(), args.out.resolve()
    for folder in (work, out / "pictures"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if name in OTHER_PICTURES:
            OTHER_PICTURES[name](work, out)
        else:
            make, width = JPEGS[name]
            save_jpeg(make(work), out / "pictures" / f"{name}.jpg", width)


def save_jpeg(picture: Path, path: Path, width: int) -> None:
    """Save the picture, at that width if it is wider."""
    with Image.open(picture) as image:
        image = image.convert("RGB")
        image.thumbnail((width, image.height), Image.Resampling.LANCZOS)
        image.save(path, quality=QUALITY)
    print(path)


if __name__ == "__main__":
    main()
