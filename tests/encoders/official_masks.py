"""SAM's own `SamAutomaticMaskGenerator`, the oracle of masks, around parts of a model; and a comparison of masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam
from segment_anything.utils.amg import MaskData, batched_mask_to_box, calculate_stability_score, mask_to_rle_pytorch
from torch import Tensor, nn

from pipeline.encoders.masks.decoder import Decoder
from pipeline.encoders.masks.everything import Everything, box_grid
from pipeline.encoders.masks.rules import MaskRules

Masks = npt.NDArray[np.bool_]


class Known(nn.Module):
    """An image encoder that has encoded its one image already."""

    def __init__(self, neck: Tensor, input_px: int) -> None:
        super().__init__()
        self.img_size = input_px
        self.register_buffer("neck", neck.permute(2, 0, 1)[None].contiguous())

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == self.img_size
        return self.get_buffer("neck")


class FromBoxes(SamAutomaticMaskGenerator):
    """The official generator, asking for our boxes instead of points: what it does with a batch, word for word else."""

    def __init__(self, model: Sam, rules: MaskRules, **options: Any) -> None:
        super().__init__(model, **options)
        self.rules = rules

    def _process_batch(self, points: Any, im_size: Any, crop_box: Any, orig_size: Any) -> MaskData:
        predictor = self.predictor
        boxes = box_grid(im_size, self.rules.box_sides, self.rules.box_step)
        resized = predictor.transform.apply_boxes_torch(boxes, im_size)
        masks, predicted, _ = predictor.predict_torch(
            None, None, boxes=resized, multimask_output=False, return_logits=True
        )
        data = MaskData(masks=masks.flatten(0, 1), iou_preds=predicted.flatten(0, 1), points=boxes[:, :2])
        data.filter(data["iou_preds"] > self.pred_iou_thresh)
        data["stability_score"] = calculate_stability_score(data["masks"], 0.0, self.stability_score_offset)
        data.filter(data["stability_score"] >= self.stability_score_thresh)
        data["masks"] = data["masks"] > 0
        data["boxes"] = batched_mask_to_box(data["masks"])
        data["rles"] = mask_to_rle_pytorch(data["masks"])
        del data["masks"]
        return data


def official_masks(
    prompts: PromptEncoder, masks: MaskDecoder, neck: Tensor, image: npt.NDArray[np.uint8], rules: MaskRules
) -> list[dict[str, Any]]:
    """Masks of the official generator, the best first.

    Args:
        prompts: The official prompt encoder, as it was before ours changed it to fit.
        masks: The official mask decoder.
        neck: (h, w, C), what the image encoder makes of the image.
        image: uint8 (H, W, 3); only its size counts.
        rules: The settings.
    """
    model = Sam(Known(neck, prompts.input_image_size[0]), prompts, masks).eval()
    options = {
        "points_per_batch": 64,
        "pred_iou_thresh": rules.predicted_iou,
        "stability_score_thresh": rules.stability,
        "stability_score_offset": rules.stability_offset,
        "box_nms_thresh": rules.overlap,
        "crop_nms_thresh": rules.overlap,
        "min_mask_region_area": rules.min_region_px,
    }
    if rules.prompts == "points":
        generator = SamAutomaticMaskGenerator(model, points_per_side=rules.points, **options)
    else:
        generator = FromBoxes(model, rules, points_per_side=1, **options)
    with torch.no_grad():
        found = generator.generate(image)
    return sorted(found, key=lambda mask: -mask["predicted_iou"])


def best_ious(ours: Masks, theirs: Masks) -> npt.NDArray[np.float64]:
    """For each of their masks (k, H, W) the largest IoU with one of ours (n, H, W)."""
    if not len(ours):
        return np.zeros(len(theirs))
    a, b = (masks.reshape(len(masks), -1).astype(np.float32) for masks in (ours, theirs))
    both = b @ a.T
    return np.asarray((both / (b.sum(1)[:, None] + a.sum(1)[None] - both)).max(1), np.float64)


def rules_for(decoder: Decoder, map_: Tensor, size: tuple[int, int], rules: MaskRules) -> MaskRules:
    """The rules with thresholds that about half of all masks pass; random weights give masks that are all over."""
    loose = replace(rules, predicted_iou=0.0, stability=0.0)
    with torch.no_grad():
        _, scores = Everything(decoder, loose, 256).candidates(decoder.look(map_), size)
    predicted, stability = (float(value) for value in scores.quantile(0.4, dim=1))
    return replace(rules, predicted_iou=min(max(predicted, 0.01), 1.0), stability=min(stability, 1.0))
