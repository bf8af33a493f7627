"""README's first command in a new environment, then each extra alone. Standard library only.

1. An environment with the core alone and empty caches: README's first command, as it stands there.
2. For each extra: what it is for ends in one sentence that names it where it lacks, and runs in an
   environment of the core and that extra.
3. The wheel, outside the clone: it has the shipped adapters.

Environments of extras see the core's packages through a .pth file, so that each installs only what
its extra adds. Two are checked at a time.
"""

import os
import re
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = "pip install -c constraints.txt -e . && neuroada demo"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TICKETS = ROOT / "examples" / "data" / "tickets.csv"
COLUMNS = "--columns prompt=ticket,completion=team"
TRAIN = f"neuroada train demo --data tickets.csv {COLUMNS} --max-steps 2 --out"
EVAL = f"neuroada eval demo {COLUMNS} --limit 2"
SERVING = "neuroada bench serving --model demo --rounds 1"

# Of each extra: a command that needs it, and what shows that it ran.
NEEDS = {
    "train": (f"{TRAIN} team && ls team", "loss.png"),
    "quantize": (f"{TRAIN} team --quantize int8", "Adapter written"),
    "parquet": (f"{EVAL} --data tickets.parquet", "exact"),
    "hub": (f"{EVAL} --data hub:{{here}}/set", "exact"),
    "bench": (f"{SERVING} --num-prompts 2 --num-adapters 1", "completed"),
}


def main(work: Path) -> None:
    extras = sorted(set(EXTRAS) - {"test", "docs"})  # these two are for developers
    assert extras == sorted(NEEDS), "an extra has no check here"
    check_core(work)
    checks = [partial(check_extra, extra, work) for extra in extras]
    checks.append(partial(check_wheel, work))
    with ThreadPoolExecutor(2) as pool:
        for checked in [pool.submit(check) for check in checks]:
            checked.result()


def check_core(work: Path) -> None:
    with step("README's first command, the core alone, empty caches"):
        core = make(work / "core")
        assert f"\n{FIRST}\n" in (ROOT / "README.md").read_text()
        shown = run(FIRST, core, work, cwd=ROOT, show=True)
        assert "Unmerged bit for bit." in shown
        only_in_extras = {name_of(r) for extra in EXTRAS.values() for r in extra}
        found = installed(core, work) & (only_in_extras - needed_by_core(core, work))
        assert not found, f"the core's environment has packages of extras: {found}"


def check_extra(extra: str, work: Path) -> None:
    here = work / f"{extra}-data"
    (here / "set").mkdir(parents=True)
    few = "".join(TICKETS.read_text().splitlines(keepends=True)[:25])
    for file in (here / "tickets.csv", here / "set" / "train.csv"):
        file.write_text(few)
    command, sign = NEEDS[extra]
    command = command.format(here=here)
    (here / "tickets.parquet").write_bytes(b"PAR1")  # rows once there is pyarrow to write them
    with step(f"without the extra {extra}: a sentence") as checking:
        said = run(command, work / "core", work, cwd=here, code=2)
        assert "Traceback" not in said, said
        (error,) = (line for line in said.splitlines() if line.startswith("Error: "))
        # --quantize trains, so it asks for what training needs first.
        wanted = ("train", "quantize") if extra == "quantize" else (extra,)
        assert any(f"neuroada-serve[{name}]" in error for name in wanted), said
        checking.says(error)
    with step(f"the extra {extra} alone"):
        environment = layered(work / extra, work / "core")
        install(environment, requirements(extra), work)
        if extra == "parquet":
            run(f"python -c '{TO_PARQUET}' tickets.csv tickets.parquet", environment, work, here)
        shown = run(command, environment, work, cwd=here)
        assert sign in shown, shown


def check_wheel(work: Path) -> None:
    with step("the wheel, outside the clone"):
        run(f"pip wheel --quiet --no-deps -w {work}/wheels .", work / "core", work, cwd=ROOT)
        environment = layered(work / "wheel", work / "core")
        (wheel,) = (work / "wheels").glob("neuroada_serve-*.whl")
        install(environment, ["--no-deps", "--force-reinstall", str(wheel)], work)
        shown = run(f"python -c '{SHIPPED}'", environment, work, cwd=work)
        assert "4 adapters" in shown, shown


