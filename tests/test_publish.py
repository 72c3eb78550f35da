"""``keel push`` and ``keel serve`` on a run that lies finished in tests/data: the card's numbers, what goes and what
never does, and what the commands say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sqlite3
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ROOT

from keel.cli import main

SECRET = "hf_" + "S3cretS3cretS3cret"
LICENCE = ("--license", "apache-2.0")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ROOT / "tests" / "data" / "old_run.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "old_run"


@pytest.fixture
def run(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, which a test may change; its folder is the current one."""
    shutil.copytree(unpacked, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Path("run")


def edit(path: Path, change: Any) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def pushed(run: Path, stage: str, *more: str) -> str:
    assert main(["push", str(run / stage), "../out", *LICENCE, *more]) == 0
    return Path("../out/README.md").read_text()


def cells(card: str) -> dict[str, list[str]]:
    """The card's table rows by their first cell."""
    found = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in card.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in found if row}


def value(text: str) -> float:
    """A number as people read it, from the beginning of a cell."""
    found = re.match(r"[−\d.,]+%?", text)
    assert found, text
    shown = found[0].replace("−", "-").replace(",", "")
    return float(shown.rstrip("%")) / (100 if shown.endswith("%") else 1)


# --------------------------------------------------------------------------------------------------------- the card


def test_every_number_of_a_policys_card_is_the_summarys(run: Path) -> None:
    def figures(tree: Any) -> None:
        tree["stages"]["dpo"] |= {"win_rate_vs_sft": [0.625, 0.5, 0.75], "gold_reward": -7.25, "gold_reward_se": 1.5}
        tree["stages"]["dpo"] |= {"invented_rate": 0.125, "fact_accuracy": 0.875, "fact_accuracy_se": 0.0625}
        tree["stages"]["sft"] |= {"invented_rate": 0.25}
        alarm = {"stage": "dpo", "name": "kl", "step": 7, "value": 40.0, "bound": 30.0}
        tree["alarms"] = [
            alarm | {"message": "the KL is 40 nats", "remedy": "less"},
            alarm | {"stage": "other", "message": "x"},
        ]

    edit(run / "eval" / "summary.json", figures)
    card = pushed(run, "dpo")
    summary = json.loads((run / "eval" / "summary.json").read_text())["stages"]
    rows = cells(card)
    known = {
        "Judge's score": ("gold_reward", 0.005),
        "Learned reward": ("reward", 0.005),
        "Invented answers": ("invented_rate", 0.0005),
        "Reply length (tokens)": ("mean_length", 0.05),
        "Ends by itself": ("finished_rate", 0.0005),
        "Repetition": ("repetition", 0.0005),
        "KL from SFT (nats per reply)": ("kl_to_sft", 0.005),
        "Fact accuracy": ("fact_accuracy", 0.0005),
        "Win rate against SFT": ("win_rate_vs_sft", 0.0005),
    }
    shown = [label for label in rows if label in known]
    assert set(shown) == set(known)
    for label in shown:
        key, digits = known[label]
        for cell, model in zip(rows[label], ("dpo", "sft"), strict=True):
            figure = summary[model].get(key)
            point = figure[0] if isinstance(figure, list) else figure
            assert cell == "–" if point is None else value(cell) == pytest.approx(point, abs=digits), (label, model)
    assert rows["Win rate against SFT"][0] == "62.5% (50–75%)"
    assert rows["Judge's score"][0] == "−7.25 (± 1.50)"
    assert f"on {summary['dpo']['prompts']} held-out prompts" in card
    assert "Alarm, DPO: the KL is 40 nats (step 7)" in card
    assert "Alarm, Other" not in card
    own = json.loads((run / "dpo" / "summary.json").read_text())
    assert value(rows["held-out accuracy"][0]) == pytest.approx(own["eval/rewards/accuracies"], abs=5e-4)
    assert value(rows["pairs"][0]) == own["pairs"]


