"""Entry points of the CPU platform."""


def activate() -> str | None:
    return None


def mend() -> None:
    return None
