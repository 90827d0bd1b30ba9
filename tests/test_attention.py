"""The three backends against a naive twin, and the TPU kernel through a real TPU compiler."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit

from napo_jax.models import attention
from napo_jax.models.layout import Layout
from napo_jax.sharding import MeshConfig, make_mesh

# (layout, heads, kv heads, width of a head, prefix lengths, answer lengths)
SMALL = (Layout(7, 5, 1, (0, 0, 0)), 4, 2, 8, [[7], [3]], [[5, 1, 4], [0, 5, 2]])
TWO_IMAGES = (Layout(6, 4, 2, (1, 0, 1)), 4, 4, 8, [[6, 2], [5, 6]], [[4, 4, 1], [2, 3, 4]])
ALONE = (Layout(9), 6, 2, 8, [[9], [4]], np.zeros((2, 0)))
BLOCKS = (Layout(256, 128, 2, (0, 0, 1)), 4, 2, 128, [[256, 200], [130, 255]], [[128, 3, 60], [1, 128, 100]])


def inputs(case, dtype=jnp.float32):
    layout, heads, groups, width, prefix, answer = case
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, layout.tokens, n, width)), dtype) for n in (heads, groups, groups))
    return q, k, v, layout, jnp.asarray(prefix, jnp.int32), jnp.asarray(answer, jnp.int32)


def naive(q, k, v, layout, prefix_lengths, answer_lengths):
    """Softmax attention token by token, in float64, by the rule in words: what may this token see?"""
    streams = [("prefix", m, i) for m in range(layout.prefixes) for i in range(layout.prefix_tokens)]
    streams += [("answer", c, i) for c in range(layout.cells) for i in range(layout.answer_tokens)]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    repeat = q.shape[2] // k.shape[2]
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        for s, (kind, which, place) in enumerate(streams):
            seen = []
            for t, (other_kind, other, other_place) in enumerate(streams):
                same = (kind, which) == (other_kind, other) and other_place <= place
                of_prefix = kind == "answer" and (other_kind, other) == ("prefix", layout.cell_image[which])
                if same or (of_prefix and other_place < int(prefix_lengths[b, other])):
                    seen.append(t)
            scores = k[b, seen, h // repeat] @ q[b, s, h] / np.sqrt(q.shape[-1])
            p = np.exp(scores - scores.max())
            out[b, s, h] = p @ v[b, seen, h // repeat] / p.sum()
    return out


def valid(case):
    layout = case[0]
    return np.asarray(layout.valid(jnp.asarray(case[4], jnp.int32), jnp.asarray(case[5], jnp.int32)))


BACKENDS = {
    "xla": attention._xla,
    "cudnn": partial(attention._cudnn, implementation="xla"),  # its masks and shapes, without the kernel
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [SMALL, TWO_IMAGES, ALONE], ids=["gqa", "two images", "no answers"])
def test_backend_equals_the_naive_twin(backend, case):
    arguments = inputs(case)
    got = np.asarray(BACKENDS[backend](*arguments))
    np.testing.assert_allclose(got[valid(case)], naive(*arguments)[valid(case)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_backends_agree(backend):
    q, k, v, *rest = inputs(TWO_IMAGES)
    pull = np.where(valid(TWO_IMAGES)[:, :, None, None], np.random.default_rng(1).normal(size=q.shape), 0)

    layout = rest[0]
    seen = layout.mask()[None] & valid(TWO_IMAGES)[:, None] | np.eye(layout.tokens, dtype=bool)[None]

    def gradient(function):
        loss = lambda *qkv: (function(*qkv, *rest) * pull.astype(np.float32)).sum()
        return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    def masked(q, k, v, *_):
        """One masked product over all S tokens: the plainest form there is."""
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k) * np.float32(q.shape[-1] ** -0.5)
        p = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("bhqs,bshk->bqhk", p, v)

    for got, want in zip(gradient(BACKENDS[backend]), gradient(masked), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_splash_interpreted_equals_xla():
    """The kernel's own code, run by the interpreter: values and gradients."""
    q, k, v, *rest = inputs(BLOCKS)
    pull = np.where(valid(BLOCKS)[:, :, None, None], np.random.default_rng(1).normal(size=q.shape), 0)

    def run(function):
        def loss(*qkv):
            out = function(*qkv, *rest)
            return (out * pull.astype(np.float32)).sum(), out

        return quick_jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    gradients, out = run(partial(attention._splash, interpret=True))
    want_gradients, want = run(attention._xla)
    np.testing.assert_allclose(out[valid(BLOCKS)], want[valid(BLOCKS)], rtol=1e-5, atol=1e-5)
    for got, wanted in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_splash_on_a_mesh_equals_one_device(monkeypatch):
    """Inside a mesh, each device runs the kernel on its own rows and heads."""
    layout = Layout(128, 128, 1, (0,))
    q, k, v, *rest = inputs((layout, 2, 2, 128, [[120], [128]], [[100], [7]]))
    monkeypatch.setitem(attention._BACKENDS, "splash", partial(attention._splash, interpret=True))
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        spread = jax.jit(partial(attention.attend, backend="splash"), static_argnums=3)(q, k, v, *rest)
    seen = valid((layout, 2, 2, 128, rest[1], rest[2]))
    np.testing.assert_allclose(spread[seen], naive(q, k, v, *rest)[seen], rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_float32_sums():
    arguments = inputs(SMALL, jnp.bfloat16)
    got = jax.jit(attention._xla)(*arguments)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got)[valid(SMALL)], naive(*arguments)[valid(SMALL)], atol=0.02)


