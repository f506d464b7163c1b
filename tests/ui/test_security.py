"""The attack list: each is tried on the running page, by its names or by its private events, and
must be refused."""

import io
import logging
import os
import pickle
import secrets
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import PIL.Image
import pytest
from gradio_client import Client, handle_file
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.disk.run_folder import clean_name
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.ui.guard import MAX_FORM_BYTES
from dreambooth_moslora.ui.html import render_facts, render_notice, render_progress
from dreambooth_moslora.ui.jobs import Jobs
from dreambooth_moslora.ui.photo_copies import copy_photos
from tests.helpers.odd_photos import png_of
from tests.helpers.ui_server import serve
from tests.ui.conftest import find_event, get_refusal

EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
FAST = {"steps": 2, "guidance_scale": 2.0}
DRAW = FAST | {"api_name": "/generate"}
NO_ADAPTER = "here is no adapter"
OUTSIDE = (403, 404)


def send_file(served, name: str, content: bytes) -> str:
    """Upload a file and return its path on the server."""
    return httpx.post(f"{served.url}gradio_api/upload", files={"files": (name, content)}).json()[0]


def upload_adapter(served, name: str, content: bytes) -> bool:
    """Upload the file as an adapter by the private event; return whether the page takes it."""
    data = {
        "path": send_file(served, name, content),
        "meta": {"_type": "gradio.FileData"},
        "orig_name": name,
    }
    session = secrets.token_hex(8)
    body = {
        "fn_index": find_event(served, "upload_adapter", "upload"),
        "data": [data],
        "session_hash": session,
    }
    httpx.post(f"{served.url}gradio_api/queue/join", json=body)
    stream = f"{served.url}gradio_api/queue/data?session_hash={session}"
    with httpx.stream("GET", stream, timeout=60) as lines:
        (message,) = [
            line.replace(" ", "") for line in lines.iter_lines() if "process_completed" in line
        ]
    return '"success":true' in message


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "adapters/dog", "dog.safetensors", "dog\0"]
)
def test_adapter_names_are_never_paths(served, client, name):
    (served.ctx.catalog.adapters_dir.parent / "secret.safetensors").write_text("secret")
    assert NO_ADAPTER in get_refusal(client, "a dog", adapter=name, **DRAW)
    assert NO_ADAPTER in get_refusal(client, f"a dog <lora:{name}:1>", adapter="none", **DRAW)


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "..", ".", "", ".hidden", "/abs", "a\\b", "a\0b", "a\nb", "a" * 256]
)
def test_run_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(UserError, match="name of a run"):
        Jobs(tmp_path).run_dir(name)
    assert Jobs(tmp_path).run_dir("my dog-2.1") == tmp_path / "my dog-2.1"


def test_html_is_escaped(client, tmp_path):
    for html in (
        render_notice(EVIL),
        render_progress(EVIL, EVIL, 0.5, EVIL),
        render_facts([(EVIL, EVIL)]),
    ):
        assert "<script>" not in html and "<img src=x" not in html
    assert "<script>" not in get_refusal(client, "a dog", adapter=EVIL, **DRAW)
    assert "<script>" not in client.predict(EVIL, **DRAW)[2]
    for key, value in GenerationParams("a dog", adapters=((EVIL, 1.0),)).to_png_text().items():
        (info := PngInfo()).add_itxt(key, value)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert "<script>" not in str(
        client.predict(handle_file(tmp_path / "a.png"), api_name="/inspect")
    )
    name = clean_name(EVIL + "../../x")
    assert name == clean_name(name) and "<" not in name


def test_unknown_session_is_not_logged(served):
    logger, written = logging.getLogger("uvicorn.error"), io.StringIO()
    logger.addHandler(handler := logging.StreamHandler(written))
    stream = f"{served.url}gradio_api/queue/data?session_hash=unknown"
    with httpx.stream("GET", stream) as response, suppress(httpx.RemoteProtocolError):
        lines = response.iter_lines()
        assert "session_not_found" in next(lines)
        list(lines)  # to its end
    logger.removeHandler(handler)
    assert len(written.getvalue()) < 200


