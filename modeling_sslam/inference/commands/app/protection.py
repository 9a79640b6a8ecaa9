"""Protection of the page's visitors: other web sites cannot use the page, and uploads end with the server."""

import ipaddress
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class SameOriginMiddleware:
    """Refuse requests that a browser sends for a page of another web site.

    Browsers name the site in the header Origin of every request that can change something or whose answer a script
    can read. It must be the address that the request is sent to.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] in ("http", "websocket") and _is_foreign(Headers(scope=scope)):
            refusal = PlainTextResponse("This page answers no requests of other web sites.\n", status_code=403)
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _is_foreign(headers: Headers) -> bool:
    # A proxy may change Host. Scripts cannot set Sec-Fetch-Site, so its `same-origin` is trusted.
    if headers.get("sec-fetch-site") == "same-origin":
        return False
    return any(origin.partition("://")[2] != headers.get("host") for origin in headers.getlist("origin"))


def middleware(host: str, share: bool) -> list[Middleware]:
    """Return the middleware that refuses requests of other web sites.

    On a loopback address the page also refuses requests to other host names: a web site can let its own name point to
    this machine (DNS rebinding), and then the browser takes the page for a part of that site.

    Args:
        host: Address that the server listens on.
        share: Whether the page also has a public address.
    """
    if share or not is_loopback(host):
        return [Middleware(SameOriginMiddleware)]
    names = [*LOOPBACK_NAMES, host]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(SameOriginMiddleware)]


def is_loopback(host: str) -> bool:
    """Tell whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def private_uploads() -> Iterator[None]:
    """Keep uploads in a folder that only this user can read, and remove it at the end, also after SIGTERM.

    Make and serve the page in this context. Gradio's own clean-up needs a server that stops in time, and it leaves out
    uploads that were refused or broken off.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        # Launchers send the signal several times. Later signals must not interrupt the clean-up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    parent = os.environ.get("GRADIO_TEMP_DIR")
    if parent:
        os.makedirs(parent, exist_ok=True)
    handler = signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="sslam-app-", dir=parent, ignore_cleanup_errors=True) as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder
            yield
    finally:
        os.environ.pop("GRADIO_TEMP_DIR", None)
        if parent is not None:
            os.environ["GRADIO_TEMP_DIR"] = parent
        signal.signal(signal.SIGTERM, handler)
