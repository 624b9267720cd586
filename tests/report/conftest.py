"""Synthetic run folders (the trainer's format, invented numbers) and a headless browser."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ENV = {
    "versions": {"python": "3.12.1", "torch": "2.13.0", "s2sam": "0.1.0"},
    "hardware": {"cpu": "a processor", "cores": 2},
}
LAYERS = {"body.fc1": 0.3, "body.fc2": 0.08, "classifier": 0.6}
STEP_SECONDS = {"none": 0.010, "s2sam": 0.011, "sam": 0.020}


def config_of(method: str = "dense", sharpness: str = "none", seed: int = 0, **changes: Any) -> dict[str, Any]:
    config = {
        "data": "digits",
        "model": "mlp",
        "method": method,
        "sparsity": 0.9,
        "sharpness": sharpness,
        "rho": 0.05,
        "epochs": 8,
        "batch_size": 64,
        "lr": 0.1,
        "seed": seed,
        "out": f"runs/{method}-{sharpness}-{seed}",
        "sam": {"direction": "gradient", "sign": 1, "scale": "norm", "stats_every": 5},
        "sparse": {"distribution": "erk", "options": {}},
        "optim": {"name": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 0.0005},
    }
    return config | changes


def records_of(config: dict[str, Any], top1: float) -> list[dict[str, Any]]:
    rng = random.Random(f"{config['method']}{config['sharpness']}{config['seed']}")
    epochs, per_epoch, dense = config["epochs"], 20, config["method"] == "dense"
    steps = epochs * per_epoch
    sparsity = 0.0 if dense else config["sparsity"]
    records: list[dict[str, Any]] = []
    moving = config["method"] == "rigl"
    for step in range(0, steps, 5):
        record = {
            "kind": "step",
            "step": step,
            "epoch": step // per_epoch + 1,
            "loss": 2.3 * math.exp(-4 * step / steps),
            "lr": 0.1,
        }
        if config["sharpness"] != "none":
            record |= {
                "displacement": config["rho"] if step else 0.0,
                "projection": config["rho"] if step else 0.0,
                "gradient_norm": 1 + rng.random(),
                "alignment": 0.1 + 0.1 * rng.gauss(0, 1),
                "skipped": 0.0,
            }
        records.append(record)
        if not dense and step % per_epoch == 0:
            share = step / steps if moving else 0.0
            records.append(
                {
                    "kind": "topology",
                    "step": step,
                    "density": dict(LAYERS),
                    "dropped": 30 if share else 0,
                    "grown": 30 if share else 0,
                    "survival": 1 - 0.5 * share,
                    "explored": 0.1 + 0.3 * share,
                }
            )
    for epoch in range(1, epochs + 1):
        shortfall = 0.6 * math.exp(-8 * epoch / epochs) + 0.004 * rng.random() * (epoch < epochs)
        records.append(
            {
                "kind": "epoch",
                "epoch": epoch,
                "step": epoch * per_epoch,
                "train_loss": 2.3 * math.exp(-5 * epoch / epochs) * (1 + 0.1 * rng.random()),
                "train_top1": 1 - shortfall / 2,
                "val_loss": 0.1,
                "val_top1": top1 - shortfall,
                "test_loss": 0.1 + 2 * shortfall * (1 + 0.1 * rng.random()),
                "test_top1": top1 - shortfall if epoch < epochs else top1,
                "lr": 0.1,
                "sparsity": sparsity,
                "seconds": 0.5,
                "images_per_second": 2000.0,
            }
        )
    final = {
        "kind": "final",
        "test_top1": top1,
        "test_loss": 0.1,
        "val_top1": top1,
        "best_epoch": epochs,
        "best_val_top1": top1,
        "best_test_top1": top1,
        "sparsity": sparsity,
        "parameters": 1000,
        "active_parameters": int(1000 * (1 - sparsity)),
        "step_seconds": STEP_SECONDS.get(config["sharpness"], 0.01),
        "train_images": 1293,
        "test_images": 360,
        "n_steps": steps,
    }
    return [*records, final]


def write_run(
    root: Path, method: str = "dense", sharpness: str = "none", seed: int = 0, *, top1: float = 0.95, **changes: Any
) -> Path:
    """A finished run folder under `root`; `changes` go into its configuration."""
    config = config_of(method, sharpness, seed, **changes)
    folder = root / f"{method}-{sharpness}-{seed}-{len(list(root.glob('*')))}".replace("/", "_")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "env.json").write_text(json.dumps(ENV), encoding="utf-8")
    lines = [json.dumps(record) for record in records_of(config, top1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "DONE").touch()
    return folder


def write_design(root: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> list[Path]:
    """The seven arms of the demo with invented accuracies: SAM is worse on RigL, nothing else differs clearly."""
    shift = {("rigl", "sam"): -0.05}
    folders = []
    for method in ("dense", "rigl", "static"):
        for sharpness in ("none",) if method == "dense" else ("none", "s2sam", "sam"):
            for seed in seeds:
                noise = random.Random(f"{method}{sharpness}{seed}").choice([-2, -1, 0, 1, 2]) / 360
                top1 = round(340 / 360 + noise + shift.get((method, sharpness), 0.0), 6)
                folders.append(write_run(root, method, sharpness, seed, top1=top1))
    return folders


@pytest.fixture
def make_run(tmp_path):
    return lambda *args, **kwargs: write_run(tmp_path, *args, **kwargs)


@pytest.fixture(scope="session")
def run_writer():
    """Writes a finished run under the folder it is given; see `write_run`."""
    return write_run


@pytest.fixture(scope="session")
def design(tmp_path_factory):
    """Folders of 21 finished runs: seven arms, three seeds."""
    return write_design(tmp_path_factory.mktemp("design"))


@pytest.fixture(scope="session")
def design_table(design):
    """The table of the 21 runs."""
    from s2sam.report.write import make_table

    return make_table(design)


@pytest.fixture(scope="session")
def design_page(design_table):
    """The page of the 21 runs, as text."""
    from s2sam.report.html import render

    return render(design_table, how="s2sam demo", remarks=["A remark."])


class Browser:
    """Headless Chromium, spoken to over its debugging pipe: messages are JSON objects that end with a zero byte."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --no-first-run --no-default-browser-check "
        "--disable-background-networking "
        "--disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage --mute-audio "
        "--remote-debugging-pipe"
    )
    CHILD = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], "
        "sys.argv[3:])"
    )

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]
        command = [
            sys.executable,
            "-c",
            self.CHILD,
            *map(str, high),
            program,
            *self.FLAGS.split(),
            f"--user-data-dir={profile}",
        ]
        self._process = subprocess.Popen(
            command, pass_fds=high, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._buffer, self._count, self.events, self.session = b"", 0, [], ""

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda m: m.get("id") == message["id"])
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, wanted: Any, seconds: float = 60.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self._buffer:
                raw, self._buffer = self._buffer.split(b"\0", 1)
                message = json.loads(raw)
                self.events.append(message)
                if wanted(message):
                    return message
            left = end - time.monotonic()
            ready = select.select([self._in], [], [], max(left, 0))[0]
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("the browser did not answer")
            self._buffer += data

    def open(self, url: str, *, width: int = 1280, dark: bool = False) -> tuple[list[str], list[str], Any]:
        """Load `url`; returns console errors, requested addresses (not its own) and a function that runs JavaScript."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.call(f"{domain}.enable", session)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", session, features=scheme)
        self.events.clear()
        self.call("Page.navigate", session, url=url)
        if not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self._until(lambda m: m.get("method") == "Page.loadEventFired")

        def evaluate(script: str) -> Any:
            return self.call("Runtime.evaluate", session, expression=script, awaitPromise=True, returnByValue=True)[
                "result"
            ].get("value")

        evaluate("new Promise(done => setTimeout(done, 250))")  # late requests and errors
        errors, requests = [], []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                errors.append(params["exceptionDetails"]["text"])
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert", "warning"):
                errors.append(str(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                errors.append(params["entry"]["text"])
            elif method == "Network.requestWillBeSent" and params["request"]["url"] != url:
                requests.append(params["request"]["url"])
        return errors, [r for r in requests if not r.startswith("data:")], evaluate

    def point(self, x: float, y: float) -> None:
        """Move the pointer there, on the page that was opened last."""
        self.call("Input.dispatchMouseEvent", self.session, type="mouseMoved", x=x, y=y)

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium; named by S2SAM_CHROMIUM or found on PATH."""
    names = [os.environ.get("S2SAM_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(
            "no Chromium found: install the system package chromium or set S2SAM_CHROMIUM to open the report in a "
            "browser"
        )
    chromium = Browser(program, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()
