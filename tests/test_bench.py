"""The bench: turns and tables with workers that are not libraries at all, and the count of operations against torch's
own counter. Nothing is timed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from bench import __main__ as command
from bench import harness, report, work
from bench.contenders import PEERS, Contender, contenders
from bench.cost import Limits, Phase, causal, forward_flops, phases
from bench.growth import NAMES, curves
from bench.machine import Watch
from bench.models import model_folder, word_tokenizer
from bench.work import EOS, GRPO_FAMILY, SHAPES, WORK, Job, Shape, Work
from bench.workers import keel

LIMITS = Limits({"fp32": 1e9, "bf16": 2e9}, 1e9)
SFT = Work("sft", 8, 4, prompt=(2, 4), reply=(3, 5))

FAKE = """
import json, sys, time
from pathlib import Path
from bench.work import Job
from bench.worker import Outcome, Unsupported, serve

def prepare(job):
    if job.settings.get("broken") == "at start":
        raise Unsupported("no such thing here")
    print("libraries talk on stdout")
    done = []
    def run(work):
        done.append(work.examples)
        if job.settings.get("broken") == "later" and len(done) > 2:
            raise RuntimeError("out of paper")
        with Path(job.settings["diary"]).open("a") as diary:
            diary.write(f"{job.settings['name']} {work.examples}\\n")
        return Outcome(100, job.settings["seconds"] * (1 + 0.1 * (len(done) == 2)), "fp32", {"all": 1.0})
    return run

serve(prepare)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Contender]:
    """Makes contenders that write down when they were asked to do what, and take as long as they are told to say."""
    (tmp_path / "fake_worker.py").write_text(FAKE)
    monkeypatch.setattr(harness, "python_of", lambda _: sys.executable)
    monkeypatch.setattr(harness, "FOLDER", tmp_path / "bench")
    real = harness.environment

    def environment(contender: Contender, threads: int) -> dict[str, str]:
        found = real(contender, threads)
        return {**found, "PYTHONPATH": f"{tmp_path}:{found['PYTHONPATH']}"}

    monkeypatch.setattr(harness, "environment", environment)

    def make(name: str, seconds: float, broken: str = "", ours: bool = False) -> Contender:
        settings = {"name": name, "seconds": seconds, "broken": broken, "diary": str(tmp_path / "diary")}
        return Contender(name, "keel" if ours else "peer", "fake_worker", settings)

    return make


def jobs(contender: Contender) -> Job:
    return Job("S", "nowhere", SFT, "cpu", 1, contender.settings)


def test_contenders_take_turns_and_their_ratios_are_paired(fake: Callable[..., Contender], tmp_path: Path) -> None:
    who = [fake("Keel", 1.0, ours=True), fake("Peer", 4.0), fake("Other", 2.0)]
    found = harness.compare(who, jobs, 2, LIMITS, lambda _: None)
    diary = (tmp_path / "diary").read_text().split("\n")
    # A short warm-up of each, one optimizer step long; then turns over the whole work.
    assert diary[:3] == ["Keel 4", "Peer 4", "Other 4"]
    assert diary[3:9] == ["Keel 8", "Peer 8", "Other 8"] * 2
    # The first repetition is said to take a tenth longer for everybody: rates differ, paired ratios do not.
    assert found["contenders"]["Peer"]["rates"] == pytest.approx([100 / 4.4, 100 / 4.0])
    by_peer = {r["peer"]: r for r in found["ratios"]}
    assert by_peer["Peer"]["ratio"] == pytest.approx(4.0)
    assert by_peer["Peer"]["low"] == pytest.approx(by_peer["Peer"]["high"])
    assert by_peer["Other"]["ratio"] == pytest.approx(2.0)
    assert {r["ours"] for r in found["ratios"]} == {"Keel"}
    assert found["contenders"]["Keel"]["peak_mb"] > 0
    assert found["contenders"]["Keel"]["parts"] == {"all": 1.0}


