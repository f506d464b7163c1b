"""Take the pictures of the page that the README shows: each tab, desktop and phone, light and dark.

    python -m tools.screenshots [--base toy] [--subject assets/subjects/duck] [--out assets/pictures]

The page runs as a process of its own; what is seen is really done: pictures are generated, a run is trained.
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from benchmarks.concurrency import start_app
from tests.browser import chromium, visit

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"desktop": (1280, 860), "phone": (390, 844)}
PROMPT = "a photo of a {} in the snow"
TRAINED_STEPS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="toy")
    parser.add_argument("--subject", type=Path, default=ROOT / "assets" / "subjects" / "duck")
    parser.add_argument("--class_word", default="duck")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "pictures")
    parser.add_argument("--only", default="", help="desktop-light, phone-dark, …")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        server, url = start_app(args.base, Path(scratch))
        try:
            with chromium() as browser:
                for device, size in SIZES.items():
                    for scheme in ("light", "dark"):
                        if args.only in ("", f"{device}-{scheme}"):
                            with visit(browser, url, size=size, dark=scheme == "dark") as visited:
                                photograph(visited.page, args, f"{device}-{scheme}")
        finally:
            server.terminate()
            server.wait()


def photograph(page: Page, args: argparse.Namespace, name: str) -> None:
    generate(page)
    shoot(page, args.out / f"generate-{name}.png")
    compare(page)
    shoot(page, args.out / f"compare-{name}.png")
    grid(page)
    shoot(page, args.out / f"grid-{name}.png")
    inspect(page)
    shoot(page, args.out / f"inspect-{name}.png")
    train(page, args)
    shoot(page, args.out / f"train-{name}.png")
    page.locator("#stop_training").click()
    wait_for(page, "train_status", "Stopped")


def wait_for(page: Page, elem_id: str, words: str) -> None:
    page.wait_for_function("([id, w]) => document.getElementById(id)?.innerText.includes(w)", arg=[elem_id, words])


def set_number(page: Page, elem_id: str, value: int) -> None:
    box = page.locator(f"#{elem_id} input[type=number]").first
    box.fill(str(value))
    box.press("Tab")


def generate(page: Page) -> None:
    if page.locator("#adapter input").input_value() == "none":
        raise SystemExit("assets/adapters is empty: train a sample adapter first, the page is shown with it")
    subject = page.locator("#prompt textarea").input_value().removeprefix("a photo of a ") or "red duck"
    page.fill("#prompt textarea", PROMPT.format(subject))
    set_number(page, "num_images", 4)
    set_number(page, "seed", 7)
    page.click("#run")
    wait_for(page, "status", "4 pictures in")


def compare(page: Page) -> None:
    tab(page, "Compare")
    page.click("#compare")
    page.wait_for_function("document.querySelectorAll('#slider img').length >= 2")


def grid(page: Page) -> None:
    tab(page, "Grid")
    page.click("#draw_grid")
    page.wait_for_selector("#sheet img")


def inspect(page: Page) -> None:
    picture = page.request.get(page.locator("#sheet img").first.get_attribute("src")).body()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        file.write_bytes(picture)
        tab(page, "Inspect")
        page.set_input_files("#inspect_file input[type=file]", file)
        wait_for(page, "inspect_facts", "Prompt")


def train(page: Page, args: argparse.Namespace) -> None:
    tab(page, "Train")
    page.set_input_files("#photos input[type=file]", sorted(args.subject.glob("*.jpg")))
    wait_for(page, "remarks", "photos")
    page.fill("#class_word textarea, #class_word input", args.class_word)
    page.click("#start")
    page.wait_for_function(
        "n => Number((document.getElementById('train_status').innerText.match(/Step (\\d+)/) || [])[1]) >= n",
        arg=TRAINED_STEPS,
    )
    page.wait_for_function("document.querySelectorAll('#samples img').length >= 4")


def tab(page: Page, name: str) -> None:
    """A tab by name; on a phone some hide behind the three dots."""
    found = page.get_by_role("tab", name=name, exact=True)
    if not found.first.is_visible():
        page.locator("#result_tabs .overflow-menu > button").first.click()
        page.locator("#result_tabs .overflow-dropdown button", has_text=name).click()
        return
    found.first.click()


def shoot(page: Page, path: Path) -> None:
    """The whole page, with 256 colours: a third of the size, and no difference to the eye."""
    page.evaluate("document.activeElement?.blur(); scrollTo(0, 0)")
    page.wait_for_timeout(600)
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