def test_whose_judgements_it_says_is_what_the_database_says(run: Path) -> None:
    with sqlite3.connect(run / "feedback.db") as database:
        ann = database.execute("select id from annotators order by id").fetchone()[0]
        database.execute("update annotators set kind = 'person' where id = ?", [ann])
        trained = json.loads((run / "dpo" / "judgements.json").read_text())["trained"]
        marks = ", ".join("?" * len(trained))
        query = (
            "select an.kind, count(*), count(distinct an.id) from judgements j join assignments a on a.id = "
            f"j.assignment_id join annotators an on an.id = a.annotator_id where j.token in ({marks}) group by 1"
        )
        counts = {kind: (votes, people) for kind, votes, people in database.execute(query, trained)}
        names = [name for (name,) in database.execute("select name from annotators")]
    assert set(counts) == {"person", "simulated"}
    card = pushed(run, "dpo")
    people, simulated = counts["person"], counts["simulated"]
    said = f"{people[0]} records of people's work (of {people[1]}), {simulated[0]} judgements by simulated annotators"
    assert f"`dpo` (dpo) learned from {said} (of {simulated[1]}); 6 held out." in card
    assert "Guideline: version 1." in card
    assert not [name for name in names if re.search(rf"\b{name}\b", card)]  # nobody's name


