"""The attack list: each is tried on the running page and must be refused."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import httpx
import numpy as np
import PIL.Image
import pytest
from gradio_client import Client, handle_file
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import clean_name
from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.ui.html import facts_table, notice, progress_card
from dreambooth_moslora.ui.jobs import Jobs
from dreambooth_moslora.ui.state import AdapterCatalog
from dreambooth_moslora.ui.visitors import take_photos
from tests.helpers.odd_photos import png_of
from tests.helpers.ui_server import serve

EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
FAST = {"steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "secret.safetensors").write_text("secret")
    with serve(tiny_base, folder) as server:
        yield server


def refusal(client, *args, **kwargs) -> str:
    with pytest.raises(Exception) as error:
        client.predict(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["../secret", "../../etc/passwd", "/etc/passwd", "adapters/dog", "dog.safetensors", "dog\0"]
)
def test_adapter_names_are_looked_up_and_never_paths(client, name):
    assert "here is no adapter" in refusal(client, "a dog", adapter=name, **FAST, api_name="/generate")
    assert "here is no adapter" in refusal(
        client, f"a dog <lora:{name}:1>", adapter="none", **FAST, api_name="/generate"
    )


def test_a_link_out_of_the_folder_is_not_on_the_shelf(tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "secret.safetensors").write_text("x")
    (tmp_path / "adapters" / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (tmp_path / "adapters" / "own.safetensors").write_text("x")
    assert list(AdapterCatalog(tmp_path / "adapters", tmp_path / "runs").files()) == ["own"]


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", ".hidden", "/abs", "a\\b", "a\0b", "a\nb"])
def test_run_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(UserError, match="name of a run"):
        Jobs(tmp_path).run_dir(name)
    assert Jobs(tmp_path).run_dir("my dog-2.1") == tmp_path / "my dog-2.1"


def png_with_recipe(path: Path, adapter: str) -> Path:
    info = PngInfo()
    for key, value in GenerationParams("a dog", adapters=((adapter, 1.0),)).to_png_text().items():
        info.add_itxt(key, value)
    PIL.Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a_png_that_names_a_path_gives_no_file(client, tmp_path):
    file = png_with_recipe(tmp_path / "a.png", "../secret")
    facts = client.predict(handle_file(file), api_name="/inspect")
    assert "../secret" in str(facts)
    name = GenerationParams.from_png(file).adapters[0][0]
    assert "here is no adapter" in refusal(client, "a dog", adapter=name, **FAST, api_name="/generate")


def test_html_in_prompts_names_and_recipes_is_escaped(client, tmp_path):
    for made in (notice(EVIL), progress_card(EVIL, EVIL, 0.5, EVIL), facts_table([(EVIL, EVIL)])):
        assert "<script>" not in made and "<img src=x" not in made
    assert "<script>" not in refusal(client, "a dog", adapter=EVIL, **FAST, api_name="/generate")
    _, _, status = client.predict(EVIL, **FAST, api_name="/generate")
    assert "<script>" not in status
    file = png_with_recipe(tmp_path / "a.png", EVIL)
    assert "<script>" not in str(client.predict(handle_file(file), api_name="/inspect"))
    assert clean_name(EVIL + "../../x") == clean_name(clean_name(EVIL + "../../x")) and "<" not in clean_name(EVIL)


class Touch:
    """Unpickling this makes a file: proof that code ran."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["evil.safetensors", "evil.bin", "evil.pt", "evil.ckpt"])
def test_pickled_adapters_are_refused_and_never_run(client, tmp_path, name):
    proof = tmp_path / "ran"
    file = tmp_path / name
    file.write_bytes(pickle.dumps({"lora": Touch(proof)}))
    assert refusal(client, handle_file(file), api_name="/inspect")
    assert not proof.exists()


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"\0" * 50_000_000)
    return buffer.getvalue()


def pixel_bomb(side: int) -> bytes:
    return png_of(side, side, b"\0" * 100)


