"""The page at an address of this machine: nothing leaves it, and nothing is asked of any other."""

import errno
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trce_cli.errors import BadInput

if TYPE_CHECKING:
    from gradio import Blocks

# Gradio's page runs its own scripts inline; whatever is not this server's the browser refuses.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


def check_library() -> None:
    """BadInput where Gradio is missing; else tell it, before it is imported, to ask nothing of its makers."""
    if not all(map(find_spec, ("gradio", "uvicorn"))):
        raise BadInput("The page needs Gradio, which is not installed.", "pip install 'trce[play]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound there, 0: to any free port; BadInput where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise BadInput(f"There is no address {host!r}.", "This machine alone: --host 127.0.0.1") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen()
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise BadInput(
                f"Port {port} is in use.", "Choose another with --port, or any free one with --port 0."
            ) from None
        raise BadInput(
            f"The page cannot be served at {host}, port {port}: {error.strerror}.",
            "Choose others with --host and --port.",
        ) from None
    return bound


def address_of(bound: socket.socket, host: str) -> str:
    """`http://127.0.0.1:7860/`"""
    port = bound.getsockname()[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serve(page: "Blocks", bound: socket.socket, host: str, **look: Any) -> None:
    """Serve the page until a signal ends it. look: as `gradio.mount_gradio_app` takes it."""
    import gradio
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def forbid_others(request: Any, call: Callable[[Any], Awaitable[Any]]) -> Any:
        answer = await call(request)
        answer.headers["Content-Security-Policy"] = POLICY
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    if is_loopback(host):  # a page from elsewhere must not reach it by a name of its own for this address
        hosts = ["localhost", "127.0.0.1", "[::1]", host]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    gradio.mount_gradio_app(
        app, page, path="", ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
        run_history=False, footer_links=[], show_error=True, **look,
    )  # fmt: skip
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, lifespan="on")
    uvicorn.Server(config).run(sockets=[bound])
