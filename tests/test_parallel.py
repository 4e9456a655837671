"""The parallel plan: what strategies mean, what is refused before anything runs, the reviewed plans."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from unialign_jax import parallel


@dataclasses.dataclass(frozen=True)
class Device:
    """As a GPU describes itself."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "GPU"


def abstract_mesh(strategy: str, devices: int) -> AbstractMesh:
    return AbstractMesh(parallel.mesh_shape(strategy, devices), parallel.AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize(
    ("strategy", "devices", "slices", "shape"),
    [
        ("fsdp", 1, 1, (1, 1, 1, 1)),
        ("fsdp", 256, 1, (1, 256, 1, 1)),
        ("fsdp", 512, 2, (2, 256, 1, 1)),
        ("data", 8, 1, (8, 1, 1, 1)),
        ("data", 512, 2, (512, 1, 1, 1)),
        ("fsdp+tensor", 256, 1, (1, 64, 1, 4)),
        ("fsdp+tensor=8", 512, 2, (2, 32, 1, 8)),
        ("sequence+fsdp", 16, 1, (1, 4, 4, 1)),
        ("data=2+fsdp+sequence=4", 64, 1, (2, 8, 4, 1)),
        ("data=4+fsdp", 32, 2, (4, 8, 1, 1)),
        ("data+fsdp=2+sequence=2+tensor=2", 16, 1, (2, 2, 2, 2)),
        ("tensor=8", 8, 1, (1, 1, 1, 8)),
    ],
)
def test_strategies(strategy, devices, slices, shape):
    assert parallel.mesh_shape(strategy, devices, slices) == shape


@pytest.mark.parametrize(
    ("strategy", "devices", "slices", "message"),
    [
        ("fdsp", 8, 1, "strategy 'fdsp': 'fdsp' is wrong; expected axes of data, fsdp, sequence, tensor"),
        ("", 8, 1, "'' is wrong"),
        ("fsdp+fsdp", 8, 1, "'fsdp' is wrong.*at most once"),
        ("fsdp+tensor=0", 8, 1, "'tensor=0' is wrong"),
        ("fsdp+tensor=-1", 8, 1, "'tensor=-1' is wrong"),
        ("fsdp+tensor=two", 8, 1, "'tensor=two' is wrong"),
        ("fsdp+tensor=", 8, 1, "'tensor=' is wrong"),
        ("data+fsdp", 8, 1, "one of data and fsdp needs a size"),
        ("fsdp=16", 8, 1, "takes 16 devices, but there are 8"),
        ("fsdp=4", 8, 1, "takes 4 devices, but there are 8"),
        ("fsdp+tensor=16", 8, 1, "takes a multiple of 16 devices, but there are 8"),
        ("fsdp", 9, 2, "takes a multiple of 2 devices, but there are 9 in 2 slices"),
        ("data=3+fsdp", 12, 2, "data=3 is no multiple of the 2 slices"),
    ],
)
def test_wrong_strategies_are_one_error(strategy, devices, slices, message):
    with pytest.raises(ValueError, match=message):
        parallel.mesh_shape(strategy, devices, slices)


@pytest.mark.parametrize(
    ("strategy", "each", "refused"),
    [("data+tensor=12", 8, True), ("data+tensor=3", 8, True), ("data+tensor=4", 8, False), ("fsdp+tensor=8", 4, False)],
)
def test_processes_share_all_of_their_rows_or_none(strategy, each, refused):
    """24 devices, `each` of them in one process."""
    devices = [Device(i, i // each) for i in range(24)]
    if refused:
        with pytest.raises(ValueError, match="lie across processes of 8, so that two hold some of the same samples"):
            parallel.make_mesh(strategy, devices)
    else:
        assert parallel.make_mesh(strategy, devices).size == 24


def test_batches_and_heads_that_do_not_divide_are_refused():
    mesh = abstract_mesh("data=2+fsdp+tensor=4", 16)
    parallel.check_batch(mesh, 8, 2)
    parallel.check_heads(mesh, 24)
    with pytest.raises(ValueError, match="batch of 12 cannot be split over data=2 x fsdp=2 .* 2 micro.* multiple of 8"):
        parallel.check_batch(mesh, 12, 2)
    with pytest.raises(ValueError, match="6 attention heads cannot be split over tensor=4"):
        parallel.check_heads(mesh, 6)


def test_too_much_replication_is_refused_by_name():
    def leaf(names, *shape):
        return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)

    tree = {"split": leaf(("embed", "mlp"), 48, 280_000), "whole": leaf(("embed", None), 3, 140_000)}
    with pytest.raises(ValueError, match=r"3\.0% .* copied to every device .*: whole \(1\.6 MiB\)"):
        parallel.param_shardings(tree, abstract_mesh("fsdp", 8))
    small = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], leaf.shape[1] // 10), leaf.dtype), tree)
    parallel.param_shardings(small, abstract_mesh("fsdp", 8))
    parallel.param_shardings(tree, abstract_mesh("data", 8))  # copies are what this asks for
    # An axis that does nothing for most of the bytes: each device holds three parts of twelve.
    uneven = {"split": leaf(("embed", "mlp"), 64, 280_000)}
    parallel.param_shardings(uneven, abstract_mesh("fsdp=4+tensor=4", 16))
    with pytest.raises(ValueError, match=r"18\.2% .* copied to every device .*: split \(12\.4 MiB\)"):
        parallel.param_shardings(uneven, abstract_mesh("fsdp=3+tensor=4", 12))
    assert parallel.param_shardings(tree, abstract_mesh("fsdp=3", 3))["whole"].spec == PartitionSpec("fsdp", None)
