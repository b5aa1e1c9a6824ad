"""Chats as people have them: what becomes of each, in one list that tests run and the documentation shows.

The templates are our own. Each behaves as those of a family of models do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PLACE = "chat.jsonl, line 1"
OWN_TOKENS = ("[u]", "[a]", "[s]", "[t]", "[end]", "[say]", "[call]", "<think>", "</think>")

_EACH = "{% for m in messages %}"
_ASK = "{% if add_generation_prompt %}[a]{% endif %}"
_TURN = (
    "{% set x = {'user': '[u]', 'assistant': '[a]', 'system': '[s]', 'tool': '[t]'}[m.role] %}{{ x }}{{ m.content }}"
)
_CALLS = "{% for c in m.tool_calls or [] %}[call]{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
# As ChatML and Llama 3 have it: what is written stays.
PLAIN = f"{_EACH}{_TURN}[end]{{% endfor %}}{_ASK}"
# As Qwen3 has it: a turn after the last question has a think block, earlier ones lose it.
THINKS_LAST = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    f"{{% endif %}}{{% endfor %}}{_EACH}{{% if m.role == 'assistant' and loop.index0 > ns.last %}}"
    "[a]<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{{ m.content }}"
    f"{{% else %}}{_TURN}{{% endif %}}[end]{{% endfor %}}{_ASK}"
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}"
)
# As DeepSeek's have it: who is asked has begun to think, though the thoughts of turns are left out.
OPENS = (
    f"{_EACH}{{% if m.role == 'assistant' %}}[a]{{{{ m.content.split('</think>')[-1] }}}}{{% else %}}{_TURN}"
    f"{{% endif %}}[end]{{% endfor %}}{_ASK}{{% if add_generation_prompt %}}<think>\n{{% endif %}}"
)
# As Nemotron 3 has it: the think block of a turn without thoughts is written more closely than it is begun.
OPENS_CLOSELY = (
    f"{_EACH}{{% if m.role == 'assistant' %}}[a]{{% if m.reasoning_content and loop.last %}}<think>\n"
    "{{ m.reasoning_content }}\n{% else %}<think>{% endif %}</think>{{ m.content }}"
    f"{{% else %}}{_TURN}{{% endif %}}[end]{{% endfor %}}{_ASK}{{% if add_generation_prompt %}}<think>\n{{% endif %}}"
)
# As Phi-3 has it: the end of the text is behind the last turn only.
ENDS_THE_TEXT = (
    f"{_EACH}{_TURN}[end]\n{{% endfor %}}"
    "{% if add_generation_prompt %}[a]{% else %}{{ eos_token }}{% endif %}"
)
# As gpt-oss has it: another end behind the last turn, and the answer on a channel of its own.
CHANNELS = (
    f"{_EACH}{{% if m.role == 'assistant' %}}[a]"
    "{% if m.thinking and loop.last %}think[say]{{ m.thinking }}[end][a]{% endif %}final[say]{{ m.content }}"
    f"{{% else %}}{_TURN}{{% endif %}}"
    f"{{% if loop.last and m.role == 'assistant' %}}[call]{{% else %}}[end]{{% endif %}}{{% endfor %}}{_ASK}"
)
# As GLM-4 has it: the next turn ends one.
ENDLESS = f"{_EACH}{_TURN}{{% endfor %}}{_ASK}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
# As Gemma 3 has it.
MERGES_SYSTEM = (
    "{% set first = '' %}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}" + PLAIN.replace("{{ x }}", "{{ x }}{{ first if loop.first }}")
)
LOSES_SYSTEM = PLAIN.replace(_EACH, "{% for m in messages if m.role != 'system' %}")
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + PLAIN
)
# As the models that see have it.
PARTS = PLAIN.replace("{{ m.content }}", "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}")
# As Llama 3.1 has it.
TOOLS = "{% if tools %}[s]{{ tools | tojson }}[end]{% endif %}" + PLAIN.replace(
    "{{ m.content }}", "{{ m.content }}" + _CALLS
)
# As DeepSeek-V3 has it: arguments are joined with other text.
JSON_CALLS = TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ ' ' + c.function.arguments }}")
BROKEN = "{% for m in messages %}{{ m.content }}"
OTHER_HEADER = PLAIN.replace("{% if add_generation_prompt %}[a]", "{% if add_generation_prompt %}[say]")
SPACED = PLAIN.replace("{% if add_generation_prompt %}[a]", "{% if add_generation_prompt %}[a] ")

TOOL = {"name": "sum", "parameters": {"type": "object"}}
OPENAI_CALL = {"id": "1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}


@dataclass(frozen=True)
class Case:
    """One row, and what becomes of it.

    Attributes:
        id: what is shown by it.
        template: the chat template.
        row: the columns.
        settings: what the space names, beside the data.
        learned: the pieces of text that are learned, by example.
        says: the lines that are told; of a refusal the only one.
        refused: whether it is.
    """

    id: str
    template: str
    row: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    learned: Sequence[Sequence[str]] = ()
    says: Sequence[str] = ()
    refused: bool = False

    @property
    def outcome(self) -> str:
        """In a word."""
        return "error" if self.refused else "Note" if self.says else "loads"


def messages(*contents: str, system: str | None = None, **last: Any) -> list[dict[str, Any]]:
    """A conversation of such turns; the last one has `last` too."""
    roles = ("user", "assistant")
    told = [] if system is None else [{"role": "system", "content": system}]
    turns: list[dict[str, Any]] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return [*told, *turns[:-1], {**turns[-1], **last}]


def chat(*contents: str, system: str | None = None, **last: Any) -> dict[str, Any]:
    """The row of such a conversation."""
    return {"messages": messages(*contents, system=system, **last)}


def tokenizer_of(template: str | None, eos: str = "[end]") -> Any:
    """One token a byte, but for the tokens of the templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.add_tokens([token for token in OWN_TOKENS if token != eos])
    tokenizer.chat_template = template
    return tokenizer


