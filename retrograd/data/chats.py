"""Chats as tokens, and which of them the assistant says.

A chat template writes messages as one text. With r(·) that text and g(·) the same with the generation prompt behind it,
the assistant's message i is

    r(m)[|g(m_0 … m_{i-1})| : |r(m_0 … m_i)|]

where the template's writing is one that grows: g(m_0 … m_{i-1}) begins r(m_0 … m_i), which begins r(m). That is
tried on every message. A template that marks what the assistant says ({% generation %}) is believed instead. White
space behind the token that ends a turn is the template's. What cannot be told is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from retrograd.data.tokens import common_start, located

__all__ = ["Chat", "as_messages", "read_chats"]

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
_KNOWN = (*_ROLES, "user", "assistant", "system", "tool")
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

_Span = tuple[int, int]  # characters, from and to


class Chat(NamedTuple):
    """A document that is a chat.

    Args:
        prompt: The first messages, which are no targets.
        tools: As the template takes them; None for none.
    """

    document: int
    messages: list[dict[str, Any]]
    prompt: int = 0
    tools: list[Any] | None = None


def as_messages(value: Any, document: int) -> list[dict[str, Any]]:
    """The messages of a chat, by `role` and `content`; ShareGPT's keys `from` and `value` are read as those.

    >>> as_messages([{"from": "human", "value": "Hello"}], 0)
    [{'role': 'user', 'content': 'Hello'}]
    """
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(
            f"document {document} is {type(value).__name__} {str(value)[:60]!r}, not a list of messages such as "
            '{"role": "user", "content": "…"}'
        )
    return [_message(message, document, place) for place, message in enumerate(value)]


def _message(message: dict[str, Any], document: int, place: int) -> dict[str, Any]:
    given = {name: _without_none(value) for name, value in message.items() if value is not None}
    if "role" in given or "from" not in given:
        return given
    role = given.pop("from")
    if role not in _KNOWN:
        raise ValueError(
            f"document {document}, message {place} is from {role!r}, which is none of {', '.join(_KNOWN)}: rename it, "
            "or write the messages with role and content"
        )
    return {"role": _ROLES.get(role, role), "content": given.pop("value", ""), **given}


def _without_none(value: Any) -> Any:
    """A key that a column has only because another row has it is no key."""
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def tools_of(value: Any, document: int) -> list[Any] | None:
    """Tools of a chat: JSON schemas, or one text of JSON that holds them."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"document {document}: tools are a text that is not JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"document {document}: tools are {str(value)[:60]!r}, not a list of JSON schemas")
    return _without_none(value)


def read_chats(tokenizer: Any, chats: Sequence[Chat], assistant_only: bool) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens of each chat, and whether each is a target, by its document.

    Args:
        assistant_only: Of what is no prompt, only what the assistant says is.
    Raises:
        ValueError: If the template refuses a chat, or what is a target cannot be told, with the document.
    """
    texts = [_written(tokenizer, chat, chat.messages) for chat in chats]
    for chat, text in zip(chats, texts):
        if chat.tools and text == _written(tokenizer, chat._replace(tools=None), chat.messages):
            raise ValueError(
                f"document {chat.document} has tools, and the chat template writes none: take the tokenizer of a model "
                "that uses tools, or leave the column out"
            )
    spans = [_spans(tokenizer, chat, text, assistant_only) for chat, text in zip(chats, texts)]
    return located(tokenizer, texts, spans)


def _spans(tokenizer: Any, chat: Chat, text: str, assistant_only: bool) -> list[_Span]:
    """Characters that are targets."""
    start = 0
    if chat.prompt:
        answers = chat.messages[chat.prompt].get("role") == "assistant"
        before = _written(tokenizer, chat, chat.messages[: chat.prompt], add_generation_prompt=answers)
        start = _begins(chat, before, text, "its prompt")
    if not assistant_only:
        return [(start, len(text))]
    template = tokenizer.get_chat_template(tools=chat.tools)
    spans = _marked(tokenizer, chat, text, template) if _MARKED.search(template) else _tried(tokenizer, chat, text)
    return [(max(first, start), end) for first, end in spans if end > start]


def _marked(tokenizer: Any, chat: Chat, text: str, template: str) -> list[_Span]:
    """By the template's own marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # annotated as a text
    (rendered,), (spans,) = render(
        conversations=[chat.messages], tools=chat.tools, chat_template=template, return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )  # fmt: skip
    spoken = any(message.get("role") == "assistant" for message in chat.messages)
    if rendered != text or bool(spans) != spoken:
        raise ValueError(
            f"document {chat.document}: the chat template marks {len(spans)} passages as generated, and the chat has "
            f"{'an' if spoken else 'no'} assistant: correct the template's generation marks"
        )
    return list(spans)


def _tried(tokenizer: Any, chat: Chat, text: str) -> list[_Span]:
    """By trial of prefixes."""
    ends = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    spans = []
    for place, message in enumerate(chat.messages):
        if message.get("role") != "assistant":
            continue
        earlier = chat.messages[:place]
        before = _written(tokenizer, chat, earlier, add_generation_prompt=True) if earlier else ""
        after = _written(tokenizer, chat, chat.messages[: place + 1])
        _begins(chat, after, text, f"message {place}")
        start = _begins(chat, before, after, f"message {place}")
        if not earlier or before == _written(tokenizer, chat, earlier):
            _check_no_header(chat, message, place, after[start:])
        said = after.rstrip()
        spans.append((start, len(said) if any(said.endswith(token) for token in ends if token) else len(after)))
    return spans


def _check_no_header(chat: Chat, message: dict[str, Any], place: int, turn: str) -> None:
    """Without a generation prompt, what the template writes before an answer would count as the assistant's."""
    content = message.get("content")
    if not isinstance(content, str) or not turn.lstrip().startswith(content.strip()):
        raise ValueError(
            f"document {chat.document}, message {place}: the chat template has no generation prompt, and writes "
            f"{turn[:40]!r} for {str(content)[:40]!r}: what of it the assistant says cannot be told. Give the template "
            "{% generation %} marks or a generation prompt, or train on whole chats without assistant_only_loss"
        )


def _begins(chat: Chat, part: str, whole: str, what: str) -> int:
    """Length of a text that has to begin another."""
    if not whole.startswith(part):
        same = common_start(part, whole)
        raise ValueError(
            f"document {chat.document}: the chat template writes the messages up to {what} otherwise when more follow "
            f"(from character {same}: {part[same : same + 30]!r}, not {whole[same : same + 30]!r}), so where it begins "
            "cannot be told. Give the template {% generation %} marks, or give prompt and completion as texts"
        )
    return len(part)


def _written(tokenizer: Any, chat: Chat, messages: list[dict[str, Any]], **options: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False, **options)
    except Exception as error:  # templates raise what they like
        some = "it" if len(messages) == len(chat.messages) else f"its first {len(messages)} messages"
        raise ValueError(f"document {chat.document}: the chat template refuses {some}: {error}") from error
    return text
