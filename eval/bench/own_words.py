"""Chats of text alone, in which a language model answers in its own words.

    python eval/bench/own_words.py --language_model runs/smollm2 --output_dir runs/chats/own-words

Mixed into stage 2 they keep what the language model can do. Writes `train.jsonl` and
`held_out.jsonl`, whose questions have other words about other topics, in LLaVA's layout. Answers
are drawn at temperature 1, so a model's perplexity on them rises by how far it has moved from this
one. Those that do not end by themselves within `--max_new_tokens` are left out; questions are asked
again until there are enough.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser

WORDINGS = {
    "train": """Explain TOPIC in one sentence.
What is the most important thing to know about TOPIC?
Write two lines of a poem about TOPIC.
Why do people care about TOPIC?
Give me one tip about TOPIC.
Name three words that you think of when you hear about TOPIC.
Is it hard to learn about TOPIC? Answer briefly.
Tell me something surprising about TOPIC.
How would you describe TOPIC to a child?
Write a short title for an article about TOPIC.
In a few words, what comes to mind about TOPIC?
What is a common mistake with TOPIC?
Ask me one question about TOPIC.
Write one sentence of a story that begins with TOPIC.
Give a short argument against TOPIC.""",
    "held_out": """Tell a friend about TOPIC in one or two sentences.
What should a beginner know about TOPIC?
Write a slogan for TOPIC.
Please define TOPIC briefly.
What do you like about TOPIC?
Complete this sentence: The best thing about TOPIC is
Write a polite one-sentence email about TOPIC.
What might the future of TOPIC look like? Keep it short.
Recommend a gift for somebody who loves TOPIC.
Which question about TOPIC is asked most often?
Compare TOPIC with something else in one sentence.
Say something kind to a person who is tired of TOPIC.""",
}
TOPICS = {
    "train": """baking bread, the moon, gardening, chess, the French Revolution, vaccines,
buying a used car, electric trains, jazz, volcanoes, sleep, the stock market,
bees, learning Spanish, football, photosynthesis, job interviews, the Roman
Empire, painting, black holes, running a marathon, dinosaurs, cheese, democracy,
cats, public libraries, the ocean, saving money, fractions, climate change,
camping, computers, tea, Shakespeare, bicycles, magnets, friendship, the human
heart, video games, mountains, recycling, robots""",
    "held_out": """knitting, the planet Mars, city traffic, opera, antibiotics, growing tomatoes,
the Silk Road, whales, home insurance, probability, coffee, swimming, bridges,
the printing press, dogs, loneliness, solar power, rivers, essays, ice hockey,
museums, honesty, the internet, rain, ancient Egypt, skiing, noise""",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="own_words", description=__doc__)
    parser.add_argument("--language_model", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num", type=int, default=400, help="chats to train on")
    parser.add_argument("--num_held_out", type=int, default=200)
    parser.add_argument("--max_new_tokens", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(
        options.language_model, padding_side="left", trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.language_model, dtype=torch.bfloat16, trust_remote_code=False
    )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", options.num), ("held_out", options.num_held_out)):
        torch.manual_seed(options.seed)  # so each split can be made alone
        answered = _answered(model, tokenizer, questions(split, options.seed), options)
        rows = [
            _row(f"{split}-{place}", *said)
            for place, said in enumerate(itertools.islice(answered, number))
        ]
        path = options.output_dir / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} chats", flush=True)
    return 0


def questions(split: str, seed: int) -> list[str]:
    """Every wording about every topic of the split, shuffled."""
    topics = " ".join(TOPICS[split].split()).split(", ")
    wordings = WORDINGS[split].splitlines()
    asked = [wording.replace("TOPIC", topic) for wording in wordings for topic in topics]
    random.Random(seed).shuffle(asked)
    return asked


@torch.inference_mode()
def _answered(
    model: Any, tokenizer: Any, asked: Sequence[str], options: Any
) -> Iterator[tuple[str, str]]:
    """Yields questions with answers that end by themselves, round after round, without an end."""
    batches = [
        asked[start : start + options.batch_size]
        for start in range(0, len(asked), options.batch_size)
    ]
    for batch in itertools.cycle(batches):
        chats = [[{"role": "user", "content": question}] for question in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        written = model.generate(
            **inputs, do_sample=True, top_k=0, max_new_tokens=options.max_new_tokens
        )
        for question, ids in zip(batch, written[:, inputs["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            if text and tokenizer.eos_token_id in ids.tolist():
                yield question, text


def _row(row_id: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": row_id, "conversations": turns}


if __name__ == "__main__":
    sys.exit(run(main))
