"""Push of a finished adapter to the hub: its files, the card and its images.

Photos, the contact sheet (which shows them), checkpoints, class images and the configuration
(paths) stay on this machine.
"""

import logging
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi

from dreambooth_moslora.disk import run_folder
from dreambooth_moslora.errors import format_error

logger = logging.getLogger(__name__)

PUBLIC_PATTERNS = [
    run_folder.PUBLISHED_NAME,
    "README.md",
    "image_*.png",
    f"*{run_folder.KOHYA_SUFFIX}",
]


def list_public_files(run_dir: Path) -> list[str]:
    """Names of the files at the top of the run folder that may be uploaded."""
    files = [path for path in run_dir.iterdir() if path.is_file()]
    return sorted(path.name for path in files if any(map(path.match, PUBLIC_PATTERNS)))


def push_to_hub(run_dir: Path, repo_id: str | None, token: str | None) -> None:
    """Upload `list_public_files`; a warning when the hub cannot be reached or refuses."""
    api = HfApi(token=token)

    # The hub takes patterns: escaped, each matches its own file alone, brackets or not.
    names = [escape(name) for name in list_public_files(run_dir)]
    try:
        url = api.create_repo(repo_id or run_folder.RunDir(run_dir).name, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=run_dir,
            allow_patterns=names,
            commit_message="Upload the adapter",
        )
    except Exception as error:  # the client passes on the HTTP library's errors
        logger.warning(
            "the adapter is in %s but could not be pushed to the hub (%s); "
            "--push_to_hub --resume_from_checkpoint latest tries again",
            run_dir,
            format_error(error),
        )
