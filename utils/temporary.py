"""Checks the folder for temporary files (TMPDIR), and finds one with a short path for sockets."""

import os
import sys
import tempfile

# Maximum length of a socket's path in bytes (unix(7)), and how much of it the names that multiprocessing gives need.
SOCKET_PATH, SOCKET_NAME = 107 if sys.platform == "linux" else 103, len("/pymp-12345678/listener-12345678")
SHORT = ("/tmp", "/var/tmp", "/dev/shm")


class TemporaryFolderError(ValueError):
    """Raised when no file can be made in TMPDIR."""

    exit_code = 2


def check() -> None:
    """Raise TemporaryFolderError if TMPDIR cannot be used, because Python would use another folder without a message."""
    if folder := os.environ.get("TMPDIR"):
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise TemporaryFolderError(f"TMPDIR={folder}: cannot write files there ({error.strerror}). Create the folder, set "
                                       "TMPDIR to another one, or unset it to use /tmp.") from error


def socket_folder() -> str:
    """Return a folder in which the paths of multiprocessing's sockets are short enough: TMPDIR, or else one of SHORT.

    Raises OSError if there is none.
    """
    folders = [tempfile.gettempdir(), *SHORT]
    for folder in folders:
        if len(os.fsencode(folder)) + SOCKET_NAME <= SOCKET_PATH and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise OSError(f"TMPDIR={folders[0]} is longer than {SOCKET_PATH - SOCKET_NAME} bytes, and none of {', '.join(SHORT)} is "
                  "writable")
