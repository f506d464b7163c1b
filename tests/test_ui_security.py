"""The attack list: each is tried on the running page and must be refused."""

import io
import json
import os
import pickle
import secrets
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import PIL.Image
import pytest
from gradio_client import Client, handle_file
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation import GenerationParams
from dreambooth_moslora.ui.cards import facts_table, notice, progress_card
from dreambooth_moslora.ui.jobs import Job, Jobs
from dreambooth_moslora.ui.photo_uploads import take_photos
from dreambooth_moslora.ui.shelf import AdapterShelf, clean_name
from dreambooth_moslora.ui.visitors import COOKIE, visitor_id
from tests.odd_photos import png_of
from tests.ui_server import serve

EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
FAST = {"steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "secret.safetensors").write_text("secret")
    with serve(tiny_base, folder) as server:
        yield server


@pytest.fixture
def client(served):
    return Client(served.url, verbose=False)


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
    assert list(AdapterShelf(tmp_path / "adapters", tmp_path / "runs").files()) == ["own"]


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
    folder = take_photos([str(file)], tmp_path / "photos").folder
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
        served.ctx.shelf.adapters_dir / "dog.safetensors",
    ):
        assert httpx.get(f"{served.url}gradio_api/file={path}").status_code in (403, 404), path


@pytest.mark.parametrize("name", ["/etc/passwd", "dog.safetensors"])
def test_a_handler_reads_no_file_that_was_not_uploaded(served, name):
    """The request is posted by hand: gradio's own client would upload the file first, which is allowed."""
    path = name if name.startswith("/") else str(served.ctx.shelf.adapters_dir / name)
    data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    asked = httpx.post(f"{served.url}gradio_api/call/inspect", json=data)
    answer = httpx.get(f"{served.url}gradio_api/call/inspect/{asked.json()['event_id']}", timeout=20).text
    assert "event: error" in answer and "event: complete" not in answer


def call_private(served, index: int, data: list, cookie: str = "eve", session: str = "") -> str:
    """Call an event by its number, as a script would; the server's last words."""
    headers, session = {"Cookie": f"{COOKIE}={cookie}"}, session or secrets.token_hex(8)
    body = {"fn_index": index, "data": data, "session_hash": session}
    joined = httpx.post(f"{served.url}gradio_api/queue/join", json=body, headers=headers)
    if not joined.is_success:
        return joined.text
    with httpx.stream(
        "GET", f"{served.url}gradio_api/queue/data?session_hash={session}", headers=headers, timeout=60
    ) as lines:
        for line in lines.iter_lines():
            if "process_completed" in line or "unexpected_error" in line:
                return line
    return ""


def event_of(served, elem_id: str, trigger: str) -> int:
    """The number of the event that one widget's `trigger` starts."""
    config = httpx.get(f"{served.url}config").json()
    widget = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == elem_id)
    return next(d["id"] for d in config["dependencies"] if [widget, trigger] in [list(t) for t in d["targets"]])


def sent(served, name: str, content: bytes, cookie: str) -> str:
    """The server's path of a file that was sent to it."""
    headers = {"Cookie": f"{COOKIE}={cookie}"}
    answer = httpx.post(f"{served.url}gradio_api/upload", files={"files": (name, content)}, headers=headers)
    return answer.json()[0]


def upload_adapter(served, name: str, content: bytes, cookie: str) -> str:
    data = {"path": sent(served, name, content, cookie), "meta": {"_type": "gradio.FileData"}, "orig_name": name}
    return call_private(served, event_of(served, "upload_adapter", "upload"), [data], cookie)


def test_the_name_of_an_upload_leaves_no_folder(served, tmp_path):
    path = Path(sent(served, "../../../evil<b>.png", b"x", "eve"))
    assert ".." not in path.parts and "<" not in path.name
    assert path.resolve() == path and not (path.parents[2] / path.name).exists()


