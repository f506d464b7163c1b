"""What the page keeps while it is up: photos as clean copies, pictures, and uploaded adapters.

A page has one owner, who may look from several browsers: all of them see the same. The folder goes
with the server.
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
"""How the folders of all servers begin."""
FOLDER_PATTERN = re.compile(
    rf"{FOLDER_PREFIX}(?P<pid>[0-9]{{1,9}})-(?P<token>[0-9a-f]{{8}})-[a-z0-9_]+"
)
"""A server's folder. Any user of the machine may have made other names among temporary files."""
LOCK_NAME = ".lock"
"""The file in it that its server locks. Processes of containers that share temporary files do not
see each other, but their locks."""
GRADIO_FOLDER = "gradio"
"""The folder in it that gradio fills."""
HISTORY_LENGTH = 48
"""Pictures that are kept; those before them are deleted."""


@dataclass(frozen=True)
class SavedImage:
    """A finished PNG."""

    path: Path
    caption: str


@dataclass
class Workspace:
    """The files of the page, all below `root`, and what is remembered of others.

    - `history` has the finished pictures, the newest first.
    - `uploads` are uploaded adapters, by name.
    """

    root: Path
    history: deque[SavedImage] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))
    uploads: dict[str, Path] = field(default_factory=dict)
    changing: threading.RLock = field(default_factory=threading.RLock, compare=False)
    """Held while the photos change: two tabs may send theirs at once."""
    lock: BinaryIO | None = field(default=None, compare=False)
    """Of the folder, held while the page lives."""

    @property
    def folder(self) -> Path:
        """`root`, made again if the system has cleared it away."""
        self.root.mkdir(parents=True, exist_ok=True)
        return self.root

    @property
    def photos_dir(self) -> Path:
        """Clean copies of the photos in the form."""
        return self.root / "photos"

    @property
    def required_photos_dir(self) -> Path:
        """`photos_dir`. Raises UserError while no photo is in it."""
        if not list_photo_copies(self.photos_dir):
            raise UserError("add some photos of your subject first")
        return self.photos_dir

    def add_to_history(self, picture: SavedImage) -> None:
        """Add to the history, newest first; when it is full, the oldest file is deleted."""
        if len(self.history) == self.history.maxlen:
            self.history[-1].path.unlink(missing_ok=True)
        self.history.appendleft(picture)

    def delete_old(self, age_sec: float) -> None:
        """Delete what gradio has shown for longer. It would delete nothing itself that a session's
        own components show, and a component is that after its first update."""
        for file in (self.root / GRADIO_FOLDER).rglob("*"):
            with suppress(OSError):  # it is gone already
                if file.is_file() and time.time() - file.stat().st_ctime > age_sec:
                    file.unlink()

    def close(self) -> None:
        """Delete all that the page kept."""
        if self.lock:
            self.lock.close()  # Windows removes no open file
        shutil.rmtree(self.root, ignore_errors=True)


def create_workspace() -> Workspace:
    """An empty workspace of this process.

    The folders of servers that were killed are deleted, as they hold photos.
    """
    home = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
    home.mkdir(parents=True, exist_ok=True)
    # Folders that no server owns any more.
    for folder in home.glob(f"{FOLDER_PREFIX}*"):
        named = FOLDER_PATTERN.fullmatch(folder.name)
        if named and not is_running(int(named["pid"]), named["token"]):
            with suppress(OSError, UserError):  # a stranger's, or locked
                queue.claim_lock(folder / LOCK_NAME, "").close()
                shutil.rmtree(folder, ignore_errors=True)
    # This server's own, which names its process.
    pid = os.getpid()
    prefix = f"{FOLDER_PREFIX}{pid}-{get_current_token(pid)}-"
    root = Path(tempfile.mkdtemp(prefix=prefix, dir=home)).resolve()
    return Workspace(root, lock=queue.claim_lock(root / LOCK_NAME, ""))
