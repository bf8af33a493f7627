"""The floors of the house: who may import whom. Reads the source, imports nothing of it."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "neuroada_serve"

# Lower floors first; within a floor a room imports only from rooms earlier in the list.
# A name stands for a module or for all modules of a package that are not listed themselves.
FLOORS: list[list[str]] = [
    [
        "errors",
        "tasks",
        "options",
        "row_source",
        "config",
        "request",
        "metrics",
        "intervals",
        "wakeup",
    ],
    [
        "plots",
        "ops",
        "adapters.durable",
        "adapters.extents",
        "adapters.slot_memory",
        "adapters.readiness",
        "adapters.format",
        "adapters.card",
        "adapters.parse",
        "adapters.reader",
        "adapters.select",
        "adapters.entries",
        "adapters.inert_pickle",
        "adapters.official",
        "adapters.peft_files",
    ],
    [
        "adapters.values",
        "adapters.bank",
        "adapters.store",
        "adapters.host_cache",
        "adapters.host",
        "adapters.residency",
        "adapters.room",
        "adapters.loaders",
        "adapters.tiers",
        "adapters.directory",
        "adapters.preload",
        "model.quiet",
        "model.gguf_file",
        "model.gguf_keys",
        "model.gguf_rope",
        "model.gguf_config",
        "model.gguf_tokenizer",
        "model.gguf_convert",
        "model.source",
        "model.rotary",
        "model.template",
        "model.loader",
        "model.prompt",
        "model.bypass_linear",
        "model.merge",
        "model.export",
        "model.differences",
        "model.convert",
    ],
    ["engine", "train"],
    ["server"],
    [
        "evaluation",
        "demo",
        "benchmark",
        "cli.flags",
        "cli.help",
        "cli.common",
        "cli",
        "cli.main",
        "__main__",
    ],
]
CORE = ("ops", "adapters", "model", "engine")
CORE_LIBRARIES = {"torch", "transformers", "safetensors", "numpy"}
# What these bring along themselves (jinja2 and filelock with torch; the hub client, tokenizers and
# tqdm with transformers), and what only a GGUF file needs.
CORE_COMPANIONS = {"jinja2", "filelock", "huggingface_hub", "tokenizers", "tqdm", "gguf"}
# Compilers of kernels, each for the modules that cannot be without it.
KERNEL_LIBRARIES = {
    "ops.cpu_vectors": {"numba", "llvmlite"},
    "ops.cpu_kernels": {"numba"},
    "ops.cpu_attention_kernels": {"numba"},
    "ops.cpu_grad_kernels": {"numba"},
    "ops.cpu_forward_kernels": {"numba", "llvmlite"},
    "ops.triton_bypass": {"triton"},
    "ops.triton_value_grad": {"triton"},
    "engine.triton_attention": {"triton"},
    "engine.triton_prefill": {"triton"},
}
TORCH_FREE = (
    "adapters.extents",
    "adapters.readiness",
    "engine.accounts",
    "engine.adapter_turns",
    "engine.batcher",
    "engine.block_manager",
    "engine.block_tables",
    "engine.fairness",
    "engine.merge_policy",
    "engine.pace",
    "engine.scheduler",
    "engine.sequence",
)


def modules() -> dict[str, ast.Module]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(file.read_text())
    return found


def imports(tree: ast.AST, runtime_only: bool = False) -> set[str]:
    """Dotted names that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found.add(node.module or "")
        elif runtime_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        else:
            found |= imports(node, runtime_only)
    return found


def own(names: set[str]) -> set[str]:
    return {n.removeprefix("neuroada_serve.") for n in names if n.startswith("neuroada_serve.")}


def place(module: str) -> tuple[int, int]:
    """(floor, position); a package's module takes the package's place."""
    for floor, rooms in enumerate(FLOORS):
        for name in (module, module.partition(".")[0]):
            if name in rooms:
                return floor, rooms.index(name)
    raise AssertionError(f"{module} has no place in FLOORS")


def test_every_module_imports_only_from_below_or_earlier():
    broken = []
    for module, tree in modules().items():
        if module == "__init__":
            continue
        for imported in own(imports(tree)):
            same_package = module.partition(".")[0] == imported.partition(".")[0]
            if place(imported) > place(module) or (
                place(imported) == place(module) and not same_package
            ):
                broken.append(f"{module} imports {imported}")
    assert broken == []


