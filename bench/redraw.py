"""Draw the plots of `results` again, from the figures that lie there.

python -m bench.redraw [FOLDER]
"""

import json
import sys
from pathlib import Path

from bench import contexts, scaling
from bench.adapters import report as adapters
from bench.harness import RESULTS
from bench.merge import report as merge
from bench.quality import report as quality
from bench.sharing import report as sharing
from bench.training import report as training
from neuroada_serve.benchmark.plot import plot as plot_benchmark


def main(folder: Path) -> None:
    """Draw every plot of a folder of results again."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        png, name = path.with_suffix(".png"), path.stem
        if name.startswith("throughput"):
            png.write_bytes(plot_benchmark(found) or b"")
        elif name.startswith("quality"):
            quality.plot(found, png)
        elif name.startswith("sharing"):
            sharing.plot(found, png)
        elif name in ("adapters", "merge"):
            {"adapters": adapters, "merge": merge}[name].plot(found, png)
        elif name == "contexts":
            contexts.plot(found, png)
        elif name.startswith("scaling"):
            scaling.plot(found, png)
        elif name.startswith("training"):
            training.plot(found, png)
        else:
            continue
        print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else RESULTS)
