"""napo_loss against 60-digit arithmetic, beside the textbook form that fails the same comparison."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from napo_jax import dpo_loss, napo_loss

Q = np.float32([0.001, 0.003, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0])
FAR = [1, 2, 3, 5, 8, 10, 16, 16.7, 20, 30, 40, 60, 70, 79, 80]
NEAR = [0, 1e-6, 1e-3, 0.1, 0.5]
HOPELESS = [-1e5, -3e4, -1e3, -300, -200, -120, -100, -95, -90, -88, -87]
Z = np.unique(np.float32([*HOPELESS, *(-z for z in FAR + NEAR), *NEAR, *FAR]))
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)  # below it float32 has no digits left to compare


def exact(z, q):
    """Returns value, slope and curvature of Eq. 9 in z, to 60 digits."""
    with mpmath.workdps(60):
        z, q = mpmath.mpf(float(z)), mpmath.mpf(float(q))
        sigma, other = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
        power = sigma**q
        # 1 - sigma^q cancels in 60 digits too once other is below 1e-60, so it goes through expm1 here as well.
        value = -mpmath.expm1(q * -mpmath.log1p(mpmath.exp(-z))) / q
        slope = -power * other
        return float(value), float(slope), float(slope * (q * other - sigma))


def stable(z, q, beta=1.0):
    zero = jnp.zeros_like(z)
    return napo_loss(z, zero, zero, zero, beta=beta, q=q)[0]


def textbook(z, q):
    return (1 - jax.nn.sigmoid(z) ** q) / q


def slope(loss):
    return lambda z, q: jax.grad(lambda z: loss(z, q).sum())(z)


def relative_error(got, want):
    return np.abs(np.float64(got) - want) / np.maximum(np.abs(want), 1e-300)


def worst_excess(got, want):
    """Returns the greatest relative error, with all errors below the smallest normal number forgiven."""
    got, want = np.float64(got), np.float64(want)
    return np.max(np.maximum(np.abs(got - want) - SMALLEST_NORMAL, 0) / np.maximum(np.abs(want), SMALLEST_NORMAL))


def compiled(function):
    """Compiles a function whole, as users have it compiled: without what makes other tests compile fast."""
    as_ever = {"xla_cpu_use_fusion_emitters": True, "xla_backend_optimization_level": 3}
    return jax.jit(function, compiler_options=as_ever)


@pytest.mark.parametrize("how", [lambda function: function, compiled], ids=["one by one", "compiled"])
@pytest.mark.parametrize("q", Q)
def test_value_and_slope_match_60_digits(q, how):
    want = np.array([exact(z, q) for z in Z])
    assert worst_excess(how(stable)(jnp.asarray(Z), q), want[:, 0]) < 2e-5
    assert worst_excess(how(slope(stable))(jnp.asarray(Z), q), want[:, 1]) < 2e-5


@pytest.mark.parametrize("q", Q)
def test_value_and_slope_match_60_digits_after_beta(q):
    """Through beta = 0.1 the product is rounded once more, which the 2e-5 has room for."""
    beta = float(np.float32(0.1))
    margins = np.float32(Z * 10)
    want = np.array([exact(mpmath.mpf(float(margin)) * beta, q) for margin in margins])
    assert worst_excess(stable(jnp.asarray(margins), q, beta), want[:, 0]) < 2e-5
    gradient = jax.grad(lambda margin: stable(margin, q, beta).sum())(jnp.asarray(margins))
    assert worst_excess(gradient, beta * want[:, 1]) < 2e-5


@pytest.mark.parametrize("q", [0.01, 0.3, 1.0])
def test_gradient_of_the_gradient(q):
    """The curvature crosses zero where q sigmoid(-z) = sigmoid(z), so it is compared on the scale of the slope."""
    want = np.array([exact(z, np.float32(q)) for z in Z])
    curvature = jax.vmap(jax.grad(jax.grad(lambda z: stable(z, jnp.float32(q)))))(jnp.asarray(Z))
    assert np.all(np.isfinite(curvature))
    error = np.abs(np.float64(curvature) - want[:, 2])
    assert np.all(error <= 2e-5 * np.abs(want[:, 1]) + SMALLEST_NORMAL)


def test_the_textbook_form_fails_where_this_one_does_not():
    """The wrong twin: if it passed here, the tests above would prove nothing."""
    z = jnp.float32([-86.0, -90.0])
    assert np.isfinite(slope(textbook)(z, 0.3)).tolist() == [True, False]
    assert np.isfinite(slope(stable)(z, 0.3)).all()

    small_q, z = np.float32(0.001), jnp.float32([8.0])
    want = exact(8.0, small_q)[0]
    assert relative_error(textbook(z, small_q), want)[0] > 0.03
    assert relative_error(stable(z, small_q), want)[0] < 2e-5


def test_small_q_is_dpo():
    z = jnp.linspace(-30, 30, 121)
    zero = jnp.zeros_like(z)
    want, _ = dpo_loss(z, zero, zero, zero, beta=1.0)
    np.testing.assert_allclose(stable(z, 1e-6), want, rtol=2e-5)  # they differ by q / 2 * z^2 / |z|, at most 1.5e-5
    want_slope = jax.grad(lambda z: dpo_loss(z, zero, zero, zero, beta=1.0)[0].sum())(z)
    np.testing.assert_allclose(slope(stable)(z, 1e-6), want_slope, rtol=3.2e-5)


def test_q_of_one_is_the_mean_absolute_error():
    z = jnp.linspace(-30, 30, 121)
    np.testing.assert_allclose(stable(z, 1.0), jax.nn.sigmoid(-z), rtol=2e-6)


def test_infinite_margins_are_finite_or_infinite_but_never_nan():
    z = jnp.float32([-jnp.inf, jnp.inf])
    np.testing.assert_allclose(stable(z, 0.5), [2.0, 0.0])
