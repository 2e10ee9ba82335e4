"""Cores are those that a process may run on, not those of the machine."""

import os

import pytest
import torch

from retrieval.embedding.stages import checked_workers
from retrieval.models.multi_device import cores_of_each
from retrieval.system.cpu import reading_threads, usable_cores
from training.run import workers_for


@pytest.mark.usefixtures("one_core")
def test_a_process_that_is_narrowed_to_one_core_counts_one_core() -> None:
    assert usable_cores() == 1


def test_a_process_that_is_not_narrowed_counts_all_of_its_cores() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))


@pytest.mark.usefixtures("one_core")
def test_a_few_more_threads_than_cores_read_files() -> None:
    assert reading_threads() == 5


@pytest.mark.usefixtures("one_core")
def test_on_one_core_one_thread_prepares_photos() -> None:
    assert checked_workers(None) == 1


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("devices", [1, 2])
def test_devices_share_the_cores_and_each_has_one_at_least(devices: int) -> None:
    assert cores_of_each(devices) == 1


@pytest.mark.usefixtures("one_core")
def test_a_gpu_gets_a_worker_process_for_each_core() -> None:
    assert workers_for(torch.device("cuda"), asked=None) == 1
