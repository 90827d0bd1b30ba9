"""Pictures that are much alike to a model: features of its own vision tower, and the exact nearest by cosine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from napo_jax.data.images import normalise
from napo_jax.models.clip import ClipTower
from napo_jax.sharding import ROWS, over_rows

_QUERIES = 256  # pictures that are compared with all others at a time


@functools.partial(jax.jit, static_argnums=0)
def picture_features(model, params, pictures):
    """Computes what a model's vision tower makes of pictures, as unit vectors.

    Args:
      model: `Llava`.
      params: its parameters.
      pictures: uint8[B, I, I, 3].

    Returns:
      float32[B, D]: the mean of the features that the language model is given, of all places.
    """
    tower = ClipTower(model.config.vision, dtype=model.config.dtype, param_dtype=model.config.param_dtype)
    features = tower.apply({"params": params["vision"]}, normalise(pictures)).astype(jnp.float32)
    mean = jnp.mean(features, axis=1)
    return mean * jax.lax.rsqrt(jnp.sum(jnp.square(mean), axis=-1, keepdims=True))


def nearest(features, mesh, *, rank=1, most=1.0):
    """Finds for each picture another one that is much like it, by comparing all with all.

    Args:
      features: float32[N, D], unit vectors of different pictures, N at least 2.
      mesh: made by `sharding.make_mesh`; each device compares with its share of the pictures.
      rank: 1 for the nearest, 2 for the next one, and so on.
      most: pictures whose cosine is above this are taken for the same one, and passed over.

    Returns:
      int[N] and float32[N]: the picture's number and the cosine; -1 and NaN where there is none.
    """
    count, shards = len(features), int(np.prod([mesh.shape[axis] for axis in ROWS]))
    share = -(-count // shards)
    padded = np.zeros((share * shards, features.shape[1]), np.float32)
    padded[:count] = features
    held = jax.device_put(padded, over_rows(mesh))
    asked = min(rank, share)

    def of_share(held, queries, numbers):
        """Returns the best of this device's pictures for each query: cosines and numbers, [1, Q, rank]."""
        first = jax.lax.axis_index(ROWS) * share
        mine = first + jnp.arange(share)
        cosines = jnp.einsum("qd,nd->qn", queries, held, precision="highest")
        barred = (mine[None] == numbers[:, None]) | (mine[None] >= count) | (cosines > most)
        cosines, places = jax.lax.top_k(jnp.where(barred, -jnp.inf, cosines), asked)
        return cosines[None], (first + places)[None]

    whole, cut = PartitionSpec(), PartitionSpec(ROWS)
    search = jax.jit(
        jax.shard_map(of_share, mesh=mesh, in_specs=(cut, whole, whole), out_specs=(cut, cut), check_vma=False)
    )
    found, cosines = np.full(count, -1), np.full(count, np.nan, np.float32)
    for start in range(0, count, _QUERIES):
        numbers = np.minimum(np.arange(start, start + _QUERIES, dtype=np.int32), count - 1)
        shares = map(np.asarray, search(held, padded[numbers], numbers))
        best, who = (np.concatenate(list(each), axis=-1)[: count - start] for each in shares)
        if best.shape[1] < rank:
            continue
        # Equal cosines in the order of pictures, on any number of devices.
        at = np.lexsort((who, -best), axis=-1)[:, rank - 1 : rank]
        best, who = (np.take_along_axis(each, at, axis=-1)[:, 0] for each in (best, who))
        rows = slice(start, start + len(best))
        found[rows], cosines[rows] = np.where(np.isfinite(best), who, -1), np.where(np.isfinite(best), best, np.nan)
    return found, cosines
