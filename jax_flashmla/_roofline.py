"""What the hardware allows: bytes, FLOP and the floor of one decode op.

bytes = KV + Q + O                       (the cache read once, q read once, out written once)
flop  = 2 s_q h_q tokens (576 + 512)     (causality is not subtracted: it is a few keys)
floor = max(bytes / read bandwidth, flop / matmul rate)
"""

import dataclasses

HEAD_DIM_QK = 576
HEAD_DIM_V = 512


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best.

    Attributes:
        device: What they are the ceilings of.
        bytes_per_s: Pure read bandwidth of the memory.
        flop_per_s: 16-bit dense matmul.
    """

    device: str
    bytes_per_s: float
    flop_per_s: float


H200 = Ceilings("NVIDIA H200", bytes_per_s=4.65e12, flop_per_s=787e12)  # measured, not data sheet


def known_ceilings(device_kind: str) -> Ceilings | None:
    """The measured ceilings of a device by the name JAX gives it; None where none were taken."""
    return H200 if device_kind == H200.device else None


@dataclasses.dataclass(frozen=True)
class Work:
    """What one decode op has to move and compute.

    Attributes:
        tokens: Cached tokens attended to, summed over requests.
        unique_tokens: The same with shared pages counted once.
        batch: Requests.
        s_q: Query tokens of each request.
        h_q: Query heads.
        itemsize: Bytes of an element of q, the cache and out.
    """

    tokens: int
    unique_tokens: int
    batch: int
    s_q: int
    h_q: int
    itemsize: int = 2

    @property
    def kv_bytes(self) -> int:
        """Cache bytes the requests attend to (h_kv 1); a shared page counts once per request."""
        return self.tokens * HEAD_DIM_QK * self.itemsize

    @property
    def unique_kv_bytes(self) -> int:
        """Cache bytes that have to be read at least once."""
        return self.unique_tokens * HEAD_DIM_QK * self.itemsize

    @property
    def bytes(self) -> int:
        """Bytes that have to cross the memory bus: cache, q and out."""
        rows = self.batch * self.s_q * self.h_q
        return self.unique_kv_bytes + rows * (HEAD_DIM_QK + HEAD_DIM_V) * self.itemsize

    @property
    def flop(self) -> int:
        """Multiply-adds counted twice, of both matmuls."""
        return 2 * self.s_q * self.h_q * self.tokens * (HEAD_DIM_QK + HEAD_DIM_V)

    def floor_seconds(self, ceilings: Ceilings) -> float:
        """The least time these ceilings allow."""
        return max(self.bytes / ceilings.bytes_per_s, self.flop / ceilings.flop_per_s)
