"""``keel label`` serves people without torch: it is read when a model is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = "heavy = {'torch', 'transformers', 'numba'} & set(sys.modules)\nassert not heavy, heavy\n"

IMPORTED = "import sys\nimport keel.cli.commands, keel.cli.label, keel.run, keel.store, keel.web.app.create\n"

SERVED = """
import sys
import uvicorn
from pathlib import Path
from starlette.testclient import TestClient
from keel.cli import main
from keel.run import RunDir

out = Path(sys.argv[1])
run = RunDir(out / "run")
stages = [{"kind": "sft", "name": "sft", "model": "base"}, {"kind": "sample", "name": "sample", "model": "sft"}]
recipe = {"name": "r", "model": {"path": "m"}, "data": {"demonstrations": "d", "prompts": "p"}, "stages": stages}
run.manifest.update({"recipe": recipe, "stages": {"sft": {"kind": "sft", "status": "done"}}})
run.stage("sft").begin("f")
run.stage("sft").finish({})
(out / "prompts.jsonl").write_text('{"prompt": "What is a keel?"}\\n')

def serve(server, sockets):
    app = server.config.app
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/sign-in").status_code == 200
    sources = app.state.services.sources
    assert [model.name for model in sources.arena] == ["sft"] == list(sources.sampled)
    assert [model.key for model in sources.trained()] == ["sft"]
    assert len(sources.read_prompts(out / "prompts.jsonl")) == 1
    print("served")

uvicorn.Server.run = serve
assert main(["label", str(out / "run"), "--port", "0"]) == 0
"""


def test_labelling_needs_no_torch(tmp_path: Path, subprocess_env: dict[str, str]) -> None:
    script = IMPORTED + HEAVY + SERVED + HEAVY
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=subprocess_env
    )
    assert ran.returncode == 0, ran.stderr
    assert "served" in ran.stdout
