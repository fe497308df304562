"""A web server on this machine that gives one file for every path, and misbehaves in the ways that its attributes say."""

import base64
import contextlib
import http.server
import re
import socket
import threading


class Server(http.server.ThreadingHTTPServer):
    """Serves `files[path]`, and `content` for every other path; its other attributes say in which way it misbehaves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.md5 = b"", '"one"', None
        self.files = {}
        self.status = None             # answer with this status and nothing else
        self.ranges = True             # understands the Range header
        self.whole = False             # answers it with 206 and the whole file
        self.cut_after = None          # closes the connection after so many bytes of the body
        self.chunked = False           # tells no length
        self.greeting = None           # speaks another protocol
        self.requests = []             # (path, Range, If-Range)
        self.answers = []              # statuses


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server: Server = self.server
        self.close_connection = True
        server.requests.append((self.path, self.headers["Range"], self.headers["If-Range"]))
        if server.greeting:
            self.wfile.write(server.greeting)
            return
        content = server.files.get(self.path, server.content)
        status, body = server.status or 200, content
        start = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if start and server.ranges and not server.status and self.headers["If-Range"] in (None, server.etag):
            start = int(start[1])
            start = 0 if server.whole else start
            status, body = (206, body[start:]) if start < len(body) else (416, b"")
        server.answers.append(status)
        if status not in (200, 206):
            body = b""
        self.send_response(status)
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.md5:
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={base64.b64encode(server.md5).decode()}")
        self.end_headers()
        sent = body if server.cut_after is None else body[: server.cut_after]
        if server.chunked:
            self.wfile.write(b"%x\r\n" % len(body) + sent)
            if sent == body:
                self.wfile.write(b"\r\n0\r\n\r\n")
        else:
            self.wfile.write(sent)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def nobody() -> str:
    """The URL of a port that nobody listens at."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"
