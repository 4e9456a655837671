"""How long a compiled program takes at best: every operation at the peak rate of what limits it.

An operation takes the longer of its matrix products' time and its memory traffic's; operations follow each other, as
they do on a TPU's core. Prefetches into vector memory run beside them and only have to fit the memory's bandwidth.
Transfers between chips either hide behind all of that ("overlapped") or stand in line with it ("serial"): the truth
lies between. Vector arithmetic, latencies and the launch of kernels are left out, so this is a bound, not a forecast.
"""

import collections
import dataclasses
from collections.abc import Sequence

from unialign_jax.training.chips import Slices
from unialign_jax.training.collectives import Collective
from unialign_jax.training.hlo import Module

HEAVIEST = 24  # places that are named


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds per execution of a program on one device.

    Attributes:
      compute: all matrix products, with sides filled up to the matrix unit's.
      hbm: all memory traffic.
      operations: operations one after the other, each the longer of its two times.
      interconnect: transfers within a slice.
      dcn: transfers between slices.
      flops: matrix products that the program asks for on one device, not filled up.
      heaviest: where most of `operations` goes, largest first: (place in the traced program, seconds of matrix
        products, seconds of memory traffic, seconds of `operations`).
    """

    compute: float
    hbm: float
    operations: float
    interconnect: float
    dcn: float
    flops: float
    heaviest: tuple[tuple[str, float, float, float], ...]

    @property
    def device(self) -> float:
        """What a device needs without waiting for others."""
        return max(self.operations, self.hbm)

    @property
    def overlapped(self) -> float:
        return max(self.device, self.interconnect, self.dcn)

    @property
    def serial(self) -> float:
        return self.device + self.interconnect + self.dcn


def estimate(module: Module, transfers: Sequence[Collective], slices: Slices) -> Roofline:
    """The roofline of a program compiled for `slices`, with its collectives as `collectives.read` gives them."""
    chip = slices.chip
    peak, bandwidth = chip.flops / chip.devices, chip.hbm_bandwidth / chip.devices
    compute = hbm = operations = flops = 0.0
    places: dict[str, list[float]] = {}
    for step in module.steps():
        products = module.flops(step, chip.matrix_unit) / peak * step.times
        traffic = module.traffic(step) / bandwidth * step.times
        flops += module.flops(step) * step.times
        compute, hbm = compute + products, hbm + traffic
        if not module.is_transfer(step):
            operations += max(products, traffic)
            place = places.setdefault(step.instruction.op_name or step.instruction.opcode, [0.0, 0.0, 0.0])
            for i, seconds in enumerate((products, traffic, max(products, traffic))):
                place[i] += seconds
    waits: collections.Counter[bool] = collections.Counter()
    for transfer in transfers:
        time = transfer.times * transfer.bytes / slices.bandwidth(transfer.group)
        waits[slices.several(transfer.group)] += time
    ordered = sorted(((name, *seconds) for name, seconds in places.items()), key=lambda place: -place[3])
    return Roofline(compute, hbm, operations, waits[False], waits[True], flops, tuple(ordered[:HEAVIEST]))
