"""The device mesh and the shardings of parameters, optimiser states and batches.

Layers name the axes of their kernels ("embed", "mlp", ...); `RULES` maps those names to mesh axes. Training is data
parallel over both mesh axes, with everything that is trained sharded over `fsdp`.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from causvid_jax import errors

AXES = ("data", "fsdp")

RULES = (
    ("embed", "fsdp"),
    ("text_embed", None),
    ("heads", None),
    ("mlp", None),
    ("vocab", None),
    ("conv_in", None),
    ("conv_out", None),
    ("layers", None),
)


def create_mesh(fsdp: int = 1) -> Mesh:
  """All devices as [data, fsdp]."""
  devices = np.array(jax.devices())
  if devices.size % fsdp:
    raise errors.UserError(f"mesh.fsdp = {fsdp} does not divide the {devices.size} devices")
  return Mesh(devices.reshape(-1, fsdp), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(mesh: Mesh, init: Callable[..., Any], *args: Any) -> Any:
  """The shardings of the tree that `init(*args)` returns, from the logical names of the boxed leaves in it."""
  specs = nn.get_partition_spec(jax.eval_shape(init, *args))
  return nn.logical_to_mesh_sharding(specs, mesh, RULES)
