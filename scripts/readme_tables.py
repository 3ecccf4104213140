"""Write the tables of poolings and fusions into README.md, from the registries and their docstrings.

Run it after adding one; `python scripts/readme_tables.py --check` only says whether the README is up to date.
"""

import inspect
import re
import sys
from pathlib import Path

from lymph_hf.fusion import FUSERS
from lymph_hf.pooling import POOLERS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- registries: begin -->\n", "<!-- registries: end -->"
SOURCE = re.compile(r"arXiv (\d{4}\.\d{4,5})|doi\s+(10\.[^\s,:)]+)|(hal-\d+)", re.IGNORECASE)


def row(name: str, kind: type) -> str:
    """`name | first sentence | first paper | options`."""
    text = " ".join(inspect.getdoc(kind).split("\n\n")[0].split())
    sentence = re.split(r"[.;](?:\s|$)|: `", text)[0].replace("|", "\\|")
    options = sorted(options_of(kind))
    return f"| `{name}` | {sentence} | {source(kind)} | {', '.join(f'`{option}`' for option in options)} |"


def options_of(kind: type) -> set[str]:
    """Keyword options of a class, and of the parents it passes `**options` on to."""
    found: set[str] = set()
    for parent in kind.__mro__:
        parameters = inspect.signature(parent.__init__).parameters.values()
        found |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found - {"num_labels"}


def source(kind: type) -> str:
    """The first paper in the docstring, as a link."""
    found = SOURCE.search(inspect.getdoc(kind) + " ")
    if found is None:
        return ""
    arxiv, doi, hal = found.groups()
    if arxiv:
        return f"[arXiv {arxiv}](https://arxiv.org/abs/{arxiv})"
    return f"[doi](https://doi.org/{doi})" if doi else f"[{hal}](https://hal.science/{hal})"


def tables() -> str:
    """Both tables in Markdown."""
    parts = []
    for title, registry in (("pooling", POOLERS), ("fusion", FUSERS)):
        parts += [f"\n| `--{title}` | what it does | source | options |", "|---|---|---|---|"]
        parts += [row(name, kind) for name, kind in registry.items()]
    return "\n".join(parts) + "\n"


def main() -> int:
    before = README.read_text(encoding="utf-8")
    head, rest = before.split(BEGIN)
    after = head + BEGIN + tables() + "\n" + END + rest.split(END, 1)[1]
    if "--check" in sys.argv:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
