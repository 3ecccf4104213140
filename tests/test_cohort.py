"""Reading a cohort folder: both layouts, every refusal, and nothing personal left over."""

import dataclasses
import pickle
import re
from datetime import date

import numpy as np
import pytest
from cohort_factory import (
    SHARED_DATA,
    challenge_cohort,
    cohort_in_memory,
    encoded,
    generic_cohort,
    image_bytes,
    write_images,
    write_table,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lymph_hf.clinical_table import MISSING
from lymph_hf.cohort import (
    CLINICAL,
    Cohort,
    CohortError,
    Exclusion,
    linked_groups,
    patient_links,
    read_cohort,
    scan_images,
)

HEADER = "patient_id,label,age,sex,lymphocyte_count\n"
CHALLENGE = "ID,LABEL,GENDER,DOB,LYMPH_COUNT\n"


def values(cohort: Cohort, patient_id: str) -> tuple:
    patient = cohort.select([patient_id]).patients[0]
    return tuple(getattr(patient, name) for name in ("label", *CLINICAL))


def read_rows(tmp_path, rows: str, header: str = HEADER) -> Cohort:
    return read_cohort(generic_cohort(tmp_path, header + rows))


def refusal(root, **options) -> str:
    with pytest.raises(CohortError) as caught:
        read_cohort(root, **options)
    return str(caught.value)


def refused_rows(tmp_path, rows: str, header: str = HEADER) -> str:
    return refusal(generic_cohort(tmp_path, header + rows))


class TestGeneric:
    def test_values_and_images(self, tmp_path):
        cohort = read_rows(tmp_path, "B2,APL,61.5,F,5.2\nA1,AML,40,M,80\n")
        assert (cohort.layout, cohort.root, cohort.warnings, cohort.exclusions) == (
            "generic",
            tmp_path,
            (),
            (),
        )
        assert [patient.patient_id for patient in cohort.patients] == ["A1", "B2"]
        assert values(cohort, "B2") == ("APL", 61.5, "F", 5.2)
        assert values(cohort, "A1") == ("AML", 40.0, "M", 80.0)
        assert cohort.label_names == ("AML", "APL")
        assert [path.name for path in cohort.patients[0].images] == ["000000.png", "000001.png"]
        assert all(path.is_file() for patient in cohort.patients for path in patient.images)
        assert {patient.part for patient in cohort.patients} == {None}

    def test_only_the_identifier_is_needed(self, tmp_path):
        cohort = read_rows(tmp_path, "A\nB\n", header="patient_id\n")
        assert values(cohort, "A") == (None, None, None, None)
        assert cohort.label_names == ()
        assert cohort.labelled == ()

    def test_some_patients_may_be_unlabelled(self, tmp_path):
        cohort = read_rows(tmp_path, "A,x\nB,\nC,y\n", header="patient_id,label\n")
        assert [patient.patient_id for patient in cohort.labelled] == ["A", "C"]

    @pytest.mark.parametrize("word", [*sorted(MISSING), "NA", "NaN", "N/A"])
    def test_words_for_missing(self, tmp_path, word):
        cohort = read_rows(tmp_path, f"A,{word},{word},{word},{word}\nB,x,1,F,1\n")
        assert values(cohort, "A") == (None, None, None, None)

    def test_numeric_labels_lose_their_decimals_and_sort_as_numbers(self, tmp_path):
        cohort = read_rows(tmp_path, "A,10.0\nB,2\nC,1.0\nD,1\n", header="patient_id,label\n")
        assert cohort.label_names == ("1", "2", "10")

    def test_columns_not_used_are_named_without_their_values(self, tmp_path):
        cohort = read_rows(tmp_path, "A,x,Doe,1950-02-03\n", header="patient_id,label,Surname,Date of birth\n")
        assert cohort.warnings == ("clinical.csv: columns not used: Surname, Date of birth",)
        assert "Doe" not in repr(cohort)

    @pytest.mark.parametrize("sex", ["f", "F", "female", "Female", " FEMALE "])
    def test_spellings_of_sex(self, tmp_path, sex):
        assert values(read_rows(tmp_path, f"A,x,1,{sex},1\n"), "A")[2] == "F"

    def test_identifiers_stay_text(self, tmp_path):
        cohort = read_rows(tmp_path, "007,x\n12,y\n", header="patient_id,label\n")
        assert [patient.patient_id for patient in cohort.patients] == ["007", "12"]


class TestCsvDialects:
    ROWS = "patient_id,label,age,sex,lymphocyte_count\nA,x,61.5,F,5.25\nB,y,,M,80\n"

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    def test_same_cohort_however_it_was_exported(self, tmp_path, encoding, delimiter, newline):
        plain = read_cohort(generic_cohort(tmp_path, self.ROWS))
        text = self.ROWS.replace(",", delimiter).replace("\n", newline)
        write_table(tmp_path / "clinical.csv", text, encoding)
        assert read_cohort(tmp_path) == plain

    def test_header_case_spaces_and_blank_lines(self, tmp_path):
        plain = read_cohort(generic_cohort(tmp_path, self.ROWS))
        text = "\n Patient_ID , LABEL,Age ,sex, Lymphocyte Count \n\n A , x, 61.5 ,F,5.25\n\nB,y,,M,80\n\n"
        write_table(tmp_path / "clinical.csv", text)
        assert read_cohort(tmp_path) == plain

    def test_decimal_commas(self, tmp_path):
        semicolons = "patient_id;age;lymphocyte_count\nA;61,5;5,250\n"
        assert values(read_cohort(generic_cohort(tmp_path, semicolons)), "A")[1:] == (61.5, None, 5.25)
        write_table(tmp_path / "clinical.csv", 'patient_id,age,lymphocyte_count\nA,"61,5","5,25"\n')
        assert values(read_cohort(tmp_path), "A")[1:] == (61.5, None, 5.25)

    @pytest.mark.parametrize(
        "table",
        [
            'patient_id,lymphocyte_count\nA,"1,234"\n',
            "patient_id\tlymphocyte_count\nA\t1,234\n",
            "patient_id;lymphocyte_count\nA;1.234\nB;4,5\n",
        ],
    )
    def test_a_mark_that_may_separate_thousands_is_refused(self, tmp_path, table):
        write_images(tmp_path / "images" / "A", [0])
        write_table(tmp_path / "clinical.csv", table)
        assert "thousands" in refusal(tmp_path)

    @pytest.mark.parametrize("text", ["0,500", "5,25", "12.345"])
    def test_a_mark_that_cannot_separate_thousands_is_read(self, tmp_path, text):
        cohort = read_rows(tmp_path, f'A,x,1,F,"{text}"\n')
        assert values(cohort, "A")[3] == float(text.replace(",", "."))

    def test_an_unquoted_decimal_comma_is_one_value_too_many(self, tmp_path):
        message = refused_rows(tmp_path, "A,x,1,F,4,5\n")
        assert "line 2" in message
        assert "6 values; expected 5" in message
        assert "decimal comma" in message

    def test_a_short_row_is_refused(self, tmp_path):
        assert "line 3: 3 values; expected 5" in refused_rows(tmp_path, "A,x,1,F,1\nB,x,1\n")

    def test_lines_are_those_an_editor_shows(self, tmp_path):
        message = refused_rows(tmp_path, '\nA,"two\nlines",1,F,1\n\nB,x,-3,F,1\n')
        assert "line 6, patient 'B', column 'age': '-3'" in message

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (b"", "the file is empty"),
            (b"patient_id,label\n", "no patient below the header"),
            (b"PK\x03\x04\xff\xfe\x00", "not a UTF-8 or UTF-16 text table"),
            ("patient_id,label\nA,ä\n".encode("latin-1"), "not a UTF-8"),
            ("patient_id\nA\n".encode("utf-16-le"), "not a UTF-8"),
            (b'patient_id,label\nA,"open\n', "not a valid CSV row"),
            (b"patient,label\nA,x\n", "no column 'patient_id'; found 'patient', 'label'"),
            (b"patient_id,age,Age\nA,1,2\n", "'age' stands more than once"),
        ],
    )
    def test_files_that_are_no_table(self, tmp_path, data, expected):
        write_images(tmp_path / "images" / "A", [0])
        (tmp_path / "clinical.csv").write_bytes(data)
        assert expected in refusal(tmp_path)

    def test_a_missing_header_does_not_spill_the_first_patient(self, tmp_path):
        message = refused_rows(tmp_path, "", header="Doe,F,03/21/1950\nPoe,M,01/02/1960\n")
        assert "Doe" not in message
        assert "1950" not in message


