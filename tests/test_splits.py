"""Splits: disjoint, complete, stratified, stable, and never between two names of one person."""

import json
import logging
from collections import Counter

import pytest
from cohort_factory import cohort_in_memory, generic_cohort
from hypothesis import given, settings
from hypothesis import strategies as st

from lymph_hf.cohort import Cohort, Exclusion, linked_groups, read_cohort
from lymph_hf.splits import Split, SplitError, make_folds, make_split, read_split

PARTS = ("train", "validation", "test")


def cohort_of(*sizes: int, unlabelled: int = 0) -> Cohort:
    labels = {f"{chr(97 + c)}{chr(97 + n % 26)}{n}": f"class{c}" for c, size in enumerate(sizes) for n in range(size)}
    return cohort_in_memory(labels | {f"none{n}": None for n in range(unlabelled)})


def label_counts(cohort: Cohort, ids) -> Counter:
    return Counter(patient.label for patient in cohort.select(ids).patients)


@st.composite
def linked_cohorts(draw, smallest: int = 5) -> Cohort:
    """Two or three classes; some patients share an image with another one of their class."""
    labels, digests = {}, {}
    for c in range(draw(st.integers(2, 3))):
        for group in range(draw(st.integers(smallest, 20))):
            for member in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
                patient_id = f"{chr(97 + c)}{group}{'xyz'[member]}"
                labels[patient_id] = f"class{c}"
                digests[patient_id] = (f"{c}-{group}",)
    return cohort_in_memory(labels, digests)


def shuffled(cohort: Cohort, random) -> Cohort:
    patients = list(cohort.patients)
    random.shuffle(patients)
    return cohort.replace(patients=tuple(patients))


def groups_per_class(cohort: Cohort, ids) -> Counter:
    label = {patient.patient_id: patient.label for patient in cohort.patients}
    return Counter(label[group[0]] for group in linked_groups(cohort) if group[0] in set(ids))


def assert_whole(cohort: Cohort, split: Split) -> None:
    """Every labelled patient in one part, every linked group in one part."""
    placed = [patient_id for part in PARTS for patient_id in getattr(split, part)]
    assert sorted(placed) == sorted(patient.patient_id for patient in cohort.labelled)
    for group in linked_groups(cohort):
        assert len({part for part in PARTS for patient_id in group if patient_id in getattr(split, part)}) <= 1


