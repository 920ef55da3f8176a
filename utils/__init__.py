"""How it trains; `teachers` what teaches, `data` the images, `program` what every program needs.

`calibration` says what the numbers mean, `analysis` reads what came out.
"""

import os

from utils.program.errors import stop_while_importing

# By default threads spin so long at torch's barriers that they starve each other on a busy machine:
# a step took 11 times as long. A short spin costs nothing on an idle one. libgomp reads this when
# torch loads it; docs/performance.md has the measurements.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# Imports take seconds from here on. Ctrl-C in them ends a program in one line, as later.
stop_while_importing()