class TestRefusedValues:
    @pytest.mark.parametrize(
        ("column", "text", "expected"),
        [
            ("age", "-1", "from 0 to 120 years"),
            ("age", "121", "from 0 to 120 years"),
            ("age", "inf", "finite number"),
            ("age", "1e999", "finite number"),
            ("age", "64 years", "finite number"),
            ("age", "1_0", "finite number"),
            ("sex", "X", "F, M, female or male"),
            ("sex", "W", "F, M, female or male"),
            ("lymphocyte_count", "0", "above 0 in 10^9/L"),
            ("lymphocyte_count", "-4.5", "above 0 in 10^9/L"),
            ("lymphocyte_count", "5230", "10^9 cells per litre"),
            ("lymphocyte_count", "-inf", "finite number"),
            ("lymphocyte_count", "1.234,5", "finite number"),
            ("label", "-1", "leave it empty if unlabelled"),
            ("label", "1.5", "class name or a whole number"),
            ("sex", "x" * 50, "'" + "x" * 37 + "...'"),
        ],
    )
    def test_file_line_patient_column_value_and_expectation_are_named(self, tmp_path, column, text, expected):
        row = {"patient_id": "B", "label": "x", "age": "1", "sex": "F", "lymphocyte_count": "1", column: text}
        message = refused_rows(tmp_path, "A,x,1,F,1\n" + ",".join(f'"{value}"' for value in row.values()) + "\n")
        for part in (
            "clinical.csv",
            "line 3",
            "patient 'B'",
            f"column '{column}'",
            f"'{text[:37]}",
            expected,
        ):
            assert part in message

    @pytest.mark.parametrize("patient_id", ["", "NA", "a/b", "a\\b", "..", "../x", ".", "a\tb"])
    def test_identifiers_that_are_no_folder_names(self, tmp_path, patient_id):
        write_images(tmp_path / "images" / "A", [0])
        write_table(tmp_path / "clinical.csv", f'patient_id,label\nA,x\n"{patient_id}",y\n')
        message = refusal(tmp_path)
        assert "line 3, column 'patient_id'" in message

    def test_a_doubled_patient(self, tmp_path):
        assert "line 4, column 'patient_id': 'A'; already on line 2" in refused_rows(
            tmp_path, "A,x\nB,x\nA,y\n", header="patient_id,label\n"
        )

    @pytest.mark.parametrize("other", ["apl", "A PL", "APL "])
    def test_labels_spelled_alike(self, tmp_path, other):
        table = f"A,APL\nB,{other}\n"
        if other.strip() == "APL":  # spaces around a value mean nothing
            assert read_rows(tmp_path, table, header="patient_id,label\n").label_names == ("APL",)
        else:
            assert "only in case or spaces" in refused_rows(tmp_path, table, header="patient_id,label\n")

    def test_all_problems_are_counted_and_ten_are_listed(self, tmp_path):
        message = refused_rows(tmp_path, "".join(f"P{number},x,-1,F,1\n" for number in range(13)))
        assert "13 problems" in message
        assert message.count("column 'age'") == 10
        assert message.endswith("and 3 more")

    def test_a_date_in_a_wrong_column_is_masked(self, tmp_path):
        message = refused_rows(
            tmp_path, "A,x,03/21/1950,F,1\nB,x,1,21-03-1950,1\nC,x,1,F,19500321\nD,3/21/1950,1,F,1\n"
        )
        assert "'dd/dd/dddd'" in message
        assert "4 problems" in message
        assert "1950" not in message

    @settings(max_examples=40, deadline=None)
    @given(st.floats(0, 120))
    def test_every_age_in_range_is_read_exactly(self, tmp_path_factory, age):
        root = tmp_path_factory.mktemp("age")
        write_images(root / "images" / "A", [0])
        write_table(root / "clinical.csv", f"patient_id,age\nA,{age!r}\n")
        assert read_cohort(root).patients[0].age == age


