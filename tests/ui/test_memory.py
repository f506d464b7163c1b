"""What the page's process keeps of the machine's memory."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from gradio_client import Client

from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.ui.generate_form import GenerateForm, make_pictures
from dreambooth_moslora.ui.page import MAX_SESSIONS
from dreambooth_moslora.ui.state import AppContext
from tests.helpers.ui_server import serve

PAGE = SimpleNamespace(username=None, cookies={}, session_hash="page")
BLOCKS, BLOCK_BYTES = 2500, 60_000
THREADS = """
import ctypes, sys, tempfile, threading
from dreambooth_moslora.ui.app import main
if sys.argv[1] == "page":
    assert main(["--server_port", "-1"]) == 2
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier(4)
def work():
    together.wait()
    libc.malloc(ctypes.c_size_t(5000))
    together.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(open(file.name).read().count("<heap nr="))
"""


@pytest.fixture
def _glibc():
    if not hasattr(ctypes.CDLL(None), "malloc_info"):
        pytest.skip("no glibc here")


@pytest.mark.usefixtures("_glibc")
def test_the_pages_threads_share_one_heap():
    """Four that allocate at once; by themselves they begin heaps of their own."""
    own, page = (int(subprocess.check_output([sys.executable, "-c", THREADS, mode])) for mode in ("own", "page"))
    assert page == 1 < own


@pytest.mark.usefixtures("_glibc")
def test_what_a_picture_leaves_free_goes_back_to_the_system(tmp_path, tiny_base):
    """Many small blocks below one that stays: without being asked, glibc keeps them all."""
    folders = {"adapters_dir": tmp_path / "adapters", "runs_dir": tmp_path / "runs"}
    pipeline = SubjectPipeline.from_base(tiny_base)
    ctx = AppContext(lambda: pipeline, base="tiny", base_name="tiny", resolution_px=64, training=False, **folders)
    form = GenerateForm("a dog", steps=1, size="64 x 64")
    try:
        list(make_pictures(ctx, form, PAGE))
        stays = leave_free_blocks()
        before = psutil.Process().memory_info().rss
        list(make_pictures(ctx, form, PAGE))
        assert before - psutil.Process().memory_info().rss > BLOCKS * BLOCK_BYTES / 2
    finally:
        ctypes.CDLL(None).free(stays)
        ctx.visitors.close()


def leave_free_blocks() -> ctypes.c_void_p:
    """150 MB, allocated, written and freed again but for the last block, which is returned."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(BLOCK_BYTES))) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK_BYTES)
    for block in blocks[:-1]:
        libc.free(block)
    return blocks[-1]


def test_a_session_holds_no_more_after_more_pictures(tmp_path, tiny_base):
    """The gallery is told to stay as it is before each picture: Gradio kept a new one each time."""
    with serve(tiny_base, tmp_path) as served:
        client = Client(served.url, verbose=False, download_files=tmp_path / "got")
        held = []
        for seed in range(3):
            client.predict("a dog", adapter="none", seed=seed, steps=1, size="64 x 64", api_name="/generate")
            session = served.page.state_holder.session_data[client.session_hash]
            held.append((len(session.blocks_config.blocks), len(session.config_values)))
        client.close()
    assert held[0] == held[1] == held[2]


def test_the_oldest_sessions_are_forgotten(tmp_path, tiny_base):
    with serve(tiny_base, tmp_path) as served:
        sessions = served.page.state_holder
        first, *others = (f"session{number}" for number in range(MAX_SESSIONS + 1))
        sessions[first]
        sessions.session_data.update(dict.fromkeys(others[:-1], sessions[first]))
        sessions[others[-1]]
        assert set(sessions.session_data) == set(others)
