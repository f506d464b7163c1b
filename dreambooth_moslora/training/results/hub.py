"""Pushes a finished adapter to the hub, when asked: the adapter's files, the card and its pictures, nothing else.

Photos, the contact sheet (which shows them), checkpoints, class images and the configuration (which holds
paths) stay on this machine.
"""

import logging
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi

from dreambooth_moslora.core.errors import one_line
from dreambooth_moslora.core.run_files.run_folder import MIXERS_NAME, PUBLISHED_NAME, TOKENS_SUFFIX, RunDir

__all__ = ["public_files", "push"]

logger = logging.getLogger(__name__)

PUBLIC_FILES = [PUBLISHED_NAME, MIXERS_NAME, "*.kohya.safetensors", f"*{TOKENS_SUFFIX}", "README.md", "image_*.png"]


def public_files(run_dir: Path) -> list[str]:
    """Names of the files at the top of the run folder that may be uploaded."""
    return sorted(p.name for p in run_dir.iterdir() if p.is_file() and any(map(p.match, PUBLIC_FILES)))


def patterns(names: list[str]) -> list[str]:
    """Patterns for the hub's filter (fnmatch) that match only these names, even with brackets in them."""
    return [escape(name) for name in names]


def push(run_dir: Path, repo_id: str | None, token: str | None) -> str | None:
    """Create the model repository if it is missing, and upload `public_files`. Returns the repository's address.

    When the hub cannot be reached or refuses, it logs a warning and returns None: the run is complete without
    it.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id or RunDir(run_dir).name, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=run_dir,
            allow_patterns=patterns(public_files(run_dir)),
            commit_message="Upload the adapter",
        )
    except Exception as error:  # the client passes on the HTTP library's errors
        again = "--push_to_hub --resume_from_checkpoint latest tries again"
        logger.warning(
            "the adapter is in %s but could not be pushed to the hub (%s); %s", run_dir, one_line(error), again
        )
        return None
    return str(url)
