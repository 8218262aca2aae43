"""Serves the search page over HTTP, by the standard library alone, for one person or a small group.

Answers GET only. Every reply forbids the browser to load anything from elsewhere, to run what stands
in the page itself, to guess types and to keep a copy. Questions are answered one at a time, as the
models use all cores or the accelerator, and a request that has waited too long is told so.
"""

import concurrent.futures
import contextlib
import http.server
import ipaddress
import socket
import socketserver
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from rqv2_jax.errors import InputError
from rqv2_jax.recipe.run import Run
from rqv2_jax.tools import page, questions
from rqv2_jax.tools.page import About
from rqv2_jax.tools.questions import Answers

# Seconds that a request may take beside its answer.
SPARE_SECONDS = 15.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Served(NamedTuple):
    """What a server serves: answers, what is said of them, and how words of a question are marked."""

    answers: Answers
    about: About
    stem: Callable[[str], str]


def open_served(run: Run, *, state: str, index_name: str, shown: int, encoded: bool) -> Served:
    """Loads and compiles all that answers take; the arguments are those of `open_compared`."""
    answers = questions.open_compared(
        run, state=state, index_name=index_name, shown=shown, encoded=encoded
    )
    first = answers("the first question compiles")
    about = About(str(run.workdir), first.passages, state, index_name)
    return Served(answers, about, questions.open_stemmer(run))


class Server(http.server.ThreadingHTTPServer):
    """A server that has its port from the start, and answers as soon as `serve` is called.

    An answer may take `seconds`, those before it included. Raises InputError if it cannot have the
    port.
    """

    # With it two servers would have one port.
    allow_reuse_port = False

    def __init__(self, host: str, port: int, seconds: float):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.seconds = seconds
        # One thread, so one question at a time.
        self.worker = concurrent.futures.ThreadPoolExecutor(1)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as e:
            raise InputError(
                f"--host {host} --port {port}: cannot be served on ({e}); give another --port, or 0 "
                "for any that is free"
            ) from e

    def server_bind(self) -> None:
        """Takes the port; asks no name server what the host is called, as the library would."""
        socketserver.TCPServer.server_bind(self)

    @property
    def local(self) -> bool:
        """Says whether only this machine can reach the server."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def url(self) -> str:
        """Returns the address of the page."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def serve(self, served: Served) -> None:
        """Serves until `shutdown`, or until a signal ends the program."""
        self.served = served
        self.serve_forever()

    def server_close(self) -> None:
        """Gives up the port and all questions that wait."""
        super().server_close()
        self.worker.shutdown(wait=False, cancel_futures=True)

    def ask(self, question: str) -> str:
        """Returns the page of an answer; raises TimeoutError if it takes too long."""
        future = self.worker.submit(self.served.answers, question)
        try:
            answer = future.result(timeout=self.seconds)
        finally:
            # It no longer waits for its turn; one that is being answered cannot be stopped.
            future.cancel()
        return page.results(answer, self.served.about, self.served.stem)


class _Refused(Exception):
    """A request that gets a status and a line instead of a page."""

    def __init__(self, status: HTTPStatus, line: str):
        super().__init__(line)
        self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "rqv2_jax", ""
    timeout = 10  # seconds without a byte

    def handle(self) -> None:
        """Handles the connection, which is cut when its time is over, however slowly it goes on."""
        timer = threading.Timer(self.server.seconds + SPARE_SECONDS, self._cut)
        timer.daemon = True
        timer.start()
        try:
            super().handle()
        except ConnectionError:
            # The browser has gone on to something else.
            self.close_connection = True
        finally:
            timer.cancel()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Replies with the page, its files, or one line on what is wrong."""
        try:
            kind, body = self._found()
        except _Refused as e:
            self.send_error(e.status, str(e))
        except (TimeoutError, concurrent.futures.CancelledError):
            seconds = f"{self.server.seconds:.0f} s"
            self.send_error(
                HTTPStatus.SERVICE_UNAVAILABLE, f"no answer within {seconds}; ask again later"
            )
        except InputError as e:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, str(e))
        except Exception:
            # Not `sys.stderr`, which another question may be keeping quiet.
            traceback.print_exc(file=sys.__stderr__)
            self.send_error(
                HTTPStatus.INTERNAL_SERVER_ERROR, "the search failed; its terminal says how"
            )
        else:
            self._reply(HTTPStatus.OK, kind, body)

    def _refuse_method(self) -> None:
        self.send_error(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is answered here")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = _refuse_method
    do_CONNECT = _refuse_method

    def _found(self) -> tuple[str, str]:
        """Returns type and content of what is asked for; raises _Refused where that is nothing."""
        self._check_host()
        path, _, query = self.path.partition("?")
        if path in page.FILES:
            file, kind = page.FILES[path]
            return kind, file.read_text()
        if path != "/":
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page; the search page is /")
        try:
            fields = urllib.parse.parse_qs(query, errors="replace", max_num_fields=8)
        except ValueError as e:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"the address cannot be read ({e})") from e
        question = " ".join(" ".join(fields.get("q", [])).split())
        if len(question) > page.LONGEST_QUESTION:
            raise _Refused(
                HTTPStatus.REQUEST_URI_TOO_LONG,
                f"the question has {len(question):,} characters; {page.LONGEST_QUESTION:,} are allowed",
            )
        if not question:
            return "text/html", page.start(self.server.served.about)
        return "text/html", self.server.ask(question)

    def _check_host(self) -> None:
        """Refuses names of others that lead here, by which their pages could read answers."""
        host = self.headers.get("Host")
        if host is None or not self.server.local:
            return
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in ("localhost", "127.0.0.1", "::1", self.server.server_address[0]):
            raise _Refused(
                HTTPStatus.MISDIRECTED_REQUEST, "only this machine's own names are answered"
            )

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Replies with a status and one line of text, for the library's own refusals too."""
        status = HTTPStatus(code)
        line = " ".join((message or explain or status.phrase).split())
        self.close_connection = True
        self._reply(status, "text/plain", f"{line}\n")

    def _reply(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode(errors="replace")
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Prints nothing: questions are nobody else's business."""
