"""Generation, this code beside `transformers`: greedy and beam 3 on the same weights and prompts, in one run.

    python benchmarks/generate_vs_hf.py [--prompts 16] [--tokens 64] [--repeats 5] [--beams 1 3]

The LLaVA of about 60M parameters of `step_vs_torch.py`, 576 image tokens, 32 question tokens, float32 on the CPU. The
end of an answer is never said, so that both sides do the same work. Tokens are compared before anything counts: in that
run `transformers` is tried at batch sizes 1, 4, 8 and 16, and the two fastest go on. Then all take turns, and its best
one counts.

The last line is JSON; `ratio` is this code's examples a second over the others', for beam 3.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from step_vs_torch import IMAGE, QUESTION, VOCAB, torch_model

from napo_jax import load_pretrained
from napo_jax.decoding import Decoding
from napo_jax.generate import Generator, Prompt
from napo_jax.models import IMAGE_SLOT

NEVER = VOCAB + 1  # the "end": one of the rows behind the vocabulary, which are never said
BATCH_SIZES = (1, 4, 8, 16)


def made_up_prompts(count):
    """Returns prompts of random words around a random picture."""
    random = np.random.default_rng(0)
    prompts = []
    for number in range(count):
        ids = random.integers(3, VOCAB, IMAGE + QUESTION).astype(np.int32)
        ids[QUESTION // 2 : QUESTION // 2 + IMAGE] = IMAGE_SLOT
        prompts.append(Prompt(number, ids, random.normal(size=(336, 336, 3)).astype(np.float32)))
    return prompts


def by_transformers(model, prompts, tokens, beams, batch_size):
    """Returns the new tokens of all prompts."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        ids = np.stack([np.where(prompt.ids == IMAGE_SLOT, VOCAB, prompt.ids) for prompt in some])
        pixels = np.stack([prompt.image.transpose(2, 0, 1) for prompt in some])
        ids = torch.from_numpy(ids).long()
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.from_numpy(pixels),
                max_new_tokens=tokens,
                num_beams=beams,
                do_sample=False,
                eos_token_id=NEVER,
                pad_token_id=0,
            )
        answers += out[:, ids.shape[1] :].tolist()
    return answers


def timed(run):
    """Returns what a function returns, and the seconds that it took."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def main():
    """Prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer")
    parser.add_argument("--slots", type=int, default=16, help="prompts that this code answers at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3], help="`ratio` is of the last")
    options = parser.parse_args()

    reference = torch_model().eval()

    def words_only(module, inputs, logits):
        """Lets nothing behind the vocabulary be said, as this code has no such rows."""
        logits[..., VOCAB:] = -1e9

    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model, params = load_pretrained(folder, dtype=jnp.float32, remat="none")
    reference.lm_head.register_forward_hook(words_only)
    prompts = made_up_prompts(options.prompts)
    rows = []
    for beams in options.beams:
        decoding = Decoding(beams=beams, max_tokens=options.tokens)
        room = IMAGE + QUESTION
        generator = Generator(model, params, decoding, eos=NEVER, slots=options.slots, prompt_tokens=room)
        ours = lambda generator=generator: {answer.key: answer.ids for answer in generator(prompts)}
        others = {
            f"transformers, {size} at a time": lambda size=size, beams=beams: dict(
                enumerate(by_transformers(reference, prompts, options.tokens, beams, size))
            )
            for size in sorted({min(size, options.prompts) for size in BATCH_SIZES})
        }
        wanted, first = ours(), {}
        for name, run in others.items():
            said, first[name] = timed(run)
            different = [key for key in wanted if said[key] != wanted[key]]
            if different:
                raise SystemExit(f"{name}: the answers to prompts {different} are others, so nothing is timed")
            print(f"  {name:<30} {options.prompts / first[name]:.3f} examples/s at first", flush=True)
        fastest = sorted(others, key=first.get)[:2]
        sides = {"this code": ours} | {name: others[name] for name in fastest}
        times = {name: [] for name in sides}
        for _ in range(options.repeats):
            for name, run in sides.items():
                times[name].append(timed(run)[1])
        speed = {name: options.prompts / statistics.median(seconds) for name, seconds in times.items()}
        best = max((name for name in speed if name != "this code"), key=speed.get)
        print(f"{'greedy' if beams == 1 else f'beam {beams}'}: all answers are equal")
        for name, rate in speed.items():
            seconds = ", ".join(f"{value:.1f}" for value in times[name])
            print(f"  {name:<30} {rate:.3f} examples/s  (s: {seconds})", flush=True)
        rows.append({"beams": beams, "ratio": round(speed["this code"] / speed[best], 2)} | speed)
    versions = {module.__name__: module.__version__ for module in (jax, torch, transformers)}
    line = {"benchmark": "generate_vs_hf", "ratio": rows[-1]["ratio"], "rows": rows, "versions": versions}
    print(json.dumps(line | vars(options)))


if __name__ == "__main__":
    main()
