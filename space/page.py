"""The page: what is asked, where the answer stands, and how both are wired."""

import csv
import io
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from answers import Predictor
from report import USE, answer_html, error_html, link, values_html
from service import BATCH_COLUMNS, SINGLE_CELLS, SMEAR_FIELDS, answer_batch, answer_patient, read_number
from uploads import UploadError

from lymph_hf.clinical_table import check_age, check_count

logger = logging.getLogger(__name__)

SPACE = Path(__file__).parent
TITLE = "Lymphocytosis: reactive or tumoral?"
UNKNOWN = "Not known"
PREVALENCE = 18  # percent; one laboratory's series of lymphocytosis
_SEXES = {"Female": "F", "Male": "M", UNKNOWN: None}
_DELETE_EVERY, _DELETE_AFTER = 60, 1800  # seconds: uploads of those who have left without a word
_WAITING = (
    '<section class="lymph"><div class="waiting" role="status"><strong>The answer will appear here.</strong>'
    "<p>Add pictures of one patient or choose a painted example, then press Analyse.</p></div></section>"
)
_UNANSWERED = ("", _WAITING, None)  # progress, answer, numbers
_WORKING = '<section class="lymph"><p role="status">Working \N{HORIZONTAL ELLIPSIS}</p></section>'
_MAPPING = (
    '<section class="lymph"><p class="soft" role="status">'
    "Looking inside the most telling cells \N{HORIZONTAL ELLIPSIS}</p></section>"
)
_EXAMPLES = [
    ("Painted, reactive", ["reactive.zip"], SINGLE_CELLS, "31", "Female", "6.1"),
    ("Painted, tumoral", ["tumoral.zip"], SINGLE_CELLS, "74", "Male", "38.5"),
    ("Painted, unclear, clinic unknown", ["unclear.zip"], SINGLE_CELLS, "", UNKNOWN, ""),
    ("Painted smear field", ["field.jpg"], SMEAR_FIELDS, "68", "Female", "12"),
]


def build_page(predictor: Predictor) -> gr.Blocks:
    """The whole page around a loaded model."""
    gr.set_static_paths([SPACE / "examples"])  # served as they are, not copied among the uploads
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_DELETE_EVERY, _DELETE_AFTER)) as page:
        gr.HTML(_head(predictor))
        with gr.Tabs():
            with gr.Tab("One patient"):
                _patient_tab(predictor)
            with gr.Tab("Many patients"):
                _batch_tab(predictor)
            with gr.Tab("About"):
                gr.Markdown((SPACE / "about.md").read_text(encoding="utf-8"), elem_classes="about")
        page.unload(_forget_uploads)
    return page.queue(max_size=40, status_update_rate=1, default_concurrency_limit=1)


def theme() -> gr.themes.Base:
    """Fonts of the reader's own system: nothing is fetched for them. Texts and fields that stand out enough."""
    soft = gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    colours = {
        "block_title_text_color": "*body_text_color",
        "block_title_background_fill": "none",
        "block_label_text_color": "*body_text_color",
        "block_label_background_fill": "none",
    }
    return soft.set(
        **colours,
        **{f"{name}_dark": value for name, value in colours.items()},
        block_title_padding="0",
        block_label_border_width="0px",
        block_label_shadow="none",
        body_text_color_subdued="*neutral_600",
        body_background_fill="*neutral_50",
        block_background_fill="white",
        checkbox_border_color="*neutral_400",
        input_border_width="1px",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_500",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        checkbox_label_background_fill_selected="*primary_600",
    )


def _head(predictor: Predictor) -> str:
    return (
        f'<header class="lymph"><h1>{TITLE}</h1><p>Cells of one blood smear, and age, sex and lymphocyte count where '
        f"known \N{RIGHTWARDS ARROW} a probability, an honest \N{LEFT DOUBLE QUOTATION MARK}refer to flow "
        f"cytometry\N{RIGHT DOUBLE QUOTATION MARK} where the model cannot tell, and the cells behind the answer.</p>"
        f'<p class="use" role="note">{USE} Send no names, dates of birth or identifiers. Model: {predictor.name}.</p>'
        "</header>"
    )


