"""The layers that are measured: those of the paper's models and two with many small experts."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """A layer on one rank of ``ranks``: D width, F hidden width, E experts, K choices."""

    name: str
    D: int
    F: int
    E: int
    K: int
    tokens: int
    """Of each rank."""
    ranks: int = 1

    @property
    def rows(self) -> int:
        """That a rank receives on average."""
        return self.tokens * self.K

    @property
    def experts(self) -> int:
        """Of a rank."""
        return self.E // self.ranks


MIXTRAL = Case("Mixtral 8x7B", D=4096, F=14336, E=8, K=2, tokens=8192)
QWEN2 = Case("Qwen2-MoE", D=2048, F=1408, E=64, K=4, tokens=8192)
PHI = Case("Phi-3.5-MoE", D=4096, F=6400, E=16, K=2, tokens=8192)
DEEPSEEK = Case("DeepSeek-V3-like", D=7168, F=2048, E=32, K=4, tokens=8192)
QWEN3 = Case("Qwen3-30B-like", D=2048, F=768, E=128, K=8, tokens=8192)

PRODUCTS = (MIXTRAL, QWEN2, PHI, DEEPSEEK)
"""All experts on one rank; of DeepSeek-V3's 256 those of one rank of eight."""
COMET = replace(MIXTRAL, name="Mixtral 8x7B, M 16384 (Comet's setting)", tokens=2048, ranks=8)
LINK = (
    COMET,
    replace(QWEN2, name="Qwen2-MoE, M 16384", tokens=2048, ranks=8),
    replace(PHI, name="Phi-3.5-MoE, M 16384", tokens=2048, ranks=8),
    replace(QWEN3, ranks=8),
)
"""One of eight ranks; M: tokens of all of them."""
LAYERS = (QWEN2, replace(QWEN3, name="Qwen3-30B-like, one rank's 16 experts", E=16, K=2), MIXTRAL)

TOY = Case("toy", D=64, F=128, E=2, K=1, tokens=16)
"""To try the programs on the host."""
GIGABYTES = (25, 160, 360, 0)
"""A second, of the emulated link; 0: as fast as memory goes."""


def small(cases: tuple[Case, ...], device: str) -> tuple[Case, ...]:
    """The cases for ``device``: on the host the toy alone, on as many ranks."""
    return cases if device == "cuda" else (replace(TOY, ranks=min(2, cases[0].ranks)),)
