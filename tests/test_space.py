"""The Space without a browser: uploads, smear fields, answers, report, service."""

import ast
import base64
import contextlib
import io
import json
import re
import stat
import struct
import zipfile
import zlib

import answers
import numpy as np
import pytest
import quality
import report
import service
import smear
import torch
import uploads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from space_server import EXAMPLES, SPACE, write_model

from lymph_hf.clinical_table import check_age, check_count
from lymph_hf.explain import explain_bag

ALLOWED = {"lymph_hf", "lymph_hf.explain", "lymph_hf.explain_maps", "lymph_hf.images", "lymph_hf.clinical_table"}


def quiet(share, text):
    """A progress that is told nothing."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("space") / "lymph-mil")


@pytest.fixture(scope="module")
def predictor(model_folder):
    return answers.Predictor(str(model_folder))


@pytest.fixture(scope="module")
def cells():
    return uploads.read_pictures([EXAMPLES / "tumoral.zip"]).images[:18]


def jpeg(seed=0, side=40):
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def pack(path, members, **options):
    """A ZIP of name (or ZipInfo) -> bytes."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_the_space_imports_only_what_a_model_needs():
    for path in SPACE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {name for name in names if name.split(".")[0] == "lymph_hf"} <= ALLOWED, path.name


# Uploads ------------------------------------------------------------------------------------------------------


def test_files_and_zips_give_the_same_pictures(tmp_path):
    data = {f"{i}.jpg": jpeg(i) for i in range(3)}
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    loose = uploads.read_pictures([tmp_path / name for name in reversed(data)])
    packed = uploads.read_pictures(
        [pack(tmp_path / "a.zip", {f"any/{name}": content for name, content in data.items()})]
    )
    assert [image.tobytes() for image in loose.images] == [image.tobytes() for image in packed.images]
    assert len(loose.images) == 3 and loose.repeated == 0 and loose.left_out == []


def test_identical_pictures_count_once(tmp_path):
    found = uploads.read_pictures([pack(tmp_path / "a.zip", {"1.jpg": jpeg(1), "2.jpg": jpeg(1), "3.jpg": jpeg(2)})])
    assert (len(found.images), found.repeated) == (2, 1)


