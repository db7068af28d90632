"""The harness for a GPU, without one: programs that play its stages, a CPU that plays the card, a small memory."""

import io
import json
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import llama_config

pytest.importorskip("triton")
import bench.common
from bench import decode, device, gpu, gpu_tests, kernels, profiles, smollm2_gpu
from bench.common import distill_options
from bench.gpu import Stage, run_all, seconds_of
from bench.traffic import kernel_calls, plain_calls
from llamba_ref.conventions import load_result
from llamba_ref.llama import Llama
from llamba_ref.llamba import Llamba
from llamba_ref.plots import draw_profile, shares_of_time
from llamba_ref.throughput import as_transformers

SIZES = llama_config(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
)


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Where results are written."""
    for module in (bench.common, gpu):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


# the stages


def plays(name, code):
    """A stage that runs a line of Python."""
    return Stage(name, ("-c", code), "plays", False)


def test_times():
    assert (seconds_of("30m"), seconds_of("90s"), seconds_of("1h"), seconds_of("1.5m")) == (1800, 90, 3600, 90)
    for wrong in ("", "30", "m", "-1m", "30 m", "1d", "nan m"):
        with pytest.raises(ValueError, match="a number with s, m or h"):
            seconds_of(wrong)


def test_stages_are_programs_that_are_there():
    assert [stage.name for stage in gpu.STAGES] == [
        "gpu_tests",
        "kernels",
        "decode",
        "demo",
        "smollm2",
        "profiles",
        "chapters",
    ]
    for stage in gpu.STAGES:
        module = stage.program[1].partition(".")[2]
        source = (gpu.ROOT / "bench" / f"{module}.py").read_text()
        assert ("stop_after: float" in source) == stage.timed  # what the harness says to a stage is an option of it


def test_a_stage_that_fails_takes_no_other_with_it(results, capfd):
    rows = run_all(
        [plays("good", "print('measured')"), plays("bad", "1 / 0"), plays("part", "exit(75)"), plays("last", "")],
        "t4",
        600,
    )
    assert [(row["stage"], row["status"]) for row in rows] == [
        ("good", "done"),
        ("bad", "failed"),
        ("part", "no time"),
        ("last", "done"),
    ]
    saved = json.loads((results / "gpu_t4.json").read_text())
    assert saved["stages"] == rows and saved["date"] and saved["versions"]["torch"] and saved["device"]
    assert "measured" in capfd.readouterr().out


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(results, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LIMIT", 3.0)
    monkeypatch.setattr(gpu, "ENDING", 0.5)
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    file = tmp_path / "pid"
    rows = run_all(
        [plays("hangs", f"{child}; open({str(file)!r}, 'w').write(str(p.pid)); time.sleep(60)"), plays("next", "")],
        "t4",
        600,
    )
    assert [row["status"] for row in rows] == ["no time", "done"] and rows[0]["seconds"] < 20
    for _ in range(50):  # until the system has buried it
        state = subprocess.run(["ps", "-o", "stat=", "-p", file.read_text()], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):
            break
        time.sleep(0.1)
    assert not state.strip() or state.startswith("Z")


def test_what_is_done_is_left_out_and_the_rest_goes_on(results, monkeypatch, tmp_path):
    file = tmp_path / "runs"
    stages = [
        plays("good", f"open({str(file)!r}, 'a').write('g')"),
        plays("bad", f"open({str(file)!r}, 'a').write('b'); exit(1)"),
    ]
    run_all(stages, "t4", 600)
    run_all(stages, "t4", 600)
    assert file.read_text() == "gbb"  # the one that failed is tried again
    run_all(stages[:1], "a100", 600)
    assert file.read_text() == "gbbg"  # another card knows nothing of it
    run_all(stages[:1], "t4", 600, again=True)
    assert file.read_text() == "gbbgg"
    assert [row["stage"] for row in gpu.results_of("t4").values()] == ["good", "bad"]  # the other row is still there
    monkeypatch.setattr(gpu, "code", lambda: "another")
    run_all(stages[:1], "t4", 600)
    assert file.read_text() == "gbbggg"


def test_no_stage_begins_when_the_budget_is_spent(results, monkeypatch):
    monkeypatch.setattr(gpu, "ENDING", 1.0)
    rows = run_all([plays("long", "import time; time.sleep(2)"), plays("late", "")], "t4", 2.5)
    assert [row["status"] for row in rows] == ["done", "no time"]
    assert [*gpu.results_of("t4").values()] == rows  # it is written down, too


def test_a_timed_stage_is_told_its_time(results, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "LIMIT", 100.0)
    run_all([Stage("timed", ("-c", "import sys; print(sys.argv[1:])"), "plays")], "t4", 600)
    assert "['--stop-after', '55']" in capfd.readouterr().out


def test_the_code_changes_with_a_kernel(monkeypatch, tmp_path):
    before = gpu.code()
    assert before == gpu.code() and len(before) == 12
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    first = gpu.code()
    (tmp_path / "bench" / "one.py").write_text("1")
    assert gpu.code() not in (first, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_wrong_input_and_no_card():
    for options, message in (
        ({"only": ("kernel",)}, "only has 'kernel': known are gpu_tests, kernels"),
        ({"budget": "long"}, "budget is 'long'"),
        ({}, "there is none here"),
    ):
        with pytest.raises(SystemExit, match=message):
            gpu.main(**options)
    for module in (gpu_tests, decode, profiles):
        with pytest.raises(SystemExit, match="needs a CUDA device: there is none here"):
            module.main()
    with pytest.raises(SystemExit, match="models has '2B': known are demo, 1B, 8B"):
        kernels.main(models=("2B",))


# tests on the card


def test_outcomes_of_pytest():
    alone = "tests/test_a.py::test_one PASSED [ 10%]\ntests/test_a.py::test_two[a b-1] FAILED [ 20%]\n"
    several = "[gw0] [ 10%] PASSED tests/test_b.py::test_one[x y] \n[gw1] [ 20%] SKIPPED tests/test_b.py::test_two \n"
    assert gpu_tests.outcomes(alone) == {
        "tests/test_a.py::test_one": "passed",
        "tests/test_a.py::test_two[a b-1]": "failed",
    }
    assert list(gpu_tests.outcomes(several).values()) == ["passed", "skipped"]


@pytest.mark.slow
def test_a_run_of_marked_tests(monkeypatch, tmp_path):
    """What is said of each is found in what pytest prints, alone and with several processes, and when it hangs."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "tests" / "test_one.py").write_text(
        "import time, pytest\npytestmark = pytest.mark.gpu\n@pytest.mark.parametrize('x', ['a b', 'c'])\n"
        "def test_good(x): pass\ndef test_bad(): assert 1 == 2, 'differs'\n@pytest.mark.skip\ndef test_skip(): pass\n"
    )
    (tmp_path / "tests" / "test_other.py").write_text("def test_unmarked(): pass\n")
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    for processes in ("0", "2"):
        text, ended = gpu_tests.run(("-n", processes), 60)
        found = {name.partition("::")[2]: said for name, said in gpu_tests.outcomes(text).items()}
        assert ended and {name.strip(): said for name, said in found.items()} == {
            "test_good[a b]": "passed",
            "test_good[c]": "passed",
            "test_bad": "failed",
            "test_skip": "skipped",
        }
        assert any("differs" in reason for reason in gpu_tests.REASON.findall(text))
    (tmp_path / "tests" / "test_two.py").write_text(
        "import time, pytest\n@pytest.mark.gpu\ndef test_hangs(): time.sleep(60)\n"
    )
    text, ended = gpu_tests.run(("-n", "0"), 8)
    assert not ended and "passed" in gpu_tests.outcomes(text).values()


