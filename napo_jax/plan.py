"""Plans: `python -m napo_jax.plan --config configs/llava7b.py --topology v5e:4x4`.

Compiles the step of a training for devices that need not be there, and says what it takes of each: memory, arithmetic,
traffic between them, and time at best. Topologies are v5e:4x4, v5p:2x2x1, h100:8 and the like; where no compiler for
the devices is installed, one for CPUs stands in, and the report is an estimate.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax import costs
from napo_jax.arithmetic import attention_flops, step_flops
from napo_jax.chips import Topology, find_topology, planned_devices
from napo_jax.command import exit_with_one_line
from napo_jax.compiled import compile_step
from napo_jax.config import Config, parse
from napo_jax.data.buckets import choose_buckets
from napo_jax.data.dataset import open_dataset
from napo_jax.data.loader import Batch
from napo_jax.data.records import find_files
from napo_jax.data.sources import DataError
from napo_jax.model_source import find_model, random_shape
from napo_jax.models.attention import resolve_backend
from napo_jax.models.layout import Layout
from napo_jax.models.lora import is_adapter
from napo_jax.optim import make_optimizer
from napo_jax.plan_report import Plan, State, advice, by_part, room
from napo_jax.sharding import ROWS, make_mesh, over_rows
from napo_jax.start import abstract_parts, first_state, make_model
from napo_jax.step import Frozen, make_train_step

# Products of matrices in JAX's attention kernels for TPU, where the forward pass has 2.
_KERNELS = {"splash_mqa_fwd": 2, "splash_mqa_dq": 3, "splash_mqa_dkv": 4}
_ANY_STEPS = 1000  # of a schedule: no shape depends on it


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's own options."""

    # The devices, such as v5e:4x4, v5p:2x2x1 or h100:8; with --mesh.slices 2, of each of two.
    topology: str | None = None
    # Print one JSON object.
    json: bool = False
    # Say which part of the step takes what.
    parts: bool = False
    # Tokens of a prefix, one image among them, and of each answer, where the config's data or model are not here. What
    # further images of data.pictures take comes on top.
    prefix_tokens: int = 704
    answer_tokens: int = 256


def plan(config: Config, topology: Topology, *, prefix_tokens: int = 704, answer_tokens: int = 256) -> Plan:
    """Compiles the step of a config for a topology, in a process that has not asked for devices yet.

    Args:
      config: the `Config`.
      topology: found by `chips.find_topology`.
      prefix_tokens: of a batch's groups, where the config's data are not here.
      answer_tokens: likewise, of each answer.
    """
    devices = planned_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    rows = math.prod(mesh.shape[axis] for axis in ROWS) * config.train.accumulate
    if config.data.batch_size % rows:
        raise ValueError(
            f"data.batch_size {config.data.batch_size} does not divide into {config.train.accumulate} micro-batches on "
            f"{rows // config.train.accumulate} devices (mesh.data x mesh.fsdp)"
        )
    notes = []
    shape, tokenizer = _model(config, notes)
    bucket = _bucket(config, shape, tokenizer, prefix_tokens, answer_tokens, notes)
    config = _with_attention(config, topology, shape, bucket, notes)
    model = make_model(config, shape)
    trained, frozen, _ = abstract_parts(config, model, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps or _ANY_STEPS)
    _, state = first_state(trained, optimizer, mesh)
    along = bool(config.objective.reference_cells) and config.train.reference != "cache"
    frozen = Frozen(frozen, _reference(config, model, trained) if along else None)
    batch = _batch(config, model, bucket, over_rows(mesh))

    step = make_train_step(
        model, config.objective, optimizer, accumulate=config.train.accumulate, mesh=mesh, seed=config.train.seed
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(state, frozen, batch)
    # What an estimate is made of runs nowhere, so it need not be fast.
    options = {"xla_backend_optimization_level": 0} if topology.estimate else {}
    compiled = compile_step(lowered, **options)

    groups, cell_image = config.data.batch_size, config.objective.cell_image
    needed = step_flops(model.config, bucket, groups, cell_image, trained=trained, reference=along)
    attention = attention_flops(model.config, bucket, groups / config.train.accumulate, cell_image) / len(devices)
    kernels = {name: products / 2 * attention / model.config.text.layers for name, products in _KERNELS.items()}
    program, slices = compiled.program, topology.slices
    if program.unknown_loops:
        notes.append(f"counted once, for they do not say how often they run: {', '.join(program.unknown_loops)}")
    sizes = State(
        parameters=_bytes(state.params),
        optimizer=_bytes(state.opt_state),
        frozen=_bytes(frozen.params),
        reference=_bytes(frozen.reference),
    )
    result = Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        bucket=bucket,
        groups=groups,
        accumulate=config.train.accumulate,
        notes=tuple(notes),
        state=sizes,
        peak_bytes=compiled.total_bytes,
        buffers=compiled.buffers[:5],
        flops_per_step=needed,
        parts=by_part(
            costs.matrix_flops(program, kernels), costs.hbm_bytes(program), costs.sent_bytes(program, slices)
        ),
        collectives=costs.collectives(program, slices),
        compile_seconds=compiled.seconds,
    )
    change = room(config, model, result) if result.fits else advice(config, model, trained, result)
    return dataclasses.replace(result, advice=tuple(change))


