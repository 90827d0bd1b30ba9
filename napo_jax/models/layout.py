"""How prefixes and answers lie in one token axis, and who may attend to whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """M prefixes of P tokens, then C answers of T tokens: [prefix 0 | ... | answer 0 | ...], S = M P + C T.

    Every matrix product of the model runs over all S tokens at once; only attention has to know the streams apart. A
    prefix attends to itself, causally. An answer attends to the prefix of its image and, causally, to itself: never to
    another answer, so that each scores as if it were alone. Positions are right-padded; padding comes after what it
    could disturb, so only the keys between a prefix's end and its answers have to be masked.

    For M = 1, P = 3, C = 2, T = 2, where row attends to column:

                 p p p | a a | b b
            p    x     |     |
            p    x x   |     |
            p    x x x |     |
            a    x x x | x   |
            a    x x x | x x |
            b    x x x |     | x
            b    x x x |     | x x
    """

    prefix_tokens: int  # P
    answer_tokens: int = 0  # T
    prefixes: int = 1  # M
    cell_image: tuple[int, ...] = ()  # for each cell, the prefix that it continues

    def __post_init__(self):
        """Checks that every cell continues a prefix that there is."""
        if any(not 0 <= image < self.prefixes for image in self.cell_image):
            raise ValueError(f"cell_image {self.cell_image} names an image variant outside 0 to {self.prefixes - 1}")

    @property
    def cells(self) -> int:
        """The number of cells, C."""
        return len(self.cell_image)

    @property
    def tokens(self) -> int:
        """The number of tokens of a group, S."""
        return self.prefixes * self.prefix_tokens + self.cells * self.answer_tokens

    def split(self, x):
        """Splits [B, S, ...] into [B, M, P, ...] and [B, C, T, ...]."""
        cut = self.prefixes * self.prefix_tokens
        prefix = x[:, :cut].reshape(x.shape[0], self.prefixes, self.prefix_tokens, *x.shape[2:])
        answer = x[:, cut:].reshape(x.shape[0], self.cells, self.answer_tokens, *x.shape[2:])
        return prefix, answer

    def join(self, prefix, answer):
        """Joins [B, M, P, ...] and [B, C, T, ...] into [B, S, ...]."""
        flat = [x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]) for x in (prefix, answer)]
        return jnp.concatenate(flat, axis=1)

    def of_cells(self, x):
        """Takes [B, M, ...] to [B, C, ...]: for each cell, what belongs to its image."""
        return x[:, np.array(self.cell_image, np.int32)]

    def positions(self, prefix_lengths):
        """Returns the position of every token, int32[B, S], from int32[B, M]: answers go on where their prefix ends."""
        batch = prefix_lengths.shape[0]
        prefix = jnp.broadcast_to(jnp.arange(self.prefix_tokens), (batch, self.prefixes, self.prefix_tokens))
        answer = self.of_cells(prefix_lengths)[:, :, None] + jnp.arange(self.answer_tokens)[None, None]
        return self.join(prefix, answer)

    def valid(self, prefix_lengths, answer_lengths):
        """Returns which tokens are no padding, bool[B, S], from int32[B, M] and int32[B, C]."""
        prefix = jnp.arange(self.prefix_tokens)[None, None] < prefix_lengths[:, :, None]
        answer = jnp.arange(self.answer_tokens)[None, None] < answer_lengths[:, :, None]
        return self.join(prefix, answer)

    def mask(self) -> np.ndarray:
        """Returns the picture above as bool[S, S]; lengths are not in it."""
        stream = np.repeat(np.arange(self.prefixes), self.prefix_tokens)
        stream = np.concatenate([stream, np.repeat(self.prefixes + np.arange(self.cells), self.answer_tokens)])
        causal = np.tri(self.tokens, dtype=bool)
        # The prefix that a token's stream continues; prefixes continue none.
        reads = np.array([*[-1] * self.prefixes, *self.cell_image])[stream]
        return (causal & (stream[:, None] == stream[None])) | (reads[:, None] == stream[None])


def rope_tables(positions, width, theta):
    """Returns cos and sin of the rotary angles, float32[B, S, K / 2] each, from int32[B, S]."""
    frequencies = theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, tables):
    """Rotates float[B, S, H, K] by its positions, pairing the halves of a head as Llama does."""
    cos, sin = (table[:, :, None].astype(jnp.float32) for table in tables)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