def test_a_peer_that_fails_is_reported_and_the_others_go_on(fake: Callable[..., Contender]) -> None:
    who = [fake("Keel", 1.0, ours=True), fake("Absent", 1.0, "at start"), fake("Tired", 1.0, "later")]
    said: list[str] = []
    found = harness.compare(who, jobs, 3, LIMITS, said.append)
    rows = found["contenders"]
    assert rows["Absent"]["problem"] == "no such thing here"
    assert rows["Tired"]["problem"] == "RuntimeError: out of paper"
    assert len(rows["Keel"]["rates"]) == 3
    assert any("Absent: no such thing here" in line for line in said)


def test_tables_and_plots_show_every_contender(fake: Callable[..., Contender], tmp_path: Path) -> None:
    who = [fake("Keel", 1.0, ours=True), fake("Peer", 4.0), fake("Absent", 1.0, "at start")]
    found = harness.compare(who, jobs, 1, LIMITS, lambda _: None)
    machine = {"flops": LIMITS.flops, "bandwidth": 1e9, "device": "a machine", "threads": 1, "torch": "2"}
    point = {"x": 64, "rates": {"Keel": 9}, "peak_mb": {"Keel": 700}, "problems": {"Peer": "out of paper"}}
    growth = {"when": "now", "machine": machine, "title": "By length", "x_label": "tokens", "points": [point]}
    memory = {**growth, "title": "Memory by length", "shows": "peak_mb"}
    for name, content in (
        ("sft", {"task": "sft", "models": {"S": {"machine": machine, **found}}}),
        ("growth", {"series": {"length": {**growth, "shows": "rates"}, "memory": memory}}),
    ):
        (tmp_path / f"{name}-cpu.json").write_text(json.dumps(content))
    assert report.devices(tmp_path) == ["cpu"]
    tables, page = report.write(tmp_path, "cpu")
    assert "**4.00** (4.00–4.00)" in tables.read_text()
    assert "not measured: no such thing here" in tables.read_text()
    assert "| tokens | Keel | Peer |\n|---|---|---|\n| 64 | 9 | not measured: out of paper |" in tables.read_text()
    assert "| 64 | 700 | not measured: out of paper |" in tables.read_text()
    assert "By length" in page.read_text()
    assert "a second against tokens, as a power of two: Keel from 9 to 9." in page.read_text()
    assert "MiB against tokens, as a power of two: Keel from 700 to 700." in page.read_text()
    assert "Peer" in page.read_text()


def test_a_run_of_everything_names_every_task_and_peer(tmp_path: Path) -> None:
    for task in WORK:
        names = [c.name for c in contenders(task, "S", tmp_path / "none.json", "cpu")]
        assert names[0] == "Keel fp32"
        assert len(names) == len(set(names))
        assert [n for n in names if not n.startswith("Keel")], f"{task} has no peer"
    assert {task for peer in PEERS for task in peer.tasks} == set(WORK)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> command.Bench:
    """A bench whose contenders' rates are made up: the length of the settings' text. None does pairs of 512 tokens
    but ours."""
    machine = {"flops": LIMITS.flops, "bandwidth": 1e9, "device": "a machine", "threads": 1, "torch": "2"}
    monkeypatch.setattr(command, "measure_limits", lambda *_: (LIMITS, machine))
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "model_folder", lambda name, root: root / name)

    def compare(who: list[Contender], job_of: Callable[[Contender], Job], *_: object) -> dict[str, object]:
        assert all(Job.from_json(job_of(c).to_json()) == job_of(c) for c in who)
        small = [c for c in who if c.ours or job_of(c).work.task != "dpo" or job_of(c).work.context < 512]
        rows = {c.name: {"rate": float(len(str(c.settings))), "peak_mb": 700.0} for c in small}
        return {"contenders": {c.name: {"problem": "too long"} for c in who} | rows, "ratios": []}

    monkeypatch.setattr(command, "compare", compare)
    monkeypatch.setattr(sys, "argv", ["bench", "--repeat", "1"])
    return command.Bench(command.parse())


