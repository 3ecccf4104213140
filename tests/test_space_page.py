"""The Space as it is served, without a browser: its API, its headers, its manners under load."""

import http.client
import re
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from space_server import EXAMPLES, running_space, write_model

gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed: pip install 'lymph-hf[space]'")
httpx = pytest.importorskip("httpx", reason="httpx comes with gradio")
UNKNOWN = {"kind": "Single cells", "crop_side": None, "age": None, "sex": "Not known", "count": None}
pytestmark = pytest.mark.filterwarnings("default")  # of gradio and what it stands on


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    with running_space(write_model(tmp_path_factory.mktemp("space") / "lymph-mil"), temporary) as space:
        yield space
    assert list(temporary.iterdir()) == []  # the folder of uploads goes with the service


@pytest.fixture
def address(space):
    return space.address


@pytest.fixture
def connect(address):
    clients = []

    def make():
        clients.append(gradio_client.Client(address, verbose=False))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def send(name):
    return gradio_client.handle_file(str(EXAMPLES / name))


def test_a_patient_by_the_api(connect):
    _, html, answer = connect().predict(files=[send("tumoral.zip")], **UNKNOWN, api_name="/analyse")
    assert answer["cells"] == 24 and answer["use"] == "research only, not a medical device"
    assert answer["decision"] == "refer to flow cytometry" and "Download report" in html
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=2e-4)


def test_an_example_can_be_used_by_many(connect):
    """The page hands over the place of an example's file, which stays when its readers leave."""
    chosen = {"path": str(EXAMPLES / "unclear.zip"), "meta": {"_type": "gradio.FileData"}}
    for _ in range(2):
        client = connect()
        assert client.predict(files=[chosen], **UNKNOWN, api_name="/analyse")[-1]["cells"] == 24
        client.close()
    assert (EXAMPLES / "unclear.zip").is_file()


def test_errors_reach_programs_with_their_reason(connect):
    client = connect()
    with pytest.raises(gradio_client.exceptions.AppError, match="None of the files is a usable picture"):
        client.predict(files=[send("batch.csv")], **UNKNOWN, api_name="/analyse")
    with pytest.raises(gradio_client.exceptions.AppError, match="Age '300': expected an age from 0 to 120"):
        client.predict(files=[send("reactive.zip")], **UNKNOWN | {"age": 300}, api_name="/analyse")
    with pytest.raises(gradio_client.exceptions.AppError, match="No file yet"):
        client.predict(files=[], **UNKNOWN, api_name="/analyse")


def test_a_batch_and_predictive_values_by_the_api(connect):
    client = connect()
    _, message, table = client.predict(table=send("batch.csv"), archives=[send("batch.zip")], api_name="/batch")
    assert [row[0] for row in table["data"]] == ["A-01", "A-02", "A-03"] and "3 of 3 patients answered" in message
    assert "50 %" in client.predict(prevalence=18, api_name="/predictive_values")  # sensitivity 0.9, specificity 0.8


def test_only_three_endpoints_are_public(connect):
    endpoints = connect().view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert sorted(endpoints) == ["/analyse", "/batch", "/predictive_values"]


def test_the_page_asks_nothing_of_other_hosts(address):
    response = httpx.get(address)
    assert "default-src 'self'" in response.headers["content-security-policy"]
    fetched = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(https?:[^\"]+)", response.text)
    assert fetched == []
    styles = httpx.get(f"{address}theme.css").text
    assert not re.search(r"https?://(?!www\.w3\.org)", styles)


def test_research_use_stands_on_the_first_screen(address):
    assert "Research use only. Not a medical device." in httpx.get(f"{address}config").text


def test_too_large_an_upload_is_refused_before_it_is_read(address):
    connection = http.client.HTTPConnection(httpx.URL(address).netloc.decode(), timeout=10)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()  # and not a byte of the body
    assert connection.getresponse().status == 413
    connection.close()
    hidden = httpx.post(f"{address}gradio_api/upload", content=iter([b"x"]))
    assert hidden.status_code == 411


@pytest.fixture
def small_patients(tmp_path):
    """Two of three cells."""
    paths = [tmp_path / "reactive.zip", tmp_path / "tumoral.zip"]
    for path in paths:
        with zipfile.ZipFile(EXAMPLES / path.name) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist()[:3]:
                target.writestr(name, source.read(name))
    return paths


def test_eight_users_at_once_each_get_their_own_answer(connect, small_patients):
    files = small_patients * 4
    clients = [connect() for _ in files]

    def ask(client, path, age):
        answer = client.predict(
            files=[gradio_client.handle_file(str(path))], **UNKNOWN | {"age": age}, api_name="/analyse"
        )[-1]
        return answer["probabilities"]["tumoral"]

    ages = [20, 30, 40, 50, 60, 70, 80, 90]
    expected = [ask(clients[0], path, age) for path, age in zip(files, ages, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, clients, files, ages))
    assert found == expected and len(set(found)) == 8


def test_a_cancelled_request_leaves_the_service_alive(connect):
    client = connect()
    job = client.submit(table=send("batch.csv"), archives=[send("batch.zip")], api_name="/batch")
    job.cancel()
    answer = client.predict(files=[send("reactive.zip")], **UNKNOWN, api_name="/analyse")[-1]
    assert answer["cells"] == 24


def test_uploads_are_gone_when_their_sender_is(space):
    client = gradio_client.Client(space.address, verbose=False)
    client.predict(files=[send("reactive.zip")], **UNKNOWN, api_name="/analyse")
    assert space.uploads()
    client.close()
    limit = time.monotonic() + 20
    while space.uploads() and time.monotonic() < limit:
        time.sleep(0.2)
    assert space.uploads() == []
