"""Boxes of what words name, by a detector of `transformers`, and masks of what is in them, by SAM; both in PyTorch.

The weights are those of local folders: nothing is downloaded.
"""

from pathlib import Path

import numpy as np


class Detector:
    """A zero-shot object detector such as OWL-ViT or Grounding DINO, with or without SAM."""

    def __init__(self, folder: str, sam: str | None = None, threshold: float | None = None):
        """Loads the models; raises one line if that cannot be.

        Args:
          folder: of the detector, in the layout of `transformers`.
          sam: the folder of a SAM, to find the outline of what is in a box.
          threshold: the least score of a box; None for the one that the detector's own code has.
        """
        torch = _torch()
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, SamModel

        self._torch, self._device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        self._threshold = {} if threshold is None else {"threshold": threshold}
        self._processor, self._model = self._load(folder, AutoProcessor, AutoModelForZeroShotObjectDetection)
        self._sam = None if sam is None else self._load(sam, AutoProcessor, SamModel)

    def _load(self, folder, processor, model):
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder: models are read from local ones, and none is downloaded")
        try:
            # Weights in safetensors, and no code of the folder's own.
            loaded = model.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            return processor.from_pretrained(folder, local_files_only=True), loaded.eval().to(self._device)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ValueError(f"{folder} cannot be read as a {model.__name__}: {error}") from None

    def find(self, image, words) -> list[tuple[float, float, float, float]]:
        """Returns left, top, right and bottom of what some words name in a picture, in its pixels.

        Args:
          image: an RGB `PIL.Image`.
          words: at least one.
        """
        inputs = self._processor(images=image, text=[words], return_tensors="pt", truncation=True).to(self._device)
        with self._torch.no_grad():
            outputs = self._model(**inputs)
        (found,) = self._processor.post_process_grounded_object_detection(
            outputs, target_sizes=[image.size[::-1]], text_labels=[words], **self._threshold
        )
        return [tuple(box) for box in found["boxes"].tolist()]

    def outline(self, image, boxes) -> list[np.ndarray]:
        """Returns the mask of what is in each box, bool[height, width]; of SAM's three the one it trusts most.

        Args:
          image: an RGB `PIL.Image`.
          boxes: at least one.
        """
        processor, sam = self._sam
        inputs = processor(images=image, input_boxes=[[list(box) for box in boxes]], return_tensors="pt")
        inputs = inputs.to(self._torch.float32).to(self._device)  # boxes come as float64
        with self._torch.no_grad():
            outputs = sam(**inputs)
        sizes = inputs["original_sizes"].cpu(), inputs["reshaped_input_sizes"].cpu()
        (masks,) = processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)
        best = outputs.iou_scores[0].argmax(dim=-1).tolist()
        return [masks[box, one].numpy() for box, one in enumerate(best)]

    @property
    def outlines(self) -> bool:
        """Whether there is a SAM."""
        return self._sam is not None


def _torch():
    try:
        import torch
    except ImportError:
        raise ValueError(
            "--grounder detector needs PyTorch, which is not installed: pip install 'napo-jax[detect]'"
        ) from None
    return torch


def files_of(folder) -> dict[str, int]:
    """Returns the names and sizes of the files that decide what a model does."""
    return {file.name: file.stat().st_size for file in sorted(Path(folder).glob("*")) if file.suffix in _DECIDES}


_DECIDES = (".json", ".safetensors", ".txt", ".model")
