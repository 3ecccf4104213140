"""An answer as HTML: for the page, and as a file that stands alone.

Nothing in it names a person: no name, identifier, date or file name, only what was asked and answered. Pictures are
inside the text, so that the file opens anywhere and nothing is fetched.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from answers import REFER, Answer, Performance
from PIL import Image

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
USE = (
    "<strong>Research use only. Not a medical device.</strong> The answer must not guide the care of a patient. "
    "Flow cytometry is the reference."
)
_PICTURE_SIDE = 144
_LISTED = 50
_FOR, _AGAINST = np.array([232, 72, 20]), np.array([20, 104, 214])  # of the maps, on purple cells
_CLINICAL = {
    "age": ("Age", "{:g} years"),
    "sex": ("Sex", "{}"),
    "lymphocyte_count": ("Lymphocyte count", "{:g} \N{MULTIPLICATION SIGN} 10\N{SUPERSCRIPT NINE}/L"),
}


def answer_html(answer: Answer, *, model: str, download: bool = True) -> str:
    """The whole answer as a section of the page."""
    parts = [
        _verdict(answer),
        _scale(answer),
        _list("Read this first", answer.warnings, "warnings"),
        _facts(answer, model),
        _download(answer, model) if download else "",
        _clinic(answer),
        _gallery(answer),
        _overviews(answer),
        _list("What was done with the upload", answer.notes, "notes"),
        _left_out(answer) if download else "",  # not in the file: names of files may be names of people
    ]
    return _section("\n".join(part for part in parts if part), "Answer")


def report_html(answer: Answer, *, model: str) -> str:
    """A complete HTML document without scripts, links or personal data."""
    body = answer_html(answer, model=model, download=False)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Lymphocytosis report</title>'
        f"<style>body{{max-width:60rem;margin:2rem auto;padding:0 1rem}}{STYLE}</style></head><body>"
        f'<main><div class="lymph"><h1>Lymphocytosis: reactive or tumoral?</h1><p class="use">{USE}</p></div>{body}'
        "</main></body></html>"
    )


def values_html(performance: Performance | None, prevalence: float, labels: Sequence[str]) -> str:
    """PPV and NPV at a prevalence, or why there are none.

    Args:
        prevalence: share of label 1 among the patients tested, strictly between 0 and 1.
    """
    if performance is None:
        text = (
            "This model comes without measured sensitivity and specificity (no <code>evaluation.json</code> beside "
            "it), so predictive values cannot be computed."
        )
        return _section(f'<p class="soft">{text}</p>', "Predictive values")
    ppv, npv = performance.predictive_values(prevalence)
    sample = performance.positives / performance.patients
    negative, positive = map(escape, labels)
    rows = [
        (f"Of 100 patients called {positive}, truly {positive} (PPV)", _percent(ppv)),
        (f"Of 100 patients called {negative}, truly {negative} (NPV)", _percent(npv)),
    ]
    table = "".join(f'<tr><th scope="row">{name}</th><td class="number">{value}</td></tr>' for name, value in rows)
    return _section(
        f"<p>Where <b>{_percent(prevalence)}</b> of the patients tested are {positive}:</p><table>{table}</table>"
        f'<p class="soft">From sensitivity {_percent(performance.sensitivity)} and specificity '
        f"{_percent(performance.specificity)} at the model's frozen threshold, measured on "
        f"{performance.patients} patients, {_percent(sample)} of them {positive}.</p>",
        "Predictive values",
    )


def link(content: str, name: str, text: str, kind: str) -> str:
    """A download that the page itself holds: no file is left on the server."""
    data = base64.b64encode(content.encode()).decode()
    return f'<a class="download" download="{name}" href="data:{kind};charset=utf-8;base64,{data}">{escape(text)}</a>'


def error_html(message: str) -> str:
    """A problem, said where the answer would stand."""
    return (
        f'<section class="lymph" role="alert"><div class="verdict refer"><strong>No answer</strong>'
        f"<p>{escape(message)}</p></div></section>"
    )


def _section(content: str, name: str) -> str:
    return f'<section class="lymph" aria-label="{escape(name)}">{content}</section>'


def _verdict(answer: Answer) -> str:
    label = escape(answer.target)
    chance = f"The model gives {label} a probability of <b>{_percent(answer.probability)}</b>."
    if answer.prediction_set is None:
        kind, why = _kind(answer, answer.decision), "This model has no prediction sets: the threshold alone decides."
    elif answer.decision == REFER:
        kind = "refer"
        why = (
            f"{escape(' and '.join(answer.prediction_set).capitalize())} both remain possible: a prediction set "
            f"that holds the truth for {_percent(answer.coverage)} of patients cannot leave either out."
        )
    else:
        kind = _kind(answer, answer.decision)
        only = escape(answer.decision.capitalize())
        share = _percent(answer.coverage)
        why = f"{only} is the only label in a prediction set that holds the truth for {share} of patients."
    decision = answer.decision.capitalize()
    return f'<div class="verdict {kind}" role="status"><strong>{escape(decision)}</strong><p>{chance} {why}</p></div>'


def _kind(answer: Answer, label: str) -> str:
    return "positive" if label == answer.labels[-1] else "negative"


def _scale(answer: Answer) -> str:
    """The probability on a line from 0 to 100 %, with the threshold."""
    if len(answer.labels) != 2:
        rows = zip(answer.labels, answer.probabilities, strict=True)
        cells = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td class="number">{_percent(p)}</td></tr>' for name, p in rows
        )
        return f"<table>{cells}</table>"
    at, cut = 100 * answer.probability, 100 * answer.threshold
    name = escape(answer.target)
    label = f"Probability of {name} {at:.0f} %, on a scale from 0 to 100 %; threshold {cut:.0f} %"
    return (
        f'<div class="scale" role="img" aria-label="{label}"><div class="track" aria-hidden="true">'
        f'<span class="negative" style="width:{cut:.1f}%;opacity:.35"></span>'
        f'<span class="positive" style="width:{100 - cut:.1f}%;opacity:.35"></span></div>'
        f'<div class="ends" aria-hidden="true"><span>{escape(answer.labels[0])}</span><span>{name}</span></div>'
        f'<div class="marker" aria-hidden="true" style="left:{min(max(at, 3), 97):.1f}%">{at:.0f} %</div>'
        f'<div class="cut" aria-hidden="true" style="left:{min(max(cut, 22), 78):.1f}%">threshold {cut:.0f} %</div>'
        "</div>"
    )


def _facts(answer: Answer, model: str) -> str:
    rows = [("Cells read", str(len(answer.images)))]
    if answer.prediction_set is not None:
        labels = " or ".join(answer.prediction_set)
        rows.append(
            ("Cannot be ruled out", f"{labels} (sets hold the truth for {_percent(answer.coverage)} of patients)")
        )
    if answer.threshold is not None:
        side = "at or above" if answer.probability >= answer.threshold else "below"
        rows.append(("By the threshold alone", f"{answer.called} ({side} {_percent(answer.threshold)})"))
    rows.append(("Model", model))
    body = "".join(f'<tr><th scope="row">{name}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f"<table>{body}</table>"


def _gallery(answer: Answer) -> str:
    target = escape(answer.target)
    other = escape(answer.labels[0]) if len(answer.labels) == 2 else f"not {target}"
    titles = {
        "for": f"Cells that speak for {target}",
        "against": f"Cells that speak for {other}",
        "neutral": "Cells that made the least difference",
    }
    groups = answer.groups()
    parts = [
        f'<h3>{titles[name]}</h3><ul class="cells">{"".join(_cell(answer, i) for i in cells)}</ul>'
        for name, cells in groups.items()
        if cells
    ]
    explained = (
        f"Points: by how much the cell moves the probability of {target}, in hundredths, against the same patient "
        "without it. Weight: the share of the model's attention."
    )
    if answer.maps:
        explained += f" Right half of a pair: where in the cell; red speaks for {target}, blue against it."
    return f'<h2>The cells behind the answer</h2>{"".join(parts)}<p class="soft">{explained}</p>'


def _cell(answer: Answer, index: int) -> str:
    picture = answer.images[index].convert("RGB").resize((_PICTURE_SIDE, _PICTURE_SIDE))
    effect = answer.explanation.effects[index]
    points = "" if np.isnan(effect) else f"{_signed(100 * effect)} points"
    weights = answer.explanation.attentions
    caption = [f"<b>Cell {index + 1}</b>", points, "" if weights is None else f"weight {100 * weights[index]:.1f} %"]
    images = _img(picture, f"Cell {index + 1}" + (f", {points}" if points else ""))
    mapped = index in answer.maps
    if mapped:
        images += _img(_overlay(picture, answer.maps[index]), f"Cell {index + 1}: where the evidence lies")
    return (
        f'<li{" class=mapped" if mapped else ""}><figure><div class="{"pair" if mapped else "alone"}">{images}</div>'
        f"<figcaption>{' '.join(f'<span>{part}</span>' for part in caption if part)}</figcaption></figure></li>"
    )


def _overlay(picture: Image.Image, signed: np.ndarray) -> Image.Image:
    """A map of -1..1 in red (above 0) and blue over the grey picture."""
    strength = Image.fromarray(np.asarray(signed, np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    signed = np.asarray(strength)[..., None]
    largest = max(float(np.abs(signed).max()), 1e-6)
    alpha = 0.75 * np.abs(signed) / largest
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    mixed = (1 - alpha) * grey + alpha * np.where(signed > 0, _FOR, _AGAINST)
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _clinic(answer: Answer) -> str:
    if not answer.clinical:
        return ""
    title = "<h2>What the clinic contributed</h2>"
    if all(value is None for value in answer.clinical.values()):
        return f"{title}<p>Nothing was given: the answer rests on the cells alone.</p>"
    effects = answer.explanation.clinical_effects
    target = escape(answer.target)
    largest = max(0.05, *(abs(effect) for effect in effects.values()))
    rows = []
    for name, value in answer.clinical.items():
        row, unit = _CLINICAL[name]
        effect = effects.get(name, 0.0)
        given = value is not None
        value = {"F": "female", "M": "male"}.get(value, value)
        side = "positive" if effect > 0 else "negative"
        width = 50 * abs(effect) / largest
        place = f"left:50%;width:{width:.1f}%" if effect > 0 else f"right:50%;width:{width:.1f}%"
        bar = f'<span class="bar" aria-hidden="true"><i class="{side}" style="{place}"></i></span>' if given else ""
        points = f"{_signed(100 * effect)} points" if given else "\N{EN DASH}"
        rows.append(
            f'<tr><th scope="row">{row}</th><td>{escape(unit.format(value)) if given else "not given"}</td>'
            f'<td class="number">{points}</td><td>{bar}</td></tr>'
        )
    head = '<tr><th scope="col">Value</th><th scope="col">Given</th><th scope="col">Effect</th><td></td></tr>'
    return (
        f'{title}<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
        f'<p class="soft">Effect: by how much the value moves the probability of {target}, in hundredths, against '
        f"the same patient with that value unknown. Above 0, to the right, it speaks for {target}.</p>"
    )


def _list(title: str, lines: Iterable[str], kind: str) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="{kind}"><h3>{title}</h3><ul>{items}</ul></div>' if items else ""


def _left_out(answer: Answer) -> str:
    items = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in answer.left_out[:_LISTED])
    more = len(answer.left_out) - _LISTED
    rest = f"<li>and {more} more</li>" if more > 0 else ""
    return f"<details><summary>Files left out</summary><ul>{items}{rest}</ul></details>" if items else ""


def _overviews(answer: Answer) -> str:
    figures = "".join(
        f"<figure>{_img(overview, f'Smear field {i}, the cells found framed and numbered', 'overview')}</figure>"
        for i, overview in enumerate(answer.overviews, start=1)
    )
    return f"<h2>Cells found in the smear</h2>{figures}" if figures else ""


def _download(answer: Answer, model: str) -> str:
    report = link(report_html(answer, model=model), "lymphocytosis-report.html", "Download report", "text/html")
    return (
        f'{report}<p class="soft">One HTML file without name, identifier, date or file name. Nothing is kept here.</p>'
    )


def _img(picture: Image.Image, alt: str, kind: str = "") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} class="{kind}" alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'


def _percent(share: Any) -> str:
    if share is None:
        return "cannot be said"
    percent = 100 * float(share)
    if 0 < percent < 1 or 99 < percent < 100:
        return f"{percent:.1f} %"
    return f"{percent:.0f} %"


def _signed(number: float) -> str:
    """Two significant digits: a cell among two hundred moves the answer by very little."""
    digits = 1 if abs(number) >= 0.95 else 4 if abs(number) < 0.0095 else 2 if abs(number) >= 0.095 else 3
    shown = f"{number:+.{digits}f}"
    return shown.replace("-", "\N{MINUS SIGN}") if float(shown) else "0"
