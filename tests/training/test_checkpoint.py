"""Saving to a full disk: an error that says so, nothing half written, and what was saved before is still there."""

import errno
import shutil
import subprocess
import sys

import pytest
import torch

from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_parameters, inject
from dreambooth_moslora.adapters.raw_file import adapter_metadata
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training.checkpoint import Position, save_checkpoint
from tests.helpers.tiny import tiny_unet

DISK_KIB = 4096


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "none", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_as_one_and_costs_no_checkpoint(small_disk):
    unet = tiny_unet()
    inject(unet, MoSLoraConfig(r=32, target_modules=["to_q"]))
    optimizer = torch.optim.AdamW([p for _, p in adapter_parameters(unet)], lr=1e-3)
    parts = ({"unet": unet}, adapter_metadata({"unet": unet}), optimizer)
    run = RunDir(small_disk)
    save_checkpoint(run.checkpoint_path(1), Position(1, 0), *parts)
    optimizer.zero_grad()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(run.checkpoint_path(2), Position(2, 0), *parts)
    sizes = {path.name: path.stat().st_size for path in run.checkpoint_path(2).iterdir()}
    shutil.rmtree(run.checkpoint_path(2))
    room = sizes["moslora_weights.safetensors"] + sizes["optimizer.pt"] // 2
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
    with pytest.raises(OSError) as error:
        save_checkpoint(run.checkpoint_path(2), Position(2, 0), *parts)
    assert error.value.errno == errno.ENOSPC
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "checkpoint-1"]