# One patient -------------------------------------------------------------------------------------------------


def _patient_tab(predictor: Predictor) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            kind = gr.Radio([SINGLE_CELLS, SMEAR_FIELDS], value=SINGLE_CELLS, label="What do the pictures show?")
            files = gr.File(
                label="Pictures, or one ZIP",
                file_count="multiple",
                height=150,
                elem_id="files",
            )
            # Text, as gradio's field of numbers turns an empty one into 0: an age of 0 years is none that is unknown.
            crop_side = gr.Textbox(
                label="Crop size in pixels",
                info="Leave empty to measure it from the red cells, which are 7.5 µm wide.",
                visible=False,
                max_lines=1,
            )
            with gr.Row():
                age = gr.Textbox(label="Age in years", placeholder="empty if not known", max_lines=1, min_width=200)
                count = gr.Textbox(
                    label="Lymphocytes, 10⁹ per litre", placeholder="empty if not known", max_lines=1, min_width=200
                )
            sex = gr.Radio(list(_SEXES), value=UNKNOWN, label="Sex")
            with gr.Row():
                clear = gr.Button("Clear", variant="secondary")
                stop = gr.Button("Stop", variant="stop", visible=False)
                analyse = gr.Button("Analyse", variant="primary", elem_id="analyse")
            inputs = [files, kind, crop_side, age, sex, count]
            gr.Examples(
                label="Or choose a painted example, then Analyse",
                examples=[
                    [[str(SPACE / "examples" / name) for name in names], kind_, "", *clinical]
                    for _, names, kind_, *clinical in _EXAMPLES
                ],
                example_labels=[label for label, *_ in _EXAMPLES],
                inputs=inputs,
                cache_examples=False,
                api_visibility="private",
            )
        with gr.Column(scale=3, min_width=300):
            progress = gr.HTML("", label="Progress", elem_id="progress", elem_classes="progress")
            answer = gr.HTML(_WAITING, label="Answer", elem_id="answer")
            with gr.Accordion("What a positive or negative answer means where you work", open=True):
                prevalence = gr.Slider(
                    1,
                    90,
                    value=PREVALENCE,
                    step=1,
                    label=f"Of 100 patients tested, how many are {predictor.labels[-1]}?",
                    info="18 in one laboratory's series of lymphocytosis; far more where patients are preselected.",
                    visible=predictor.performance is not None,
                )
                values = gr.HTML(
                    values_html(predictor.performance, PREVALENCE / 100, predictor.labels[-2:]),
                    label="Predictive values",
                )
            with gr.Accordion("Numbers for programs (JSON)", open=False):
                numbers = gr.JSON(label="Answer as numbers", show_label=False)

    def answered(
        files: list[str] | None,
        kind: str,
        crop_side: str | None,
        age: str | None,
        sex: str,
        count: str | None,
        request: gr.Request,
        tell: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it by the default
    ) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
        _remember_uploads(request, files)
        with _Reported() as reported:
            side = read_number(crop_side, "Crop size")
            clinical = {
                "age": read_number(age, "Age", check_age),
                "sex": _SEXES[sex],
                "lymphocyte_count": read_number(count, "Lymphocyte count", check_count),
            }
            for found in answer_patient(predictor, files or [], kind, side, clinical, tell):
                shown = answer_html(found, model=predictor.name), found.to_json()
                yield _MAPPING, *shown
            yield "", *shown
        if reported.message:
            yield "", error_html(reported.message), None
            raise reported.error()

    def forget_answer(files: list[str] | None, request: gr.Request) -> tuple[Any, ...]:
        _remember_uploads(request, files)
        return *_UNANSWERED, *_READY

    def predictive_values(prevalence: float) -> str:
        return values_html(predictor.performance, min(max(prevalence, 0.1), 99.9) / 100, predictor.labels[-2:])

    outputs = [progress, answer, numbers]
    run = _on_click(
        analyse,
        stop,
        answered,
        inputs,
        outputs,
        working=("", _WORKING, None),  # what stood there belongs to other cells
        idle=_UNANSWERED,
        forgotten=_UNANSWERED,
        api_name="analyse",
        api_description=(
            "One patient: pictures (or a ZIP), 'Single cells' or 'Smear fields', crop size or None, age or None, "
            "'Female', 'Male' or 'Not known', lymphocyte count (10^9/L) or None -> progress, answer as HTML, as JSON."
        ),
        show_progress_on=progress,
        scroll_to_output=True,
        concurrency_limit=4,
    )
    clear.click(
        lambda: (None, SINGLE_CELLS, "", "", UNKNOWN, "", *_UNANSWERED),
        None,
        [*inputs, *outputs],
        **_UNSEEN,
    )
    kind.change(lambda kind: gr.update(visible=kind == SMEAR_FIELDS), kind, crop_side, **_UNSEEN)
    for changed in inputs:  # an answer never stands beside the inputs of another patient
        changed.change(forget_answer, files, [*outputs, analyse, stop], cancels=[run], **_UNSEEN)
    prevalence.change(
        predictive_values,
        prevalence,
        values,
        api_name="predictive_values",
        api_description="Prevalence in percent -> PPV and NPV of the model as HTML.",
        show_progress="hidden",
        queue=False,
    )


