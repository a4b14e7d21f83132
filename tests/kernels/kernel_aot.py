"""Ahead-of-time compilation without a GPU, and what the machine code says about itself."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory in bytes: what one block may opt in to, and what a multiprocessor has (each block takes 1 KiB
# more). CUDA C++ programming guide, table of compute capabilities.
SHARED_PER_BLOCK = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS_PER_SM = 65_536


@dataclass(frozen=True)
class Resources:
    """registers per thread, spilled bytes (stack + local), shared bytes, and the opcodes present."""

    registers: int
    spill_bytes: int
    shared: int
    opcodes: frozenset[str]

    def per_sm(self, arch: int, warps: int) -> int:
        """Programs that fit one multiprocessor."""
        per_thread = -(-self.registers // 8) * 8
        return min(REGISTERS_PER_SM // (per_thread * 32 * warps), SHARED_PER_SM[arch] // (self.shared + 1024))


@dataclass(frozen=True)
class Spec:
    """One specialisation: the kernel, its pointer and scalar types, its compile-time arguments."""

    name: str
    kernel: object
    arch: int
    types: dict[str, str]
    constants: dict[str, object]
    options: dict[str, int]
    tensor_core: bool = False
    multiples_of_16: tuple[str, ...] = ()  # besides every pointer and stride
    per_sm: int | None = None  # programs the launch plan counts on per multiprocessor


def compile_spec(spec: Spec) -> Resources:
    """Compiles for `spec.arch` with the hints that the launcher derives from 16-byte multiples."""
    names = [p.name for p in spec.kernel.params]
    signature, attrs = {}, {}
    for i, name in enumerate(names):
        if name in spec.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = spec.types[name]
        if spec.kernel.params[i].do_not_specialize:
            continue
        if spec.types[name].startswith("*") or name.startswith("stride") or name in spec.multiples_of_16:
            attrs[(i,)] = [["tt.divisibility", 16]]
    constants = {(names.index(n),): v for n, v in spec.constants.items()}
    compiled = triton.compile(
        ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", spec.arch, 32),
        options=spec.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", f.name)
        sass = _run("cuobjdump", "--dump-sass", f.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, f"no resource usage in: {usage}"
    registers, stack, _, local = map(int, found.groups())
    opcodes = frozenset(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)", sass))
    return Resources(registers, stack + local, compiled.metadata.shared, opcodes)


def _run(tool: str, *args: str) -> str:
    return subprocess.run([str(_BIN / tool), *args], check=True, capture_output=True, text=True).stdout