def test_lineage_data_and_limits(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    card = pushed(run, "dpo")
    rows = cells(card)
    steps = ["sft", "sample", "annotate", "dpo"]
    assert [rows[f"`{name}`"][1] for name in steps] == [
        f"`{manifest['stages'][name]['fingerprint'][:12]}`" for name in steps
    ]
    assert "`reward`" not in rows  # it does not rest on that
    assert f"`{manifest['data']['demonstrations.jsonl']['sha256']}`" in rows["demonstrations"]
    assert f"SHA-256 `{manifest['data']['base']['sha256']}`" in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "apache-2.0"
    assert header["pipeline_tag"] == "text-generation"
    assert "base_model" not in header  # a folder is nobody else's
    for limit in ("programs", "Whose work the data files are", "not measured", "No alarm"):
        assert limit in card


def test_an_evaluation_of_an_earlier_version_is_not_its_evaluation(run: Path) -> None:
    edit(run / "manifest.json", lambda tree: tree["stages"]["eval"]["parents"].update(dpo="another"))
    card = pushed(run, "dpo")
    assert "Judge's score" not in card
    assert "`eval` is of an earlier version" in card
    assert "how well it does is not known" in card


def test_a_reward_models_card_and_its_python_give_its_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from keel.model.checkpoint import load_scalar
    from keel.reward.scorer import RewardModelScorer
    from keel.types import Completion, Message, Prompt

    subset = {"score": 0.625, "low": 0.5, "high": 0.75, "items": 8}
    bench = {"score": 0.625, "subsets": {"Math": subset}, "missing": ["Ties"]}
    edit(run / "eval" / "summary.json", lambda tree: tree.update(reward_bench={"reward": bench}))
    card = pushed(run, "reward")
    assert cells(card)["Math (8 items)"] == ["62.5% (50–75%)"]
    assert "no Ties: the mean is not the published one" in card
    summary, rows = json.loads((run / "reward" / "summary.json").read_text()), cells(card)
    for label, key, digits in (
        ("Accuracy on held-out pairs", "accuracy", 5e-4),
        ("Ceiling that noisy labels allow", "ceiling", 5e-4),
        ("Expected calibration error", "ece", 5e-4),
        ("Pairs held out", "heldout_pairs", 0),
    ):
        assert value(rows[label][0]) == pytest.approx(summary[key], abs=digits)
    shutil.copytree("../out", "out")
    capsys.readouterr()
    exec(re.findall(r"```python\n(.*?)```", card, re.S)[0], {})
    said = float(capsys.readouterr().out)
    scorer = RewardModelScorer(load_scalar(run / "reward"), 1024)
    asked = Prompt("1", (Message("user", "What is a keel?"),))
    own = scorer.score([asked], [Completion("A ship's spine.")]).total_N.item()
    assert said == pytest.approx(own, abs=1e-5)


# --------------------------------------------------------------------------------------------------------- what goes


def test_what_goes_is_the_checkpoint_and_no_more(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (run / "dpo" / "notes.txt").write_text("ann said so")
    (run / "dpo" / "helper.py").write_text("print('not the model's)")
    assert main(["push", str(run / "dpo"), "../out", *LICENCE, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert not Path("../out").exists()
    assert "# DPO" in listed  # the card is shown
    card = pushed(run, "dpo")
    out = Path("../out")
    names = {file.name for file in out.iterdir()}
    loaded = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    assert names == loaded | {"tokenizer.json", "tokenizer_config.json", "README.md", "keel.json"}
    assert all(re.search(rf"^  {re.escape(name)} +\d", listed, re.M) for name in names)
    assert (out / "model.safetensors").read_bytes() == (run / "dpo" / "model.safetensors").read_bytes()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(str(out)), AutoTokenizer.from_pretrained(str(out))
    assert model.num_parameters() > 0
    assert tokenizer.chat_template
    shutil.copytree(out, "out")
    exec(re.findall(r"```python\n(.*?)```", card, re.S)[0], {})  # the card's own lines run
    assert str(Path.cwd()) not in "".join(file.read_text(errors="replace") for file in out.iterdir())


def test_what_keel_did_not_write_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("../out")
    out.mkdir()
    (out / "README.md").write_text("mine")
    assert main(["push", str(run / "dpo"), "../out", *LICENCE]) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "mine"
    for mark in ("[]", '{"files": ["README.md"]}', "no json"):  # of somebody else's
        (out / "keel.json").write_text(mark)
        assert main(["push", str(run / "dpo"), "../out", *LICENCE]) == 2
    (out / "keel.json").unlink()
    (out / "other.txt").write_text("stays")
    pushed(run, "dpo", "--force")
    assert (out / "other.txt").read_text() == "stays"
    # Its own earlier push is replaced, what that had and this has not goes, what is somebody's stays.
    edit(out / "keel.json", lambda tree: tree["files"].update({"model-00001-of-00002.safetensors": "x", "../x": "y"}))
    (out / "model-00001-of-00002.safetensors").write_text("old shard")
    Path("../x").write_text("outside")
    pushed(run, "dpo", "--force")
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert (out / "other.txt").exists()
    assert Path("../x").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "out", *LICENCE], "run/dpo"),
        (["run/annotate", "out", *LICENCE], "sft, reward, dpo"),
        (["run/none", "out", *LICENCE], "sft, reward, dpo"),
        (["run/dpo@50", "out", *LICENCE], "no checkpoint"),
        (["nowhere/dpo", "out", *LICENCE], "not a stage of a run"),
        (["run/dpo", "run/dpo", *LICENCE], "in the run itself"),
        (["run/dpo", "out"], "not guessed"),
        (["run/dpo", "out", "--license", "Apache 2"], "identifier"),
        (["run/dpo", "out", *LICENCE, "--public"], "leave it out"),
        (["run/dpo", "out", *LICENCE, "--adapter"], "no adapters"),
        (["run/dpo", "hub:nobody", *LICENCE], "OWNER/NAME"),
    ],
)
def test_what_cannot_be_pushed_is_refused_in_a_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["push", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_a_checkpoint_on_the_way_and_the_current_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = run / "dpo" / "at_50"
    at.mkdir()
    for file in (run / "sft").iterdir():
        if file.name not in ("stage.json", "summary.json"):
            shutil.copy(file, at)
    card = pushed(run, "dpo@50")
    assert "# DPO at 50%" in card
    assert "50% along that stage" in card
    assert "measured at its end" not in card  # which is another's
    assert Path("../out/model.safetensors").read_bytes() == (at / "model.safetensors").read_bytes()
    monkeypatch.chdir(run / "sft")
    assert main(["push", ".", "../../../here", *LICENCE]) == 0
    assert "# SFT" in Path("../../../here/README.md").read_text()


def test_an_unfinished_stage_is_not_pushed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run / "dpo" / "stage.json", lambda tree: tree.update(done=False))
    assert main(["push", str(run / "dpo"), "../out", *LICENCE]) == 2
    assert "not finished" in capsys.readouterr().err