def test_curves_are_measured_and_drawn(bench: command.Bench) -> None:
    bench.growth()
    series = json.loads((bench.folder / "growth-cpu.json").read_text())["series"]
    assert [point["x"] for point in series["length"]["points"]] == [64, 128, 256, 512, 1024, 2048]
    assert set(series["length"]["points"][0]["rates"]) == {"Keel bf16", "TRL, best"}
    assert {point["model"] for point in series["size"]["points"]} == {"S", "SM", "M"}
    assert all(set(p["peak_mb"]) == set(p["rates"]) for curve in series.values() for p in curve["points"])
    first, last = series["memory"]["points"][0], series["memory"]["points"][-1]
    assert first["peak_mb"] == {"Keel bf16": 700, "TRL": 700}
    assert last["peak_mb"] == {"Keel bf16": 700}
    assert last["problems"] == {"TRL": "too long"}
    tables, page = report.write(bench.folder, "cpu")
    assert page.read_text().count("<polyline") >= 8
    assert "| 64 | 700 | 700 |" in tables.read_text()
    assert "| 512 | 700 | not measured: too long |" in tables.read_text()


def test_one_curve_measured_again_leaves_the_others(bench: command.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.growth()
    path = bench.folder / "growth-cpu.json"
    before = json.loads(path.read_text())["series"]
    path.write_text(json.dumps({"series": {name: {**curve, "when": "long ago"} for name, curve in before.items()}}))
    monkeypatch.setattr(sys, "argv", ["bench", "--task", "growth", "--curve", "memory"])
    command.main()
    after = json.loads(path.read_text())["series"]
    assert [name for name in after if after[name]["when"] != "long ago"] == ["memory"]
    assert {**after["memory"], "when": ""} == {**before["memory"], "when": ""}
    assert list(after) == list(before)


def test_curves_have_names_that_can_be_asked_for() -> None:
    assert [curve.name for curve in curves("cpu", quick=False)] == list(NAMES)
    assert {curve.name for curve in curves("cuda", quick=False)} < set(NAMES)


def test_a_curve_that_the_device_lacks_is_refused(bench: command.Bench) -> None:
    bench.device, bench.curves = "cuda", ["memory"]
    with pytest.raises(SystemExit, match="memory"):
        bench.growth()


def test_curves_keep_what_their_titles_say() -> None:
    (length, *_, memory) = curves("cpu", quick=False)
    assert {place.work.batch * place.work.context for place in length.places} == {4096}
    for place in memory.places:
        (pair, *_) = work.pairs(place.work, SHAPES[place.model].vocab)
        assert len(pair.prompt + pair.chosen) == len(pair.prompt + pair.rejected) == place.x
        assert place.work.batch == place.work.examples == 8  # one optimizer step


def test_tuning_keeps_the_fastest_candidate_and_it_is_used(bench: command.Bench) -> None:
    bench.tune("ppo", "S")
    kept = json.loads(bench.best_file.read_text())["TRL 1.12/ppo/S"]
    fastest = max(kept["tried"], key=kept["tried"].__getitem__)
    assert kept["tried"][fastest] > min(kept["tried"].values())
    chosen = contenders("ppo", "S", bench.best_file, "cpu")[-1]
    assert chosen.name == "TRL 1.12, best"
    assert chosen.malloc
    assert all(str(value) in fastest for value in chosen.settings.values() if not isinstance(value, bool))


def test_jobs_survive_the_way_to_the_worker() -> None:
    job = Job("S", "there", SFT, "cpu", 2, {"micro": 8})
    assert Job.from_json(job.to_json()) == job


def test_texts_are_as_long_as_their_ids() -> None:
    tokenizer = word_tokenizer(64)
    for pair in work.pairs(Work("dpo", 4, 2, (3, 5), (3, 5)), 64):
        assert pair.chosen[-1] == EOS
        assert tokenizer(work.text(pair.prompt + pair.chosen))["input_ids"] == pair.prompt + pair.chosen


def test_what_else_runs_is_seen() -> None:
    watch = Watch()
    found = watch.so_far()
    assert found["other_cores"] >= 0
    assert len(found["load"]) == 3


# ------------------------------------------------------------------------------------------------------- Keel's side

PARTS = {
    "dpo": {"reference", "training"},
    "ppo": {"sampling", "scoring", "log-probs and values", "updates"},
    "kto": {"reference", "training"},
    **{task: {"sampling", "scoring", "log-probs", "updates"} for task in GRPO_FAMILY},
}


@pytest.mark.parametrize("task", WORK)
def test_keel_does_every_task(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", tiny())
    little = replace(WORK[task], examples=16, batch=8, prompt=(2, 4), reply=(3, 5), group=min(WORK[task].group, 4))
    folder = model_folder("tiny", tmp_path)
    outcome = keel.prepare(Job("tiny", str(folder), little, "cpu", 1, {"batch_tokens": 64}))(little)
    assert outcome.units >= 16
    assert set(outcome.parts) == PARTS.get(task, set())
    assert all(seconds > 0 for seconds in outcome.parts.values())
    if outcome.parts:
        assert sum(outcome.parts.values()) == pytest.approx(outcome.seconds)


def test_grpos_reward_is_that_of_its_peer() -> None:
    assert keel.even_words("w2 w13 w20 <eos>") == 0.5  # as bench.workers.trl, which TRL's environment alone can import
    assert keel.even_words("") == 0.0


# -------------------------------------------------------------------------------------------------------------- costs


def tiny(kv_heads: int = 2, tied: bool = False) -> Shape:
    return Shape(vocab=50, hidden=16, layers=3, heads=4, kv_heads=kv_heads, ffn=24, tied=tied)


def llama(shape: Shape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("shape", [tiny(), tiny(kv_heads=4, tied=True)])
def test_operations_are_those_that_torch_counts(shape: Shape) -> None:
    model, length = llama(shape), 7
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, use_cache=False).logits.sum()
    # Eager attention multiplies the whole square, masked or not.
    ours = forward_flops(shape, length, length * length, length)
    assert forward.get_total_flops() == ours
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() == 2 * ours


@pytest.mark.parametrize("name", ["S", "M"])
def test_parameters_are_counted(name: str) -> None:
    with torch.device("meta"):
        model = llama(SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name].parameters
    assert round(SHAPES[name].parameters / 1e6, 1) == {"S": 3.4, "M": 29.9}[name]


def test_causal_pairs_by_hand() -> None:
    assert causal(3) == 1 + 2 + 3
    assert causal(2, before=3) == 4 + 5


def test_needs_by_hand() -> None:
    shape = tiny()
    one = Work("sft", 1, 1, prompt=(2, 2), reply=(3, 3))
    (phase,) = phases(one, shape, "fp32", 0)
    assert phase.flops == 3 * forward_flops(shape, 5, 15, 4)  # the last token predicts nothing that is learned
    assert phase.bytes == 40 * shape.parameters
    pair = Work("dpo", 1, 1, prompt=(2, 2), reply=(3, 3))
    (phase,) = phases(pair, shape, "fp32", 0)
    assert phase.flops == 4 * forward_flops(shape, 2 + 3 + 3, causal(2) + 2 * causal(3, 2), 6)


def test_decoding_reads_all_weights_for_each_step() -> None:
    shape = tiny()
    request = Work("sample_fixed", 4, 2, prompt=(2, 2), reply=(3, 3))
    prefill, decode = phases(request, shape, "bf16", units=12)
    layers = shape.layers * shape.layer_weights
    assert prefill.bytes == 2 * 2 * layers  # two rounds, two bytes a weight
    cache = 4 * causal(3, 2) * 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
    assert decode.bytes == 6 * 2 * (layers + shape.head_weights) + cache  # 12 tokens, two at a time
    assert decode.flops == forward_flops(shape, 12, 4 * causal(3, 2), 12)


def test_the_least_time_is_that_of_the_tighter_limit() -> None:
    limits = Limits({"fp32": 10.0}, bandwidth=5.0)
    assert limits.seconds([Phase(20, 0), Phase(10, 20)], "fp32") == 2 + 4