# decoding


def test_a_student_writes_what_generate_writes():
    student = Llamba.from_teacher(Llama(SIZES), start="published", rotation="none", d_state=16, chunk_size=16).eval()
    token = torch.zeros(3, 1, dtype=torch.long)
    step = decode.recurrent(student, 3, 1)
    written, token_of = [], step.__closure__[[name for name in step.__code__.co_freevars].index("token")]
    for _ in range(6):
        step()
        written.append(token_of.cell_contents.clone())
    assert torch.equal(torch.stack(written, 1), student.generate(token, 6)[:, 1:])


@pytest.mark.parametrize("attention", ["sdpa", "there"])
def test_transformers_step_is_a_step_after_that_context(attention):
    """The same logits as our Llama that has read as many tokens: the cache is filled with its keys and values."""
    ours = Llama(SIZES).eval()
    theirs, context = as_transformers(ours), 11
    step = decode.cached(attention, theirs, 2, context)
    cells = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__)))
    ids = torch.randint(97, (2, context))
    with torch.no_grad():
        _, state = ours.prefill(ids)
        for layer, cache in zip(cells["cache"].layers, state):
            layer.keys[:, :, :context], layer.values[:, :, :context] = cache.k[:, :, :context], cache.v[:, :, :context]
        expected = ours.step(torch.zeros(2, dtype=torch.long), state)[0].argmax(-1)
    step()
    assert torch.equal(cells["token"], expected)
    cells["token"].zero_()
    step()  # as if for the first time: the context does not grow
    assert torch.equal(cells["token"], expected)