class TestMakeSplit:
    @settings(max_examples=60, deadline=None)
    @given(
        linked_cohorts(),
        st.sampled_from([0.1, 0.2, 0.3]),
        st.sampled_from([0, 0.1, 0.25]),
        st.integers(0, 9),
        st.randoms(),
    )
    def test_invariants(self, cohort, validation, test, seed, random):
        options = {"validation_fraction": validation, "test_fraction": test, "seed": seed}
        split = make_split(cohort, **options)
        assert_whole(cohort, split)
        total = groups_per_class(cohort, [patient.patient_id for patient in cohort.patients])
        for part, share in {"validation": validation, "test": test, "train": 1 - validation - test}.items():
            found = groups_per_class(cohort, getattr(split, part))
            for label, count in total.items():
                assert abs(found[label] - share * count) <= 1
        assert make_split(shuffled(cohort, random), **options) == split

    def test_the_order_of_rows_in_the_file_changes_nothing(self, tmp_path):
        rows = [f"P{number},{'x' if number % 3 else 'y'}\n" for number in range(15)]
        forward = read_cohort(generic_cohort(tmp_path / "1", "patient_id,label\n" + "".join(rows)))
        backward = read_cohort(generic_cohort(tmp_path / "2", "patient_id,label\n" + "".join(reversed(rows))))
        assert make_split(forward) == make_split(backward)
        assert make_folds(forward, 3) == make_folds(backward, 3)

    def test_another_seed_draws_other_patients(self):
        cohort = cohort_of(30, 20)
        assert len({make_split(cohort, seed=seed).validation for seed in range(5)}) == 5

    def test_without_fractions_everybody_trains(self):
        split = make_split(cohort_of(4, 3), validation_fraction=0)
        assert (len(split.train), split.validation, split.test) == (7, (), ())

    def test_unlabelled_patients_are_in_no_part(self):
        cohort = cohort_of(5, 5, unlabelled=4)
        split = make_split(cohort)
        assert not any(patient_id.startswith("none") for part in PARTS for patient_id in getattr(split, part))

    def test_the_split_says_how_it_was_drawn(self):
        split = make_split(cohort_of(5, 5), seed=7)
        assert split.seed == 7
        assert split.source == "make_split(validation_fraction=0.2, test_fraction=0.0, seed=7)"

    @pytest.mark.parametrize("fractions", [(-0.1, 0), (0.5, 0.5), (1, 0), (0, 1.5), (float("nan"), 0)])
    def test_impossible_fractions(self, fractions):
        with pytest.raises(SplitError, match="expected shares from 0"):
            make_split(cohort_of(9, 9), validation_fraction=fractions[0], test_fraction=fractions[1])

    def test_one_class_only(self):
        with pytest.raises(SplitError, match=r"only the class 'class0'.*at least two"):
            make_split(cohort_of(9))
        with pytest.raises(SplitError, match="no labelled patient"):
            make_split(cohort_of(unlabelled=3))

    def test_a_class_missing_on_one_side(self):
        with pytest.raises(SplitError, match=r"class 'class1' has 2 patients.*none of it in validation.*0\.2"):
            make_split(cohort_of(30, 2))
        with pytest.raises(SplitError, match=r"class 'class1' has 1 patients.*none of it in train"):
            make_split(cohort_of(30, 1), validation_fraction=0.6)

    def test_linked_patients_with_different_labels_are_named(self):
        labels = {patient.patient_id: patient.label for patient in cohort_of(5, 5).patients}
        with pytest.raises(SplitError, match="'P-1' is 'class0', 'P1' is 'class1'"):
            make_split(cohort_in_memory(labels | {"P1": "class1", "P-1": "class0"}))

    def test_patients_linked_through_an_unlabelled_one_stay_together(self):
        labels = {patient.patient_id: patient.label for patient in cohort_of(6, 6).patients}
        labels |= {"left": "class0", "middle": None, "right": "class0"}
        digests = {"left": ("1",), "middle": ("1", "2"), "right": ("2",)}
        for seed in range(10):
            assert_whole(cohort := cohort_in_memory(labels, digests), make_split(cohort, seed=seed))


class TestMakeFolds:
    @settings(max_examples=40, deadline=None)
    @given(linked_cohorts(), st.integers(2, 5), st.integers(0, 9), st.randoms())
    def test_invariants(self, cohort, k, seed, random):
        folds = make_folds(cohort, k, seed=seed)
        assert len(folds) == k
        total = groups_per_class(cohort, [patient.patient_id for patient in cohort.patients])
        for fold in folds:
            assert_whole(cohort, fold)
            assert fold.validation == ()
            found = groups_per_class(cohort, fold.test)
            assert all(abs(found[label] - count / k) < 1 for label, count in total.items())
        held_out = [patient_id for fold in folds for patient_id in fold.test]
        assert sorted(held_out) == sorted(patient.patient_id for patient in cohort.patients)
        assert make_folds(shuffled(cohort, random), k, seed=seed) == folds

    def test_repeats_and_seeds_draw_other_folds(self):
        cohort = cohort_of(20, 20)
        drawn = {make_folds(cohort, 4, seed=seed, repeat=repeat)[0].test for seed in (0, 1) for repeat in (0, 1)}
        assert len(drawn) == 4

    def test_more_folds_than_patients_of_a_class(self):
        with pytest.raises(SplitError, match=r"class 'class1' has 3 patients.*too few for 5 folds.*k=3"):
            make_folds(cohort_of(30, 3), 5)

    def test_linked_patients_count_once(self):
        labels = {"a1": "x", "A1": "x", "b": "x", "c": "y", "d": "y", "e": "y"}
        with pytest.raises(SplitError, match="class 'x' has 2 patients"):
            make_folds(cohort_in_memory(labels), 3)

    @pytest.mark.parametrize("k", [1, 0, -2])
    def test_too_few_folds(self, k):
        with pytest.raises(SplitError, match="at least 2"):
            make_folds(cohort_of(5, 5), k)

    def test_a_validation_part_can_be_drawn_inside_a_fold(self):
        cohort = cohort_of(15, 10)
        fold = make_folds(cohort, 5)[0]
        inner = make_split(cohort.select(fold.train))
        assert not set(inner.train + inner.validation) & set(fold.test)


