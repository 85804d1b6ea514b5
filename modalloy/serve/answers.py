"""Answers in the shapes of OpenAI's chat completions and responses, with what only modalloy can say beside them."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from itertools import groupby
from typing import Any

from modalloy.model.answering import TokenLogprob
from modalloy.serve.queue import Piece, Running
from modalloy.serve.refusal import RefusalError, bug, refusal_of

DONE = "[DONE]"
Event = dict[str, str]  # of a stream: its data, and perhaps its name


def facts(running: Running) -> dict[str, Any]:
    """What only modalloy can say.

    `owners`: [modality, start, length] of the prompt's tokens, in order; `weights`: the update that tokens of each modality
    use, `text` where a modality has none of its own.
    """
    chat = running.answer.chat
    owners: list[tuple[str, int, int]] = []
    at = 0
    for index, run in groupby(running.prompt.owners):
        length = len(list(run))
        owners.append((chat.processor.owners[index], at, length))
        at += length
    sizes = chat.processor.modalities
    return {
        "owners": owners,
        "weights": {name: name if sizes.get(name, {}).get("update") else "text" for name, _, _ in owners},
        "time_to_first_token_s": running.first_s,
        "tokens_per_s": running.tokens_per_s,
        "reused_tokens": running.reused,
    }


def tokens_by_modality(running: Running) -> dict[str, int]:
    """Tokens of the prompt by modality, those of several senses of one together."""
    processor = running.answer.chat.processor
    counts: dict[str, int] = {}
    for index, name in enumerate(processor.owners):
        if count := running.prompt.owners.count(index):
            modality = processor.modality_of(name) if index else name
            counts[modality] = counts.get(modality, 0) + count
    return counts


def usage(running: Running) -> dict[str, Any]:
    """Counts of tokens, as chat completions name them."""
    given, made = len(running.prompt.ids), running.answer.new_tokens
    details = {f"{name}_tokens": count for name, count in tokens_by_modality(running).items()}
    return {
        "prompt_tokens": given,
        "completion_tokens": made,
        "total_tokens": given + made,
        "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": running.reused} | details,
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def logprobs(figures: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log-likelihoods of tokens, as chat completions have them."""

    def shown(text: str, logprob: float) -> dict[str, Any]:
        whole = "\ufffd" not in text  # else its bytes are not those of the text
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode()) if whole else None}

    return {
        "content": [
            shown(one.text, one.logprob) | {"top_logprobs": [shown(text, nats) for text, nats in one.top]}
            for one in figures
        ],
        "refusal": None,
    }


async def collected(running: Running) -> list[TokenLogprob]:
    """Waits for the whole answer; the figures of its tokens."""
    return [figure async for piece in running.pieces() for figure in piece.figures]


async def completion(running: Running) -> dict[str, Any]:
    """A chat completion."""
    figures = await collected(running)
    told = running.answer.sampling.top_logprobs is not None
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": running.answer.answer, "refusal": None},
        "logprobs": logprobs(figures) if told else None,
        "finish_reason": running.answer.finished,
    }
    return _completion(running, "chat.completion") | {
        "choices": [choice],
        "usage": usage(running),
        "modalloy": facts(running),
    }


def _completion(running: Running, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": running.asked.model,
    }


async def chunks(running: Running) -> AsyncIterator[Event]:
    """A chat completion as a stream. The last chunk with a choice has `modalloy`, and the one after it `usage`, if asked for."""
    head = _completion(running, "chat.completion.chunk")
    told = running.answer.sampling.top_logprobs is not None
    more = {"usage": None} if running.asked.include_usage else {}

    def chunk(delta: dict[str, Any], piece: Piece | None = None, why: str | None = None) -> Event:
        figures = logprobs(piece.figures) if told and piece is not None else None
        choice = {"index": 0, "delta": delta, "logprobs": figures, "finish_reason": why}
        extra = {"modalloy": facts(running)} if why else {}
        return {"data": json.dumps(head | {"choices": [choice]} | more | extra)}

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for piece in running.pieces():
            yield chunk({"content": piece.text}, piece)
        yield chunk({}, None, running.answer.finished)
        if running.asked.include_usage:
            yield {"data": json.dumps(head | {"choices": [], "usage": usage(running), "modalloy": facts(running)})}
    except Exception as error:
        yield {"data": json.dumps((refusal_of(error) or bug(error)).body)}
    yield {"data": DONE}


def _response(running: Running, ids: tuple[str, str], status: str, created: int) -> dict[str, Any]:
    """A response of the Responses API: its answer once it is completed or incomplete, else none."""
    asked, answer = running.asked, running.answer
    over = status in ("completed", "incomplete")
    given, made = len(running.prompt.ids), answer.new_tokens
    details = {f"{name}_tokens": count for name, count in tokens_by_modality(running).items()}
    counts = {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": running.reused} | details,
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": given + made,
    }
    return {
        "id": ids[0],
        "object": "response",
        "created_at": created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": asked.model,
        "output": [_item(ids[1], answer.answer, status)] if over else [],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "truncation": "disabled",
        "usage": counts if over else None,
        **asked.echoed,
        **({"modalloy": facts(running)} if over else {}),
    }


def _item(name: str, text: str | None, status: str) -> dict[str, Any]:
    content = [] if text is None else [_part(text)]
    return {"id": name, "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _ids() -> tuple[str, str]:
    return f"resp_{secrets.token_hex(16)}", f"msg_{secrets.token_hex(16)}"


def _status(running: Running) -> str:
    return "incomplete" if running.answer.finished == "length" else "completed"


async def response(running: Running) -> dict[str, Any]:
    """A response of the Responses API."""
    created = int(time.time())
    await collected(running)
    return _response(running, _ids(), _status(running), created)


async def response_events(running: Running) -> AsyncIterator[Event]:
    """A response as a stream of the Responses API's events."""
    ids, created, number = _ids(), int(time.time()), -1
    place = {"item_id": ids[1], "output_index": 0, "content_index": 0}

    def event(kind: str, **content: Any) -> Event:
        nonlocal number
        number += 1
        return {"event": kind, "data": json.dumps({"type": kind, "sequence_number": number} | content)}

    try:
        for kind in ("response.created", "response.in_progress"):
            yield event(kind, response=_response(running, ids, "in_progress", created))
        yield event("response.output_item.added", output_index=0, item=_item(ids[1], None, "in_progress"))
        yield event("response.content_part.added", **place, part=_part(""))
        async for piece in running.pieces():
            yield event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
        text, status = running.answer.answer, _status(running)
        yield event("response.output_text.done", **place, text=text, logprobs=[])
        yield event("response.content_part.done", **place, part=_part(text))
        yield event("response.output_item.done", output_index=0, item=_item(ids[1], text, status))
        yield event(f"response.{status}", response=_response(running, ids, status, created))
    except Exception as error:
        refusal: RefusalError = refusal_of(error) or bug(error)
        yield event("error", code=refusal.code, message=str(refusal), param=refusal.param)