def test_an_uploaded_adapter_is_checked_and_belongs_to_its_visitor_in_grids_too(served, client, tmp_path):
    good, proof = served.ctx.shelf.path("dog").read_bytes(), tmp_path / "ran"
    for name, content in (("evil.safetensors", pickle.dumps(Touch(proof))), ("evil.pt", pickle.dumps(Touch(proof)))):
        assert '"success":false' in upload_adapter(served, name, content, "ann").replace(" ", "")
    assert not proof.exists()
    assert '"success":true' in upload_adapter(served, "anns.safetensors", good, "ann").replace(" ", "")
    ann = Client(served.url, verbose=False, headers={"Cookie": f"{COOKIE}=ann"})
    tagged = ("prompt", "a dog <lora:anns:1>|a dog", "none", "", "a dog")
    assert ann.predict(*tagged, **FAST, api_name="/grid")
    assert "here is no adapter anns" in refusal(client, *tagged, **FAST, api_name="/grid")
    assert "here is no adapter anns" in refusal(
        client, "adapter", "anns", "none", "", "a dog", **FAST, api_name="/grid"
    )


def test_an_upload_that_fails_in_any_way_is_not_kept(served, monkeypatch):
    def fail(*_):
        raise RuntimeError("nobody thought of this")

    good, shelved = served.ctx.shelf.path("dog").read_bytes(), served.ctx.visitors.root
    with monkeypatch.context() as patch:
        patch.setattr(served.ctx.pipeline(), "load_adapter", fail)
        assert '"success":false' in upload_adapter(served, "lost.safetensors", good, "ida").replace(" ", "")
    assert not list(shelved.rglob("lost.safetensors"))


def test_a_forged_session_shows_nobodys_pictures(served):
    ann = Client(served.url, verbose=False, headers={"Cookie": f"{COOKIE}=ann"})
    ann.predict("a TOPSECRET dog", **FAST, api_name="/generate")
    event = event_of(served, "reuse", "click")
    answers = {cookie: call_private(served, event, [None, 0], cookie, ann.session_hash) for cookie in ("eve", "ann")}
    assert "TOPSECRET" in answers["ann"] and "TOPSECRET" not in answers["eve"]


def foreign_run(served) -> Path:
    """A finished run of somebody else, with a secret in each file."""
    run = served.ctx.runs_dir / "theirs"
    (run / "samples").mkdir(parents=True, exist_ok=True)
    for name in ("pytorch_lora_weights.safetensors", "job.log", "samples/a.png"):
        (run / name).write_text("TOPSECRET")
    (run / "metrics.jsonl").write_text(json.dumps({"type": "sample", "step": 0, "files": ["a.png"]}) + "\n")
    Job(run, "somebody-else", os.getpid(), 0.0).save()
    return run


def test_another_visitors_run_cannot_be_seen_stopped_resumed_or_used(client, served):
    foreign_run(served)
    assert "theirs" not in [row["name"] for row in client.predict(api_name="/adapters")]
    for endpoint in ("/train_status", "/stop_training", "/resume_training"):
        assert "you have no run" in refusal(client, "theirs", api_name=endpoint).lower()
    assert "no adapter" in refusal(client, "a dog", adapter="theirs", **FAST, api_name="/generate")


def test_private_events_called_directly_give_nothing_of_others(served):
    foreign_run(served)
    config = httpx.get(f"{served.url}config").json()
    private = [d for d in config["dependencies"] if d["api_visibility"] == "private"]
    assert len(private) > 10
    for dependency in private:
        answer = call_private(served, dependency["id"], ["theirs"] * len(dependency["inputs"]))
        assert "TOPSECRET" not in answer and "theirs/" not in answer


def test_the_owner_sees_by_a_private_event_what_others_do_not(served):
    """The control of the test above: the event by which the page watches a run does answer."""
    run = foreign_run(served)
    owner = visitor_id(SimpleNamespace(cookies={COOKIE: "ann"}, session_hash=None))
    Job(run, owner, os.getpid(), 0.0).save()
    watch = event_of(served, "run_picker", "change")
    assert "TOPSECRET" in call_private(served, watch, ["theirs", None], "ann")
    assert "TOPSECRET" not in call_private(served, watch, ["theirs", None], "eve")


def test_a_forged_session_stops_nobody(served):
    victim = Client(served.url, verbose=False, headers={"Cookie": "moslora_visitor=victim"})
    job = victim.submit("a dog", steps=60, num_images=8, api_name="/generate")
    while not job.outputs():
        time.sleep(0.02)
    forged = {"data": [], "session_hash": victim.session_hash}
    for cookie in ("moslora_visitor=eve", ""):
        httpx.post(f"{served.url}gradio_api/run/stop", json=forged, headers={"Cookie": cookie})
    time.sleep(0.3)
    assert not job.done()
    victim.predict(api_name="/stop")
    assert "Stopped" in job.result(timeout=60)[2]


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
