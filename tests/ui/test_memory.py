"""What the page's process keeps of the machine's memory."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.ui.app_state import AppContext
from dreambooth_moslora.ui.generate_actions import make_pictures
from dreambooth_moslora.ui.generate_form import GenerateForm

PAGE = SimpleNamespace(username=None, cookies={}, session_hash="page")
BLOCKS, BLOCK_BYTES = 2500, 60_000
THREADS = """
import ctypes, sys, tempfile, threading
from dreambooth_moslora.ui.serve import main
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


@pytest.fixture(autouse=True)
def _glibc():
    if not hasattr(ctypes.CDLL(None), "malloc_info"):
        pytest.skip("no glibc here")


def test_the_pages_threads_share_one_heap():
    """Four that allocate at once; by themselves they begin heaps of their own."""
    own, page = (int(subprocess.check_output([sys.executable, "-c", THREADS, mode])) for mode in ("own", "page"))
    assert page == 1 < own


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
