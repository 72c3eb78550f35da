"""The command line: exit codes, messages, what is shown. Whole runs in subprocesses, on a tiny random model."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import tiny_llama, tiny_tokenizer
from transformers import BertConfig, BertLMHeadModel, Lfm2Config, Lfm2ForCausalLM, PreTrainedModel

from keel.check import preflight
from keel.cli import main
from keel.cli.chat import stream_ids, stream_text
from keel.cli.commands import COMMANDS
from keel.cli.finished import Answering, answering, find_model
from keel.cli.live import Progress, closing
from keel.cli.process import MALLOC, restart_with_malloc_settings
from keel.data.chat import Chat, install_template
from keel.pipeline.run import run_pipeline
from keel.recipe.recipe import Recipe
from keel.recipe.sections import SamplingConfig, Source
from keel.run import RunDir, Silent
from keel.stages.registry import RUNNERS
from keel.types import Message, UserError

RECIPE = """\
model: {{path: {folder}/model}}
data: {{demonstrations: {folder}/demos.jsonl, max_length: 64, heldout_fraction: 0.2}}
device: cpu
threads: 1
stages:
  - {{kind: sft, name: sft, model: base, epochs: 2, batch_size: 4, precision: fp32, save_every_seconds: 0,
     optim: {{lr: 1e-3}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, demonstrations and a recipe."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer()
    install_template(tokenizer, "keel")
    tiny_llama().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"what is port {i}", "completion": f"a good ship {i}"} for i in range(40)]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.wide)])