def test_engine_and_train_never_meet():
    for module, tree in modules().items():
        wing = module.partition(".")[0]
        if wing in ("engine", "train"):
            other = {"engine": "train", "train": "engine"}[wing]
            assert not any(n.startswith(other) for n in own(imports(tree))), module


def test_modules_of_a_package_form_no_cycle():
    graph = {name: own(imports(tree)) for name, tree in modules().items()}

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        seen.add(start)
        return any(
            n == goal or (n not in seen and reaches(n, goal, seen)) for n in graph.get(start, ())
        )

    assert [name for name in graph if reaches(name, name, set())] == []


def test_inner_packages_have_empty_inits():
    inits = [f for f in PACKAGE.rglob("__init__.py") if f.parent != PACKAGE]
    assert len(inits) >= 6
    assert [str(f) for f in inits if f.read_text()] == []


def test_words_need_the_standard_library_only():
    trees = modules()
    for module in FLOORS[0]:
        roots = {name.partition(".")[0] for name in imports(trees[module])}
        assert roots <= set(sys.stdlib_module_names) | {"neuroada_serve"}, module


def test_tasks_are_told_apart_in_their_own_rooms():
    """A new task then needs a class there, a route and a method of LLM, and no branch elsewhere."""
    rooms = ("train.objectives", "evaluation.tasks")
    for module, tree in modules().items():
        names = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "neuroada_serve.tasks"
            for alias in node.names
        }
        named = names & {"CAUSAL_LM", "SEQ_CLS", "Generate", "Classify", "Regress"}
        assert not named or module in rooms, (module, named)


def test_core_needs_few_libraries():
    allowed = CORE_LIBRARIES | CORE_COMPANIONS | set(sys.stdlib_module_names) | {"neuroada_serve"}
    for module, tree in modules().items():
        if module.partition(".")[0] in CORE:
            roots = {name.partition(".")[0] for name in imports(tree)}
            extra = roots - allowed - KERNEL_LIBRARIES.get(module, set())
            assert not extra, (module, extra)


def test_core_imports_without_any_kernel_library():
    """A GPU machine has no numba, a laptop no triton."""
    code = (
        "import sys\n"
        "for name in ('numba', 'llvmlite', 'triton'): sys.modules[name] = None\n"
        "from neuroada_serve.engine import llm\n"
        "from neuroada_serve.ops import cpu_team\n"
        "import torch\n"
        "assert not cpu_team.supports(torch.zeros(1))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scheduling_is_pure_python():
    graph = {name: imports(tree, runtime_only=True) for name, tree in modules().items()}

    def all_imports(module: str) -> set[str]:
        direct = graph[module]
        return direct.union(*(all_imports(name) for name in own(direct)))

    for module in TORCH_FREE:
        assert "torch" not in {name.partition(".")[0] for name in all_imports(module)}, module


# torch.load with weights_only=True builds tensors and containers alone; the official code's files
# are of its format. Pickles it has no reader for are read as data, by adapters.inert_pickle.
LOADS_WEIGHTS_ONLY = "adapters.official"


def weights_only(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and any(
        k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
        for k in node.keywords
    )


def test_no_pickle_and_no_remote_code():
    banned = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    for module, tree in modules().items():
        roots = {name.partition(".")[0] for name in imports(tree)}
        assert not roots & set(banned), module
        allowed = {
            node.func
            for node in ast.walk(tree)
            if module == LOADS_WEIGHTS_ONLY and weights_only(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node in allowed and ast.unparse(node) == "torch.load":
                    continue
                name = f"{node.value.id}.{node.attr}"
                assert name not in ("torch.load", "torch.save", "np.load", "yaml.load"), module
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False, module
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False, module


def test_public_names_are_exactly_these():
    import neuroada_serve

    assert sorted(neuroada_serve.__all__) == [
        "Adapter",
        "LLM",
        "NeuroAdaError",
        "SamplingParams",
        "__version__",
        "load_adapter",
        "save_adapter",
    ]
    assert all(hasattr(neuroada_serve, name) for name in neuroada_serve.__all__)
