"""`transformers serve` and `transformers chat` with a written folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "400"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["generate", "continuous batching"])
def server(chat_folder: Path, request, tmp_path_factory) -> Iterator[str]:
    """The address of a server of this folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modeling_mtt", "serve", str(chat_folder), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if request.param == "continuous batching":
        command += ["--continuous-batching", "--cb-num-blocks", "64", "--cb-block-size", "16"]
        command += ["--cb-max-batch-tokens", "64"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, process, log)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(120):
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
    pytest.fail(f"no answer in 60 seconds: {log.read_text()}")


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_serve(server, chat_folder, sample_texts):
    """The greedy text is the one that the sample learned by heart."""
    text = sample_texts[0]
    body = {"model": str(chat_folder), "max_tokens": 8, "temperature": 0}
    messages = [{"role": "user", "content": text["prompt"]}]
    answer = post(f"{server}/v1/chat/completions", {**body, "messages": messages})
    (choice,) = answer["choices"]
    assert choice["message"]["content"]
    assert text["text"].startswith(text["prompt"] + choice["message"]["content"])

    answer = post(f"{server}/v1/completions", {**body, "prompt": text["prompt"]})
    (completion,) = answer["choices"]
    assert completion["text"] == choice["message"]["content"]


def test_chat(server, chat_folder, sample_texts, tmp_path):
    text = sample_texts[0]
    command = [sys.executable, "-m", "modeling_mtt", "chat", str(chat_folder), server]
    result = subprocess.run(
        [*command, "do_sample=False", "max_new_tokens=8"],
        # No to "Continue generating?", which it asks at the limit.
        input=f"{text['prompt']}\nn\n!exit\n",
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert text["text"][len(text["prompt"]) :].split()[0] in result.stdout
