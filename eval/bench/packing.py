"""Tokens per second (padding not counted) of our packed step against a plain
`transformers.Trainer` that pads, on the same language model and rows: forward, backward, clipping
and optimizer.

    python eval/bench/packing.py --questions 1 2 4 8 16 --output runs/bench/packing.json
    python eval/bench/packing.py --model runs/smollm2 --images 4 --batches 1 --pairs 3

Rows are the questions of stage 2 in the embeddings of their tokens, placeholders included: no
picture is read on either side.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import ConversationConfig, OptimConfig, RunConfig
from cloc_mllm.data.conversations import build_questions
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.mllm.collate import MllmBatch, as_messages
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.language_model import attention_for_training, load_language_model
from cloc_mllm.mllm.packing import (
    PackedRow,
    balanced_sequences,
    pack_questions,
    pad_sequences,
)
from cloc_mllm.mllm.processing import ClocMllmProcessor, add_special_tokens
from cloc_mllm.mllm.tiny_llm import build_tokenizer
from cloc_mllm.train.engine import seed_everything, start_engine, start_processes, step_if_sound
from cloc_mllm.train.optim import lr_factor, set_lr
from cloc_mllm.train.stage2 import answer_step
from ratio import interleaved_ratio, machine_state, report, save_samples

_OPTIM = OptimConfig(lr=1e-4, weight_decay=0.0, warmup_steps=0)
_LOSS_TOLERANCE = 1e-4
_NUM_IMAGE_TOKENS = 64

Batch = list[PackedRow]


def language_model(directory: str = "") -> tuple[PreTrainedModel, ClocMllmProcessor]:
    """The one in `directory`, or a random Llama of 5 million parameters, 256 wide."""
    tokenizer: Any
    form = BoxFormat("location_tokens", 100)
    if directory:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        add_special_tokens(tokenizer, form)
        model = load_language_model(directory)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    else:
        tokenizer = build_tokenizer(form)
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=256,
                intermediate_size=688,
                num_hidden_layers=6,
                num_attention_heads=4,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        model.set_attn_implementation(attention_for_training())
    return model, ClocMllmProcessor(tokenizer, num_image_tokens=_NUM_IMAGE_TOKENS)


def draw_batches(
    processor: ClocMllmProcessor, questions: Sequence[int], num_batches: int, batch_size: int
) -> list[Batch]:
    """Built-in scenes with as many questions each as drawn from `questions`."""
    rng = np.random.default_rng(0)
    rows = []
    for record in generate_scenes(num_batches * batch_size, split="train", seed=0):
        ask = ConversationConfig(int(rng.choice(questions)), max_length=2048)
        pairs = build_questions(record, ask, processor.coordinates, rng)
        chats = [processor.encode_conversation(as_messages(pair)) for pair in pairs]
        rows.append(pack_questions(chats, processor.image_token_id, ask.max_length))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def padding_share(batches: Sequence[Batch]) -> float:
    """The share of padding in batches whose rows are padded to their longest."""
    lengths = [[len(row.input_ids) for row in rows] for rows in batches]
    return 1 - sum(map(sum, lengths)) / sum(len(of) * max(of) for of in lengths)


def padded(rows: Batch, pad_token_id: int) -> dict[str, Tensor]:
    return pad_sequences([[row] for row in rows], pad_token_id)


def packed(rows: Batch, pad_token_id: int, max_length: int) -> dict[str, Tensor]:
    sequences = balanced_sequences([len(row.input_ids) for row in rows], max_length)
    return pad_sequences([[rows[i] for i in sequence] for sequence in sequences], pad_token_id)


class TrainerSteps:
    """`Trainer.train()` over the batches, once; its setting up is part of it."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], out: str):
        # before our engine starts: it tells Accelerate's own look at the environment otherwise
        arguments = TrainingArguments(
            out,
            max_steps=len(batches),
            per_device_train_batch_size=1,  # of ready batches
            learning_rate=_OPTIM.lr,
            max_grad_norm=_OPTIM.grad_clip,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        ready: Any = list(batches)
        self.trainer = Trainer(
            model, arguments, data_collator=lambda items: items[0], train_dataset=ready
        )

    def __call__(self) -> None:
        self.trainer.train()


class PackedSteps:
    """As many steps of `cloc_mllm.train.loop`, without its logs and checkpoints."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> None:
        self.device = start_processes()
        model.train()
        self.engine = start_engine(model, answer_step, RunConfig(precision="fp32"), _OPTIM)
        self.batches = [MllmBatch(dict(batch), None, 0, []) for batch in batches]

    def __call__(self) -> None:
        for step, batch in enumerate(self.batches):
            set_lr(self.engine.optimizer, lr_factor(step, len(self.batches), _OPTIM.warmup_steps))
            seed_everything(0, step, 0)
            loss = self.engine(batch.to(self.device))["loss"]
            self.engine.backward(loss)
            step_if_sound(self.engine, loss, _OPTIM.grad_clip)


def matched_sides(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    pad_token_id: int,
    max_length: int,
    out: str,
) -> tuple[PackedSteps, TrainerSteps]:
    """Both from the same weights.

    Raises:
        ValueError: the losses of the first batch differ; nothing to compare.
    """
    ours = [packed(rows, pad_token_id, max_length) for rows in batches]
    theirs = [padded(rows, pad_token_id) for rows in batches]
    with torch.no_grad():
        losses = [float(model(**side[0]).loss) for side in (ours, theirs)]
    if abs(losses[0] - losses[1]) > _LOSS_TOLERANCE:
        raise ValueError(f"the losses of the two sides are {losses}; nothing to compare")
    trainer = TrainerSteps(copy.deepcopy(model), theirs, out)
    return PackedSteps(model, ours), trainer


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="packing", description=__doc__)
    parser.add_argument(
        "--model", default="", help="a language model's directory; a random small one"
    )
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--images", type=int, default=16, help="of a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", default="runs/bench/packing.json")
    args = parser.parse_args(argv)
    machine = machine_state()
    print(machine)
    model, processor = language_model(args.model)
    batches = draw_batches(processor, args.questions, args.batches, args.images)
    share = padding_share(batches)
    limit = 1 / (1 - share)
    num_tokens = sum(len(row.input_ids) for rows in batches for row in rows)
    with tempfile.TemporaryDirectory() as out:
        pad_id = processor.tokenizer.pad_token_id
        sides = matched_sides(model, batches, pad_id, args.max_length, out)
        ratio = interleaved_ratio(*sides, pairs=args.pairs, warmups=1)
    title = f"{args.model or 'random Llama'}, questions {args.questions}, packed / Trainer"
    print(report(title, ratio))
    for clock, samples in (("wall", ratio.wall), ("CPU", ratio.cpu)):
        ours, theirs = (num_tokens / statistics.median(s) for s in (samples.ours, samples.theirs))
        faster = 1 / samples.median
        print(
            f"  {clock}: {ours:,.0f} against {theirs:,.0f} tokens per second, {faster:.2f} x; "
            f"padding {share:.1%}, limit {limit:.2f} x, {faster / limit:.2f} of it"
        )
    save_samples(args.output, machine, {title: ratio, "padding share": share})


if __name__ == "__main__":
    sys.exit(run(main))
