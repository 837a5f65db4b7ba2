"""CLIP's own tokens as region embeddings: nothing is learnt, the model is a plain CLIP.

Letters: B images, N image tokens, D token width, E embedding width, R regions (packed).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from cloc_mllm.models.position import mask_boxes, token_cells
from cloc_mllm.models.region_encoders import Nearness
from cloc_mllm.models.region_encoders.pooling import box_of_similarity, cosines, pool_under_boxes
from cloc_mllm.models.vision_encoder import ImageFeatures


class ClipTokenEncoder(nn.Module):
    """The mean of CLIP's projected tokens under the box.

    See `RegionEncoder` for the methods. It has no `forward`, because it has no loss.

    Args:
        project_tokens: CLIP's projection of the tokens, float[B, N, D] -> float[B, N, E].
    """

    has_region_loss = False
    predicts_boxes = False
    takes_masks = False

    def __init__(self, project_tokens: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.project_tokens = project_tokens

    def prepare(self, image: ImageFeatures) -> ImageFeatures:
        return image

    def embed_boxes(
        self, image: ImageFeatures, boxes: Tensor, image_index: Tensor, most: int | None = None
    ) -> Tensor:
        return pool_under_boxes(self.project_tokens(image.tokens), image, boxes, image_index)

    def embed_masks(self, image: ImageFeatures, masks: Tensor, image_index: Tensor) -> Tensor:
        return self.embed_boxes(image, mask_boxes(masks), image_index)

    def read_tokens(self, image: ImageFeatures) -> tuple[Tensor, Tensor]:
        z = self.project_tokens(image.tokens)
        return z, token_cells(image.grid_hw, z.device).expand(len(z), -1, -1)

    def similarity(self, image: ImageFeatures, text_features: Tensor) -> Tensor:
        return cosines(self.project_tokens(image.tokens), text_features)

    def locate(
        self,
        image: ImageFeatures,
        text_features: Tensor,
        image_index: Tensor,
        most: int | None = None,
        near: Nearness | None = None,
    ) -> Tensor:
        z = self.project_tokens(image.tokens)
        return box_of_similarity(z, image, text_features, image_index)[None]