class TestSplitFile:
    SPLIT = Split(("a", "é"), ("b",), ("c",), seed=3, source="drawn by hand")

    def test_round_trip(self, tmp_path):
        self.SPLIT.save(tmp_path / "split.json")
        assert Split.load(tmp_path / "split.json") == self.SPLIT
        assert Split.from_dict(self.SPLIT.to_dict()) == self.SPLIT
        assert json.loads((tmp_path / "split.json").read_text(encoding="utf-8"))["train"] == ["a", "é"]

    def test_a_failed_write_leaves_the_old_split_and_nothing_else(self, tmp_path, monkeypatch):
        self.SPLIT.save(tmp_path / "split.json")
        before = (tmp_path / "split.json").read_bytes()

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            Split(("z",)).save(tmp_path / "split.json")
        assert (tmp_path / "split.json").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["split.json"]

    @pytest.mark.parametrize("parts", [{"train": ("a", "b"), "test": ("b",)}, {"train": ("b", "b")}])
    def test_a_patient_in_two_places(self, parts):
        with pytest.raises(SplitError, match="'b' in train and"):
            Split(**parts)

    @pytest.mark.parametrize("values", [{}, {"train": ["a"], "Val": ["b"]}])
    def test_other_json_is_no_saved_split(self, values):
        with pytest.raises(SplitError, match="no saved split"):
            Split.from_dict(values)


