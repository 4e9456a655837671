"""What one TPU chip of each generation can do, every number with the page that says so.

Sources, by the letters in the table:

    A   "How to Scale Your Model" (Austin et al., 2025), https://jax-ml.github.io/scaling-book/tpus: link bandwidths,
        wrap-around rules, matrix-unit sides, data-centre bandwidth per host of v4 (2.5e10 bytes/s for 4 chips)
    B   https://docs.cloud.google.com/tpu/docs/v4
    C   https://docs.cloud.google.com/tpu/docs/v5e (400 GB/s over 4 ports both ways; 6.4 Tb/s per 256-chip pod)
    D   https://docs.cloud.google.com/tpu/docs/v5p (1200 GB/s over 6 ports both ways)
    E   https://docs.cloud.google.com/tpu/docs/v6e (800 GB/s over 4 ports both ways)
    F   https://docs.cloud.google.com/tpu/docs/tpu7x (1200 GB/s over 6 ports both ways; two devices per chip)

How much of the memory a program may use is what the compiler (libtpu 0.0.42) says when one does not fit: "exceeds
available HBM".
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation, per chip; all rates are per second and peaks.

    Attributes:
      flops: bfloat16 matrix products, float32 accumulation.
      hbm_bytes: memory that the compiler lets a program use, of all that there is (32 GiB, 16, 95, 32, 192).
      hbm_bandwidth: bytes read or written.
      link_bandwidth: bytes one way over one interconnect link; a chip has two links per dimension of its torus.
      dcn_bandwidth: bytes over the data-centre network, between slices.
      matrix_unit: side of the matrix unit; smaller sides of a product are filled up to it.
      wraps: an edge of the slice closes to a ring where its length is a multiple of this.
      devices: how many devices the compiler sees on a chip, which share all of the above.
      sources: letters of the list above.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    matrix_unit: int
    wraps: int
    devices: int
    sources: str


CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 45e9, 6.25e9, 128, 4, 1, "A B"),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, 128, 16, 1, "A C"),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9, 128, 4, 1, "A D"),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9, 256, 16, 1, "A E F"),
    "tpu7x": Chip(2307e12, 189.5 * GIB, 7380e9, 100e9, 12.5e9, 256, 4, 2, "A F"),
}


@dataclasses.dataclass(frozen=True)
class Slices:
    """Where the devices of a mesh are in the network: what a group of them can send each other.

    Attributes:
      chip: the generation.
      shape: edges of one slice, in chips.
      positions: per device of the mesh, in its order: (slice, coordinates of the chip).
    """

    chip: Chip
    shape: tuple[int, ...]
    positions: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, generation: str, devices: Sequence[Any]) -> "Slices":
        """Of described or real TPU devices, in the mesh's order."""
        positions = tuple((getattr(d, "slice_index", 0) or 0, tuple(d.coords)) for d in devices)
        shape = tuple(1 + max(coords[i] for _, coords in positions) for i in range(len(positions[0][1])))
        return cls(CHIPS[generation], shape, positions)

    def several(self, group: Sequence[int]) -> bool:
        """Whether a group of devices lies in more than one slice."""
        return len({self.positions[device][0] for device in group}) > 1

    def bandwidth(self, group: Sequence[int]) -> float:
        """Bytes per second that each device of a group can receive from the others, all sending at once.

        Along every dimension of the torus in which the group's chips differ, two links where the group goes evenly
        round a ring and one where it is a line (the chips at its ends have no more). Where it takes every g-th chip
        only, the chips between are of g - 1 other groups, which send over the same links at the same time. The devices
        of a chip share its links. Groups in several slices have the data-centre network's share of the device.
        """
        chip = self.chip
        if self.several(group):
            return chip.dcn_bandwidth / chip.devices
        links = 0.0
        for axis, length in enumerate(self.shape):
            places = sorted({self.positions[device][1][axis] for device in group})
            if len(places) > 1:
                gap = max(b - a for a, b in itertools.pairwise(places))
                ring = length % chip.wraps == 0 and len(places) * gap == length
                links += (2 if ring else 1) / gap
        if not links:  # the two devices of one chip
            return math.inf
        return links * chip.link_bandwidth / chip.devices
