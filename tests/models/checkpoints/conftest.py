"""Fixtures: a folder for published checkpoints, and a local server that replaces the publishers'."""

import file_server
import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Set up an empty checkpoint folder in an empty working directory, without a server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT_CHECKPOINT_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("VIT_CHECKPOINT_URL", file_server.nobody())
    monkeypatch.setenv("VIT_META_URL", file_server.nobody())
    monkeypatch.setenv("HF_ENDPOINT", file_server.nobody())
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "weights"


@pytest.fixture
def server(folder, monkeypatch):
    with file_server.running() as server:
        monkeypatch.setenv("VIT_META_URL", f"http://127.0.0.1:{server.server_port}/meta/")
        monkeypatch.setenv("VIT_CHECKPOINT_URL", f"http://127.0.0.1:{server.server_port}/vit_models")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/hub/")
        yield server


@pytest.fixture
def put():
    """Return put(path, content), which writes a file and its folders and returns the path."""
    def write(path, content: bytes = b"x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write
