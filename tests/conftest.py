"""Settings for every test."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The tests share two cores with the servers they start: how long one example takes says nothing.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

#: Fixtures that live as long as the session: all their users have to run in one process.
_SHARED = frozenset({"tiny_plain", "tiny_tree"})


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Lanes for the two processes of ``make test`` (pytest-xdist): a file, or all files that share servers.

    Servers come first, as they take longest; what is short then fills the other process's end.
    """
    sharing = {_file(item) for item in items if _SHARED.intersection(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: (item.get_closest_marker("server") is None, _file(item) not in sharing))
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            lane = "tiny-servers" if _file(item) in sharing else _file(item)
            item.add_marker(pytest.mark.xdist_group(lane))