class TestReadSplit:
    COHORT = cohort_in_memory({"P1": "x", "P2": "y", "P3": "x", "P4": "y", "P5": "x", "P6": None}).replace(
        exclusions=(Exclusion("P9", "", "no image folder"), Exclusion("P1", "1.png", "empty file"))
    )

    def read(self, tmp_path, name: str, text: str, cohort: Cohort = COHORT) -> Split:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_split(tmp_path / name, cohort)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("s.json", '{"train": ["P1", "P2"], "validation": ["P3", "P4"], "test": ["P5"]}'),
            (
                "s.json",
                '{"Train": ["P1", "P2"], "val": ["P3", "P4"], "test": ["P5"], "seed": 1, "source": "x"}',
            ),
            ("s.yaml", "train: [P1, P2]\nvalid:\n  - P3\n  - P4\ntest: ['P5']\n"),
            ("s.yml", "train: [P1, P2]\nvalidation: [P3, P4]\ntest: [P5]\nseed: 0\n"),
            ("s.csv", "patient_id,split\nP1,train\nP2,Train\nP3,val\nP4,validation\nP5,test\n"),
            ("s.csv", "\ufeffPatient_ID;Split\nP1;train\nP2;train\nP3;valid\nP4;valid\nP5;test\n"),
            (
                "s.py",
                "train_index = ['P1',\n 'P2']\n  val_index = [\"P3\", 'P4']\ntest_index=['P5']\n",
            ),
        ],
    )
    def test_formats(self, tmp_path, name, text):
        split = self.read(tmp_path, name, text)
        assert (split.train, split.validation, split.test) == (("P1", "P2"), ("P3", "P4"), ("P5",))
        assert split.seed is None
        assert split.source == f"read from {name}"

    def test_a_saved_split_is_read_back(self, tmp_path):
        split = make_split(cohort := cohort_of(10, 10))
        split.save(tmp_path / "split.json")
        again = read_split(tmp_path / "split.json", cohort)
        assert (again.train, again.validation) == (split.train, split.validation)

    def test_the_predecessors_list_is_parsed_and_never_executed(self, tmp_path):
        """Its second list stands indented, so the file is no Python at all."""
        text = (
            "import os\nopen('executed', 'w')\n"
            "def split():\n  train_index = ['P1', 'P2', 'P3']\n        val_index = ['P4']\n"
        )
        split = self.read(tmp_path, "split.txt", text)
        assert (split.train, split.validation) == (("P1", "P2", "P3"), ("P4",))
        with pytest.raises(SplitError, match="train_index is no plain list"):
            self.read(tmp_path, "split.py", "train_index = [open('executed', 'w')]\n")
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(("name", "text"), [("s.json", '{"train": [7, 12]}'), ("s.yaml", "train: [007, 012]\n")])
    def test_numbers_stay_as_written(self, tmp_path, name, text):
        ids = ("7", "12") if name == "s.json" else ("007", "012")
        assert self.read(tmp_path, name, text, cohort_in_memory(dict(zip(ids, "xy", strict=True)))).train == ids

    @pytest.mark.parametrize(
        ("name", "text", "told"),
        [
            (
                "s.json",
                '{"train": ["P1", "P2"], "test": ["P7", "P9"]}',
                "P9 (no image folder).*not in the cohort: 'P7'",
            ),
            ("s.json", '{"train": ["P1", "P2", "P2"]}', "'P2' in train and train"),
            ("s.json", '{"train": ["P1", "P2"], "test": ["P2"]}', "'P2' in train and test"),
            (
                "s.json",
                '{"train": ["P1", "P2"], "val": ["P6"]}',
                "without label in train or validation: 'P6'",
            ),
            ("s.json", '{"train": ["P1", "P3"]}', "fewer than two classes"),
            (
                "s.json",
                '{"train": ["P1", "P2"], "val": ["P3"], "valid": ["P4"]}',
                "more than one list for validation",
            ),
            ("s.json", '{"train": ["P1", "P2"], "dev": ["P3"]}', "unknown part 'dev'"),
            ("s.json", '{"train": "P1"}', "'train' has to be a list"),
            ("s.json", '{"train": [["P1"]]}', "'train' has to be a list"),
            ("s.json", '["P1"]', "expected {"),
            ("s.json", '{"val": ["P1"]}', "no train list"),
            ("s.json", '{"train": [', "cannot be read as a split"),
            ("s.yaml", "train: [P1\n", "cannot be read as a split"),
            ("s.csv", "patient_id\nP1\n", "no column 'split'"),
            ("s.csv", "id,split\nP1,train\n", "no column 'patient_id'"),
            ("s.csv", "patient_id,split\nP1,train\nP2,holdout\n", "line 3: unknown part 'holdout'"),
            ("s.csv", "patient_id,split\nP1\n", "1 values; expected 2"),
            ("s.py", "nothing here\n", "no train list"),
        ],
    )
    def test_refusals(self, tmp_path, name, text, told):
        with pytest.raises(SplitError) as caught:
            self.read(tmp_path, name, text)
        message = str(caught.value)
        position = 0
        for part in told.split(".*"):
            assert part in message[position:]
            position = message.index(part, position)

    def test_an_absent_file(self, tmp_path):
        with pytest.raises(SplitError, match="cannot be read"):
            read_split(tmp_path / "absent.json", self.COHORT)

    def test_an_unlabelled_patient_may_be_tested(self, tmp_path):
        assert self.read(tmp_path, "s.json", '{"train": ["P1", "P2"], "test": ["P6"]}').test == ("P6",)

    @pytest.mark.parametrize(
        ("digests", "why"),
        [
            (
                {"P1": ("1", "2"), "P3": ("1", "2")},
                "'P1' is in train and 'P3' in test, but they share 2 images",
            ),
            ({"P1": ("1",), "P4": ("1", "2"), "P3": ("2",)}, "linked through others of 'P1', 'P3', 'P4'"),
        ],
    )
    def test_linked_patients_are_not_torn_apart(self, tmp_path, digests, why):
        cohort = self.COHORT.replace(digests=digests)
        with pytest.raises(SplitError) as caught:
            self.read(tmp_path, "s.json", '{"train": ["P1", "P2"], "test": ["P3"]}', cohort)
        assert why in str(caught.value)

    def test_identifiers_spelled_alike_are_not_torn_apart(self, tmp_path):
        cohort = cohort_in_memory({"P01": "x", "p1": "x", "Q": "y"})
        with pytest.raises(SplitError, match=r"'P01' is in train and 'p1' in test, but.*spellings"):
            self.read(tmp_path, "s.json", '{"train": ["P01", "Q"], "test": ["p1"]}', cohort)

    def test_labelled_patients_left_out_are_counted(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO):
            self.read(tmp_path, "s.json", '{"train": ["P1", "P2"]}')
        assert [record.getMessage() for record in caplog.records] == [
            "s.json: 3 labelled patients of the cohort are in no part and not used"
        ]
