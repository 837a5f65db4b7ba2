"""Constrained decoding: whatever the model wants, what comes out is boxes, or one alone."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerBase

from cloc_mllm.data.tokenizer import train_byte_level_bpe
from cloc_mllm.mllm.box_grammar import BoxGrammar, BoxLogitsProcessor, mask_logits
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.processing import add_special_tokens

LOCATIONS = BoxFormat("location_tokens", 20)
INTEGERS = BoxFormat("integers")
HEAD = BoxFormat("location_tokens", 20, head=True)


def tokenizer_for(box_format: BoxFormat) -> PreTrainedTokenizerBase:
    """Merges digits, commas and brackets: pieces like ", 12" and "]" that cut numbers anywhere."""
    rng = random.Random(0)
    numbers = [[rng.randrange(1000) for _ in range(4)] for _ in range(500)]
    tokenizer = train_byte_level_bpe([str(row) for row in numbers], vocab_size=500)
    add_special_tokens(tokenizer, box_format)
    return tokenizer


@pytest.fixture(scope="module", params=[LOCATIONS, INTEGERS], ids=lambda f: f.kind)
def case(request: pytest.FixtureRequest) -> tuple[BoxFormat, PreTrainedTokenizerBase, BoxGrammar]:
    tokenizer = tokenizer_for(request.param)
    return request.param, tokenizer, BoxGrammar(tokenizer, request.param)


def test_random_answers_are_boxes(
    case: tuple[BoxFormat, PreTrainedTokenizerBase, BoxGrammar],
) -> None:
    box_format, tokenizer, grammar = case
    rng = random.Random(0)
    for _ in range(2_000 if box_format is LOCATIONS else 300):
        answer: list[int] = []
        while not answer or answer[-1] != grammar.end:
            answer.append(rng.choice(grammar.allowed(answer)))
            assert len(answer) <= grammar.max_tokens
        parsed = box_format.parse(tokenizer.decode(answer[:-1]))
        assert parsed.failure is None and len(parsed.boxes) == 1, tokenizer.decode(answer)
        assert grammar.allowed(answer) == [grammar.end]


@pytest.mark.parametrize("box_format", [LOCATIONS, INTEGERS, HEAD], ids=["tokens", "text", "head"])
def test_random_answers_of_several_boxes_are_boxes_in_order(box_format: BoxFormat) -> None:
    tokenizer = tokenizer_for(box_format)
    grammar = BoxGrammar(tokenizer, box_format, "not here", max_boxes=3)
    rng = random.Random(0)
    counts: Counter[int] = Counter()
    for _ in range(300 if box_format is not INTEGERS else 100):
        answer: list[int] = []
        while not answer or answer[-1] != grammar.end:
            allowed = grammar.allowed(answer)
            going_on = [token for token in allowed if token != grammar.end]
            answer.append(rng.choice(going_on if going_on and rng.random() < 0.7 else allowed))
            assert len(answer) <= grammar.max_tokens
        text = tokenizer.decode(answer[:-1])
        if text.strip() == "not here":
            counts[0] += 1
            continue
        regressed = [(0.1, 0.1, 0.2, 0.2)] * text.count("<box>")
        parsed = box_format.parse(text, regressed)
        assert parsed.failure is None, text
        counts[len(parsed.boxes)] += 1
        if not box_format.head:
            assert parsed.boxes == box_format.in_order(parsed.boxes)
            assert len(set(parsed.boxes)) == len(parsed.boxes)
    assert set(counts) == {0, 1, 2, 3}


def test_boxes_in_order_may_be_written_as_the_tokenizer_writes_them(
    case: tuple[BoxFormat, PreTrainedTokenizerBase, BoxGrammar],
) -> None:
    box_format, tokenizer, _ = case
    grammar = BoxGrammar(tokenizer, box_format, max_boxes=5)
    rng = random.Random(1)
    for _ in range(30):
        corners = [sorted(rng.sample(range(20), 2)) for _ in range(10)]
        pairs = zip(corners[::2], corners[1::2], strict=True)
        boxes = [(x[0] / 19, y[0] / 19, x[1] / 19, y[1] / 19) for x, y in pairs]
        ordered = box_format.in_order(boxes)
        ids = tokenizer(box_format.answers(ordered), add_special_tokens=False)["input_ids"]
        for length, token in enumerate([*ids, grammar.end]):
            assert token in grammar.allowed(ids[:length])


def test_no_box_follows_the_last_of_all() -> None:
    tokenizer = tokenizer_for(LOCATIONS)
    grammar = BoxGrammar(tokenizer, LOCATIONS, max_boxes=3)
    start = grammar.location_start
    assert start is not None

    def after(*bins: int) -> list[int]:
        return [token - start for token in grammar.allowed([start + place for place in bins])]

    end = grammar.end - start
    assert after(18, 18, 19, 19) == [end]
    assert after(18, 17, 19, 19) == [18, end]  # only the box in the corner is left
    assert after(18, 17, 19, 19, 18) == [18]
    assert after(3, 5, 8, 19) == [*range(3, 19), end]
    assert after(3, 5, 8, 19, 3, 5) == [*range(9, 20)]  # another box of this corner is wider
    assert after(3, 5, 8, 18, 3, 5, 8) == [19]


def test_a_point_may_stand_in_a_free_answer_of_a_model_that_points() -> None:
    tokenizer = tokenizer_for(LOCATIONS)
    start = tokenizer.convert_tokens_to_ids("<loc_0>")
    banned = {
        points: BoxGrammar(tokenizer, LOCATIONS, points=points).banned_in_text([start + 3] * 2)
        for points in (False, True)
    }
    assert slice(start) in banned[False] and slice(start) not in banned[True]
    corner = BoxGrammar(tokenizer, LOCATIONS, points=True).banned_in_text([start + 3, start + 19])
    assert corner == [slice(start, start + 20), slice(start + 20, start + 20)]


@pytest.mark.parametrize("box_format", [LOCATIONS, INTEGERS, HEAD], ids=["tokens", "text", "head"])
def test_location_tokens_of_a_free_answer_come_in_whole_boxes(box_format: BoxFormat) -> None:
    tokenizer = tokenizer_for(box_format)
    grammar = BoxGrammar(tokenizer, box_format)
    held = BoxLogitsProcessor(grammar, 1, boxes_only=False)
    tokens = tokenizer.convert_tokens_to_ids(box_format.tokens())
    words = torch.tensor([5, 9, tokenizer.eos_token_id, *tokens])
    rng = torch.Generator().manual_seed(0)
    logits = torch.full((50, len(tokenizer)), -1e4)
    ids = torch.zeros((50, 1), dtype=torch.long)
    for _ in range(120):
        logits[:, words] = torch.randn((50, len(words)), generator=rng)
        ids = torch.cat([ids, held(ids, logits).argmax(-1, keepdim=True)], 1)
        if box_format is not LOCATIONS:
            assert torch.equal(held(ids, logits), logits)
    if box_format is not LOCATIONS:
        return
    num_boxes = 0
    for row in ids[:, 1:].tolist():
        while len(grammar.banned_in_text(row)) > 2:
            row.pop()  # cut where the answer ends
        found, failures = box_format.find(tokenizer.decode(row))
        num_boxes += len(found)
        assert not failures
    assert num_boxes > 500


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.5, 0.1, 0.6, 0.2), (0.0, 0.9, 0.1, 1.0)])
def test_every_box_may_be_written_as_the_tokenizer_writes_it(
    case: tuple[BoxFormat, PreTrainedTokenizerBase, BoxGrammar], box: tuple[float, ...]
) -> None:
    box_format, tokenizer, grammar = case
    ids = tokenizer(box_format.encode(box), add_special_tokens=False)["input_ids"]
    for length, token in enumerate([*ids, grammar.end]):
        assert token in grammar.allowed(ids[:length])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[", True),
        (" ", True),
        ("  ", False),
        ("[0", True),
        ("[00", False),
        ("[998, ", True),
        ("[999", False),
        ("[99, 5, 9", True),  # 900 and more
        ("[99, 5, 99,", False),
        ("[99, 5, 100, 5]", False),
        ("[99, 5, 100, 6]", True),
        ("[99, 5, 100, 6] ", False),
        ("[998, 0, 98", False),
        ("[1,2", False),
        ("12", False),
        ("[, ", False),
    ],
)
def test_text_that_can_become_a_box(text: str, expected: bool) -> None:
    grammar = BoxGrammar(tokenizer_for(INTEGERS), INTEGERS)
    assert grammar._can_become_boxes(text, (), 1) == expected


def test_masked_logits_keep_what_may_come() -> None:
    grammar = BoxGrammar(tokenizer_for(LOCATIONS), LOCATIONS)
    start = grammar.location_start
    assert start is not None
    logits = torch.randn(2, start + 30)
    prompt = torch.full((2, 3), 7)
    answers = torch.tensor([[start + 18, start + 5], [start + 17, start + 6]])
    actual = BoxLogitsProcessor(grammar, 3, boxes_only=True)(
        torch.cat([prompt, answers], 1), logits
    )
    kept = actual.isfinite()
    assert kept[0].nonzero().flatten().tolist() == [start + 19]
    assert kept[1].nonzero().flatten().tolist() == [start + 18, start + 19]
    assert torch.equal(actual[kept], logits[kept])
    assert torch.equal(actual, mask_logits(grammar, answers.tolist(), logits))


class Operations(TorchDispatchMode):
    """Counts operations, each of which is a kernel or more on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("boxes_only", [True, False])
