"""A web server on this machine that serves one file for every path, and misbehaves as its attributes say."""

import base64
import contextlib
import http.server
import re
import socket
import threading


class Server(http.server.ThreadingHTTPServer):
    """Serves `files[path]`, and `content` for every other path. The other attributes choose how it misbehaves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.md5 = b"", '"one"', None
        self.files = {}
        self.refusals = {}             # by path: (status, headers)
        self.redirects = {}            # by path: (where to, headers)
        self.tokens = []               # (path, Authorization)
        self.status = None             # answer with this status and nothing else
        self.ranges = True             # understands the Range header
        self.whole = False             # answers it with 206 and the whole file
        self.cut_after = None          # closes the connection after this number of bytes of the body
        self.chunked = False           # sends no length
        self.greeting = None           # speaks another protocol
        self.requests = []             # (path, Range, If-Range)
        self.answers = []              # statuses


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.close_connection = True
        if self.answered_otherwise():
            return
        self.send_response(200 if self.path in self.server.files else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answered_otherwise(self) -> bool:
        server: Server = self.server
        server.tokens.append((self.path, self.headers["Authorization"]))
        where, headers = server.redirects.get(self.path, (None, {}))
        status, headers = (302, {"Location": where} | headers) if where else server.refusals.get(self.path, (None, {}))
        if status:
            self.send_response(status)
            for header in ({"Content-Length": "0"} | headers).items():
                self.send_header(*header)
            self.end_headers()
        return status is not None

    def do_GET(self):
        server: Server = self.server
        self.close_connection = True
        server.requests.append((self.path, self.headers["Range"], self.headers["If-Range"]))
        if self.answered_otherwise():
            return
        if server.greeting:
            self.wfile.write(server.greeting)
            return
        content = server.files.get(self.path, server.content)
        status, body = server.status or 200, content
        start = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if start and server.ranges and not server.status and self.headers["If-Range"] in (None, server.etag):
            start = 0 if server.whole else int(start[1])
            status, body = (206, body[start:]) if start < len(body) else (416, b"")
        server.answers.append(status)
        body = body if status in (200, 206) else b""
        headers = [("Transfer-Encoding", "chunked") if server.chunked else ("Content-Length", str(len(body)))]
        headers += [("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")] if status == 206 else []
        headers += [("ETag", server.etag)] if server.etag else []
        if server.md5:
            headers += [("x-goog-hash", "crc32c=AAAAAA=="), ("x-goog-hash", f"md5={base64.b64encode(server.md5).decode()}")]
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.end_headers()
        sent = body[:server.cut_after]
        start, end = (b"%x\r\n" % len(body), b"\r\n0\r\n\r\n" if sent == body else b"") if server.chunked else (b"", b"")
        self.wfile.write(start + sent + end)

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
    """Return the URL of a port without a server."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"
