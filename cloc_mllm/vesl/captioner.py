"""Step 1 of VESL: writes captions that name more of an image than its alt-text does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from cloc_mllm.data.images import ImageSource, open_image
from cloc_mllm.data.records import clean_text

_PROMPT = "Describe this image in detail. Name every object that you see."


class Captioner:
    """Captions images with any Transformers image-text-to-text model: a chat model, or a captioner
    without a chat template, such as BLIP. Decoding is greedy, so an image always gets the same
    caption.

    An image is what `open_image` takes.
    """

    def __init__(
        self, model: Any, processor: Any, prompt: str = "", max_new_tokens: int = 128
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        if getattr(processor, "tokenizer", None) is not None:
            processor.tokenizer.padding_side = "left"  # the answers start at one position
        self.prompt = prompt or _PROMPT
        self.max_new_tokens = max_new_tokens

    @classmethod
    def from_pretrained(
        cls, name: str, *, prompt: str = "", max_new_tokens: int = 128, device: str = "cpu"
    ) -> Captioner:
        """Loads a directory (also one that stage 2 wrote) or a Hugging Face name.

        Args:
            prompt: the question to a chat model; "" asks for every object.

        Raises:
            OSError: there is no such model.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        import cloc_mllm.mllm  # noqa: F401  registers our own model with the Auto classes

        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False
        )
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        return cls(torch.nn.Module.to(model, device), processor, prompt, max_new_tokens)

    @torch.inference_mode()
    def caption(self, images: Sequence[ImageSource]) -> list[str]:
        """Writes one caption per image; "" where the model says nothing usable."""
        inputs = self._inputs([open_image(image) for image in images]).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        if "input_ids" in inputs:  # a chat model repeats the question
            output = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(output, skip_special_tokens=True)
        return [clean_text(text)[0] or "" for text in texts]

    def _inputs(self, images: list[Image.Image]) -> Any:
        if not getattr(self.processor, "chat_template", None):
            return self.processor(images=images, return_tensors="pt")
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image},
                        {"type": "text", "text": self.prompt},
                    ],
                }
            ]
            for image in images
        ]
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
