"""The reasons for which items are dropped or set aside: what was expected, and what to do."""

from __future__ import annotations

_FOLDER = "name the folder or archive that holds the photos with --images"
_FRAME = "see which frame the boxes are in with `cloc-mllm data doctor`"

# each text follows the word "expected"
REASONS: dict[str, str] = {
    # records
    "missing_id": "an id of each image, a text or a number; write one into the annotations",
    "duplicate_id": "one record per id; of several with one id the first is kept",
    "missing_image": f"a file of this name; {_FOLDER}, or fetch the missing ones",
    "ambiguous_image": "one file that the name can mean; write the paths below --images into the "
    "annotations, or name the folder that the names start from with --images",
    "file_too_large": "files of at most 64 MiB; resize or recompress the photo",
    "not_an_image": "a JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, AVIF or HEIC file; convert it",
    "broken_image": "a file that decodes to its end; fetch or save it again",
    "image_too_large": "at most 64 million pixels; resize it",
    "damaged_shard": "files that match their manifest; build the data set again",
    "bad_annotation": "an annotation file that can be parsed; mend or fetch it again",
    "missing_annotation": "an annotation of each image; name their folder with --annotations, or "
    "fewer images with --ids",
    # boxes
    "not_finite": "four finite numbers, or a segmentation; write pixels or shares as numbers",
    "inverted": "x1 <= x2 and y1 <= y2 (width and height not negative); swap the corners, or see "
    "whether the numbers are corners where a width and a height are expected",
    "zero_area": "a box with a width and a height; remove it or draw it again",
    "outside": f"a box that lies on its image; {_FRAME}",
    "mostly_outside": f"a box of which at least half lies on its image; {_FRAME}",
    "too_small": "a box of at least one pixel; remove it or draw it again",
    "bad_score": "a finite number as the score",
    "point": "a box of four numbers; points are no regions",
    "no_box": "a box, polygon, ellipse or mask; points, lines and cuboids have no box",
    "brush_mask": "a rectangle, polygon or ellipse; Label Studio's brush masks are not read, so "
    "draw one around each, or convert the masks to COCO",
    "turned_view": "a shape drawn while the view was not turned (`image_rotation` 0): versions of "
    "Label Studio differ in what it is then measured in; draw it again",
    # texts
    "empty_text": "a text with at least one visible character: a class name, phrase or caption",
    "bad_text": "a text (no null, number or list) that UTF-8 can write; name the file's encoding "
    "with --encoding",
    "text_too_long": "a text of at most 2,000 characters",
    # links between lists
    "unknown_category": "a class that the list of classes has; give the list that belongs to the "
    "annotations (`categories`, --names)",
    "unknown_image": "an image that the file lists, or that lies in --images; give the files that "
    "belong together",
    "unknown_annotation": "an annotation of this id or number; give the files that belong together",
    "box_without_phrase": "words, or a mark, that say what is in the box; write them into the row",
    # chats and their turns
    "role_order": "a question of the user and its answer in turn, behind at most one system turn; "
    "what comes before is kept",
    "no_answer": "an answer to the last question",
    "image_in_answer": "images in questions, as the model answers in words; a mark <image> that "
    "shows none is to be taken out",
    "no_turns": "at least one question with its answer",
    "unknown_role": "system, user (human) or assistant (gpt); tools and functions are not learnt",
    "image_count": "as many marks <image> as images, or none",
    "other_media": "texts and images; videos and sounds are not read",
    "undeclared_frame": "a declared frame of these boxes; say what their numbers are of with "
    "--frame",
    # rows
    "bad_row": "the layout that `cloc-mllm data build SOURCE --help` describes; mend the row, or "
    "choose the source of its layout",
    "other_layout": "the layout of this source; convert the rows, or choose the source of their "
    "layout",
}

# a note on chats
NUMBERS_AS_WORDS = "groups of four numbers kept as words: no boxes of this source and its --frame"

# by reason: what a declared rule leaves out, and the option that keeps it
SET_ASIDE: dict[str, str] = {
    "crowd": "boxes around a crowd; --keep_crowd keeps them",
    "ignored": "places that were not annotated (tag `mask`); --keep_ignored keeps them",
    "other_split": "refs of other splits; --split chooses, without it all are read",
    "no_target": "refs of nothing that is there (gRefCOCO), which no region can hold; "
    "`cloc-mllm eval grec` asks them",
    "no_region": "questions with their answers that name no box; chats keep them (without "
    "--as regions)",
    "unnamed": "boxes that the conversation says nothing of that is a name; chats keep them",
    "no_image": "rows of text alone; a record is of an image",
    "unsaid": "utterances without a content word",
    "unheard": "utterances during which the mouse hardly moved",
    "skipped": "tasks and annotations that their annotator skipped (`was_cancelled`)",
    "other_annotation": "further annotations of a task, whose first or ground truth counts; "
    "--all_annotations keeps them",
    "not_asked": "images that --ids does not list; without it all are read",
    "filtered": "records that the options of `data filter` leave out",
}