def contender(most, calls):
    """A model whose steps need more memory than there is from a batch on."""

    def prepare(model, batch, context):
        if batch > most:
            raise torch.OutOfMemoryError("tried to allocate")
        calls.append(batch)
        return lambda: torch.zeros(batch)

    return decode.Contender(lambda: torch.nn.Identity(), prepare)


@pytest.mark.parametrize("most, found", [(0, 0), (1, 1), (5, 5), (6, 6), (7, 7), (8, 8), (13, 12), (15, 14)])
def test_the_largest_batch(most, found):
    rows = decode.sweep("Llamba", contender(most, []), 16, "cpu", time.time() + 60, budget=0.0)
    assert decode.largest(rows, "Llamba", 16) == found and decode.full(rows, "Llamba", 16)
    assert [row["batch"] for row in rows[:2]] == [1, 1] and (rows[0]["graph"], rows[1]["graph"]) == (False, True)
    assert all(row["tokens_per_second"] > 0 and row["peak_bytes"] >= 0 for row in rows if not row["reason"])


def test_a_sweep_ends_in_time_at_the_most_and_at_another_failure():
    assert len(decode.sweep("Llamba", contender(10**9, []), 16, "cpu", time.time() - 1, budget=0.0)) == 1
    rows = decode.sweep("Llamba", contender(10**9, []), 16, "cpu", time.time() + 60, most=16, budget=0.0)
    assert decode.largest(rows, "Llamba", 16) == 16 and not decode.full(rows, "Llamba", 16)
    broken = decode.Contender(
        lambda: torch.nn.Identity(), lambda model, batch, context: 1 / (batch < 4) and (lambda: 1)
    )
    rows = decode.sweep("Llamba", broken, 16, "cpu", time.time() + 60, budget=0.0)
    assert rows[-1]["reason"] == "ZeroDivisionError: division by zero" and decode.largest(rows, "Llamba", 16) == 2
    assert not decode.full(rows, "Llamba", 16)  # it is not the memory


