"""Pack what `benchmarks.first_half_hour` needs on a machine with a card and without a network.

The program, the benchmarks and the embedded base, without what they do not read; and wheels, of
which bitsandbytes keeps the library of one CUDA alone.
"""

import io
import re
import tarfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dreambooth_moslora.errors import UserError

__all__ = ["list_missing_packages", "make_bundle"]

ROOT = Path(__file__).parent.parent
CARRIED_PATHS = (
    *("dreambooth_moslora", "benchmarks", "assets/configs", "assets/toy-sdxl", "requirements.txt"),
    *("train_dreambooth.py", "pyproject.toml"),
)
EXCLUDED_PARTS = ("assets/toy-sdxl/image_encoder/", "__pycache__")
"""An evaluation's encoder, which no section needs."""
LIMIT_MIB = 60
CUDA = "cuda130"
"""Whose library of bitsandbytes is carried."""
REQUIRED_PACKAGES = (
    *("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "safetensors"),
    *("huggingface_hub", "filelock", "pillow", "numpy", "psutil", "tqdm", "jinja2", "packaging"),
    *("matplotlib", "bitsandbytes", "typing_extensions"),
)
"""What the sections import."""


def make_bundle(file: Path, remote_packages: Path | None, wheels: Path | None) -> None:
    """Write the archive, and print which wheels that machine lacks and what to run there.

    file: the archive, .tar.xz
    remote_packages: lines NAME==VERSION of what that machine has; None for nothing but torch
    wheels: a folder of wheels; None for none

    Raises UserError when it is larger than can be carried.
    """
    with tarfile.open(file, "w:xz") as bundle:
        for path in list_carried_files():
            bundle.add(path, f"bundle/{path.relative_to(ROOT)}")
        for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
            add_wheel(bundle, wheel)

    # List what that machine needs.
    has = {"torch": metadata.version("torch"), "torchvision": metadata.version("torchvision")}
    if remote_packages:
        lines = remote_packages.read_text(encoding="utf-8").splitlines()
        has = dict(line.split("==", 1) for line in lines if "==" in line)
    names = list_missing_packages(has)
    print("wheels that it needs there:", " ".join(names) or "none")
    mib = file.stat().st_size / 2**20
    print(f"{file}: {mib:.1f} MiB. There, three times or until nothing is left:")
    print(
        f"tar xf {file.name} && cd bundle && python3 -m pip install -q --no-index --no-deps "
        "--target site wheels/*.whl; PYTHONPATH=site python3 -m "
        "benchmarks.first_half_hour --out $OUT"
    )
    if mib > LIMIT_MIB:
        raise UserError(f"{file} has {mib:.1f} MiB, and {LIMIT_MIB} can be carried.")


def list_carried_files() -> Iterable[Path]:
    for name in CARRIED_PATHS:
        place = ROOT / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            inside = path.relative_to(ROOT).as_posix()
            if path.is_file() and not any(part in inside for part in EXCLUDED_PARTS):
                yield path


def add_wheel(bundle: tarfile.TarFile, wheel: Path) -> None:
    """Add the wheel, without bitsandbytes' libraries for other cards. Their lines go from its list
    of files as well, which pip checks."""
    content = io.BytesIO()
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(content, "w") as trimmed:
        for member in whole.infolist():
            library = re.search(r"libbitsandbytes_(\w+)\.so", member.filename)
            if library is None or library[1] in (CUDA, "cpu"):
                trimmed.writestr(member, whole.read(member), zipfile.ZIP_STORED)  # xz packs better
    entry = tarfile.TarInfo(f"bundle/wheels/{wheel.name}")
    entry.size = content.tell()
    content.seek(0)
    bundle.addfile(entry, content)


def list_missing_packages(has: dict[str, str]) -> list[str]:
    """NAME==VERSION, as here, of each package that the sections need and that machine lacks, or
    has in a version that this program does not take.

    has: package -> version
    """
    has = {canonicalize_name(name): version for name, version in has.items()}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ours = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line.split("#")[0])
            ours[canonicalize_name(requirement.name)] = requirement.specifier

    versions: dict[str, str] = {}
    waiting = [Requirement(name) for name in REQUIRED_PACKAGES]
    while waiting:
        requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        specifier = requirement.specifier & ours.get(name, requirement.specifier)
        if name in versions or (name in has and specifier.contains(has[name], prereleases=True)):
            continue

        # Here it is installed; with it come its own needs.
        versions[name] = metadata.version(name)
        for line in metadata.requires(name) or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need)
    return [f"{name}=={version}" for name, version in sorted(versions.items())]
