"""Cases of the absorbed query projection: every kernel, every size of cluster, models' shapes.

A kernel is for so many tokens of a block (8, 16, 32, 64, 128); as few blocks as there are heads are
too few, so 2, 3, 4 or 8 share a head where that many clusters run at once.
"""

import dataclasses

from jax_flashmla.testing.query_oracle import Sizes


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and what else makes a difference to the kernel."""

    sizes: Sizes
    dtype: str = "bfloat16"
    interleave: bool = False

    @property
    def name(self) -> str:
        """As a test's id."""
        s = self.sizes
        words = [f"b{s.batch}", f"s{s.queries}", f"w{s.width}", f"h{s.heads}", f"n{s.nope}"]
        words += ["f16"] * (self.dtype == "float16") + ["pairs"] * self.interleave
        return "_".join(words + ["down"] * s.down)


def _case(batch: int, queries: int, model: tuple[int, int, int], *words: str) -> Case:
    sizes = Sizes(batch, queries, *model, down="down" in words)
    return Case(sizes, "float16" if "f16" in words else "bfloat16", "pairs" in words)


# Width, heads and qk_nope_head_dim.
V3 = 1536, 128, 128
V3_OF_FOUR = 1536, 32, 128  # tensor parallel
V2_LITE = 2048, 16, 128
K2 = 1536, 64, 128
GLM = 768, 20, 192

CASES = (
    # One head, one step of the width: a block to itself. More steps: clusters of 2, 3, 4, 8.
    _case(1, 1, (64, 1, 128)),
    _case(1, 1, (64, 1, 192), "f16", "pairs", "down"),
    _case(3, 1, (128, 1, 128), "pairs", "down"),
    _case(9, 1, (128, 2, 192)),
    _case(17, 1, (192, 2, 128), "f16", "down"),
    _case(7, 1, (192, 3, 192), "pairs"),  # of three steps two blocks: three do not divide 192 + 64
    _case(8, 1, (256, 3, 128), "pairs"),
    _case(33, 1, (256, 5, 192), "f16", "down"),
    _case(1, 1, (512, 5, 128), "down"),
    _case(64, 1, (576, 3, 192), "pairs"),
    _case(40, 1, (512, 3, 128), "f16"),
    # Heads at which the size of the clusters changes, by one.
    _case(9, 1, (512, 14, 128)),
    _case(9, 1, (512, 15, 128), "f16"),
    _case(3, 5, (512, 30, 128), "pairs"),
    _case(16, 1, (512, 31, 128)),
    _case(2, 16, (512, 40, 128), "f16", "pairs"),
    _case(32, 1, (512, 41, 128)),
    _case(32, 1, (512, 64, 128), "down"),
    _case(64, 1, (512, 65, 128)),
    _case(64, 1, (512, 66, 128), "f16"),
    _case(65, 1, (512, 66, 128)),
    _case(65, 1, (512, 67, 128), "pairs"),
    # More heads than half the SMs: whole blocks of up to 128 tokens, for both dimensions.
    _case(1, 1, (320, 70, 128), "f16"),
    _case(33, 1, (320, 70, 192), "down"),
    _case(64, 1, (320, 70, 192), "f16", "pairs"),
    _case(65, 1, (320, 70, 192), "f16"),
    _case(128, 1, (320, 70, 192), "pairs"),
    _case(200, 1, (320, 70, 192), "down"),
    # Models.
    _case(1, 1, V2_LITE, "pairs", "down"),
    _case(8, 1, V2_LITE, "pairs", "down"),
    _case(32, 2, V2_LITE, "pairs", "down"),
    _case(65, 1, V2_LITE, "pairs", "down", "f16"),
    _case(200, 1, V2_LITE, "pairs", "down"),
    _case(1, 1, GLM, "pairs"),
    _case(16, 2, GLM, "pairs"),
    _case(33, 1, GLM, "pairs", "f16"),
    _case(128, 1, GLM, "pairs", "down"),
    _case(7, 1, V3_OF_FOUR, "pairs"),
    _case(64, 1, V3_OF_FOUR, "pairs"),
    _case(128, 1, V3_OF_FOUR, "pairs", "f16"),
    _case(8, 1, K2),
    _case(128, 1, K2, "f16"),
    _case(1, 1, V3, "pairs"),
    _case(17, 1, V3, "pairs", "down"),
    _case(64, 2, V3, "pairs"),
    _case(100, 2, V3, "pairs", "f16"),
)
