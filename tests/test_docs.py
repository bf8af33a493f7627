"""README and docs/: their commands run, their links lead somewhere, their lists are complete.

Commands run as they stand there, but for pip (which is how the tests got here) and mkdocs (which
`.ci/run` runs).
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from neuroada_serve.server.protocol import _SAMPLING_FIELDS, WITHOUT_EFFECT, GenerationRequest
from tests.support.pages import BLOCKS, PAGES, ROOT, TEXT, block_with, blocks

# Words of each block of commands that a test here runs.
RUN = (
    "&& neuroada demo",
    "--adapter sql=",
    "/v1/chat/completions",
    "| neuroada chat",
    "--allow-runtime-adapters\n",
    "--publish http",
    "/v1/load_lora_adapter",
    "triage.py --out rows",
    "--task-type SEQ_CLS",
    "/v1/classify",
)


@pytest.fixture
def clone(tmp_path):
    """A folder that looks like the clone, in which commands may write."""
    for name in ("examples", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def environment() -> dict[str, str]:
    """Variables with which `neuroada` and `python` are those of this environment."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command: str, cwd: Path) -> str:
    result = subprocess.run(
        ["bash", "-euc", command], cwd=cwd, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def run_python(text: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", text], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_every_block_of_commands_is_run():
    for text in blocks("bash"):
        assert text.startswith("pip install") or any(words in text for words in RUN), text
    for words in RUN:
        assert any(words in text for text in blocks("bash")), words


def test_every_python_block_is_run():
    run_here = ("LLM(", "answer = client", "stream=True", "import LLM, Adapter")
    for text in blocks("python"):
        assert any(words in text for words in run_here), text


def test_the_two_commands_are_the_promised_ones():
    in_readme = [block.text for block in BLOCKS if block.page == "README.md"]
    assert "pip install -c constraints.txt -e . && neuroada demo\n" in in_readme
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -q -n 2\n' in in_readme


def test_demo_runs_and_shows_what_pages_show(clone):
    """But for times, and for what the base answers: near-ties differ between processors."""
    shown = re.sub(r"\d+ ms", "N ms", run("neuroada demo", clone))
    for page in ("README.md", "docs/quickstart.md"):
        (output,) = [block.text for block in BLOCKS if block.page == page and "┏" in block.text]
        for line in re.sub(r"\d+ ms", "N ms", output).splitlines()[-5:]:
            assert line in shown
    assert "tokens/s" in shown


def test_chat_answers_in_a_pipe(clone):
    assert len(run(block_with("| neuroada chat"), clone).split()) > 3


def test_training_commands_run(clone):
    """With fewer steps than on the page: the commands work; what they teach is not shown."""
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
    with served("neuroada serve demo --adapter-dir served", clone):
        assert len(json.loads(run(block_with("/v1/classify"), clone))["data"]) == 2


def test_files_that_are_named_in_commands_exist_or_are_written_there():
    commands = "\n".join(block.text for block in BLOCKS if block.language in ("bash", "console"))
    made = set(re.findall(r"--out (\S+)", commands)) | {"served", "rows"}
    for name in re.findall(r"--(?:eval-)?data (\S+)", commands):
        assert (ROOT / name).exists() or name.split("/")[0] in made or name.isupper(), name


def test_python_example_runs(clone):
    assert run_python(block_with("import LLM, Adapter", "python"), clone) == ""
    shown = run_python(block_with("LLM(", "python"), clone)
    assert re.search(r"^sql SELECT .* stop$", shown, re.MULTILINE)
    assert re.search(r"^triage \w+ stop$", shown, re.MULTILINE)


@contextmanager
def served(command, cwd):
    """A server of a command on a page, ready, for the length of a block.

    Pages name port 8000: processes of tests take turns with it.
    """
    lock = FileLock(Path(tempfile.gettempdir()) / "neuroada-tests-port-8000.lock")
    with (
        lock,
        subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=cwd,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        ) as server,
    ):
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


def test_serve_and_ask(clone):
    with served(block_with("--adapter sql="), clone):
        assert "SELECT" in run(block_with("/v1/chat/completions"), clone)
        assert "SELECT" in run_python(block_with("answer = client", "python"), clone)
        assert "Rome" in run_python(block_with("stream=True", "python"), clone)


def test_adapters_are_unloaded_and_loaded(clone):
    with served(block_with("--adapter-dir examples/adapters"), clone):
        assert "added successfully" in run(block_with("/v1/load_lora_adapter"), clone)


def test_a_spreadsheet_becomes_a_served_adapter_with_two_commands(clone):
    """With fewer steps than on the page: the commands work; what they teach is not shown."""
    train, serve = block_with("served --allow-runtime-adapters").splitlines()
    assert "exact match" in run(f"{train} --max-steps 3", clone)
    ask = (
        "curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json'"
        """ -d '{"model": "team", "prompt": "My parcel is lost.", "max_tokens": 4}'"""
    )
    with served(serve, clone):
        before = json.loads(run(ask, clone))
        assert before["model"] == "team"
        assert before["usage"]["completion_tokens"] >= 1
        short = "--max-steps 2 --samples 0 --eval-fraction 0.01 --batch-size 1"
        run(f"{block_with('--publish http').strip()} {short}", clone)
        after = json.loads(run(ask, clone))
    assert after["system_fingerprint"] != before["system_fingerprint"]


def test_every_listed_file_is_there_and_every_module_is_listed():
    tree = block_with("engine/llm.py", "text")
    listed = set(re.findall(r"^ *([\w/]+(?:\.py|/)) ", tree, re.MULTILINE))
    for name in sorted(listed):
        assert (ROOT / "neuroada_serve" / name).exists() or (ROOT / name).exists(), name
    for file in (ROOT / "neuroada_serve").rglob("*.py"):
        name = file.relative_to(ROOT / "neuroada_serve")
        if file.name in ("__init__.py", "__main__.py"):
            continue
        assert str(name) in listed, f"docs/architecture.md does not list {name}"


def test_paths_on_pages_exist():
    named = set(re.findall(r"`((?:bench|docs|examples|neuroada_serve|tests|\.ci)/[\w./-]+)`", TEXT))
    for name in re.findall(r"-m bench\.([a-z_]+)", TEXT):
        folder = ROOT / "bench" / name
        named.add(f"bench/{name}/__main__.py" if folder.is_dir() else f"bench/{name}.py")
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_links_of_readme_lead_somewhere():
    """Those of docs/ are checked when the site is built."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", PAGES["README.md"]):
        assert (ROOT / target).is_file(), target
        headings = re.findall(r"^#+ (.*)$", PAGES.get(target, ""), re.MULTILINE)
        anchors = {
            re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
        }
        assert not anchor or anchor in anchors, f"{target}#{anchor}"


def test_fields_without_effect_are_named_and_no_others():
    (sentence,) = re.findall(r"accepted without effect: (.*?)\.", TEXT, re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", sentence)) == WITHOUT_EFFECT
    used = set(GenerationRequest.model_fields) - {"model", "stream", "stream_options"}
    used -= {"max_tokens", "logit_bias", "cache_salt", *WITHOUT_EFFECT}
    assert used == set(_SAMPLING_FIELDS)  # so all others have one
