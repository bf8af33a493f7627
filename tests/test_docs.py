"""README and docs/: their commands run, their links lead somewhere, their lists are complete.

Commands run as they stand there, but for pip (which is how the tests got here) and mkdocs (which
`.ci/run` runs).
"""

import ast
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
from statistics import median

import pytest
from filelock import FileLock

from neuroada_serve.server.app import ROUTERS
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

# Names on the pages about the code that are none of a class, function or variable in it.
OF_OTHERS = {"W0", "system_fingerprint"}


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
    modules = re.findall(r"`((?!tests/)[a-z_]+(?:/\w+)*\.py)`", PAGES["docs/architecture.md"])
    named |= {f"neuroada_serve/{name}" for name in modules}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def results(name: str) -> dict:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def decode_ratio(name: str, popularity: str, k: int, peer: str | None = None) -> float:
    """Decoded tokens/s of 16 requests, of the base's, or of a peer's that does the same."""
    for case in results(name)["cases"]:
        keys = ("engine", "phase", "concurrency", "popularity", "k")
        if tuple(case[key] for key in keys) == ("neuroada", "decode", 16, popularity, k):
            ratios = case["ratio_to_peer"][peer] if peer else case["ratio_to_base"]
            return ratios["decode_tokens_per_s"]
    raise AssertionError(f"{name} has no such case")


def test_figures_of_readme_are_those_of_the_results():
    step_ms = {case: median(ms) for case, ms in results("gpu")["samples_ms"].items()}
    many = results("adapters")
    tokens_per_s = {c["case"]: c["tokens_per_s"] for c in many["throughput"]["cases"]}
    added_ms = many["cold"]["idle"]["added_ms"]
    swap, trained = results("merge")["swap"], results("training_gpu")["summary"]
    of_official = trained["neuroada k=8 (compiled)"]["of official k=8"]
    on_base = step_ms["decode/64/base"]
    figures = [
        *(f"k={k}: {decode_ratio('throughput_16', 'distinct', k):.3f}" for k in (1, 8)),
        *(f"k={k}: {decode_ratio('throughput_16', 'merged', k):.3f}" for k in (1, 8)),
        f"{decode_ratio('throughput', 'distinct', 1, 'vllm'):.2f} times",
        f"{decode_ratio('throughput_peft', 'distinct', 1, 'peft'):.0f} times",
        *(f"k={k}: {step_ms[f'decode/64/k{k}/64'] / on_base:.2f}" for k in (1, 8)),
        f"LoRA r=16: {step_ms['lora/64/64'] / on_base:.2f}",
        f"{step_ms['resident/many'] / step_ms['resident/few']:.3f}",
        f"{tokens_per_s['10000']:.0f}; {tokens_per_s['1']:.0f}",
        f"from host memory {added_ms['host']:.1f} ms, from disk {added_ms['disk']:.1f} ms",
        f"{swap['ours_ms']['k1']:.1f} ms; {swap['peft_lora_r8_ms']:.0f} ms",
        f"{of_official['step']:.2f} and {of_official['memory']:.2f}",
    ]
    rows = [row.split("|") for row in PAGES["README.md"].splitlines() if "](bench/results/" in row]
    assert len(rows) == 10
    written = [row[2] for row in rows]
    for figure in figures:
        row = next((row for row in written if figure in row), "")
        assert row, figure
        written[written.index(row)] = row.replace(figure, "", 1)  # each figure stands for one


def test_every_route_is_on_a_page():
    for router in ROUTERS:
        for route in router.routes:
            (method,) = route.methods
            path = re.sub(r":\w+}", "}", route.path)
            assert f"`{method} {path}`" in TEXT, f"no page has {method} {path}"


def test_names_on_the_pages_about_the_code_are_in_the_code():
    """Classes, their attributes, functions and constants."""
    nodes = [
        node
        for file in (ROOT / "neuroada_serve").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
    ]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    kinds = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr"}
    kinds |= dict.fromkeys((ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef), "name")
    names = {getattr(node, kinds[type(node)]) for node in nodes if type(node) in kinds}
    text = PAGES["docs/architecture.md"] + PAGES["docs/glossary.md"]
    said = set(re.findall(r"`(_?[A-Z]\w+(?:\.\w+)?|[a-z]+_\w+)`", text))
    assert len(said) > 50
    for name, _, attribute in (one.partition(".") for one in said - OF_OTHERS):
        assert name in names, name
        assert not attribute or attribute in ast.unparse(classes[name]), f"{name}.{attribute}"


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
