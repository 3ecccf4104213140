"""Options of `lymph report`."""

from dataclasses import dataclass
from typing import ClassVar

from .options import option


@dataclass(kw_only=True)
class ReportOptions:
    """Which run is shown, and where."""

    _argument_group_name: ClassVar[str] = "report"

    run: str = option(..., "run folder that lymph evaluate has scored")
    evaluation: str | None = option(None, "folder that lymph evaluate --output wrote; by default the run")
    output: str | None = option(None, "HTML file to write; by default report.html beside the scores")
