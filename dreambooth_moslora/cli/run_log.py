"""Log of a run: all records in its folder, warnings also on the terminal."""

import logging
import warnings

from dreambooth_moslora.base.devices import is_main_process
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import escape_control_characters


class EscapingFormatter(logging.Formatter):
    """Formatter that escapes control characters, which a file name in a record may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_control_characters(super().format(record))


def start_log(run_dir: RunDir) -> None:
    """Send all records to the log in the run folder, and warnings also to the terminal. Raises
    OSError if the folder cannot be written."""
    # Log warnings of libraries too, except those about their next versions.
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    root_logger = logging.getLogger()
    root_logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # no traceback for each record on a full disk

    # Only the main process writes the file; the others report errors on the terminal.
    terminal_handler = logging.StreamHandler()
    terminal_handler.setLevel(logging.WARNING if is_main_process() else logging.ERROR)
    terminal_handler.setFormatter(EscapingFormatter("%(message)s"))
    root_logger.addHandler(terminal_handler)
    if is_main_process():
        run_dir.path.mkdir(parents=True, exist_ok=True)
        file_handler = logging.FileHandler(
            run_dir.log_path, encoding="utf-8", errors="backslashreplace"
        )
        file_handler.setFormatter(
            EscapingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        )
        root_logger.addHandler(file_handler)
