"""A page on the loopback runs without the guards against strangers, and leaves Gradio's own parts as they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BUILT = """
import json, sys
from pathlib import Path
from gradio.queueing import Queue
from gradio.state_holder import SessionState
from dreambooth_moslora.ui.page import build_app, launch_options
from dreambooth_moslora.ui.state import AppContext

folder, public = Path(sys.argv[1]), sys.argv[2] == "public"
folders = {"adapters_dir": folder / "adapters", "runs_dir": folder / "runs"}
own = SessionState.__setitem__
ctx = AppContext(lambda: None, base="toy", base_name="toy", resolution_px=128, training=True, public=public, **folders)
page = build_app(ctx, ["a photo of {}"])
layers = launch_options({("https", "pictures.example.org", 443)} if public else ())["app_kwargs"]["middleware"]
ctx.visitors.close()
changed = sorted(name for name in vars(page._queue) if hasattr(Queue, name))
changed += ["__setitem__"] * (SessionState.__setitem__ is not own)
is_loaded = "dreambooth_moslora.ui.public" in sys.modules
print(json.dumps([is_loaded, changed, [layer.cls.__name__ for layer in layers]]))
"""


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("local", [False, [], ["BodySizeLimit", "UploadQuota", "VisitorCookie"]]),
        (
            "public",
            [
                True,
                ["get_events", "push", "send_message", "__setitem__"],
                ["BodySizeLimit", "UploadQuota", "LoginLimit", "SessionGuard", "UnknownNames", "VisitorCookie"],
            ],
        ),
    ],
)
def test_what_guards_against_strangers_is_loaded_for_a_public_page_alone(tmp_path, kind, found):
    command = [sys.executable, "-c", BUILT, tmp_path, kind]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == found