@pytest.mark.parametrize(
    ("layout", "dtype", "obstacle"),
    [
        (Layout(640, 128, 1, (0, 0)), jnp.bfloat16, None),
        (Layout(611, 128, 1, (0, 0)), jnp.bfloat16, "needs even lengths for its mask, got 611 and 128 tokens"),
        (Layout(611), jnp.bfloat16, None),
        (Layout(640, 128, 1, (0, 0)), jnp.float32, "needs float16 or bfloat16, got float32"),
    ],
)
def test_what_the_gpu_kernel_cannot_do(layout, dtype, obstacle):
    q = jax.ShapeDtypeStruct((1, layout.tokens, 4, 128), dtype)
    assert attention._obstacle("cudnn", "gpu", q, layout) == obstacle


@pytest.mark.parametrize("prefix", [255, 257, 513])
def test_long_prefixes_in_bands_equal_one_masked_product(prefix):
    layout = Layout(prefix, 3, 2, (0, 1))
    case = (layout, 4, 1, 8, [[prefix, prefix - 9], [2, prefix]], [[3, 1], [2, 3]])
    q, k, v, *rest = inputs(case)
    seen = layout.mask()[None] & valid(case)[:, None] | np.eye(layout.tokens, dtype=bool)[None]
    pull = np.where(valid(case)[:, :, None, None], np.random.default_rng(1).normal(size=q.shape), 0).astype(np.float32)

    def masked(q, k, v, *_):
        k, v = (jnp.repeat(x, 4, axis=2) for x in (k, v))
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k) * np.float32(8**-0.5)
        p = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("bhqs,bshk->bqhk", p, v)

    def run(function):
        loss = lambda *qkv: (lambda out: ((out * pull).sum(), out))(function(*qkv, *rest))
        return quick_jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (gradients, out), (want_gradients, want) = run(attention._xla), run(masked)
    np.testing.assert_allclose(out[valid(case)], want[valid(case)], rtol=1e-5, atol=1e-6)
    for got, wanted in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_auto_on_a_cpu_is_xla():
    q, k, _, layout, *_ = inputs(BLOCKS)
    assert attention.resolve_backend("auto", q, k, layout) == "xla"


@pytest.mark.parametrize(
    ("backend", "case", "message"),
    [
        ("flash", SMALL, "attention backend must be one of"),
        ("cudnn", SMALL, "'cudnn' needs an NVIDIA GPU, and this is cpu; use 'xla' or 'auto'"),
        ("splash", SMALL, "'splash' needs heads of a width divisible by 128, got 8"),
        ("splash", (Layout(130), 4, 4, 128, [[9], [4]], np.zeros((2, 0))), "tokens divisible by 128, got 130"),
        ("xla", (Layout(9), 6, 4, 8, [[9], [4]], np.zeros((2, 0))), "6 query heads do not divide among 4"),
    ],
)
def test_a_backend_that_cannot_raises(backend, case, message):
    with pytest.raises(ValueError, match=message):
        attention.attend(*inputs(case), backend)


def test_the_model_compiles_for_a_tpu_that_is_not_there():
    """Ahead of time, with libtpu from the `plan` extra: the model's gradient has the Mosaic kernels in it."""
    pytest.importorskip("libtpu", reason="needs the extra: pip install -e '.[plan]'")
    script = Path(__file__).parent / "compile_for_tpu.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *counts, slices = done.stdout.splitlines()
    kernels = {tuple(line.split()[:2]): int(line.split()[2]) for line in counts}
    # forward, its repetition in the backward pass, and the two kernels of the backward pass
    assert kernels["splash", "1"] >= 3
    assert kernels["splash", "4"] == kernels["splash", "1"]
    assert kernels["xla", "1"] == 0
    # A copy of the model keeps within a slice: what crosses the slow network is the sum over copies.
    assert slices == "slices [0] [1]"
