from pathlib import Path

from PIL import Image

PICTURE = Image.new("RGB", (96, 48), "teal")


def test_the_ten_lines_of_the_readme(mllm_dir: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import cloc_mllm.mllm  # noqa: F401  registers the model with the Auto classes

    model = AutoModelForImageTextToText.from_pretrained(mllm_dir)
    processor = AutoProcessor.from_pretrained(mllm_dir)
    question = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Where is the crab?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=8)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert isinstance(answer, str)
    assert 0 < output.shape[1] - inputs["input_ids"].shape[1] <= 8


def test_the_chat_accepts_paths_plain_texts_and_batches(mllm_dir: Path, tmp_path: Path):
    from cloc_mllm.mllm import ClocMllmProcessor

    processor = ClocMllmProcessor.from_pretrained(mllm_dir)
    PICTURE.save(tmp_path / "picture.png")
    path = str(tmp_path / "picture.png")

    def chat(image: dict[str, object], text: str) -> list[dict[str, object]]:
        return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]

    inputs = processor.apply_chat_template(
        [
            chat({"type": "image", "image": PICTURE}, "Where is the crab?"),
            chat({"type": "image", "path": path}, "Where?"),
        ],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"regions": [None, None]},
    )
    text_only = processor.apply_chat_template(
        [{"role": "user", "content": "Hello?"}], tokenize=True, return_dict=True
    )

    assert (inputs["pixel_values"][0] == inputs["pixel_values"][1]).all()
    assert inputs["attention_mask"][1, 0] == 0 and inputs["attention_mask"][:, -1].all()
    assert set(text_only) == {"input_ids", "attention_mask"}


def test_a_template_that_only_knows_texts_is_taught_images(mllm_dir: Path):
    from transformers import AutoTokenizer

    from cloc_mllm.mllm import ClocMllmProcessor

    tokenizer = AutoTokenizer.from_pretrained(mllm_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    processor = ClocMllmProcessor(tokenizer, image_size=64, num_image_tokens=16, num_bins=20)
    content = [{"type": "image"}, {"type": "text", "text": "Where?"}]

    text = processor.render([{"role": "user", "content": content}], add_generation_prompt=True)

    assert text == "<user><image>Where?<assistant>"
