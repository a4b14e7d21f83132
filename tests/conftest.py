"""Settings for every test."""

from __future__ import annotations

from hypothesis import settings

# The tests share two cores with the servers they start: how long one example takes says nothing.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
