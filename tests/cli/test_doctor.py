"""What `doctor` says of versions, of the machine and of a base's VAE."""

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from dreambooth_moslora.base import decode, machine
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.decode import load_vae_alone, probe_vae
from dreambooth_moslora.cli.command_doctor import (
    LEAST_PX,
    OPTIONAL,
    Findings,
    examine_machine,
    needed_ranges,
    out_of_range,
)
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan import checks
from dreambooth_moslora.settings import rules
from dreambooth_moslora.settings.table import TrainConfig


def test_doctor_reads_versions_machine_and_the_vae(tiny_base, capsys, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=3 * 2**30))
    assert main(["doctor", "--base", str(tiny_base), "--size", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    facts = found["facts"]
    assert (
        found["problems"] == []
        and {"torch", "peft", "device", "compile", "VAE in bfloat16"} <= facts.keys()
    )
    assert facts["VAE in float16"].startswith("off by") and facts["processor"].endswith(
        " cores, 3.0 GiB"
    )


def test_doctor_refuses_pictures_that_are_too_small_for_a_vae(tiny_base, capsys):
    for size in (-1, 15):
        assert main(["doctor", "--base", str(tiny_base), "--size", str(size)]) == 2
        assert f"error: --size {size}: must be at least {LEAST_PX}" in capsys.readouterr().err
    (found,) = probe_vae(load_vae_alone("toy"), [torch.bfloat16], [], LEAST_PX, torch.device("cpu"))
    assert found.finite


@pytest.mark.parametrize(
    ("has_bf16", "words", "px"), [(True, [], 256), (False, [], 64), (False, ["--size", "32"], 32)]
)
def test_doctor_tries_smaller_pictures_where_half_precision_is_emulated(
    has_bf16, words, px, monkeypatch, capsys
):
    seen = []
    monkeypatch.setattr(machine, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: has_bf16)
    monkeypatch.setattr(
        decode, "probe_vae", lambda vae, dtypes, photos, size_px, device: seen.append(size_px) or []
    )
    assert main(["doctor", *words]) == 0 and seen == [px]


def test_doctor_refuses_a_folder_without_a_usable_photo(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"no")
    assert main(["doctor", "--base", "none", "--photos", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: no usable photo in {tmp_path}: a.jpg (broken")
        and error.count("\n") == 1
    )


LACKS = [
    (False, ["c++"], [], None),
    (False, ["gcc"], [], "a C++ compiler"),
    (True, ["gcc"], [], "Triton"),
]
LACKS += [(True, [], ["triton"], "a C compiler"), (True, ["gcc"], ["triton"], "Python.h")]


@pytest.mark.parametrize(("on_gpu", "programs", "modules", "lacks"), LACKS)
def test_what_compile_lacks_is_named(on_gpu, programs, modules, lacks, monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: on_gpu)
    monkeypatch.setattr(machine.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(machine, "find_spec", lambda name: name if name in modules else None)
    monkeypatch.setattr(machine, "get_path", lambda name: "/nowhere")
    found = machine.what_compile_lacks()
    assert (found is None) if lacks is None else found.startswith(lacks)


@pytest.mark.parametrize(("macos", "says"), [(14, "yes"), (13, "no: use --mixed_precision fp16")])
def test_doctor_sees_apples_gpu_and_that_bf16_begins_with_macos_14(apple, macos, says, monkeypatch):
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= macos
    )
    examine_machine(found := Findings())
    assert (
        found.facts["device"] == "Apple GPU (mps), 21.3 GiB for a process"
        and found.facts["bf16"] == says
    )
    assert not [line for line in found.warnings if "GPU" in line]


def test_doctor_names_missing_libraries_and_takes_builds_and_candidates_as_their_release():
    mine = {name: rules.version_of(name) for name in needed_ranges()}
    assert out_of_range(mine) == []
    assert "peft is missing" in out_of_range({**mine, "peft": None})[0]
    for version in ("2.9", "2.13.0+cpu", "2.9.0rc1"):
        assert out_of_range({**mine, "torch": version}) == []
    for version in ("3.0", "2.8.9", "unknown"):
        (line,) = out_of_range({**mine, "torch": version})
        assert line.startswith(f"torch {version} was not")


def test_the_ranges_are_those_that_the_installation_asks_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    found = needed_ranges()
    assert {"torch", "peft", "gradio"} <= found.keys() and not found.keys() & set(OPTIONAL)
    for item in map(Requirement, project["dependencies"]):
        assert item.name in OPTIONAL or found[item.name] == item.specifier


def test_a_vae_that_overflows_is_found(tiny_base):
    vae = load_vae_alone(tiny_base)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e6)
    (half,) = probe_vae(vae, [torch.float16], [], 32, torch.device("cpu"))
    assert not half.finite and vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"optimizer": "Prodigy", "use_8bit_adam": True},
            "--optimizer Prodigy needs prodigyopt: pip install prodig",
        ),
        ({"use_8bit_adam": True}, "--use_8bit_adam needs bitsandbytes"),
        ({"base_quantization": "nf4"}, "--base_quantization nf4 needs bitsandbytes"),
        ({"report_to": "wandb"}, "--report_to wandb needs wandb"),
    ],
)
def test_a_flag_whose_package_is_missing_is_refused_before_anything_is_loaded(
    settings, says, monkeypatch
):
    base = Base.find("toy")
    checks.preflight(TrainConfig(report_to="none"), base)
    monkeypatch.setattr(rules, "version_of", lambda name: None)
    with pytest.raises(UserError, match=says):
        checks.preflight(TrainConfig(**{"report_to": "none"} | settings), base)
