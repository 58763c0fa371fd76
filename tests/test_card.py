"""Model cards filled from a run, folders on a stand-in for the hub, and transformers' auto classes."""

import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from fabricated_run import fabricate_run

from dgrpo import DiffuGRPOConfig
from dgrpo.run import CHECKPOINTS, card, run_task
from dgrpo.run.merge import merge_adapters
from dgrpo.tasks import gsm8k

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path) -> Path:
    folder = fabricate_run(tmp_path / "run", steps=4)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4/optimizer.pt").write_bytes(b"state")
    return folder


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_a_card_says_what_the_run_was(run):
    text = card.model_card(run)
    for words in (
        "`one_step + grpo`",
        "Reward: `correctness_reward`",
        "Data: `embedded`",
        "`learning_rate: 0.0001`",
        "| before | 45.0% | 40.7% to 49.3% | 512 |",
        "| after | 89.0% | 86.0% to 91.4% | 512 |",
        "torch 2.13.0",
        "adapter=",
        "eprint = {2504.12216}",
        "@software{dgrpo,",
    ):
        assert words in text
    assert "More Information" not in text
    assert "base_model" not in front(text), "a local folder is no model of the hub"
    merged = card.model_card(run, merged=True)
    assert "adapter=" not in merged
    assert front(merged)["library_name"] == "dgrpo"


def test_a_card_links_what_the_hub_has(run):
    (run / "config.yaml").write_text(
        "model_name_or_path: GSAI-ML/LLaDA-8B-Instruct\ndataset: openai/gsm8k\nreward_funcs: [a:b]\nobjective: wd1\n"
    )
    text = card.model_card(run)
    assert front(text)["base_model"] == "GSAI-ML/LLaDA-8B-Instruct"
    assert front(text)["datasets"] == ["openai/gsm8k"]
    assert "eprint = {2507.08838}" in text


def test_every_estimator_and_objective_with_a_paper_is_cited():
    from dgrpo.estimators import ESTIMATORS
    from dgrpo.objectives import OBJECTIVES

    assert set(card.PAPERS) == {*ESTIMATORS, *OBJECTIVES} - {"grpo", "every_write"}


class Hub(BaseHTTPRequestHandler):
    """What uploading a folder asks of the hub; files arrive within the commit."""

    files: dict[str, bytes]
    asked: list[str]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.asked.append(f"{self.path} {self.headers.get('Authorization')}")
        answer: dict = {}
        if self.path == "/api/repos/create":
            answer = {"url": f"http://{self.headers['Host']}/me/x"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/x/commit/1", "commitOid": "1", "success": True}
        self._send(answer)

    def do_GET(self):
        self._send({"id": "me/x", "sha": "0" * 40, "siblings": []})

    def _send(self, answer: dict) -> None:
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub on this machine: what was uploaded, and what was asked."""
    handler = type("OwnHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()


def test_weights_and_card_are_uploaded_but_neither_rows_nor_checkpoints(run, hub):
    args = DiffuGRPOConfig(
        output_dir=str(run),
        push_to_hub=True,
        hub_model_id="me/x",
        hub_token="hf_secretsecret",
        per_device_train_batch_size=6,
        use_cpu=True,
    )
    card.publish(args)
    assert {"README.md", "adapter_model.safetensors", "config.yaml", "summary.json", "metrics.csv"} <= set(hub.files)
    assert not [name for name in hub.files if "/" in name or name.endswith((".html", ".parquet", "samples.json"))]
    assert b"| after | 89.0%" in hub.files["README.md"]
    assert all("Bearer hf_secretsecret" in asked for asked in hub.asked)
    assert not any(b"hf_secret" in content for content in hub.files.values())


def test_nothing_is_uploaded_unasked(run, hub):
    card.publish(DiffuGRPOConfig(output_dir=str(run), per_device_train_batch_size=6, use_cpu=True))
    assert hub.files == {}
    assert "| after | 89.0%" in (run / "README.md").read_text()


@pytest.mark.slow
def test_a_run_pushes_its_adapter_and_merging_writes_a_card_of_its_own(tmp_path, monkeypatch, hub):
    folder = tmp_path / "run"
    words = "--max_steps 1 --num_eval_problems 8 --per_device_train_batch_size 16 --report_to none --disable_tqdm true"
    words += " --push_to_hub true --hub_model_id me/x --hub_token hf_secretsecret"
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", "--output_dir", str(folder), *words.split()])
    run_task(gsm8k.TASK, str(ROOT / "recipes/gsm8k.py"))
    assert hub.files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert "tokenizer.json" in hub.files
    assert b"| after |" in hub.files["README.md"]
    merged = merge_adapters(folder, tmp_path / "merged", base=CHECKPOINTS / "gsm8k")
    text = (merged / "README.md").read_text()
    assert "| after |" in text
    assert "adapter=" not in text


def test_auto_classes_find_the_families_once_dgrpo_is_imported():
    code = (
        "import sys, dgrpo\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM\n"
        f"folder = {str(CHECKPOINTS / 'gsm8k')!r}\n"
        "for auto in (AutoModel, AutoModelForMaskedLM):\n"
        "    print(type(auto.from_pretrained(folder)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["LLaDAModelLM", "LLaDAModelLM"]
