"""A setting that is unknown or out of range stops the start with its name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_dflash import settings
from sglang_dflash.errors import UserError
from sglang_dflash.settings import get_settings


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_defaults() -> None:
    assert get_settings().mode == "auto"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "SGLANG_DFLASH_TOPK",
            "4",
            r"unknown setting SGLANG_DFLASH_TOPK; did you mean SGLANG_DFLASH_TOP_K\?",
        ),
        ("SGLANG_DFLASH_TOP_K", "0", "SGLANG_DFLASH_TOP_K='0' is not usable"),
        ("SGLANG_DFLASH_TOP_K", "four", "SGLANG_DFLASH_TOP_K='four' is not usable"),
        ("SGLANG_DFLASH_MODE", "off", "SGLANG_DFLASH_MODE='off' is not usable"),
    ],
)
def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        get_settings()


def test_names_of_others_with_our_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DFLASH_EAGER_DRAFT_SAMPLER", "1")
    monkeypatch.setenv("SGLANG_DFLASH_CACHE", "/tmp/somewhere")
    assert get_settings().mode == "auto"


def test_limits_are_the_kernels() -> None:
    from dflash_kernels import head_topk, tree_attn, tree_build

    assert settings.MAX_NODES == tree_build.MAX_NODES == tree_attn.MAX_NODES
    assert settings.MAX_CANDIDATES == head_topk.MAX_K