def test_adapters_need_a_base_that_others_have(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = run / "dpo" / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(Path.cwd() / "base"), "r": 5, "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    (adapter / "base.json").write_text("{}")
    assert main(["push", str(run / "dpo"), "../out", *LICENCE, "--adapter"]) == 2
    assert "a folder of this machine" in capsys.readouterr().err
    edit(adapter / "adapter_config.json", lambda tree: tree.update(base_model_name_or_path="owner/base"))
    pushed(run, "dpo", "--adapter")
    assert {file.name for file in Path("../out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "keel.json",
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the hub


class Hub:
    """The public functions of huggingface_hub that a push calls, over repositories in memory."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.endpoint = "https://hub.example"
        self.fails = ""

    def __call__(self, **_: Any) -> Hub:
        return self

    def model_info(self, name: str) -> Any:
        from httpx2 import Request, Response
        from huggingface_hub.errors import RepositoryNotFoundError

        if self.fails:
            raise OSError(self.fails)
        if name not in self.repositories:
            asked = Request("GET", self.endpoint)
            raise RepositoryNotFoundError("404", response=Response(404, request=asked))
        there = self.repositories[name]
        files = [SimpleNamespace(rfilename=file) for file in there["files"]]
        return SimpleNamespace(private=there["private"], siblings=files, sha=str(there["commits"]))

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        assert name not in self.repositories
        self.repositories[name] = {"private": private, "files": {".gitattributes": b""}, "commits": 0}

    def hf_hub_download(self, name: str, file: str, revision: str, local_dir: str) -> str:
        path = Path(local_dir) / file
        path.write_bytes(self.repositories[name]["files"][file])
        return str(path)

    def create_commit(self, name: str, operations: list[Any], commit_message: str, parent_commit: str) -> Any:
        there = self.repositories[name]
        assert parent_commit == str(there["commits"])
        for one in operations:
            if type(one).__name__ == "CommitOperationDelete":
                del there["files"][one.path_in_repo]
            else:
                given = one.path_or_fileobj
                there["files"][one.path_in_repo] = given if isinstance(given, bytes) else Path(given).read_bytes()
        there["commits"] += 1
        return SimpleNamespace(repo_url=f"{self.endpoint}/{name}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return fake


def to_hub(run: Path, *more: str) -> int:
    return main(["push", str(run / "dpo"), "hub:me/assistant", *LICENCE, *more])


def test_the_stand_in_is_asked_as_the_real_one_can_be() -> None:
    import inspect

    from huggingface_hub import HfApi

    for name, words in (
        ("model_info", ()),
        ("create_repo", ("private", "exist_ok")),
        ("hf_hub_download", ("filename", "revision", "local_dir")),
        ("create_commit", ("operations", "commit_message", "parent_commit")),
    ):
        inspect.signature(getattr(HfApi, name)).bind(None, "me/it", **dict.fromkeys(words))


def test_a_push_to_the_hub(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert to_hub(run, "--dry-run") == 0
    assert hub.repositories == {}
    assert to_hub(run) == 0
    there = hub.repositories["me/assistant"]
    assert there["private"]
    assert "private" in capsys.readouterr().out
    pushed(run, "dpo")
    same = {file.name for file in Path("../out").iterdir()}
    assert set(there["files"]) == same | {".gitattributes"}
    assert "vllm serve me/assistant" in there["files"]["README.md"].decode()
    # Again: Keel's own is replaced, with what it has no more taken out.
    mark = json.loads(there["files"]["keel.json"])
    mark["files"]["old.safetensors"] = "x"
    there["files"] |= {"keel.json": json.dumps(mark).encode(), "old.safetensors": b"", "theirs.txt": b""}
    assert to_hub(run) == 0
    assert there["commits"] == 2
    assert set(there["files"]) == same | {".gitattributes", "theirs.txt"}


def test_what_the_hub_refuses_changes_nothing_and_tells_no_secret(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["me/assistant"] = {"private": True, "files": {"README.md": b"mine"}, "commits": 3}
    assert to_hub(run) == 2
    assert "--force" in capsys.readouterr().err
    assert hub.repositories["me/assistant"]["commits"] == 3
    hub.repositories["me/assistant"]["private"] = False  # anybody's to read, and private is the default
    assert to_hub(run, "--force") == 2
    assert "--public" in capsys.readouterr().err
    assert to_hub(run, "--force", "--public") == 0
    hub.fails = f"401 for the token {SECRET}\nsecond line"
    assert to_hub(run) == 2
    everything = "".join(capsys.readouterr())
    assert "401" in everything
    assert SECRET not in everything
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert to_hub(run) == 2
    assert "no token" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- serve


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], str]:
    """(the command, the notes) of ``keel serve``."""
    assert main(["serve", *words]) == 0
    line, *notes = capsys.readouterr().out.splitlines()
    return shlex.split(line), "\n".join(notes)


def test_what_serves_a_policy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, notes = said(capsys, "run/dpo")
    assert command[:3] == ["vllm", "serve", "run/dpo"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--dtype"] == "float32"  # vLLM's auto would halve it
    assert options["--host"] == "127.0.0.1"
    assert notes == ""
    edit(run / "dpo" / "generation_config.json", lambda tree: tree.update(eos_token_id=0))  # the turn's end is 5
    edit(run / "dpo" / "config.json", lambda tree: tree.update(dtype="bfloat16"))
    command, notes = said(capsys, "run/dpo", "--host", "0.0.0.0")
    assert command[command.index("--dtype") + 1] == "bfloat16"
    assert '"stop_token_ids": [5]' in notes
    assert "VLLM_API_KEY" in notes
    command, _ = said(capsys, "run/dpo", "--engine", "transformers", "--port", "9000")
    assert command == shlex.split("transformers serve run/dpo --dtype bfloat16 --host 127.0.0.1 --port 9000")
    (run / "dpo" / "chat_template.jinja").unlink()
    assert "/v1/completions" in said(capsys, "run/dpo")[1]
    assert main(["serve", "run/dpo", "--engine", "transformers"]) == 2


def test_what_serves_adapters_reward_models_and_remote_code(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, notes = said(capsys, "run/reward")
    config = json.loads((run / "reward" / "config.json").read_text())["keel_reward"]
    assert json.loads(command[command.index("--pooler-config") + 1]) == {
        "use_activation": False, "logit_mean": config["mean"], "logit_sigma": config["std"],
    }  # fmt: skip
    assert command[command.index("--convert") + 1] == "classify"
    assert "/classify" in notes
    assert main(["serve", "run/reward", "--engine", "transformers"]) == 2
    assert main(["serve", "run/dpo", "--adapter"]) == 2
    adapter = run / "dpo" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base", "r": 9}))
    edit(run / "manifest.json", lambda tree: tree["recipe"]["model"].update(trust_remote_code=True))
    command, _ = said(capsys, "run/dpo", "--adapter")
    assert command[:3] == ["vllm", "serve", "base"]
    assert command[command.index("--max-lora-rank") + 1] == "16"
    assert command[command.index("--lora-modules") + 1] == "dpo=run/dpo/adapter"
    assert "--trust-remote-code" in command
    edit(adapter / "adapter_config.json", lambda tree: tree.update(r=1024))
    assert main(["serve", "run/dpo", "--adapter"]) == 2
    assert "rank 512" in capsys.readouterr().err


def test_run_becomes_the_command_or_says_what_to_install(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    assert main(["serve", "run/dpo", "--run"]) == 2
    assert "pip install" in capsys.readouterr().err
    ran: list[Any] = []
    monkeypatch.setattr("shutil.which", lambda name, path: f"/bin/{name}")
    monkeypatch.setattr("os.execv", lambda program, command: ran.append((program, command[:2])))
    main(["serve", "run/dpo", "--run"])
    assert ran == [("/bin/vllm", ("vllm", "serve"))]