class TestFolders:
    def test_patients_without_images_and_images_without_patient(self, tmp_path):
        generic_cohort(tmp_path, "patient_id,label\nA,x\nB,x\nC,y\n", {"A": 1, "Z": 2})
        (tmp_path / "images" / "B").mkdir()
        cohort = read_cohort(tmp_path)
        assert [patient.patient_id for patient in cohort.patients] == ["A"]
        assert cohort.exclusions == (
            Exclusion("B", "", "no image in its folder"),
            Exclusion("C", "", "no image folder"),
            Exclusion("Z", "", "images without patient row"),
        )
        assert cohort.warnings == ("1 image folders without a row in the table: 'Z'",)

    def test_other_files_are_counted_and_clutter_is_not(self, tmp_path):
        generic_cohort(tmp_path, "patient_id\nA\n")
        folder = tmp_path / "images" / "A"
        for name in ("notes.txt", "scan.svs", "Thumbs.db", ".DS_Store", ".hidden.png"):
            (folder / name).write_bytes(b"x")
        (folder / "more").mkdir()
        write_images(tmp_path / "images", [0])
        cohort = read_cohort(tmp_path)
        assert len(cohort.patients[0].images) == 2
        assert cohort.warnings == (
            "images/: 1 images in no patient's folder are not used (000000.png ...)",
            "3 entries of patient folders are no image files by their suffix (A/more ...)",
        )

    def test_suffixes_in_any_case_count(self, tmp_path):
        generic_cohort(tmp_path, "patient_id\nA\n", {"A": 1})
        (tmp_path / "images" / "A" / "B.PNG").write_bytes(image_bytes(9))
        assert [path.name for path in read_cohort(tmp_path).patients[0].images] == ["000000.png", "B.PNG"]

    def test_no_usable_patient(self, tmp_path):
        message = refusal(generic_cohort(tmp_path, "patient_id\nA\nB\n", {}))
        assert "no usable patient (no image folder: 2)" in message

    def test_no_images_folder(self, tmp_path):
        write_table(tmp_path / "clinical.csv", "patient_id\nA\n")
        assert "without a folder 'images'" in refusal(tmp_path)

    def test_no_layout_names_what_was_looked_for(self, tmp_path):
        message = refusal(tmp_path)
        for name in ("clinical.csv", "images/<patient_id>", "trainset/", "testset/"):
            assert name in message

    def test_two_layouts_at_once(self, tmp_path):
        generic_cohort(tmp_path, "patient_id\nA\n")
        (tmp_path / "trainset").mkdir()
        assert "two layouts at once" in refusal(tmp_path)

    def test_no_such_folder(self, tmp_path):
        assert "no such folder" in refusal(tmp_path / "absent")

    @pytest.mark.parametrize(("one", "two"), [("P01", "p1"), ("P1", "P-1"), ("P_001", "P.1"), ("a b", "AB")])
    def test_identifiers_spelled_alike_are_warned_about(self, tmp_path, one, two):
        cohort = read_cohort(generic_cohort(tmp_path, f"patient_id\n{one}\n{two}\n"))
        assert len(cohort.warnings) == 1
        assert repr(one) in cohort.warnings[0]
        assert repr(two) in cohort.warnings[0]

    @pytest.mark.parametrize(("one", "two"), [("P10", "P1"), ("P100", "P1"), ("1-12", "11-2"), ("P1a", "P1b")])
    def test_different_identifiers_are_not(self, tmp_path, one, two):
        assert read_cohort(generic_cohort(tmp_path, f"patient_id\n{one}\n{two}\n")).warnings == ()


