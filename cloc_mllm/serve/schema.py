"""The fields of a chat completion request that mean something here, and their types.

Clients send many other fields, which are ignored. Fields that would change the answer but are not
implemented are refused, unless their value asks for nothing.
"""

from __future__ import annotations

import codecs
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)

from cloc_mllm.serve.errors import ApiError
from cloc_mllm.serve.limits import Limits

# each with the values that ask for nothing; null is such a value for all
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


def _text_as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _one_as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _whole(value: Any) -> Any:
    """Some clients write 16.0 for 16."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _address_as_object(image_url: Any) -> Any:
    return {"url": image_url} if isinstance(image_url, str) else image_url


# what the Responses API calls the same items
_PART_TYPES = {"input_text": "text", "output_text": "text", "input_image": "image_url"}


def _part_type(name: Any) -> Any:
    return _PART_TYPES.get(name, name) if isinstance(name, str) else name


_StopWords = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_NumTokens = Annotated[int, BeforeValidator(_whole), Field(ge=1)]


def _seed_in_bounds(seed: int) -> int:
    """Takes what a random generator takes; `Field(le=...)` writes such bounds rounded."""
    least, most = -(2**63), 2**64 - 1
    if seed < least:
        raise ValueError(f"expected a seed greater than or equal to {least}")
    if seed > most:
        raise ValueError(f"expected a seed less than or equal to {most}")
    return seed


_Seed = Annotated[int, BeforeValidator(_whole), AfterValidator(_seed_in_bounds)]


class ImageUrl(_Fields):
    url: str


class Regions(_Fields):
    """Boxes of an image, xyxy in the stated unit, which is never guessed."""

    unit: Literal["pixels", "normalized"]
    boxes: Annotated[list[Annotated[list[_Number], Field(min_length=4, max_length=4)]], FailFast()]


class Part(_Fields):
    """A piece of a message: a text, or an image with the boxes that `<region>` stand for."""

    type: Annotated[Literal["text", "image_url"], BeforeValidator(_part_type)]
    text: str | None = None
    image_url: Annotated[ImageUrl | None, BeforeValidator(_address_as_object)] = None
    regions: Regions | None = None


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(min_length=1), FailFast(), BeforeValidator(_text_as_parts)]

    @model_validator(mode="before")
    @classmethod
    def _silent_assistant(cls, message: Any) -> Any:
        """An assistant that only called tools said nothing: its content is null, or not there."""
        is_silent = isinstance(message, dict) and message.get("content") is None
        return (
            {**message, "content": ""}
            if is_silent and message.get("role") == "assistant"
            else message
        )


class StreamOptions(_Fields):
    include_usage: bool | None = None


class CompletionRequest(_Fields):
    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _NumTokens | None = None
    max_completion_tokens: _NumTokens | None = None
    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(ge=0, le=1)] | None = None
    n: Literal[1] | None = None
    seed: _Seed | None = None
    stop: Annotated[_StopWords | None, BeforeValidator(_one_as_list)] = None


def parse_body(body: bytes | bytearray, limits: Limits) -> CompletionRequest:
    """Reads a request from JSON and checks the types of its fields.

    Python objects take up to fifty times the space of their JSON, and parsing holds up all threads,
    so a body with more than the limits allow is refused before that: counting takes milliseconds.

    Raises:
        ApiError: 400 that names the first field that is wrong.
    """
    num_marks = sum(map(body.count, (b",", b"[", b"{")))
    _check_size("commas and opening brackets", num_marks, limits.marks, limits)
    _check_size("bytes beside its pictures", _num_text_bytes(body), limits.text_bytes, limits)
    if body.startswith(codecs.BOM_UTF8):
        body = body[len(codecs.BOM_UTF8) :]
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error
    for name, neutral in _UNSUPPORTED.items():
        value = (request.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            raise ApiError(
                400,
                f"{name} is not supported here, got {reprlib.repr(value)}; leave it out",
                param=name,
                code="unsupported_parameter",
            )
    return request


def _check_size(what: str, number: int, limit: int, limits: Limits) -> None:
    if number > limit:
        raise ApiError(
            400,
            f"the body has {number:,} {what}, the limit is {limit:,}; send at most "
            f"{limits.messages} messages, {limits.parts} parts, {limits.regions} regions and "
            f"{limits.text_chars:,} characters of text",
            code="request_too_large",
        )


def _num_text_bytes(body: bytes | bytearray) -> int:
    """Counts the bytes of a body without the base64 of its pictures.

    In base64 a sixteenth may be backslashes: of escaped slashes and of the ends of lines.
    """
    number, end = len(body), 0
    while (start := body.find(b";base64,", end)) >= 0:
        end = body.find(b'"', start)
        base64 = body[start : end if end >= 0 else len(body)]
        if base64.isascii() and base64.count(b"\\") <= len(base64) // 16:
            number -= len(base64)
        if end < 0:
            break
    return number


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['msg']}", code="invalid_json")
    param = _path(first["loc"])
    came = "" if first["type"] == "missing" else f", got {reprlib.repr(first['input'])}"
    return ApiError(400, f"{param or 'the body'}: {first['msg']}{came}", param=param or None)


def _path(places: Sequence[int | str]) -> str:
    """Writes a path: ("messages", 0, "content") is `messages[0].content`."""
    parts = [f"[{place}]" if isinstance(place, int) else f".{place}" for place in places]
    return "".join(parts).lstrip(".")
