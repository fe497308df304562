"""The folder for temporary files, which TMPDIR names: whether it can be used, and a short one for sockets."""

import os
import sys
import tempfile

# A path of a socket is limited to so many bytes (unix(7)), of which multiprocessing takes the last for names of its own.
SOCKET_PATH, SOCKET_NAME = 107 if sys.platform == "linux" else 103, len("/pymp-12345678/listener-12345678")
SHORT = ("/tmp", "/var/tmp", "/dev/shm")


class TemporaryFolderError(ValueError):
    """Raised when no file can be made in TMPDIR."""

    exit_code = 2


def check() -> None:
    """Raises TemporaryFolderError where TMPDIR cannot be used: Python would take another folder in silence."""
    if folder := os.environ.get("TMPDIR"):
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise TemporaryFolderError(f"TMPDIR={folder}: no file can be made there ({error.strerror}). Make that folder, name "
                                       "another, or unset TMPDIR to take /tmp.") from error


def socket_folder() -> str:
    """A folder in which the paths of multiprocessing's sockets are short enough: TMPDIR, or else one of SHORT.

    Raises OSError where there is none.
    """
    folders = [tempfile.gettempdir(), *SHORT]
    for folder in folders:
        if len(os.fsencode(folder)) + SOCKET_NAME <= SOCKET_PATH and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise OSError(f"TMPDIR={folders[0]} is longer than {SOCKET_PATH - SOCKET_NAME} bytes, and none of {', '.join(SHORT)} can be "
                  "written")