class TestChallenge:
    TRAIN = CHALLENGE + "P1,1,M,3/21/1950,30.5\nP2,0,f,21-03-1990,4.5\n"
    TEST = CHALLENGE + "P3,-1,F,12/31/1940,8\n"
    ALL = ",ID,LABEL,GENDER,DOB,LYMPH_COUNT\n0,P1,1,M,3/21/1950,30.5\n1,P2,0,F,3/21/1990,4.5\n2,P3,-1,F,31-12-1940,8\n"

    def test_both_parts(self, tmp_path):
        challenge_cohort(tmp_path, train=["P1", "P2"], test=["P3"], train_table=self.TRAIN, test_table=self.TEST)
        cohort = read_cohort(tmp_path)
        assert cohort.layout == "challenge"
        assert [(patient.patient_id, patient.part) for patient in cohort.patients] == [
            ("P1", "train"),
            ("P2", "train"),
            ("P3", "test"),
        ]
        assert values(cohort, "P1") == ("tumoral", 70.8, "M", 30.5)
        assert values(cohort, "P2") == ("reactive", 30.8, "F", 4.5)
        assert values(cohort, "P3") == (None, 80.0, "F", 8.0)
        assert cohort.label_names == ("reactive", "tumoral")

    def test_the_annotation_table_alone_serves_both_parts(self, tmp_path):
        parts = challenge_cohort(
            tmp_path / "a", train=["P1", "P2"], test=["P3"], train_table=self.TRAIN, test_table=self.TEST
        )
        alone = challenge_cohort(tmp_path / "b", train=["P1", "P2"], test=["P3"], annotation=self.ALL)
        one, two = read_cohort(parts), read_cohort(alone)
        assert one.to_frame().equals(two.to_frame())
        assert two.warnings == ()  # the unnamed index column is nobody's loss

    @pytest.mark.parametrize("place", ["trainset", "testset"])
    def test_the_annotation_table_may_stand_in_a_part(self, tmp_path, place):
        challenge_cohort(tmp_path, train=["P1", "P2"], test=["P3"])
        write_table(tmp_path / place / "clinical_annotation.csv", self.ALL)
        assert len(read_cohort(tmp_path).patients) == 3

    def test_agreeing_tables_are_one(self, tmp_path):
        challenge_cohort(
            tmp_path,
            train=["P1", "P2"],
            test=["P3"],
            train_table=self.TRAIN,
            test_table=self.TEST,
            annotation=self.ALL,
        )
        cohort = read_cohort(tmp_path)
        assert len(cohort.patients) == 3
        assert cohort.warnings == ()

    def test_a_gap_is_filled_from_the_other_table_with_a_warning(self, tmp_path):
        gap = self.TRAIN.replace("30.5", "")
        challenge_cohort(tmp_path, train=["P1", "P2"], test=["P3"], train_table=gap, annotation=self.ALL)
        cohort = read_cohort(tmp_path)
        assert values(cohort, "P1")[3] == 30.5
        assert cohort.warnings == ("clinical_annotation.csv: gives values that the other table lacks, for 1 patients",)

    @pytest.mark.parametrize(
        ("old", "new", "told"),
        [
            ("P1,1,M", "P1,0,M", "label 'tumoral' against 'reactive'"),
            ("P1,1,M", "P1,1,F", "sex 'M' against 'F'"),
            ("30.5", "31.5", "lymphocyte_count 30.5 against 31.5"),
            ("3/21/1950", "3/22/1950", "different dates of birth"),
        ],
    )
    def test_contradicting_tables_are_refused(self, tmp_path, old, new, told):
        tables = {"train_table": self.TRAIN, "annotation": self.ALL.replace(old, new)}
        message = refusal(challenge_cohort(tmp_path, train=["P1", "P2"], test=["P3"], **tables))
        assert "patient 'P1'" in message
        assert told in message
        assert "trainset/trainset_true.csv, line 2" in message
        assert "clinical_annotation.csv, line 2" in message
        assert "1950" not in message

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_one_part_alone(self, tmp_path, part):
        table = {f"{part}_table": self.TRAIN}
        cohort = read_cohort(challenge_cohort(tmp_path, **{part: ["P1", "P2"]}, **table))
        assert {patient.part for patient in cohort.patients} == {part}

    def test_the_sole_table_of_a_part_may_have_any_name(self, tmp_path):
        challenge_cohort(tmp_path, train=["P1", "P2"])
        write_table(tmp_path / "trainset" / "my_table.csv", self.TRAIN)
        assert len(read_cohort(tmp_path).patients) == 2
        write_table(tmp_path / "trainset" / "copy.csv", self.TRAIN)
        assert "several tables (copy.csv, my_table.csv)" in refusal(tmp_path)
        write_table(tmp_path / "trainset" / "trainset_true.csv", self.TRAIN)
        assert len(read_cohort(tmp_path).patients) == 2

    def test_no_table_at_all(self, tmp_path):
        assert "looked for trainset/trainset_true.csv" in refusal(challenge_cohort(tmp_path, train=["P1"]))

    def test_a_patient_in_both_parts(self, tmp_path):
        challenge_cohort(tmp_path, train=["P1"], test=["P1"], annotation=self.ALL)
        assert "'P1' has images in trainset and in testset" in refusal(tmp_path)

    def test_a_row_in_the_other_part_than_its_images(self, tmp_path):
        challenge_cohort(tmp_path, train=["P1"], test=["P2"], train_table=self.TRAIN)
        assert "the images of patient 'P2' stand in testset/" in refusal(tmp_path)

    @pytest.mark.parametrize("label", ["2", "reactive", "0.5"])
    def test_an_unknown_label(self, tmp_path, label):
        table = self.TRAIN.replace("P1,1", f"P1,{label}")
        message = refusal(challenge_cohort(tmp_path, train=["P1"], train_table=table))
        assert "0 (reactive), 1 (tumoral) or -1 (unlabelled)" in message
        assert "column 'LABEL'" in message

    def test_labels_written_as_decimals(self, tmp_path):
        table = self.TRAIN.replace("P1,1", "P1,1.0").replace("P2,0", "P2,-1.0")
        cohort = read_cohort(challenge_cohort(tmp_path, train=["P1", "P2"], train_table=table))
        assert [patient.label for patient in cohort.patients] == ["tumoral", None]


