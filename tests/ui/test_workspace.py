"""What the page keeps goes with it; photos become clean copies within bounded memory, and masks go
along."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import PIL.Image
import pytest

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo_file import open_mask
from dreambooth_moslora.ui.photo_copies import MAX_SIDE_PX, copy_photos, list_photo_copies
from dreambooth_moslora.ui.workspace import (
    GRADIO_FOLDER,
    HISTORY_LENGTH,
    SavedImage,
    create_workspace,
)

ROOT = Path(__file__).parents[2]


def test_full_history_deletes_the_oldest_file(tmp_path, workspace):
    for number in range(HISTORY_LENGTH + 5):
        (path := tmp_path / f"{number}.png").write_bytes(b"x")
        workspace.add_to_history(SavedImage(path, str(number)))
    assert workspace.history[0].caption == str(HISTORY_LENGTH + 4)
    assert len(list(tmp_path.glob("*.png"))) == HISTORY_LENGTH


def test_old_files_are_deleted(workspace):
    """Gradio deletes nothing of a session's own components, which are all after a first update."""
    (file := workspace.root / GRADIO_FOLDER / "digest" / "a.png").parent.mkdir(parents=True)
    file.write_bytes(b"x")
    workspace.delete_old(3600)
    assert file.exists()
    workspace.delete_old(-1)
    assert not file.exists()


@pytest.mark.parametrize("suffix", ["²", f"{'9' * 40}-left", "notes"])
def test_similar_folder_names_are_kept(suffix, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / f"moslora-app-{suffix}").mkdir()
    create_workspace().close()
    assert [path.name for path in tmp_path.iterdir()] == [f"moslora-app-{suffix}"]


def test_page_in_another_container_keeps_its_photos(tmp_path, monkeypatch):
    """Its process is not seen: the second page deleted the first one's photos. The name of no
    process that runs here stands for another namespace's."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    start = "from dreambooth_moslora.ui.workspace import create_workspace as new; page = new(); "
    hold = f"{start}(page.root / 'photo.png').touch(); print(page.root, flush=True); input()"
    command = [sys.executable, "-c", hold]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as page:
        folder = tmp_path / "moslora-app-999999999-0123abcd-left"
        Path(page.stdout.readline().strip()).rename(folder)
        create_workspace().close()
        assert (folder / "photo.png").is_file()
        page.kill()
    create_workspace().close()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_uploads_do_not_outlive_the_server(tmp_path, free_port, number):
    """After a kill the next start clears it away."""
    tmp = tmp_path / "tmp"
    environment = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    environment |= {"TMPDIR": str(tmp), "PYTHONUNBUFFERED": "1"}
    (tmp / "moslora-app-999999999-0123abcd-left").mkdir(parents=True)
    command = [
        sys.executable,
        "app.py",
        "--runs_dir",
        str(tmp_path / "runs"),
        "--server_port",
        str(free_port),
    ]
    page = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert any("the page is at http://127.0.0.1" in line for line in page.stdout)
        assert len(list(tmp.glob("moslora-app-*"))) == 1
        url, files = (
            f"http://127.0.0.1:{free_port}/gradio_api/upload",
            {"files": ("gps.jpg", b"x" * 100)},
        )
        uploaded = Path(httpx.post(url, files=files, timeout=60).json()[0])
        assert uploaded.is_relative_to(tmp) and uploaded.is_file()
    finally:
        page.send_signal(number)
        code = page.wait(timeout=60)
    if number == signal.SIGKILL:
        assert uploaded.is_file()
        start = "from dreambooth_moslora.ui.workspace import create_workspace; "
        start += "create_workspace().close()"
        subprocess.run([sys.executable, "-c", start], env=environment, check=True)
    else:
        assert code == 143
    assert not list(tmp.glob("moslora-app-*")) and not [
        path for path in tmp.rglob("*") if path.is_file()
    ]


def test_large_photo_is_downscaled(tmp_path):
    PIL.Image.new("L", (MAX_SIDE_PX + 8, MAX_SIDE_PX + 8)).save(tmp_path / "large.jpg")
    copy_photos([str(tmp_path / "large.jpg")], tmp_path / "photos")
    with PIL.Image.open(tmp_path / "photos" / "photo_01.png") as copy:
        assert copy.size == (MAX_SIDE_PX, MAX_SIDE_PX)


def test_rotated_palette_image_becomes_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture = PIL.Image.new("RGB", (MAX_SIDE_PX + 400, 90), "red")
    picture.paste("blue", (0, 0, 400, 90))
    picture.quantize(4).save(tmp_path / "a.png", exif=exif)
    copy_photos([str(tmp_path / "a.png")], tmp_path / "photos")
    with PIL.Image.open(tmp_path / "photos" / "photo_01.png") as copy:
        assert copy.size[1] == MAX_SIDE_PX > copy.size[0]
        assert (copy.getpixel((9, 9)), copy.getpixel((9, 4000))) == ((0, 0, 255), (255, 0, 0))


def test_masks_of_any_format_follow_their_photos(tmp_path):
    for name, colour in (("a.jpg", "red"), ("b.png", "blue"), ("d.png", "green")):
        PIL.Image.new("RGB", (96, 64), colour).save(tmp_path / name)
    for name in ("b.Mask.PNG", "c.mask.png"):
        PIL.Image.linear_gradient("L").resize((96, 64)).save(tmp_path / name)
    shape = PIL.Image.new("RGBA", (96, 64), (255, 255, 255, 0))
    shape.paste((0, 0, 0, 255), (0, 0, 48, 64))  # black on nothing
    shape.save(tmp_path / "d.mask.webp", lossless=True)
    (tmp_path / "a.mask.png").write_bytes(b"no picture")
    (tmp_path / "d.txt").write_text("a caption is not taken for the mask")
    (tmp_path / "e.txt").write_text("a caption of no photo")
    remarks = copy_photos([str(path) for path in sorted(tmp_path.iterdir())], tmp_path / "photos")
    assert [path.name for path in list_photo_copies(tmp_path / "photos")] == [
        f"photo_0{number}.png" for number in (1, 2, 3)
    ]
    assert "c.mask.png: no photo of this name was dropped with it" in remarks and len(remarks) == 3
    assert all(
        any(remark.startswith(f"{name}: ") for remark in remarks)
        for name in ("a.mask.png", "e.txt")
    )
    first, second, third = map(open_mask, find_photos(tmp_path / "photos", "x", 64).photos)
    assert first is None and np.abs(np.array(second).mean() - 127) < 3
    assert (third.getpixel((9, 9)), third.getpixel((90, 9))) == (255, 0)
    with pytest.raises(UserError, match="together with their photos"):
        copy_photos([str(tmp_path / "c.mask.png")], tmp_path / "none")
