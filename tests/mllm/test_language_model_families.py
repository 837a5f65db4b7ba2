"""Any causal language model of Transformers, with the chat template its tokenizer brings."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from cloc_mllm.config import LoraConfig
from cloc_mllm.data.tokenizer import train_byte_level_bpe
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, build_mllm, merge_and_save
from cloc_mllm.mllm.losses import IGNORE_INDEX
from tests.tiny_mllm import TEXTS, tiny_shape

# How the templates of these families are built: what opens a turn, what closes it, and whether the
# closing token is the tokenizer's end of sequence.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + "
    "m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + "
    "'\n' + m['content'] | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)
FAMILIES = [
    ("llama", LLAMA3, "<|eot|>"),
    ("qwen2", CHATML, "<|im_end|>"),
    ("qwen3", CHATML, "<|im_end|>"),
    ("smollm3", CHATML, "<|im_end|>"),
    ("mistral", MISTRAL, ""),
    ("gemma2", GEMMA, "</turn>"),
    ("gemma3_text", GEMMA, "</turn>"),
    ("phi", CHATML, "<|im_end|>"),
    ("phi3", PHI, "<|end|>"),
    ("olmo2", CHATML, "<|im_end|>"),
    ("granite", CHATML, "<|im_end|>"),
    ("gpt_neox", CHATML, "<|im_end|>"),
]
PICTURE = Image.new("RGB", (96, 48), "teal")


def save_family(family: str, template: str, closing: str, directory: Path) -> None:
    tokenizer = train_byte_level_bpe(TEXTS, vocab_size=300)
    marks = re.findall(r"<[^>]+>|\[/?INST\]", template)
    tokenizer.add_tokens(sorted({*marks, closing} - {""}), special_tokens=True)
    if closing == "<|im_end|>":  # as Qwen and SmolLM do; Llama, Gemma and Phi have another eos
        tokenizer.eos_token = closing
    tokenizer.chat_template = template
    config = AutoConfig.for_model(family, **tiny_shape(tokenizer), head_dim=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(closing or tokenizer.eos_token)]
    model.generation_config = GenerationConfig(eos_token_id=ends)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(params=FAMILIES, ids=lambda family: family[0])
def family_config(request, mllm_config, tmp_path):
    save_family(*request.param, tmp_path / "llm")
    mllm_config.language_model = str(tmp_path / "llm")
    mllm_config.lora = LoraConfig(rank=2)
    return mllm_config


def test_a_family_learns_its_answers_and_gives_the_same_after_saving(family_config, tmp_path):
    model, processor = build_mllm(family_config)
    answer = processor.coordinates.answer((0.1, 0.2, 0.5, 0.9))
    content = [{"type": "image"}, {"type": "text", "text": "Where is the crab?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer},
    ]

    ids, labels = processor.encode_conversation(messages)

    learnt = [label for label in labels if label != IGNORE_INDEX]
    assert processor.tokenizer.decode(learnt, skip_special_tokens=True).strip() == answer
    # generation stops where the answer stopped
    assert set(model.generation_config.eos_token_id) & set(learnt)
    inputs = processor([PICTURE], [processor.render(messages)], [None])
    assert inputs["input_ids"][0].tolist() == ids  # the pieces are the whole
    model.train()
    model(**inputs, labels=torch.tensor([labels])).loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert all(grad.isfinite().all() for grad in trained) and sum(g.any() for g in trained) > 8

    model.eval()
    merge_and_save(model, processor, tmp_path / "saved")
    loaded = ClocMllmForConditionalGeneration.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        # a merged product rounds once more
        torch.testing.assert_close(
            loaded(**inputs).logits, model(**inputs).logits, atol=2e-4, rtol=0
        )


def test_a_family_grounds_several_phrases_at_once_as_one_by_one(family_config, tmp_path):
    merge_and_save(*build_mllm(family_config), tmp_path / "saved")
    predictor = GroundingPredictor.from_pretrained(tmp_path / "saved", device="cpu")
    phrases = ["crab", "the second boat from the left", "a red apple"]

    together = predictor.ground(PICTURE, phrases)

    apart = [predictor.ground(PICTURE, phrase) for phrase in phrases]
    assert together.text == [one.text[0] for one in apart]
    assert together.failures == [None] * len(phrases)
