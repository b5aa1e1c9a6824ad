"""Rows as people have them: which format their columns are of, and the messages of a chat in one form.

Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from bilora_ray.config import CHAT_SETTINGS, TrialConfig, template_columns
from bilora_ray.errors import UserError, nearest
from bilora_ray.measures import TASK_FACTS
from bilora_ray.training.data.columns import check_characters, is_missing, plain, text_of, value_of
from bilora_ray.training.data.sources import Record

Message = Mapping[str, Any]

ASSISTANT = "assistant"
# The columns by which a format is found, in the order of the looking.
FOUND_BY = {"openai": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output")}
# So many of the first rows are looked at.
LOOKED_AT = 100
# The prompts of the Stanford Alpaca project, with an input and without.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
    "\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
# What labels say of answers, in files of preferences.
LIKED, DISLIKED = frozenset({"true", "1"}), frozenset({"false", "0"})
# What ShareGPT's files call who speaks. A function_call is the assistant's.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bard": ASSISTANT,
    "bing": ASSISTANT,
    "model": ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
    "system": "system",
}
# What messages call the thoughts before an answer.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# What the assistant says where nobody knows it yet.
STAND_IN = "Quodlibet."
TEXT_PARTS = ("text", "input_text", "output_text")


def in_format(config: TrialConfig, records: Collection[Record], *others: Collection[Record]) -> TrialConfig:
    """`config` with the format of the training `records`, if their columns have to be looked at for it.

    The `others` are those to validate on, if they are named.

    They are where neither a format nor templates nor messages are named, and the default templates name columns that
    are not there.

    Raises:
        UserError: rows of two answers, or settings of chats and rows that are none.
    """
    given, looks = config.format, config.messages_column is None and not config.has_templates
    if given is None and looks and TASK_FACTS[config.task].generates:
        config = config.model_copy(update={"format": _found(records)})
    if given is None and config.check_labels and TASK_FACTS[config.task].generates:
        for each in (records, *others):
            _check_liked(each, config)
    if config.chat_column is None:
        for key in CHAT_SETTINGS:
            if getattr(config, key) != TrialConfig.model_fields[key].default:
                raise UserError(f"{key}: only chats have it; name their column in messages_column")
    elif config.tools_column is not None and not any(config.tools_column in record.columns for record in records):
        value_of(next(iter(records)), config.tools_column)
    return config


def _found(records: Iterable[Record]) -> str | None:
    first = list(islice(records, LOOKED_AT))
    columns = {column for record in first for column in record.columns}
    if {"prompt", "completion"} <= columns:
        return None
    if {"chosen", "rejected"} <= columns:
        chat = isinstance(first[0].columns.get("chosen"), list)
        cure = "messages_column: chosen" if chat else 'completion_template: "{chosen}"'
        raise UserError(f"train_data: chosen and rejected make preferences; {cure} trains on what was chosen")
    return next((name for name, needed in FOUND_BY.items() if set(needed) <= columns), None)


def format_note(config: TrialConfig, found: str | None) -> Iterator[str]:
    """That a format was found by looking, and how."""
    if found is not None and config.format is None:
        yield f"format: {found}, for the rows have {' and '.join(FOUND_BY[found])}; another one can be named"


def _check_liked(records: Iterable[Record], config: TrialConfig) -> None:
    """UserError if a label that no template shows says that an answer is one not to learn, as in files of preferences.

    It does if it is false or, beside true or 1, 0; and if all labels are of these.
    """
    column, found = config.label_column, dict[str, str]()
    templates = () if config.chat_column is not None else (config.prompt_template, config.completion_template)
    if any(column in template_columns(template) for template in templates):
        return
    if not any(column in record.columns for record in islice(records, LOOKED_AT)):
        return  # without another pass
    for record in records:
        value = record.columns.get(column)
        if not is_missing(value) and value != "":
            found.setdefault(plain(str(value)), record.where)
        if not found.keys() <= LIKED | DISLIKED:
            return
    rejected = [label for label in found if label == "false" or (label in DISLIKED and found.keys() & LIKED)]
    if rejected:
        kept = config.format or ("completion" if config.chat_column is None else "openai")
        line = f"{column} {rejected[0]} marks an answer that was disliked, as in files of preferences"
        cure = f"leave such rows out, or learn them too with format: {kept}"
        raise UserError(f"{found[rejected[0]]}: {line}; {cure}")


def prompt_and_completion(record: Record, config: TrialConfig) -> Record:
    """The record with the columns of the templates, whatever its format."""
    if config.format != "alpaca":
        return record
    for column in ("history", "system"):
        if record.columns.get(column):
            raise UserError(f"{record.where}: format: alpaca writes no {column}; use templates that name it")
    values = {"instruction": text_of(record, "instruction"), "input": ""}
    if record.columns.get("input") not in (None, ""):
        values["input"] = text_of(record, "input")
    prompt = (ALPACA if values["input"].strip() else ALPACA_WITHOUT_INPUT).format(**values)
    return Record({"prompt": prompt, "completion": text_of(record, "output")}, record.where)


def messages_of(record: Record, config: TrialConfig) -> list[Message]:
    """The conversation up to the assistant's last turn that is learned: nothing after it is learned or read.

    Each message has a role and a content, both text, and what else it came with. `system_prompt` begins a conversation
    without a system turn.

    Raises:
        UserError: it is none, or the assistant answers nothing in it.
    """
    column = str(config.chat_column)
    messages = _from_json(value_of(record, column))
    if not isinstance(messages, list):
        raise UserError(f"{record.where}: column '{column}' must be a list of messages, not {type(messages).__name__}")
    found = [_message(message, f"{record.where}: message {n}") for n, message in enumerate(messages, start=1)]
    spoken = [number for number, message in enumerate(found) if message["role"] == ASSISTANT]
    if not spoken:
        raise UserError(f"{record.where}: no message has the role 'assistant'")
    if spoken[0] == 0:
        raise UserError(f"{record.where}: the first message is the assistant's; there is nothing it answers")
    learned = [number for number in spoken if is_learned(found[number])]
    if not learned:
        raise UserError(f"{record.where}: each message of the assistant has weight 0, so that none is learned")
    return [*_system(record, config, found[0]), *found[: learned[-1] + 1]]


def with_turn(record: Record, config: TrialConfig) -> Record:
    """The record of a chat, with a turn of the assistant at its end if it ends with another's: what is asked of it.

    What that turn says changes nothing of what comes before it.
    """
    column = str(config.chat_column)
    messages = _from_json(record.columns.get(column))
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict):
        return record  # who reads it says what is wrong
    speaker = last.get("role") or SPEAKERS.get(str(last.get("from")))
    if speaker == ASSISTANT:
        return record
    turn = {"role": ASSISTANT, "content": STAND_IN}
    return Record({**record.columns, column: [*messages, turn]}, record.where)


def _system(record: Record, config: TrialConfig, first: Message) -> Iterator[Message]:
    """The system turn that a conversation lacks: its record's own, where the format has such, or that of all."""
    own = text_of(record, "system") if config.format == "sharegpt" and record.columns.get("system") else None
    content = own or config.system_prompt
    if content is not None and first["role"] not in ("system", "developer"):
        yield {"role": "system", "content": content}