def test_more_rows_are_not_more_operations(boxes_only: bool) -> None:
    grammar = BoxGrammar(tokenizer_for(LOCATIONS), LOCATIONS)
    first = grammar.location_start
    numbers = []
    for num_rows in (1, 9):
        answers = torch.tensor([[0, first + 3]] * num_rows)
        logits = torch.zeros(num_rows, first + 30)
        with Operations() as operations:
            BoxLogitsProcessor(grammar, 1, boxes_only=boxes_only)(answers, logits)
        numbers.append(operations.number)
    assert numbers[0] == numbers[1] > 0


@pytest.mark.parametrize("boxes_only", [False, True])
@pytest.mark.parametrize(("share", "goes_on"), [(0.15, True), (0.1, False)])
def test_a_next_box_is_weighed_with_all_the_places_where_it_may_start(
    boxes_only: bool, share: float, goes_on: bool
) -> None:
    """Behind a box four bins share the probability of another one, the rest is that of the end; in
    front of the first box the likeliest token is chosen."""
    grammar = BoxGrammar(tokenizer_for(LOCATIONS), LOCATIONS, "no", max_boxes=3)
    start, refusal = grammar.location_start, grammar.instead[0]
    assert start is not None
    box = [start + 2, start + 3, start + 6, start + 7]
    scores = torch.full((3, start + 20), -30.0)
    scores[:, start + 9 : start + 13] = torch.tensor(share).log()
    scores[:2, grammar.end] = scores[2, refusal] = torch.tensor(1 - 4 * share).log()
    prompts = torch.zeros(3, 4, dtype=torch.int64)
    behind = torch.cat([prompts, torch.tensor([box, box, box])], 1)
    held = BoxLogitsProcessor(grammar, 4, boxes_only=boxes_only)
    chosen = held(behind[:2], scores[:2]).argmax(1)
    assert ((start <= chosen) & (chosen < start + 20)).tolist() == [goes_on] * 2
    assert held(prompts[2:], scores[2:]).argmax(1).tolist() == [refusal]


def test_a_tokenizer_that_cannot_write_a_box_is_refused() -> None:
    tokenizer = train_byte_level_bpe(["a text"], vocab_size=300)
    with pytest.raises(ValueError, match="no <loc_0> \\(20 of the tokens"):
        BoxGrammar(tokenizer, LOCATIONS)
