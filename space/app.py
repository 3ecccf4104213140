"""Space: cells of a blood smear -> reactive, tumoral, or refer to flow cytometry. Research use only.

LYMPH_MODEL=runs/demo/patients/lymph-mil python space/app.py
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile

# Before gradio is imported: uploads lie in a folder of our own, which goes when the service goes.
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="lymph-space-")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)

import gradio as gr  # noqa: E402
from answers import Predictor, default_model  # noqa: E402
from guard import Guard  # noqa: E402
from page import SPACE, build_page, theme  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from uploads import BATCH_LIMITS  # noqa: E402


def launch(source: str | None = None, **options) -> tuple[gr.Blocks, str]:
    """Load the model and serve the page.

    Args:
        source: Hub id or folder of the model; `None` = `answers.default_model`.
        options: of `gradio.Blocks.launch`.

    Returns:
        The page, and its local address.
    """
    page = build_page(Predictor(source or default_model()))
    _, address, _ = page.launch(
        theme=theme(),
        css_paths=SPACE / "style.css",
        max_file_size=BATCH_LIMITS.total_bytes,
        app_kwargs={"middleware": [Middleware(Guard, max_bytes=BATCH_LIMITS.total_bytes)]},
        footer_links=["api"],
        show_error=True,
        ssr_mode=False,
        **options,
    )
    return page, address


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # an orderly end, which deletes what was uploaded
    launch()
