"""The DPO step of TRL, for `step_vs_torch.py --trl`.

    pip install -e . torch==2.13.0 trl==1.16.0 datasets accelerate
    HF_HUB_OFFLINE=1 python benchmarks/step_vs_torch.py --trl

There is no cache of the reference: TRL refuses `precompute_ref_log_probs` for datasets with images, so every step runs
a second, frozen model too. HF_HUB_OFFLINE also stops the telemetry that TRL sends.
"""

import copy
import tempfile

import datasets
import numpy as np
import tokenizers
import transformers
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from trl import DPOConfig, DPOTrainer

from napo_jax.models import IMAGE_SLOT, Groups


def trl_step(model: transformers.LlavaForConditionalGeneration, groups: Groups):
    """Returns a function that takes one optimizer step of TRL's DPOTrainer and returns its loss.

    Each group gives three rows, its first answer against each of the others, so a batch holds three pairs, that is six
    sequences, per group. TRL's collator makes the batch, but here and once, so that no step includes data preparation.
    A step does with that batch what `Trainer.train` does: `training_step` (both models' forwards, DPO, its metrics,
    backward), then optimizer, schedule and `zero_grad`. Left out are the loop's callbacks, logging and gradient
    clipping. Off, against TRL's defaults: gradient checkpointing, bfloat16, truncation, the learning rate's decay.

    Args:
      model: a LLaVA in float32 on the CPU; TRL changes its `forward`, and the steps change its weights.
      groups: a batch whose prefixes and answers are all at their full length.
    """
    rows = preference_rows(groups)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            ref_model=copy.deepcopy(model).eval(),  # what TRL loads by itself where the model has a path
            args=DPOConfig(
                folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                max_length=None,
                beta=0.1,
                learning_rate=5e-7,
                weight_decay=0.01,
                lr_scheduler_type="constant",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            processing_class=made_up_processor(model.config),
        )
    batch = trainer.data_collator(list(rows))
    check_batch(batch, model.config, groups)
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trained, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1  # set by `train` for each step

    def step():
        loss = trainer.training_step(trained, batch)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trained.zero_grad()
        return loss.item()

    return step


def made_up_processor(config):
    """Returns a LLaVA processor whose words are the ids themselves, in decimal."""
    image, pad = config.image_token_id, config.image_token_id + 1
    words = {str(index): index for index in range(image)} | {"<image>": image, "<pad>": pad}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    side = config.vision_config.image_size
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_convert_rgb=False
        ),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
        ),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )


def preference_rows(groups):
    """Returns the dataset: pixels as 8-bit images, so rounded and clipped, and ids as words."""
    text = lambda ids: " ".join(map(str, ids))
    rows = []
    fields = map(np.asarray, (groups.images, groups.prefix_ids, groups.answer_ids))
    for image, prefix, answers in zip(*fields, strict=True):
        pixels = 255 * (image[0] * OPENAI_CLIP_STD + OPENAI_CLIP_MEAN)
        slots = np.flatnonzero(prefix[0] == IMAGE_SLOT)
        shared = {
            "images": [Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))],
            "prompt": f"{text(prefix[0, : slots[0]])} <image> {text(prefix[0, slots[-1] + 1 :])}",
        }
        chosen, *rejected = map(text, answers)
        rows += [{**shared, "chosen": chosen, "rejected": other} for other in rejected]
    return datasets.Dataset.from_list(rows)


def check_batch(batch, config, groups):
    """Raises unless the batch holds every token of every sequence: the chosen ones of all pairs, then the others."""
    prefix, answers = np.asarray(groups.prefix_ids), np.asarray(groups.answer_ids)
    ids = np.where(prefix == IMAGE_SLOT, config.image_token_id, prefix).repeat(answers.shape[1], axis=1)
    ids = np.concatenate([ids, answers], axis=2)
    pairs = ids[:, :1].repeat(answers.shape[1] - 1, axis=1), ids[:, 1:]
    want = np.concatenate([half.reshape(-1, ids.shape[2]) for half in pairs])
    np.testing.assert_array_equal(batch["input_ids"], want)
    assert batch["attention_mask"].all()
    assert (batch["completion_mask"].numpy() == (np.arange(ids.shape[2]) >= prefix.shape[2])).all()
    assert len(batch["pixel_values"]) == len(want)
