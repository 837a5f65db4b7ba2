"""A few headline numbers without intervals, cheap enough to compute while training."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from cloc_mllm.config import Precision
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.records import Record
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.evaluation.metrics import pairs_by_task
from cloc_mllm.evaluation.perplexity import token_losses
from cloc_mllm.evaluation.predictors.cloc import ClocSettings, predict_cloc
from cloc_mllm.evaluation.predictors.mllm import predict_mllm
from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.rows.rows import merge_by_id
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, all_scorers, task_class
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.models.cloc import Cloc

# the tasks that CLOC answers without a language model, from records alone
CLOC_TASKS = (
    "region_classification",
    "region_text_retrieval",
    "image_text_retrieval",
    "text_to_box",
)
MLLM_TASKS = ("rec", "referring")  # the same for an MLLM
_QUICK_METRICS = {
    "region_classification": ("macro_acc",),
    "region_to_text": ("r_at_10",),
    "text_to_region": ("r_at_10",),
    "image_to_text": ("r_at_1",),
    "text_to_box": ("acc_at_0_5", "mean_iou"),
    "rec": ("acc_at_0_5", "mean_iou"),
    "referring": ("exact_match", "word_f1"),
}


def cloc_scores(
    model: Cloc, tokenizer: TextTokenizer, records: Sequence[Record], settings: ClocSettings
) -> dict[str, dict[str, QueryScores]]:
    """Scores every query that CLOC answers alone: task of the rows -> metric -> scores.

    Tasks for which the records hold nothing are left out.
    """
    data = EvalData(lambda: records)
    query_sets = [
        asked
        for name in CLOC_TASKS
        for asked in task_class(name)().query_sets(data)
        if asked.queries
    ]
    references = [reference for asked in query_sets for reference in asked.references]
    predictions = predict_cloc(model, tokenizer, query_sets, settings)
    scorers = all_scorers()
    pairs = pairs_by_task(predictions, references)
    return {task: scorers[task].score(task_pairs) for task, task_pairs in pairs.items()}


def quick_region_metrics(
    model: Cloc,
    tokenizer: TextTokenizer,
    records: Sequence[Record],
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
) -> dict[str, float]:
    """Computes metrics over the records by `task/metric`; 200 records are enough to watch training.

    Each module of the model keeps its mode (train or eval). Tasks for which the records hold
    nothing are left out.
    """
    settings = ClocSettings(batch_size=batch_size, precision=precision)
    return _headlines(cloc_scores(model, tokenizer, records, settings))


def draw_questions(records: Sequence[Record], number: int, seed: int) -> list[QuerySet]:
    """At most `number` questions for an MLLM per task, drawn by `seed`; tasks with none are left
    out.

    They are about at most `number` records, the only ones that are read.
    """
    draw = random.Random(seed)
    places = sorted(draw.sample(range(len(records)), min(number, len(records))))
    chosen = [records[place] for place in places]
    data = EvalData(lambda: chosen)
    drawn = []
    for asked in (s for name in MLLM_TASKS for s in task_class(name)().query_sets(data)):
        places = sorted(draw.sample(range(len(asked.pairs)), min(number, len(asked.pairs))))
        if places:
            drawn.append(replace(asked, pairs=[asked.pairs[place] for place in places]))
    return drawn


def quick_answer_metrics(
    predictor: GroundingPredictor, query_sets: Sequence[QuerySet], *, batch_size: int = 64
) -> dict[str, float]:
    """Computes metrics over the questions of `draw_questions`, by `task/metric`."""
    scorers = all_scorers()
    scores = {}
    for asked in query_sets:
        rows = list(predict_mllm(predictor, asked, "", batch_size, progress=False))
        scores[asked.task] = scorers[asked.task].score(merge_by_id(rows, asked.references))
    return _headlines(scores)


def quick_chat_metrics(
    model: nn.Module, processor: ClocMllmProcessor, chats: Sequence[Chat], *, max_length: int
) -> dict[str, float]:
    """Computes loss per token of the answers of chats and perplexity."""
    loss = token_losses(model, processor, chats, max_length=max_length).mean()
    return {"chats/loss": loss, "chats/perplexity": math.exp(loss)}


def _headlines(scores: Mapping[str, Mapping[str, QueryScores]]) -> dict[str, float]:
    return {
        f"{task}/{metric}": scores[task][metric].mean()
        for task, metrics in _QUICK_METRICS.items()
        if task in scores
        for metric in metrics
    }
