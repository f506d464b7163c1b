"""Names and shapes of the tensors in safetensors files, read from the headers alone."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from dreambooth_moslora.core.errors import UserError

__all__ = ["check_weights", "tensor_shapes", "variants_in", "weight_files"]

LFS_POINTER = b"version https://git-lfs.github.com/spec"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of a base's component that are loaded: the variant's, if there are any."""
    for suffix in (".safetensors", ".bin"):
        files = sorted(folder.glob(f"*{suffix}"))
        chosen = [file for file in files if variant and f".{variant}" in file.name]
        plain = [file for file in files if "." not in file.stem]
        if files:
            return chosen or plain or files
    return []


def variants_in(folder: Path) -> list[str]:
    """The variants of a component's safetensors files: `fp16` of model.fp16.safetensors, also where it is split."""
    names = [file.stem.partition(".")[2] for file in folder.glob("*.safetensors")]
    return sorted({name.partition("-")[0] for name in names if name})


def tensor_shapes(folder: Path, variant: str | None = None) -> dict[str, list[int]]:
    """Name -> shape for a component's folder; empty if its weights are in another format, or missing. Raises
    UserError."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder, variant):
        check_weights(file)
        if file.suffix == ".safetensors":
            shapes |= shapes_in(file)
    return shapes


def check_weights(path: Path) -> None:
    """Raises UserError for a git-lfs pointer, and for a truncated file."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a git-lfs pointer, the weights are not here: fetch them with `git lfs pull`.")
    if path.suffix == ".safetensors":
        shapes_in(path)


def shapes_in(path: Path) -> dict[str, list[int]]:
    """{tensor's name: its shape} of a safetensors file. Raises UserError for a damaged file."""
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged, cut short or not a safetensors file ({error}): fetch it again.") from None
