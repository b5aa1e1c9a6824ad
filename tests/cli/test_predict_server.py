"""Whether a server applies an adapter, told by servers that do, that do not, that fail and that hang."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, TCPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_trials import Tiny, run_fit

from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, UserError
from bilora_ray.recipe import evaluation_config
from bilora_ray.release import server
from bilora_ray.release.server import Compared, Server, Verdict
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.prediction.answers import Asked
from bilora_ray.training.prediction.questions import asking, question, records_of

TOKEN = "sk-never-shown"


@dataclass
class Stub:
    """A server on the loopback.

    Attributes:
        answer: the body of a request of completions -> the status and the answer.
        models: what it lists.
        heard: the path, the Authorization and the body of each request.
    """

    answer: Callable[[dict[str, Any]], tuple[int, Any]]
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "base"}, {"id": "mine", "parent": "base"}])
    heard: list[tuple[str, str | None, Any]] = field(default_factory=list)
    url: str = ""


class Quiet(ThreadingHTTPServer):
    """Says nothing where who asked has gone away."""

    def handle_error(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Stub], Stub]]:
    running: list[ThreadingHTTPServer] = []

    def start(stub: Stub) -> Stub:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._hear(None)
                self._send(200, {"data": stub.models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._hear(body)
                self._send(*stub.answer(body))

            def _hear(self, body: Any) -> None:
                stub.heard.append((self.path, self.headers.get("Authorization"), body))

            def _send(self, status: int, found: Any) -> None:
                sent = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                if status in (301, 302, 307):
                    self.send_header("Location", "http://127.0.0.1:9/v1/elsewhere")
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: Any) -> None:
                pass

        running.append(Quiet(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, args=(0.05,), daemon=True).start()
        stub.url = f"http://127.0.0.1:{running[-1].server_port}"
        return stub

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


@dataclass(frozen=True)
class Known:
    """An adapter, its rows and what it and its base model answer to them."""

    adapter: Path
    data: Path
    asked: Asked
    rows: list[Any]
    answers: dict[str, list[str]]

    def speaking(self, whose: str, logprobs: bool = True, more: str = "") -> Callable[[dict[str, Any]], Any]:
        """What a server answers that has the weights of the adapter, or of the base model."""
        examples, _ = self.asked.examples(self.rows)

        def answer(body: dict[str, Any]) -> tuple[int, Any]:
            place = self._place(body)
            text = self.answers[whose][place] + more
            if "logprobs" in body and not logprobs:
                return 400, {"error": {"message": "logprobs is not supported"}}
            told = self.asked.log_likelihoods(examples[place], text, whose == "base model")
            if "messages" in body:
                content = {"content": [{"token": "x", "logprob": value} for value in told]}
                return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": content}]}
            return 200, {"choices": [{"text": text, "logprobs": {"token_logprobs": told} if logprobs else None}]}

        return answer

    def _place(self, body: dict[str, Any]) -> int:
        for place, row in enumerate(self.rows):
            if "prompt" in body and row.prompt == body["prompt"]:
                return place
            if "messages" in body and list(row.messages[:-1]) == body["messages"]:
                return place
        raise AssertionError(f"nobody asks {body}")


def known(config: TrialConfig, folder: Path) -> Known:
    run_fit(config, folder)
    adapter = TrialFolder(folder).best_adapter()
    assert adapter is not None
    data = Path(str(config.validation_data))
    own = asking(evaluation_config(adapter, {"train_data": str(data)}))
    records, own = records_of(own)
    asked = Asked.load(adapter, own, own)
    rows = [question(record, own) for record in records]
    examples, _ = asked.examples(rows)
    answers = {
        whose: [answer.prediction for answer in asked.answers(examples, base_model=whose == "base model")]
        for whose in ("adapter", "base model")
    }
    return Known(adapter, data, asked, rows, answers)


@pytest.fixture(scope="module")
def texts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Known:
    return known(tiny.config("causal-lm", max_new_tokens=8), tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def chats(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Known:
    data = {split: str(tiny.folder / f"chats-{of}.jsonl") for split, of in (("train_data", "train"),)}
    data["validation_data"] = str(tiny.folder / "chats-validation.jsonl")
    config = tiny.config("causal-lm", format="openai", max_new_tokens=8, max_length=96, **data)
    return known(config, tmp_path_factory.mktemp("chats"))


def run(found: Known, stub: Stub, *more: str) -> Result:
    typed = ["predict", str(found.adapter), "--data", str(found.data), "--server", stub.url, *more]
    return CliRunner().invoke(main, typed)


@pytest.mark.parametrize("kind", ["texts", "chats"])
def test_a_server_that_applies_the_adapter_is_told_from_one_that_does_not(
    kind: str, serve: Callable[[Stub], Stub], request: pytest.FixtureRequest
) -> None:
    found: Known = request.getfixturevalue(kind)
    applies, ignores = serve(Stub(found.speaking("adapter"))), serve(Stub(found.speaking("base model")))
    said = run(found, applies)
    assert said.exit_code == 0, said.stderr
    first, second, *others = said.stdout.splitlines()
    assert first == "Model 'mine': the server's answers are the adapter's in 8 of 8: it applies the adapter"
    assert second.startswith("Its log-probabilities are ")
    assert others == []
    path, _, body = applies.heard[-1]
    assert path == ("/v1/completions" if kind == "texts" else "/v1/chat/completions")
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("mine", 8, 0)
    assert len(applies.heard) == 9

    if kind == "texts":
        said = run(found, ignores, "--model", "base")
        line = "Model 'base': the server's answers are the BASE model's in 8 of 8: it ignores the adapter"
        assert (said.exit_code, said.stdout.splitlines()[0]) == (1, line)
        return
    said = run(found, ignores, "--json")
    assert said.exit_code == 1
    told = json.loads(said.stdout)
    assert (told["answers_of"], told["adapter"], told["base_model"]) == ("base model", 0, 8)
    gaps = told["log_probability_gaps"]
    assert gaps["base_model"] < 1e-4 < 1e-2 < gaps["adapter"]
    for row in told["rows"]:
        assert row["server"] == row["base_model"] != row["adapter"]


def test_a_server_that_tells_no_log_probabilities_is_asked_without(texts: Known, serve: Any) -> None:
    stub = serve(Stub(texts.speaking("adapter", logprobs=False)))
    said = run(texts, stub)
    assert (said.exit_code, len(said.stdout.splitlines())) == (0, 1)


def test_a_server_that_does_not_know_the_end_of_a_text_applies_the_adapter_all_the_same(
    texts: Known, serve: Any
) -> None:
    said = run(texts, serve(Stub(texts.speaking("adapter", more=" so very well"))))
    assert said.exit_code == 0
    assert "In 8 of 8 it writes on behind the adapter's answer" in said.stdout


def test_a_server_with_another_model_is_neither(texts: Known, serve: Any) -> None:
    said = run(texts, serve(Stub(lambda body: (200, {"choices": [{"text": "something else"}]}))))
    assert said.exit_code == 1
    line = "the server's answers are the adapter's in 0 of 8, the base model's in 0: it serves another model"
    assert said.stdout.startswith(f"Model 'mine': {line}")
    assert "  server      'something else'\n" in said.stdout


def test_where_words_are_nobodys_log_probabilities_decide() -> None:
    def verdict(ours: float, theirs: float) -> str:
        return Verdict("m", [Compared("p", "a b c", "a b d", "a b e", (ours, theirs))] * 2).whose

    assert verdict(0.01, 0.5) == "adapter"
    assert verdict(0.5, 0.01) == "base model"
    assert verdict(0.5, 0.4) == "neither"
    assert Verdict("m", [Compared("p", "a b c", "a b d", "a b e")]).whose == "neither"
    # So they do where but a few are one's.
    own, others = Compared("p", "a", "a", "b"), Compared("p", "a b c", "a b d", "a b e", (0.01, 0.5))
    assert Verdict("m", [own, *[Compared("p", "x", "a", "b")] * 3]).whose == "neither"
    assert Verdict("m", [own, own, *[Compared("p", "x", "a", "b")] * 2]).whose == "adapter"
    near = Verdict("m", [own, *[others] * 3])
    assert near.lines()[0] == (
        "the server's answers are the adapter's in 1 of 4, the others are near to them: it applies the adapter"
    )
    # An answer that begins as both do is the longer one's.
    assert Compared("p", "7 apples.", "7", "7 apples").whose == "base model"
    assert Compared("p", "7", "7", "7 apples").whose == "adapter"
    assert Compared("p", "anything", "", "other").whose == "neither"


def test_prompts_that_tell_nothing_are_a_line(texts: Known, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = serve(Stub(texts.speaking("adapter")))
    answers = Asked.answers
    monkeypatch.setattr(Asked, "answers", lambda self, examples, base_model=False: answers(self, examples))
    said = run(texts, stub)
    assert (said.exit_code, said.stdout) == (2, "")
    told = "adapter and base model give the same answer to each of the 18 prompts, which tell nothing; ask others"
    assert said.stderr == f"Error: --server: {told}\n"
    assert [path for path, _, _ in stub.heard] == ["/v1/models"]


# What goes wrong


@pytest.mark.parametrize(
    ("status", "answer", "line"),
    [
        (500, {"error": {"message": "engine died\nTraceback"}}, "500 Internal Server Error (engine died Traceback)"),
        (401, {"error": f"wrong token {TOKEN}"}, "401 Unauthorized (wrong token ***)"),
        (404, {"message": "no such model"}, "404 Not Found (no such model)"),
        (307, {}, "307 Temporary Redirect ({})"),
        (200, b"<html>", "answers with what is no JSON"),
        (200, {"choices": []}, "answers otherwise than OpenAI's"),
        (200, [], "answers otherwise than OpenAI's"),
    ],
)
def test_a_server_that_fails_is_a_line_without_the_token(
    status: int, answer: Any, line: str, texts: Known, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    stub = serve(Stub(lambda body: (status, answer)))
    said = run(texts, stub)
    assert (said.exit_code, said.stdout) == (2, "")
    assert said.stderr.startswith(f"Error: --server {stub.url}: /v1/completions")
    assert said.stderr.endswith(f"{line}\n")
    assert TOKEN not in said.stderr
    assert {token for _, token, _ in stub.heard} == {f"Bearer {TOKEN}"}


def test_a_server_that_hangs_is_a_line(serve: Any) -> None:
    gone = threading.Event()

    def hang(body: dict[str, Any]) -> tuple[int, Any]:
        gone.wait(30)
        return 200, {}

    stub = serve(Stub(hang))
    asked = Server(stub.url, timeout_s=0.3)
    with pytest.raises(MachineError, match=r"no answer in 0\.3 s"):
        asked.reply(server.TEXT, {"prompt": "hello"})
    assert not gone.is_set()
    gone.set()


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", b"HTTP/1.1 200 OK"]
)
def test_what_speaks_another_protocol_or_breaks_off_is_a_line(answer: bytes) -> None:
    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(answer)

    with TCPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{listening.server_address[1]}"
        with pytest.raises(UserError, match=f"--server {url}: /v1/models"):
            Server(url, timeout_s=5).chosen(None)


def test_a_server_that_is_not_there_is_a_line_before_the_model_is_loaded(
    texts: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Asked, "load", lambda *_: pytest.fail("loaded"))
    stub = Stub(lambda body: (200, {}), url="http://127.0.0.1:9")
    said = run(texts, stub)
    assert said.stderr == "Error: --server http://127.0.0.1:9: cannot be reached (Connection refused)\n"


def test_which_model_is_meant_is_asked_where_it_is_not_clear(texts: Known, serve: Any) -> None:
    def chosen(*models: dict[str, Any], named: str | None = None) -> str:
        return Server(serve(Stub(lambda body: (200, {}), list(models))).url).chosen(named)

    assert chosen({"id": "only"}) == "only"
    assert chosen({"id": "base"}, {"id": "mine", "parent": "base"}) == "mine"
    assert chosen({"id": "base"}, {"id": "mine", "parent": "base"}, named="base") == "base"
    assert chosen(named="unlisted") == "unlisted"
    with pytest.raises(UserError, match="--model must say which of its models is the adapter; it has one, two"):
        chosen({"id": "one"}, {"id": "two"})
    with pytest.raises(UserError, match=r"--model mone: is not served; did you mean 'mine'\?"):
        chosen({"id": "mine"}, named="mone")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port", "/v1"])
def test_what_is_no_url_is_a_line(url: str) -> None:
    with pytest.raises(UserError, match=r"must be a URL as http://127\.0\.0\.1:8000"):
        Server.at(url, None)


def test_a_token_is_neither_shown_nor_in_a_url() -> None:
    with pytest.raises(UserError) as refused:
        Server.at(f"http://me:{TOKEN}@x:8000", None)
    assert TOKEN not in str(refused.value)
    asked = Server.at("http://gpu-box:8000/v1/", TOKEN)
    assert asked.url == "http://gpu-box:8000"
    assert asked.sends_in_the_clear
    assert TOKEN not in repr(asked)
    assert not Server.at("https://gpu-box", TOKEN).sends_in_the_clear
    assert not Server.at("http://127.0.0.1:8000", TOKEN).sends_in_the_clear
