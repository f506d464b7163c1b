"""Another's session, files and runs, asked for by the page's private events as a script would: nothing is given."""

import json
import os
import pickle
import secrets
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
from gradio_client import Client

from dreambooth_moslora.ui.jobs import Job
from dreambooth_moslora.ui.visitors import COOKIE, visitor_id
from tests.helpers.ui_server import cookie_of, secret_of
from tests.ui.test_security import FAST, Touch, refusal


def call_private(served, index: int, data: list, cookie: str = "eve", session: str = "") -> str:
    """Call an event by its number, as a script would; the server's last words."""
    headers, session = cookie_of(cookie), session or secrets.token_hex(8)
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
    headers = cookie_of(cookie)
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
    good, proof = served.ctx.catalog.path("dog").read_bytes(), tmp_path / "ran"
    for name, content in (("evil.safetensors", pickle.dumps(Touch(proof))), ("evil.pt", pickle.dumps(Touch(proof)))):
        assert '"success":false' in upload_adapter(served, name, content, "ann").replace(" ", "")
    assert not proof.exists()
    assert '"success":true' in upload_adapter(served, "anns.safetensors", good, "ann").replace(" ", "")
    ann = Client(served.url, verbose=False, headers=cookie_of("ann"))
    tagged = ("prompt", "a dog <lora:anns:1>|a dog", "none", "", "a dog")
    assert ann.predict(*tagged, **FAST, api_name="/grid")
    assert "here is no adapter anns" in refusal(client, *tagged, **FAST, api_name="/grid")
    assert "here is no adapter anns" in refusal(
        client, "adapter", "anns", "none", "", "a dog", **FAST, api_name="/grid"
    )


def test_an_upload_that_fails_in_any_way_is_not_kept(served, monkeypatch):
    def fail(*_):
        raise RuntimeError("nobody thought of this")

    good, shelved = served.ctx.catalog.path("dog").read_bytes(), served.ctx.visitors.root
    with monkeypatch.context() as patch:
        patch.setattr(served.ctx.pipeline(), "load_adapter", fail)
        assert '"success":false' in upload_adapter(served, "lost.safetensors", good, "ida").replace(" ", "")
    assert not list(shelved.rglob("lost.safetensors"))


def test_a_forged_session_shows_nobodys_pictures(served):
    ann = Client(served.url, verbose=False, headers=cookie_of("ann"))
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
    owner = visitor_id(SimpleNamespace(cookies={COOKIE: secret_of("ann")}, session_hash=None))
    Job(run, owner, os.getpid(), 0.0).save()
    watch = event_of(served, "run_picker", "change")
    assert "TOPSECRET" in call_private(served, watch, ["theirs", None], "ann")
    assert "TOPSECRET" not in call_private(served, watch, ["theirs", None], "eve")


def test_a_forged_session_stops_nobody(served):
    victim = Client(served.url, verbose=False, headers=cookie_of("victim"))
    job = victim.submit("a dog", steps=60, num_images=8, api_name="/generate")
    while not job.outputs():
        time.sleep(0.02)
    forged = {"data": [], "session_hash": victim.session_hash}
    for headers in (cookie_of("eve"), {}):
        httpx.post(f"{served.url}gradio_api/run/stop", json=forged, headers=headers)
    time.sleep(0.3)
    assert not job.done()
    victim.predict(api_name="/stop")
    assert "Stopped" in job.result(timeout=60)[2]


def test_the_page_asks_the_mask_editor_for_its_picture_only_when_it_is_kept(served):
    """gradio asks all that lies in a component with a progress for their values, at each tick of the page's timers."""
    config = served.page.get_config_file()
    names = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    parents: dict[int, int] = {}

    def walk(node: dict) -> None:
        for child in node.get("children", ()):
            parents[child["id"]] = node["id"]
            walk(child)

    walk(config["layout"])
    place = next(number for number, name in names.items() if name == "mask_editor")
    around = {place}
    while place in parents:
        around.add(place := parents[place])
    for event in config["dependencies"]:
        shown = set(event["show_progress_on"] or event["outputs"])
        assert not shown & around, (event["targets"], [names.get(number) for number in shown & around])