class TestDatesOfBirth:
    def cohort_with(self, root, birth: str, **options) -> Cohort:
        table = CHALLENGE + f"P1,1,M,{birth},5\n"
        return read_cohort(challenge_cohort(root, train=["P1"], train_table=table), **options)

    @pytest.mark.parametrize(
        ("birth", "day"),
        [("3/4/1950", date(1950, 3, 4)), ("3-4-1950", date(1950, 4, 3)), ("02/29/2000", date(2000, 2, 29))],
    )
    def test_the_separator_tells_the_order(self, tmp_path, birth, day):
        age = self.cohort_with(tmp_path, birth).patients[0].age
        assert age == pytest.approx((date(2020, 12, 31) - day).days / 365.25, abs=0.05)

    @pytest.mark.parametrize("reference", ["2010-06-01", date(2010, 6, 1)])
    def test_the_reference_date_is_the_callers(self, tmp_path, reference):
        cohort = self.cohort_with(tmp_path, "06/01/1950", reference_date=reference)
        assert cohort.patients[0].age == 60.0

    def test_age_never_drifts_with_today(self, tmp_path):
        """The predecessor counted age to the current day, so each year changed its inputs."""
        assert self.cohort_with(tmp_path, "12/31/1950").patients[0].age == 70.0

    def test_an_age_does_not_give_the_date_away(self, tmp_path):
        ages = {self.cohort_with(tmp_path / str(day), f"6/{day}/1950").patients[0].age for day in range(1, 15)}
        assert len(ages) <= 2

    @pytest.mark.parametrize(
        "birth",
        [
            "3/21/50",
            "21/3/1950",
            "13-13-1950",
            "31-02-1950",
            "1950",
            "3.21.1950",
            "21 March 1950",
            "1/1/2031",
            "1/1/1850",
        ],
    )
    def test_unreadable_and_impossible_dates_are_refused_without_being_shown(self, tmp_path, birth):
        with pytest.raises(CohortError) as caught:
            self.cohort_with(tmp_path, birth)
        shape = re.sub("[a-zA-Z]", "a", birth)
        assert re.sub("[0-9]", "d", shape) in str(caught.value)
        chain = [caught.value, caught.value.__cause__, caught.value.__context__]
        assert not any(birth in str(error) or "March" in str(error) for error in chain if error)

    def test_a_birth_after_the_reference_date_says_so(self, tmp_path):
        with pytest.raises(CohortError, match=r"lies after the reference date 1940-01-01"):
            self.cohort_with(tmp_path, "1/2/1940", reference_date="1940-01-01")

    def test_a_reference_date_that_is_none(self, tmp_path):
        with pytest.raises(CohortError, match="YYYY-MM-DD"):
            self.cohort_with(tmp_path, "1/1/1950", reference_date="31.12.2020")

    @settings(max_examples=40, deadline=None)
    @given(st.dates(date(1905, 1, 1), date(2020, 12, 31)))
    def test_no_date_survives_in_anything_returned(self, tmp_path_factory, birth):
        root = tmp_path_factory.mktemp("dob")
        cohort = self.cohort_with(root, f"{birth.month}/{birth.day}/{birth.year}")
        told = cohort.summary() + cohort.to_frame().to_csv() + repr(dataclasses.replace(cohort, root=""))
        for patient in cohort.patients:  # the folder's own name holds digits
            told = told.replace(str(patient.images[0].parent), "")
        exact = (date(2020, 12, 31) - birth).days / 365.25
        assert f"{birth.month}/{birth.day}/{birth.year}" not in told
        assert birth.isoformat() not in told
        assert str(birth.year) not in told
        assert len(str(cohort.patients[0].age)) <= 5
        assert cohort.patients[0].age == pytest.approx(exact, abs=0.05)