TO_PARQUET = (
    "import sys; from pyarrow import csv, parquet; "
    "parquet.write_table(csv.read_csv(sys.argv[1]), sys.argv[2])"
)
SHIPPED = (
    "import sys; from pathlib import Path; import neuroada_serve; "
    "from neuroada_serve import load_adapter; "
    "from neuroada_serve.demo import find_examples; "
    "assert sys.prefix in neuroada_serve.__file__, neuroada_serve.__file__; "
    "folder = find_examples(); "
    "assert folder.is_relative_to(sys.prefix), folder; "
    'found = [load_adapter(path) for path in (folder / "adapters").iterdir()]; '
    'print(len(found), "adapters")'
)


class step:
    """Says what was done and how long it took, when it ends."""

    def __init__(self, title: str) -> None:
        self._lines = [f"--- {title}"]

    def says(self, line: str) -> None:
        self._lines.append(f"    {line}")

    def __enter__(self) -> "step":
        self._started = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.says(f"{'FAILED after ' if kind else ''}{time.monotonic() - self._started:.0f} s")
        print("\n".join(self._lines), flush=True)


def make(environment: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    return environment


def site_packages(environment: Path) -> Path:
    (found,) = (environment / "lib").glob("python*/site-packages")
    return found


def layered(environment: Path, below: Path) -> Path:
    """An environment that sees all that `below` has."""
    make(environment)
    line = f"import site; site.addsitedir({str(site_packages(below))!r})\n"
    (site_packages(environment) / "below.pth").write_text(line)
    return environment


def requirements(extra: str) -> list[str]:
    """What an extra adds, with what other extras do that it names."""
    found = []
    for requirement in EXTRAS[extra]:
        if named := re.fullmatch(r"neuroada-serve\[(.*)\]", requirement):
            found += [r for other in named[1].split(",") for r in requirements(other)]
        else:
            found.append(requirement)
    return found


def install(environment: Path, wanted: list[str], work: Path) -> None:
    words = " ".join(f"'{word}'" for word in wanted)
    run(f"pip install --quiet -c constraints.txt {words}", environment, work, cwd=ROOT)


def name_of(requirement: str) -> str:
    (name,) = re.findall(r"^[\w.-]+", requirement)
    return name.lower().replace("_", "-")


def installed(environment: Path, work: Path) -> set[str]:
    listed = run("pip list --format=freeze", environment, work, cwd=ROOT)
    lines = [line for line in listed.splitlines() if "==" in line]
    return {line.partition("==")[0].lower().replace("_", "-") for line in lines}


def needed_by_core(environment: Path, work: Path) -> set[str]:
    """Packages that the core brings along although an extra names them too."""
    shown = run(f"python -c '{CLOSURE}'", environment, work, cwd=ROOT)
    return set(shown.split())


CLOSURE = """
import re
from importlib.metadata import PackageNotFoundError, requires
seen, todo = set(), ["neuroada-serve"]
while todo:
    name = todo.pop()
    if name in seen:
        continue
    seen.add(name)
    try:
        wanted = requires(name) or []
    except PackageNotFoundError:
        continue
    plain = [r for r in wanted if "extra ==" not in r]
    todo += [re.match(r"[\\w.-]+", r)[0].lower().replace("_", "-") for r in plain]
print(*seen)
"""


def run(
    command: str, environment: Path, work: Path, cwd: Path, code: int = 0, show: bool = False
) -> str:
    """What a command prints, in an environment, with caches of this run's own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NEUROADA", "HF_"))}
    caches = {
        "XDG_CACHE_HOME": f"{work}/cache",
        "HF_HOME": f"{work}/cache/huggingface",
        "NUMBA_CACHE_DIR": f"{work}/cache/numba",
        "MPLCONFIGDIR": f"{work}/cache/matplotlib",
    }
    path = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "COLUMNS": "100"}
    if "neuroada " in command and environment.name != "core":
        command = command.replace("neuroada ", "python -m neuroada_serve ")
    result = subprocess.run(
        ["bash", "-euc", command],
        cwd=cwd,
        env=kept | caches | path | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if show:
        print(result.stdout, flush=True)
    assert result.returncode == code, f"{command}: {result.returncode}\n{result.stdout}"
    return result.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
