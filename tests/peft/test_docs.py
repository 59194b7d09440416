"""docs/peft.md promises nothing that no test holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parents[1] / "docs" / "peft.md").read_text(encoding="utf-8")

# First cell of a row of the page's two tables → the tests that hold it, with their cases.
HELD_BY: dict[str, list[str]] = {
    "`nn.Linear`, with or without bias": ["fast_path[plain]", "fast_path[no base bias]", "whole_model[bias_trains]"],
    "`Conv1D` of transformers (GPT-2)": ["fast_path[Conv1D]", "fast_path[Conv1D, bf16 base, fp32 adapters]"],
    "`Linear4bit` of bitsandbytes (QLoRA)": [
        "quantised_bases[nf4]",
        "quantised_bases[no double quantisation]",
        "no_dense_weight_is_kept_for_the_backward",
    ],
    "`Linear8bitLt` of bitsandbytes": ["quantised_bases[8 bits, outliers]", "quantised_bases[8 bits, autocast]"],
    "dropout": ["fast_path[dropout]", "eval_switches_dropout_off", "dropout_trains"],
    "`use_rslora`, `rank_pattern`, `alpha_pattern`": [
        "fast_path[rsLoRA]",
        "fast_path[rank_pattern]",
        "scaling_is_read",
    ],
    "`lora_bias=True`": ["lora_bias_joins_the_base_bias", "lora_bias_is_in_no_group"],
    "DoRA (`use_dora=True`)": [
        "dora[nn.Linear]",
        "dora[Conv1D]",
        "dora_on_quantised_bases",
        "dora_with_dropout",
        "dora_layers_compute_alone",
    ],
    "float32, bfloat16, float16 or float64 throughout": ["fast_path[bf16]", "fast_path[fp16]", "fast_path[float64]"],
    "float32 adapters on a bfloat16 or float16 base": ["fast_path[bf16 base, fp32 adapters]"],
    "`torch.autocast`": ["autocast"],
    "several active adapters without dropout": ["several_active_adapters_are_one_product"],
    "a base weight that trains": ["a_trainable_base_is_right_and_said"],
    "any leading dimensions, empty batches": ["any_leading_dimensions"],
    "gradient checkpointing, gradient accumulation": ["checkpointing_replays_the_masks", "gradients_accumulate"],
    "`torch.compile`": ["compiles_into_one_graph_with_the_operator_in_it", "compiled_by_inductor"],
    "merged adapter": ["bit_for_bit[merged]"],
    "disabled adapters": ["bit_for_bit[disabled]", "bit_for_bit[merged, then disabled]"],
    "no active adapter in the layer": ["bit_for_bit[no active adapter here]"],
    "mixed batches (`adapter_names`)": ["mixed_batch_falls_back"],
    "several active adapters with dropout": ["several_active_adapters_are_one_product"],
    "other variants of LoRA, and DoRA among several active adapters": [
        "dora_falls_back_bit_for_bit[another variant]",
        "dora_falls_back_bit_for_bit[DoRA among several adapters]",
        "what_no_call_could_run_is_skipped",
    ],
    "other quantised, parametrised or subclassed base layers": [
        "layers_on_other_quantised_bases_are_skipped_by_name",
        "bit_for_bit[parametrised base]",
        "bit_for_bit[weight_norm of old]",
        "bit_for_bit[base swapped for a quantised one]",
        "report_names_every_layer_and_why",
    ],
    "a quantised base without its state, or that a CPU has packed anew": [
        "layers_without_a_state_are_skipped",
        "a_weight_that_a_cpu_packed_anew_is_left_to_peft",
    ],
    "a quantised base whose dtypes make PEFT's result finer, or of another dtype": [
        "every_result_has_the_dtype_that_peft_gives_it"
    ],
    "embeddings, convolutions, experts, other tuners": ["report_names_every_layer_and_why"],
    "hooks or a forward of its own on `base_layer`, `lora_A`, `lora_B` or the dropout": [
        "bit_for_bit[forward_hook on lora_A]"
    ],
    "a replaced forward of the whole layer": ["xlora_works", "subclasses_and_replaced_forwards_are_skipped"],
    "DTensor and other tensor subclasses, weights that are no `Parameter`": [
        "dtensor_falls_back",
        "bit_for_bit[base weight of a subclass]",
        "bit_for_bit[adapter weight that is no Parameter]",
    ],
    "DeepSpeed ZeRO-3 partitions": ["bit_for_bit[ZeRO-3 base]", "bit_for_bit[ZeRO-3 adapter]"],
    "a scaling that is a tensor": ["bit_for_bit[tensor-valued scaling]"],
    "`disable_input_dtype_casting`": ["bit_for_bit[disable_input_dtype_casting]"],
    "adapters in another dtype than the base, float32 on half precision apart": [
        "bit_for_bit[adapters narrower than the base]"
    ],
    "float32 adapters on a half-precision base with `strict_dtype=True`": ["strict_dtype_keeps_peft_float32_branch"],
    "dropout of everything, in place, or of another class": [
        "bit_for_bit[dropout of everything]",
        "bit_for_bit[another dropout]",
        "dropout_in_place_falls_back",
    ],
    "torch.func transforms, forward-mode AD, `torch.jit.trace`, global module hooks": ["what_surrounds_a_call"],
    "inputs without data or of a dtype that the base cannot take": ["meta_inputs", "peft_reports_wrong_dtypes"],
}


def rows(heading: str) -> list[str]:
    """First cells of the table under ``| heading | |``."""
    table = PAGE.split(f"| {heading} | |\n| --- | --- |\n")[1].split("\n\n")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()]


def known_tests() -> tuple[set[str], set[str]]:
    """Names of all test functions of the PEFT tests, and every text in these files: the names of cases."""
    functions: set[str] = set()
    texts: set[str] = set()
    for path in TESTS.glob("test_*.py"):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                functions.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    return functions, texts


def test_every_row_is_held_by_a_test() -> None:
    assert rows("on the fast path") + rows("PEFT's own forward") == list(HELD_BY)
    functions, texts = known_tests()
    # The hooks' cases are put together from these.
    texts |= {f"{kind} on {of}" for kind in texts & {"forward_hook"} for of in texts & {"lora_A"}}
    for names in HELD_BY.values():
        for name in names:
            function, _, case = re.fullmatch(r"([^\[]+)(\[(.*)\])?", name).groups()
            assert any(function in candidate for candidate in functions), name
            assert case is None or case in texts, name


def test_messages_in_the_page_are_those_of_the_code() -> None:
    code = (TESTS.parents[1] / "fastlora" / "peft" / "patch.py").read_text(encoding="utf-8")
    quoted = [line.split("`")[1] for line in PAGE.split("## Trouble")[1].splitlines() if line.startswith("| `")]
    assert len(quoted) == 7
    for message in quoted:
        for part in re.split(r"…|\d+ × |: it ", message):
            assert part.strip() in re.sub(r'"\s+f?"', "", code), message
