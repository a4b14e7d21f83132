"""The one exception type whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake that its reader can mend: one line that names the cause and the mend."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
