"""Rows of any Transformers image-text model: its raw words, read in the declared format later."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.rows.resume import model_identity
from cloc_mllm.evaluation.rows.rows import PredictionRow

PHRASE = "{phrase}"
_MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class HfModel:
    """A model with its processor: Qwen-VL, InternVL, PaliGemma, Florence-2, Kosmos-2 and others."""

    model: Any
    processor: Any

    @classmethod
    def from_pretrained(cls, name: str, device: torch.device) -> HfModel:
        """Loads a directory or a name on the hub; no code of the model's own is run.

        It is float32 on a CPU, elsewhere as the weights are stored.
        """
        dtype: Any = torch.float32 if device.type == "cpu" else "auto"
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, trust_remote_code=False
        ).eval()
        return cls(model.to(device), AutoProcessor.from_pretrained(name, trust_remote_code=False))

    @torch.inference_mode()
    def answer(self, image: Image.Image, prompt: str) -> tuple[str, dict[str, int]]:
        """The greedy answer with its box tokens, and `resized_width` and `resized_height` where
        the processor says what the model saw (Qwen-VL writes pixels of that)."""
        inputs = self._inputs(image, prompt).to(self.model.device, self.model.dtype)
        output = self.model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=_MAX_NEW_TOKENS
        )
        ids = output[0].tolist()
        if not self.model.config.is_encoder_decoder:
            ids = ids[inputs["input_ids"].shape[1] :]
        answer = self.processor.tokenizer.decode(
            self._between_ends(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return answer.strip(), self._seen_size(inputs)

    def _inputs(self, image: Image.Image, prompt: str) -> Any:
        """The prompt in the chat template where there is one; older models take it as it is."""
        if getattr(self.processor, "chat_template", None) is None:
            return self.processor(images=image, text=prompt, return_tensors="pt")
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def _between_ends(self, ids: list[int]) -> list[int]:
        """The answer without its end. Special tokens inside stay: boxes may be made of them."""
        generation = self.model.generation_config
        eos = generation.eos_token_id
        ends = {*(eos if isinstance(eos, list) else [eos]), generation.pad_token_id}
        first = 0
        if self.model.config.is_encoder_decoder:  # begins with tokens that nobody chose
            starts = {*ends, generation.bos_token_id, generation.decoder_start_token_id}
            first = next((i for i, value in enumerate(ids) if value not in starts), len(ids))
        last = next((i for i in range(first, len(ids)) if ids[i] in ends), len(ids))
        return ids[first:last]

    def _seen_size(self, inputs: Any) -> dict[str, int]:
        if "image_grid_thw" not in inputs:
            return {}
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        patch = self.processor.image_processor.patch_size
        return {"resized_width": columns * patch, "resized_height": rows * patch}


def check_prompt(prompt: str) -> None:
    """Refuses a prompt that does not say exactly once where the phrase goes (`ValueError`)."""
    if prompt.count(PHRASE) != 1:
        raise ValueError(
            f"--prompt must hold {PHRASE} once, where the expression goes, got {prompt!r}; for "
            "example 'Locate {phrase}, output its bbox coordinates in JSON format.'"
        )


@dataclass(frozen=True)
class TransformersRows:
    """A model directory, or a name on the hub, as a `Predictor`.

    It is asked with `prompt` where an expression is; questions without regions are asked as they
    are.
    """

    name: str
    device: torch.device
    prompt: str

    def identity(self) -> dict[str, Any]:
        return {"mllm": model_identity(self.name), "prompt": self.prompt}

    def can_answer(self, asked: QuerySet) -> bool:
        if asked.answer == "text":
            return not any(query.boxes for query in asked.queries)
        return asked.answer in ("box", "boxes")

    def rows(
        self, query_sets: Sequence[QuerySet], finished: Collection[str]
    ) -> Iterator[PredictionRow]:
        model = HfModel.from_pretrained(self.name, self.device)
        for asked in query_sets:
            yield from predict_hf(model, asked, self.prompt, self.name, finished)


def predict_hf(
    model: HfModel,
    asked: QuerySet,
    prompt: str,
    name: str,
    finished: Collection[str] = (),
) -> Iterator[PredictionRow]:
    """Yields one row per query as soon as it is answered, with `raw_text` and without boxes.

    Questions go one at a time, because not every processor can pad a batch for generation.

    Args:
        prompt: asked with the expression in place of `{phrase}`; see `check_prompt`.
        name: of the model, for the rows.
        finished: ids of queries to leave out, because their rows are there already.
    """
    queries = [query for query in asked.queries if query.id not in finished]
    settings = {"decoding": "greedy", "precision": str(model.model.dtype).removeprefix("torch.")}
    images: dict[str, Image.Image] = {}
    for query in tqdm(queries, asked.task):
        if query.image_id not in images:
            images = {query.image_id: asked.load_image(query.image_id)}
        question = query.text if asked.answer == "text" else prompt.replace(PHRASE, query.text)
        text, seen = model.answer(images[query.image_id], question)
        yield PredictionRow(
            query.id,
            query.image_id,
            query.task,
            question,
            text,
            model=name,
            settings={**settings, **seen},
        )
