"""Our model in the `lmms-eval` harness, as its entry point `lmms_eval.models` finds it.

    lmms-eval eval --model cloc_mllm --model_args pretrained=DIR --tasks refcoco_bbox_rec_val

Run in lmms-eval 0.7.2 and 0.7.3, which is no dependency: only that harness imports this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from cloc_mllm.data.images import open_image
from cloc_mllm.data.wordings import IMAGE_TOKEN, asked
from cloc_mllm.inference.chat import Chat, Sampling, answer_chat
from cloc_mllm.inference.grounding_predictor import GroundingPredictor, Question
from cloc_mllm.inference.results import Answer

# how the `*_bbox_rec_*` tasks ask; our model is asked in a wording that it was trained on
REC_QUESTION = "the bounding box coordinate of the region this sentence describes: "
_MAX_NEW_TOKENS = 48


class ClocMllm(lmms):
    """Answers `generate_until` requests about any number of images, none too.

    A box is written as the REC tasks ask for it, `[x1, y1, x2, y2]` in 0..1 of the image; an answer
    that is no box stays as the model wrote it. Images stand before the words of a question, or at
    its marks `<image>` where there are as many.

    Args:
        pretrained: a model directory of stage 2; "" takes the weights that ship.
        device: "" takes a GPU if there is one.
        batch_size: questions about one image at a time; those about equal images share one
            prefill. Others are answered one by one.
    """

    def __init__(
        self, pretrained: str = "", device: str = "", batch_size: int | str = 1, **unknown: Any
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # the harness always passes it
        if unknown:
            raise ValueError(
                f"unknown model_args {sorted(unknown)}; expected pretrained, device, batch_size"
            )
        self.predictor = GroundingPredictor.from_pretrained(
            pretrained or None, device=device or None
        )
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers the requests in their order.

        Raises:
            ValueError: a document with a video or a sound; names the task and the document.
        """
        texts: list[str] = []
        for start in tqdm(range(0, len(requests), self.batch_size), "cloc_mllm", unit="batch"):
            batch = [request.args for request in requests[start : start + self.batch_size]]
            for args, answer in zip(batch, self._answers(batch), strict=True):
                text = until(answer_text(answer), args[1].get("until") or [])
                self.cache_hook.add_partial("generate_until", (args[0], args[1]), text)
                texts.append(text)
        return texts

    def _answers(self, batch: Sequence[Sequence[Any]]) -> list[Answer]:
        """Answers one batch: the questions about one image together, by their limit."""
        wording = self.predictor.processor.asked_in.first("ground")
        seen: dict[tuple[Any, bytes], Image.Image] = {}
        answers: dict[int, Answer] = {}
        together: dict[int, list[tuple[int, Question]]] = {}
        for place, args in enumerate(batch):
            images = self._images(args, seen)
            question = our_question(args[0], wording)
            limit = int(args[1].get("max_new_tokens") or _MAX_NEW_TOKENS)
            if len(images) == 1 and IMAGE_TOKEN not in question:
                together.setdefault(limit, []).append((place, Question(images[0], question)))
                continue
            chat = Chat([{"role": "user", "content": content_of(question, len(images))}], images)
            sampling = Sampling(max_new_tokens=limit)
            answers[place] = answer_chat(self.predictor, chat, sampling, lambda piece: None)
        for limit, pairs in together.items():
            found = self.predictor.answer([of for _, of in pairs], max_new_tokens=limit)
            answers |= {place: answer for (place, _), answer in zip(pairs, found, strict=True)}
        return [answers[place] for place in range(len(batch))]

    def _images(
        self, args: Sequence[Any], seen: dict[tuple[Any, bytes], Image.Image]
    ) -> list[Image.Image]:
        """The images of a request; equal images of a batch become one object."""
        _, _, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
        images = []
        for visual in visuals or []:
            if not isinstance(visual, Image.Image):
                raise ValueError(
                    f"document {doc_id} of task {task} ({split}) has a {type(visual).__name__} "
                    "among its visuals; this model looks at images (PIL) alone"
                )
            image = open_image(visual, name=f"document {doc_id} of task {task}")
            images.append(seen.setdefault((image.size, image.tobytes()), image))
        return images

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("cloc_mllm answers generate_until tasks only")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("cloc_mllm answers generate_until tasks only")


def our_question(context: str, wording: str) -> str:
    """The harness's REC question in the words of training; any other question as it is."""
    _, marker, phrase = context.partition(REC_QUESTION)
    return asked(wording, phrase=phrase.strip()) if marker else context


def content_of(question: str, num_images: int) -> list[dict[str, str]]:
    """Lays a question and its images out as a message: at the marks `<image>` if there is one per
    image, else before the words."""
    pieces = question.split(IMAGE_TOKEN)
    if len(pieces) - 1 != num_images:
        pieces = [""] * num_images + [" ".join(piece.strip() for piece in pieces).strip()]
    items: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        items += [{"type": "image"}] if number else []
        items += [{"type": "text", "text": piece}] if piece else []
    return items


def answer_text(answer: Answer) -> str:
    """Writes a box as `[x1, y1, x2, y2]` in 0..1; other answers stay in the model's words."""
    if answer.failure is not None:
        return answer.text
    return ", ".join(
        f"[{', '.join(f'{value:.4f}' for value in box)}]" for box in answer.boxes.xyxy.tolist()
    )


def until(text: str, stops: str | Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text


def manifest() -> Any:
    """Tells the harness the model's name and the path of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("cloc_mllm", simple_class_path=f"{__name__}.ClocMllm")