def test_goals_of_decoding():
    """Beside the better of the two peers; nothing is said where one of them has no row."""

    def one(model, batch, speed, reason=None, context=8192):
        return {
            "model": model,
            "context": context,
            "batch": batch,
            "graph": True,
            "reason": reason,
            "tokens_per_second": speed,
        }

    rows = [
        one("Llamba", 64, 900.0),
        one("Llamba", 128, 0, "out of memory"),
        one("transformers, a", 4, 100.0),
        one("transformers, a", 8, 0, "out of memory"),
        one("transformers, b", 8, 300.0),
    ]
    assert decode.goals(rows) == {"8192": {"batch": 8.0, "batch_is_limit": False, "tokens_per_second": 3.0}}
    rows.append(one("transformers, b", 16, 0, "out of memory"))
    assert decode.goals(rows)["8192"]["batch_is_limit"] and decode.goals(rows[:2]) == {}


def test_batches_that_are_predicted():
    """For the sizes of the command, from nothing but sizes; the student's do not depend on the context."""
    found = decode.predicted(decode.SIZES[decode.MODEL], 80e9)
    assert found["Llamba"]["2048"] == found["Llamba"]["8192"] > 8 * found["transformers"]["8192"] > 0
    assert found["transformers"]["2048"] == pytest.approx(4 * found["transformers"]["8192"], rel=0.02)


# profiles


def event(name, begin, end, where="CPU", parent=None):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=begin, end=end),
        device_type=f"DeviceType.{where}",
        cpu_parent=parent,
    )


def test_events_of_the_last_step():
    first, last = event("step", 0, 50), event("step", 100, 200)
    events = [
        first,
        event("kernel_a", 10, 40, "CUDA"),
        last,
        event("aten::mm", 105, 115, parent=last),
        event("cudaLaunchKernel", 106, 108),
        event("cudaStreamSynchronize", 150, 190),
        event("cudaMemcpyAsync", 120, 121),
        event("kernel_b", 110, 150, "CUDA"),
        event("kernel_c", 140, 220, "CUDA"),
    ]
    found = profiles.of_last_step(events)
    assert [(one.name, one.begin, one.where) for one in found] == [
        ("aten::mm", 5, "call"),
        ("cudaLaunchKernel", 6, "call"),
        ("kernel_b", 10, "card"),
        ("cudaMemcpyAsync", 20, "call"),
        ("kernel_c", 40, "card"),
        ("cudaStreamSynchronize", 50, "wait"),
    ]
    said = profiles.busy(found)
    assert said == {"microseconds": 120, "busy": 110 / 120, "kernels": 2, "waits": 1, "waited_microseconds": 40}


def test_shares_of_time_by_hand():
    """Overlapping events count once, other kinds not at all; what ends after the last edge is cut."""
    events = [["a", 0, 4, "card"], ["b", 2, 4, "card"], ["c", 3, 1, "card"], ["d", 15, 10, "card"], ["e", 0, 9, "wait"]]
    assert shares_of_time(events, "card", np.array([0, 5, 10, 20])).tolist() == [1, 0.2, 0.5]
    assert shares_of_time(events, "wait", np.array([0.0, 10])).tolist() == [0.9]
    assert shares_of_time([], "card", np.array([0.0, 10])).tolist() == [0]


def test_the_picture_of_a_profile():
    """What the card and the processor do at each moment in milliseconds, a time line for each step."""
    events = [["mm", 0, 500, "card"], ["add", 1000, 240, "card"], ["cudaStreamSynchronize", 500, 740, "wait"]]
    step = {"step": "training", "microseconds": 2000.0, "busy": 0.375, "kernels": 2, "waits": 1, "events": events}
    figure = draw_profile({"device": "a card", "date": "2031-01-01", "steps": [step, step | {"step": "decoding"}]})
    titles = [axis.get_title() for axis in figure.axes]
    assert [title.partition(":")[0] for title in titles] == ["training", "decoding"]
    assert titles[0] == "training: 2 kernels, the card works 38% of the time, waits: 1"
    for axis in figure.axes:
        card, wait = ((patch.get_data().values - patch.get_data().baseline) / 0.8 for patch in axis.patches)
        slices = 2 + 4.0 * np.arange(500)  # their middles, in microseconds
        assert card == pytest.approx(1.0 * ((slices < 500) | (slices > 1000) & (slices < 1240)), abs=1e-9)
        assert wait == pytest.approx(1.0 * ((slices > 500) & (slices < 1240)), abs=1e-9)
        assert axis.get_xlim() == (0, 2) and axis.patches[0].get_data().edges[-1] == 2
    figure.savefig(io.BytesIO())  # it can be drawn


