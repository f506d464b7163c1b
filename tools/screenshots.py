"""Takes the pictures of the page that README and docs show: the tabs Generate and Train.

python -m tools.screenshots [--adapters_dir DIR] [--subject assets/subjects/rocket] [--out
assets/pictures]

The page runs as a process of its own and really does what is shown: it generates pictures and
trains a run.
"""

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from tests.helpers.browser import chromium, set_number, visit, wait_for_photos

ROOT = Path(__file__).resolve().parents[1]
SIZE = (1440, 900)
QUALITY = 80
"""Of a WebP: its letters stay sharp, and what the base drew keeps its colours."""
TRAINED_STEPS = 130
"""Ten more than to the first scores and samples."""
TRAINING_MS = 15 * 60 * 1000
"""How long they may take: a minute and a half on two quiet cores."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="toy")
    parser.add_argument("--adapters_dir", type=Path, default=ROOT / "assets" / "adapters")
    parser.add_argument(
        "--subject",
        type=Path,
        default=ROOT / "assets" / "subjects" / "rocket",
        help="photos to train",
    )
    parser.add_argument("--class_word", default="rocket", help="what those photos show")
    parser.add_argument("--place", default="in the snow", help="where the pictures are set")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "pictures")
    parser.add_argument("--only", nargs="+", choices=list(SCENES), default=list(SCENES))
    args = parser.parse_args()
    if not any(args.adapters_dir.glob("*.safetensors")):
        parser.exit(
            2,
            f"error: no adapter lies in {args.adapters_dir}; "
            "train one first, the page is shown with it\n",
        )
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        server, url = start_app(args.base, Path(scratch), "--adapters_dir", str(args.adapters_dir))
        try:
            with chromium() as browser, visit(browser, url, size=SIZE) as visited:
                save_screenshots(visited.page, args)
        finally:
            server.terminate()
            server.wait()


def start_app(base: str, scratch: Path, *options: str) -> tuple[subprocess.Popen, str]:
    """Start the page on a free port and wait until it answers. `options` are further options of
    `app.py`."""
    command = [
        sys.executable,
        str(ROOT / "app.py"),
        "--base",
        base,
        "--runs_dir",
        str(scratch / "runs"),
        *options,
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(scratch / "cache")}
    log = (scratch / "app.log").open("w+")
    server = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
    )
    for _ in range(600):
        if match := re.search(r"http://127\.0\.0\.1:\d+", (scratch / "app.log").read_text()):
            return server, match[0]
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit((scratch / "app.log").read_text())


def save_screenshots(page: Page, args: argparse.Namespace) -> None:
    """Play each scene, and take the whole page."""
    for name in args.only:
        SCENES[name](page, args)
        page.evaluate("document.activeElement?.blur(); scrollTo(0, 0)")
        page.wait_for_timeout(800)
        path = args.out / f"page_{name}.webp"
        screenshot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        screenshot.convert("RGB").save(path, quality=QUALITY, method=6)
        print(path)
    if "train" in args.only:
        page.locator("#stop_training").click()
        wait_for(page, "train_status", "Stopped")


def wait_for(page: Page, elem_id: str, text: str) -> None:
    page.wait_for_function(
        "([id, w]) => document.getElementById(id)?.innerText.includes(w)", arg=[elem_id, text]
    )


def generate(page: Page, args: argparse.Namespace) -> None:
    prompt = page.locator("#prompt textarea").input_value()
    page.fill("#prompt textarea", f"{prompt} {args.place}")
    set_number(page, "num_images", 4)
    set_number(page, "seed", args.seed)
    page.click("#run")
    wait_for(page, "status", "4 pictures in")


def train(page: Page, args: argparse.Namespace) -> None:
    """Train a part of a run, which has losses, samples and scores."""
    page.get_by_role("tab", name="Train", exact=True).click()
    photos = sorted(args.subject.glob("*.jpg"))
    page.set_input_files("#photos input[type=file]", photos)
    wait_for_photos(page, len(photos))
    page.fill("#class_word textarea, #class_word input", args.class_word)
    page.click("#start")
    page.wait_for_function(
        "n => Number((document.getElementById('train_status').innerText.match(/Step (\\d+)/) || "
        "[])[1]) >= n",
        arg=TRAINED_STEPS,
        timeout=TRAINING_MS,
    )
    page.wait_for_function("document.querySelectorAll('#samples img').length >= 4")


SCENES: dict[str, Callable[[Page, argparse.Namespace], None]] = {
    "generate": generate,
    "train": train,
}
"""Name -> the function that plays the scene."""


if __name__ == "__main__":
    main()
