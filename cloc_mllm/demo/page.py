"""The page: the choice of pictures, the picture to draw on, and a tab for each kind of question.

The tabs are in `tabs/`, questions in `engine`, pixels in `pictures`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from cloc_mllm.demo.answers import credit_html
from cloc_mllm.demo.data_set import DataSet
from cloc_mllm.demo.engine import DemoEngine
from cloc_mllm.demo.guard import RequestGuard
from cloc_mllm.demo.pictures import Picture, PictureKind, example_pictures, open_picture
from cloc_mllm.demo.stage import Stage, visitor_errors
from cloc_mllm.demo.surface import surface
from cloc_mllm.demo.tabs.chat import chat_tab
from cloc_mllm.demo.tabs.compare import compare_tab
from cloc_mllm.demo.tabs.data import data_tab
from cloc_mllm.demo.tabs.explore import explore_tab
from cloc_mllm.demo.tabs.ground import ground_tab
from cloc_mllm.demo.tabs.refer import refer_tab

MAX_UPLOAD = "20mb"
_MAX_WAITING = 32
_MAX_SESSIONS = 64
_ONE_HOUR_S = 3600

_INTRO = """# Ask a picture
Type what to look for, or draw on the picture to ask what is there. Everything runs on this machine.
"""


def build_page(
    engine: DemoEngine, rival: DemoEngine | None = None, data_set: DataSet | None = None
) -> gr.Blocks:
    """Builds the page. It may generate the example pictures, which takes a moment.

    Photos come first for a model that has a list of phrases, as the one for photos does.

    Args:
        rival: another checkpoint to compare with.
        data_set: records or chats to look at.
    """
    first: PictureKind = "scenes" if engine.cloc.phrases is None else "photos"
    examples = example_pictures(first)
    with gr.Blocks(
        title="cloc-mllm demo",
        analytics_enabled=False,
        delete_cache=(_ONE_HOUR_S, _ONE_HOUR_S),
    ) as page:
        gr.Markdown(_INTRO + (f"The model knows {engine.knows}." if engine.knows else ""))
        with gr.Row(elem_id="choose"):
            upload_button, gallery = _picture_choice(examples)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                stage = Stage(
                    engine=engine,
                    picture=gr.State(examples[0], time_to_live=_ONE_HOUR_S),
                    stroke=gr.State(None, time_to_live=_ONE_HOUR_S),
                    surface=surface(examples[0]),
                    credit=gr.HTML(credit_html(examples[0]), elem_id="credit"),
                )
            with gr.Column(scale=2, min_width=320), gr.Tabs() as tabs:
                with gr.Tab("Ground", id="ground", elem_id="tab-ground"):
                    ground_tab(stage, examples[0])
                with gr.Tab("Refer", id="refer", elem_id="tab-refer"):
                    refer_tab(stage, tabs)
                with gr.Tab("Explore", id="explore", elem_id="tab-explore"):
                    explore_tab(stage, examples)
                with gr.Tab("Chat", id="chat", elem_id="tab-chat"):
                    chat_tab(stage)
                with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                    compare_tab(stage, rival)
                with gr.Tab("Data", id="data", elem_id="tab-data"):
                    data_tab(stage, data_set)

        def upload(path: str) -> tuple[Any, ...]:
            with visitor_errors():
                return stage.choose(open_picture(path))

        def choose(event: gr.SelectData) -> tuple[Any, ...]:
            index = event.index if isinstance(event.index, int) else 0
            return stage.choose(examples[index % len(examples)])

        upload_button.upload(upload, upload_button, stage.outputs, api_name="set_picture")
        gallery.select(choose, None, stage.outputs, api_visibility="private")
    page.queue(max_size=_MAX_WAITING, api_open=False, default_concurrency_limit=1)
    return page


def serve(page: gr.Blocks, *, host: str, port: int, share: bool = False, block: bool = True) -> str:
    """Serves a page until it is interrupted, or in the background if not `block`.

    Returns:
        the address of the page.

    Raises:
        ValueError: the port is taken.
    """
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=not block,
            show_error=False,  # visitors still see a gr.Error, but no other message
            max_file_size=MAX_UPLOAD,
            allowed_paths=[],
            state_session_capacity=_MAX_SESSIONS,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=_theme(),
            css=(Path(__file__).parent / "page.css").read_text(encoding="utf-8"),
            app_kwargs={"middleware": [Middleware(RequestGuard)]},
            quiet=not block,
        )
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}; try another --port") from error
    return address


def _theme() -> gr.themes.Base:
    """Builds Gradio's soft theme, with more contrast where it is too pale to read or to see."""
    return gr.themes.Soft(primary_hue="blue", font=["system-ui", "sans-serif"]).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        color_accent="*primary_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_300",
        input_border_width="1px",
        input_border_color="*neutral_400",
        button_border_width="1px",
        button_secondary_border_color="*neutral_300",
        block_label_text_color="*primary_700",
        block_title_text_color="*primary_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_secondary_background_fill_hover_dark="*primary_600",
    )


def _picture_choice(examples: list[Picture]) -> tuple[gr.UploadButton, gr.Gallery]:
    upload = gr.UploadButton(
        "Upload a picture",
        file_types=[".jpg", ".jpeg", ".png", ".webp"],
        elem_id="upload",
        size="md",
        scale=0,
        min_width=170,
    )
    gallery = gr.Gallery(
        [example.image for example in examples],
        label="Example pictures",
        show_label=False,
        container=False,
        elem_id="examples",
        columns=len(examples),
        rows=1,
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
    )
    return upload, gallery
