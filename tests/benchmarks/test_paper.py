"""The paper's claims: counts exactly, verdicts where they follow from arithmetic, and the command. No timing."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import fastlora
from benchmarks.__main__ import main
from benchmarks.paper import command as paper
from benchmarks.paper import computed, measured, models
from benchmarks.paper.claims import DIFFERS, ERROR, HOLDS, MEASURED, NOT_MEASURED, Claim, Finding, Lab, printed
from benchmarks.paper.computed import counted
from benchmarks.paper.models import DECODERS, Decoder, adapt, build, count
from benchmarks.records.files import read
from benchmarks.records.rows import ClaimRow, from_json
from fastlora.memory import allocation

CPU = torch.device("cpu")
TINY = Lab(CPU, "tiny", "tiny", batch=2, sequence=8, rounds=2, seconds=0.0, inputs=((2, 3), (1, 128)), width=32)
NEEDS_TRANSFORMERS = {"formula"} | {name for name in paper.CLAIMS if "berta" in name}


def examined(name):
    if name in NEEDS_TRANSFORMERS:
        pytest.importorskip("transformers")
    return paper.CLAIMS[name].examine(TINY)


@pytest.mark.parametrize(
    ("architecture", "r", "trained"),
    [
        ("roberta-base", 8, 294_912),
        ("roberta-large", 8, 786_432),
        ("deberta-xxl", 8, 2_359_296),
        ("deberta-xxl", 16, 4_718_592),
        ("gpt2-medium", 4, 393_216),
        ("gpt2-large", 4, 737_280),
        ("gpt3", 1, 4_718_592),
        ("gpt3", 4, 18_874_368),
        ("gpt3", 8, 37_748_736),
    ],
)
def test_counts(architecture, r, trained):
    if "berta" in architecture:
        pytest.importorskip("transformers")
    assert counted(architecture, r).trained == trained


@pytest.mark.parametrize(
    ("name", "ours", "verdict"),
    [
        ("formula", "equal in all 18 counts", HOLDS),
        ("parameters-roberta-base-r8", "294,912 = 0.3M", HOLDS),
        ("parameters-roberta-large-r8", "786,432 = 0.8M", HOLDS),
        ("parameters-deberta-xxl-r8", "2,359,296 = 2.4M", DIFFERS),
        ("parameters-gpt2-medium-r4", "393,216 = 0.39M", DIFFERS),
        ("parameters-gpt2-large-r4", "737,280 = 0.74M", DIFFERS),
        ("parameters-gpt3-r1", "4,718,592 = 4.7M", HOLDS),
        ("parameters-gpt3-r8", "37,748,736 = 37.7M", HOLDS),
        ("budget", "18,874,368 = 19M", DIFFERS),
        ("size-gpt2", "354.82M, 774.03M", DIFFERS),
        ("size-gpt3", "174,604.3M", DIFFERS),
        ("fewer-parameters", "9,285× at r = 4, 37,142× at r = 1", HOLDS),
        ("checkpoint", "350.5 GB → 37.7 MB, 9,285×", DIFFERS),
        ("hundred-models", "354 GB against 35 TB", HOLDS),
        ("memory", "3.0×, 4.0×, 8.0×", HOLDS),
        ("memory-bytes", "1.1 TB, 1.4 TB, 2.8 TB → 351 GB", DIFFERS),
        ("speed-up", "+32.6% tokens/s, -24.6% time", HOLDS),
        ("one-product", "1 matrix product", HOLDS),
        ("quality", "-", NOT_MEASURED),
    ],
)
def test_verdicts(name, ours, verdict):
    row = examined(name)
    assert (row.ours, row.verdict) == (ours, verdict), row.note


def test_notes_name_the_rank_or_the_row_that_the_paper_printed():
    assert "4.7M would be r = 16." in examined("parameters-deberta-xxl-r8").note
    for name, figure in (("parameters-gpt2-medium-r4", "0.35M"), ("parameters-gpt2-large-r4", "0.77M")):
        note = examined(name).note
        assert f"No rank gives {figure}." in note
        assert "prefix-layer row" in note


def test_gpt3_is_counted_without_storage():
    model = build("gpt3")
    adapt(model, 1)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert allocation(lambda: adapt(build("gpt3"), 1), CPU).peak < 1 << 20


@pytest.mark.parametrize("name", ["gpt2-medium", "gpt2-large"])
def test_the_decoder_has_the_parameters_of_gpt2(name):
    transformers = pytest.importorskip("transformers")
    shape = DECODERS[name]
    with torch.device("meta"):
        theirs = transformers.GPT2Model(
            transformers.GPT2Config(n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads)
        )
    assert count(build(name).parameters()) == count(theirs.parameters())


def test_gpt2_has_the_adapters_that_loralib_gives_it():
    loralib = pytest.importorskip("loralib")
    merged = loralib.MergedLinear(1024, 3072, r=4, enable_lora=[True, False, True], fan_in_fan_out=True)
    theirs = sum(p.numel() for name, p in merged.named_parameters() if "lora_" in name)
    assert counted("gpt2-medium", 4).trained == 24 * theirs


def test_adapt_freezes_all_but_the_adapters():
    model = Decoder(DECODERS["tiny"])
    before = dict(model.named_parameters())
    layers = adapt(model, 2)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"blocks.{block}.{name}.lora_{letter}" for block, name, letter in product(range(2), "qv", "AB")
    ]
    assert layers[0].weight.data_ptr() == before["blocks.0.q.weight"].data_ptr()
    tokens = torch.randint(128, (2, 9))
    model.loss(tokens).backward()
    assert all(layer.lora_B.grad.any() for layer in layers)


@pytest.mark.parametrize("name", [name for name, claim in paper.CLAIMS.items() if claim.how == MEASURED])
def test_measured_claims_run(name):
    row = examined(name)
    assert row.verdict in ((NOT_MEASURED,) if name == "quality" else (HOLDS, DIFFERS)), row.note
    assert row.how == MEASURED
    assert row.note
    assert from_json(row.to_json()) == row


def test_memory_is_weights_gradients_and_moments():
    model = DECODERS["tiny"]
    total = count(Decoder(model).parameters())
    trained = 2 * 4 * model.width * 4
    moments = 2 * 4 * total
    note = examined("memory-held").note
    assert f"full fine-tuning {4 * total / 1e6:.1f} + {4 * total / 1e6:.1f} + {moments / 1e6:.1f} MB" in note
    assert f"LoRA {4 * (total + trained) / 1e6:.1f} + {4 * trained / 1e6:.1f} +" in note


def test_merged_runs_what_the_bare_layer_runs_and_unmerged_does_not():
    linear = torch.nn.Linear(16, 24)
    layer = fastlora.LoRALinear.from_linear(linear, r=2)
    x = torch.randn(3, 16)
    bare = measured.operators(linear, x)
    assert measured.products(bare) == 1
    assert measured.operators(layer, x) != bare
    assert measured.operators(layer.merge(), x) == bare


def test_a_merge_that_forgets_the_update_has_no_latency(monkeypatch):
    monkeypatch.setattr(fastlora.LoRALinear, "merge", lambda self: self.eval())
    monkeypatch.setattr(fastlora.LoRALinear, "forward", lambda self, x: F.linear(x, self.weight, self.bias))
    monkeypatch.setattr(measured, "require_accurate", lambda *_: None)
    row = examined("latency")
    assert (row.ours, row.verdict) == ("-", ERROR)
    assert "inaccurate, so no speed: y of the merged layer: rms error" in row.note


@pytest.mark.parametrize("name", ["latency", "throughput"])
def test_a_wrong_layer_has_no_speed(name, monkeypatch):
    forward = fastlora.LoRALinear.forward
    monkeypatch.setattr(fastlora.LoRALinear, "forward", lambda self, x: 1.01 * forward(self, x))
    row = examined(name)
    assert (row.ours, row.verdict) == ("-", ERROR)
    assert all(words in row.note for words in ("inaccurate, so no speed: y: rms error", "dx: ", "da: ", "db: "))


def test_switching_loads_the_other_adapter_and_stays_merged(tmp_path):
    model = Decoder(DECODERS["tiny"])
    layers = adapt(model, 2)
    files = []
    for name in "ab":
        for layer in layers:
            torch.nn.init.normal_(layer.lora_B)
        files.append(tmp_path / name)
        torch.save({key: p.detach() for key, p in model.named_parameters() if p.requires_grad}, files[-1])
    tokens = torch.randint(128, (1, 9))
    of_b = model.loss(tokens)
    for layer in layers:
        layer.merge()
    switch = measured.switch(model, files)
    switch()
    assert not torch.isclose(model.loss(tokens), of_b)
    switch()
    assert all(layer.merged for layer in layers)
    torch.testing.assert_close(model.loss(tokens), of_b)


def test_training_step_trains_the_adapters_alone():
    model = Decoder(DECODERS["tiny"])
    adapt(model, 2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    measured.training_step(model, 2, 8)[0]()
    assert all(
        torch.equal(p, before[name]) != p.requires_grad or "lora_A" in name for name, p in model.named_parameters()
    )


@pytest.mark.parametrize(
    ("value", "stated", "ours"),
    [
        (294_912, "0.3M", "0.3M"),
        (354_823_168, "354.92M", "354.82M"),
        (174_604_259_328, "175,255.8M", "174,604.3M"),
        (37.7e6, "35 MB", "38 MB"),
    ],
)
def test_printed(value, stated, ours):
    assert printed(value, stated) == ours


def test_printed_refuses_an_unknown_unit():
    with pytest.raises(ValueError, match="expected a number and one of M, MB, GB, TB, got '3 apples'"):
        printed(3, "3 apples")


def test_a_claim_that_raises_is_an_error_and_the_rest_go_on(monkeypatch, tmp_path, capsys):
    def broken(lab: Lab) -> Finding:
        raise RuntimeError("out of ink")

    claim = Claim("speed-up", "faster", "section 4.2", "25 %", "computed", broken)
    monkeypatch.setitem(paper.CLAIMS, "speed-up", claim)
    path = tmp_path / "paper.jsonl"
    assert main(["paper", "--claim", "speed-up", "checkpoint", "--json", str(path)]) == 1
    assert [row.verdict for row in read(path).rows] == [ERROR, DIFFERS]
    assert "RuntimeError: out of ink" in capsys.readouterr().out


def test_without_transformers_its_models_are_not_counted(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(models.importlib, "import_module", absent)
    counted.cache_clear()
    row = paper.CLAIMS["parameters-roberta-base-r8"].examine(TINY)
    assert row.verdict == NOT_MEASURED
    assert "transformers cannot be imported" in row.note
    assert paper.CLAIMS["parameters-gpt3-r1"].examine(TINY).verdict == HOLDS


def test_the_command_writes_a_readable_file_and_resumes(tmp_path, capsys, monkeypatch):
    path = tmp_path / "paper.jsonl"
    command = ["paper", "--claim", "parameters-gpt3-r1", "one-product", "--device", "cpu", "--json", str(path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "✓ once merged, one matrix product  [section 4.1]" in out
    assert "The paper's own arithmetic, 1 in all: ✓ 1 holds\nMeasured here, 1 in all: ✓ 1 holds\n" in out
    results = read(path)
    assert results.complete
    assert results.environment["command"] == "paper"
    assert [row.claim for row in results.rows] == [paper.CLAIMS[name].claim for name in command[2:4]]
    monkeypatch.setattr(computed, "counted", None)
    assert main([*command, "--resume"]) == 0
    assert "4,718,592 = 4.7M" in capsys.readouterr().out


def test_an_unknown_claim_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["paper", "--claim", "faster-than-light"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in paper.CLAIMS)


def test_the_list_names_every_claim(capsys):
    assert main(["paper", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in paper.CLAIMS)


def test_publishing_takes_every_claim(capsys):
    assert main(["paper", "--publish", "--claim", "checkpoint"]) == 2
    assert "--publish takes a whole profile" in capsys.readouterr().err


def test_markdown_escapes_and_keeps_every_row():
    rows = [
        ClaimRow("a | b", "Table 2", "0.3M", "294,912", "computed", HOLDS, "the sum"),
        ClaimRow("c", "Table 3", "1M", "-", "measured", NOT_MEASURED, "no data"),
    ]
    page = paper.markdown(rows)
    assert "| ✓ | a \\| b | Table 2 | 0.3M | 294,912 | computed, holds |" in page
    assert "| · | c | Table 3 | 1M | - | not measured |" in page
    assert "- **c** (Table 3): no data" in page
    assert "\n- The paper's own arithmetic, 1 in all: ✓ 1 holds\n- Measured here, 1 in all: · 1 not measured\n" in page


def test_a_figure_that_the_paper_s_formulas_do_not_give_is_not_one_that_was_not_reproduced():
    rows = [
        ClaimRow("a", "Table 2", "0.3M", "0.4M", "computed", DIFFERS, "the sum"),
        ClaimRow("b", "Table 3", "25 %", "3 %", "measured", DIFFERS, "on this machine"),
    ]
    assert paper.summary(rows) == [
        "The paper's own arithmetic, 1 in all: ≠ 1 the paper's figure is another",
        "Measured here, 1 in all: ≠ 1 not reproduced",
    ]
    text = paper.render(rows)
    assert "0.4M  (computed, the paper's figure is another)" in text
    assert "3 %  (measured, not reproduced)" in text