class Touch:
    """Unpickling this makes a file: proof that code ran."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["evil.safetensors", "evil.bin", "evil.pt", "evil.ckpt"])
def test_pickled_adapters_are_refused_and_never_run(served, client, tmp_path, name):
    proof, file = tmp_path / "ran", tmp_path / name
    file.write_bytes(pickle.dumps({"lora": Touch(proof)}))
    assert get_refusal(client, handle_file(file), api_name="/inspect")
    assert not upload_adapter(served, name, file.read_bytes()) and not proof.exists()


def build_zip_bomb() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"\0" * 50_000_000)
    return buffer.getvalue()


BOMBS = {
    "zip.safetensors": build_zip_bomb(),
    "header.safetensors": (10**18).to_bytes(8, "little") + b"{}",
    "bomb.png": png_of(100_000, 100_000, b"\0" * 100),
    "below Pillow's limit.png": png_of(12_000, 12_000, b"\0" * 100),
    "empty.png": b"",
    "page.html": b"<script>alert(1)</script>",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(client, tmp_path, name):
    (file := tmp_path / name).write_bytes(BOMBS[name])
    assert get_refusal(client, handle_file(file), api_name="/inspect")
    if name.endswith(".png"):
        with pytest.raises(UserError, match="enormous|broken" if BOMBS[name] else "empty"):
            copy_photos([str(file)], tmp_path / "photos")


def test_photos_lose_metadata(tmp_path):
    image = PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    )
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "SecretCamera"
    exif.get_ifd(0x8825)[2] = (48.0, 8.0, 0.0)
    file = tmp_path / "My secret holiday.jpg"
    image.save(file, exif=exif)
    copy_photos([str(file)], folder := tmp_path / "photos")
    copies = list(folder.iterdir())
    assert [copy.name for copy in copies] == ["photo_01.png"]
    with PIL.Image.open(copies[0]) as clean:
        assert clean.size == (40, 60) and not clean.getexif() and not clean.info
    assert b"Secret" not in copies[0].read_bytes()


def test_only_shown_files_are_served(served):
    ctx, traversal = served.ctx, "%2e%2e%2f%2e%2e%2fetc%2fpasswd"
    private_files = (
        ctx.runs_dir / "dog" / "a.png",
        ctx.workspace.folder / "x.png",
        ctx.catalog.adapters_dir / "dog.safetensors",
    )
    for file in private_files:
        file.parent.mkdir(exist_ok=True)
        file.exists() or file.write_bytes(b"x")
    for path in (
        *private_files,
        "/etc/passwd",
        "../../etc/passwd",
        traversal,
        "README.md",
        ".git/config",
    ):
        for name in (path, Path(path).resolve()):
            assert httpx.get(f"{served.url}gradio_api/file={name}").status_code in OUTSIDE, name


@pytest.mark.parametrize("name", ["/etc/passwd", "dog.safetensors"])
def test_only_uploaded_files_are_read(served, name):
    """The request is posted by hand: gradio's own client would upload the file first, which is
    allowed."""
    path = name if name.startswith("/") else str(served.ctx.catalog.adapters_dir / name)
    data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    response = httpx.post(f"{served.url}gradio_api/call/inspect", json=data)
    answer = httpx.get(
        f"{served.url}gradio_api/call/inspect/{response.json()['event_id']}", timeout=20
    ).text
    assert "event: error" in answer and "event: complete" not in answer
    path = Path(send_file(served, "../../../evil<b>.png", b"x"))
    assert ".." not in path.parts and "<" not in path.name
    assert path.resolve() == path and not (path.parents[2] / path.name).exists()


def test_page_is_no_open_proxy(served, monkeypatch):
    """It was a proxy open to all."""
    fetched = []

    async def fetch(url, *_, **options):
        fetched.append(url)
        raise OSError

    monkeypatch.setattr("gradio.routes.secure_url_stream_response", fetch)
    evil = "https://evil.example/x"
    for path in (
        f"file={evil}",
        f"file/{evil}",
        "file=HTTP://evil.example/x",
        "proxy=https://evil.hf.space/x",
    ):
        assert httpx.get(f"{served.url}gradio_api/{path}").status_code == 404
    assert not fetched


def test_failed_upload_is_deleted(served, monkeypatch):
    def fail(*_):
        raise RuntimeError("nobody thought of this")

    good, workspace = served.ctx.catalog.find_file("dog").read_bytes(), served.ctx.workspace
    with monkeypatch.context() as patch:
        patch.setattr(served.ctx.wait_for_pipeline(), "load_adapter", fail)
        assert not upload_adapter(served, "lost.safetensors", good)
    assert not workspace.uploads and not list(workspace.root.glob("adapter-*"))
    assert upload_adapter(served, "good.safetensors", good) and list(workspace.uploads) == ["good"]


def test_stop_ends_only_its_own_pages_work(served):
    client = Client(served.url, verbose=False)
    job = client.submit("a dog", steps=60, num_images=8, api_name="/generate")
    while not job.outputs():
        time.sleep(0.02)
    Client(served.url, verbose=False).predict(api_name="/stop")
    time.sleep(0.3)
    assert not job.done()
    client.predict(api_name="/stop")
    gallery, _, status = job.result(timeout=60)
    assert "Stopped" in status and len(gallery) < 8


def test_login_is_required_everywhere(tiny_base, tmp_path):
    with serve(tiny_base, tmp_path, auth=[("ann", "secret")]) as server:
        for path in ("config", "gradio_api/info", "gradio_api/file=/etc/passwd"):
            assert httpx.get(f"{server.url}{path}").status_code in (401, 403), path
        assert (
            httpx.post(
                f"{server.url}gradio_api/upload", files={"files": ("a.png", b"x")}
            ).status_code
            == 401
        )
        # Nobody sends what gradio would hold in memory, and no name is told.
        for path in ("login", "gradio_api/run/adapters"):
            long = httpx.post(f"{server.url}{path}", content=b"x" * (MAX_FORM_BYTES + 1))
            assert long.status_code == 413, path
        assert "auth_required" in httpx.get(server.url).text
        assert "gradio_api_info = {};" in httpx.get(server.url).text
        ann = Client(server.url, auth=("ann", "secret"), verbose=False)
        assert ann.predict(api_name="/adapters")
        names = ann.view_api(return_format="dict", print_info=False)["named_endpoints"]
        assert {"/generate", "/inspect"} <= names.keys()