def linked(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("../../etc/cell.jpg", jpeg(5), "leads out"),
        ("/etc/cell.jpg", jpeg(5), "leads out"),
        ("C:/cell.jpg", jpeg(5), "leads out"),
        (linked("link.jpg"), b"/etc/passwd", "a link"),
        ("notes.txt", b"text", "no picture by its name"),
        ("text.jpg", b"text", "not an image"),
        ("empty.jpg", b"", "empty file"),
        ("nested.jpg", b"PK\3\4 and so on", "a ZIP inside a ZIP"),
        ("half.jpg", jpeg(6)[:-300], "damaged or truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_no_honest_picture_is_left_out_with_a_reason(tmp_path, name, data, reason):
    found = uploads.read_pictures([pack(tmp_path / "a.zip", {"good.jpg": jpeg(1), name: data})])
    assert len(found.images) == 1
    assert [reason in why for _, why in found.left_out] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"]  # nothing was unpacked


def test_encrypted_and_oddly_compressed_members_are_left_out(tmp_path):
    path = pack(tmp_path / "a.zip", {"1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 8] |= 1  # the flag of encryption, of the first member
    path.write_bytes(data)
    assert [reason for _, reason in uploads.read_pictures([path]).left_out] == ["encrypted; pack it without a password"]
    pack(tmp_path / "b.zip", {"1.jpg": jpeg(1)}, compression=zipfile.ZIP_LZMA)
    with pytest.raises(uploads.UploadError, match="unusual compression"):
        uploads.read_pictures([tmp_path / "b.zip"])


def test_clutter_of_operating_systems_is_passed_over(tmp_path):
    members = {"1.jpg": jpeg(1), "__MACOSX/._1.jpg": b"x", ".DS_Store": b"x", "Thumbs.db": b"x"}
    assert uploads.read_pictures([pack(tmp_path / "a.zip", members)]).left_out == []


SMALL = uploads.Limits(files=3, file_bytes=50_000, total_bytes=100_000, pixels=5_000, directory_bytes=1_000)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({f"{i}.jpg": b"x" for i in range(4)}, "4 files: at most 3"),
        ({f"{i}.jpg": b"x" for i in range(100)}, "Far too many files"),
        ({f"{i}.jpg": bytes(40_000) for i in range(3)}, "More than 0 MB, unpacked"),
        ({f"{i}.jpg": jpeg(i, side=60) for i in range(2)}, "million pixels"),
        ({}, "None of the files is a usable picture"),
    ],
)
def test_limits_of_a_zip(tmp_path, members, message):
    path = pack(tmp_path / "a.zip", members, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(uploads.UploadError, match=message):
        uploads.read_pictures([path], SMALL)


def test_a_bomb_is_refused_by_what_it_declares_and_never_yields_more(tmp_path):
    bomb = pack(tmp_path / "a.zip", {f"{i}.jpg": bytes(1_000_000) for i in range(3)}, compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10_000
    limits = uploads.Limits(total_bytes=2_000_000)
    with pytest.raises(uploads.UploadError, match="unpacked"):
        uploads.read_pictures([bomb], limits)
    data = bytearray(bomb.read_bytes())
    for mark, at in ((b"PK\1\2", 24), (b"PK\3\4", 22)):  # now every member says it holds ten bytes
        start = 0
        while (start := data.find(mark, start)) >= 0:
            data[start + at : start + at + 4] = struct.pack("<L", 10)
            start += 4
    bomb.write_bytes(data)
    with pytest.raises(uploads.UploadError):
        uploads.read_pictures([bomb], limits)


def test_ten_thousand_files_are_refused_before_any_is_opened(tmp_path):
    with pytest.raises(uploads.UploadError, match="10,000 files: at most 500"):
        uploads.read_pictures([tmp_path / "absent.jpg"] * 10_000)


def test_a_huge_picture_is_refused_by_its_header(tmp_path):
    def chunk(kind, data):
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    header = struct.pack(">LLBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "huge.png").write_bytes(data)
    with pytest.raises(uploads.UploadError, match="pixels"):
        uploads.read_pictures([tmp_path / "huge.png"])


def test_no_file_is_a_clear_message():
    with pytest.raises(uploads.UploadError, match="No file yet"):
        uploads.read_pictures([])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 200))
def test_a_damaged_zip_gives_pictures_or_a_message(tmp_path, position, value, cut):
    data = bytearray(pack(tmp_path / "a.zip", {f"{i}.jpg": jpeg(i, side=20) for i in range(2)}).read_bytes())
    data[4 + position % (len(data) - 4)] = value
    (tmp_path / "a.zip").write_bytes(data[: len(data) - cut])
    with contextlib.suppress(uploads.UploadError):  # nothing else may come out
        assert uploads.read_pictures([tmp_path / "a.zip"]).images


# Smear fields -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painted_field():
    with Image.open(EXAMPLES / "field.jpg") as image:
        return image.convert("RGB")


@pytest.mark.parametrize("scale", [0.5, 1, 1.5])
def test_cells_of_a_field_are_found_at_any_magnification(painted_field, scale):
    """20 cells are painted, 2 of them smudges as pale as red cells; the crops were 224 pixels wide."""
    field = painted_field.resize([round(side * scale) for side in painted_field.size])
    found = smear.find_cells(field)
    assert 17 <= len(found.crops) <= 20
    assert found.crop_side == pytest.approx(224 * scale, rel=0.12)
    assert {crop.size for crop in found.crops} == {(found.crop_side, found.crop_side)}
    middle = np.array([np.asarray(c.resize((64, 64)))[28:36, 28:36, 0].mean() for c in found.crops])
    assert (middle < 160).all()  # a nucleus, which absorbs red, stands in the middle


def test_a_given_size_of_the_crops_is_kept(painted_field):
    found = smear.find_cells(painted_field, crop_side=180)
    assert (found.crop_side, found.red_cells) == (180, 0)


def test_a_field_without_cells_says_what_is_missing():
    blank = Image.new("RGB", (400, 300), (240, 225, 220))
    with pytest.raises(smear.SmearError, match="Give the crop"):
        smear.find_cells(blank)
    with pytest.raises(smear.SmearError, match="No nucleated cell"):
        smear.find_cells(blank, crop_side=100)


# Warnings -----------------------------------------------------------------------------------------------------


def test_good_cells_have_no_warning(cells):
    assert quality.warnings_of(len(cells), quality.find_faults(cells)) == []


def test_grey_inverted_and_blurred_cells_are_warned_of(cells):
    grey = [cell.convert("L").convert("RGB") for cell in cells]
    inverted = [Image.fromarray(255 - np.asarray(cell)) for cell in cells]
    blurred = [cell.filter(ImageFilter.GaussianBlur(3)) for cell in cells]
    assert len(quality.find_faults(grey).unusual) == len(quality.find_faults(inverted).unusual) == len(cells)
    assert len(quality.find_faults(blurred).blurred) == len(cells)
    assert "do not look like Giemsa" in quality.warnings_of(len(cells), quality.find_faults(grey))[0]
    assert "out of focus" in quality.warnings_of(len(cells), quality.find_faults(blurred))[0]


def test_real_cells_have_no_warning(shared_data):
    folders = [shared_data / "apl-discovery" / "images", shared_data / "pbc-cells"]
    for folder in folders:
        paths = sorted(folder.rglob("*.jpg"))
        images = [Image.open(path).convert("RGB") for path in paths[:: len(paths) // 30]]
        assert quality.warnings_of(len(images), quality.find_faults(images)) == []


def test_few_and_large_pictures_are_warned_of(cells):
    assert "Only 3 cells" in quality.warnings_of(3, quality.find_faults(cells[:3]))[0]
    large = [cell.resize((700, 700)) for cell in cells]
    assert any("Smear fields" in warning for warning in quality.warnings_of(len(large), quality.find_faults(large)))


# Answers ------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_model(predictor, cells):
    clinical = {"age": 70, "sex": "F", "lymphocyte_count": None}
    first, second = predictor.answers(cells, clinical)
    inputs = predictor.processor(cells, clinical)
    with torch.no_grad():
        expected = predictor.model(**inputs).logits.softmax(-1)[0].numpy()
    assert first.probabilities == pytest.approx(expected, abs=1e-4)
    assert first.maps == {} and len(second.maps) > 0
    assert all(np.abs(values).max() <= 1 for values in second.maps.values())
    assert second.decision == answers.REFER and second.prediction_set == ("reactive", "tumoral")
    assert second.clinical == clinical and second.explanation.clinical_effects["lymphocyte_count"] == 0
    json.dumps(second.to_json())


def test_half_precision_of_the_encoder_stays_within_a_hundredth(model_folder, cells, monkeypatch):
    monkeypatch.setattr(answers, "has_bfloat16", lambda: False)
    plain = answers.Predictor(str(model_folder))
    monkeypatch.setattr(answers, "has_bfloat16", lambda: True)
    fast = answers.Predictor(str(model_folder))
    assert fast.model.dtype == torch.float32
    results = [explain_bag(p.model, p.processor(cells, {})).probabilities for p in (plain, fast)]
    assert results[0] == pytest.approx(results[1], abs=0.01)


@pytest.mark.parametrize(
    ("quantiles", "decision"), [([0.9, 0.0], "reactive"), ([0.0, None], "tumoral"), ([0.0, 0.0], answers.REFER)]
)
def test_one_label_in_the_set_is_the_answer_and_several_or_none_refer(tmp_path, cells, quantiles, decision):
    conformal = {"coverage": 0.9, "quantiles": quantiles, "calibrated_on": [20, 20]}
    predictor = answers.Predictor(str(write_model(tmp_path / "model", conformal=conformal)))
    assert next(predictor.answers(cells[:2], {})).decision == decision


def test_without_prediction_sets_the_threshold_decides(tmp_path, cells):
    for threshold, decision in ((0.0, "tumoral"), (1.0, "reactive")):
        folder = write_model(tmp_path / f"at-{threshold}", conformal=None, decision_threshold=threshold)
        answer = next(answers.Predictor(str(folder)).answers(cells[:2], {}))
        assert (answer.decision, answer.prediction_set) == (decision, None)
        assert "threshold alone decides" in report.answer_html(answer, model="m")


def test_groups_follow_the_effects(predictor, cells):
    answer = next(predictor.answers(cells, {}))
    groups, effects = answer.groups(), answer.explanation.effects
    assert all(effects[i] > 0 for i in groups["for"]) and all(effects[i] < 0 for i in groups["against"])
    shown = [i for group in groups.values() for i in group]
    assert len(shown) == len(set(shown))
    if groups["for"]:
        assert effects[groups["for"][0]] == effects.max()


def test_a_single_cell_is_answered(predictor, cells):
    *_, answer = predictor.answers(cells[:1], {})
    assert answer.groups() == {"for": [], "against": [], "neutral": [0]}
    assert "Cell 1" in report.answer_html(answer, model="m") and answer.to_json()["cell_effects"] == [None]


def test_predictive_values_are_those_of_a_thousand_patients(predictor):
    performance = predictor.performance
    sick, healthy = 180, 820
    found, false = 0.9 * sick, 0.2 * healthy
    ppv, npv = performance.predictive_values(0.18)
    assert ppv == pytest.approx(found / (found + false))
    assert npv == pytest.approx(0.8 * healthy / (0.8 * healthy + 0.1 * sick))
    assert f"{100 * ppv:.0f} %" in report.values_html(performance, 0.18, predictor.labels)


def test_predictive_values_are_left_out_with_a_reason(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "evaluation.json").write_text('{"scores": {}}')
    predictor = answers.Predictor(str(folder))
    assert predictor.performance is None
    assert "cannot be computed" in report.values_html(None, 0.2, predictor.labels)


def test_the_model_is_chosen_by_the_environment(monkeypatch):
    monkeypatch.setenv("LYMPH_MODEL", "somewhere/else")
    assert answers.default_model() == "somewhere/else"


# Report -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_answer(predictor, tmp_path_factory):
    """From an upload whose file names are hostile, and name a person."""
    folder = tmp_path_factory.mktemp("upload")
    members = {f"Doe_Jane_{i}.jpg": jpeg(i) for i in range(4)} | {"<img onerror=alert(1)>.txt": b"x"}
    paths = [pack(folder / "Jane Doe.zip", members)]
    *_, answer = service.answer_patient(
        predictor, paths, service.SINGLE_CELLS, None, {"age": 71.0, "sex": "F", "lymphocyte_count": 14.2}, quiet
    )
    return answer


def test_the_report_stands_alone_and_names_nobody(full_answer):
    page = report.report_html(full_answer, model="lymph-mil")
    assert page.startswith("<!doctype html>") and "not a medical device" in page.lower()
    assert not re.search(r"https?:|<script|@import|url\(", page)
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) == {"data:"}
    for name in ("Doe", "Jane", "alert"):
        assert name not in re.sub(r"base64,[^\"]*", "", page)


def test_the_page_shows_hostile_names_as_text_and_holds_the_report(full_answer):
    page = report.answer_html(full_answer, model="lymph-mil")
    assert "<img onerror" not in page and "&lt;img onerror" in page
    inside = base64.b64decode(re.search(r'href="data:text/html;charset=utf-8;base64,([^"]+)"', page)[1]).decode()
    assert inside == report.report_html(full_answer, model="lymph-mil")


def test_every_picture_and_bar_is_described(full_answer):
    page = report.answer_html(full_answer, model="lymph-mil")
    pictures = re.findall(r"<img [^>]*>", page)
    assert pictures and all(re.search(r'alt="[^"]+"', picture) for picture in pictures)
    assert 'role="img" aria-label="Probability of tumoral' in page and 'role="status"' in page


def contrast(one, other):
    """Contrast ratio of two hexadecimal colours (WCAG 2.2)."""
    levels = []
    for colour in (one, other):
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        levels.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(levels) / min(levels)


@pytest.mark.parametrize("block", [r"\.lymph \{(.*?)\}", r"\.dark \.lymph \{(.*?)\}"], ids=["light", "dark"])
def test_texts_have_the_contrast_that_readers_need(block):
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.search(block, report.STYLE, re.DOTALL)[1]))
    pairs = [(ink, paper) for ink in ("ink", "soft", "accent") for paper in ("paper", "panel")]
    pairs += [("for", "for-paper"), ("against", "against-paper"), ("refer", "refer-paper")]
    pairs += [("ink", paper) for paper in ("for-paper", "against-paper", "refer-paper")]
    for ink, paper in pairs:
        assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


# Service ------------------------------------------------------------------------------------------------------


def test_a_smear_field_is_answered_and_shown(predictor):
    *_, answer = service.answer_patient(
        predictor, [EXAMPLES / "field.jpg"], service.SMEAR_FIELDS, None, {"age": None}, quiet
    )
    assert len(answer.overviews) == 1 and "nucleated cells" in " ".join(answer.notes)
    assert any("found by colour and size" in warning for warning in answer.warnings)
    assert "Smear field 1" in report.answer_html(answer, model="m")


@pytest.mark.parametrize(
    ("clinical", "message"), [({"age": 300}, "age=300: expected 0 to 120"), ({"lymphocyte_count": 0}, "above 0")]
)
def test_impossible_clinical_values_are_refused(predictor, clinical, message):
    with pytest.raises(uploads.UploadError, match=message):
        list(service.answer_patient(predictor, [EXAMPLES / "reactive.zip"], "Single cells", None, clinical, quiet))


@pytest.mark.parametrize(
    ("text", "number"), [("", None), (None, None), ("  ", None), ("0", 0), ("71", 71), (" 40,5 ", 40.5), ("14.2", 14.2)]
)
def test_an_empty_field_is_an_unknown_value(text, number):
    assert service.read_number(text, "Age") == number


@pytest.mark.parametrize("text", ["seventy", "nan", "inf", "1e999", "14,200", "7 1", "<b>"])
def test_a_field_that_is_no_clear_number_is_refused_by_name(text):
    with pytest.raises(uploads.UploadError, match="Lymphocyte count '"):
        service.read_number(text, "Lymphocyte count")


@pytest.mark.parametrize(
    ("text", "check", "message"),
    [("300", check_age, "from 0 to 120 years"), ("0", check_count, "above 0"), ("14200", check_count, "divide cells")],
)
def test_a_value_that_no_patient_has_says_what_is_expected(text, check, message):
    with pytest.raises(uploads.UploadError, match=message):
        service.read_number(text, "Value", check)


def test_a_batch_gives_what_each_patient_gets_alone(predictor):
    rows = list(service.answer_batch(predictor, EXAMPLES / "batch.csv", [EXAMPLES / "batch.zip"], [], quiet))
    assert [row[0] for row in rows] == ["A-01", "A-02", "A-03"] and {row[1] for row in rows} == {16}
    cells = uploads.read_pictures([EXAMPLES / "tumoral.zip"]).images[:16]
    alone = next(predictor.answers(cells, {"age": 74, "sex": "M", "lymphocyte_count": 38.5}))
    assert rows[1][2] == pytest.approx(alone.probability, abs=2e-3)


def test_a_batch_says_who_is_missing_and_goes_on(predictor, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("patient_id;age;sex\nP1;40,5;f\nP2;;\nP3;50;M\n")
    archive = pack(tmp_path / "a.zip", {"x/P1/1.jpg": jpeg(1), "x/P2/1.jpg": b"no picture", "x/P9/1.jpg": jpeg(2)})
    rows = {row[0]: row for row in service.answer_batch(predictor, table, [archive], [], quiet)}
    assert rows["P1"][2] is not None and rows["P9"][2] is not None and "Not in the table" in rows["P9"][5]
    assert rows["P2"][2] is None and "No usable picture" in rows["P2"][5]
    assert rows["P3"][2] is None and "No folder" in rows["P3"][5]


@pytest.mark.parametrize(
    ("table", "members", "message"),
    [
        ("name,age\nA,3\n", {"A/1.jpg": b"x"}, "no column 'patient_id'"),
        ("patient_id,age\nA,old\n", {"A/1.jpg": b"x"}, "column 'age'"),
        ("patient_id\nA\n", {"1.jpg": b"x"}, "lies in no folder"),
        ("patient_id\nA\n", {"A/1.jpg": b"x", "B/A/1.jpg": b"x"}, "two folders"),
    ],
)
def test_unusable_batches_are_refused(predictor, tmp_path, table, members, message):
    (tmp_path / "table.csv").write_text(table)
    archive = pack(tmp_path / "a.zip", members)
    with pytest.raises(uploads.UploadError, match=message):
        list(service.answer_batch(predictor, tmp_path / "table.csv", [archive], [], quiet))
