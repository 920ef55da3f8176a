"""Thin commands over utils: python -m scripts.NAME"""

import utils  # noqa: F401  before torch
