"""Process of bench/startup.py: run the real command line, noting when each phase ends.

It imports nothing else of this folder, so that the first phase is the command line's own. The notes
go to stderr as one JSON document, the last line.
"""

import atexit
import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any


def child(command: list[str]) -> None:
    """Run `neuroada` with these arguments."""
    from neuroada_serve.cli import ask
    from neuroada_serve.cli.main import main
    from neuroada_serve.config import EngineConfig

    ends = {"interpreter": time.monotonic()}

    def noted(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            ends[phase] = time.monotonic()
            return result

        return run

    def when_imported(config: EngineConfig) -> None:
        """Note the end of the imports: settings are the first thing made after them."""
        check(config)
        loader = sys.modules.get("neuroada_serve.model.loader")
        if loader is None or "imports" in ends:
            return
        ends["imports"] = time.monotonic()
        for phase in ("model", "tokenizer"):
            setattr(loader, f"load_{phase}", noted(getattr(loader, f"load_{phase}"), phase))

    check = EngineConfig.__post_init__
    EngineConfig.__post_init__ = when_imported
    ask.llm_with = noted(ask.llm_with, "engine")
    sys.argv = ["neuroada", *command]

    def tell() -> None:
        print(json.dumps(ends | {"processor": time.process_time()}), file=sys.stderr)

    atexit.register(tell)
    main()


if __name__ == "__main__":
    child(sys.argv[1:])
