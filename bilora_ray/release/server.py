"""Whether an OpenAI-compatible server (vLLM, SGLang, llama.cpp) really applies an adapter.

A server may take an adapter's name and answer with the base model all the same. So it gets prompts that the adapter and
its base model answer differently, and its greedy answers are compared with both: word for word and, where it tells
them, by the log-probabilities of its tokens, which rounding moves less than it moves words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from statistics import fmean
from typing import IO, TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from bilora_ray.addresses import is_local, masked
from bilora_ray.errors import MachineError, UserError, nearest
from bilora_ray.training.data.chat import THOUGHT
from bilora_ray.training.prediction.questions import question
from bilora_ray.training.tasks.causal_lm import ChatRow

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bilora_ray.config import TrialConfig
    from bilora_ray.training.data.sources import Record
    from bilora_ray.training.prediction.answers import Asked
    from bilora_ray.training.tasks.base import Example, Row

TIMEOUT_S = 120.0
# So many prompts are sent, of those that adapter and base model answer differently among so many.
MOST_SENT, MOST_TRIED = 8, 64
MOST_BYTES = 2**24
# Of what a server says is wrong, so much is shown.
MOST_SHOWN = 300
# What servers say that do not know one of the words of a request.
UNKNOWN_WORD = frozenset({400, 404, 422, 501})
# How much nearer log-probabilities must be to be called those of one of two models.
NEARER = 0.5

Whose = Literal["adapter", "base model", "neither"]


@dataclass(frozen=True)
class Reply:
    """What a server answered.

    Attributes:
        text: the answer, without the thoughts before it.
        log_probabilities: of its tokens, in nats; None where the server does not tell.
    """

    text: str
    log_probabilities: Sequence[float] | None = None


@dataclass(frozen=True)
class Compared:
    """One prompt, and three answers to it: texts.

    Attributes:
        gaps: the mean distance of the server's log-probabilities from the adapter's and from the base model's, in nats
            a token, over the server's answer; None where that is not known.
    """

    prompt: str
    server: str
    adapter: str
    base_model: str
    gaps: tuple[float, float] | None = None

    @property
    def whose(self) -> Whose:
        """Whose answer the server's is; it may go on where the other ends."""
        server = self.server.strip()
        both: dict[Whose, str] = {"adapter": self.adapter.strip(), "base model": self.base_model.strip()}
        for whose, text in both.items():
            if server == text:
                return whose
        begun: list[Whose] = [whose for whose, text in both.items() if text and server.startswith(text)]
        return max(begun, key=lambda whose: len(both[whose]), default="neither")

    @property
    def goes_on(self) -> bool:
        """Whether the server writes on behind the adapter's answer."""
        return self.whose == "adapter" and self.server.strip() != self.adapter.strip()