def _became(chats: int, rows: int, setting: str = "messages_column") -> str:
    return (
        f"{setting}: {chats} chats are {rows} training rows, one for each turn of the assistant, for the chat template "
        "writes a turn otherwise once others follow"
    )


def _found(name: str, columns: str) -> str:
    return f"format: {name}, for the rows have {columns}; another one can be named"


def _refused(says: str, place: str = f"{PLACE}: ") -> dict[str, Any]:
    return {"says": [place + says], "refused": True}


M = {"messages_column": "messages"}
_GOES_ON = "which a whole conversation does not have; turns are learned as they have to go on from there"
OPENED = f"chat_template: asks with '<think>\\n', {_GOES_ON}"
TWO = ("hi", "ho", "a", "b")
CASES = (
    Case("one exchange", PLAIN, chat("hi", "ho"), M, [["ho[end]"]]),
    Case("several exchanges", PLAIN, chat(*TWO), M, [["ho[end]", "b[end]"]]),
    Case("several exchanges, the last learned", PLAIN, chat(*TWO), M | {"train_on": "last"}, [["b[end]"]]),
    Case(
        "turns that are not to be learned",
        PLAIN,
        {"messages": [*messages("hi", "ho", weight=0), *messages("a", "b"), *messages("c", "d", weight=0)]},
        M,
        [["b[end]"]],
    ),
    Case(
        "no turn that is to be learned",
        PLAIN,
        chat("hi", "ho", weight=0),
        M,
        **_refused("each message of the assistant has weight 0, so that none is learned"),
    ),
    Case(
        "a think block in the last turn only",
        THINKS_LAST,
        chat(*TWO),
        M,
        [["<think>\n\n</think>\n\nho[end]"], ["<think>\n\n</think>\n\nb[end]"]],
        [_became(1, 2)],
    ),
    Case(
        "thoughts",
        THINKS_LAST,
        chat("hi", "ho", reasoning_content="hm"),
        M,
        [["<think>\nhm\n</think>\n\nho[end]"]],
    ),
    Case(
        "thoughts by another name",
        THINKS_LAST,
        chat("hi", "ho", thinking="hm"),
        M,
        [["<think>\nhm\n</think>\n\nho[end]"]],
    ),
    Case(
        "thoughts switched off",
        THINKS_LAST,
        chat(*TWO),
        M | {"chat_template_kwargs": {"enable_thinking": False}},
        [["ho[end]"], ["b[end]"]],
        [_became(1, 2)],
    ),
    Case(
        "thoughts where they are switched off",
        THINKS_LAST,
        chat("hi", "ho", reasoning_content="hm"),
        M | {"chat_template_kwargs": {"enable_thinking": False}},
        **_refused(
            "the chat template begins this turn otherwise than its generation prompt does; its thoughts may want "
            "chat_template_kwargs: {enable_thinking: true}"
        ),
    ),
    Case(
        "a misspelt word for the template",
        THINKS_LAST,
        chat("hi", "ho"),
        M | {"chat_template_kwargs": {"enable_thinkin": False}},
        **_refused(
            "chat_template_kwargs: the chat template reads no 'enable_thinkin'; did you mean 'enable_thinking'?", ""
        ),
    ),
    Case("an opened think block", OPENS, chat("hi", "ho"), M, [["\n</think>\n\nho[end]"]], [OPENED]),
    Case(
        "two turns of the assistant, of which the first is rewritten",
        THINKS_LAST.replace("and loop.index0 > ns.last", "and loop.last"),
        {"messages": [*messages("hi", "ho"), {"role": "assistant", "content": "ho"}]},
        M,
        [["<think>\n\n</think>\n\nho[end]"], ["<think>\n\n</think>\n\nho[end]"]],
        [_became(1, 2)],
    ),
    Case(
        "an opened think block, several exchanges",
        OPENS,
        chat(*TWO),
        M,
        [["\n</think>\n\nho[end]"], ["\n</think>\n\nb[end]"]],
        [_became(1, 2), OPENED],
    ),
    Case(
        "an opened think block, with thoughts",
        OPENS,
        chat("hi", "ho", reasoning_content="hm"),
        M,
        [["hm\n</think>\n\nho[end]"]],
        [OPENED],
    ),
    Case(
        "an opened think block, with thoughts in the content",
        OPENS,
        chat("hi", "<think>\nhm\n</think>\n\nho"),
        M,
        [["hm\n</think>\n\nho[end]"]],
        [OPENED],
    ),
    Case("a think block that is closed at once", OPENS_CLOSELY, chat("hi", "ho"), M, [["</think>ho[end]"]], [OPENED]),
    Case(
        "a think block that is closed at once, with thoughts",
        OPENS_CLOSELY,
        chat("hi", "ho", reasoning_content="hm"),
        M,
        [["hm\n</think>ho[end]"]],
        [OPENED],
    ),
    Case(
        "an end of the text behind the last turn",
        ENDS_THE_TEXT,
        chat(*TWO),
        M,
        [["ho[end]\n<eos>"], ["b[end]\n<eos>"]],
        [_became(1, 2)],
    ),
    Case("channels", CHANNELS, chat(*TWO), M, [["final[say]ho[call]"], ["final[say]b[call]"]], [_became(1, 2)]),
    Case(
        "channels with thoughts",
        CHANNELS,
        chat("hi", "ho", reasoning_content="hm"),
        M,
        [["think[say]hm[end][a]final[say]ho[call]"]],
    ),
    Case(
        "turns without an end",
        ENDLESS,
        chat(*TWO),
        M,
        [["ho", "b"]],
        [
            "chat_template: ends the assistant's turn with no token of its own, so that no end is learned, and a text "
            "goes on to max_new_tokens"
        ],
    ),
    Case(
        "a generation prompt with a space",
        SPACED,
        chat("hi", "ho"),
        M,
        [["ho[end]"]],
        [f"chat_template: asks with ' ', {_GOES_ON}"],
    ),
    Case(
        "another header in the generation prompt",
        OTHER_HEADER,
        chat("hi", "ho"),
        M,
        **_refused(
            "the chat template begins this turn otherwise than its generation prompt does; name another one in "
            "chat_template"
        ),
    ),
    Case("a system turn", PLAIN, chat("hi", "ho", system="be"), M, [["ho[end]"]]),
    Case("a system turn, merged into the question", MERGES_SYSTEM, chat(*TWO, system="be"), M, [["ho[end]", "b[end]"]]),
    Case(
        "a system turn that is refused",
        NO_SYSTEM,
        chat("hi", "ho", system="be"),
        M,
        **_refused("the chat template refuses the conversation (System role not supported)"),
    ),
    Case(
        "a system turn that is left out",
        LOSES_SYSTEM,
        chat("hi", "ho", system="be"),
        M,
        [["ho[end]"]],
        ["chat_template: leaves the system turns out"],
    ),
    Case("a system prompt for all", PLAIN, chat("hi", "ho"), M | {"system_prompt": "be"}, [["ho[end]"]]),
    Case(
        "roles that must alternate",
        ALTERNATES,
        {"messages": [*messages("hi", "ho"), *messages("hm", "b")[1:]]},
        M,
        **_refused("the chat template refuses the conversation (Roles must alternate)"),
    ),
    Case(
        "contents in parts, for a template of texts",
        PLAIN,
        chat("hi", [{"type": "text", "text": "ho"}]),
        M,
        [["ho[end]"]],
    ),
    Case("texts, for a template of parts", PARTS, chat(*TWO), M, [["ho[end]", "b[end]"]]),
    Case(
        "an image",
        PARTS,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, messages("hi", "ho")[1]]},
        M,
        **_refused("message 1 has a part of the kind 'image_url'; only text is learned"),
    ),
    Case(
        "a tool call without a content, and tools",
        TOOLS,
        chat("hi", None, tool_calls=[OPENAI_CALL]) | {"tools": [TOOL]},
        M | {"tools_column": "tools"},
        [['[call]sum{"a": 1}[end]']],
    ),
    Case(
        "tools as JSON text",
        TOOLS,
        chat("hi", "ho") | {"tools": '[{"name": "sum"}]'},
        M | {"tools_column": "tools"},
        [["ho[end]"]],
    ),
    Case(
        "calls of which the template joins the arguments",
        JSON_CALLS,
        chat("hi", "", tool_calls=[OPENAI_CALL]),
        M,
        [['[call]sum {"a": 1}[end]']],
    ),
    Case(
        "tools that are left out",
        PLAIN,
        chat("hi", "ho") | {"tools": [TOOL]},
        M | {"tools_column": "tools"},
        **_refused("the chat template writes no tools"),
    ),
    Case(
        "calls that are left out",
        PLAIN,
        chat("hi", "", tool_calls=[OPENAI_CALL]),
        M,
        **_refused("the chat template writes no tool calls"),
    ),
    Case(
        "a column of tools that is not there",
        TOOLS,
        chat("hi", "ho"),
        M | {"tools_column": "tool"},
        **_refused("no column 'tool'; columns: messages"),
    ),
    Case(
        "thoughts that are left out",
        PLAIN,
        chat("hi", "ho", reasoning_content="hm"),
        M,
        [["ho[end]"]],
        ["chat_template: leaves the reasoning_content of turns out"],
    ),
    Case(
        "thoughts in the content that are left out",
        OPENS.replace("<think>\n", ""),
        chat("hi", "<think>hm</think>ho"),
        M,
        [["ho[end]"]],
        ["chat_template: leaves the thoughts before </think> out of contents"],
    ),
    Case(
        "a broken template",
        BROKEN,
        chat("hi", "ho"),
        M,
        **_refused(
            "chat_template: line 1: Unexpected end of template. Jinja was looking for the following tags: "
            "'endfor' or 'else'. The innermost block that needs to be closed is 'for'.",
            "",
        ),
    ),
    Case("OpenAI's rows", PLAIN, chat(*TWO), {}, [["ho[end]", "b[end]"]], [_found("openai", "messages")]),
    Case("OpenAI's rows, named", PLAIN, chat(*TWO), {"format": "openai"}, [["ho[end]", "b[end]"]]),
    Case(
        "chats as JSON text",
        PLAIN,
        {"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]'},
        M,
        [["ho[end]"]],
    ),
    Case(
        "ShareGPT's rows",
        PLAIN,
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {},
        [["ho[end]"]],
        [_found("sharegpt", "conversations")],
    ),
    Case(
        "ShareGPT's rows with tools",
        TOOLS,
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": '{"name": "sum", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "ho"},
            ],
            "tools": '[{"name": "sum"}]',
            "system": "be",
        },
        {"format": "sharegpt"},
        [['[call]sum{"a": 1}[end]', "ho[end]"]],
    ),
    Case(
        "ShareGPT's rows with a speaker of their own",
        PLAIN,
        {"conversations": [{"from": "humen", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {},
        **_refused("message 1 is from 'humen'; did you mean 'human'?"),
    ),
    Case(
        "ShareGPT's rows with a speaker that is no text",
        PLAIN,
        {"conversations": [{"from": {}, "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {},
        **_refused(
            "message 1 is from '{}'; allowed: assistant, bard, bing, chatgpt, function_call, function_response, gpt, "
            "human, model, observation, system, tool, user"
        ),
    ),
    Case(
        "tool calls that are no list",
        PLAIN,
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": 5}]},
        M,
        **_refused("message 2: its tool_calls must be a list, or such a list as JSON text"),
    ),
    Case(
        "Alpaca's rows",
        PLAIN,
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {},
        [["2[end]"]],
        [_found("alpaca", "instruction and output")],
    ),
    Case(
        "Alpaca's rows without an input",
        PLAIN,
        {"instruction": "Hi.", "input": "", "output": "ho"},
        {"format": "alpaca"},
        [["ho[end]"]],
    ),
    Case(
        "Alpaca's rows with a history",
        PLAIN,
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        {"format": "alpaca"},
        **_refused("format: alpaca writes no history; use templates that name it"),
    ),
    Case("prompts and completions", PLAIN, {"prompt": "hi", "completion": "ho"}, {}, [["ho[end]"]]),
    Case(
        "a chosen and a rejected text",
        PLAIN,
        {"prompt": "hi", "chosen": "ho", "rejected": "hm"},
        {},
        **_refused(
            "train_data: chosen and rejected make preferences; "
            'completion_template: "{chosen}" trains on what was chosen',
            "",
        ),
    ),
    Case(
        "a chosen and a rejected chat",
        PLAIN,
        {"chosen": messages("hi", "ho"), "rejected": messages("hi", "hm")},
        {},
        **_refused(
            "train_data: chosen and rejected make preferences; messages_column: chosen trains on what was chosen", ""
        ),
    ),
    Case(
        "a chosen chat, named",
        PLAIN,
        {"chosen": messages("hi", "ho"), "rejected": messages("hi", "hm")},
        {"messages_column": "chosen"},
        [["ho[end]"]],
    ),
    Case("a completion that was liked", PLAIN, {"prompt": "hi", "completion": "ho", "label": True}, {}, [["ho[end]"]]),
    Case(
        "a completion that was disliked",
        PLAIN,
        {"prompt": "hi", "completion": "ho", "label": False},
        {},
        **_refused(
            "label false marks an answer that was disliked, as in files of preferences; leave such rows out, or learn "
            "them too with format: completion"
        ),
    ),
    Case(
        "a completion that was disliked, learned all the same",
        PLAIN,
        {"prompt": "hi", "completion": "ho", "label": False},
        {"format": "completion"},
        [["ho[end]"]],
    ),
    Case(
        "a chat that was disliked",
        PLAIN,
        chat("hi", "ho") | {"label": False},
        M,
        **_refused(
            "label false marks an answer that was disliked, as in files of preferences; leave such rows out, or learn "
            "them too with format: openai"
        ),
    ),
    Case(
        "a setting of chats for other rows",
        PLAIN,
        {"prompt": "hi", "completion": "ho"},
        {"system_prompt": "be"},
        **_refused("system_prompt: only chats have it; name their column in messages_column", ""),
    ),
)