class TestCohortHelpers:
    COHORT = cohort_in_memory({"A": "x", "B": None, "C": "y"}, {name: ("d" + name,) for name in "ABC"})

    def test_select_keeps_the_order_and_the_digests(self):
        chosen = self.COHORT.select(["C", "A"])
        assert [patient.patient_id for patient in chosen.patients] == ["C", "A"]
        assert chosen.digests == {"C": ("dC",), "A": ("dA",)}

    def test_select_names_strangers_and_doubles(self):
        with pytest.raises(CohortError, match=r"'Z'.*3 patients"):
            self.COHORT.select(["A", "Z"])
        with pytest.raises(CohortError, match="more than once: 'A'"):
            self.COHORT.select(["A", "A"])

    def test_frame(self):
        frame = self.COHORT.to_frame()
        assert list(frame.columns) == [
            "patient_id",
            "label",
            "age",
            "sex",
            "lymphocyte_count",
            "cells",
            "part",
        ]
        assert list(frame["cells"]) == [1, 1, 1]
        assert frame["age"].dtype == float
        assert frame["label"].isna().tolist() == [False, True, False]

    def test_replace_leaves_the_original(self):
        assert self.COHORT.replace(warnings=("w",)).warnings == ("w",)
        assert self.COHORT.warnings == ()

    def test_a_cohort_goes_to_another_process(self):
        assert pickle.loads(pickle.dumps(self.COHORT)) == self.COHORT

    def test_summary(self, tmp_path):
        table = HEADER + "A,x,50,F,5\nB,x,60,,7\nC,y,,M,\nD,,70,M,9\nE,y,1,F,1\n"
        text = read_cohort(generic_cohort(tmp_path, table, {"A": 1, "B": 2, "C": 6, "D": 3})).summary()
        assert "Patients: 4    Cells: 12 (per patient min / median / max: 1 / 2.5 / 6)" in text
        rows = {line.split()[0]: re.split(r"\s{2,}", line) for line in text.splitlines() if line}
        assert rows["x"][1:] == ["2", "3", "55 [50, 60]", "1 / 0, 1 missing", "6 [5, 7]"]
        assert rows["y"][1:] == ["1", "6", "-, 1 missing", "0 / 1", "-, 1 missing"]
        assert rows["(unlabelled)"][1:] == ["1", "3", "70 [70, 70]", "0 / 1", "9 [9, 9]"]
        assert rows["all"][1:3] == ["4", "12"]
        assert "  no image folder: 1 (E)" in text


