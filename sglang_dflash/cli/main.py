"""``sglang-dflash COMMAND``: finds the command's module and turns mistakes into one line."""

from __future__ import annotations

import importlib
import sys

from sglang_dflash import __version__
from sglang_dflash.client import places
from sglang_dflash.client.fast_start import keep_compiled
from sglang_dflash.errors import UserError

# name -> (module below sglang_dflash.cli, one line for --help). Modules load on use:
# importing SGLang takes seconds and most commands do not need it.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "plain server, then DFLASH with trees, same prompts, one table"),
    "serve": ("serve", "start an SGLang server with draft trees (any SGLang flag passes through)"),
    "doctor": ("doctor", "say what is wrong with this installation, in plain words"),
    "top": ("top", "watch a running server: accept length, tokens/s, queue, width"),
    "trace": ("trace", "a page that shows every step of an answer: its tree, its path, its time"),
    "measure": ("measure", "what steps cost here, and what each width would bring"),
    "fetch": ("fetch", "put the embedded target model into the local cache"),
    "data": ("data", "make a training corpus for a drafter"),
    "train": ("train", "train a drafter for a target model"),
    "eval": ("evaluate", "judge a drafter: recall, accept length of chain and trees"),
}


# `doctor` says itself what it finds of the places to write.
_WRITES_NOTHING = ("top", "doctor")


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items())
    return f"sglang-dflash {__version__}\n\nusage: sglang-dflash COMMAND [options]\n\n{rows}\n"


def main(argv: list[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        print(f"error: no command {args[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    keep_compiled()
    try:
        if args[0] not in _WRITES_NOTHING and (moved := places.settle()):
            print(f"note: {moved}", file=sys.stderr)
        module = importlib.import_module(f"sglang_dflash.cli.{COMMANDS[args[0]][0]}")
        return int(module.main(args[1:]) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
