"""A Space goes to the Hub with its sources alone, and with the SDK that its front matter names."""

import zipfile
from pathlib import Path

import pytest
from PIL import Image
from publishing_cases import WRITER, options, publish_as, sent

from lymph_hf.hub_push import PublishError
from lymph_hf.publishing import publish

FRONT = "---\ntitle: Lymph\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\nlicense: apache-2.0\n---\n# Lymph\n"


@pytest.fixture
def space(tmp_path) -> Path:
    folder = tmp_path / "space"
    (folder / "examples" / "one").mkdir(parents=True)
    (folder / "__pycache__").mkdir()
    (folder / "README.md").write_text(FRONT)
    (folder / "app.py").write_text("import gradio as gr\n")
    (folder / "requirements.txt").write_text("torch\n")
    (folder / "__pycache__" / "app.cpython-311.pyc").write_bytes(b"x")
    (folder / ".env").write_text("HF_TOKEN=secret")
    Image.new("RGB", (32, 32), "purple").save(folder / "examples" / "one" / "cell.jpg")
    with zipfile.ZipFile(folder / "examples" / "one.zip", "w") as file:
        file.write(folder / "examples" / "one" / "cell.jpg", "one/cell.jpg")
    return folder


def test_a_space_is_pushed_with_its_sdk(hub, client, space):
    commit = client.call(publish_as, WRITER, sent(space=str(space), repo="org/space"))
    repo = hub.repo("org/space", "space")
    assert repo.tags == {"v1": commit}
    sources = {"README.md", "app.py", "requirements.txt", "examples/one/cell.jpg", "examples/one.zip"}
    assert repo.files.keys() == {".gitattributes"} | sources
    assert client.call(publish_as, WRITER, sent(space=str(space), repo="org/space")) == commit


def weights(folder):
    (folder / "model.bin").write_bytes(b"x")


def exif(folder):
    entries = Image.Exif()
    entries[0x010F] = "analyser of ward 3"
    Image.new("RGB", (32, 32)).save(folder / "examples" / "one" / "cell.jpg", exif=entries)


def path(folder):
    (folder / "app.py").write_text('run("/home/ada/runs/first")\n')


def front_matter(old, new):
    return lambda folder: (folder / "README.md").write_text(FRONT.replace(old, new))


def archive(name, content):
    def write(folder):
        with zipfile.ZipFile(folder / "examples" / "batch.zip", "w") as file:
            file.writestr(name, content)

    return write


SPOILT = {
    "path in an archive": (archive("clinical.csv", "id,/home/ada/1"), r"batch\.zip: clinical\.csv: holds a path"),
    "weights in an archive": (archive("a.bin", b"x"), r"examples/batch\.zip: a\.bin: only"),
    "date in the name of an archived file": (
        archive("1951-02-03.csv", "x"),
        "its name holds a patient identifier or a",
    ),
    "weights": (weights, r"model\.bin: only"),
    "exif": (exif, r"examples/one/cell\.jpg: holds .*(EXIF|exif)"),
    "path": (path, r"app\.py: holds a path"),
    "licence": (front_matter("license: apache-2.0\n", ""), "no 'license'"),
    "sdk": (front_matter("sdk: gradio", "sdk: streamlet"), "sdk='streamlet'"),
    "app": (front_matter("app_file: app.py", "app_file: main.py"), r"app_file='main\.py'"),
    "front matter": (front_matter("---", ""), "sdk=None"),
    "no card": (lambda folder: (folder / "README.md").unlink(), r"no README\.md"),
    "no requirements": (lambda folder: (folder / "requirements.txt").unlink(), r"requirements\.txt is missing"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_may_not_leave_is_named(space, case):
    spoil, message = SPOILT[case]
    spoil(space)
    with pytest.raises(PublishError, match=message):
        publish(options(space=str(space)), None)


def test_one_thing_is_published_at_a_time(space, trained_run):
    for wanted in (options(), options(trained_run, space=str(space)), options(space=str(space), repo_type="dataset")):
        with pytest.raises(PublishError, match="Say what to publish"):
            publish(wanted, None)
