"""What tests of figures share."""

from matplotlib.figure import Figure
from matplotlib.text import Text


def remember_saved(monkeypatch) -> list[Figure]:
    """The figures that are saved from now on, in order, to read their texts."""
    figures, savefig = [], Figure.savefig

    def remember(figure, *arguments, **options):
        figures.append(figure)
        return savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def texts(figure: Figure) -> str:
    """All visible texts of a figure, a line each."""
    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())
