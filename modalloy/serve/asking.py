"""What clients ask: OpenAI's requests, checked, as conversations of modalloy's."""

import base64
import binascii
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modalloy.errors import plain
from modalloy.model.answering import Sampling
from modalloy.model.rendering import Message
from modalloy.names import modality_name
from modalloy.report.text import is_unicode
from modalloy.serve.refusal import RefusalError

MAX_MEDIA = 32  # of one request
MAX_TURNS = 1000
DEFAULT_TOKENS = 1024  # of an answer, where neither the client nor the model's context says fewer
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
ROLES = {"developer": "system"}

Count = Annotated[int, Field(ge=1, le=10**9)]


@dataclass(frozen=True)
class Medium:
    """A medium of a request: its bytes, or the address to fetch them from. `label` says where in the request it stands."""

    label: str
    data: bytes | None = None
    url: str | None = None


@dataclass
class Asked:
    """A request that makes sense. Media are `Medium` objects under the `path` of content parts."""

    model: str
    turns: list[Message]
    sampling: Sampling
    max_tokens: int | None
    stream: bool = False
    include_usage: bool = False
    media: list[Medium] = field(default_factory=list)
    echoed: dict[str, Any] = field(default_factory=dict)  # settings that an answer repeats


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None


class _Turn(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: Any = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class _Chat(_Shape):
    messages: Annotated[list[_Turn], Field(min_length=1, max_length=MAX_TURNS)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream_options: _StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    n: int | None = None
    ignore_eos: bool | None = None  # vLLM's


class _Item(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["message"] | None = None
    role: str
    content: str | list[dict[str, Any]]


class _Responses(_Shape):
    input: str | Annotated[list[_Item], Field(min_length=1, max_length=MAX_TURNS)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    metadata: dict[str, str] | None = None


def read_chat(body: bytes) -> Asked:
    """A request to /v1/chat/completions.

    Raises:
        RefusalError: it is no such request, or asks for what is not offered.
    """
    raw, given = _read(_Chat, body)
    _refuse_unoffered(raw)
    if given.n not in (None, 1):
        raise RefusalError(f"n is {given.n}; one answer is made for each request: leave n out", param="n")
    if None not in (given.max_tokens, given.max_completion_tokens) and given.max_tokens != given.max_completion_tokens:
        raise RefusalError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    if given.top_logprobs is not None and not given.logprobs:
        raise RefusalError("top_logprobs needs logprobs: true", param="top_logprobs")
    most = given.max_completion_tokens or given.max_tokens
    asked = _asked(given, most, (given.top_logprobs or 0) if given.logprobs else None, given.seed, _stops(given.stop))
    asked.sampling = replace(asked.sampling, ignore_ends=bool(given.ignore_eos))
    asked.include_usage = bool(given.stream_options and given.stream_options.include_usage)
    for index, turn in enumerate(given.messages):
        if turn.tool_calls:
            raise RefusalError("tools are not offered; leave tool_calls out", param=f"messages[{index}].tool_calls")
        _take_turn(asked, turn.role, turn.content or "", f"messages[{index}]")
    return asked


def read_responses(body: bytes) -> Asked:
    """A request to /v1/responses.

    Raises:
        RefusalError: it is no such request, or asks for what is not offered.
    """
    raw, given = _read(_Responses, body)
    text = raw.pop("text", None)
    _refuse_unoffered(raw | ({"response_format": text.get("format")} if isinstance(text, dict) else {}))
    for name in ("previous_response_id", "conversation", "prompt"):
        if raw.get(name):
            raise RefusalError(f"{name}: answers are not stored here; send the whole conversation as input", param=name)
    if raw.get("background"):
        raise RefusalError("background answers are not offered; leave background out", param="background")
    asked = _asked(given, given.max_output_tokens, None, None, ())
    asked.echoed = {
        "instructions": given.instructions,
        "metadata": given.metadata or {},
        "max_output_tokens": given.max_output_tokens,
        "temperature": given.temperature or 0.0,
        "top_p": given.top_p or 1.0,
    }
    if given.instructions:
        _take_turn(asked, "system", given.instructions, "instructions")
    if isinstance(given.input, str):
        _take_turn(asked, "user", given.input, "input")
    else:
        for index, item in enumerate(given.input):
            _take_turn(asked, item.role, item.content, f"input[{index}]")
    return asked


def _read(shape: type[Any], body: bytes) -> tuple[dict[str, Any], Any]:
    """The request as JSON's types, and as the shape says; its unknown fields are ignored."""
    from pydantic_core import from_json

    try:
        raw = from_json(body, allow_inf_nan=False)
        given = shape.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in first["loc"]).lstrip(".")
        param = plain(place) or None
        raise RefusalError(f"{param or 'body'}: {plain(first['msg'])}; correct the request", param=param) from error
    except ValueError as error:
        raise RefusalError(f"the body is no JSON ({plain(error)}); send a JSON object") from error
    assert isinstance(raw, dict)
    return raw, given


def _refuse_unoffered(raw: dict[str, Any]) -> None:
    """What would change the answer, and is not done here, is refused rather than ignored."""
    form = raw.get("response_format")
    if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
        raise RefusalError("response_format: answers are plain text; leave it out", param="response_format")
    for name in ("tools", "functions", "logit_bias"):
        if raw.get(name):
            raise RefusalError(f"{name}: not offered; leave it out", param=name)
    for name in ("presence_penalty", "frequency_penalty"):
        if raw.get(name):
            raise RefusalError(f"{name}: only 0 is offered; leave it out", param=name)
    if raw.get("audio") or raw.get("modalities") not in (None, ["text"]):
        raise RefusalError("modalities: answers are text; leave modalities and audio out", param="modalities")


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > 16 or any(not 0 < len(one) <= 500 for one in stops):
        raise RefusalError("stop: give at most 16 texts of 1 to 500 characters", param="stop")
    return stops


def _asked(given: Any, most: int | None, top: int | None, seed: int | None, stop: tuple[str, ...]) -> Asked:
    sampling = Sampling(
        temperature=given.temperature or 0.0,
        top_p=1.0 if given.top_p is None else given.top_p,
        seed=seed,
        stop=stop,
        top_logprobs=top,
    )
    return Asked(given.model, [], sampling, most, stream=bool(given.stream))


def _take_turn(asked: Asked, role: str, content: str | list[dict[str, Any]], where: str) -> None:
    """Add a message to the conversation, and its media to the request's."""
    role = ROLES.get(role, role)
    if role not in ("system", "user", "assistant"):
        raise RefusalError(
            f"{where}.role: '{plain(role)}' is none of system, developer, user, assistant", param=f"{where}.role"
        )
    if isinstance(content, str):
        asked.turns.append({"role": role, "content": _text(content, where)})
        return
    parts = [_part(asked, part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    if role != "user" and any(part["type"] != "text" for part in parts):
        raise RefusalError(f"{where}: only a user's message can hold media", param=where)
    asked.turns.append({"role": role, "content": parts})


def _part(asked: Asked, part: dict[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if not isinstance(kind, str):
        raise RefusalError(f"{where}: has no type; give for example {{'type': 'text', 'text': …}}", param=where)
    if kind in TEXTS:
        return {"type": "text", "text": _text(part.get(TEXTS[kind]), f"{where}.{TEXTS[kind]}")}
    modality, medium = _medium(part, kind, where)
    asked.media.append(medium)
    if len(asked.media) > MAX_MEDIA:
        raise RefusalError(f"the request shows more than {MAX_MEDIA} media; show fewer", param=where)
    return {"type": modality, "path": medium}


def _medium(part: dict[str, Any], kind: str, where: str) -> tuple[str, Medium]:
    """The modality of a part, and its medium: `input_audio` has base64, `X_url` and `input_X` an address of modality X."""
    if kind == "input_audio":
        sound = part.get("input_audio")
        if not isinstance(sound, dict) or not isinstance(sound.get("data"), str):
            raise RefusalError(f"{where}: give {{'input_audio': {{'data': BASE64, 'format': 'wav'}}}}", param=where)
        return "audio", Medium(where, data=_from_base64(sound["data"], where))
    name, field_name = kind.removesuffix("_url"), kind
    if kind.startswith("input_"):
        name = kind.removeprefix("input_")
        field_name = f"{name}_url"
    if field_name not in (kind, f"{name}_url") or not (kind.endswith("_url") or kind.startswith("input_")):
        raise RefusalError(
            f"{where}.type: '{plain(kind)}' is no kind of content; known: text, image_url, input_audio, audio_url, "
            "video_url, point_cloud_url, or NAME_url of another modality that the model takes",
            param=f"{where}.type",
        )
    given = part.get(field_name)
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str):
        raise RefusalError(f"{where}: give {{'{plain(field_name)}': {{'url': 'data:…;base64,…'}}}}", param=where)
    return modality_name(name), from_url(url, where)


def from_url(url: str, where: str) -> Medium:
    """The medium of a data: URL, or one to fetch. No other scheme than data and https is known."""
    head, comma, payload = url.partition(",")
    if head[:5].lower() == "data:":
        if not comma or not head.lower().endswith(";base64"):
            raise RefusalError(f"{where}: the data: URL is not in base64; write data:TYPE;base64,…", param=where)
        return Medium(where, data=_from_base64(payload, where))
    if url[:8].lower() == "https://":
        return Medium(where, url=url)
    raise RefusalError(
        f"{where}: '{plain(url[:60])}' is no data: URL; send the medium itself as data:TYPE;base64,…", param=where
    )


def _from_base64(text: str, where: str) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise RefusalError(
            f"{where}: the medium is not in base64 ({plain(error)}); encode it again", param=where
        ) from error
    if not data:
        raise RefusalError(f"{where}: the medium is empty; send its bytes", param=where)
    return data


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RefusalError(f"{where}: is no text; give a string", param=where)
    if not is_unicode(text):
        raise RefusalError(f"{where}: holds half a surrogate pair, which is no character; leave it out", param=where)
    return text
