"""What no control of the page sends is refused in one line, whichever way it comes, and leaves no stack trace."""

import json
import uuid

import httpx
import pytest

OUT_OF_RANGE = {  # a control's label: what its range does not hold
    "Model": "/etc/passwd", "Models": ["fashion-student", "no such"], "Class": "circle", "Classes, in turn": ["circle"],
    "Seed": 10**6, "Pictures of each model": 9, "Variations": 9, "Unmasking order": "spiral",
    "Guidance w of a teacher (a student has it baked in)": 11, "Share of tokens to keep": 1.5, "painted": [49],
}  # fmt: skip
GARBAGE = [None, -1, True, float("nan"), 10**30, "<script>", "9" * 5000, [], [[]], [None], {}, {"path": "/etc/passwd"}]
FILE = {"meta": {"_type": "gradio.FileData"}}
FILES = [{**FILE, "path": "/etc/passwd"}, {**FILE, "path": "https://example.com/a.png"}, [{**FILE, "path": None}]]
USUAL = {  # quick drawings, where a control's own value is not
    "Models": ["fashion-student"], "Pictures of each model": 1, "Variations": 1, "painted": [3],
}  # fmt: skip


class Forger:
    """A visitor who posts what it likes, as gradio's own page would."""

    def __init__(self, address):
        self.http = httpx.Client(base_url=address, timeout=60)
        self.session = uuid.uuid4().hex
        config = self.http.get("config").json()
        self.components = {found["id"]: found for found in config["components"]}
        self.handlers = [found for found in config["dependencies"] if found["backend_fn"]]

    def labels(self, handler):
        """The names of a handler's inputs; None for what the server itself holds."""
        kinds = {"state": None, "json": "painted", "uploadbutton": "file"}
        found = [self.components[number] for number in handler["inputs"]]
        return [kinds.get(one["type"], one["props"].get("label")) for one in found]

    def usual(self, handler):
        """What the page would send at first."""
        data = []
        for label, number in zip(self.labels(handler), handler["inputs"], strict=True):
            own = self.components[number]["props"].get("value")
            quick = {**USUAL, "Iterations K": [1] if isinstance(own, list) else 1}
            data.append(quick.get(label, own))
        return data

    def number(self, name):
        """The component with an id of the page."""
        return next(number for number, one in self.components.items() if one["props"].get("elem_id") == name)

    def handler(self, name):
        """The handler of a button."""
        return next(found for found in self.handlers if found["targets"][:1] == [[self.number(name), "click"]])

    def post(self, path, headers=None, **body):
        """As JSON with NaN, which Python's server reads."""
        kind = {"content-type": "application/json"}
        return self.http.post(path, content=json.dumps(body), headers={**kind, **(headers or {})})

    def send(self, handler, data, **more):
        """Join the queue and wait: the error message, or None where it went well."""
        body = {"fn_index": handler["id"], "session_hash": self.session, "data": data, **more}
        answer = self.post("gradio_api/queue/join", **body)
        if answer.status_code != 200:
            return answer.json()["detail"]
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    assert message["event_id"] == answer.json()["event_id"]
                    return None if message["success"] else message["output"]["error"]
        raise AssertionError("no end")


@pytest.fixture
def forger(server):
    found = Forger(server[0])
    start = found.handler("mv-start")
    assert found.send(start, found.usual(start)) is None  # a picture on the desk
    return found


def one_line(message):
    assert message
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    assert "Traceback" not in message
    assert "Error" not in message
    return True


def test_what_is_out_of_range_is_refused_by_every_handler(forger):
    tried = set()
    for handler in forger.handlers:
        for place, label in enumerate(forger.labels(handler)):
            data = forger.usual(handler)
            if label == "Iterations K":
                data[place] = [50] if isinstance(data[place], list) else 50
            elif label in OUT_OF_RANGE:
                data[place] = OUT_OF_RANGE[label]
            else:
                continue
            assert one_line(forger.send(handler, data)), (label, handler["api_name"])
            tried.add(label)
    assert tried == {*OUT_OF_RANGE, "Iterations K"}


def test_garbage_is_refused_or_harmless(forger):
    refused = 0
    for handler in forger.handlers:
        for place, label in enumerate(forger.labels(handler)):
            for odd in FILES if label == "file" else GARBAGE if label else []:
                data = forger.usual(handler)
                data[place] = odd
                message = forger.send(handler, data)
                assert message is None or one_line(message), (label, odd, handler["api_name"])
                refused += message is not None
        if handler["inputs"]:
            assert one_line(forger.send(handler, [])), handler["api_name"]
    assert refused > 200


@pytest.mark.parametrize("event", [None, "picture", [], {}, {"picture": None}, {"picture": "9:9"}, {"picture": "-1:0"}])
def test_a_forged_click_on_a_picture_is_refused(forger, event):
    clicks = [found for found in forger.handlers if found["targets"] and found["targets"][0][1] == "select"]
    assert len(clicks) == 2
    for handler in clicks:
        message = forger.send(handler, forger.usual(handler), event_data=event)
        assert message == "this picture is no longer here: draw it again"


def test_the_queue_cannot_be_passed_by(forger):
    body = {"fn_index": forger.handler("mv-draw")["id"], "data": forger.usual(forger.handler("mv-draw"))}
    for name in ("run/predict", "api/predict", "run/draw"):
        answer = forger.post(f"gradio_api/{name}", session_hash=forger.session, **body)
        assert answer.status_code == 404
        assert "queue" in answer.json()["detail"]


FORGED_REQUESTS = [
    ("POST", "gradio_api/queue/join", {"fn_index": 10**6, "session_hash": "a", "data": []}),
    ("POST", "gradio_api/queue/join", {"fn_index": None, "session_hash": "a", "data": []}),
    ("POST", "gradio_api/queue/join", {"fn_index": "draw", "session_hash": "a", "data": []}),
    ("POST", "gradio_api/queue/join", {"fn_index": 1, "session_hash": ["a"], "data": {}}),
    ("POST", "gradio_api/queue/join", {"fn_index": 1, "data": []}),
    ("POST", "gradio_api/queue/join", "{"),
    ("POST", "gradio_api/queue/join", "[" * 100_000),
    ("POST", "gradio_api/run/nothing", {"data": []}),
    ("POST", "gradio_api/run/predict", {"fn_index": 10**6, "data": []}),
    ("POST", "gradio_api/call/nothing", {"data": []}),
    ("POST", "gradio_api/call/v2/nothing", {}),
    ("POST", "gradio_api/call/v2/draw", {"nothing": 1}),
    (
        "POST",
        "gradio_api/component_server",
        {"component_id": 10**6, "fn_name": "ls", "session_hash": "a", "data": None},
    ),
    ("POST", "gradio_api/upload", "no form"),
    ("GET", "gradio_api/file=https://example.com/a.png", None),
    ("GET", "gradio_api/file=/etc/passwd", None),
    ("GET", "gradio_api/proxy=https://example.hf.space/a.png", None),
]


@pytest.mark.parametrize(("method", "path", "body"), FORGED_REQUESTS, ids=[str(i) for i in range(len(FORGED_REQUESTS))])
def test_forged_requests_are_answered_with_a_line(server, method, path, body):
    content = body if isinstance(body, str) or body is None else json.dumps(body)
    headers = {"content-type": "application/json"} if body is not None else {}
    answer = httpx.request(method, server[0] + path, content=content, headers=headers, timeout=30)
    assert 400 <= answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text
    assert len(answer.text.splitlines()) <= 1
    assert "default-src 'self'" in answer.headers["content-security-policy"]
