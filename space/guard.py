"""What stands between the network and the page: bounded uploads, and a browser that fetches nothing from elsewhere."""

from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The page's own scripts and styles are partly inline; whatever else a library may ask for, the browser refuses.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)


class Guard:
    """ASGI middleware.

    Args:
        app: what it protects.
        max_bytes: of one request, told by its header before a byte of the body is read.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request that is too large or hides its size; add the policy to every response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_with_policy)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        if scope["method"] != "POST":
            return None
        headers = dict(scope["headers"])
        length = headers.get(b"content-length")
        if length is None and b"transfer-encoding" in headers:
            return PlainTextResponse("Say how large the request is.", HTTPStatus.LENGTH_REQUIRED)
        if length is not None and int(length) > self.max_bytes:
            limit = f"{self.max_bytes // 2**20} MB"
            return PlainTextResponse(
                f"The upload exceeds the maximum allowed size of {limit}. Send fewer or smaller files.",
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )
        return None