class TestScan:
    def cohort(self, tmp_path, **cells: int) -> Cohort:
        table = "patient_id,label\n" + "".join(f"{name},x\n" for name in cells)
        return read_cohort(generic_cohort(tmp_path, table, cells))

    def scan(self, cohort: Cohort, **options) -> Cohort:
        return scan_images(cohort, progress=False, workers=2, **options)

    def test_a_good_cohort_only_gains_digests(self, tmp_path):
        cohort = self.cohort(tmp_path, A=2, B=3)
        scanned = self.scan(cohort)
        assert scanned.replace(digests={}) == cohort
        assert {name: len(digests) for name, digests in scanned.digests.items()} == {"A": 2, "B": 3}
        assert len({digest for digests in scanned.digests.values() for digest in digests}) == 5

    def test_bad_images_are_excluded_with_their_reason(self, tmp_path):
        cohort = self.cohort(tmp_path, A=3, B=1)
        cohort.patients[0].images[1].write_bytes(b"")
        cohort.patients[1].images[0].write_bytes(image_bytes(5)[:60])
        scanned = self.scan(cohort)
        assert [path.name for path in scanned.patients[0].images] == ["000000.png", "000002.png"]
        assert len(scanned.digests["A"]) == 2
        assert [(excluded.patient_id, excluded.file) for excluded in scanned.exclusions] == [
            ("A", "000001.png"),
            ("B", "000000.png"),
            ("B", ""),
        ]
        assert scanned.exclusions[0].reason == "empty file"
        assert scanned.exclusions[2].reason == "no readable image"
        assert [patient.patient_id for patient in scanned.patients] == ["A"]

    def test_strict_raises_on_the_first(self, tmp_path):
        cohort = self.cohort(tmp_path, A=3)
        cohort.patients[0].images[1].write_bytes(b"")
        with pytest.raises(CohortError, match=r"A/000001\.png: empty file"):
            self.scan(cohort, strict=True)

    def test_no_good_image_at_all(self, tmp_path):
        cohort = self.cohort(tmp_path, A=1)
        cohort.patients[0].images[0].write_bytes(b"")
        with pytest.raises(CohortError, match="none of 1 images"):
            self.scan(cohort)

    def test_a_file_that_vanished_is_an_exclusion(self, tmp_path):
        cohort = self.cohort(tmp_path, A=2)
        cohort.patients[0].images[0].unlink()
        assert "cannot be read" in self.scan(cohort).exclusions[0].reason

    def test_conversions_are_counted(self, tmp_path):
        cohort = self.cohort(tmp_path, A=3)
        for path in cohort.patients[0].images[:2]:
            path.write_bytes(encoded(Image.fromarray(np.full((20, 20), len(path.name), np.uint8))))
        warnings = self.scan(cohort).warnings
        assert "grayscale converted: 2 images" in warnings

    def test_shared_and_doubled_images_are_warned_about(self, tmp_path):
        cohort = self.cohort(tmp_path, A=3, B=3, C=1)
        for number in (0, 1):
            cohort.patients[1].images[number].write_bytes(cohort.patients[0].images[number].read_bytes())
        cohort.patients[2].images[0].with_name("copy.png").write_bytes(cohort.patients[2].images[0].read_bytes())
        scanned = self.scan(read_cohort(tmp_path))
        assert len(scanned.warnings) == 2
        assert "patients 'A' and 'B' share 2 images" in scanned.warnings[0]
        assert scanned.warnings[1].startswith("patient 'C': 1 images are copies")
        assert linked_groups(scanned) == [["A", "B"], ["C"]]

    def test_scanning_twice_says_everything_once(self, tmp_path):
        cohort = self.cohort(tmp_path, A=2)
        cohort.patients[0].images[0].write_bytes(image_bytes(0, mode="L"))
        once = self.scan(cohort)
        assert self.scan(once) == once


