"""Run folders: who may write, and with which settings."""

import pytest

from lymph_hf.runs import Run, RunError

SETTINGS = {"epochs": 3, "encoder": "test_vit"}


@pytest.fixture
def stopped(tmp_path) -> Run:
    """A run that has written something and ended."""
    run = Run(tmp_path / "run")
    run.claim(SETTINGS, resume=False).release()
    (run.folder / "checkpoints").mkdir()
    return run


@pytest.mark.parametrize("value", [None, False, 0])
def test_an_option_of_a_later_version_is_no_change_while_it_is_off(stopped, value):
    stopped.claim(SETTINGS | {"newer": value}, resume=True).release()


@pytest.mark.parametrize("settings", [SETTINGS | {"newer": True}, SETTINGS | {"epochs": 0}, {"epochs": 3}])
def test_other_settings_are_refused_by_name(stopped, settings):
    with pytest.raises(RunError, match=r"started with other settings \((newer|epochs|encoder): "):
        stopped.claim(settings, resume=True)
