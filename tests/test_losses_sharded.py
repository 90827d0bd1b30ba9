"""Eight devices give what one gives: values, q and gradients, under every transformation that users wrap around."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from napo_jax import napo_loss, noise_coefficient
from napo_jax.losses import term_weights

P = jax.sharding.PartitionSpec
RNG = np.random.default_rng(1)
LOGPS = tuple(np.float32(RNG.normal(-50, 8, 32)) for _ in range(4))
# Unequal counts per device, one device with nothing valid: a mean of means would differ from the mean.
WHERE = np.arange(32) % 5 != 0
WHERE[4:8] = False
OPTIONS = {"alpha": 0.3, "beta": 0.1}


def mesh_of(shape, names):
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


def one_device(where=None):
    """Returns losses, q and the policy gradients of the summed loss, on one device."""

    def total(pc, pr, rc, rr):
        values, stats = napo_loss(pc, pr, rc, rr, where=where, **OPTIONS)
        return values.sum(), (values, stats["q"])

    gradients, (values, q) = jax.grad(total, argnums=(0, 1), has_aux=True)(*LOGPS)
    return values, q, gradients


def check(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a).reshape(b.shape), b, rtol=1e-6), got, want)


@pytest.mark.parametrize("masked", [False, True])
def test_jit(masked):
    where = WHERE if masked else None
    check(jax.jit(partial(one_device, where))(), one_device(where))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "names"), [((8,), ("data",)), ((4, 2), ("data", "fsdp"))])
def test_shard_map(masked, shape, names):
    def local(pc, pr, rc, rr, where):
        def total(pc, pr):
            values, stats = napo_loss(pc, pr, rc, rr, where=where if masked else None, axis_name=names, **OPTIONS)
            return values.sum(), (values, stats["q"])

        gradients, (values, q) = jax.grad(total, argnums=(0, 1), has_aux=True)(pc, pr)
        return values, q, gradients

    spec = P(names)
    mapped = jax.shard_map(local, mesh=mesh_of(shape, names), in_specs=spec, out_specs=(spec, P(), (spec, spec)))
    want = one_device(WHERE if masked else None)
    check(mapped(*LOGPS, WHERE), want)
    check(jax.jit(mapped)(*LOGPS, WHERE), want)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_through_shard_map(masked):
    """As a train step has it: the loss under shard_map, and grad outside."""
    where = WHERE if masked else None

    def local(pc, pr, rc, rr, where):
        values, _ = napo_loss(pc, pr, rc, rr, where=where if masked else None, axis_name="data", **OPTIONS)
        return jax.lax.psum(values.sum(), "data")

    mapped = jax.shard_map(local, mesh=mesh_of((8,), ("data",)), in_specs=P("data"), out_specs=P())
    gradients = jax.jit(jax.grad(mapped, argnums=(0, 1)))(*LOGPS, WHERE)
    check(gradients, one_device(where)[2])


@pytest.mark.parametrize("masked", [False, True])
def test_pmap(masked):
    def local(pc, pr, rc, rr, where):
        def total(pc, pr):
            values, stats = napo_loss(pc, pr, rc, rr, where=where if masked else None, axis_name="data", **OPTIONS)
            return values.sum(), (values, stats["q"])

        gradients, (values, q) = jax.grad(total, argnums=(0, 1), has_aux=True)(pc, pr)
        return values, q, gradients

    rows = [array.reshape(8, 4) for array in (*LOGPS, WHERE)]
    values, q, gradients = jax.pmap(local, axis_name="data")(*rows)
    want_values, want_q, want_gradients = one_device(WHERE if masked else None)
    check((values, gradients), (want_values, want_gradients))
    np.testing.assert_allclose(q, np.full(8, want_q), rtol=1e-6)


def test_vmap_measures_each_row_or_all_of_them():
    rows = [array.reshape(8, 4) for array in LOGPS]
    each_q = jax.vmap(lambda *logps: napo_loss(*logps, **OPTIONS)[1]["q"])(*rows)
    want = [napo_loss(*(array[i] for array in rows), **OPTIONS)[1]["q"] for i in range(8)]
    np.testing.assert_allclose(each_q, want, rtol=1e-6)
    assert np.ptp(each_q) > 0.01
    gradient = jax.grad(
        lambda pc: jax.vmap(lambda *a: napo_loss(*a, axis_name="i", **OPTIONS)[0], axis_name="i")(pc, *rows[1:]).sum()
    )
    check(gradient(jnp.asarray(rows[0])), one_device()[2][0])
    values, q = jax.vmap(
        lambda *a: (lambda v, s: (v, s["q"]))(*napo_loss(*a, axis_name="i", **OPTIONS)), axis_name="i"
    )(*rows)
    want_values, want_q, _ = one_device()
    check(values, want_values)
    np.testing.assert_allclose(q, np.full(8, want_q), rtol=1e-6)


def test_gradient_of_the_gradient_under_shard_map_and_pmap():
    def curvature(policy_chosen, rest, axis_name):
        def slope(pc):
            values, _ = napo_loss(pc, *rest, axis_name=axis_name, **OPTIONS)
            return values.sum()

        return jax.grad(lambda pc: jax.grad(slope)(pc).sum())(policy_chosen)

    want = curvature(LOGPS[0], LOGPS[1:], None)
    assert np.all(want != 0)
    mapped = jax.shard_map(
        lambda pc, *rest: curvature(pc, rest, "data"),
        mesh=mesh_of((8,), ("data",)),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    np.testing.assert_allclose(mapped(*LOGPS), want, rtol=1e-6, atol=1e-9)
    rows = [array.reshape(8, 4) for array in LOGPS]
    replicated = jax.pmap(lambda pc, *rest: curvature(pc, rest, "data"), axis_name="data")(*rows)
    np.testing.assert_allclose(replicated.ravel(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_q_without_the_axis_name_would_differ(rule):
    """The wrong twin: a q per device, which is what forgetting `axis_name` gives."""
    margin = jnp.asarray(LOGPS[0] - LOGPS[1])
    want = noise_coefficient(margin, alpha=0.1, rule=rule, where=WHERE)

    def local(margin, where, axis_name):
        return noise_coefficient(margin, alpha=0.1, rule=rule, where=where, axis_name=axis_name)[None]

    def on_eight(axis_name):
        return jax.shard_map(
            partial(local, axis_name=axis_name),
            mesh=mesh_of((8,), ("data",)),
            in_specs=P("data"),
            out_specs=P("data"),
        )(margin, WHERE)

    np.testing.assert_allclose(on_eight("data"), np.full(8, want), rtol=1e-6)
    assert np.max(np.abs(on_eight(None) - want)) > 1e-3


def test_term_weights_over_devices():
    margins = np.float32(RNG.uniform(0, 9, (3, 32)))
    where = np.stack([WHERE, ~WHERE, np.ones(32, bool)])
    mapped = jax.shard_map(
        lambda m, w: term_weights(m, where=w, axis_name="data"),
        mesh=mesh_of((8,), ("data",)),
        in_specs=P(None, "data"),
        out_specs=P(),
    )
    np.testing.assert_allclose(mapped(margins, where), term_weights(margins, where=where), rtol=1e-6)
