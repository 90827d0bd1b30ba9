"""LLaVA-1.5 as functions of its parameters: answers are scored, each image and question computed once, and spoken."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax import logps as log_probs
from napo_jax.models.layout import Layout
from napo_jax.models.lora import LoraConfig, is_adapter
from napo_jax.models.network import IMAGE_SLOT, LlavaConfig, Network
from napo_jax.models.packing import take
from napo_jax.sharding import keep_rows


class Groups(NamedTuple):
    """A batch of groups: M prefixes and C answers each, right-padded."""

    images: jax.Array  # float32[B, M, I, I, 3], normalised; several pictures of one prefix as [B, M, n, I, I, 3]
    prefix_ids: jax.Array  # int32[B, M, P], with IMAGE_SLOT where image tokens go: those of the first pictures, or none
    prefix_lengths: jax.Array  # int32[B, M], at least 1
    answer_ids: jax.Array  # int32[B, C, T], ending in </s>
    answer_lengths: jax.Array  # int32[B, C], 0 for an answer that is not there
    token_weights: jax.Array | None = None  # float32[B, C, T], a factor on each token's log-prob
    edited: jax.Array | None = None  # bool[B, C, T], tokens that are also summed on their own


def layers_apart(params):
    """Returns the parameter tree with a tuple of trees, one for each layer of the decoder, in place of its layers.

    These are copies; all other leaves are those of the tree given.
    """
    language = params["language"]
    return params | {"language": language | {"layers": _apart(language["layers"])}}


@jax.jit
def _apart(layers):
    """Cuts a tree of float[L, ...] into a tuple of L trees."""
    leaves, tree = jax.tree.flatten(layers)
    return tuple(tree.unflatten([leaf[layer] for leaf in leaves]) for layer in range(leaves[0].shape[0]))


@dataclasses.dataclass(frozen=True)
class Llava:
    """LLaVA as pure functions of a parameter tree, a plain dict of `vision`, `projector` and `language`.

    With a reward head there is `reward` too.
    """

    config: LlavaConfig = dataclasses.field(default_factory=LlavaConfig)

    @property
    def without_adapters(self) -> "Llava":
        """The same model without its LoRA adapters; it takes a tree with them and leaves them alone."""
        return Llava(dataclasses.replace(self.config, lora=LoraConfig()))

    def init(self, key):
        """Draws random parameters; under `jax.eval_shape`, tells their shapes without any memory."""
        vision = self.config.vision
        prefix = jnp.full((1, 1, vision.image_tokens), IMAGE_SLOT, jnp.int32)
        image = jnp.zeros((1, 1, vision.image_size, vision.image_size, 3), jnp.float32)
        lengths = jnp.full((1, 1), vision.image_tokens, jnp.int32)
        network = Network(dataclasses.replace(self.config, attention="xla"))  # any backend has the same parameters
        params = network.init(key, image, prefix, lengths, *self._no_answers(1), ())["params"]
        if self.config.reward_head:
            # At 0 no answer is better than another, and the loss begins at ln 2, as that of every pair does.
            width, dtype = self.config.text.width, self.config.param_dtype
            params = params | {"reward": {"kernel": jnp.zeros((width, 1), dtype), "bias": jnp.zeros((1,), dtype)}}
        return params

    def logits(self, params, input_ids, images):
        """Computes next-token logits of whole sequences, nothing shared: the yardstick for the rest.

        Args:
          params: the parameter tree.
          input_ids: int32[B, S], with IMAGE_SLOT where image tokens go; right-padded, if at all.
          images: float32[B, I, I, 3], normalised; several pictures a row as [B, n, I, I, 3].

        Returns:
          float32[B, S, V].
        """
        check_images(images, input_ids.shape[:1], self.config)
        ids = input_ids[:, None]
        lengths = jnp.full(ids.shape[:2], ids.shape[2], jnp.int32)
        prefix, _ = self._apply(params, images[:, None], ids, lengths, *self._no_answers(len(ids)), ())
        head = params["language"]["head"].astype(prefix.dtype)
        return jnp.einsum("bsd,dv->bsv", prefix[:, 0], head, preferred_element_type=jnp.float32)

    def logps(self, params, groups, cell_image, packing=None, dropout=None, reference=None):
        """Scores all answers of each group, computing each image and question once.

        Args:
          params: the parameter tree.
          groups: the batch.
          cell_image: for each of the C cells, the index of the prefix that it continues; `Objective.cell_image`.
          packing: a `Packing`, to compute no more tokens of a group than it has places; or None, to compute padding
            like any token. The results are the same; those of a group with more tokens than places are NaN.
          dropout: a key for the dropout of adapters, in training; None drops nothing.
          reference: a pair of a `Llava` and its parameters, to tell the divergence from; None tells none.

        Returns:
          Logps(sum, mean), float32[B, C] each, over the answers' tokens and with their weights if there are any. With
          edited tokens, or with a reference, DetailedLogps: the same of the edited ones, and the sum of
          KL(reference || policy).
        """
        hidden = self.predictors(params, groups, cell_image, packing, dropout)
        values = self._token_logps(params, hidden, groups, cell_image, packing)
        lengths = groups.answer_lengths
        logps = log_probs.over_answers(values, lengths, groups.token_weights)
        edited = kl = None
        if groups.edited is not None:
            edited = log_probs.over_edits(values, lengths, groups.edited)
        if reference is not None:
            values = self._token_kl(params, hidden, reference, groups, cell_image, packing)
            kl = log_probs.over_answers(values, lengths).sum
        return logps if edited is None and kl is None else log_probs.DetailedLogps(*logps, edited, kl)

    def token_logps(self, params, groups, cell_image, packing=None, dropout=None, gates=None):
        """Computes the log-prob of every answer token, float32[B, C, T]; see `logps` and `predictors`."""
        hidden = self.predictors(params, groups, cell_image, packing, dropout, gates)
        return self._token_logps(params, hidden, groups, cell_image, packing)

    def rewards(self, params, groups, cell_image, packing=None, dropout=None):
        """Computes the reward of every answer, float32[B, C]: a linear map of its last token's final hidden state.

        That of an empty answer is of no use. See `logps` for the arguments; no vocabulary is gone through.
        """
        if "reward" not in params:
            raise ValueError("the parameters hold no reward head: it is trained by the objective reward")
        last = self._last_states(params, groups, cell_image, packing, dropout)
        head = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params["reward"])
        with jax.named_scope("reward"):
            # In float32: one product for each answer, whose sum over D would lose what tells answers apart.
            values = jnp.einsum("bcd,d->bc", last.astype(jnp.float32), head["kernel"][:, 0], precision="highest")
            return values + head["bias"][0]

    def _last_states(self, params, groups, cell_image, packing, dropout):
        """Returns the final hidden state of each answer's last token, float[B, C, D]."""
        check_groups(groups, cell_image, self.config)
        cells, tokens = groups.answer_ids.shape[1:]
        last = jnp.maximum(groups.answer_lengths - 1, 0)
        if packing is None:
            _, answer = self._apply(params, *groups[:5], cell_image, dropout=dropout)
            return keep_rows(jnp.take_along_axis(answer, last[:, :, None, None], axis=2)[:, :, 0])
        order = self._order(groups, cell_image, packing)
        hidden = self._apply(params, *groups[:5], order, method="packed", dropout=dropout)
        place = order.layout.prefixes * order.layout.prefix_tokens + np.arange(cells)[None] * tokens + last
        found = take(hidden, take(order.packed_places, place))
        return keep_rows(jnp.where(order.fits[:, None, None], found, jnp.nan))

    def _token_logps(self, params, hidden, groups, cell_image, packing):
        head = params["language"]["head"]
        order = self._order(groups, cell_image, packing)
        targets = groups.answer_ids if order is None else order.pack_answers(groups.answer_ids)[:, None]
        with jax.named_scope("logps"):
            values = log_probs.token_logps(hidden, head, targets, chunk=self._chunk(hidden, groups))
            return values if order is None else order.unpack_answers(values[:, 0])

    def prompts(self, params, images, ids, lengths):
        """Reads prompts, to go on from with `next_token`.

        Args:
          params: the parameter tree.
          images: float32[B, I, I, 3], normalised; of no matter to a prompt without image tokens. None if all are such.
            Several pictures a prompt as [B, n, I, I, 3].
          ids: int32[B, P], right-padded, with IMAGE_SLOT where image tokens go: those of the first pictures, or none.
          lengths: int32[B].

        Returns:
          float32[B, V], the logits of the first token to say; and (keys, values), float[L, B, G, K, P] and
          float[L, B, G, P, K]. With parameters that are `layers_apart`, a list of them by layer.
        """
        if images is not None:
            check_images(images, ids.shape[:1], self.config)
        return self._apply(params, images, ids, lengths, method="prompts")

    def next_token(self, params, ids, mix, kept):
        """Reads one token of each beam.

        Args:
          params: the parameter tree.
          ids: int32[S, N], the tokens that were just said.
          mix: `NextToken`.
          kept: `Kept`; or a list of it by layer, with parameters that are `layers_apart`.

        Returns:
          float32[S, N, V], the logits of the tokens to say next; and (keys, values), float[L, S, N, G, K] each, or, if
          `mix.writes`, what is kept then, in the form of `kept`.
        """
        return self._apply(params, ids, mix, kept, method="next_token")

    def token_kl(self, params, reference_params, groups, cell_image, packing=None):
        """Computes KL(reference || policy) over the vocabulary at every answer token, float32[B, C, T]."""
        hidden = self.predictors(params, groups, cell_image, packing)
        return self._token_kl(params, hidden, (self, reference_params), groups, cell_image, packing)

    def _token_kl(self, params, hidden, reference, groups, cell_image, packing):
        model, constant = reference[0], jax.lax.stop_gradient(reference[1])
        theirs = jax.lax.stop_gradient(model.predictors(constant, groups, cell_image, packing))
        heads = params["language"]["head"], constant["language"]["head"]
        order = self._order(groups, cell_image, packing)
        with jax.named_scope("token_kl"):
            values = log_probs.token_kl(hidden, heads[0], theirs, heads[1], chunk=self._chunk(hidden, groups))
            return values if order is None else order.unpack_answers(values[:, 0])

    def predictors(self, params, groups, cell_image, packing=None, dropout=None, gates=None):
        """Computes the hidden states that predict the answer tokens, float[B, C, T, D].

        The first token of an answer is predicted by the last token of its prefix, the others by the token before. With
        a packing the answers lie one behind another, as one answer: float[B, 1, A, D]; see `TokenOrder.unpack_answers`.

        Gates, float32[B, M, N], let each image token through: 1 as it is, 0 as the mean of its picture's tokens. They
        are there to be differentiated by, and take no packing.
        """
        check_groups(groups, cell_image, self.config)
        if packing is not None:
            if gates is not None:
                raise ValueError("gates need the whole groups, and not a packing")
            order = self._order(groups, cell_image, packing)
            hidden = self._apply(params, *groups[:5], order, method="packed", dropout=dropout)
            return keep_rows(order.predictors(hidden))[:, None]
        prefix, answer = self._apply(params, *groups[:5], cell_image, gates, dropout=dropout)
        last = jnp.take_along_axis(prefix, groups.prefix_lengths[:, :, None, None] - 1, axis=2)
        last = last[:, np.array(cell_image, np.int32)]
        return keep_rows(jnp.concatenate([last, answer[:, :, :-1]], axis=2))

    def _order(self, groups, cell_image, packing):
        """Returns the `TokenOrder` of a batch, or None without a packing."""
        if packing is None:
            return None
        layout = Layout(groups.prefix_ids.shape[2], groups.answer_ids.shape[2], groups.prefix_ids.shape[1], cell_image)
        lengths = groups.prefix_lengths, groups.answer_lengths
        return packing.order(layout, *lengths, self.config.text.max_positions)

    def _chunk(self, hidden, groups):
        """Returns the chunk over the third axis of predictors that holds `logits_chunk` tokens of each answer."""
        return self.config.logits_chunk * groups.answer_ids.shape[1] // hidden.shape[1]

    @property
    def _network(self):
        return Network(self.config)

    @staticmethod
    def _no_answers(batch):
        return jnp.zeros((batch, 0, 0), jnp.int32), jnp.zeros((batch, 0), jnp.int32)

    def _apply(self, params, *args, method=None, dropout=None):
        rngs = {} if dropout is None else {"dropout": dropout}
        return self._network.apply({"params": params}, *args, method=method, rngs=rngs)


