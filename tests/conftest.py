"""Settings for every test."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import settings

from sglang_dflash.client import memory

# The tests share two cores with the servers they start: how long one example takes says nothing.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


@pytest.fixture(autouse=True)
def _our_loggers_speak() -> None:
    """Code under test configures logging, which can silence what a later test listens to."""
    logging.disable(logging.NOTSET)
    root = logging.getLogger()
    root.setLevel(min(root.level, logging.WARNING))
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("sglang_dflash") and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)


#: Files in tests/server that start servers of their own and use no session-wide one. They run one after
#: the other: two servers of the embedded pair take 8 GB.
_OWN_SERVERS = (
    "test_chain.py",
    "test_exact_bf16.py",
    "test_exact_float32.py",
    "test_triton_interpreter.py",
)


def lane(nodeid: str) -> str:
    """What has to run in one process: a file, or files with servers."""
    file = nodeid.partition("::")[0]
    if not file.startswith("tests/server/"):
        return file
    return "own servers" if file.endswith(_OWN_SERVERS) else "shared servers"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Servers first, the shared ones before all: they take longest, and short files then fill the end."""
    items.sort(
        key=lambda item: (item.get_closest_marker("server") is None, lane(item.nodeid) != "shared servers")
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two lanes, one where the servers of two do not fit into memory."""
    free = memory.available()
    return 1 if free is not None and free < memory.TESTS else 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Lanes for the two processes of ``make test``."""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane(nodeid)

    return Lanes(config, log)
