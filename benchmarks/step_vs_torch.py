"""One NaPO step, this code beside PyTorch: loss, gradients and AdamW on the same weights and batch, in one run.

    python benchmarks/step_vs_torch.py [--repeats 5] [--groups 1] [--trl]

A LLaVA of about 60M parameters, 576 image tokens, 32 question tokens and four answers of 128 tokens, float32 on the
CPU. PyTorch does what the released code does: four sequences of image, question and answer through `transformers` in
one batch, logits over the whole vocabulary at every position, reference log-probs from a cache. This code runs twice,
with the prefix shared by the four answers and without. The three losses and some gradients are compared before
anything is timed, and the timed steps are interleaved. `--trl` adds TRL's DPOTrainer on the three pairs.

The last line is JSON; `ratio` is PyTorch's median over the shared one's.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # both sides on the CPU, whatever else there is

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from napo_jax import load_pretrained
from napo_jax.logps import Logps
from napo_jax.methods import napo_released
from napo_jax.models import IMAGE_SLOT, Groups

CELLS = napo_released().cells
QUESTION, ANSWER, IMAGE, VOCAB = 32, 128, 576, 32000
OPTIMIZER = {"learning_rate": 5e-7, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def torch_model():
    """Returns a random LLaVA of about 60M parameters."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=VOCAB + 64,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=336,
            patch_size=14,
        ),
        image_token_index=VOCAB,
        image_seq_length=IMAGE,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = transformers.LlavaForConditionalGeneration(config).float()
    model.model.vision_tower.requires_grad_(False)
    return model


def made_up_batch(groups, seed=0):
    """Returns a batch of random words and pixels, every answer at its full length."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, VOCAB, (groups, 1, IMAGE + QUESTION))
    prefix[:, :, QUESTION // 2 : QUESTION // 2 + IMAGE] = IMAGE_SLOT
    return Groups(
        images=jnp.asarray(rng.normal(size=(groups, 1, 336, 336, 3)), jnp.float32),
        prefix_ids=jnp.asarray(prefix, jnp.int32),
        prefix_lengths=jnp.full((groups, 1), IMAGE + QUESTION, jnp.int32),
        answer_ids=jnp.asarray(rng.integers(3, VOCAB, (groups, len(CELLS), ANSWER)), jnp.int32),
        answer_lengths=jnp.full((groups, len(CELLS)), ANSWER, jnp.int32),
    )


# --- this code -------------------------------------------------------------------------------------------------------


def as_cells(logps):
    """Turns Logps of [B, C] into {cell: Logps of [B]}."""
    return {cell: Logps(logps.sum[:, c], logps.mean[:, c]) for c, cell in enumerate(CELLS)}


def shared(model, params, groups):
    """Scores the four answers on one prefix."""
    return model.logps(params, groups, (0,) * len(CELLS))


def unshared(model, params, groups):
    """Scores the four answers as four groups, each with the image and question of its own."""
    cells = len(CELLS)
    apart = Groups(
        *(jnp.repeat(field, cells, axis=0) for field in groups[:3]),
        *(field.reshape(-1, 1, *field.shape[2:]) for field in groups[3:5]),
    )
    logps = model.logps(params, apart, (0,))
    return Logps(*(value.reshape(-1, cells) for value in logps))


def jax_step(model, score, reference):
    """Returns a jitted step (trained, frozen, moments, groups) -> (trained, moments, loss, details)."""
    optimizer = optax.adamw(**OPTIMIZER)

    def loss_of(trained, frozen, groups):
        logps = score(model, {**trained, **frozen}, groups)
        return napo_released()(as_cells(logps), as_cells(reference))[0], logps.sum

    @partial(jax.jit, donate_argnums=(0, 2), static_argnames="details")
    def step(trained, frozen, moments, groups, details=False):
        (loss, sums), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained, frozen, groups)
        updates, moments = optimizer.update(gradients, moments, trained)
        return optax.apply_updates(trained, updates), moments, loss, (sums, gradients) if details else None

    return step, optimizer.init


# --- the released algorithm in PyTorch -------------------------------------------------------------------------------


def torch_inputs(groups):
    """Returns the four concatenated sequences, their pixels (once per sequence, as released) and their labels."""
    prefix = np.repeat(np.asarray(groups.prefix_ids), len(CELLS), axis=1)
    ids = np.concatenate([np.where(prefix == IMAGE_SLOT, VOCAB, prefix), np.asarray(groups.answer_ids)], axis=2)
    labels = np.concatenate([np.full_like(prefix, -100), np.asarray(groups.answer_ids)], axis=2)
    pixels = np.repeat(np.asarray(groups.images).transpose(0, 1, 4, 2, 3), len(CELLS), axis=1)
    flat = lambda x: torch.from_numpy(np.ascontiguousarray(x.reshape(-1, *x.shape[2:])))
    return flat(ids).long(), flat(pixels), flat(labels).long()


def torch_logps(model, ids, pixels, labels):
    """Returns summed and mean log-probs float[B, C] from logits over everything."""
    logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[:, :-1, :VOCAB]
    labels = labels[:, 1:]
    kept = labels != -100
    tokens = torch.gather(logits.log_softmax(-1), 2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    total = (tokens * kept).sum(-1).view(-1, len(CELLS))
    return total, total / kept.sum(-1).view(-1, len(CELLS))


def torch_loss(policy, reference):
    """Returns the released loss: DPO on the original pair, Box-Cox with a measured q on the two biased answers."""
    (sums, means), (reference_sums, reference_means) = policy, reference
    h, h_mean = sums - reference_sums, means - reference_means
    losses = -torch.nn.functional.logsigmoid(0.1 * (h[:, 0] - h[:, 1]))
    for cell, alpha, noise in ((2, 0.5, h_mean), (3, 0.01, h)):
        margin = (noise[:, 0] - noise[:, cell]).detach().mean()
        q = (2 * (1 - torch.sigmoid(alpha * margin))).clamp(0.001, 1.0)
        losses = losses + (1 - torch.sigmoid(0.1 * (h[:, 0] - h[:, cell])) ** q) / q
    return losses.mean()


def main():
    """Compares, times and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--groups", type=int, default=1, help="groups in the batch")
    parser.add_argument("--trl", action="store_true", help="also time TRL's DPOTrainer on the three pairs")
    options = parser.parse_args()

    net = torch_model()
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}M parameters, {options.groups} group(s) a step")
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        model, params = load_pretrained(folder, dtype=jnp.float32, remat="dots")
    groups = made_up_batch(options.groups)
    frozen = {"vision": params.pop("vision")}

    # A reference away from the policy, so that q and the margins are not at their starting point.
    ids, pixels, labels = torch_inputs(groups)
    with torch.no_grad():
        reference = [
            value + 0.004 * abs(value) * torch.randn_like(value) for value in torch_logps(net, ids, pixels, labels)
        ]
    cached = Logps(*(jnp.asarray(value.numpy()) for value in reference))

    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=5e-7, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )

    def torch_step():
        optimizer.zero_grad()
        loss = torch_loss(torch_logps(net, ids, pixels, labels), reference)
        loss.backward()
        optimizer.step()
        return loss.item()

    sides = {}
    losses, details = {}, {}
    for name, score in (("shared", shared), ("unshared", unshared)):
        step, init = jax_step(model, score, cached)
        trained = jax.tree.map(jnp.copy, params)
        first = step(trained, frozen, init(trained), groups, details=True)
        losses[name], details[name] = float(first[2]), first[3]
        state = [*first[:2]]

        def run(step=step, state=state):
            state[0], state[1], loss, _ = step(state[0], frozen, state[1], groups)
            return loss.block_until_ready()

        run()
        sides[name] = run
    with torch.no_grad():
        sums = torch_logps(net, ids, pixels, labels)[0]
    losses["torch"] = torch_step()
    check_agreement(losses, sums, details, net)
    sides["torch"] = torch_step
    if options.trl:
        from trl_dpo import trl_step

        sides["trl"] = trl_step(torch_model(), groups)
        losses["trl"] = sides["trl"]()  # its reference is its policy, so its first loss must be ln 2
        np.testing.assert_allclose(losses["trl"], np.log(2), rtol=1e-5)

    times = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    report(times, losses)


