"""A random storm: searches of 20 trials on a cluster of two nodes, where something is killed every few seconds.

    python -m chaos.storm --seconds 600 --seed 1

Whatever ends a search, it is resumed as a user would do it. When the time is over the last search may finish, and a
table says what was killed and what was lost; anything lost is exit code 1. One thing the storm spares: a trial that has
died `MAX_FAILURES` times since its last evaluation. To give up a trial after that is what a search is meant to do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from chaos.nodes import Nodes, free_port
from chaos.searches import IMPATIENT_COMMAND, Search, kill_searches
from chaos.soundness import KINDS, Finding, findings, torn
from mlflow_server import Server
from tiny_trials import Tiny, build

from bilora_ray.search.tuning import MAX_FAILURES
from bilora_ray.tracking.mlflow_tracker import AT_RESUME

NUM_TRIALS = 20
# Between two kills, in seconds.
CALM_S = (3.0, 9.0)
ORPHAN_WAIT_S = 60
# A head that is gone must end the search in this time, and a search that nothing is killed in anymore in that.
LOSS_TIMEOUT_S, FINISH_TIMEOUT_S = 120, 900
# How often a search may end without having finished, with nothing killed in between, before it counts as lost.
PATIENCE = 3


class Storm:
    """Kills, and what they were done to.

    Args:
        folder: of the searches and of MLflow's store.
        tiny: model and data of the trials.
        nodes: the cluster.
        server: MLflow's.
        seed: decides what is killed when, as far as a machine is punctual.
        seconds: how long it blows.
    """

    def __init__(self, folder: Path, tiny: Tiny, nodes: Nodes, server: Server, seed: int, seconds: float) -> None:
        self.folder, self.tiny, self.nodes, self.server = folder, tiny, nodes, server
        self.random = Random(seed)
        self.ends_at = time.monotonic() + seconds
        self.kills: Counter[str] = Counter()
        self.searches: list[Search] = []
        self.found: list[Finding] = []
        # Of each trial that was hit: its evaluations at that time, and how often since.
        self.hits: dict[int, tuple[int, int]] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.reports_at_start = 0
        self.log_at_start = 0

    def blow(self) -> None:
        """Run searches, one after another, until the time is over and the last of them is done."""
        while time.monotonic() < self.ends_at:
            number = len(self.searches)
            workers = 1 + number % 2
            self.searches.append(
                Search(
                    self.folder / f"storm-{number}",
                    self.tiny,
                    name=f"storm-{number}",
                    num_trials=NUM_TRIALS,
                    workers=workers,
                    max_steps=400 // workers,
                    eval_steps=20 // workers,
                    scheduler=self.random.choice(("asha", "none")),
                    options=("--ray-address", self.nodes.address, "--mlflow-uri", self.server.uri),
                    mlflow_uri=self.server.uri,
                    command=IMPATIENT_COMMAND,
                )
            )
            if not self.search_through(self.searches[-1]):
                self.found.append(("trials lost", f"{self.searches[-1].name} does not finish"))
                return
            self.found += findings(self.searches[-1])

    def search_through(self, search: Search) -> bool:
        """Run `search`, with kills while there is time, until it is done; whether it was."""
        fruitless = 0
        self.start(search)
        while fruitless < PATIENCE:
            finishing = time.monotonic() >= self.ends_at
            code = self.wait(FINISH_TIMEOUT_S if finishing else self.random.uniform(*CALM_S))
            if code == 0 and AT_RESUME not in search.log[self.log_at_start :]:
                return True
            if code is not None:
                say(f"{search.name} ended with code {code}: {last_line(search)}")
                fruitless += code != 0
                self.start(search)
            elif finishing:
                say(f"{search.name} still runs after {FINISH_TIMEOUT_S} s")
                return False
            elif self.kill(search):
                fruitless = 0
        return False

    def start(self, search: Search) -> None:
        """Start `search`, or go on with it if it has begun."""
        self.hits.clear()
        self.reports_at_start = search.reports()
        self.log_at_start = len(search.log) if (search.folder / "log").exists() else 0
        self.process = search.start(*(["--resume"] if search.trials() else []))

    def wait(self, seconds: float) -> int | None:
        """The exit code of the search, if it ends in that time."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, search: Search) -> bool:
        """Kill one thing, of a random kind; whether there was one."""
        kinds: dict[str, tuple[int, Callable[[Search], bool]]] = {
            "trial process": (4, lambda search: self.kill_process(search, "ImplicitFunc")),
            "Train worker": (3, lambda search: self.kill_process(search, "RayTrainWorker")),
            "Train controller": (2, lambda search: self.kill_process(search, "TrainController")),
            "node": (2, self.kill_node),
            "search": (2, self.kill_search),
            "head": (1, self.kill_head),
            "MLflow server": (2, self.kill_server),
        }
        while kinds:
            (kind,) = self.random.choices(list(kinds), [weight for weight, _ in kinds.values()])
            _, kill = kinds.pop(kind)
            if kill(search):
                self.kills[kind] += 1
                say(f"{search.name}: killed: {kind}")
                return True
        return False

    def kill_process(self, search: Search, what: str) -> bool:
        """Kill one of the processes that Ray calls `what`."""
        victims = self.nodes.processes(what)
        if not victims:
            return False
        victim = self.random.choice(sorted(victims, key=lambda process: process.pid))
        if not self.may_hit(search, *search.trained_by([victim])):
            return False
        victim.kill()
        return True

    def kill_node(self, search: Search) -> bool:
        """Kill the node that is not the head, and start another one."""
        if not self.may_hit(search):
            return False
        self.nodes.remove(self.nodes.others[0])
        self.nodes.add()
        return True

    def kill_search(self, search: Search) -> bool:
        """Kill the search, and go on with it."""
        if not self.has_moved(search):
            return False
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        if self.random.random() < 0.5:  # else the next search begins while the trials of this one may still write
            for number in search.in_flight():
                with search.trial(number).lock(ORPHAN_WAIT_S):
                    pass
            self.found += torn(search)
        self.start(search)
        return True

    def kill_head(self, search: Search) -> bool:
        """Kill the head, see the search end by itself, and go on with it on a new head."""
        if not self.has_moved(search):
            return False
        self.nodes.kill_head()
        if self.wait(LOSS_TIMEOUT_S) is None:
            self.found.append(("trials lost", f"{search.name} does not end without a head"))
        self.nodes.kill_all()
        kill_searches()
        self.nodes.start_head()
        self.nodes.add()
        self.start(search)
        return True

    def kill_server(self, search: Search) -> bool:
        """Kill the MLflow server, and start it again some seconds later. Without one a search does not begin."""
        if not self.has_moved(search):
            return False
        self.server.kill()
        time.sleep(self.random.uniform(*CALM_S))
        self.server.start()
        return True

    def has_moved(self, search: Search) -> bool:
        """Whether the search has got anything done since it was started: one that never gets there never ends."""
        return search.reports() > self.reports_at_start

    def may_hit(self, search: Search, *numbers: int) -> bool:
        """Note that trials will die, by default all that run; False if one of them has died too often already."""
        running = {trial.number: trial for trial in search.trials() if not trial.state.is_finished()}
        hits = {}
        for number in numbers or running:
            reports = len(running[number].intermediate_values) if number in running else 0
            before, count = self.hits.get(number, (reports, 0))
            hits[number] = (reports, 1 if reports > before else count + 1)
        if any(count > MAX_FAILURES for _, count in hits.values()):
            return False
        self.hits.update(hits)
        return True

    def table(self) -> str:
        """What was done, and what came of it."""
        lines = [f"{'killed: ' + kind:<32}{count:>5}" for kind, count in sorted(self.kills.items())]
        lines += [f"{'searches':<32}{len(self.searches):>5}", f"{'trials':<32}{NUM_TRIALS * len(self.searches):>5}"]
        counts = Counter(kind for kind, _ in self.found)
        return "\n".join([*lines, *(f"{kind:<32}{counts[kind]:>5}" for kind in KINDS)])


def last_line(search: Search) -> str:
    """What a search said last."""
    return next((line for line in reversed(search.log.splitlines()) if line.strip()), "nothing")


def say(line: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main() -> None:
    """Read the options, blow, and print the table."""
    parser = argparse.ArgumentParser(description="Kill parts of searches at random, and see what is lost.")
    parser.add_argument("--seconds", type=float, default=600, help="how long to kill  [600]")
    parser.add_argument("--seed", type=int, default=1, help="of what is killed when  [1]")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    (folder / "tiny").mkdir()
    tiny = build(folder / "tiny")
    with Server.of(folder, free_port()) as server, Nodes(others=1) as nodes:
        storm = Storm(folder, tiny, nodes, server, options.seed, options.seconds)
        try:
            storm.blow()
        finally:
            kill_searches()
    print(f"\n{storm.table()}")
    for kind, what in storm.found:
        print(f"{kind}: {what}")
    print(f"Everything is in {folder}")
    sys.exit(1 if storm.found else 0)


if __name__ == "__main__":
    main()
