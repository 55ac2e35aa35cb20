"""What pytest-benchmark writes about a machine: what figures are worth knowing with, and no name of anybody."""

import pytest
import torch

from benchmarks import harness


def pytest_configure():
    torch.set_num_threads(1)  # with which all is timed, and which a machine's description names


@pytest.hookimpl
def pytest_benchmark_generate_machine_info(config):
    return {"machine": harness.machine(), "node": "", "system": ""}


@pytest.hookimpl
def pytest_benchmark_generate_commit_info(config):
    return {"id": harness.commit()}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for one in output_json["benchmarks"]:
        one["stats"].pop("data", None)