def test_a_run_that_is_stopped_and_run_again_ends_with_the_same_weights(
    how: signal.Signals,
    folder: Path,
    tmp_path: Path,
    keel_command: list[str],
    subprocess_env: dict[str, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By Ctrl-C, which is exit code 130. Stages are killed in test_train.py."""
    run = ["run", str(folder / "recipe.yaml"), "sft.epochs=12"]  # a second or two, in which it can be stopped
    assert main([*run, "--out", str(tmp_path / "whole")]) == 0
    said = capfd.readouterr().out
    assert "sft: started" in said
    assert "What each stage did" in said
    assert f"results: {tmp_path / 'whole'}" in said
    assert "computing with" in said

    stopped = RunDir(tmp_path / "stopped")
    for _ in range(5):  # on a busy machine the run may end before this process looks again
        process = subprocess.Popen(
            [*keel_command, *run, "--out", str(stopped.path)],
            env=subprocess_env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background job ignores SIGINT, and so do its children unless told otherwise
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        state = stopped.path / "sft" / "state" / "state.pt"
        while not state.exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(how)
        said, errors = process.communicate()
        if state.exists():  # a stage that is done has none
            break
        shutil.rmtree(stopped.path)
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        assert said.count("restarting once") == (sys.platform == "linux" and not os.path.exists("/dev/nvidiactl"))
        assert "interrupted; run the same command to resume" in errors
        assert "Traceback" not in errors
        assert stopped.stage("sft").load_state() is not None
    assert main([*run, "--out", str(stopped.path)]) == 0
    assert "resumed at" in capfd.readouterr().out
    whole, again = (tmp_path / name / "sft" / "model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == again.read_bytes()
    rows = [
        [json.loads(line) for line in (tmp_path / n / "sft" / "metrics.jsonl").open()] for n in ("whole", "stopped")
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == list(range(len(rows[0])))


def test_a_second_run_and_a_single_stage_of_it(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(folder / "recipe.yaml"), "sft.epochs=0.2", "--out", str(tmp_path)]
    assert main(words) == 0
    assert "sft: started" in capfd.readouterr().out
    assert main(words) == 0
    text = capfd.readouterr().out
    assert "sft: up to date" in text
    assert "sft: started" not in text
    # A single stage without a recipe takes the run's own, its settings too.
    assert main(["sft", "sft.patience=9", "--out", str(tmp_path)]) == 0
    stage = RunDir(tmp_path).manifest.read()["recipe"]["stages"][0]
    assert (stage["epochs"], stage["patience"]) == (0.2, 9)


# ------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml", "--out", "OUT"], "nowhere.yaml: cannot read this recipe"),
        (["run", "RECIPE", "sft.optim.learning=1", "--out", "OUT"], "there is no such setting"),
        (["run", "RECIPE", "data.demonstrations=nowhere.jsonl", "--out", "OUT"], "nowhere.jsonl"),
        (["run", "RECIPE", "data.demonstrations=null", "--out", "OUT"], "data.demonstrations"),
        (["run", "RECIPE", "model.path=./nowhere", "--out", "OUT"], "nowhere: no such folder"),
        (["run", "RECIPE", "data.max_length=8", "--out", "OUT"], "data.max_length = 8"),
        (["run", "RECIPE", "sft.model=sfft", "--out", "OUT"], "'sfft' is neither a stage nor a file"),
        (["run", "RECIPE", "device=cuda:7", "--out", "OUT"], "device: cuda:7 does not exist"),
        (["run", "RECIPE", "sft.optim.lr=1e30", "sft.optim.max_grad_norm=1e30", "--out", "OUT"], "sft: "),
        (["run", "RECIPE", "--out", "RECIPE"], "cannot be used as a run directory"),
        (["run", "a=b", "--out", "OUT"], "keel run needs a recipe"),
        (["dpo", "RECIPE", "--out", "OUT"], "this recipe has no stage of kind dpo"),
        (["demo", "RECIPE", "--out", "OUT"], "keel demo has a recipe of its own"),
        (["report", "--out", "OUT"], "no run lies here"),
        (["chat", "OUT/nowhere/at/all"], "no such folder"),
        (["chat", "DIR", "--stage", "sft"], "not a run directory"),
    ],
)
def test_wrong_input_is_one_clear_error_and_exit_code_2(
    folder: Path, tmp_path: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"RECIPE": str(folder / "recipe.yaml"), "OUT": str(tmp_path / "out"), "DIR": str(tmp_path)}
    words = [places.get(word, word.replace("OUT/", places["OUT"] + "/")) for word in arguments]
    assert main(words) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("keel: ")
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["run"], ["run", "r.yaml"], ["demo", "--seed", "-1"], ["run", "r", "--out", "o", "--x"]],
)
def test_wrong_arguments_are_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: keel" in capsys.readouterr().err


def test_a_disk_that_is_full_from_the_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even the lock file cannot be written then."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("keel.run.rundir.os.getpid", full)
    assert main(["run", str(folder / "recipe.yaml"), "--out", str(tmp_path)]) == 2
    assert f"keel: {tmp_path}: the disk is full; what was saved before is intact" in capfd.readouterr().err


def test_two_runs_in_one_folder(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunDir(tmp_path).lock():
        assert main(["run", str(folder / "recipe.yaml"), "--out", str(tmp_path)]) == 2
    assert f"another run (process {os.getpid()}) is at work here" in capfd.readouterr().err


@pytest.mark.parametrize(
    "manifest", [{"name": "a browser's extension"}, {"recipe": {"stages": "none"}}, {"recipe": {"stages": [{}]}}]
)
def test_a_folder_of_another_program(
    manifest: dict[str, object], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps(manifest)
    (tmp_path / "manifest.json").write_text(text)
    commands = [["chat", str(tmp_path)], ["label", str(tmp_path)], ["sft", "--out", str(tmp_path)]]
    if "recipe" not in manifest:
        commands.append(["run", str(folder / "recipe.yaml"), "--out", str(tmp_path)])
    for command in commands:
        assert main(command) == 2
        error = capfd.readouterr().err
        assert error.startswith("keel: ")
        assert "Traceback" not in error
    assert (tmp_path / "manifest.json").read_text() == text


def test_a_file_that_is_gone_is_named(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def gone(_: object) -> int:
        return len((tmp_path / "truth.json").read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMMANDS, "check", gone)
        assert main(["check", str(folder / "recipe.yaml")]) == 2
    sentence = "no such file or folder; name another, or redo what makes it"
    assert capfd.readouterr().err == f"keel: {tmp_path}/truth.json: {sentence}\n"


# --------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("kind", ["sft", "sample", "annotate", "reward", "ppo", "grpo", "dpo", "eval", "report"])
def test_a_stages_help_lists_its_settings(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([kind, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    expected = {
        "sft": "patience",
        "ppo": "kl.coef",
        "grpo": "group_size",
        "eval": "bootstrap",
        "report": "title",
        "sample": "sampling.top_p",
    }
    assert expected.get(kind, "") in text
    assert "data.max_length" in text
    assert "tokens of prompt and completion together" in text


# -------------------------------------------------------------------------------------------------------- check


def test_check_finds_nothing_wrong_with_a_good_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder / "recipe.yaml"), "--out", str(folder / "none")]) == 0
    text = capsys.readouterr().out
    assert "only 40 records" in text  # a warning
    assert "0 errors" in text
    assert "sft: todo (not run yet)" in text


def test_check_counts_what_is_too_long_and_what_leaks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"prompt": "what is port 3"}\n{"prompt": "what is new"}\n')
    words = ["check", str(folder / "recipe.yaml"), f"data.heldout_prompts={heldout}", "data.max_length=12"]
    assert main(words) == 2
    text = capsys.readouterr().out
    assert "40 of 40 records are longer than data.max_length = 12 tokens" in text
    assert "1 of 2 are in the demonstrations or preferences too" in text


@pytest.mark.parametrize("there", [True, False])
def test_check_names_packages_that_are_missing(
    there: bool, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extras, find_spec = ("bitsandbytes", "vllm"), importlib.util.find_spec

    def found(name: str, package: str | None = None) -> object:
        return (there or None) if name in extras else find_spec(name, package)

    monkeypatch.setattr("importlib.util.find_spec", found)
    (folder / "sampled.yaml").write_text(
        (folder / "recipe.yaml").read_text()
        + "  - {kind: sample, name: sample, model: sft, prompts: none.jsonl, sampling: {backend: vllm}}\n"
    )
    status = main(["check", str(folder / "sampled.yaml"), "sft.optim.kind=adamw8bit"])
    text = capsys.readouterr().out
    for package in extras:
        assert (f"needs the package {package}" in text) is not there
    assert there or status == 2


def test_check_sees_a_reference_that_is_not_the_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tiny_llama(seed=1).save_pretrained(other)
    tokenizer = tiny_tokenizer()
    install_template(tokenizer, "keel")
    tokenizer.save_pretrained(other)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {folder}/model}}\ndata: {{preferences: {tmp_path}/pairs.jsonl, max_length: 64}}\n"
        f"stages: [{{kind: dpo, name: dpo, model: base, reference: {other}}}]\n"
    )
    main(["check", str(tmp_path / "r.yaml")])
    assert "policy and reference differ by" in capsys.readouterr().out
    main(["check", str(tmp_path / "r.yaml"), f"dpo.reference={folder / 'model'}"])
    assert "policy and reference differ by" not in capsys.readouterr().out


def test_check_says_on_which_road_the_model_is_computed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short convolutions run padded, which is a warning; an encoder is an error."""

    def checked(model: PreTrainedModel, name: str) -> tuple[int, str]:
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        status = main(["check", str(folder / "recipe.yaml"), f"model.path={tmp_path / name}"])
        return status, " ".join(capsys.readouterr().out.split())

    shape = {"vocab_size": len(tiny_tokenizer()), "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    small = {**shape, "num_hidden_layers": 2, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    status, text = checked(Lfm2ForCausalLM(Lfm2Config(**small)), "lfm2")
    assert (status, "it runs with padding, which is slower" in text) == (0, True)
    status, text = checked(BertLMHeadModel(BertConfig(**shape, num_hidden_layers=1)), "bert")
    assert (status, "BertLMHeadModel is not causal" in text) == (2, True)


# ------------------------------------------------------------------------------------------------------ display


def test_progress_without_a_terminal_writes_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("keel.cli.live.PLAIN_EVERY", 0.0)
    with Progress(["sft", "ppo"], Console(file=out, force_terminal=False, width=40)) as progress:
        progress.finished_before("sft")
        with progress.stage("ppo"):
            progress.start("ppo", 4)
            progress.advance(1, **{"objective/kl": 0.25, "lr": 1.0, "objective/scores": 2.0})
            progress.note("[a note]")
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["sft: up to date", "ppo: started"]
    assert lines[2].startswith("ppo: ppo 1/4 scores=2  kl=0.25  lr=1")
    assert lines[3] == "[a note]"
    assert lines[4].startswith("ppo: done in")
    assert "\x1b" not in out.getvalue()


def test_progress_on_a_terminal_shows_every_stage() -> None:
    out = io.StringIO()
    with Progress(["sft", "ppo"], Console(file=out, force_terminal=True, width=100)) as progress, progress.stage("sft"):
        progress.start("sft", 10)
        progress.advance(3, loss=1.5)
    assert "sft" in out.getvalue()
    assert "ppo" in out.getvalue()
    assert "loss=1.5" in out.getvalue()


def test_the_closing_table_shows_the_models() -> None:
    out = io.StringIO()
    summary = {
        "stages": {"sft": {"gold_reward": 0.5, "win_rate_vs_sft": None}, "dpo": {"win_rate_vs_sft": [0.8, 0.7, 0.9]}}
    }
    Console(file=out, width=120).print(closing([("sft", {"seconds": 75}, {"steps": 9})], summary))
    assert "80% [70, 90]" in out.getvalue()
    assert "1:15 min" in out.getvalue()
    assert "steps 9" in out.getvalue()
    assert "wins against sft" in out.getvalue()


def test_the_closing_table_names_the_baseline_that_the_recipe_named() -> None:
    out = io.StringIO()
    tuned = {"win_rate_vs_base": [0.8, 0.7, 0.9], "kl_to_base": -0.004, "gold_reward": -0.001}
    summary = {"stages": {"base": {"kl_to_base": 0.0, "gold_reward": 1.0}, "tuned": tuned}, "baseline": "base"}
    entry = {"seconds": 1}
    sampled = {"fingerprint": "0123abc", "prompts": 9}
    Console(file=out, width=120).print(closing([("sample", entry, sampled)], summary))
    shown = out.getvalue()
    assert "wins against base" in shown
    assert "80% [70, 90]" in shown
    assert "KL to base" in shown
    assert "-0.0" not in shown
    assert "0123abc" not in shown


def test_what_the_first_stage_warned_of_is_not_said_again(folder: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    stages = [
        {"kind": "sft", "name": "sft", "epochs": 1},
        {"kind": "sft", "name": "more", "model": "sft", "epochs": 1},
        {"kind": "sft", "name": "other", "epochs": 1},
    ]
    data = {"demonstrations": str(folder / "demos.jsonl"), "max_length": 64}
    recipe = Recipe.model_validate({"model": {"path": str(tmp_path / "model")}, "data": data, "stages": stages})

    said: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    run_pipeline(recipe, RunDir(tmp_path / "run"), RUNNERS, Notes(), None, preflight)
    assert len([note for note in said if "pad and eos are one token" in note]) == 1


# --------------------------------------------------------------------------------------------------------- chat


def test_chat_streams_what_generate_would_say(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = tiny_tokenizer()
    install_template(tokenizer, "keel")
    chat = Chat(tokenizer)
    ids = chat.encode_prompt([Message("user", "what is a good ship")])
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=list(chat.stop_ids)
        )
    reply = [t for t in expected[0, len(ids) :].tolist() if t not in chat.stop_ids]
    assert list(stream_ids(model, ids, chat.stop_ids, SamplingConfig(temperature=0.0, max_new_tokens=12))) == reply
    # each of these leaves the likeliest token alone
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999999}):
        narrow = SamplingConfig(temperature=1.0, max_new_tokens=12, **only)
        assert list(stream_ids(model, ids, chat.stop_ids, narrow)) == reply
    assert "".join(stream_text(chat, iter(reply))) == chat.decode(reply)


def test_streamed_text_waits_for_whole_characters() -> None:
    chat = Chat(tiny_tokenizer())
    ids = chat.tokenizer("a é 船 b", add_special_tokens=False)["input_ids"]
    parts = list(stream_text(chat, iter(ids)))
    assert "".join(parts) == "a é 船 b"
    assert not any("\ufffd" in part for part in parts)


def test_chat_talks_to_the_last_model_with_a_keel(tmp_path: Path) -> None:
    reward = {"source": {"kind": "python", "ref": "r.py:f"}}
    recipe = Recipe.model_validate(
        {
            "model": {"path": "./base"},
            "stages": [
                {"kind": "sft", "name": "sft"},
                {"kind": "ppo", "name": "ppo", "rewards": [reward]},
                {"kind": "ppo", "name": "ppo_no_kl", "rewards": [reward], "kl": {"coef": 0}},
            ],
        }
    )
    run = RunDir(tmp_path)
    run.manifest.update({"recipe": recipe.model_dump(mode="json")})
    assert find_model(str(tmp_path), None) == ("base", Source("./base"))
    for name in ("sft", "ppo", "ppo_no_kl"):
        run.stage(name).begin("f")
        run.stage(name).finish({})
    assert find_model(str(tmp_path), None) == ("ppo", Source(str(tmp_path / "ppo")))
    assert find_model(str(tmp_path), "ppo_no_kl") == ("ppo_no_kl", Source(str(tmp_path / "ppo_no_kl")))
    with pytest.raises(UserError, match="no finished stage 'dpo' to talk to; there are base, sft, ppo, ppo_no_kl"):
        find_model(str(tmp_path), "dpo")


def test_a_model_answers_as_its_recipe_says(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the recipe's device, by the sampling of the evaluation that compares it; else by its own stage's."""
    reward = {"source": {"kind": "python", "ref": "r.py:f"}}
    compared = {"top_p": 0.9, "min_p": 0.05, "stop": ["."], "max_new_tokens": 20}
    stages = [
        {"kind": "sft", "name": "sft"},
        {"kind": "ppo", "name": "ppo", "rewards": [reward], "sampling": {"stop": ["!"]}},
        {"kind": "ppo", "name": "other", "rewards": [reward], "sampling": {"stop": ["?"]}},
        {"kind": "eval", "name": "eval", "models": ["sft", "ppo"], "judge": reward["source"], "sampling": compared},
    ]
    recipe = {"model": {"path": str(folder / "model")}, "device": "cuda:99", "stages": stages}
    RunDir(tmp_path).manifest.update({"recipe": Recipe.model_validate(recipe).model_dump(mode="json")})
    assert answering(str(tmp_path), "ppo") == Answering("cuda:99", SamplingConfig(**compared))
    assert answering(str(tmp_path), "other").sampling.stop == ["?"]
    assert answering(str(tmp_path), "base") == Answering("cuda:99", SamplingConfig())  # nothing samples from it
    assert answering(str(folder / "model"), "base") == Answering()
    assert main(["chat", str(tmp_path), "--stage", "base"]) == 2
    assert "cuda:99 does not exist" in capsys.readouterr().err


def test_chat_ends_at_the_recipes_stop_token(folder: Path) -> None:
    from keel.cli.chat import Talker

    greedy = SamplingConfig(temperature=0.0, max_new_tokens=12)
    asked = [Message("user", "what is a good ship")]
    said = "".join(Talker(Source(str(folder / "model")), greedy, "cpu").reply(asked))
    chat = Chat(tiny_tokenizer())
    ids = chat.tokenizer(said, add_special_tokens=False)["input_ids"]
    stop = chat.decode([ids[3]])
    short = "".join(
        Talker(Source(str(folder / "model")), greedy.model_copy(update={"stop": [stop]}), "cpu").reply(asked)
    )
    assert said.startswith(short)
    assert stop not in short
    assert len(short) < len(said)


def test_chat_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what is a ship\n/system yes\nwhat\n/reset\n/help\n/quit\n"))
    assert main(["chat", str(folder / "model"), "--max-new-tokens", "5", "--temperature", "0"]) == 0
    text = capsys.readouterr().out
    assert text.count("a new conversation") == 2
    assert "/reset starts anew" in text


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="malloc is set for glibc alone")
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="with a GPU malloc is left alone")
def test_malloc_is_set_once_and_what_a_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    restarts: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda program, arguments, environment: restarts.append(environment))
    for name in MALLOC:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    restart_with_malloc_settings()
    assert [restarts[0][name] for name in MALLOC] == [*list(MALLOC.values())[:-1], "4"]
    monkeypatch.setattr(os, "environ", restarts[0])
    restart_with_malloc_settings()
    assert len(restarts) == 1
    monkeypatch.setattr(os, "environ", {"MALLOC_TOP_PAD_": "0"})
    restart_with_malloc_settings()
    assert len(restarts) == 1
