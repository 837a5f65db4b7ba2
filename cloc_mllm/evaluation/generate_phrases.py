"""Ranked boxes of each phrase from CLOC: BoxHead's box, then the Prompter's other proposals.

Letters: B images, P distinct phrases, Q queries of a batch, N image tokens, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms
from tqdm import tqdm

from cloc_mllm.data.records import Record
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.evaluation.generate_cloc import (
    TOP_K,
    Located,
    Settings,
    encode_images,
    encode_texts,
    in_inference,
    in_original,
    index_of_images,
    locate_texts,
)
from cloc_mllm.evaluation.predictions import Box, PredictionRow
from cloc_mllm.evaluation.queries import Query
from cloc_mllm.geometry import Letterbox
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.vision_encoder import ImageFeatures

_SAME_BOX_IOU = 0.5  # a proposal closer than this to a better one is that one again


def predict_phrases(
    model: Cloc,
    tokenizer: TextTokenizer,
    records: Sequence[Record],
    queries: Sequence[Query],
    settings: Settings,
) -> list[PredictionRow]:
    """One row a query, with at most ten boxes: the first is the answer of `Cloc.locate`.

    The others are the boxes that the image's tokens stand for (`ClocVision.read_tokens`), by the
    cosine of their embedding and the phrase, each at most half on a better one (IoU). A model
    without a Prompter has no such boxes: one box a row, and R@1 is all that can be scored.
    """
    of_image: dict[str, list[Query]] = {}
    for query in queries:
        of_image.setdefault(query.image_id, []).append(query)
    rows: list[PredictionRow] = []
    with in_inference(model, settings.precision) as precision:
        texts = encode_texts(model, tokenizer, sorted({query.text for query in queries}))
        shared = {"image_size": model.vision.encoder.image_size, "precision": precision}
        steps = range(0, len(records), settings.batch_size)
        for start in tqdm(steps, "phrases", unit="batch", disable=not settings.progress):
            stop = min(start + settings.batch_size, len(records))
            chosen = [record for i in range(start, stop) if (record := records[i]).id in of_image]
            if not chosen:
                continue
            image, letterboxes = encode_images(model, chosen)
            groups = [of_image[record.id] for record in chosen]
            asked = [query for group in groups for query in group]
            features = texts.of([query.text for query in asked])
            index = index_of_images(groups, features.device)
            located = locate_texts(model, image, features, index, letterboxes)
            others = _proposals(model, image, features, index, letterboxes)
            for query, found, ranked in zip(asked, located, others, strict=True):
                rows.append(_row(query, found, ranked, settings.name, shared))
    return rows


def _proposals(
    model: Cloc,
    image: ImageFeatures,
    texts: Tensor,
    image_index: Tensor,
    letterboxes: Sequence[Letterbox],
) -> Iterator[list[tuple[float, Box]]]:
    """For each text the boxes of its image's tokens with their cosines, best first."""
    if not model.vision.region_encoder.predicts_boxes:
        yield from ([] for _ in texts)
        return
    z, canvas = model.vision.read_tokens(image)
    num_images, num_tokens = canvas.shape[:2]
    every = torch.arange(num_images, device=canvas.device).repeat_interleave(num_tokens)
    boxes = in_original(canvas.flatten(0, 1).nan_to_num(0, 0, 0), every, letterboxes)
    z = F.normalize(z.float(), dim=-1)
    cosine = torch.einsum("qne,qe->qn", z[image_index], F.normalize(texts.float(), dim=-1))
    ranked = cosine.nan_to_num(-1).sort(descending=True)
    for i, scores, order in zip(
        image_index.tolist(), ranked.values.tolist(), ranked.indices.tolist(), strict=True
    ):
        own = boxes[i * num_tokens : (i + 1) * num_tokens]
        yield [(score, own[token]) for score, token in zip(scores, order, strict=True)]


def rank_boxes(first: Box, others: Sequence[tuple[float, Box]], limit: int = TOP_K) -> list[Box]:
    """`first`, then the others by score without those that repeat a better box; at most `limit`."""
    boxes = torch.tensor([first, *(box for _, box in others)], dtype=torch.float64)
    scores = torch.tensor([float("inf"), *(score for score, _ in others)], dtype=torch.float64)
    kept = nms(boxes, scores, _SAME_BOX_IOU)[:limit]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in boxes[kept].tolist()]


def _row(
    query: Query,
    located: Located,
    others: Sequence[tuple[float, Box]],
    name: str,
    settings: dict[str, object],
) -> PredictionRow:
    return PredictionRow(
        query.id,
        query.image_id,
        query.task,
        query.text,
        boxes=rank_boxes(located.box, others) if located.box else [],
        confidence=located.confidence,
        failure=None if located.box else "not_finite",
        model=name,
        settings=dict(settings),
    )