@pytest.mark.parametrize("make", [profiles.training, profiles.decoding])
def test_steps_are_watched(make, monkeypatch):
    monkeypatch.setattr(profiles, "LENGTH", 24)
    step = make(SIZES, "cpu", torch.float32)
    found = profiles.watch(step, "cpu")
    assert found and {one.where for one in found} == {"call"} and profiles.busy(found)["kernels"] == 0


# SmolLM2 and the demo, with small models


def test_a_long_run_stops_at_a_checkpoint_and_goes_on(results, monkeypatch, tmp_path):
    """In two pieces it has the curve that it has in one."""
    curves = []
    for folder, times in (("whole", [float("inf")]), ("pieces", [0.0, 0.0, float("inf")])):
        out = tmp_path / folder
        command = (
            "distill --teacher tiny --text austen --d-state 16 --chunk-size 16 --batch-size 2 --length 32 "
            f"--steps 0 3 3 --lr 5e-4 5e-4 1e-4 --validation-blocks 4 --threads 1 --save-every 2 --out {out}"
        )
        monkeypatch.setattr(smollm2_gpu, "COMMAND", command)
        monkeypatch.setattr(smollm2_gpu, "OUT", out)
        monkeypatch.setattr(smollm2_gpu, "EVERY", 2)
        for piece in times:
            if piece == float("inf"):
                smollm2_gpu.main()
            else:
                with pytest.raises(SystemExit) as stopped:
                    smollm2_gpu.main(piece)
                assert stopped.value.code == device.UNFINISHED
                assert not json.loads((results / "smollm2_gpu_cpu.json").read_text())["whole"]
        saved = json.loads((results / "smollm2_gpu_cpu.json").read_text())
        assert saved["whole"] and (out / "student").is_dir() and saved["rows"][0]["name"] == "student"
        curves.append([(one["step"], one["tokens"], one["ratio"]) for one in saved["curve"]])
    assert curves[0] == curves[1] and [step for step, *_ in curves[0]] == [2, 4, 6]