class TestLinks:
    def test_links_chain_over_both_kinds(self):
        digests = {"P01": ("a",), "p1": ("b",), "Q": ("b", "c"), "R": ("c",), "S": ("d",)}
        cohort = cohort_in_memory(dict.fromkeys(digests, "x"), digests)
        assert linked_groups(cohort) == [["P01", "Q", "R", "p1"], ["S"]]
        assert {(link.first, link.second) for link in patient_links(cohort)} == {
            ("P01", "p1"),
            ("Q", "p1"),
            ("Q", "R"),
        }

    def test_before_scanning_only_spelling_links(self):
        cohort = cohort_in_memory(dict.fromkeys(["P01", "p1", "P-1", "P2"], "x"))
        assert linked_groups(cohort) == [["P-1", "P01", "p1"], ["P2"]]
        assert len(patient_links(cohort)) == 3

    def test_a_tile_shared_by_everybody_does_not_flood_the_warnings(self, tmp_path):
        names = [f"P{number}" for number in range(1, 10)]
        generic_cohort(tmp_path, "patient_id\n" + "\n".join(names) + "\n", dict.fromkeys(names, 1))
        for name in names:
            (tmp_path / "images" / name / "000000.png").write_bytes(image_bytes(0))
        warnings = scan_images(read_cohort(tmp_path), progress=False).warnings
        assert len(warnings) == 21
        assert warnings[-1] == "16 more pairs of patients share images"


def test_a_real_cohort_is_read_whole():
    root = SHARED_DATA / "apl-discovery"
    if not root.is_dir():
        pytest.skip("the real cohort is not beside the repository (../shared/data/apl-discovery)")
    cohort = read_cohort(root)
    frame = cohort.to_frame()
    assert len(cohort.patients) == 82
    assert frame["cells"].sum() == 7761
    assert frame["label"].value_counts().to_dict() == {"AML": 60, "APL": 22}
    assert (cohort.exclusions, cohort.warnings) == ((), ())
    assert frame["lymphocyte_count"].isna().all()
    assert len(linked_groups(scan_images(cohort.select(frame["patient_id"][:3]), progress=False))) == 3
