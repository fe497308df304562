"""Answers to downloads in tests."""

import io
from pathlib import Path


class Answer(io.BytesIO):
    """What urlopen returns for any address: the content of the file."""

    def __init__(self, file: Path, request):
        super().__init__(file.read_bytes())
        self.url, self.length = request.full_url, file.stat().st_size