def without_missing_adapters(model: Llava, leaves) -> Llava:
    """Returns the model as {path: leaf} fit it: without adapters where there are none among them."""
    return model if any(map(is_adapter, leaves)) else model.without_adapters


def check_groups(groups, cell_image, config):
    """Checks that the shapes of a batch belong together; raises a ValueError that says which do not."""
    batch, prefixes, _ = groups.prefix_ids.shape
    cells = groups.answer_ids.shape[1]
    check_images(groups.images, (batch, prefixes), config)
    expected = {
        "prefix_lengths": ((batch, prefixes), groups.prefix_lengths.shape),
        "answer_ids": (batch, groups.answer_ids.shape[0]),
        "answer_lengths": ((batch, cells), groups.answer_lengths.shape),
        "cell_image": (cells, len(cell_image)),
    }
    if groups.token_weights is not None:
        expected["token_weights"] = (groups.answer_ids.shape, groups.token_weights.shape)
    if groups.edited is not None:
        expected["edited"] = (groups.answer_ids.shape, groups.edited.shape)
    for name, (want, got) in expected.items():
        if want != got:
            raise ValueError(
                f"{name}: expected {want}, got {got}, beside prefix_ids of shape {groups.prefix_ids.shape}"
            )


def check_images(images, lead, config):
    """Checks that images are float [*lead, I, I, 3], or [*lead, n, I, I, 3] for several pictures of a prefix."""
    size, rank = config.vision.image_size, len(lead)
    fits = images.ndim in (rank + 3, rank + 4) and images.shape[:rank] == lead and images.shape[-3:] == (size, size, 3)
    if not fits or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images: expected normalised float {[*lead, size, size, 3]}, got {images.dtype} {list(images.shape)}"
        )
