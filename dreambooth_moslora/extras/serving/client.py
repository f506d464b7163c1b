"""The client of the service: a pipeline whose pictures are drawn elsewhere.

It needs neither Ray nor torch. It follows no redirects and ignores proxies of the environment, so
that prompt and token reach the named address only.
"""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import PIL.Image

from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.disk.run_folder import find_weights
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.generation.params import GenerationParams, Image, Recipe, Step, recipe_in
from dreambooth_moslora.values import parse_object

TOKEN_VARIABLE = "DREAMBOOTH_TOKEN"
"""The environment's name of the token, as a flag would show it in process lists."""
MAX_ANSWER_BYTES = 256 * 2**20
"""More is not read of an answer."""
POLL_SEC = 0.1
"""Seconds between two looks for a stop."""


class Service:
    """A service at `url`. Raises UserError when that is not an address."""

    def __init__(self, url: str, token: str | None = None, timeout_sec: float = 600.0) -> None:
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            self.kind = {"http": HTTPConnection, "https": HTTPSConnection}[parts.scheme]
            self.host = parts.hostname
            self.port = parts.port
            self.folder = parts.path.rstrip("/")
            # what HTTP could not send is found here
            (self.host or "").encode("idna")
            self.folder.encode("ascii")
        except (KeyError, ValueError):
            self.host = None
        if not self.host:
            raise UserError(
                f"--backend {url!s:.80} is not an address; write it like http://127.0.0.1:8000"
            )
        self.shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        if token and not (token.isascii() and token.isprintable()):
            raise UserError("--backend_token: a token has printable ASCII characters only")
        self.token = token
        self.timeout_sec = timeout_sec

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`. Raises UserError."""
        return self._object(self._ask("GET", path))

    def generate(self, order: dict[str, Any]) -> bytes:
        """A PNG. Raises UserError with the service's message, if it sends one."""
        return self._ask("POST", "/generate", json.dumps(order))

    def _ask(self, method: str, path: str, body: str | None = None) -> bytes:
        """The body of an answer. Raises UserError when there is none, and for an error's status."""
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"

        # http.client, as it follows no redirects and asks no proxy
        try:
            with closing(self.kind(self.host, self.port, timeout=self.timeout_sec)) as connection:
                connection.request(method, self.folder + path, body, headers)
                answer = connection.getresponse()
                status = answer.status
                data = answer.read(MAX_ANSWER_BYTES)
        except (OSError, HTTPException) as error:
            raise UserError(
                f"the backend {self.shown} cannot be reached ({one_line(error)}); "
                "start it, or use `app`, which draws by itself"
            ) from error
        if status == 200:
            return data

        # the service says why in one line of JSON
        try:
            reason = one_line(self._object(data)["error"])
        except (UserError, KeyError):
            reason = f"HTTP status {status}"
        raise UserError(f"the backend {self.shown} answers: {reason}")

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            return parse_object(data)
        except UserError as error:
            raise UserError(
                f"{self.shown} is not a service of `dreambooth_moslora serve`"
            ) from error


class RemotePipeline:
    """What the page uses of SubjectPipeline. The service must have the same adapter files under the
    same names."""

    has_gpu = False

    def __init__(self, service: Service, base_name: str) -> None:
        """Raises UserError when the service cannot be reached, or draws with another base."""
        self.service = service
        facts = service.get("/healthz")
        self.base_name = str(facts.get("base"))
        self.resolution_px = facts.get("resolution_px") or 0
        if type(self.resolution_px) is not int:
            raise UserError(f"{service.shown} is not a service of `dreambooth_moslora serve`")
        if self.base_name != base_name:
            raise UserError(
                f"the backend draws with {self.base_name:.60}, the page with {base_name}: "
                "name one base"
            )
        self._files: dict[str, tuple[tuple, str]] = {}  # name -> stamp and digest
        self._lock = threading.Lock()

    def rest(self) -> None:
        """Does nothing: the client holds no memory to free."""

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Note the digest of the file `name`. Raises UserError when the service has no adapter of
        that name."""
        from dreambooth_moslora.lora.lora_file import adapter_name

        # the digest is computed again when the file has changed
        file = find_weights(path)
        name = name or adapter_name(file)
        facts = file.stat()
        stamp = (file.resolve(), facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size)
        with self._lock:
            if self._files.get(name, ((), ""))[0] != stamp:
                self._files[name] = stamp, file_digest(file)

        names = self.service.get("/adapters").get("adapters")
        if not isinstance(names, list) or name not in names:
            raise UserError(
                f"the backend has no adapter {name!r:.60}; "
                "put its file into a folder of its --adapters"
            )
        return name

    def generate(
        self, params: GenerationParams, should_stop: Callable[[], bool] | None = None
    ) -> Iterator[Step | Image]:
        """Request the pictures one by one; yield a Step and the Image for each. Raises
        UserError."""
        params = params.apply_tags()
        stopped = should_stop or bool
        started = time.monotonic()
        count = params.num_images
        for index in range(count):
            png = self._drawn(params.for_image(index), stopped)
            if png is None:
                return

            # a picture comes whole, so its last step is the first that is told
            each_sec = (time.monotonic() - started) / (index + 1)
            yield Step(
                index=index,
                num_images=count,
                step=params.steps,
                steps=params.steps,
                eta_sec=each_sec * (count - index - 1),
            )
            width_px = params.width_px or self.resolution_px
            height_px = params.height_px or self.resolution_px
            pixels, recipe = opened(png, (width_px, height_px))
            yield Image(
                index=index,
                pixels=pixels,
                params=recipe.params,
                provenance=recipe.provenance,
            )

    def _drawn(self, params: GenerationParams, stopped: Callable[[], bool]) -> bytes | None:
        """One PNG, or None when stopped; a running request is then abandoned."""
        known = {name: self._files[name][1] for name, _ in params.adapters}
        order = {key: value for key, value in params.to_dict().items() if value is not None}
        answer: Future[bytes] = Future()

        def ask() -> None:
            try:
                answer.set_result(self.service.generate(order | {"adapter_sha256": known}))
            except Exception as error:  # raised by the thread that waits
                answer.set_exception(error)

        # HTTP cannot be interrupted, so a thread waits for it, and this one looks for a stop
        threading.Thread(target=ask, name="ask-backend", daemon=True).start()
        while not stopped():
            with suppress(TimeoutError):
                return answer.result(timeout=POLL_SEC)
        return None


def opened(png: bytes, size_px: tuple[int, int]) -> tuple[PIL.Image.Image, Recipe]:
    """The picture and its recipe. Raises UserError for other bytes, and another size than `size_px`
    (width, height)."""
    try:
        with PIL.Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.size != size_px:
                raise UserError(
                    f"the backend's picture has {image.width} x {image.height} px, "
                    "which nobody asked for"
                )
            image.load()
            text = {key: value for key, value in image.info.items() if isinstance(value, str)}
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UserError("the backend's answer is not a picture") from error
    # nothing else that the backend sent travels with the pixels
    image.info.clear()
    return image, recipe_in(text, "the backend's picture")
