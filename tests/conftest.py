"""Set before any test imports torch: threads that wait should not spin for long, or they slow each
other down wherever the machine has other work (the command line does the same)."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