# Many patients -----------------------------------------------------------------------------------------------


def _batch_tab(predictor: Predictor) -> None:
    gr.HTML(
        '<section class="lymph"><p>A ZIP with one folder of cell images per patient, and a table (CSV) with columns '
        "<code>patient_id</code>, <code>age</code>, <code>sex</code> (F or M) and <code>lymphocyte_count</code> "
        "(10⁹/L). <code>patient_id</code> is the name of the folder; a number that means nothing outside "
        "your laboratory. Empty values are unknown ones.</p></section>"
    )
    with gr.Row():
        table = gr.File(label="Table of the patients (CSV)", height=150)
        archives = gr.File(label="Cells (ZIP)", file_count="multiple", height=150)
    with gr.Row():
        stop = gr.Button("Stop", variant="stop", visible=False)
        analyse = gr.Button("Analyse all", variant="primary", elem_id="analyse-all")
    gr.Examples(
        label="Or choose three painted patients",
        examples=[[str(SPACE / "examples" / "batch.csv"), [str(SPACE / "examples" / "batch.zip")]]],
        example_labels=["Three painted patients"],
        inputs=[table, archives],
        cache_examples=False,
        api_visibility="private",
    )
    progress = gr.HTML("", label="Progress", elem_id="batch-progress", elem_classes="progress")
    message = gr.HTML("", label="Message", elem_id="batch-message")
    results = gr.Dataframe(
        headers=list(BATCH_COLUMNS),
        datatype=["str", "number", "number", "str", "str", "str"],
        type="array",
        interactive=False,
        visible=False,
        wrap=True,
        column_widths=["14%", "9%", "13%", "22%", "14%", "28%"],
        label="Answers",
        elem_id="batch-results",
    )

    def answered(
        table: str | None,
        archives: list[str] | None,
        request: gr.Request,
        tell: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple[str, str, list[list[Any]]]]:
        _remember_uploads(request, [table, *(archives or [])])
        rows: list[list[Any]] = []
        left_out: list[tuple[str, str]] = []
        with _Reported() as reported:
            for row in answer_batch(predictor, table, archives or [], left_out, tell):
                rows.append(list(row))
                yield "", _WORKING, rows
        if reported.message:
            yield "", error_html(reported.message), rows
            raise reported.error()
        yield "", _batch_message(rows, left_out, predictor.labels), rows

    forgotten = ("", "", gr.update(value=[], visible=False))
    outputs = [progress, message, results]
    run = _on_click(
        analyse,
        stop,
        answered,
        [table, archives],
        outputs,
        working=("", _WORKING, gr.update(value=[], visible=True)),
        idle=("", "", gr.skip()),
        forgotten=forgotten,
        api_name="batch",
        api_description="Many patients: CSV or None, list of ZIPs -> progress, message with the CSV, table of answers.",
        show_progress_on=progress,
        concurrency_limit=1,
    )
    for changed in (table, archives):
        changed.change(
            lambda: (*forgotten, *_READY),
            None,
            [*outputs, analyse, stop],
            cancels=[run],
            **_UNSEEN,
        )


