"""Files that the page stores while it is up: clean photos, generated images, uploaded adapters.

A page has one owner, whose browsers all show the same. The folder is deleted with the server.
"""

import os
import re
import shutil
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from dreambooth_moslora.disk import queue
from dreambooth_moslora.disk.process_identity import get_current_token, is_running
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.ui.photo_copies import list_photo_copies

FOLDER_PREFIX = "moslora-app-"
"""Prefix of the folders of all servers."""
FOLDER_PATTERN = re.compile(
    rf"{FOLDER_PREFIX}(?P<pid>[0-9]{{1,9}})-(?P<token>[0-9a-f]{{8}})-[a-z0-9_]+"
)
"""Name of a server's folder. Other names among the temporary files may be any user's."""
LOCK_NAME = ".lock"
"""File in it that its server locks. Containers that share temporary files do not see each other's
processes, but their locks."""
GRADIO_FOLDER = "gradio"
"""Folder in it for gradio's files."""
HISTORY_LENGTH = 48
"""Images in the history; older images are deleted."""


@dataclass(frozen=True)
class SavedImage:
    """Finished PNG with its caption."""

    path: Path
    caption: str


@dataclass
class Workspace:
    """Files of the page, all below `root`, and its records of others.

    - `history` has the finished images, the newest first.
    - `uploads` are uploaded adapters, by name.
    - `subject_fields` are the form's fields that describe the subject of the photos, by name.
    """

    root: Path
    history: deque[SavedImage] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))
    uploads: dict[str, Path] = field(default_factory=dict)
    subject_fields: dict[str, str] = field(default_factory=dict)
    changing: threading.RLock = field(default_factory=threading.RLock, compare=False)
    """Lock that is held while the photos change: two tabs may send photos at once."""
    lock: BinaryIO | None = field(default=None, compare=False)
    """Locked file of the folder, open while the page lives."""

    @property
    def folder(self) -> Path:
        """Return `root`, created again if the system has deleted it."""
        self.root.mkdir(parents=True, exist_ok=True)
        return self.root

    @property
    def photos_dir(self) -> Path:
        """Return the folder of the form's clean photos."""
        return self.root / "photos"

    @property
    def required_photos_dir(self) -> Path:
        """Return `photos_dir`. Raises UserError while no photo is in it."""
        if not list_photo_copies(self.photos_dir):
            raise UserError("add some photos of your subject first")
        return self.photos_dir

    def add_to_history(self, saved_image: SavedImage) -> None:
        """Add to the history, newest first; if it is full, delete the oldest file."""
        if len(self.history) == self.history.maxlen:
            self.history[-1].path.unlink(missing_ok=True)
        self.history.appendleft(saved_image)

    def delete_old(self, age_sec: float) -> None:
        """Delete files that gradio has shown for longer than `age_sec`.

        Gradio itself deletes nothing that a session's own components show, and a component is that
        after its first update.
        """
        for file in (self.root / GRADIO_FOLDER).rglob("*"):
            with suppress(OSError):  # it has been deleted meanwhile
                if file.is_file() and time.time() - file.stat().st_ctime > age_sec:
                    file.unlink()

    def close(self) -> None:
        """Delete all files of the page."""
        if self.lock:
            self.lock.close()  # Windows deletes no open file
        shutil.rmtree(self.root, ignore_errors=True)


def create_workspace() -> Workspace:
    """Create an empty workspace of this process.

    Folders of servers that were killed are deleted, as they hold photos.
    """
    home = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
    home.mkdir(parents=True, exist_ok=True)
    # Delete folders that no server owns any more.
    for folder in home.glob(f"{FOLDER_PREFIX}*"):
        name_match = FOLDER_PATTERN.fullmatch(folder.name)
        if name_match and not is_running(int(name_match["pid"]), name_match["token"]):
            with suppress(OSError, UserError):  # another user's, or locked
                queue.claim_lock(folder / LOCK_NAME, "").close()
                shutil.rmtree(folder, ignore_errors=True)
    # Create this server's folder, which names its process.
    pid = os.getpid()
    prefix = f"{FOLDER_PREFIX}{pid}-{get_current_token(pid)}-"
    root = Path(tempfile.mkdtemp(prefix=prefix, dir=home)).resolve()
    return Workspace(root, lock=queue.claim_lock(root / LOCK_NAME, ""))
