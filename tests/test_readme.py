"""README's commands, run as they stand there (but for pip, which is how the tests got here)."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from neuroada_serve.server.protocol import _SAMPLING_FIELDS, WITHOUT_EFFECT, GenerationRequest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BASH = [text for language, text in BLOCKS if language == "bash"]


@pytest.fixture
def clone(tmp_path):
    """A folder that looks like the clone, in which commands may write."""
    for name in ("examples", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(command: str, cwd: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-euc", command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def block_with(word: str) -> str:
    (block,) = [block for block in BASH if word in block]
    return block


def test_the_two_commands_are_the_promised_ones():
    assert "pip install -c constraints.txt -e . && neuroada demo\n" in BASH
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -q -n 2\n' in BASH


def test_demo_runs(clone):
    shown = run("neuroada demo", clone)
    assert "Unmerged bit for bit." in shown
    assert "tokens/s" in shown


def test_chat_answers_in_a_pipe(clone):
    assert len(run(block_with("neuroada chat"), clone).split()) > 3


def test_training_commands_run(clone):
    """With fewer steps than README's: it shows that the commands work, not what they teach."""
    block = block_with("triage.py --out rows")
    assert block.count("--max-steps 100") == 1
    generate, train = block.split("\n", 1)
    run(generate, clone)
    rows = clone / "rows" / "triage.heldout.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:8]))
    shown = run(train.replace("--max-steps 100", "--max-steps 3"), clone)
    assert "exact match" in shown
    assert (clone / "my-triage" / "loss.png").is_file()


def test_classifier_commands_run(clone):
    train, classify, score = block_with("--task-type SEQ_CLS").splitlines()
    run(f"{train} --max-steps 2", clone)
    assert "\t" in run(classify, clone)
    assert "accuracy" in run(score, clone)


def test_files_that_are_named_in_commands_exist_or_are_written_there():
    commands = "\n".join(text for language, text in BLOCKS if language in ("bash", ""))
    made = set(re.findall(r"--out (\S+)", commands)) | {"served", "rows"}
    for name in re.findall(r"--(?:eval-)?data (\S+)", commands):
        assert (ROOT / name).exists() or name.split("/")[0] in made or name.isupper(), name


def test_python_example_runs(clone):
    (example,) = [text for language, text in BLOCKS if language == "python"]
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=clone, capture_output=True, text=True, check=True
    )
    assert re.search(r"^sql SELECT .* stop$", result.stdout, re.MULTILINE)
    assert re.search(r"^triage \w+ stop$", result.stdout, re.MULTILINE)


@contextmanager
def served(command, cwd):
    """A server of README's command, ready, for the length of a block."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=cwd,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr is not None
        seen = []
        for line in server.stderr:
            seen.append(line)
            if line.startswith("Serving"):
                break
        else:
            raise AssertionError("".join(seen))
        reader = threading.Thread(target=server.stderr.read, daemon=True)
        reader.start()
        try:
            yield
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(120) == 0
            reader.join(120)


@pytest.mark.parametrize(
    ("serve", "requests", "expected"),
    [
        ("--adapter sql=", "/v1/chat/completions", "SELECT"),
        ("--allow-runtime-adapters", "load_lora_adapter", "added successfully"),
    ],
)
def test_serve_and_curl(clone, serve, requests, expected):
    with served(block_with(serve), clone):
        assert expected in run(block_with(requests), clone)


def test_a_spreadsheet_becomes_a_served_adapter_with_two_commands(clone):
    """With fewer steps than README's: it shows that the commands work, not what they teach."""
    train, serve = block_with("--columns prompt=ticket").splitlines()
    assert "exact match" in run(f"{train} --max-steps 3", clone)
    with served(serve, clone):
        answer = run(
            "curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json'"
            """ -d '{"model": "team", "prompt": "My parcel is lost.", "max_tokens": 4}'""",
            clone,
        )
    assert json.loads(answer)["model"] == "team"
    assert json.loads(answer)["usage"]["completion_tokens"] >= 1


def test_every_listed_file_is_there_and_every_module_is_listed():
    (tree,) = [text for _, text in BLOCKS if "engine/llm.py" in text]
    listed = set(re.findall(r"[\w/]+(?:\.py|/)", tree)) - {"neuroada_serve/"}
    for name in sorted(listed):
        assert (ROOT / "neuroada_serve" / name).exists() or (ROOT / name).exists(), name
    for file in (ROOT / "neuroada_serve").rglob("*.py"):
        name = file.relative_to(ROOT / "neuroada_serve")
        if file.name in ("__init__.py", "__main__.py"):
            continue
        assert str(name) in listed, f"{name} is missing from README's tree"


def test_fields_without_effect_are_named_and_no_others():
    (sentence,) = re.findall(r"accepted without effect: (.*?)\.", README, re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", sentence)) == WITHOUT_EFFECT
    used = set(GenerationRequest.model_fields) - {"model", "stream", "stream_options"}
    used -= {"max_tokens", "logit_bias", "cache_salt", *WITHOUT_EFFECT}
    assert used == set(_SAMPLING_FIELDS)  # so all others have one
