"""Push a finished adapter to the hub, when asked: the adapter's files, the card and its pictures, nothing else.

Photos, the contact sheet (it shows them), checkpoints, class images and the configuration (it holds paths) stay here.
"""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from dreambooth_moslora.errors import UserError

__all__ = ["public_files", "push"]

PUBLIC_FILES = ["pytorch_lora_weights.safetensors", "*.kohya.safetensors", "README.md", "image_*.png"]


def public_files(run_dir: Path) -> list[str]:
    """Names of the files at the top of the run folder that may leave the machine."""
    return sorted(p.name for p in run_dir.iterdir() if p.is_file() and any(map(p.match, PUBLIC_FILES)))


def push(run_dir: Path, repo_id: str | None, token: str | None) -> str:
    """Create the model repository when it is missing, upload `public_files`; returns the repository's address.

    Raises UserError when the hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id or run_dir.name, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=run_dir,
            allow_patterns=public_files(run_dir),
            commit_message="Upload the adapter",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the adapter is in {run_dir} but could not be pushed to the hub: {reason}") from error
    return str(url)