def _model(config, notes):
    """Returns the model's shape and its tokenizer, None where the model is not here."""
    path = config.model.path
    if path is None or "://" in str(path) or Path(path).exists():
        source = find_model(config.model)
        return source.shape, source.tokenizer
    if config.model.size is None:
        raise ValueError(f"model.path {path} is not here; to plan without it, say how large it is: --model.size 7b")
    notes.append(f"{path} is not here: the shape is that of {config.model.size}")
    return random_shape(config.model.size), None


def _bucket(config, shape, tokenizer, prefix_tokens, answer_tokens, notes):
    """Returns the largest bucket of the data, or the one of a batch whose groups all have these lengths."""
    if config.data.path is not None and tokenizer is not None and _is_here(config.data.path):
        return max(open_dataset(config.data, config.objective, tokenizer, shape).buckets)
    objective, image, pictures = config.objective, shape.vision.image_tokens, config.data.pictures
    more = (pictures - 1) * image
    most = min(config.data.max_tokens, shape.text.max_positions)
    if not image < prefix_tokens or answer_tokens < 1 or prefix_tokens + more + answer_tokens > most:
        further = f" with {more} for more images" if more else ""
        raise ValueError(
            f"--prefix-tokens must be more than the {image} of an image, --answer-tokens at least 1 and both together"
            f"{further} at most {most}, got {prefix_tokens} and {answer_tokens}"
        )
    lengths = np.array([prefix_tokens + more]), np.full((1, len(objective.cells)), answer_tokens)
    multiple = config.data.attention_multiple
    several = np.array([pictures])
    (bucket,), _ = choose_buckets(
        *lengths, len(objective.image_variants), pictures=several, attention_multiple=multiple
    )
    notes.append(
        f"lengths are assumed: {prefix_tokens} tokens of a prefix (--prefix-tokens) and {answer_tokens} of each answer "
        "(--answer-tokens)" + (f", and {more} more for {pictures} images" if more else "")
    )
    return bucket


def _is_here(paths):
    try:
        return bool(find_files(paths))
    except DataError:
        return False


def _with_attention(config, topology, shape, bucket, notes):
    """Returns the config with the attention that the devices would use: "auto" would go by those of this machine."""
    backend = config.model.attention
    if topology.estimate and backend != "xla":
        notes.append(f"attention is planned as xla, and not as {backend}, which a CPU cannot compile")
        backend = "xla"
    elif backend == "auto":
        layout = Layout(bucket.prefix, bucket.answer, len(config.objective.image_variants), config.objective.cell_image)
        heads = lambda count: jax.ShapeDtypeStruct(
            (1, layout.tokens, count, shape.text.head_width), jnp.dtype(config.model.dtype)
        )
        try:
            backend = resolve_backend("splash", heads(shape.text.heads), heads(shape.text.kv_heads), layout)
        except ValueError:  # as on the device itself
            backend = "xla"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=backend))


def _reference(config, model, trained):
    """Returns the leaves of a reference that runs along, in the type that computes."""
    whole = config.train.reference == "live"
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, model.config.dtype, sharding=leaf.sharding)
        for path, leaf in trained.items()
        if whole or not is_adapter(path)
    }


def _batch(config, model, bucket, sharding):
    """Returns the shapes of a batch."""
    groups, cells, size = config.data.batch_size, len(config.objective.cells), model.config.vision.image_size
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((groups, *shape), dtype, sharding=sharding)
    reference = None
    if config.train.reference == "cache" and config.objective.reference_cells:
        reference = dict.fromkeys(
            config.objective.reference_cells, config.objective.logps_like(of(jnp.float32), reference=True)
        )
    return Batch(
        images=of(jnp.uint8, *([bucket.pictures] if bucket.pictures > 1 else []), size, size, 3),
        prefix_ids=of(jnp.int32, bucket.prefix),
        prefix_lengths=of(jnp.int32),
        answer_ids=of(jnp.int32, cells, bucket.answer),
        answer_lengths=of(jnp.int32, cells),
        seeds=of(jnp.uint32),
        ids=of(jnp.int32),
        bucket=bucket,
        reference=reference,
        rejected_images=of(jnp.uint8, size, size, 3) if "rejected_image" in config.objective.image_variants else None,
        masks=of(jnp.bool, *[size // model.config.vision.patch_size] * 2)
        if "region" in config.objective.image_variants
        else None,
        edited=of(jnp.bool, cells, bucket.answer) if config.objective.counterparts else None,
    )


def _bytes(tree):
    """Returns the bytes that one device holds of a tree."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def main(argv=None):
    """Runs the command."""
    config, options = parse(Options, argv, description=__doc__)
    found = plan(
        config,
        find_topology(options.topology, max(1, config.mesh.slices)),
        prefix_tokens=options.prefix_tokens,
        answer_tokens=options.answer_tokens,
    )
    print(json.dumps(found.as_json()) if options.json else "\n".join(found.lines(options.parts)))


if __name__ == "__main__":
    exit_with_one_line(main)