@dataclass(frozen=True)
class Verdict:
    """Whose a server's answers are.

    Attributes:
        model: what the server calls the adapter.
        rows: the answers, each to a prompt to which adapter and base model have different ones.
    """

    model: str
    rows: Sequence[Compared]

    @property
    def whose(self) -> Whose:
        """By the answers, if at least half are one's; else by the log-probabilities, if they are near to one's."""
        adapter, base = self.count("adapter"), self.count("base model")
        if adapter != base and 2 * max(adapter, base) >= len(self.rows):
            return "adapter" if adapter > base else "base model"
        ours, theirs = self.gaps or (0.0, 0.0)
        if ours < NEARER * theirs:
            return "adapter"
        return "base model" if theirs < NEARER * ours else "neither"

    @property
    def gaps(self) -> tuple[float, float] | None:
        """See `Compared`: the means over the rows in which it is known."""
        known = [row.gaps for row in self.rows if row.gaps is not None]
        return (fmean(ours for ours, _ in known), fmean(theirs for _, theirs in known)) if known else None

    def count(self, whose: Whose) -> int:
        """In how many rows the server's answer is that one's."""
        return sum(row.whose == whose for row in self.rows)

    def lines(self) -> list[str]:
        """What there is to say, the verdict first."""
        every, adapter, base = len(self.rows), self.count("adapter"), self.count("base model")
        near = "" if 2 * max(adapter, base) >= every else ", the others are near to them"
        are = "the server's answers are the"
        said = {
            "adapter": f"{are} adapter's in {adapter} of {every}{near}: it applies the adapter",
            "base model": f"{are} BASE model's in {base} of {every}{near}: it ignores the adapter",
            "neither": f"{are} adapter's in {adapter} of {every}, the base model's in {base}: "
            "it serves another model, or reads the prompts in another way",
        }
        found = [said[self.whose]]
        if self.gaps is not None:
            ours, theirs = self.gaps
            found.append(
                f"its log-probabilities are {ours:.3g} nats a token from the adapter's, {theirs:.3g} from the base's"
            )
        if ended := sum(row.goes_on for row in self.rows):
            found.append(
                f"in {ended} of {every} it writes on behind the adapter's answer: it does not know how a text ends; "
                "start vLLM with --generation-config FOLDER of the export, or send its stop_token_ids"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        counts = {"adapter": self.count("adapter"), "base_model": self.count("base model")}
        gaps = None if self.gaps is None else dict(zip(counts, self.gaps, strict=True))
        rows = [{**vars(row), "whose": row.whose} for row in self.rows]
        return {"model": self.model, "answers_of": self.whose, **counts, "log_probability_gaps": gaps, "rows": rows}


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server.

    Attributes:
        url: up to what comes before `/v1`.
        token: is sent with each request, and never shown.
        timeout_s: how long an answer may take, in seconds.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    timeout_s: float = TIMEOUT_S

    @classmethod
    def at(cls, url: str, token: str | None) -> Server:
        """UserError unless `url` can be that of a server."""
        try:
            parts = urlsplit(url)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"--server {masked(url)}: must be a URL as http://127.0.0.1:8000")
        if parts.username is not None or parts.query or parts.fragment:
            raise UserError("--server: takes no password and no query; OPENAI_API_KEY holds the token")
        return cls(url.rstrip("/").removesuffix("/v1"), token or None)

    @property
    def sends_in_the_clear(self) -> bool:
        """Whether the token goes to another machine unencrypted."""
        parts = urlsplit(self.url)
        return self.token is not None and parts.scheme == "http" and not is_local(parts.hostname or "")

    def chosen(self, model: str | None) -> str:
        """What the server calls the adapter: the `model` that was named, or the one that it has, if it is one.

        vLLM and SGLang list the base model too, and say of an adapter what its parent is.

        Raises:
            UserError: there is no such model, or it is not clear which is meant.
        """
        listed = self._asked("/v1/models").get("data")
        models = [one for one in listed or () if isinstance(one, dict) and isinstance(one.get("id"), str)]
        names = [one["id"] for one in models]
        if model is not None:
            if names and model not in names:
                raise UserError(f"--model {model}: is not served; {nearest(model, names)}")
            return model
        adapters = [one["id"] for one in models if one.get("parent")]
        for found in (adapters, names):
            if len(found) == 1:
                return str(found[0])
        has = f"it has {', '.join(names)}" if names else "it lists none"
        raise UserError(f"--server {self.url}: --model must say which of its models is the adapter; {has}")

    def reply(self, path: str, body: Mapping[str, Any]) -> Reply:
        """The answer to a request of completions, with its log-probabilities where the server tells them.

        Raises:
            UserError, MachineError: there is none.
        """
        wanted = {"logprobs": True} if path == CHAT else {"logprobs": 1}
        try:
            found = self._asked(path, {**body, **wanted})
        except _Refused as error:
            if error.status not in UNKNOWN_WORD:
                raise
            found = self._asked(path, body)  # some know no such word
        try:
            return _reply(found["choices"][0])
        except (LookupError, TypeError, AttributeError):
            raise UserError(f"--server {self.url}: {path} answers otherwise than OpenAI's") from None

    def _asked(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": "bilora-ray"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data=data, headers=headers)
        try:
            with self._opener().open(request, timeout=self.timeout_s) as response:
                found = json.loads(response.read(MOST_BYTES))
        except HTTPError as error:
            with error:
                raise _Refused(f"--server {self.url}: {path}: {self._said(error)}", error.code) from None
        except TimeoutError:
            raise MachineError(f"--server {self.url}: {path}: no answer in {self.timeout_s:g} s") from None
        except URLError as error:
            late = isinstance(error.reason, TimeoutError)
            why = f"no answer in {self.timeout_s:g} s" if late else f"cannot be reached ({_words(error.reason)})"
            raise MachineError(f"--server {self.url}: {why}") from None
        except OSError as error:  # the connection breaks
            raise MachineError(f"--server {self.url}: {path}: {_words(error)}") from None
        except HTTPException:  # its answer breaks off, or is another protocol's
            raise UserError(f"--server {self.url}: {path} answers with what is no HTTP") from None
        except ValueError:
            raise UserError(f"--server {self.url}: {path} answers with what is no JSON") from None
        if not isinstance(found, dict):
            raise UserError(f"--server {self.url}: {path} answers otherwise than OpenAI's")
        return found

    def _opener(self) -> OpenerDirector:
        """Nothing is sent to another place than the one that was named: it would get the token too."""
        own = [ProxyHandler({})] if is_local(urlsplit(self.url).hostname or "") else []
        return build_opener(_NoRedirects, *own)

    def _said(self, error: HTTPError) -> str:
        """What a server says is wrong, in a line without the token."""
        text = ""
        with suppress(OSError, HTTPException):  # it breaks off
            text = error.read(MOST_BYTES).decode("utf-8", "replace")
        try:
            told = json.loads(text)
            told = told.get("error") or told.get("detail") or told.get("message") or told
            text = str(told.get("message", told) if isinstance(told, dict) else told)
        except (ValueError, AttributeError):
            pass
        line = " ".join(text.split())[:MOST_SHOWN]
        line = line.replace(self.token, "***") if self.token else line
        cure = "; OPENAI_API_KEY is not set" if error.code in (401, 403) and self.token is None else ""
        return f"{error.code} {error.reason}{f' ({line})' if line else ''}{cure}"


class _Refused(UserError):
    def __init__(self, line: str, status: int) -> None:
        super().__init__(line)
        self.status = status


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> None:
        """None: it is an error."""


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def compare(server: Server, model: str, asked: Asked, records: Iterable[Record]) -> Verdict:
    """Whose answers a `server` gives to prompts that adapter and base model answer differently.

    Args:
        server: is sent at most MOST_SENT prompts.
        model: what it calls the adapter.
        asked: the adapter and its base model.
        records: of these the first MOST_TRIED are looked at.

    Raises:
        UserError: the server gives no answers; or adapter and base model do not differ.
    """
    rows, examples = _whole(asked, records)
    ours, theirs = (
        [str(answer.prediction) for answer in asked.answers(examples, base_model=base_model)]
        for base_model in (False, True)
    )
    telling = [place for place, text in enumerate(ours) if text.strip() != theirs[place].strip()][:MOST_SENT]
    if not telling:
        alike = f"adapter and base model give the same answer to {'each of ' if len(rows) > 1 else ''}the {len(rows)}"
        raise UserError(f"--server: {alike} prompt{'s' if len(rows) > 1 else ''}, which tell nothing; ask others")
    found = []
    for place in telling:
        path, body = _request(rows[place], asked.config)
        reply = server.reply(path, {"model": model, **body})
        prompt = str(asked.processor.decode(list(examples[place].prompt_ids or ())))
        gaps = _gaps(asked, examples[place], reply)
        found.append(Compared(prompt, reply.text, ours[place], theirs[place], gaps))
    return Verdict(model, found)


def _whole(asked: Asked, records: Iterable[Record]) -> tuple[list[Row], list[Example]]:
    """The first questions that `max_length` takes nothing of: a server would read all of the others."""
    rows, examples = [], []
    for record in records:
        row = question(record, asked.config)
        (example,), cut = asked.examples([row])
        if not cut:
            rows.append(row)
            examples.append(example)
        if len(rows) == MOST_TRIED:
            break
    if not rows:
        raise UserError("--server: each prompt is longer than max_length lets it be; ask others")
    return rows, examples


def _request(row: Any, config: TrialConfig) -> tuple[str, dict[str, Any]]:
    """Where a question is sent, and what: greedy, as an evaluation writes."""
    body: dict[str, Any] = {"max_tokens": config.max_new_tokens, "temperature": 0}
    if not isinstance(row, ChatRow):
        return TEXT, {"prompt": row.prompt, **body}
    if row.tools:
        body["tools"] = list(row.tools)
    if config.chat_template_kwargs:
        body["chat_template_kwargs"] = dict(config.chat_template_kwargs)
    return CHAT, {"messages": [_as_openai(message) for message in row.messages[:-1]], **body}


def _as_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its calls as JSON text."""
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _reply(choice: Mapping[str, Any]) -> Reply:
    told = choice.get("logprobs") or {}
    if "message" in choice:
        text = choice["message"]["content"] or ""
        values = [one.get("logprob") for one in told.get("content") or ()]
    else:
        text = choice["text"]  # llama.cpp tells of it as of a chat
        values = told.get("token_logprobs") or [one.get("logprob") for one in told.get("content") or ()]
    known = [float(value) for value in values if isinstance(value, int | float)]
    without_thoughts = str(text).rpartition(THOUGHT)[2]
    whole = len(known) == len(values) and without_thoughts == text
    return Reply(without_thoughts, known if known and whole else None)


def _gaps(asked: Asked, example: Example, reply: Reply) -> tuple[float, float] | None:
    """How far the server's log-probabilities are from the adapter's and from the base model's; None: not known."""
    if reply.log_probabilities is None or not reply.text:
        return None
    ours, theirs = (asked.log_likelihoods(example, reply.text, base_model) for base_model in (False, True))
    # It may tell of the end too. Of fewer tokens than ours there are other ones.
    if not ours or len(reply.log_probabilities) < len(ours):
        return None

    def gap(local: Sequence[float]) -> float:
        return fmean(abs(one - other) for one, other in zip(local, reply.log_probabilities or (), strict=False))

    return gap(ours), gap(theirs)


def _words(reason: Any) -> str:
    return str(getattr(reason, "strerror", None) or reason)
