"""`gspo-mm watch RUN`: the run's report on this machine's own address, drawn again as the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gspo_mm.observe.metrics import FILE, check_run
from gspo_mm.observe.report import render
from gspo_mm.types import GspoError

HOST = "127.0.0.1"
# asks what the run has reached, and loads the page again when that is more, but not while its reader types
_LIVE = """<script>
  let seen;
  setInterval(async () => {
    const now = await (await fetch("/reached")).text();
    if (seen !== undefined && now !== seen && !document.activeElement.closest("form")) location.reload();
    else seen ??= now;
  }, 3000);
</script>"""


def server_of(run: Path, port: int) -> ThreadingHTTPServer:
    """Serves the page at / to this machine alone. Raises GspoError where there is no run, or the port is taken."""
    check_run(run)
    pages: dict[str, Callable[[], str]] = {
        "/": lambda: render(run).replace("</body>", f"{_LIVE}</body>"),
        # a file that grows with every step
        "/reached": lambda: str((run / FILE).stat().st_size),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # a name that a web page elsewhere has pointed at this machine is not answered
            name = self.headers.get("Host", "").rsplit(":", 1)[0]
            if name not in (HOST, "localhost") or self.path not in pages:
                self.send_error(404)
                return
            page = pages[self.path]().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise GspoError(
            f"--port {port} cannot be used: {error.strerror}; name another, or 0 for any"
        ) from None