def header_bomb() -> bytes:
    """A safetensors header that claims 10^18 bytes."""
    return (10**18).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize(
    "name, data",
    [
        ("zip.safetensors", zip_bomb()),
        ("header.safetensors", header_bomb()),
        ("bomb.png", pixel_bomb(100_000)),
        ("bomb2.png", pixel_bomb(12_000)),
        ("empty.png", b""),
        ("page.html", b"<script>alert(1)</script>"),
    ],
    ids=["zip", "header", "pixels", "pixels below Pillow's limit", "empty", "html"],
)
def test_bombs_are_refused(client, tmp_path, name, data):
    file = tmp_path / name
    file.write_bytes(data)
    assert refusal(client, handle_file(file), api_name="/inspect")
    if name.endswith(".png"):
        with pytest.raises(UserError, match="empty" if not data else "too many pixels|144 megapixels"):
            take_photos([str(file)], tmp_path / "photos")


def test_photos_lose_exif_name_and_profile(tmp_path):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "SecretCamera"
    exif.get_ifd(0x8825)[2] = (48.0, 8.0, 0.0)
    file = tmp_path / "My secret holiday.jpg"
    image.save(file, exif=exif)
    take_photos([str(file)], folder := tmp_path / "photos")
    copies = list(folder.iterdir())
    assert [copy.name for copy in copies] == ["photo_01.png"]
    with PIL.Image.open(copies[0]) as clean:
        assert clean.size == (40, 60) and not clean.getexif() and not clean.info
    assert b"Secret" not in copies[0].read_bytes()


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "README.md", ".git/config"],
)
def test_files_outside_are_not_served(served, path):
    assert httpx.get(f"{served.url}gradio_api/file={path}").status_code in (403, 404)
    assert httpx.get(f"{served.url}gradio_api/file={Path(path).resolve()}").status_code in (403, 404)


def test_a_runs_files_and_the_visitors_folders_are_not_served(served):
    run = served.ctx.runs_dir / "dog"
    run.mkdir()
    (run / "photo.png").write_bytes(b"x")
    (served.ctx.visitors.root / "x.png").write_bytes(b"x")
    for path in (
        run / "photo.png",
        served.ctx.visitors.root / "x.png",
        served.ctx.catalog.adapters_dir / "dog.safetensors",
    ):
        assert httpx.get(f"{served.url}gradio_api/file={path}").status_code in (403, 404), path


@pytest.mark.parametrize("name", ["/etc/passwd", "dog.safetensors"])
def test_a_handler_reads_no_file_that_was_not_uploaded(served, name):
    """The request is posted by hand: gradio's own client would upload the file first, which is allowed."""
    path = name if name.startswith("/") else str(served.ctx.catalog.adapters_dir / name)
    data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    asked = httpx.post(f"{served.url}gradio_api/call/inspect", json=data)
    answer = httpx.get(f"{served.url}gradio_api/call/inspect/{asked.json()['event_id']}", timeout=20).text
    assert "event: error" in answer and "event: complete" not in answer


@pytest.mark.parametrize("training", [True, False])
def test_without_training_there_is_no_endpoint_to_train(tiny_base, tmp_path, training):
    with serve(tiny_base, tmp_path, training=training) as server:
        names = httpx.get(f"{server.url}gradio_api/info").json()["named_endpoints"]
        assert ("/train" in names) == training
        assert ("/estimate" in names) == training and ("/stop_training" in names) == training


def test_a_login_is_asked_for_everywhere(tiny_base, tmp_path):
    with serve(tiny_base, tmp_path, auth=[("ann", "secret")]) as server:
        for path in ("config", "gradio_api/info", "gradio_api/file=/etc/passwd"):
            assert httpx.get(f"{server.url}{path}").status_code in (401, 403), path
        assert httpx.post(f"{server.url}gradio_api/upload", files={"files": ("a.png", b"x")}).status_code == 401
        assert Client(server.url, auth=("ann", "secret"), verbose=False).predict(api_name="/adapters")


def test_an_upload_above_the_limit_is_cut_off(tiny_base, tmp_path):
    with serve(tiny_base, tmp_path, max_file_size="1mb") as server:
        answer = httpx.post(f"{server.url}gradio_api/upload", files={"files": ("big.safetensors", b"x" * 3_000_000)})
        assert answer.status_code == 413
