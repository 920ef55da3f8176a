"""What training needs; `calibration` says what the numbers mean, `analysis` reads what came out."""

import os

# Threads that spin at torch's barriers starve each other where a machine has other work to do: with
# neighbours a step of a resnet8 took 11 times as long. libgomp reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