def is_learned(message: Message) -> bool:
    """Whether a turn of the assistant is to be learned: OpenAI's files have a weight of 0 at those that aren't."""
    return message.get("weight") != 0


def tools_of(record: Record, config: TrialConfig) -> list[Any] | None:
    """The tools of a chat, each as a function with a JSON schema; None if it has none. UserError if they are none."""
    column = config.tools_column
    if column is None and config.messages_column is None:
        column = "tools"  # the formats have it under this name
    value = None if column is None else _from_json(record.columns.get(column))
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(f"{record.where}: column '{column}' must be a list of tools, or such a list as JSON text")
    tools = [_without_gaps(tool) for tool in value]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _from_json(value: Any) -> Any:
    """What a text holds as JSON, for tables have no lists; else the value."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError:
        return value


def _without_gaps(value: Any) -> Any:
    """`value` without the keys that have none: Parquet and Arrow give each mapping the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_gaps(item) for key, item in value.items() if item is not None}
    return [_without_gaps(item) for item in value] if isinstance(value, list) else value


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{where} must have a role and a content, both text")
    if "role" not in message and "from" in message:
        message = _of_sharegpt(message, where)
    message = {key: value for key, value in message.items() if value is not None}
    call = message.pop("function_call", None)
    if call := message.get("tool_calls") or ([call] if call else None):
        message["tool_calls"] = [_tool_call(one, where) for one in _calls(call, where)]
        message.setdefault("content", "")
    if isinstance(message.get("content"), list) and message["content"]:
        message["content"] = "".join(_text_of_part(part, where) for part in message["content"])
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise UserError(f"{where} must have a role and a content, both text")
    thoughts = [message.pop(key) for key in THOUGHTS if key in message]
    if thoughts and not isinstance(thoughts[0], str):
        raise UserError(f"{where}: its reasoning must be text")
    for text in (message["content"], *thoughts[:1]):
        check_characters(text, where)
    return {**message, THOUGHTS[0]: thoughts[0]} if thoughts and thoughts[0] else message


def _of_sharegpt(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    speaker, text = message["from"], message.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise UserError(f"{where} is from '{speaker}'; {nearest(str(speaker), SPEAKERS)}")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    if speaker != "function_call":
        return {**others, "role": SPEAKERS[speaker], "content": text}
    calls = _from_json(text)
    if isinstance(calls, str | None):
        raise UserError(f"{where}: a function_call must be JSON with a name and arguments")
    return {**others, "role": ASSISTANT, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise UserError(f"{where} has a part of the kind '{kind}'; only text is learned")
    return part["text"]


def _calls(value: Any, where: str) -> list[Any]:
    calls = _from_json(value)
    if not isinstance(calls, list):
        raise UserError(f"{where}: its tool_calls must be a list, or such a list as JSON text")
    return calls


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call as transformers documents it, its arguments a mapping: OpenAI's files have them as JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call must have a function with a name")
    arguments = _from_json(function.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: the arguments of the call of '{function['name']}' must be a mapping, or one as JSON")
    if not isinstance(function.get("arguments"), str):
        arguments = _without_gaps(arguments)
    about = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return {**about, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
