"""Our model in the `lmms-eval` harness, as its entry point `lmms_eval.models` finds it.

    lmms-eval eval --model cloc_mllm --model_args pretrained=DIR --tasks refcoco_bbox_rec_val

Written against lmms-eval 0.7.2, which is not a dependency: only that harness imports this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from cloc_mllm.data.conversations import PROMPTS
from cloc_mllm.data.images import open_image
from cloc_mllm.inference.grounding_predictor import GroundingPredictor, Question
from cloc_mllm.inference.results import Answer

# how the `*_bbox_rec_*` tasks ask; our model was trained on one wording only and is asked with it
REC_QUESTION = "the bounding box coordinate of the region this sentence describes: "
_MAX_NEW_TOKENS = 48


class ClocMllm(lmms):
    """Answers `generate_until` requests with one image each.

    A box is written as the REC tasks ask for it, `[x1, y1, x2, y2]` in 0..1 of the image; an answer
    that is no box stays as the model wrote it.

    Args:
        pretrained: a model directory of stage 2; "" takes the weights that ship.
        device: "" takes a GPU if there is one.
        batch_size: questions at a time; those about equal images share one prefill.
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
            ValueError: a document without exactly one image; names the task and the document.
        """
        texts: list[str] = []
        for start in tqdm(range(0, len(requests), self.batch_size), "cloc_mllm", unit="batch"):
            batch = [request.args for request in requests[start : start + self.batch_size]]
            limit = max(int(args[1].get("max_new_tokens", _MAX_NEW_TOKENS)) for args in batch)
            seen: dict[tuple[Any, bytes], Image.Image] = {}
            asked = [Question(self._image(args, seen), our_question(args[0])) for args in batch]
            answers = self.predictor.answer(asked, max_new_tokens=limit)
            for args, answer in zip(batch, answers, strict=True):
                text = until(answer_text(answer), args[1].get("until", []))
                self.cache_hook.add_partial("generate_until", (args[0], args[1]), text)
                texts.append(text)
        return texts

    def _image(
        self, args: Sequence[Any], seen: dict[tuple[Any, bytes], Image.Image]
    ) -> Image.Image:
        """The image of a request; equal images of a batch become one object."""
        _, _, doc_to_visual, doc_id, task, split = args
        images = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(images) != 1 or not isinstance(images[0], Image.Image):
            raise ValueError(
                f"document {doc_id} of task {task} ({split}) has {len(images)} visuals; this model "
                "answers questions about one image"
            )
        image = open_image(images[0], name=f"document {doc_id} of task {task}")
        return seen.setdefault((image.size, image.tobytes()), image)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("cloc_mllm answers generate_until tasks only")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("cloc_mllm answers generate_until tasks only")


def our_question(context: str) -> str:
    """The harness's REC question in our wording; any other question as it is."""
    _, marker, phrase = context.partition(REC_QUESTION)
    return PROMPTS["ground"].format(phrase=phrase.strip()) if marker else context


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
