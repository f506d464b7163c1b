"""Where a run may not write, asked before anything is written: over photos, over files that no run of ours made, and
where there is no folder or no permission. No torch is needed to say so.
"""

import os
from pathlib import Path
from tempfile import TemporaryFile

from dreambooth_moslora.card_marks import is_card, pictures_named
from dreambooth_moslora.config import TrainConfig
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.rundir import RunDir, check_name, checkpoint_step

__all__ = ["check_folders", "nearest_existing", "require_folder", "require_writable"]


def check_folders(config: TrainConfig) -> None:
    """Raises UserError when the run folder is no place for a run, or gives the adapter no name. Nothing is created."""
    if not config.output_dir.strip():
        raise UserError("--output_dir is empty: name a folder for the run.")
    run_dir = RunDir(config.output_dir)
    check_name(run_dir.name)
    check_photo_folders(config, run_dir)
    check_places(config, run_dir)
    check_strangers(run_dir)


def check_photo_folders(config: TrainConfig, run_dir: RunDir) -> None:
    """Photos neither at the top of the run folder nor where a run replaces and moves its own files."""
    if same_folder(config.class_data_dir, config.instance_data_dir):
        raise UserError("--class_data_dir is the folder of --instance_data_dir: the class is not the subject.")
    home = run_dir.path.resolve()
    for name in ("instance_data_dir", "class_data_dir", "dataset_name"):
        value = getattr(config, name)
        folder = Path(value).resolve() if value else None
        if folder is None or not folder.is_relative_to(home):
            continue
        if folder == home:
            raise UserError(f"--output_dir {config.output_dir} is the folder of --{name}: a run needs one of its own.")
        first = folder.relative_to(home).parts[0]
        if is_of_the_run(run_dir, first) and not (name == "class_data_dir" and first == run_dir.class_images_dir.name):
            raise UserError(f"--{name} {value}: the run writes to {first} in its folder; keep the photos elsewhere.")


def same_folder(one: str | None, other: str | None) -> bool:
    return bool(one and other) and Path(one).resolve() == Path(other).resolve()


def is_of_the_run(run_dir: RunDir, name: str) -> bool:
    """Whether a folder of this name at the top of the run folder is the run's own."""
    own = {path.name for path in (run_dir.samples_dir, run_dir.best_dir, run_dir.class_images_dir)}
    return name in own or checkpoint_step(Path(name)) is not None


def check_places(config: TrainConfig, run_dir: RunDir) -> None:
    """What the run writes goes into folders, there or still to be made."""
    places = {"output_dir": config.output_dir, "class_data_dir": config.class_data_dir, "cache_dir": config.cache_dir}
    for name, value in places.items():
        if value:
            require_folder(name, value, Path(value))
            if not Path(value).exists() or name == "output_dir":
                require_writable(name, value)
    if config.report_to in ("tensorboard", "all"):
        require_folder("logging_dir", config.logging_dir, run_dir.path / config.logging_dir)


def require_folder(name: str, value: str, path: Path) -> None:
    found = nearest_existing(path)
    if not found.is_dir():
        raise UserError(f"--{name} {value}: {found} is a file, not a folder.")


def require_writable(name: str, value: str) -> None:
    """Tried, not asked: a file system may refuse what the permissions allow."""
    try:
        TemporaryFile(dir=nearest_existing(Path(value))).close()
    except OSError as error:
        raise UserError(f"--{name} {value}: cannot be written: {error.strerror}.") from error


def nearest_existing(path: Path) -> Path:
    """The path itself, or the folder that is nearest above it."""
    path = Path(os.path.abspath(path))
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_strangers(run_dir: RunDir) -> None:
    """A card and pictures of the names that a run gives its own, but which no run made."""
    if not run_dir.path.is_dir():
        return
    card = run_dir.read_card()
    if card is not None and not is_card(card):
        raise UserError(f"{run_dir.card_path} was made by no run and would be overwritten: name another --output_dir.")
    known = pictures_named(card or "")
    for path in sorted(run_dir.path.glob("image_*.png")):
        if path.name not in known:
            raise UserError(f"{path} was made by no run and would be taken for its picture: name another --output_dir.")
