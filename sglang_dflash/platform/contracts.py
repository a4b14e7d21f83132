"""What the CPU platform relies on in SGLang, checked before anything is replaced.

SGLang has no stable interface for the functions below. A changed signature must stop the
start with one line and not surface as a wrong result.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sglang_dflash.errors import UserError


@dataclass(frozen=True)
class Contract:
    """The parameter names, in order, of a function or method of SGLang; None: it exists."""

    module: str
    name: str
    parameters: tuple[str, ...] | None = None

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    def resolve(self) -> Any:
        target: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            target = getattr(target, part)
        return target


def check(contract: Contract) -> Any:
    """Return the object that ``contract`` names.

    Raises:
        UserError: when it is missing or takes other parameters.
    """
    try:
        target = contract.resolve()
        found = tuple(inspect.signature(target).parameters)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(_message(contract, str(error))) from error
    if contract.parameters is not None and found != contract.parameters:
        expected = ", ".join(contract.parameters)
        raise UserError(_message(contract, f"expected ({expected}), found ({', '.join(found)})"))
    return target


def _message(contract: Contract, detail: str) -> str:
    import sglang

    return (
        f"The CPU platform does not fit the installed SGLang {sglang.__version__}: {contract.path}: "
        f"{detail}. Install sglang==0.5.23 (sglang-dflash supports >=0.5.23,<0.5.24)."
    )


def replace(contract: Contract, new: Any) -> None:
    """Put ``new`` in the place of the function that ``contract`` names.

    Modules that already did ``from module import name`` hold the old function; they are
    rebound too, later importers get the new one anyway.
    """
    old = check(contract)
    if old is new:
        return
    _, _, attribute = contract.name.rpartition(".")
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__.startswith("sglang."):
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)
    if contract.resolve() is not new:
        raise UserError(_message(contract, f"{attribute} could not be replaced"))
