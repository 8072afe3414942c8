"""Rows of the common instruction formats as messages: Alpaca, ShareGPT, messages.

Each function takes a row and its place ("file.jsonl:17") and gives
[{"role": "system" | "user" | "assistant" | "tool", "content": str}], with "loss_weight" on
assistant messages that carry one. Whatever it does not understand is a RowError naming the place
and the field: an unknown field would otherwise be a turn that training never sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from research.data.rows import Row, RowError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
TOOLS = "You have access to these tools:\n"


def alpaca(row: Row, place: str = "row") -> list[Message]:
    """{instruction, input, output} (also system and history as LlamaFactory has them).

    A non-empty input follows the instruction after a blank line.
    """
    _check_fields(row, place, ("instruction", "output"), ("input", "system", "history"))
    instruction, output = _text(row, "instruction", place), _text(row, "output", place)
    extra = _text(row, "input", place, default="")
    messages = _system(_text(row, "system", place, default=""))
    for turn in row.get("history") or []:
        if not (isinstance(turn, list | tuple) and len(turn) == 2):
            raise RowError(f"{place}: field 'history' must hold pairs [prompt, answer]")
        messages += [_message("user", turn[0]), _message("assistant", turn[1])]
    prompt = f"{instruction}\n\n{extra}" if extra else instruction
    return [*messages, _message("user", prompt), _message("assistant", output)]


def sharegpt(row: Row, place: str = "row") -> list[Message]:
    """{conversations: [{from, value}], system?, tools?}.

    A function call is an assistant turn, an observation a tool turn. `tools` (JSON text, or a list)
    is told to the model in the system message.
    """
    _check_fields(row, place, ("conversations",), ("system", "tools"))
    system, tools = _text(row, "system", place, default=""), row.get("tools") or ""
    if not isinstance(tools, str):
        tools = json.dumps(tools, ensure_ascii=False)
    if tools.strip() not in ("", "[]"):
        system = "\n\n".join(part for part in (system, TOOLS + tools) if part)
    messages = _system(system)
    for index, turn in enumerate(_turns(row, "conversations", place)):
        where = f"{place}: conversations[{index}]"
        _check_fields(turn, where, ("from", "value"))
        role = turn["from"]
        if role not in SHAREGPT_ROLES:
            raise RowError(f"{where}: unknown role {role!r}; expected {sorted(SHAREGPT_ROLES)}")
        messages.append(_message(SHAREGPT_ROLES[role], _text(turn, "value", where)))
    return messages


def messages(row: Row, place: str = "row") -> list[Message]:
    """{messages: [{role, content, loss_weight?}]}; content is text or a list of text parts.

    `loss_weight` scales the loss of an assistant message (0 leaves it out); on another role it
    must be 0, for those are never trained on.
    """
    _check_fields(row, place, ("messages",))
    result = []
    for index, turn in enumerate(_turns(row, "messages", place)):
        where = f"{place}: messages[{index}]"
        _check_fields(turn, where, ("role", "content"), ("loss_weight",))
        if turn["role"] not in ROLES:
            raise RowError(f"{where}: unknown role {turn['role']!r}; expected {list(ROLES)}")
        message = _message(turn["role"], _content(turn, where))
        weight = _loss_weight(turn, where)
        if weight is not None and message["role"] == "assistant":
            message["loss_weight"] = weight
        result.append(message)
    return result


FORMATS: dict[str, Callable[[Row, str], list[Message]]] = {
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "messages": messages,
}


def detect(row: Row, place: str = "row") -> Callable[[Row, str], list[Message]]:
    """The format whose key field the row has; RowError when there is none."""
    keys = {"instruction": alpaca, "conversations": sharegpt, "messages": messages}
    for key, convert in keys.items():
        if row.get(key) is not None:
            return convert
    raise RowError(f"{place}: no known format; expected a field of {list(keys)}, got {sorted(row)}")


def conversations(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, list[Message]]]:
    """(place, messages) of every (place, row), whichever of the formats it is in."""
    for place, row in rows:
        yield place, detect(row, place)(row, place)


def _check_fields(row: Any, place: str, required: tuple, optional: tuple = ()) -> None:
    if not isinstance(row, dict):
        raise RowError(f"{place}: expected an object, got {type(row).__name__}")
    for field in required:
        if row.get(field) is None:
            raise RowError(f"{place}: lacks field {field!r}; it has {sorted(row)}")
    unknown = [f for f, value in row.items() if value is not None and f not in required + optional]
    if unknown:
        expected = list(required + optional)
        raise RowError(f"{place}: unknown field {unknown[0]!r}; expected {expected}")


def _text(row: Row, field: str, place: str, default: str | None = None) -> str:
    value = row.get(field)
    value = default if value is None else value
    if not isinstance(value, str):
        raise RowError(f"{place}: field {field!r} must be text, got {type(value).__name__}")
    return value


def _turns(row: Row, field: str, place: str) -> list:
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{place}: field {field!r} must be a list of at least one turn")
    return turns


def _content(turn: Row, place: str) -> str:
    content = turn["content"]
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise RowError(f"{place}: field 'content' holds a part that is not text: {part!r}")
        return "".join(part.get("text") or part.get("value") or "" for part in content)
    return _text(turn, "content", place)


def _loss_weight(turn: Row, place: str) -> float | None:
    weight = turn.get("loss_weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise RowError(f"{place}: field 'loss_weight' must be a number >= 0, got {weight!r}")
    if turn["role"] != "assistant" and weight != 0:
        raise RowError(f"{place}: field 'loss_weight' is {weight} on role {turn['role']!r}")
    return float(weight)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _system(content: str) -> list[Message]:
    return [_message("system", content)] if content else []
