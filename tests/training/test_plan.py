"""The memory plan: against DeepSpeed's own estimators, and what the command makes of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2
from hypothesis import given
from hypothesis import strategies as st

from slipway.errors import ParamsError
from slipway.params import Params, TrainParams
from slipway.training import plan, survey
from slipway.workloads.ranker.params import RankerParams
from tests.classifier import data as pictures
from tests.llm import data as texts
from tests.ranker import data

LARGE = plan.Model(13_000_000_000, 100_000_000, None)
MODEL = RankerParams(width=128, blocks=2, max_length=8, negatives=16)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_plan_agrees_with_deepspeeds_estimators(devices: int) -> None:
    def own(stage: int, offload: str) -> plan.Places:
        return plan.places(LARGE, "bf16", devices, stage, offload)

    elements, share = LARGE.parameters, LARGE.parameters / devices
    _, device = zero2(elements, num_gpus_per_node=devices, cpu_offload=False)
    assert own(2, "none").device.state == pytest.approx(device, rel=0.05)
    host, device = zero2(elements, num_gpus_per_node=devices, cpu_offload=True, additional_buffer_factor=1)
    assert own(2, "cpu").device.state == pytest.approx(device, rel=0.05)
    if devices <= 4:  # with more it tells what the models need while they are made
        assert own(2, "cpu").host.state * devices == pytest.approx(host, rel=0.05)

    # At stage 3 the estimator counts the fp32 gradient, but not the 16-bit one that it is copied from and that stays.
    _, device, layer = zero3(elements, LARGE.largest, num_gpus_per_node=devices, cpu_offload=False)
    assert own(3, "none").device.state - 2 * share == pytest.approx(device - layer, rel=0.05)
    host, device, _ = zero3(elements, LARGE.largest, num_gpus_per_node=devices, additional_buffer_factor=1)
    assert own(3, "cpu").device.state == 0
    assert own(3, "cpu").device.total <= device + 2 * plan.BUCKET * 2  # its layer, and our gradient bucket
    assert own(3, "cpu").host.state * devices - 2 * elements == pytest.approx(host, rel=0.05)


@given(st.integers(1, 10**11), st.integers(1, 64), st.sampled_from(["fp32", "bf16", "fp16"]), st.integers(1, 10**12))
def test_less_memory_never_takes_a_cheaper_setting(elements: int, devices: int, precision: str, memory: int) -> None:
    def chosen(device: int) -> int:
        planned = plan.rows(plan.Model(elements, elements, 0), precision, plan.Machine(devices, device))
        row = plan.cheapest(planned)
        return len(planned) if row is None else planned.index(row)

    assert chosen(memory) >= chosen(2 * memory)
    assert chosen(10**15) == 0


def test_a_parameter_that_lies_in_two_shares_has_its_gradient_whole_in_both() -> None:
    def gradients(*sizes: int) -> int:
        return plan.places(plan.Model(40, 30, 0, sizes), "fp32", 2, 2, "none").device.gradients

    assert gradients() == gradients(10, 10, 10, 10) == 4 * 20
    assert gradients(30, 5, 5) == 4 * 40


def test_what_is_offloaded_has_to_fit_the_host() -> None:
    roomy = plan.Machine(8, 24 * 10**9, 400 * 10**9, 400 * 10**9)
    tight, full = replace(roomy, host=100 * 10**9), replace(roomy, host=100 * 10**9, disk=10**9)
    taken = [plan.cheapest(plan.rows(LARGE, "bf16", machine)) for machine in (roomy, tight, full)]
    assert [row and (row.stage, row.offload) for row in taken] == [(3, "cpu"), (3, "disk"), None]
    of_cpus = plan.Machine(8, 24 * 10**9, 8 * 24 * 10**9, 10**9, shared=True)
    assert plan.cheapest(plan.rows(LARGE, "bf16", of_cpus)) is None, "offload to the host frees nothing there"


def test_auto_takes_the_setting_that_fits_and_its_offload(tmp_path: Path) -> None:
    ingested = data.write(tmp_path / "data", data.steps(users=400, items=600))

    def taken(memory: float | None) -> TrainParams:
        train = TrainParams(zero="auto", device_memory_gb=memory, batch_size=16)
        return survey.resolve(Params(train=train).model_copy(update={"model": MODEL}), ingested)

    roomy = taken(None)
    assert (roomy.zero, roomy.offload) == (0, "none")
    tight = taken(0.0045)
    assert (tight.zero, tight.offload) == (3, "cpu"), tight
    with pytest.raises(ParamsError, match="no setting fits 1.0 MB a device .* the smallest, zero: 3 with offload: cpu"):
        taken(0.001)


def test_auto_measures_the_model_of_any_workload(tmp_path: Path) -> None:
    photos, books = tmp_path / "photos", tmp_path / "books"
    written = pictures.params(pictures.folder(photos, {"cat": 30, "dog": 30})), texts.params(texts.folder(books))
    pictures.read(written[0], tmp_path / "classifier")
    texts.read(written[1], tmp_path / "llm")
    for params in written:
        train = params.train.model_copy(update={"zero": "auto", "batch_size": 4})
        resolved = survey.resolve(params.model_copy(update={"train": train}), tmp_path / params.workload)
        assert (resolved.zero, resolved.offload) == (0, "none"), params.workload


def test_the_command_prints_the_plan_and_trains_nothing(tmp_path: Path) -> None:
    def command(*options: str) -> subprocess.CompletedProcess[str]:
        root = Path(__file__).parents[2]
        words = [sys.executable, "-m", "tasks.train", "--params", str(root / "params.yaml"), *options]
        return subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)

    asked = ["--plan", "--parameters", "13e9", "--devices", "8", "--precision", "bf16"]
    done = command(*asked, "--memory", "40")
    assert done.returncode == 0, done.stderr
    assert "32.7 GB" in done.stdout, done.stdout  # 20 bytes a parameter over 8, and buckets
    assert next(line for line in done.stdout.splitlines() if "<" in line).split()[1] == "3", done.stdout
    done = command(*asked, "--memory", "0.1")
    assert done.returncode == 2
    assert "no setting fits 100.0 MB a device" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir()), "no report"
