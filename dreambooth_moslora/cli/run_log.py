"""The log of a run: all records in its folder, warnings on the terminal too."""

import logging
import warnings

from dreambooth_moslora.base.devices import is_main_process
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import escape_control_characters


class EscapingFormatter(logging.Formatter):
    """Escapes control characters, which a file name in a record may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_control_characters(super().format(record))


def start_log(run_dir: RunDir) -> None:
    """Send all records to the log in the run folder, warnings also to the terminal. Raises OSError
    when the folder cannot be written."""
    # Warnings of libraries are records too; those about their next versions help nobody here.
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk: no traceback for each record

    # One process writes; the others only say errors.
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING if is_main_process() else logging.ERROR)
    terminal.setFormatter(EscapingFormatter("%(message)s"))
    root.addHandler(terminal)
    if is_main_process():
        run_dir.path.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(run_dir.log_path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(EscapingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)
