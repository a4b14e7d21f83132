"""The seed of everything random in these tests; the report's header says it."""

from __future__ import annotations

import os
import random

SEED = int(os.environ.get("DFLASH_TEST_SEED") or random.SystemRandom().randrange(2**31))
