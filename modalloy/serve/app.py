"""The application: routes, and what happens between a request and its answer."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from modalloy import __version__, builtin
from modalloy.errors import nearest, plain
from modalloy.model.alone import Alone
from modalloy.serve import answers
from modalloy.serve.asking import Asked, read_chat, read_responses
from modalloy.serve.guard import Bodies, Guard
from modalloy.serve.merges import Merges
from modalloy.serve.metrics import Metrics
from modalloy.serve.queue import Running, Served
from modalloy.serve.refusal import RefusalError, bug, refusal_of

ASSETS = Path(__file__).with_name("assets")  # the page at /
CLIENT_GONE = 499  # in metrics: nobody reads such an answer
SEND_SECONDS = 60.0  # in which a client must take a piece of a stream
GRACE_SECONDS = 600.0  # that streams have to end in once the server stops

Whole = Callable[[Running], Awaitable[dict[str, Any]]]
Events = Callable[[Running], AsyncIterator[answers.Event]]


def application(
    served: Mapping[str, Served],
    metrics: Metrics,
    *,
    folders: Mapping[str, Path],
    keys: tuple[str, ...] = (),
    loopback: bool = True,
) -> Guard:
    """The server of these models.

    Args:
        served: by name, the first of them first.
        metrics: that the models count in.
        folders: what each model was loaded from, by its name.
        keys: any of them is asked for; empty: nobody is.
        loopback: it listens on this machine only, and answers to its names only.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for one in served.values():
            await asyncio.get_running_loop().run_in_executor(None, one.stop)

    app = FastAPI(title="modalloy", version=__version__, openapi_url=None, lifespan=lifespan)
    bodies, merges = Bodies(), Merges(folders)

    @app.exception_handler(RefusalError)
    async def refuse(_: Request, error: RefusalError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        status, what = error.status_code, str(error.detail).lower()
        if status == 404:  # by the page's files, which take every path that no route takes whole
            other = any(route.matches(request.scope)[0] is Match.PARTIAL for route in app.routes)
            status, what = (405, "method not allowed") if other else (404, "no such route")
        refusal = RefusalError(f"{request.method} {plain(request.url.path)}: {what}", status=status)
        return JSONResponse(refusal.body, status, error.headers)

    async def ask(request: Request, read: Callable[[bytes], Asked], whole: Whole, events: Events) -> Response:
        arrived = time.perf_counter()
        try:
            body = await bodies.read(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        place: Served | None = None
        running: Running | None = None
        handed_on = False
        try:
            asked = await run_in_threadpool(read, body)  # a large one would hold up the streams
            model = _chosen(served, asked.model)
            model.take_place()
            place = model
            running = await _unless_gone(request, model.ask(asked, arrived))
            if not asked.stream:
                return JSONResponse(await _unless_gone(request, whole(running)))
            handed_on = True
            return Stream(events(running), running, model)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            raise refusal_of(error) or bug(error) from error
        finally:
            bodies.free(len(body))
            if running is not None and not handed_on:
                running.answer.cancelled = True  # if it has not ended
            if place is not None and not handed_on:
                place.free_place()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await ask(request, read_chat, answers.completion, answers.chunks)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await ask(request, read_responses, answers.response, answers.response_events)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(one) for one in served.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(_chosen(served, name))

    @app.get("/modalloy/models/{name:path}/merge")
    def merge(name: str) -> dict[str, Any]:
        return merges.facts(_chosen(served, name).name)

    @app.get("/modalloy/models/{name:path}/inspection")
    async def inspection(request: Request, name: str) -> Response:
        try:
            return JSONResponse(await _unless_gone(request, merges.inspection(_chosen(served, name).name)))
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "models": list(served)}

    @app.get("/metrics")
    async def counters() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    app.mount("/samples", StaticFiles(directory=builtin.SAMPLES))
    app.mount("/", StaticFiles(directory=ASSETS, html=True))
    return Guard(app, keys=keys, loopback=loopback, count=metrics.requests.labels)


def _chosen(served: Mapping[str, Served], name: str) -> Served:
    if name not in served:
        raise RefusalError(
            f"no model '{plain(name)}'; {nearest(name, served)}", status=404, param="model", code="model_not_found"
        )
    return served[name]


def _model(one: Served) -> dict[str, Any]:
    return {
        "id": one.name,
        "object": "model",
        "created": one.created,
        "owned_by": "modalloy",
        "modalities": ["text", *one.chat.modalities],
        "context_length": one.chat.context,
        "batched": not isinstance(one.engine, Alone),
    }


async def _unless_gone(request: Request, work: Any) -> Any:
    """What work gives; cancelled, and ClientDisconnect, if the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(EventSourceResponse):
    """An answer as it grows. Its place is freed when it ends, or its client goes away or takes no more of it."""

    def __init__(self, events: AsyncIterator[answers.Event], running: Running, model: Served) -> None:
        super().__init__(events, shutdown_grace_period=GRACE_SECONDS, send_timeout=SEND_SECONDS, sep="\n")
        self.running, self.model = running, model

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            with suppress(SendTimeoutError):
                await super().__call__(scope, receive, send)
        finally:
            self.running.answer.cancelled = True
            self.model.free_place()
