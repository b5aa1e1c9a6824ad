"""What goes to the Hub, seen by a server of this machine that stands in for it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from tiny_trials import Tiny

from bilora_ray.cli.main import main

TOKEN = "hf_" + "s" * 34
COMMIT, BASE_CARD = "c" * 40, b"---\nlicense: llama3\n---\n# A base model\n"


@dataclass
class Hub:
    """What was asked of the server, and what came of it."""

    address: str = ""
    asked: list[str] = field(default_factory=list)
    made: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    cards: list[str] = field(default_factory=list)
    broken: int | None = None

    def answer(self, path: str, body: bytes, token: str) -> tuple[int, dict[str, Any]]:
        """The status and the JSON for one request."""
        self.asked.append(path)
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if self.broken is not None:
            return self.broken, {"error": "no"}
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return 200, {"url": f"{self.address}/me/mine", "id": "me/mine", "name": "me/mine"}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return 200, {"warnings": [], "errors": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{self.address}/me/mine/commit/{'0' * 40}",
            }
        return 200, {"id": "me/mine", "sha": "1" * 40, "siblings": [], "private": True}


@pytest.fixture
def hub() -> Iterator[Hub]:
    seen = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "/resolve/" in self.path:
                return self._card(with_body=True)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = seen.answer(self.path.partition("?")[0], body, self.headers.get("Authorization", ""))
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return None

        do_POST = do_GET

        def do_HEAD(self) -> None:
            self._card(with_body=False)

        def _card(self, with_body: bool) -> None:
            """The card of a base model."""
            seen.asked.append(self.path)
            self.send_response(200)
            for key, value in {"X-Repo-Commit": COMMIT, "ETag": '"card"', "Content-Length": len(BASE_CARD)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if with_body:
                self.wfile.write(BASE_CARD)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield seen
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage path with a trial."""
    folder = tmp_path_factory.mktemp("runs")
    settings = tiny.config("causal-lm", max_steps=1, eval_steps=1).model_dump(exclude_unset=True)
    sets = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    result = CliRunner().invoke(main, ["train", "--name=one", f"--storage-path={folder}", *sets])
    assert result.exit_code == 0, result.stderr
    return folder


def exported(runs: Path, hub: Hub, here: Path, *more: str, token: str | None = TOKEN, **variables: str) -> Any:
    """`export` in a process of its own: huggingface_hub reads the server's address once."""
    home = {"HF_HOME": str(here / "hf"), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | home | variables
    if token is not None:
        environment["HF_TOKEN"] = token
    typed = ["export", "one", f"--storage-path={runs}", "--output=out", "--no-check", "--push-to-hub", *more]
    done = subprocess.run(
        [sys.executable, "-m", "bilora_ray", *typed], cwd=here, env=environment, capture_output=True, text=True
    )
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_what_was_exported_is_what_the_hub_gets(runs: Path, hub: Hub, tmp_path: Path) -> None:
    done = exported(runs, hub, tmp_path, "me/mine", "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["repository"] == f"{hub.address}/me/mine"
    (made,) = hub.made
    assert (made["name"], made["organization"], made["visibility"]) == ("mine", "me", "private")
    assert hub.files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    # The Hub was asked whether it takes the card's metadata.
    assert hub.cards == [(tmp_path / "out" / "README.md").read_text()]
    assert ModelCard(hub.cards[0]).data.library_name == "peft"
    assert not [name for name, text in hub.files.items() if str(runs).encode() in text or TOKEN.encode() in text]


def test_the_licence_of_a_base_of_the_hub_is_on_the_card(runs: Path, hub: Hub, tmp_path: Path) -> None:
    of_hub = shutil.copytree(runs, tmp_path / "runs")
    (adapter,) = (of_hub / "studies/one/trials/0000/adapters").iterdir()
    recipe = json.loads((adapter / "bilora_ray.json").read_text())
    recipe["settings"] |= {"model_name_or_path": "org/base", "model_revision": COMMIT}
    (adapter / "bilora_ray.json").write_text(json.dumps(recipe))
    done = exported(of_hub, hub, tmp_path, "me/mine")
    assert done.returncode == 0, done.stderr
    card = ModelCard(hub.files["README.md"].decode()).data
    assert (card.license, card.base_model, card.get("base_model_relation")) == ("llama3", "org/base", "adapter")
    settings = json.loads(hub.files["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "org/base"
    assert f"vllm serve org/base --revision {COMMIT} --enable-lora" in done.stdout
    assert f"It is at {hub.address}/me/mine" in done.stdout


@pytest.mark.parametrize(
    ("token", "line"),
    [
        (None, "nobody is logged in on the Hub; `hf auth login` does that, or a token in HF_TOKEN"),
        ("hf_wrong", "the Hub says no (Invalid user token. The token from HF_TOKEN environment variable is invalid."),
    ],
)
def test_who_is_not_logged_in_is_told_before_anything_is_written(
    token: str | None, line: str, runs: Path, hub: Hub, tmp_path: Path
) -> None:
    done = exported(runs, hub, tmp_path, "me/mine", token=token)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: --push-to-hub me/mine: {line}")
    assert (len(done.stderr.splitlines()), hub.made, (tmp_path / "out").exists()) == (1, [], False)


@pytest.mark.parametrize("status", [403, 500])
def test_what_the_hub_refuses_is_one_line_and_the_export_stays(
    status: int, runs: Path, hub: Hub, tmp_path: Path
) -> None:
    hub.broken = status
    done = exported(runs, hub, tmp_path, "me/mine")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("Note: ")]
    assert len(errors) == 1
    assert errors[0].startswith("Error: --push-to-hub me/mine: the Hub says no (")
    assert str(status) in errors[0]
    assert errors[0].endswith(f"; what was exported is in {tmp_path / 'out'}")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "variables", "line"),
    [
        (["a/b/c"], {}, "--push-to-hub a/b/c: is no name of a repository ("),
        (["me/mine"], {"HF_HUB_OFFLINE": "1"}, "--push-to-hub me/mine: HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_pushed_is_told_first(
    more: list[str], variables: dict[str, str], line: str, runs: Path, hub: Hub, tmp_path: Path
) -> None:
    done = exported(runs, hub, tmp_path, *more, **variables)
    assert (done.returncode, hub.asked, (tmp_path / "out").exists()) == (2, [], False)
    assert done.stderr.startswith(f"Error: {line}")


def test_private_says_nothing_without_a_repository(runs: Path) -> None:
    typed = ["export", "one", f"--storage-path={runs}", "--output=out", "--private"]
    result = CliRunner().invoke(main, typed)
    assert result.exit_code == 2
    assert "--private: says how a repository is made; give --push-to-hub too" in result.stderr