@pytest.mark.parametrize("capability, memory, extra", [
    ((9, 0), 141e9, " --precision bf16"),
    ((8, 9), 23e9, " --precision bf16 --micro-batch-size 8"),
    ((7, 5), 15.8e9, " --precision no --micro-batch-size 8"),
])
def test_the_recipe_of_a_card(monkeypatch, capability, memory, extra):
    """A T4 has no tensor cores for bfloat16, and little room."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, memory))
    assert smollm2_gpu.for_card() == extra
    options = distill_options(smollm2_gpu.COMMAND + extra)
    assert options.precision == extra.split()[1] and options.batch_size == 32


# predictions


def calls(function, *shapes, wanted=(), dtype=torch.float32):
    """What `plain_calls` keeps, of inputs a, b, c, ..."""
    make = lambda device: {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in zip("abc", shapes)}
    return plain_calls(function, make, wanted)


def test_calls_of_plain_pytorch_by_hand():
    """A product in half precision, its sum with a bias, and a view, which costs nothing."""
    seen = calls(lambda a, b, c: ((a @ b + c).T,), (8, 16), (16, 4), 4, dtype=torch.float16)
    assert seen == [(2 * (128 + 64 + 32), 2 * 8 * 16 * 4), (2 * (32 + 4 + 32), 0)]
    limits = kernels.Limits(100.0, {"float32": 10.0})
    assert sum(limits.seconds(call, torch.float32) for call in seen) == 102.4 + 136 / 100
    both = calls(lambda a, b: (a @ b,), (8, 16), (16, 4), wanted=("a", "b"))
    assert [call.flops for call in both if call.flops] == 3 * [1024]  # the product, and a gradient for each factor


@pytest.mark.parametrize("what, function, numbers", [
    ("expanded", lambda a: a.expand(100, 1000) * 2, 1000 + 100_000),
    ("twice", lambda a: a * a, 2000),
    ("in place", lambda a: a.add_(1), 2000),
    ("copied", lambda a: torch.empty_like(a).copy_(a), 2000),
    ("given out", lambda a: torch.mul(a, a, out=torch.empty_like(a)), 2000),
    ("zeros", torch.zeros_like, 1000),
    ("new", lambda a: a.new_zeros(1), 1),
    ("view", lambda a: a.view(10, 100).T, 0),
])
def test_each_tensor_is_read_once_and_written_once(what, function, numbers):
    assert sum(call.bytes for call in calls(lambda a: (function(a),), 1000)) == 4 * numbers


def test_launches_of_kernels_by_hand():
    """A step moves its state twice, whether it is replaced or changed in place; a scan reads and writes once; SSD
    stores the states of its chunks."""
    card, half = kernels.GPUS["T4"], torch.float16
    moved = {}
    for name, sizes in (("ssd_step", {**kernels.MODELS["1B"], "batch": 7}),
                        ("causal_conv_step", {"batch": 7, "channels": 96}),
                        ("linear_scan", {"batch": 32, "length": 2048, "width": 2048})):
        operation = kernels.OPERATIONS[name]
        make = lambda device: operation.make(**sizes, dtype=half, device=device)
        found = sum(call.bytes for call in kernel_calls(operation.run, make, (), card))
        least = operation.count(**sizes, size=2, backward=False).bytes
        moved[name] = found / least
    assert moved["ssd_step"] == moved["causal_conv_step"] == 1
    assert 1 < moved["linear_scan"] < 1.01  # the state before the first token
    sizes = {**kernels.MODELS["1B"], "batch": 1, "length": 4096}
    make = lambda device: kernels.OPERATIONS["ssd"].make(**sizes, dtype=half, device=device)
    found = sum(call.bytes for call in kernel_calls(kernels.OPERATIONS["ssd"].run, make, (), card))
    x, states = 2 * 4096 * 32 * 64, 4 * 4096 // 64 * 32 * 64 * 64  # bytes of x, B, C or y; of all chunks' states
    assert found == pytest.approx(6 * x + 4 * states, rel=0.05)  # the rest are gates


def test_predictions_are_the_rows_that_would_be_measured():
    """With the same counts, and no time below what a data sheet allows; those of the demo are counted again."""
    rows = load_result("kernels_predicted")["rows"]
    cases = [
        (name, model, sizes, half)
        for name, operation in kernels.OPERATIONS.items()
        for model, sizes, half in operation.cases()
        for _ in range(1 + bool(operation.wanted))
    ]
    wanted = [case for case in cases if case[1] in ("1B", "demo")]
    assert [(row["operation"], row["model"], row["sizes"], row["half"]) for row in rows] == wanted
    for row in rows:
        for card, sheet in kernels.GPUS.items():
            assert row["seconds"][card] >= row["bytes"] / sheet.bandwidth > 0
            assert row["seconds"][card] >= row["flops"] / sheet.half
            assert row["launched_bytes"][card] >= row["bytes"]
            assert row["plain_seconds"][card] > 2.3 * row["launched_seconds"][card]  # why "auto" is Triton, on a T4 too
    short = [row for row in rows if row["sizes"].get("length", 1) <= 2048 and row["model"] == "demo"]
    again = [kernels.predicted(*(row[key] for key in ("operation", "model", "sizes", "half")), "back" in row["pass"])
             for row in short]
    assert json.loads(json.dumps(again)) == short
