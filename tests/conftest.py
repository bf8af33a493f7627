"""Set before any test imports torch: threads that wait should sleep, or they slow each other down
wherever the machine has other work (the command line does the same)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
