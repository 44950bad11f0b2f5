"""The named dimensions of an operation, and how they may be divided among devices."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

Axes = tuple[str, ...]
Division = Mapping[str, Axes]


@dataclasses.dataclass(frozen=True)
class Dims:
    """The named dimensions of an operation, and which of them may be sharded.

    Attributes:
        operands: pairs of an operand's name and its dimensions, separated by spaces.
        results: the dimensions of each result.
        sharded: dimensions that may be divided among devices.
        follows: (dimension, leader, alone): the dimension is divided as its leader is, or, if
            `alone`, not at all while the leader is divided.
        gathered: dimensions whose operand is gathered when they are divided.
    """

    operands: tuple[tuple[str, str], ...]
    results: tuple[str, ...]
    sharded: frozenset[str]
    follows: tuple[tuple[str, str, bool], ...] = ()
    gathered: frozenset[str] = frozenset()

    def rule(self) -> tuple[str, dict[str, tuple[str, ...]]]:
        """The same for the partitioner: an einsum-like rule and what must not be divided."""
        rule = ", ".join(dims for _, dims in self.operands) + " -> " + ", ".join(self.results)
        every = dict.fromkeys(rule.replace(",", "").replace("->", "").split())
        passing = self.sharded | {dim for dim, _, _ in self.follows}
        whole = tuple(dim for dim in every if dim not in passing)  # Shardy wants this order
        return rule, {"need_replication_factors": whole} if whole else {}

    def divided(self, specs: Sequence[Sequence[Axes]], sizes: Mapping[str, int]) -> Division:
        """Finds how the dimensions of operands divided by `specs` are divided.

        Args:
            specs: the mesh axes of each dimension of each operand.
            sizes: of the mesh axes.

        Raises:
            ValueError: no device could compute its part from what it has.
        """
        found: dict[str, tuple[Axes, str]] = {}
        for (name, dims), spec in zip(self.operands, specs, strict=True):
            for dim, axes in zip(dims.split(), spec, strict=True):
                axes = tuple(axis for axis in axes if sizes[axis] > 1)
                if not axes:
                    continue
                known, where = found.setdefault(dim, (axes, name))
                if known != axes:
                    raise ValueError(
                        f"{name}: got {dim} sharded over {text(axes)}, expected {text(known)},"
                        f" as in {where}"
                    )
        self._check(found)
        return {dim: axes for dim, (axes, _) in found.items() if dim not in self.gathered}

    def check_even(
        self,
        division: Division,
        shapes: Sequence[tuple[int, ...]],
        sizes: Mapping[str, int],
    ) -> None:
        """Refuses shards that are not all of one size.

        Raises:
            ValueError: some are not.
        """
        for (name, names), shape in zip(self.operands, shapes, strict=True):
            for dim, size in zip(names.split(), shape, strict=True):
                count = math.prod(sizes[axis] for axis in division.get(dim, ()))
                if size % count:
                    raise ValueError(
                        f"{name}: got {size} {dim} sharded over {text(division[dim])}, expected a"
                        f" multiple of its {count} devices"
                    )

    def _check(self, found: Mapping[str, tuple[Axes, str]]) -> None:
        """Refuses what is divided though it must be whole, or otherwise than its leader."""
        leaders = {dim: (leader, alone) for dim, leader, alone in self.follows}
        for dim, (axes, name) in found.items():
            if dim in leaders:
                leader = leaders[dim][0]
                as_leader = found.get(leader, ((), ""))[0]
                if axes != as_leader:
                    raise ValueError(
                        f"{name}: got {dim} sharded over {text(axes)}, expected {leader} sharded"
                        f" over the same axes, not over {text(as_leader)}"
                    )
            elif dim not in self.sharded | self.gathered:
                raise ValueError(
                    f"{name}: got {dim} sharded over {text(axes)}, expected the whole on every"
                    " device"
                )
        for dim, (leader, alone) in leaders.items():
            if leader in found and dim not in found and not alone:
                axes, name = found[leader]
                raise ValueError(
                    f"{name}: got {leader} sharded over {text(axes)}, expected {dim} of"
                    f" {self._owner(dim)} sharded over the same axes"
                )

    def _owner(self, dim: str) -> str:
        return next(name for name, dims in self.operands if dim in dims.split())


def text(axes: Axes) -> str:
    """Names mesh axes in an error."""
    return " and ".join(axes) or "none"
