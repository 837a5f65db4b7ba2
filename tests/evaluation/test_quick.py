"""Headline numbers while training."""

from cloc_mllm.data.records import Record
from cloc_mllm.evaluation.quick import quick_region_metrics


def test_quick_metrics_leave_the_model_as_it_was(tiny_cloc, character_tokenizer, test_scenes):
    tiny_cloc.train()
    tiny_cloc.vision.eval()
    before = [module.training for module in tiny_cloc.modules()]
    metrics = quick_region_metrics(tiny_cloc, character_tokenizer, test_scenes, batch_size=3)
    assert [module.training for module in tiny_cloc.modules()] == before
    assert set(metrics) == {
        "region_classification/macro_acc",
        "region_to_text/r_at_10",
        "text_to_region/r_at_10",
        "image_to_text/r_at_1",
        "text_to_box/acc_at_0_5",
        "text_to_box/mean_iou",
    }
    assert all(0 <= value <= 1 for value in metrics.values())
    tiny_cloc.eval()


def test_records_without_any_region_or_text(tiny_cloc, character_tokenizer, test_scenes):
    bare = Record("bare", test_scenes[0].image, 64, 64, [], [], "photos")
    assert quick_region_metrics(tiny_cloc, character_tokenizer, [bare]) == {}
