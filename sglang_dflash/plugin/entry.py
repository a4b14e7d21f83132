"""Entry point of the tree plugin."""


def register() -> None:
    return None