def _batch_message(rows: list[list[Any]], left_out: list[tuple[str, str]], labels: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([BATCH_COLUMNS, *rows])
    answered = sum(row[2] is not None for row in rows)
    text = f"{answered} of {len(rows)} patients answered."
    if len(labels) == 2:
        text += f" The probability is that of {escape(labels[1])}."
    if left_out:
        text += f" {len(left_out)} files of the ZIP were no pictures and left out."
    download = link(buffer.getvalue(), "lymphocytosis-answers.csv", "Download table (CSV)", "text/csv")
    return f'<section class="lymph" aria-label="Result"><p role="status">{text}</p>{download}</section>'


# Both ---------------------------------------------------------------------------------------------------------


_UNSEEN = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
_READY, _RUNNING = (
    (gr.update(visible=not running), gr.update(visible=running)) for running in (False, True)
)  # of the start and the stop button


def _on_click(
    start: gr.Button,
    stop: gr.Button,
    answered: Callable[..., Iterator[Any]],
    inputs: list[Any],
    outputs: list[Any],
    *,
    working: tuple[Any, ...],
    idle: tuple[Any, ...],
    forgotten: tuple[Any, ...],
    **options: Any,
) -> Any:
    """Answer at a click; while a run is under way, the start button is a stop button.

    Args:
        working, idle, forgotten: outputs at the start of a run, after it was stopped, and when its inputs have changed.
        options: of the run.

    Returns:
        The run, which other events may cancel.
    """
    asked = gr.State()

    def finished(asked: tuple[Any, ...], *values: Any) -> tuple[Any, ...]:
        # A change cancels a run, but for one that the server has not numbered yet: that one answers what is not asked.
        return (*_READY, *([gr.skip()] * len(outputs) if values == asked else forgotten))

    # Told first: of several events of one click, the page waits for the end of each.
    start.click(lambda *values: (*_RUNNING, *working, values), inputs, [start, stop, *outputs, asked], **_UNSEEN)
    run = start.click(answered, inputs, outputs, **options)
    for ended in (run.then, run.failure):  # the page passes over `then` after an error
        ended(finished, [asked, *inputs], [start, stop, *outputs], **_UNSEEN)
    stop.click(lambda: (*_READY, *idle), None, [start, stop, *outputs], cancels=[run], **_UNSEEN)
    return run


class _Reported:
    """Holds back an exception and keeps what the reader may know of it; the log learns its type alone."""

    message = ""

    def error(self) -> gr.Error:
        """For programs; readers find the message where the answer would stand."""
        return gr.Error(self.message, visible=False, print_exception=False)

    def __enter__(self) -> "_Reported":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, UploadError):
            self.message = str(error)
        elif isinstance(error, FileNotFoundError):
            self.message = "The files are no longer here, as they are kept for half an hour at most. Add them again."
        elif isinstance(error, Exception):
            logger.error("an analysis failed with %s", type(error).__name__)
            self.message = "Something went wrong on our side. Try again, or with other pictures."
        return bool(self.message)


_uploads: dict[str, set[Path]] = defaultdict(set)  # by session


def _remember_uploads(request: gr.Request, paths: list[str | None] | None) -> None:
    kept = (SPACE / "examples").resolve()
    mine = {Path(path) for path in paths or [] if path and kept not in Path(path).resolve().parents}
    _uploads[request.session_hash or ""] |= mine


def _forget_uploads(request: gr.Request) -> None:
    """When a reader leaves, the files leave; those of a connection that broke follow by age.

    Equal files have one place, which another session may still need.
    """
    mine = _uploads.pop(request.session_hash or "", set())
    # Of each upload gradio also leaves an empty file; a young one may be about to be filled.
    empty = [
        path
        for path in Path(os.environ["GRADIO_TEMP_DIR"]).glob("tmp*")
        if path.is_file() and path.stat().st_size == 0 and time.time() - path.stat().st_mtime > _DELETE_EVERY
    ]
    for path in [*mine.difference(*_uploads.values()), *empty]:
        path.unlink(missing_ok=True)