def check_agreement(losses, sums, details, net):
    """Raises unless log-probs agree to 1e-6, losses to 1e-4 and a few gradients to 1e-4 of their scale.

    A sum of 128 random words' log-probs is about -1300, of which float32 keeps 1e-4: the loss cannot agree better.
    """
    for name, (ours, _) in details.items():
        np.testing.assert_allclose(ours, sums.numpy(), rtol=1e-6, err_msg=f"log-probs of {name}")
        np.testing.assert_allclose(losses[name], losses["torch"], rtol=1e-4, err_msg=f"loss of {name}")
    layer, layers = net.model.language_model.layers[3], "layers"
    pairs = {
        "query of layer 3": (
            layer.self_attn.q_proj.weight.grad.T,
            lambda g: g["language"][layers]["attention"]["query"]["kernel"][3],
        ),
        "down of layer 3": (
            layer.mlp.down_proj.weight.grad.T,
            lambda g: g["language"][layers]["mlp"]["down"]["kernel"][3],
        ),
        "head": (net.lm_head.weight.grad[:VOCAB].T, lambda g: g["language"]["head"]),
        "projector": (net.model.multi_modal_projector.linear_1.weight.grad.T, lambda g: g["projector"]["up"]["kernel"]),
    }
    for leaf, (want, read) in pairs.items():
        for name, (_, tree) in details.items():
            error = np.max(np.abs(read(tree) - want.numpy())) / np.max(np.abs(want.numpy()))
            assert error < 1e-4, f"gradient of {leaf}, {name}: {error:.1e} of its scale"


def report(times, losses):
    """Prints the table and the JSON line."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\n{'':<12}{'median s':>10}{'min s':>10}{'max s':>10}{'torch / it':>12}{'loss':>12}")
    for name, values in times.items():
        row = f"{name:<12}{medians[name]:>10.2f}{min(values):>10.2f}{max(values):>10.2f}"
        print(row + f"{medians['torch'] / medians[name]:>12.2f}{losses.get(name, float('nan')):>12.7f}")
    print(
        json.dumps(
            {
                "benchmark": "step_vs_torch",
                "ratio": round(medians["torch"] / medians["shared"], 2),
                "ratio_unshared": round(medians["unshared"] / medians["shared"], 2),
                "seconds": {name: round(value, 3) for name, value in medians.items()},
                "repeats": len(times["shared"]),
                "versions": {
                    "jax": jax.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
        )
    )


if __name__ == "__main__":
    main()
